"""Every kind of file that a script writes: evaluated, sampled, exported and loaded from Python.

Each is made by its script's own command from one random model of a block, and asked three things:
its text is that of a plain loop over the loaded model's logits, its loss on the validation split
is the mean of those logits' losses, and what it exports has the weights that its codes stand for.
"""
import copy
import json
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F

import model
import nanobit.checkpoint
import nanobit.data
import nanobit.tokenizer
from conftest import call, check_refused, random_base, run_card
from model import LLaMA, LlamaConfig
from quantizers import QuantLinear

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = " --steps 2 --batch-size 2 --accumulate 1 --eval-every 0 "
QUEST = "quest.py --model base.pt --data text.txt --vocab 300 --seq-len 32" + STEPS
WRITES = {  # file -> the command that writes it; n is normtweak's, l lrqat's, p pvtune's
    "base.pt": None,
    "quest-w4a4.pt": QUEST + "--bits 4",
    "quest-w3a16.pt": QUEST + "--bits 3 --a-bits 16",
    "quest-w1.58a1.58.pt": QUEST + "--bits 1.58",
    "quest-w4a4-fp4.pt": QUEST + "--bits 4 --grid fp4",
    "quest-w4a4-sparse.pt": QUEST + "--bits 4 --grid sparse",
    "clip-w4a8.pt": QUEST + "--bits 4 --a-bits 8 --quantizer clip",
    "lsq-w2a2.pt": QUEST + "--bits 2 --quantizer lsq",
    "lsq-w2a16.pt": QUEST + "--bits 2 --a-bits 16 --quantizer lsq",
    "rtn-w3.pt": "n --host rtn --bits 3 --symmetric",
    "gptq-tweak-w2.pt": "n --host gptq --bits 2 --group-size 16",
    "rtn-tweak-w4.pt": "n --host rtn --bits 4 --a-bits 8",
    "lrqat-w2-lr-qat.pt": "l --bits 2 --arm lr-qat",
    "lrqat-w4-full.pt": "l --bits 4 --arm full --group-size 16",
    "lrqat-w4a8-scales.pt": "l --bits 4 --arm scales --a-bits 8 --kv-bits 6",
    "pvtune-1x4g4.pt": "p --scheme 1x4g4",
    "pvtune-2x4g4.pt": "p --scheme 2x4g4",
    "pvtune-affine-w2.pt": "p --scheme affine --bits 2 --group-size 16",
}
SHORT = {"n": "normtweak.py --calib data", "l": "lrqat.py --rank 4", "p": "pvtune.py --variant pv"}

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(path / "cache"))
        m.chdir(path)
        random_base(path, 1)
        yield path

def make(name, folder, capsys, monkeypatch):
    """The file `name` in the folder, written by its command unless it is there."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setitem(model.PRESETS, "tiny", model.Preset(1, 32, 4, 48, 4e-3, 2, 2, 1, 32))
    command = WRITES[name]
    if command and not (folder / "out" / name).exists():
        script, _, flags = command.partition(" ")
        if script in SHORT:
            command = f"{SHORT[script]} --model base.pt {flags}" + STEPS
        status, _, err = call(capsys, command + " --out out --device cpu")
        assert status == 0, err
    return name if name == "base.pt" else f"out/{name}"

@torch.no_grad()
def greedy(m, ids, n):
    """n more ids, each the likeliest after the whole window: no cache, nothing joined."""
    for _ in range(n):
        ids = torch.cat((ids, m(ids[:, -m.config.seq_len:])[0][:, -1:].argmax(-1)), dim=1)
    return ids

@torch.no_grad()
def mean_loss(m, tokens, T):
    """Nats a token over windows of T that do not overlap, the last one short."""
    total = 0.0
    for i in range(0, len(tokens) - 1, T):
        x = torch.from_numpy(tokens[i:i + T + 1].astype("int64"))
        x, y = x[:-1][None], x[1:]
        total += F.cross_entropy(m(x)[0][0, :len(y)].double(), y, reduction="sum").item()
    return total / (len(tokens) - 1)

@pytest.mark.parametrize("name", WRITES)
def test_every_file_is_evaluated_sampled_and_loaded(name, folder, capsys, monkeypatch):
    path = make(name, folder, capsys, monkeypatch)
    m, content = nanobit.checkpoint.load_checkpoint(path)
    tokenizer = nanobit.tokenizer.make_tokenizer(content["tokenizer"])
    packed = [q for q in m.modules() if isinstance(q, QuantLinear)]
    assert len(packed) == (0 if name == "base.pt" else 8)                  # with the head

    status, out, err = call(capsys, f"model.py eval {path} --seq-len 32 --device cpu")
    assert status == 0, err
    data = nanobit.data.load_data("text.txt", "300", 32)
    assert abs(float(out.split("loss ")[-1]) - mean_loss(m, data.val, 32)) < 1e-4

    status, out, err = call(capsys, f"model.py sample {path} --prompt 'def f' --tokens 20 "
                                    "--temperature 0 --device cpu")
    assert status == 0, err
    start = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary("def f")]])
    text = tokenizer.decode(greedy(m, start, 20)[0, 1:].tolist())
    # A rounded activation may fall on the other side of a border where sums come in another order.
    if min([16, *(q.spec["a_bits"] for q in packed), m.config.kv_bits]) == 16:
        assert out == text + "\n"
    assert out.startswith("def f")

@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_every_file_is_exported_with_the_weights_that_its_codes_stand_for(
        name, folder, capsys, monkeypatch, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = make(name, folder, capsys, monkeypatch)
    status, out, err = call(capsys, f"model.py export {path} {tmp_path / 'hf'} --format dense")
    assert status == 0, err
    tensors = safetensors.load_file(tmp_path / "hf/model.safetensors")
    m, _ = nanobit.checkpoint.load_checkpoint(path)
    eye = torch.eye(32)
    for q, hf in (("attn.wq", "self_attn.q_proj"), ("mlp.w_up", "mlp.up_proj")):
        layer = m.get_submodule(f"blocks.0.{q}")
        if isinstance(layer, QuantLinear):             # what it multiplies with, by its own product
            layer = QuantLinear.of(layer.spec | {"a_bits": 16}, dict(layer.named_buffers()))
            layer.a_scale = None
        weight = layer(eye).t()                                                    # (O, C)
        stored = tensors[f"model.layers.0.{hf}.weight"].float()
        assert (stored - weight).abs().max() <= weight.abs().max() / 256
    for q, hf in ((m.embed, "model.embed_tokens"), (m.head, "lm_head")):
        weight = q.weight if name == "base.pt" else q.weight()
        assert torch.equal(tensors[f"{hf}.weight"], weight.bfloat16())
    config = json.loads(pathlib.Path(tmp_path, "hf/config.json").read_text())
    assert config["vocab_size"] == 300 and config["num_hidden_layers"] == 1

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_embedding_and_head_come_back_from_a_file_and_as_floats(tmp_path, bits, tied):
    """Tied ones are stored once, and are one again wherever they come from."""
    torch.manual_seed(0)
    m = LLaMA(LlamaConfig(60, 1, 32, 4, 4, 48, 32, tied=tied)).eval()
    x = torch.randint(60, (2, 9))
    before = m(x)[0]
    embed, head = m.embed.weight.clone(), m.head.weight.clone()
    for weight, old in zip(nanobit.checkpoint.pack_embedding(m, bits), (embed, head)):
        assert torch.equal(weight, old)
    want = m(x)[0]
    assert 0 < (want - before).norm() < {4: 0.2, 8: 0.02}[bits] * before.norm()

    path = str(tmp_path / "m.pt")
    nanobit.checkpoint.save_checkpoint(path, m, tokenizer=["a"], method="rtn")
    loaded, content = nanobit.checkpoint.load_checkpoint(path)
    assert torch.equal(loaded(x)[0], want) and content["linears"] == {}
    assert (loaded.head.packed is loaded.embed.packed) == tied
    tables = nanobit.checkpoint.tensor_bytes(
        t for n, t in content["model"].items() if n.startswith(("embed.", "head.")))
    assert tables == (1 if tied else 2) * 60 * (32 * bits // 8 + 2)
    again = copy.deepcopy(loaded)
    assert (again.head.packed is again.embed.packed) == tied

    # Floats again: what the codes stand for.
    nanobit.checkpoint.float_embedding(loaded, loaded.embed.weight(), loaded.head.weight())
    assert torch.equal(loaded(x)[0], want)
    assert (loaded.head.weight is loaded.embed.weight) == tied
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        p.numel() for p in LLaMA(m.config).parameters())

PACKED = dict.fromkeys(                                # those with float activations: their format
    ("rtn-w3.pt", "gptq-tweak-w2.pt", "lrqat-w2-lr-qat.pt", "lrqat-w4-full.pt",
     "pvtune-affine-w2.pt", "quest-w3a16.pt", "lsq-w2a16.pt"), "compressed")
PACKED |= dict.fromkeys(("pvtune-1x4g4.pt", "pvtune-2x4g4.pt"), "aqlm")

@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", WRITES)
def test_files_are_exported_packed_or_else_refused_by_their_reason(
        name, folder, capsys, monkeypatch, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("compressed_tensors", minversion="0.18")
    if PACKED.get(name) == "aqlm":
        pytest.importorskip("aqlm")
    path = make(name, folder, capsys, monkeypatch)
    status, out, err = call(capsys, f"model.py export {path} {tmp_path / 'hf'}")
    assert status == 0, err
    if name not in PACKED:
        assert "(--format dense" in out
        for form in ("compressed", "aqlm"):
            result = call(capsys, f"model.py export {path} {tmp_path / 'new'} --format {form}")
            check_refused(result, path, "--format dense")
        assert not (tmp_path / "new").exists()
        return

    # Loaded as its card says, and read back.
    assert f"(--format {PACKED[name]}" in out
    m, _ = nanobit.checkpoint.load_checkpoint(path)
    monkeypatch.chdir(tmp_path)
    x = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    ours = m(x)[0]
    assert (run_card("hf")(x).logits - ours).abs().max() <= 1e-4 * ours.abs().max()
    again, content = nanobit.checkpoint.load_checkpoint("hf")
    assert (again(x)[0] - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert content["tokenizer"] == nanobit.checkpoint.load_checkpoint(folder / path)[1]["tokenizer"]

@GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRITES)
def test_every_file_on_a_gpu(name, dtype, folder, capsys, monkeypatch):
    """Its loss is that of the CPU, and it writes text through the CUDA graph."""
    path = make(name, folder, capsys, monkeypatch)
    losses = []
    for device in ("cpu --dtype float32", f"cuda --dtype {dtype}"):
        status, out, err = call(capsys, f"model.py eval {path} --seq-len 32 --device {device}")
        assert status == 0, err
        losses.append(float(out.split("loss ")[-1]))
    assert math.isclose(*losses, rel_tol=2e-2 if dtype == "bfloat16" else 2e-3)
    status, out, err = call(capsys, f"model.py sample {path} --prompt 'def f' --tokens 20 "
                                    f"--device cuda --dtype {dtype}")
    assert status == 0 and out.startswith("def f"), err
