"""kernels.plain_matmul and lowbit_matmul against float64 and each other, the packed order against
its inverse, layers on a GPU against PyTorch on a CPU, and machine code.

Without a GPU the kernels run in Triton's interpreter, in one process of their own that this file
starts: the interpreter must be chosen before Triton is imported. It knows no bfloat16 arithmetic,
so that is for GPUs only, where the same cases run compiled. Every output starts as NaN.
"""
import contextlib
import copy
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import weakref

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
    "tile, k split in four": (64, 512, 128, False, 17, "split"),
    "tile that covers less than its outputs": (40, 320, 64, True, 33, "tile"),
    "tile, three spans of 32 a group": (32, 288, 96, False, 17, "tile"),
    "tile by TMA, not full": (72, 320, 64, False, 45, "tma"),
    "tiles with extra tokens, not full": (72, 320, 64, False, 100, "extra"),
    "tile with extra tokens by TMA": (40, 256, 128, True, 90, "extra tma"),
    "tile with extra tokens, k split in two": (40, 256, 128, False, 90, "extra split"),
    "dequantized, in two pieces": (152, 352, 32, False, 17, "dequantize"),
}
if GPU:       # many steps, several programs at once: what the interpreter runs one after the other
    CASES["64 tokens"] = 1024, 2048, 128, False, 64, "tile"
    CASES["300 tokens"] = 1024, 2048, 128, False, 300, "tile"
    CASES["300 tokens, many outputs"] = 14336, 2048, 128, False, 300, "tile"
    CASES["160 tokens"] = 14336, 2048, 128, False, 160, "tile"
    CASES["192 tokens, few outputs"] = 2048, 4096, 128, False, 192, "tile"
    CASES["512 tokens, few outputs"] = 4096, 2048, 128, False, 512, "tile"
    CASES["1024 tokens"] = 4352, 2048, 128, False, 1024, "tile"

PLAIN = {  # O, C, group, symmetric, M
    "one token, groups that are no power of two": (70, 96, 24, False, 1),
    "one scale a row, an odd number of inputs, signed codes": (16, 77, -1, True, 17),
    "several tiles": (72, 160, 32, False, 70),
}

def random_codes(O, C, group, bits, symmetric):
    g = C if group == -1 else group
    scale = torch.rand(O, C // g) * 0.02 + 0.01
    if symmetric:
        half = 2 ** (bits - 1)
        return torch.randint(-half, half, (O, C), dtype=torch.int8), scale, None
    return (torch.randint(2**bits, (O, C), dtype=torch.uint8), scale,
            torch.randint(2**bits, (O, C // g), dtype=torch.uint8))

def error_of(y, exact):
    return ((y.double().cpu() - exact).norm() / exact.norm()).item()

def random_problem(bits, O, C, group, symmetric, M, device, dtype):
    """Codes (q, scale, zero_point) and x (M, C) on the device, and the exact product in float64."""
    from quantizers import dequantize
    torch.manual_seed(bits)
    q, scale, zero_point = random_codes(O, C, group, bits, symmetric)
    x = torch.randn(M, C).to(device, dtype)
    zero = zero_point if zero_point is None else zero_point.double()
    exact = x.double().cpu() @ dequantize(q, scale.double(), zero, group).T
    codes = [t if t is None else t.to(device) for t in (q, scale, zero_point)]
    return codes, x, exact

def plain(codes, x, bits, group):
    import kernels
    from quantizers import pack
    q, scale, zero_point = codes
    return kernels.plain_matmul(x, pack(q, bits), scale, zero_point, bits, group)

def plain_error(bits, case, device, dtype):
    """|y - float64| / |float64| of one case by the plain kernel."""
    O, C, group, symmetric, M = PLAIN[case]
    codes, x, exact = random_problem(bits, O, C, group, symmetric, M, device, dtype)
    return error_of(plain(codes, x, bits, group), exact)

def relative_error(bits, case, device, dtype):
    """|y - float64| / |float64| of one case, whether more calls gave the same bits, and
    |y - plain kernel| / |float64|."""
    import kernels
    O, C, group, symmetric, M, path = CASES[case]
    codes, x, exact = random_problem(bits, O, C, group, symmetric, M, device, dtype)
    w = kernels.pack_weight(*codes, bits, group)
    names = "FUSED", "PIECE", "TMA", "TILES", "predicted_time"
    before = {name: getattr(kernels, name) for name in names}
    if "tma" in path:
        kernels.TMA, kernels.TILES = True, kernels.TILES[1:2]              # of 64 tokens
    if "extra" in path:
        kernels.TMA, kernels.TILES = "tma" in path, before["TILES"][2:3]   # 64 and 32 tokens
    if "split" in path:
        kernels.predicted_time = lambda M, w, tile: -tile.split
    elif path != "tile":
        kernels.predicted_time = lambda M, w, tile: tile.split
    if path == "dequantize":
        kernels.FUSED, kernels.PIECE = 16, 128 * M
    if "extra" in path:
        tile = kernels.choose_tile(M, w)
        assert tile.EXTRA and tile.tma == ("tma" in path) and (tile.split > 1) == ("split" in path)
    y = kernels.lowbit_matmul(x, w)
    same = all(torch.equal(y, kernels.lowbit_matmul(x, w)) for _ in range(20 if GPU else 1))
    for name, value in before.items():
        setattr(kernels, name, value)
    apart = error_of(y, plain(codes, x, bits, group).double().cpu())
    return [error_of(y, exact), same, apart]

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
        error, same, apart = relative_error(bits, case, "cuda", torch.float16)
    else:
        error, same, apart = request.getfixturevalue("interpreted")[f"{bits} {case}"]
    assert error < 6e-4 and same                       # NaN, from what was not written, fails too
    assert apart < 8e-4                                # from the plain kernel

@pytest.mark.skipif(not GPU, reason="the interpreter has no bfloat16")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_product_equals_float64_in_bfloat16(bits, case):
    error, same, apart = relative_error(bits, case, "cuda", torch.bfloat16)
    assert error < 5e-3 and same
    assert apart < 7e-3                                # from the plain kernel

@pytest.mark.slow
@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("bits", range(1, 9))
def test_plain_kernel_equals_float64(request, bits, case):
    """From the bytes of quantizers.pack, of codes that cross their borders too."""
    if GPU:
        assert plain_error(bits, case, "cuda", torch.bfloat16) < 5e-3
        error = plain_error(bits, case, "cuda", torch.float16)
    else:
        error = request.getfixturevalue("interpreted")[f"plain {bits} {case}"]
    assert error < 6e-4

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
    monkeypatch.setattr(kernels, "HOPPER", True)
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
        packed = layer.fast
        layer.load_state_dict(layer.state_dict())
        kernels.linear(layer, x)
        assert layer.fast is not packed                                # it was written to
    layer = QuantLinear.affine(*random_codes(24, 48, 24, 4, False), 4, 24)
    x = torch.randn(3, 48)
    with pytest.warns(UserWarning, match="no kernel for 4 bits, 48 inputs, groups of 24") as said:
        assert kernels.linear(layer, x) is None and kernels.linear(layer, x) is None
    assert len(said) == 1                              # and forward uses PyTorch

def test_on_other_gpus_the_plain_kernel_reads_what_the_checkpoint_holds(monkeypatch):
    """With a stub in the kernel's place; very many tokens are cuBLAS's."""
    import kernels
    from quantizers import QuantLinear
    asked = []
    monkeypatch.setattr(kernels, "HOPPER", False)
    monkeypatch.setattr(kernels, "plain_matmul", lambda *args: asked.append(args))
    for bits, group, symmetric in ((5, 24, False), (3, -1, True)):
        _, scale, zero = codes = random_codes(24, 48, group, bits, symmetric)
        layer = QuantLinear.affine(*codes, bits, group)
        x = torch.randn(2, 3, 48)
        kernels.linear(layer, x)
        inputs, packed, *grid, b, g = asked.pop()
        assert inputs is x and packed is layer.packed and (b, g) == (bits, group)
        assert torch.equal(grid[0], scale.half().float()) and grid[0].dtype == torch.float32
        assert grid[1] is None if symmetric else torch.equal(grid[1], zero.byte())
        many = torch.randn(kernels.FUSED + 1, 48)
        assert torch.equal(kernels.linear(layer, many), many @ layer.weight().T) and not asked

# ---- Layers on a GPU ----------------------------------------------------------------------------

def affine_layer(bits, a_bits=16, symmetric=False, group=64, seed=0):
    from quantizers import QuantLinear
    torch.manual_seed(seed)
    return QuantLinear.affine(*random_codes(48, 256, group, bits, symmetric), bits, group, a_bits)

def quest_layer(bits, a_bits, seed=0):
    from quantizers import QuantLinear
    torch.manual_seed(seed)
    return QuantLinear.quest(torch.randn(48, 256), bits, a_bits)

def codebook_layer(seed=0):
    from quantizers import QuantLinear
    torch.manual_seed(seed)
    return QuantLinear.vq(torch.randint(256, (48, 32, 2)), torch.randn(2, 256, 8),
                          torch.rand(48) + 0.5)

LAYERS = {  # each is a function of a seed
    "affine W4": lambda seed: affine_layer(4, seed=seed),
    "affine W3, signed codes, one scale a row":
        lambda seed: affine_layer(3, symmetric=True, group=-1, seed=seed),
    "affine W8A8": lambda seed: affine_layer(8, 8, seed=seed),
    "affine W4A8": lambda seed: affine_layer(4, 8, seed=seed),
    "QuEST W4A4": lambda seed: quest_layer(4, 4, seed),
    "QuEST W4A8": lambda seed: quest_layer(4, 8, seed),
    "QuEST W8A4": lambda seed: quest_layer(8, 4, seed),
    "QuEST W8A8": lambda seed: quest_layer(8, 8, seed),
    "QuEST W1A1": lambda seed: quest_layer(1, 1, seed),
    "QuEST W2A4": lambda seed: quest_layer(2, 4, seed),
    "QuEST W3A6": lambda seed: quest_layer(3, 6, seed),
    "QuEST W1.58A8": lambda seed: quest_layer(1.58, 8, seed),
    "codebooks": codebook_layer,
}

def as_it_was(layer, other):
    return layer

def sliced(layer, other):
    """Outputs 16 to 47, as views of the tensors that it had; codebooks serve all outputs. Zero
    points are packed along the outputs: a byte holds those of 8 / bits of them."""
    for name, t in list(layer.named_buffers()):
        if name == "zeros":
            bits = layer.spec["bits"]
            layer.zeros = t[:, 16 * bits // 8:48 * bits // 8]
        elif name != "codebooks":
            setattr(layer, name, t[16:48])
    return layer

def moved(layer, other):
    return layer.cpu().cuda()

def reloaded(layer, other):
    """What a checkpoint keeps of it, through a file."""
    from quantizers import QuantLinear
    file = io.BytesIO()
    torch.save((layer.spec, dict(layer.named_buffers())), file)
    file.seek(0)
    return QuantLinear.of(*torch.load(file))

def written_to(layer, other):
    """Its tensors stay the same ones; what they hold is another layer's."""
    layer.load_state_dict(other.state_dict())
    return layer

def sure_inputs(layer, tokens, dtype):
    """x (tokens, 256) on the GPU. For QuEST, of rows whose codes float32 cannot mistake: no value
    lies within 1e-4 of the border of two codes."""
    from quantizers import quest_codes, rotate
    x = torch.randn(4 * tokens, 256).to(dtype)
    if layer.spec["kind"] == "quest":
        u = quest_codes(rotate(x.double()), layer.a_bits)[2]
        places = u + 0.5 if layer.a_bits == 1.58 else u
        x = x[((places - places.round()).abs() > 1e-4).all(1)]
    assert len(x) >= tokens
    return x[:tokens].cuda()

def exact_product(layer, x):
    """By plain PyTorch on the CPU in float64, with the same grid of x where x has one."""
    from quantizers import fake_quant_tokens
    layer = copy.deepcopy(layer).cpu()
    if layer.spec["kind"] == "affine":
        x = fake_quant_tokens(x, layer.a_bits).cpu().double()
        return x @ layer.weight().double().T
    return layer(x.cpu().double())

@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_and_their_slices_are_what_the_gpu_tests_take_them_for(name):
    """On any machine: the weight of a slice is a slice of the weight."""
    whole = LAYERS[name](0).weight()
    assert torch.equal(sliced(LAYERS[name](0), None).weight(), whole[16:48])

@pytest.mark.skipif(not GPU, reason="of layers on a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("change", [as_it_was, sliced, moved, reloaded, written_to])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_on_a_gpu_equals_float64_on_a_cpu(name, change, dtype):
    """4 tokens and 40; and after a change the kernels do not read the weight from before."""
    import kernels
    bound = 6e-4 if dtype == torch.float16 else 5e-3
    for tokens in (4, 40):
        layer = LAYERS[name](0).cuda()
        x = sure_inputs(layer, tokens, dtype)
        assert kernels.linear(layer, x) is not None
        layer = change(layer, LAYERS[name](1).cuda())
        y = layer(x.view(2, -1, 256))
        assert y.shape[:2] == (2, tokens // 2) and y.dtype == dtype
        assert error_of(y.flatten(0, 1), exact_product(layer, x)) < bound
        if layer.spec["kind"] != "affine" or layer.a_bits == 16:       # else it rounds x before
            assert torch.equal(kernels.linear(layer, x), y.flatten(0, 1))

@pytest.mark.skipif(not GPU, reason="of layers on a GPU")
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_in_bfloat16_does_not_change_those_in_float16(name):
    import kernels
    layer = LAYERS[name](0).cuda()
    x = torch.randn(4, 256, device="cuda", dtype=torch.float16)
    first = kernels.linear(layer, x)
    kernels.linear(layer, x.bfloat16())
    assert torch.equal(kernels.linear(layer, x), first)
    fresh = LAYERS[name](0).cuda()
    kernels.linear(fresh, x.bfloat16())
    assert torch.equal(kernels.linear(fresh, x), first)

# ---- Machine code -------------------------------------------------------------------------------

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
                            (8, 64, 4096), (4, 512, 4096), (8, 512, 4096)]
                         + [(b, m, 14336) for b in (1, 3, 4, 8) for m in (96, 160, 192, 300)]
                         + [(4, 96, 4096), (4, 192, 4096)])
def test_code_for_sm_90_uses_tensor_cores_and_no_loop_spills(bits, M, O, monkeypatch):
    """Every tile of the tables, as lowbit_matmul would launch it for a layer of an 8B model."""
    import triton
    import kernels
    from conftest import machine_code
    C = 4096
    w = kernels.LowBit(range(O // 16), None, None, bits, 128, (O, C))
    monkeypatch.setattr(kernels, "HOPPER", True)
    monkeypatch.setattr(kernels, "TMA", True)
    kernel, _, constants, options = kernels.plan(M, w)
    assert not constants.get("TMA") or constants["SPLIT"] == 1
    x = x2 = "*bf16"
    if constants.get("TMA"):
        x = x2 = "tensordesc<bf16[{BLOCK_M}, {BLOCK_K}]>".format(**constants)
        if constants["EXTRA"]:
            x2 = "tensordesc<bf16[{EXTRA}, {BLOCK_K}]>".format(**constants)
    kinds = dict(x=x, x2=x2, y="*bf16", parts="*fp32", M="i32", O="i32", N="i32", MASK="i32")
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
    assert ("UTMALDG" in sass) == bool(constants.get("TMA"))
    assert not overwritten_operands(sass)

# ---- Their benchmark ----------------------------------------------------------------------------

def test_every_product_is_timed_in_turns_with_the_cublas_that_it_is_a_ratio_to():
    """Of the same shape and tokens, the first; none at bits or tokens that it does not have."""
    import time_kernels
    args = time_kernels.parse_args(["--bits", "3", "4", "--batches", "1", "600"])
    jobs = time_kernels.jobs_of(args)
    assert {(c.name, bits) for _, M, c, bits in jobs if M == 1} == {
        ("cuBLAS", 16), ("lowbit_matmul", 3), ("lowbit_matmul", 4), ("quest_linear", 4),
        ("plain_matmul", 4), ("tinygemm", 4), ("gemlite", 4), ("humming", 3), ("humming", 4)}
    many = {c.name for _, M, c, _ in jobs if M == 600}
    assert many == {"cuBLAS", "lowbit_matmul", "quest_linear", "humming"}
    base = None
    for shape, M, candidate, _ in jobs:
        if candidate.name == "cuBLAS":
            base = shape, M
        assert base == (shape, M)
    only = time_kernels.jobs_of(time_kernels.parse_args(["--only", "aqlm", "--batches", "4", "16"]))
    assert [c.name for _, _, c, _ in only] == 3 * ["cuBLAS", "aqlm", "cuBLAS"]

    # Without --batches, slow peers have fewer of the 24 numbers of tokens.
    jobs = time_kernels.jobs_of(time_kernels.parse_args([]))
    tokens = lambda name: {M for _, M, c, _ in jobs if c.name == name}
    assert len(tokens("lowbit_matmul")) == 24 and max(tokens("humming")) == 1024
    assert tokens("gemlite") == {1, 16, 64, 300}

@pytest.fixture
def on_paper(monkeypatch):
    """The benchmark with CUDA played: graphs that call `replayed`, and a context that is `dead`
    after a fault, in all of its process. The process apart is this one, its context a new one."""
    import time_kernels
    state = types.SimpleNamespace(dead=False, replayed=lambda: None)

    def synchronize():
        if state.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Graph:
        def replay(self):
            synchronize()
            state.replayed()

    class Event:
        def __init__(self, enable_timing):
            self.record, self.synchronize = synchronize, synchronize

        def elapsed_time(self, other):
            return 0.2                                 # ms for 20 calls

    class Pool(contextlib.nullcontext):
        def __init__(self, workers, context):
            super().__init__(self)
            state.dead = False

        def submit(self, function, *args):
            result = function(*args)
            return types.SimpleNamespace(result=lambda: result)

    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: randn(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(time_kernels.concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(time_kernels, "COPIES", 1)
    return state

def test_what_captured_calls_read_lives_until_the_last_replay(on_paper):
    """A graph knows addresses alone, and torch unmaps free memory before it captures the next."""
    import time_kernels
    read = []

    def layer(x):
        codes = x.clone()
        read.append(weakref.ref(codes))
        return lambda: codes

    alive = []
    on_paper.replayed = lambda: alive.append([codes() is not None for codes in read])
    jobs = [("8x8", 1, time_kernels.Candidate(name, lambda O, C, bits: layer, (8,), 1), 8)
            for name in ("cuBLAS", "_int_mm", "_scaled_mm")]
    rows = time_kernels.measure(jobs, 1.0, None)
    assert [row["us"] for row in rows] == 3 * [10.0]
    assert len(read) == 6 and all(all(them) for them in alive) and len(alive[-1]) == 6

def test_a_peer_that_breaks_cuda_is_left_out_and_a_kernel_of_ours_ends_the_benchmark(
        on_paper, capsys):
    import time_kernels

    def breaking(O, C, bits):
        def layer(x):
            def call():
                on_paper.dead = len(x) == 2 and bits == 4
            return call
        return layer

    def sound(O, C, bits):
        return lambda x: lambda: None

    def jobs_with(name):
        return [("8x8", M, time_kernels.Candidate(kernel, make, (4, 8), 3), bits)
                for M in (1, 2, 3) for kernel, make, bits in (
                    ("cuBLAS", sound, 16), (name, breaking, 4), (name, breaking, 8))]

    rows = time_kernels.measure(jobs_with("humming"), 1.0, None)
    assert [(row["batch"], row["bits"]) for row in rows] == [
        (1, 16), (1, 4), (1, 8), (2, 16), (2, 8), (3, 16), (3, 8)]
    assert "humming W4 8x8 batch 2: CUDA error: an illegal memory" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="quest_linear W4"):
        time_kernels.measure(jobs_with("quest_linear"), 1.0, None)

@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("M", [17, 64, 300, 1024])
def test_sweep_tries_the_present_tile_first_and_then_others_that_fit(M, bits, monkeypatch):
    import kernels
    import time_kernels
    monkeypatch.setattr(kernels, "TMA", True)
    w = kernels.LowBit(range(896), None, None, bits, 128, (14336, 4096))
    tiles = time_kernels.tiles_to_try(M, w)
    assert tiles[0] == kernels.choose_tile(M, w)
    assert len(set(tiles)) == len(tiles) == time_kernels.KEEP + 1
    for tile in tiles:
        assert 4096 % (tile.BLOCK_K * tile.split) == 0 and tile.tokens <= 2 * M
        assert tile.tokens * tile.BLOCK_N <= 160 * 32 * tile.warps     # sums, in registers
    if bits in (4, 8):
        tiles = time_kernels.quest_tiles_to_try(M, 14336, 4096, bits)
        assert tiles[0] == kernels.quest_tile(M, 14336, bits, bits)
        assert len(set(tiles)) == len(tiles)

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
    outcomes = {f"{bits} {case}": relative_error(bits, case, "cpu", torch.float16)
                for bits in BITS for case in CASES}
    outcomes |= {f"plain {bits} {case}": plain_error(bits, case, "cpu", torch.float16)
                 for bits in range(1, 9) for case in PLAIN}
    print(json.dumps(outcomes))
