"""Folders of codebooks in AQLM's format, against that package and transformers.

transformers has to load each exported folder with nothing but its path, and to give the packed
model's logits in float32; AQLM's own unpacking has to give the packed file's codes. Read back, a
folder is the packed model bit for bit. Skipped where the packages are not installed.
"""
import pathlib

import pytest
import torch

import nanobit.checkpoint
from conftest import (call, check_refused, check_spoiled, close, edit_config, random_base,
                      save_model as save)
from model import LLaMA, LlamaConfig
from nanobit.hf import hf_name
from quantizers import QuantLinear, rtn

transformers = pytest.importorskip("transformers", minversion="5")
aqlm = pytest.importorskip("aqlm")
numba = pytest.importorskip("numba")
pytest.importorskip("scipy")                           # numba's product of matrices
safetensors = pytest.importorskip("safetensors.torch")

@pytest.fixture(autouse=True)
def work(own_folder):
    before = numba.get_num_threads()
    numba.set_num_threads(1)                           # with more, aqlm loses sums
    yield own_folder
    numba.set_num_threads(before)

def codebooks(M, B, g, unit=1):
    """A function for replace_linears: random codes into M random codebooks, whose numbers grow with
    unit as the scales shrink."""
    def quantize(_, linear):
        O, C = linear.weight.shape
        codes = torch.randint(2**B, (O, C // g, M))
        codes.view(-1)[:2] = torch.tensor([0, 2**B - 1])
        return QuantLinear.vq(codes, 0.1 * unit * torch.randn(M, 2**B, g),
                              (torch.rand(O) + 0.5) / unit)
    return quantize

def packed_model(quantize, tied=False):
    m = LLaMA(LlamaConfig(257, 1, 48, 2, 1, 80, 32, tied=tied)).eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, *((0, 0.2) if p.dim() == 2 else (1, 0.2)))
    return m.replace_linears(quantize)

def ids(m):
    return torch.randint(m.config.vocab_size, (2, 12))

@torch.no_grad()
def check_folder(folder, m):
    """Does transformers compute what m does, does aqlm unpack m's codes, and is m what is read?"""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.float32
    x = ids(m)
    close(theirs(x).logits, m(x)[0])

    tensors = safetensors.load_file(f"{folder}/model.safetensors")
    for name, linear in m.linears():
        assert isinstance(theirs.get_submodule(hf_name(name)), aqlm.QuantizedLinear)
        codes = aqlm.utils.unpack_int_data(tensors[f"{hf_name(name)}.codes"], linear.bits)
        assert torch.equal(codes, linear.codes().long())

    again = LLaMA.from_pretrained(folder)
    read, own = again.state_dict(), m.state_dict()
    assert again.config == m.config and read.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name
    assert [q.spec for _, q in again.linears()] == [q.spec for _, q in m.linears()]

COMPILED = pytest.mark.slow      # by numba, for codebooks of 256 vectors

@pytest.mark.parametrize("scheme, size", [
    ((1, 4, 4), "8 bits"), ((2, 4, 4), "8 bits"), ((2, 6, 8), "8 bits"), ((1, 9, 8), "16 bits"),
    ((3, 1, 2), "8 bits"), ((1, 12, 16), "16 bits"),
    pytest.param((1, 8, 8), None, marks=COMPILED), pytest.param((2, 8, 8), None, marks=COMPILED)])
def test_transformers_computes_what_the_packed_model_does(capsys, scheme, size):
    m = packed_model(codebooks(*scheme), tied=scheme[1] == 8)
    save(m)
    status, out, err = call(capsys, "model.py export m.pt dir")
    assert status == 0 and "--format aqlm" in out and err == ""
    assert ("a code in" in out) == (size is not None) and (size or "bits per weight") in out
    check_folder("dir", m)

def test_codebooks_that_float16_cannot_hold_stay_float32(capsys):
    m = packed_model(codebooks(1, 4, 4, unit=1e6))
    assert m.blocks[0].attn.wq.codebooks.dtype == torch.float32
    save(m)
    assert call(capsys, "model.py export m.pt dir")[0] == 0
    check_folder("dir", m)

@pytest.mark.slow
def test_a_trained_file_becomes_a_folder_that_says_what_it_is(work, capsys):
    random_base(work, 1)
    status, _, err = call(capsys, "pvtune.py --model base.pt --data text.txt --seq-len 32 "
                                  "--batch-size 2 --accumulate 1 --device cpu --scheme 2x4g4 "
                                  "--variant pv --steps 2 --eval-every 0 --embed-bits 16")
    assert status == 0, err
    status, out, err = call(capsys, "model.py export out/pvtune-2x4g4.pt dir")
    assert status == 0 and "(--format aqlm)" in out, err
    check_folder("dir", nanobit.checkpoint.load_checkpoint("out/pvtune-2x4g4.pt")[0])
    card = pathlib.Path("dir/README.md").read_text()
    for part in ("base.pt", "pvtune", "2 codebooks of 4 bits for 4 weights", "aqlm[cpu]",
                 "from_pretrained('dir')"):
        assert part in card, card

# ---- What is refused --------------------------------------------------------------------------

def of_two_kinds(name, linear):
    return codebooks(1, 3 if "w_down" in name else 4, 4)(name, linear)

def odd_codebook(_, linear):
    O, C = linear.weight.shape
    return QuantLinear.vq(torch.zeros(O, C // 4, 1).int(), torch.randn(1, 5, 4), torch.ones(O))

OTHERS = {
    "affine": (lambda _, w: QuantLinear.affine(*rtn(w.weight.detach(), 4, mse=False), 4),
               "blocks.0.attn.wq has no codebooks", "--format compressed"),
    "dense": (lambda _, linear: linear, "no linear is packed", "--format dense"),
    "two kinds": (of_two_kinds, "blocks.0.mlp.w_down has other codebooks", "--format dense"),
    "5 vectors": (odd_codebook, "codebooks of 5 vectors", "--format dense"),
}

@pytest.mark.parametrize("what", OTHERS)
def test_what_the_format_cannot_hold_is_refused_with_what_fits(capsys, what):
    quantize, reason, fix = OTHERS[what]
    save(packed_model(quantize))
    check_refused(call(capsys, "model.py export m.pt new --format aqlm"), "m.pt", reason, fix)
    assert not pathlib.Path("new").exists()
    status, out, err = call(capsys, "model.py export m.pt new")
    assert status == 0 and f"({fix}" in out, err

def test_codebooks_are_refused_by_the_affine_format_and_spelled_out_by_dense(capsys):
    save(packed_model(codebooks(1, 4, 4)))
    check_refused(call(capsys, "model.py export m.pt new --format compressed"),
                  "blocks.0.attn.wq has codebooks", "--format aqlm")
    status, out, err = call(capsys, "model.py export m.pt new --format dense")
    assert status == 0 and "bfloat16" in out, err

def store(part, make):
    tensors = safetensors.load_file("dir/model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    tensors[name] = make(tensors[name])
    safetensors.save_file(tensors, "dir/model.safetensors")

BAD = {  # what is done to a folder of 2x4g4: what the line names
    "groups of outputs": (lambda: edit_config(out_group_size=2), "out_group_size 2"),
    "no codebooks": (lambda: edit_config(num_codebooks=None), "num_codebooks is missing"),
    "17 bits": (lambda: edit_config(nbits_per_codebook=17), "nbits_per_codebook is 17"),
    "other groups": (lambda: edit_config(in_group_size=7), "group_size 7 does not divide the 48"),
    "other bits": (lambda: edit_config(nbits_per_codebook=5), "codebooks"),
    "wide codes": (lambda: store("codes", lambda t: t.to(torch.int16)), "codes"),
    "a NaN": (lambda: store("scales", lambda t: t * torch.nan), "not finite"),
}

@pytest.mark.parametrize("what", BAD)
def test_a_folder_of_another_kind_is_refused_by_what_it_has(capsys, what):
    save(packed_model(codebooks(2, 4, 4)))
    check_spoiled(capsys, *BAD[what])
