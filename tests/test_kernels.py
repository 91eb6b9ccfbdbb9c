"""kernels.lowbit_matmul against float64, its packing against its inverse, and its machine code.

Without a GPU the kernels run in Triton's interpreter, in one process of their own that this file
starts: the interpreter must be chosen before Triton is imported. It knows no bfloat16 arithmetic,
so that is for GPUs only, where the same cases run compiled. Every output starts as NaN.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", "3.5")
ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GPU = torch.cuda.is_available()
BITS = (1, 2, 3, 4, 8)
CASES = {  # O, C, group, symmetric, M, path
    "one token": (32, 2048, 128, False, 1, "decode"),
    "outputs and inputs that are no multiples of a tile": (24, 352, 32, False, 3, "decode"),
    "one scale a row, signed codes": (32, 512, -1, True, 16, "decode"),
    "tile, k split in four": (64, 512, 128, False, 17, "tile"),
    "tile that covers less than its outputs": (40, 320, 64, True, 33, "tile"),
    "tile, three spans of 32 a group": (32, 288, 96, False, 17, "tile"),
    "tile by TMA, not full": (72, 320, 64, False, 45, "tma"),
    "dequantized, in two pieces": (152, 352, 32, False, 17, "dequantize"),
}
if GPU:       # many steps, several programs at once: what the interpreter runs one after the other
    CASES["64 tokens"] = 1024, 2048, 128, False, 64, "tile"
    CASES["300 tokens"] = 1024, 2048, 128, False, 300, "tile"
    CASES["512 tokens, few outputs"] = 4096, 2048, 128, False, 512, "tile"
    CASES["1024 tokens"] = 4352, 2048, 128, False, 1024, "tile"

def random_codes(O, C, group, bits, symmetric):
    g = C if group == -1 else group
    scale = torch.rand(O, C // g) * 0.02 + 0.01
    if symmetric:
        half = 2 ** (bits - 1)
        return torch.randint(-half, half, (O, C), dtype=torch.int8), scale, None
    return (torch.randint(2**bits, (O, C), dtype=torch.uint8), scale,
            torch.randint(2**bits, (O, C // g), dtype=torch.uint8))

def relative_error(bits, case, device, dtype):
    """|y - float64| / |float64| of one case, and whether more calls gave the same bits."""
    import kernels
    from quantizers import dequantize
    torch.manual_seed(bits)
    O, C, group, symmetric, M, path = CASES[case]
    q, scale, zero_point = random_codes(O, C, group, bits, symmetric)
    x = torch.randn(M, C).to(device, dtype)
    codes = (t if t is None else t.to(device) for t in (q, scale, zero_point))
    w = kernels.pack_weight(*codes, bits, group)
    before = kernels.FUSED, kernels.PIECE, kernels.TMA, kernels.TILE[64]
    if path == "tma":
        kernels.TMA, kernels.TILE[64] = True, (*before[3][:4], 1)      # as if outputs were many
    if path == "dequantize":
        kernels.FUSED, kernels.PIECE = 16, 128 * M
    y = kernels.lowbit_matmul(x, w)
    same = all(torch.equal(y, kernels.lowbit_matmul(x, w)) for _ in range(20 if GPU else 1))
    kernels.FUSED, kernels.PIECE, kernels.TMA, kernels.TILE[64] = before
    zero_point = zero_point if zero_point is None else zero_point.double()
    exact = x.double().cpu() @ dequantize(q, scale.double(), zero_point, group).T
    return [((y.double().cpu() - exact).norm() / exact.norm()).item(), same]

def unpack_words(words, bits, third=False):
    """The exact inverse of kernels._pack_words: int32 (O, C)."""
    from kernels import _places
    w = words.view(len(words), -1, 8, 4, 2, 2, 1, 1, 1)
    q = w >> _places(bits, third, w.device) & 2**bits - 1
    return q.permute(0, 4, 2, 1, 6, 3, 5, 7, 8).reshape(len(words) * 16, -1)

def dequantize_weight(w, dtype=torch.float32):
    """(q - zero_point) * scale of a LowBit, (O, C): the plain version of `_dequantize`."""
    q = unpack_words(w.words, 2 if w.bits == 3 else w.bits)
    if w.bits == 3:
        q = q | unpack_words(w.high, 1, third=True) << 2
    O, C = w.shape
    grid = w.grid.T[:O].repeat_interleave(w.group, 1)                              # (O, C)
    return ((q[:O, :C] - (grid & 255)).to(dtype) * (grid & ~255).view(torch.float32).to(dtype))

def poison():
    """torch's uninitialized numbers are NaN or 77 from here on."""
    def poisoned(function):
        def empty(*args, **kwargs):
            t = function(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else 77)
        return empty
    torch.empty, torch.Tensor.new_empty = poisoned(torch.empty), poisoned(torch.Tensor.new_empty)
    torch.empty_like = poisoned(torch.empty_like)

@pytest.fixture(scope="module")
def interpreted():
    result = subprocess.run([sys.executable, "-W", "ignore", __file__], text=True,
                            capture_output=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)

@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_product_equals_float64_in_float16(request, bits, case):
    if GPU:
        error, same = relative_error(bits, case, "cuda", torch.float16)
    else:
        error, same = request.getfixturevalue("interpreted")[f"{bits} {case}"]
    assert error < 6e-4 and same                       # NaN, from what was not written, fails too

@pytest.mark.skipif(not GPU, reason="the interpreter has no bfloat16")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_product_equals_float64_in_bfloat16(bits, case):
    error, same = relative_error(bits, case, "cuda", torch.bfloat16)
    assert error < 5e-3 and same

@pytest.mark.parametrize("bits, third", [(1, False), (2, False), (4, False), (8, False), (1, True)])
def test_words_unpack_to_their_codes(bits, third):
    import kernels
    q = torch.randint(2**bits, (48, 768), dtype=torch.int32)
    words = kernels._pack_words(q, bits, third)
    assert words.numel() * 32 == q.numel() * bits and words.dtype == torch.int32
    assert torch.equal(unpack_words(words, bits, third), q)

@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_weight_dequantizes_to_the_grid(bits, symmetric):
    import kernels
    from quantizers import dequantize
    q, scale, zero_point = random_codes(40, 352, 32, bits, symmetric)
    w = kernels.pack_weight(q, scale, zero_point, bits, 32)
    expected = dequantize(q, scale.double(), zero_point, 32)
    error = dequantize_weight(w, torch.float64) - expected
    assert (error.abs() <= 2**-16 * expected.abs()).all()              # 8 bits of the scale

def test_shapes_without_a_kernel_are_refused():
    import kernels
    for bits, C, g in ((5, 64, 32), (4, 48, 48), (4, 96, 24)):
        assert kernels.pack_weight(*random_codes(16, C, g, bits, False), bits, g) is None

def test_layer_on_a_gpu_goes_through_the_kernel_and_says_once_if_it_cannot(monkeypatch):
    """The layer's own part of it, without a GPU: what it packs, when, and what it says."""
    import kernels
    from quantizers import QuantLinear
    x = torch.randn(3, 64, dtype=torch.float64)
    monkeypatch.setattr(kernels, "lowbit_matmul",
                        lambda x, w: x @ dequantize_weight(w, x.dtype).T)
    for bits, symmetric in ((4, False), (8, True), (3, True)):
        layer = QuantLinear.affine(*random_codes(24, 64, 32, bits, symmetric), bits, 32)
        w = layer.weight().double()
        error = kernels.linear(layer, x) - x @ w.T
        assert (error.abs() <= 1.01 * 2**-16 * x.abs() @ w.abs().T).all()  # 8 bits of the scale
        packed = layer.fast
        assert kernels.linear(layer, x) is not None and layer.fast is packed    # once for every use
        layer.packed = layer.packed.clone()
        kernels.linear(layer, x)
        assert layer.fast is not packed                                # the layer moved
    layer = QuantLinear.affine(*random_codes(24, 48, 24, 4, False), 4, 24)
    x = torch.randn(3, 48)
    with pytest.warns(UserWarning, match="no kernel for 4 bits, 48 inputs, groups of 24") as said:
        assert kernels.linear(layer, x) is None and kernels.linear(layer, x) is None
    assert len(said) == 1                              # and forward uses PyTorch

def overwritten_operands(sass):
    """Instructions of the loops that write a register which a wgmma in flight still reads."""
    lines = re.findall(r"(\.L_x_\d+):|/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?(.*?);", sass)
    start, found = {label: i for i, (label, _) in enumerate(lines) if label}, []
    for end, (_, line) in enumerate(lines):
        jump = re.match(r"BRA `\((.*)\)", line)
        loop, flying = lines[start.get(jump[1], end):end] if jump else [], []
        for line in [line for _, line in loop] * 2:                    # twice: past the jump back
            if "HGMMA" in line:
                first = re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", line)
                flying.append(range(int(first[1]), int(first[1]) + 4) if first else range(0))
            elif wait := re.match(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\w+)", line):
                flying = flying[max(0, len(flying) - int(wait[1], 16)):]
            elif write := re.match(r"(?!ST|RED|BAR|LDGSTS)([A-Z]\S*) R(\d+)", line):
                wide = 4 if ".128" in write[1] else 2 if re.search("WIDE|CS2R|64", write[1]) else 1
                registers = set(range(int(write[2]), int(write[2]) + wide))
                found += [line] * any(registers & set(operand) for operand in flying)
    return found

@pytest.mark.codegen
@pytest.mark.parametrize("bits, M, O", [(b, m, 14336) for b in BITS for m in (8, 16, 256)]
                         + [(1, 16, 4096), (3, 16, 4096)]
                         + [(4, 32, 14336), (2, 64, 14336), (3, 128, 14336), (8, 128, 14336),
                            (8, 64, 4096), (4, 512, 4096), (8, 512, 4096)])
def test_code_for_sm_90_uses_tensor_cores_and_no_loop_spills(bits, M, O, monkeypatch):
    """Every entry of the tables, as lowbit_matmul would launch it for a layer of an 8B model."""
    import triton
    import kernels
    from conftest import machine_code
    C = 4096
    w = kernels.LowBit(range(O // 16), None, None, bits, 128, (O, C))
    monkeypatch.setattr(kernels, "HOPPER", True)
    monkeypatch.setattr(kernels, "TMA", True)
    kernel, _, constants, options = kernels.plan(M, w)
    assert not constants.get("TMA") or constants["SPLIT"] == 1
    x = ("tensordesc<bf16[{BLOCK_M}, {BLOCK_K}]>".format(**constants) if constants.get("TMA") else
         "*bf16")
    kinds = dict(x=x, y="*bf16", parts="*fp32", M="i32", O="i32", N="i32", MASK="i32")
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*i32")
                 for n in kernel.arg_names}
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n in "ON"]
    shared, use, sass = machine_code(kernel, signature, constants, aligned, options)
    assert shared <= 227 * 1024
    assert re.search(r"LOCAL:0 ", use), use
    loops = re.findall(r"(\.L_x_\d+):(.*?)BRA `\(\1\)", sass, re.DOTALL)
    known = (bits, M, O) in ((1, 16, 14336), (3, 16, 14336)) and triton.__version__[:3] == "3.6"
    if known:     # rereads an address or two a step; what needs none was no faster on an H100
        assert max(len(re.findall(r"\bLDL\b", body)) for _, body in loops) <= 2
    spills = r"\bSTL\b" if known else r"\b(STL|LDL)\b"
    assert loops and not any(re.search(spills, body) for _, body in loops)
    assert re.search(r"\bHMMA\." if M <= 16 else r"\bHGMMA\.", sass)
    assert ("UTMALDG" in sass) == (M > 32 and O > 4096 or M > 256)     # else few steps, k split
    assert not overwritten_operands(sass)

# ---- Their benchmark ----------------------------------------------------------------------------

def test_every_product_is_timed_behind_the_cublas_that_it_is_a_ratio_to():
    """Of the same shape and tokens, just before; none at bits or tokens that it does not have."""
    import time_kernels
    args = time_kernels.parse_args(["--bits", "3", "4", "--batches", "1", "600"])
    jobs = time_kernels.jobs_of(args)
    assert {(c.name, bits) for _, M, c, bits in jobs if M == 1} == {
        ("cuBLAS", 16), ("lowbit_matmul", 3), ("lowbit_matmul", 4), ("quest_linear", 4),
        ("tinygemm", 4), ("gemlite", 4), ("humming", 3), ("humming", 4)}
    many = {c.name for _, M, c, _ in jobs if M == 600}
    assert many == {"cuBLAS", "lowbit_matmul", "quest_linear"}
    base = None
    for shape, M, candidate, _ in jobs:
        if candidate.name == "cuBLAS":
            base = shape, M
        assert base == (shape, M)
    only = time_kernels.jobs_of(time_kernels.parse_args(["--only", "aqlm", "--batches", "4", "16"]))
    assert [c.name for _, _, c, _ in only] == 4 * ["cuBLAS", "aqlm", "cuBLAS"]

@pytest.mark.slow
def test_benchmark_runs_from_any_folder_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    from conftest import call, check_refused
    script = ROOT / "tests" / "time_kernels.py"
    result = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, text=True,
                            capture_output=True)
    assert result.returncode == 0 and "--batches" in result.stdout, result.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, word in (("", "no GPU"), ("--shapes 4096", "4096x4096"), ("--shapes 0x9", "0x9"),
                        ("--bits 5", "5"), ("--batches 0", "0"), ("--only cutlass", "cutlass")):
        check_refused(call(capsys, f"time_kernels.py {flags}"), word)

if __name__ == "__main__":
    poison()
    print(json.dumps({f"{bits} {case}": relative_error(bits, case, "cpu", torch.float16)
                      for bits in BITS for case in CASES}))
