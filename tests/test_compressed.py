"""compressed-tensors' "pack-quantized" folders, against that package and transformers.

transformers has to load each exported folder with nothing but its path, and to give the packed
model's logits in float32; compressed-tensors' own unpacking has to give the packed file's codes.
QuEST's rotated inputs come from the lines in the folder's README.md, which are run as they stand.
Read back, a folder is the packed model bit for bit, and one that compressed-tensors wrote gives its
logits. Skipped where the packages are not installed.
"""
import json
import os
import pathlib
import shutil
import weakref

import pytest
import torch

import nanobit.checkpoint
import nanobit.compressed
from conftest import (TEXT, call, check_refused, check_spoiled, close, edit_config,
                      random_base, run_card, save_model as save)
from nanobit import aqlm_format
from nanobit.hf import hf_name
from model import LLaMA, LlamaConfig, UsageError
from quantizers import QuantLinear, pack, rtn, unpack

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("compressed_tensors", minversion="0.18")   # before: 3, 5, 6, 7 bits padded
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")
from compressed_tensors import quantization                            # noqa: E402
from compressed_tensors.compressors import ModelCompressor             # noqa: E402
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32    # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams    # noqa: E402

@pytest.fixture(autouse=True)
def work(own_folder):
    return own_folder

def packed_model(bits, group_size=-1, symmetric=False, tied=False, n_kv_head=2):
    """One block of random weights, whose rows of 40 and 56 codes end inside of words."""
    m = LLaMA(LlamaConfig(257, 1, 40, 2, n_kv_head, 56, 32, tied=tied)).eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, *((0, 0.2) if p.dim() == 2 else (1, 0.2)))

    def quantize(_, linear):
        codes = rtn(linear.weight.detach(), bits, group_size, symmetric, mse=False)
        return QuantLinear.affine(*codes, bits, group_size)
    return m.replace_linears(quantize)

def ids(m, *shape):
    return torch.randint(m.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))

def stored(folder):
    with safetensors.safe_open(f"{folder}/model.safetensors", "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}

SHORT = "--model base.pt --data text.txt --seq-len 32 --batch-size 2 --accumulate 1 --device cpu "

@torch.no_grad()
def check_folder(folder, m):
    """Does transformers compute what m does, and does compressed-tensors unpack m's codes?"""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.float32
    x = ids(m, 2, 24)
    close(theirs(x).logits, m(x)[0])

    tensors = stored(folder)
    for name, linear in m.linears():
        prefix = hf_name(name)
        bits, shape = linear.bits, tensors[f"{prefix}.weight_shape"].tolist()
        half = 2 ** (bits - 1)
        codes = unpack_from_int32(tensors[f"{prefix}.weight_packed"], bits, shape).int()
        ours = linear.codes().int()
        assert shape == list(ours.shape)
        if linear.zero_point is None:
            assert torch.equal(codes, ours)
        else:
            zero_point = unpack_from_int32(tensors[f"{prefix}.weight_zero_point"], bits,
                                           linear.zero_point.shape, packed_dim=0)
            assert torch.equal(codes + half, ours)
            assert torch.equal(zero_point.int() + half, linear.zero_point.int())
        assert torch.equal(tensors[f"{prefix}.weight_scale"].float(), linear.scale.float())
    return tensors

@torch.no_grad()
def check_reading(folder, m):
    """Is m what is read from the folder, bit for bit?"""
    again = LLaMA.from_pretrained(folder)
    assert again.config == m.config and (again.head.weight is again.embed.weight) == m.config.tied
    theirs, ours = again.state_dict(), m.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor) and theirs[name].dtype == tensor.dtype, name
    assert [q.spec for _, q in again.linears()] == [q.spec for _, q in m.linears()]

# ---- Every grid -------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("tied, n_kv_head", [(False, 2), (True, 1)])
def test_transformers_computes_what_the_packed_model_does(capsys, bits, symmetric, group_size, tied,
                                                          n_kv_head):
    m = packed_model(bits, group_size, symmetric, tied, n_kv_head)
    save(m)
    status, out, err = call(capsys, "model.py export m.pt dir")
    assert status == 0 and "--format compressed" in out and err == ""
    tensors = check_folder("dir", m)
    check_reading("dir", m)
    assert ("lm_head.weight" in tensors) == (not tied)

@pytest.mark.parametrize("bits", range(1, 9))
def test_flipping_top_bits_adds_half_to_every_signed_code(bits):
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (5, 37))
    flipped = pack(q, bits) ^ nanobit.compressed.top_bits(bits, 37)
    assert torch.equal(unpack(flipped, bits, 37).int(), (q + half).int())

# ---- QuEST ------------------------------------------------------------------------------------

def quest_model(bits, grid="uniform", n_hidden=56, step=None, rotated=True):
    """One block, whose inputs are rotated in blocks of 8, the largest power of two that divides 40,
    and of as many of n_hidden."""
    m = LLaMA(LlamaConfig(257, 1, 40, 2, 1, n_hidden, 32)).eval()
    return m.replace_linears(lambda _, linear: QuantLinear.quest(
        linear.weight.detach(), bits, 16, grid, rotated, step))

QUEST = {
    "1 bit": (1,), "1.58 bits": (1.58,), "2 bits": (2,), "3 bits": (3,),
    "4 bits, blocks of 8 and 128": (4, "uniform", 256), "5 bits, blocks of 8 and 1":
    (5, "uniform", 57), "6 bits": (6,), "7 bits": (7,), "fp4": (4, "fp4"), "sparse": (3, "sparse")}

@torch.no_grad()
@pytest.mark.parametrize("what", QUEST)
def test_rotated_linears_give_the_packed_models_logits_with_the_lines_of_the_card(capsys, what):
    m = quest_model(*QUEST[what])
    save(m)
    status, out, err = call(capsys, "model.py export m.pt dir")
    assert status == 0 and "--format compressed" in out and err == ""
    assert "apply_transform_config" in out
    x = ids(m, 2, 24)
    want = m(x)[0]
    close(run_card("dir")(x).logits, want)

    # transformers alone leaves the rotation out. When it no longer does, the lines have to go.
    alone = transformers.AutoModelForCausalLM.from_pretrained("dir")(x).logits
    assert (alone - want).norm() > 0.1 * want.norm()

    # The integers are the levels, twice where they end in 1/2.
    tensors = stored("dir")
    for name, linear in m.linears():
        prefix = hf_name(name)
        levels = linear.levels(torch.float32)
        factor = 1 if what in ("1.58 bits", "fp4") else 2
        bits = {"1.58 bits": 2, "fp4": 5, "sparse": 4}.get(what) or int(what[0]) + 1
        codes = unpack_from_int32(tensors[f"{prefix}.weight_packed"], bits, levels.shape)
        assert torch.equal(codes.float(), factor * levels)
        assert torch.equal(factor * tensors[f"{prefix}.weight_scale"], linear.scale)

    # Read back, it is the model itself, where its levels are evenly spaced.
    if what not in ("fp4", "sparse"):
        check_reading("dir", m)
        return
    with pytest.raises(UsageError, match="QuEST levels.*--format dense"):
        LLaMA.from_pretrained("dir")

@torch.no_grad()
@pytest.mark.parametrize("step", [None, torch.tensor(0.1)])             # the latter as LSQ has it
def test_linears_that_are_not_rotated_need_nothing_but_transformers(capsys, step):
    m = quest_model(3, step=step, rotated=False)
    save(m)
    status, out, err = call(capsys, "model.py export m.pt dir")
    assert status == 0 and "--format compressed" in out and "transform" not in out + err
    x = ids(m, 2, 24)
    want = m(x)[0]
    close(transformers.AutoModelForCausalLM.from_pretrained("dir")(x).logits, want)
    close(LLaMA.from_pretrained("dir")(x)[0], want)

# ---- A file that a command trained ------------------------------------------------------------

def test_a_tweaked_file_becomes_a_folder_that_says_what_it_is(work, capsys):
    random_base(work, 1)
    status, _, err = call(capsys, f"normtweak.py {SHORT} --calib data --host gptq --bits 3 "
                                  "--group-size 16 --steps 2 --eval-every 0")
    assert status == 0, err
    status, out, err = call(capsys, "model.py export out/gptq-tweak-w3.pt dir")
    assert status == 0 and "(--format compressed)" in out, err
    tensors = check_folder("dir", nanobit.checkpoint.load_checkpoint("out/gptq-tweak-w3.pt")[0])

    # The card has the base, the method, the command, and bits that are those of the file.
    card = pathlib.Path("dir/README.md").read_text()
    linears = {name: t for name, t in tensors.items() if ".weight_" in name}
    weights = sum(t.prod().item() for name, t in linears.items() if name.endswith("shape"))
    bpw = 8 * sum(t.nbytes for t in linears.values()) / weights
    for part in ("base.pt", "gptq-tweak", f"{bpw:.3f} bits per weight", "3 bits", "groups of 16",
                 "normtweak.py --model base.pt", "from_pretrained('dir')", "compressed-tensors"):
        assert part in card, card

# ---- What is written, and what is not ---------------------------------------------------------

def test_floats_take_16_bits_where_these_hold_them(capsys):
    """A checkpoint that came from a bfloat16 folder has such an embedding, and our scales."""
    m = packed_model(4, 8, symmetric=True)
    m.embed.weight.data = m.embed.weight.data.bfloat16().float()
    m.head.weight.data = m.head.weight.data.half().float()
    wide = m.norm.weight.data.clone()
    save(m)
    assert call(capsys, "model.py export m.pt dir")[0] == 0
    tensors = check_folder("dir", m)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.weight"].dtype == torch.float16
    assert torch.equal(tensors["model.norm.weight"], wide)
    assert json.loads(pathlib.Path("dir/config.json").read_text())["torch_dtype"] == "float32"

    # Where all of them are float16, so is the folder.
    for t in m.parameters():
        t.data = t.data.half().float()
    save(m)
    assert call(capsys, "model.py export m.pt half")[0] == 0
    assert json.loads(pathlib.Path("half/config.json").read_text())["torch_dtype"] == "float16"
    loaded = transformers.AutoModelForCausalLM.from_pretrained("half", dtype=torch.float32)
    with torch.no_grad():
        x = ids(m, 2, 24)
        close(loaded(x).logits, m(x)[0])

def affine(bits=4, a_bits=16, group_size=-1, symmetric=False):
    def quantize(name, linear):
        codes = rtn(linear.weight.detach(), bits, group_size, symmetric, mse=False)
        return QuantLinear.affine(*codes, bits, group_size, a_bits)
    return quantize

def of_two_grids(name, linear):
    return affine(3 if "w_down" in name else 4)(name, linear)

OTHERS = {
    "dense": (lambda name, linear: linear, "no linear is packed"),
    "one dense": (lambda name, linear: linear if "wq" in name else affine()(name, linear),
                  "blocks.0.attn.wq is not packed"),
    "QuEST W4A4": (lambda name, linear: QuantLinear.quest(linear.weight.detach(), 4, 4),
                   "the inputs of blocks.0.attn.wq are quantized to 4 bits"),
    "QuEST, 8 bits": (lambda name, linear: QuantLinear.quest(linear.weight.detach(), 8, 16),
                      "blocks.0.attn.wq has codes of 8 bits, which take 9 here"),
    "activations": (affine(a_bits=8), "the inputs of blocks.0.attn.wq are quantized to 8 bits"),
    "two grids": (of_two_grids, "blocks.0.mlp.w_down has other bits or groups"),
    "9 bits": (lambda name, linear: QuantLinear.affine(
        torch.zeros(linear.weight.shape), torch.ones(len(linear.weight), 1), None, 9),
        "codes of 9 bits"),
}

@pytest.mark.parametrize("what", OTHERS)
def test_what_the_format_cannot_hold_is_refused_with_what_fits(capsys, what):
    quantize, reason = OTHERS[what]
    m = LLaMA(LlamaConfig(257, 1, 40, 2, 2, 56, 32))
    save(m.replace_linears(quantize))
    check_refused(call(capsys, "model.py export m.pt new --format compressed"), "m.pt", reason,
                  "affine codes of 1 to 8 bits", "--format dense")
    assert os.listdir() == ["m.pt"]

    # Without the flag the folder is dense, and the line says why.
    status, out, err = call(capsys, "model.py export m.pt new")
    assert status == 0 and "(--format dense" in out, err
    assert (reason in out) == (what != "dense")

@pytest.mark.parametrize("which", ["a_bits", "kv_bits"])
def test_rounded_activations_of_the_whole_model_are_refused(capsys, which):
    m = packed_model(4)
    setattr(m.config, which, 6)
    save(m)
    check_refused(call(capsys, "model.py export m.pt new --format compressed"),
                  "activations are quantized to 6 bits")

def test_a_base_whose_name_is_no_text_still_has_a_card(capsys):
    save(packed_model(4), settings={"model": "base\udcff.pt"})        # bytes that are not UTF-8
    status, _, err = call(capsys, "model.py export m.pt dir")
    assert status == 0, err
    assert "- base: base\\udcff.pt" in pathlib.Path("dir/README.md").read_text()

def test_an_export_is_whole_or_not_there(capsys, monkeypatch):
    save(packed_model(3))
    pathlib.Path("full").mkdir()
    pathlib.Path("full/mine").write_text("x")
    check_refused(call(capsys, "model.py export m.pt full"), "full")

    import safetensors.torch
    def no_space(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", no_space)
    check_refused(call(capsys, "model.py export m.pt new/below"), "No space left", "new/below")
    assert sorted(str(p) for p in pathlib.Path().rglob("*")) == ["full", "full/mine", "m.pt"]

def test_rows_that_fill_words_are_in_memory_once():
    m = LLaMA(LlamaConfig(257, 1, 64, 2, 2, 96, 32)).replace_linears(affine(3))
    before = {name: linear.packed.data_ptr() for name, linear in m.linears()}
    tensors = dict(nanobit.compressed.take_apart(m, nanobit.compressed.compressed_linear))
    for name, place in before.items():
        words = tensors[f"{name}.weight_packed"]
        assert words.data_ptr() == place and words.dtype == torch.int32

PACKED = {
    "affine": affine(3, group_size=8), "QuEST": lambda _, w: QuantLinear.quest(w.weight, 3, 16),
    "codebooks": lambda _, w: QuantLinear.vq(torch.zeros(w.out_features, w.in_features // 4, 1),
                                             torch.randn(1, 16, 4), torch.ones(w.out_features))}

@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_disk_that_fills_up_leaves_nothing(capsys, kind, form):
    resource = pytest.importorskip("resource")
    with torch.no_grad():
        save(LLaMA(LlamaConfig(257, 2, 40, 2, 2, 56, 32)).replace_linears(PACKED[kind]))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))         # of each file
    try:
        result = call(capsys, "model.py export m.pt new/below"
                              + " --format dense" * (form == "dense"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_refused(result, "cannot write new/below", "File too large")
    assert os.listdir() == ["m.pt"]

@torch.no_grad()
@pytest.mark.parametrize("kind", PACKED)
def test_one_layer_at_a_time_is_in_memory_twice(kind):
    m = LLaMA(LlamaConfig(257, 3, 40, 2, 2, 56, 32)).replace_linears(PACKED[kind])
    alive = [weakref.ref(linear.packed) for _, linear in m.linears()]
    parts_of = aqlm_format.linear_parts if kind == "codebooks" else (
        nanobit.compressed.compressed_linear)
    done = set()
    for name, tensor in nanobit.compressed.take_apart(m, parts_of):
        if name.startswith("blocks.") and "norm" not in name:
            done.add(name.rpartition(".")[0])
            words = kind == "affine"                   # may be the bytes themselves
            assert words or sum(ref() is not None for ref in alive) == 21 - len(done)
    assert len(done) == 21 and not list(m.parameters())[0].numel()

# ---- Reading ----------------------------------------------------------------------------------

@torch.no_grad()
def write_theirs(theirs, folder, bits, symmetric, strategy, x=None):
    """Quantize transformers' model with compressed-tensors, and write it -> its logits of x."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    config = quantization.QuantizationConfig.model_validate({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "initialized",
        "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}})
    quantization.apply_quantization_config(theirs, config)

    # Their own scales and zero points, of the range of each group.
    for linear in theirs.modules():
        if hasattr(linear, "weight_scale"):
            G = linear.weight_scale.size(1)
            groups = linear.weight.view(len(linear.weight), G, -1)
            scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1),
                                                  linear.quantization_scheme.weights)
            linear.weight_scale.data = scale
            if not symmetric:
                linear.weight_zero_point.data = zero_point
            linear.quantization_status = quantization.QuantizationStatus.FROZEN
    want = None if x is None else theirs(x).logits
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(folder)
    compressor.update_config(folder)
    return want

@torch.no_grad()
@pytest.mark.parametrize("bits, symmetric, strategy", [
    (3, True, {"strategy": "group", "group_size": 16}), (4, False, {"strategy": "channel"}),
    (3, False, {"strategy": "group", "group_size": 8}), (8, True, {"strategy": "channel"})])
def test_a_folder_that_compressed_tensors_wrote_gives_its_logits(bits, symmetric, strategy):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=257, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2)).eval()
    x = torch.randint(257, (2, 24))
    want = write_theirs(theirs, "dir", bits, symmetric, strategy, x)

    ours = LLaMA.from_pretrained("dir")
    assert {nanobit.compressed.Grid.of(q) for _, q in ours.linears()} == {
        (bits, strategy.get("group_size", -1), symmetric, False)}
    close(ours(x)[0], want)

def edit_group(group=None, **weights):
    settings = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group",
                "group_size": 8}
    edit_config(config_groups={"g": {"targets": ["Linear"], "weights": settings | weights}
                             | (group or {})})

def store(part, make):
    """Change a tensor of the first linear; None takes it away."""
    tensors = stored("dir")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    old = tensors.pop(name, None)
    new = make(old)
    if new is not None:
        tensors[name] = new
    safetensors.torch.save_file(tensors, "dir/model.safetensors")

BAD = {  # what is done to a folder of 3 bits, groups of 8 and zero points: what the line names
    "another method": (lambda: edit_config(quant_method="gptq"), "quant_method gptq"),
    "another format": (lambda: edit_config(format="float-quantized"), "format float-quantized"),
    "rotated": (lambda: edit_config(transform_config={"config_groups": {}}), "transform_config"),
    "rounded keys": (lambda: edit_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "no group": (lambda: edit_config(config_groups={}), "config_groups"),
    "two groups": (lambda: edit_config(config_groups={"a": {}, "b": {}}), "config_groups"),
    "no weights": (lambda: edit_config(config_groups={"a": {}}), "config_groups"),
    "activations": (lambda: edit_group({"input_activations": {"num_bits": 8}}),
                    "input_activations"),
    "float codes": (lambda: edit_group(type="float"), "type float"),
    "blocks": (lambda: edit_group(strategy="block"), "strategy block"),
    "9 bits": (lambda: edit_group(num_bits=9), "num_bits is 9"),
    "no group size": (lambda: edit_group(group_size=None), "group_size is missing"),
    "odd groups": (lambda: edit_group(group_size=7), "group_size 7 does not divide the 40"),
    "other bits": (lambda: edit_group(num_bits=4), "weight_packed"),
    "padded codes": (lambda: store("weight_packed", lambda t: torch.zeros(40, 5).int()), "0.18"),
    "a wrong type": (lambda: store("weight_packed", lambda t: t.float()), "weight_packed"),
    "a wrong shape": (lambda: store("weight_shape", lambda t: t + 1), "weight_shape"),
    "no scale": (lambda: store("weight_scale", lambda t: None), "weight_scale"),
    "a NaN": (lambda: store("weight_scale", lambda t: t * torch.nan), "not finite"),
    "reordered": (lambda: store("weight_g_idx", lambda _: torch.arange(40)), "weight_g_idx"),
}

@pytest.mark.parametrize("what", BAD)
def test_a_folder_of_another_kind_is_refused_by_what_it_has(capsys, what):
    save(packed_model(3, 8))
    check_spoiled(capsys, *BAD[what])

@pytest.fixture
def hf(work):
    """A dense folder with a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], show_progress=False, initial_alphabet=alphabet))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=280, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0)).save_pretrained("hf")
    pathlib.Path("hf/tokenizer.json").write_text(t.to_str())
    pathlib.Path("text.txt").write_text(TEXT)

@pytest.mark.parametrize("kind", ["with zero points", "symmetric", "QuEST"])
def test_a_folder_is_evaluated_compared_sampled_and_exported_as_its_file_is(hf, capsys, kind):
    m, content = nanobit.checkpoint.load_checkpoint("hf")
    m.replace_linears({
        "with zero points": affine(3, group_size=16), "symmetric": affine(3, symmetric=True),
        "QuEST": lambda _, w: QuantLinear.quest(w.weight.detach(), 3, 16)}[kind])
    save(m, "packed.pt", tokenizer=content["tokenizer"])
    assert call(capsys, "model.py export packed.pt packed")[0] == 0
    shown = []
    for path in ("packed.pt", "packed"):
        status, out, err = call(capsys, f"model.py eval {path} --against hf --data text.txt "
                                        "--seq-len 32 --device cpu")
        assert status == 0, err
        shown.append(out.split("|", 1)[1])             # all but the method
        status, out, err = call(capsys, f"model.py sample {path} --tokens 8 --device cpu")
        assert status == 0, err
        shown.append(out)
    assert shown[:2] == shown[2:] and "bits per weight" in shown[0]

    # Exported again, it is the same file.
    assert call(capsys, "model.py export packed again")[0] == 0
    first, second = stored("packed"), stored("again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    # A script that needs a dense model refuses it.
    check_refused(call(capsys, f"lrqat.py --model packed {TWO_STEPS}"), "packed already")

TWO_STEPS = ("--data text.txt --seq-len 32 --batch-size 2 --accumulate 1 --device cpu "
             "--eval-every 0 --steps 2")

@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("wrote", ["model.py export", "compressed-tensors"])
def test_a_folders_norms_are_tweaked_against_the_dense_folder(hf, capsys, symmetric, wrote):
    if wrote == "model.py export":
        m, content = nanobit.checkpoint.load_checkpoint("hf")
        save(m.replace_linears(affine(3, group_size=16, symmetric=symmetric)),
             tokenizer=content["tokenizer"])
        assert call(capsys, "model.py export m.pt packed")[0] == 0
    else:
        theirs = transformers.LlamaForCausalLM.from_pretrained("hf")
        write_theirs(theirs, "packed", 3, symmetric, {"strategy": "group", "group_size": 16})
        shutil.copy("hf/tokenizer.json", "packed")

    # What is tweaked has the folder's own codes.
    status, out, err = call(capsys, "normtweak.py --model packed --teacher hf --calib data "
                                    + TWO_STEPS)
    assert status == 0, err
    tweaked, _ = nanobit.checkpoint.load_checkpoint("out/packed-tweak-w3.pt")
    for name, linear in LLaMA.from_pretrained("packed").linears():
        for part, tensor in linear.state_dict().items():
            assert torch.equal(tweaked.get_submodule(name).state_dict()[part], tensor)

    # So is a folder compared with the dense one.
    status, out, err = call(capsys, "model.py eval packed --against hf --data text.txt "
                                    "--seq-len 32 --device cpu")
    assert status == 0 and "KL" in out, err

def test_rotated_linears_are_not_tweaked(hf, capsys):
    m, content = nanobit.checkpoint.load_checkpoint("hf")
    save(m.replace_linears(lambda _, w: QuantLinear.quest(w.weight.detach(), 3, 16)),
         tokenizer=content["tokenizer"])
    assert call(capsys, "model.py export m.pt packed")[0] == 0
    check_refused(call(capsys, f"normtweak.py --model packed --teacher hf {TWO_STEPS}"),
                  "no packed affine linears")
