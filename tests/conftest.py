"""What several test files share."""
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

import pytest
import torch

import model
import nanobit.checkpoint
import nanobit.cli
import nanobit.data

TEXT = "".join(f"def f{i}(x): return {'self index value'.split()[i % 3]} + {i * i}\n"
               for i in range(800))

@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)

@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """An empty folder to work in, and a cache in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def in_float64(monkeypatch):
    """Models that `double` made compute all in float64: `.float()` is what else they would use.

    Two computations of one number sum in another order, and processors differ in theirs. In float32
    a rounded activation then falls on the other side of a border now and then, and all that follows
    differs. In float64 they differ in the 16th digit, and no border is that near."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

def double(m):
    """The LLaMA m, its weights and its activations in float64. To be used with in_float64."""
    m.dtype = torch.float64
    return m.double()

def machine_code(kernel, types, constants, aligned, options):
    """Compile a Triton kernel for an H100, which need not be there -> (bytes of shared memory, what
    cuobjdump says of its resources, its assembly).

    types: of every argument, "constexpr" of those in constants; aligned: names of the arguments
    that 16 divides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names},
                       {places[name]: value for name, value in constants.items()},
                       {places[name]: [["tt.divisibility", 16]] for name in aligned})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(code.asm["cubin"])
        f.flush()
        said = [subprocess.run([tools / tool, flag, f.name], text=True, capture_output=True,
                               check=True).stdout
                for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))]
    return code.metadata.shared, *said

class Launch:
    """In the place of a Triton kernel: launches nothing, and notes with which constants and options
    it would have been."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **named):
        values = dict(zip(self.kernel.arg_names, args)) | named
        self.constants = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr}
        self.options = {n: v for n, v in named.items() if n in ("num_warps", "num_stages")}

def start(command):
    """Run a command line, "quest.py --bits 4", in this process. A failure ends in SystemExit."""
    sys.argv = shlex.split(command)
    name = sys.argv[0].removesuffix(".py")
    name = "nanobit.cli" if name == "model" else name
    nanobit.cli.run(importlib.import_module(name).main)

def call(capsys, command):
    """`start` -> (status, stdout, stderr)."""
    status = 0
    capsys.readouterr()
    try:
        start(command)
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()

def run_card(folder):
    """The model that the Python lines in an exported folder's README.md load. They name the folder
    from where it lies."""
    _, code = pathlib.Path(folder, "README.md").read_text().split("```python\n")
    names = {}
    exec(code.split("```")[0], names)
    return names["model"].eval()

BYTES = [chr(i) for i in range(256)]                   # the tokenizer whose tokens are the bytes

def save_model(m, path="m.pt", **content):
    """A checkpoint of a model that no run has made."""
    nanobit.checkpoint.save_checkpoint(path, m, **{"tokenizer": BYTES, "method": "test"} | content)

def close(got, want, tolerance=1e-4):
    """Is a tensor near another, as a whole and in each element?"""
    assert ((got - want).norm() / want.norm()).item() < tolerance
    assert ((got - want).abs().max() / want.abs().max()).item() < tolerance

def edit_config(**changes):
    """Change what dir's config.json says of the quantization."""
    path = pathlib.Path("dir/config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))

def check_spoiled(capsys, spoil, named):
    """Export m.pt to dir and spoil it. Reading dir is refused in a line with both names."""
    assert call(capsys, "model.py export m.pt dir")[0] == 0
    spoil()
    with pytest.raises(model.UsageError, match=re.escape(named)) as e:
        model.LLaMA.from_pretrained("dir")
    assert "dir" in str(e.value) and "\n" not in str(e.value)

def load_report():
    """The module assets/report.py, which is no part of the package."""
    path = pathlib.Path(__file__).parents[1] / "assets" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    return report

def random_base(folder, n_layer):
    """Data of a text in the folder, and a checkpoint base.pt of random weights for it."""
    (folder / "text.txt").write_text(TEXT)
    data = nanobit.data.load_data(str(folder / "text.txt"), "300", 32)
    torch.manual_seed(0)
    base = model.LLaMA(model.LlamaConfig(data.tokenizer.n_vocab, n_layer, 32, 4, 4, 48, 32))
    nanobit.checkpoint.save_checkpoint(str(folder / "base.pt"), base, tokenizer=data.spec,
                                       data=data.digest, method="dense",
                                       settings={"data": data.name, "vocab": "300"})
    return data

class TrainingTextOnly:
    """Data whose training split alone may be read: touching dev or val fails the test."""

    def __init__(self, train, **more):
        self.train = train
        self.__dict__.update(more)

    @property
    def dev(self):
        raise AssertionError("the dev split was read")

    @property
    def val(self):
        raise AssertionError("the validation split was read")

def check_refused(result, *names):
    """Did `call` end in status 2 and one line on stderr, with all these in it?"""
    status, _, err = result
    assert status == 2
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    for name in names:
        assert name in err, err
