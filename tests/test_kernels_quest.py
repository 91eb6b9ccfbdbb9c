"""kernels.py: hadamard_quantize, rotate_trusted, quest_matmul and vq_matmul.

Oracles: the plain PyTorch of quantizers.py and quest.py, in float64. Without a GPU the kernels run
in Triton's interpreter, in float16 (it has no bfloat16), and are compiled for an H100 without one;
on a GPU they run compiled, in float16 and bfloat16. Both in one process of their own.
"""
import ast
import collections
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback

import pytest
import torch

import quantizers
from conftest import Launch, machine_code

ROOT = pathlib.Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
ULP = {torch.float16: 2**-10, torch.bfloat16: 2**-7}

def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)

def poison():
    """Memory that torch.empty may hand out next holds NaN and large integers."""
    if DEVICE == "cuda":
        del [torch.full((n,), torch.nan, device=DEVICE) for n in [2**k for k in range(6, 22)]][:]
    else:
        torch.use_deterministic_algorithms(True)       # torch.empty fills with NaN and the like
        torch.utils.deterministic.fill_uninitialized_memory = True

def close(y, expected, bound):
    error = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= bound, f"relative error {error:.1e} > {bound:.1e}"

def bools(mask, shape):
    """Mask bytes (T, C / 8) -> bool (T, C)."""
    return (mask[..., None] >> torch.arange(8, device=mask.device) & 1).bool().view(shape)

def vq_order(codes):
    return codes.permute(2, 1, 0).contiguous()

def near_a_border(x, bits):
    """Where float32 may round to another code than float64, or to another side of the trust limit:
    the rotated rows of x (T, C) in steps that lie within 1e-4 of one -> two bool (T, C)."""
    u = quest_codes(rotate(x.double()), bits)[2]
    places = u + 0.5 if bits == 1.58 else u            # codes change at integers, or half of them
    return (places - places.round()).abs() < 1e-4, (u.abs() - trust_limit(bits)).abs() < 1e-4

def hadamard_quantize_reference(x, bits):
    """hadamard_quantize as plain PyTorch, with the mask as bool (T, C)."""
    q, scale, u = quest_codes(rotate(x), bits)
    c = 2 * (q + code_offset(bits))
    return ((q if bits == 8 else c).to(torch.int8), scale.squeeze(-1), c.sum(-1).to(torch.int32),
            0.5 * c * scale, u.abs() <= trust_limit(bits))


def quest_linear_reference(x, q, w_scale, a_bits, bits):
    """quest_linear by plain PyTorch in float64: x (..., K), q integers (N, K), w_scale (N, 1)."""
    codes, scale, _ = quest_codes(rotate(x), a_bits)
    y = (codes + code_offset(a_bits)).double() @ (q.double() + code_offset(bits)).T
    return y * scale.double() * w_scale.double().T

def check_codes_scales_values_and_masks_equal_plain_pytorch():
    """All bits; widths with an odd number of blocks, and blocks of 32; a row of zeros.

    A code may differ by one where float rounding moves a value over a border, and nowhere else.
    """
    for bits in GAUSSIAN_CLIP:
        for T, C, dtype in ((5, 640, torch.float16), (3, 256, DTYPES[-1]), (7, 96, torch.float32)):
            x = 3 * randn(T, C, dtype=dtype)
            x[1] = 0
            poison()
            codes, scale, sums, values, mask = hadamard_quantize(x, bits, DTYPES[-1])
            with full_float32():
                expected = hadamard_quantize_reference(x.double(), bits)
            close(scale, expected[1], 1e-6)
            alone, *rest = hadamard_quantize(x, bits)  # without values and mask, H comes in halves
            close(rest[0], expected[1], 1e-6)
            near, near_limit = near_a_border(x, bits)
            for these in (codes, alone):               # even grids count in halves
                off = (these.int() - expected[0]).abs()
                assert not off[~near].any() and (off <= 2).all()
            for these, total_of in ((alone, rest[1]), (codes, sums)):
                c = these.int() * 2 + 1 if bits == 8 else these.int()
                assert torch.equal(total_of, c.sum(1, dtype=torch.int32))
            close(values, c * scale[:, None] / 2, ULP[values.dtype])
            assert not (bools(mask, x.shape) != expected[4])[~near_limit].any()

def check_a_row_does_not_depend_on_its_neighbours_or_the_tile():
    """Many rows a program or one: the same bits on a GPU. The interpreter's products are NumPy's,
    which may sum a row in another order where it stands elsewhere."""
    x = randn(2**20 // 256 + 3, 256, dtype=DTYPES[-1])
    if DEVICE == "cpu":
        x = x[:70]
    whole = hadamard_quantize(x, 4, DTYPES[-1])
    for i in (0, 1, 37, len(x) - 1):
        inside = [part[i:i + 1] for part in whole]
        alone = hadamard_quantize(x[i:i + 1], 4, DTYPES[-1])
        close(inside[1], alone[1], 1e-6)
        assert (inside[0] == alone[0]).double().mean() > 0.99
        assert DEVICE == "cpu" or all(map(torch.equal, inside, alone))

def check_gradient_is_masked_then_rotated_back():
    for dtype in DTYPES:
        for T, C in ((5, 640), (3, 96)):
            g = randn(T, C, dtype=dtype)
            mask = torch.randint(256, (T, C // 8), generator=torch.Generator().manual_seed(1))
            mask = mask.to(DEVICE, torch.uint8)
            expected = rotate(g.double() * bools(mask, g.shape))
            poison()
            close(rotate_trusted([g], mask, torch.float32), expected, 1e-6)
            close(rotate_trusted([g], mask, dtype), expected, ULP[dtype])
            for n in (2, 3):
                gs = [randn(T, C, seed=i, dtype=dtype) for i in range(n)]
                expected = rotate(sum(g.double() for g in gs) * bools(mask, g.shape))
                close(rotate_trusted(gs, mask, torch.float32), expected, ULP[dtype])

def check_integer_matmul_equals_float64_at_all_bits():
    """Weights as a checkpoint packs them; odd batches, and sizes that fill no tile."""
    for bits, a_bits in ((1, 1), (2, 4), (4, 4), (4, 8), (8, 8), (8, 4), (3, 3), (1.58, 1.58),
                         (1.58, 8), (6, 6), (5, 8), (8, 1.58), (1, 8)):
        shapes = [(1, 64, 512), (3, 72, 256), (17, 130, 384)]
        if (bits, a_bits) in ((4, 4), (8, 8)):
            shapes.append((5, 64, 12288))              # so many inputs that k is split
        for M, N, K in shapes:
            layer = QuantLinear.quest(randn(N, K), bits, a_bits)
            x = randn(M, K, seed=1, dtype=DTYPES[-1])
            w = quest_operand(layer.packed, layer.scale, bits, K)
            codes, scale, *_ = hadamard_quantize(x, a_bits)
            levels = codes.double() + 0.5 if a_bits == 8 else codes.double() / 2
            expected = (levels @ layer.levels(torch.float64).T) * scale[:, None].double()
            expected *= layer.scale.double().T
            poison()
            close(quest_linear(x, w, a_bits, bits), expected, ULP[x.dtype])
            a = hadamard_quantize(x, a_bits, planes=K // w[0].size(1))
            poison()                                   # integers are exact, the scales are float32
            close(quest_matmul(a, w, a_bits, bits, torch.float32), expected, 3e-7)
            if a_bits != 8:                            # rows whose codes float32 cannot mistake
                q = unpack(layer.packed, bits, K, signed=True)
                sure = ~near_a_border(x, a_bits)[0].any(1)
                y = quest_linear_reference(x, q, layer.scale, a_bits, bits)
                assert ((y - expected)[sure].abs() <= 1e-5 * expected.abs().max()).all()

def check_matmul_of_tiles_gives_the_same_bits():
    """Hopper's loads of tiles against pointers: 8-bit and 4-bit codes, tiles that are not full."""
    before, kernels.SMS = (kernels.TMA, kernels.SMS), 3      # of which some do two
    for a_bits, bits in ((8, 8), (4, 4), (8, 4)):
        for M, N, K in ((300, 264, 256), (500, 136, 384)):
            a = hadamard_quantize(randn(M, K, dtype=DTYPES[-1]), a_bits)
            w = hadamard_quantize(randn(N, K, seed=1), bits)
            ys = []
            for kernels.TMA in (False, True):
                poison()
                ys.append(quest_matmul(a, w, a_bits, bits, DTYPES[-1]))
            assert torch.equal(*ys)
    kernels.TMA, kernels.SMS = before

def check_no_sum_overflows_where_all_codes_are_extreme():
    """+-120 times -128 over the widest row: beyond 2^24, where float32 sums lose units."""
    K = 32512 if DEVICE == "cuda" else 8192
    a = (torch.full((2, K), -128, dtype=torch.int8, device=DEVICE), torch.ones(2, device=DEVICE),
         torch.full((2,), -255 * K, dtype=torch.int32, device=DEVICE))
    for bits, code, c in ((4, 0x88, -15), (8, -128, -255)):
        packed = torch.full((3, K * bits // 8), code, device=DEVICE).to(torch.uint8)
        w = (packed if bits == 4 else packed.view(torch.int8), torch.ones(3, device=DEVICE),
             torch.full((3,), c * K, dtype=torch.int32, device=DEVICE))
        y = quest_matmul(a, w, 8, bits, torch.float32)
        close(y, torch.full((2, 3), -255.0 * c * K / 4, device=DEVICE), 1e-7)

def check_fused_training_step_equals_the_plain_one():
    """Output and gradients of quest.py's two autograd functions, two weights that share x."""
    quest.kernels = kernels
    for bits, a_bits in ((4, 4), (1, 1), (8, 8), (1.58, 3)):
        for dtype in DTYPES:
            x = randn(24, 256, dtype=dtype).requires_grad_()
            ws = [randn(40, 256, seed=i).mul(0.1).requires_grad_() for i in (1, 2)]
            gs = [randn(24, 40, seed=i, dtype=dtype) for i in (3, 4)]
            with full_float32():
                exact = quest.QuestFunction.apply(x.double(), bits, a_bits, "uniform", "quest",
                                                  *[w.double() for w in ws])
                e = torch.autograd.grad(exact, (x, *ws), [g.double() for g in gs])
            ys = quest.FusedQuest.apply(x, bits, a_bits, *ws)
            for a, b, bound in zip((*ys, *torch.autograd.grad(ys, (x, *ws), gs)), (*exact, *e),
                                   [1, 1, 3, 3, 3]):
                close(a, b, bound * ULP[dtype])

def check_evaluation_gives_the_bits_of_the_packed_layer():
    """Live and packed round weights and inputs by the same kernels."""
    quest.kernels, fits, kernels.quest_fits = kernels, kernels.quest_fits, lambda *_: True
    for bits, a_bits in ((4, 4), (1, 8), (2, 2), (8, 8), (5, 4), (1.58, 3)):
        x, w = randn(24, 256, dtype=DTYPES[-1]), randn(48, 256, seed=1)
        layer = quest.QuestLinear(w, bits, a_bits)
        layer.has_kernels = lambda x: True             # a CPU's tensors too, in the interpreter
        packed = layer.packed(x.dtype)
        live = quest.fused_products(x, bits, a_bits, w)[0]
        assert torch.equal(kernels.linear(packed, x), live)
        assert kernels.quest_planes(bits, 256) == 256 // packed.fast.operand[0].size(1)
        close(live, quest.FusedQuest.apply(x, bits, a_bits, w)[0], 2e-2)   # few lie near a border
    kernels.quest_fits = fits

def check_lookups_equal_the_dense_weight():
    """1 to 3 codebooks, 1 to 5 tokens (5: PyTorch), outputs that fill no tile, split sums."""
    for B, N, K, M in ((1, 64, 256, 2), (3, 80, 512, 1), (4, 528, 256, 2), (2, 48, 4096, 3),
                       (5, 48, 256, 2)):
        for dtype in DTYPES:
            x, books = randn(B, K, dtype=dtype), randn(M, 256, 8, seed=1, dtype=dtype)
            codes = torch.randint(256, (N, K // 8, M), generator=torch.Generator().manual_seed(2))
            codes, scales = codes.to(DEVICE, torch.uint8), randn(N, seed=3).abs()
            w = sum(books.double()[m][codes[..., m].long()] for m in range(M)).flatten(1)
            for tile, programs in itertools.product(VQ_TILES, (1, 264)):   # one part, or many
                kernels.VQ_TILES = (tile._replace(most=2**31, programs=programs),)
                poison()
                y = vq_matmul(x, vq_order(codes), books, scales)
                close(y, x.double() @ w.T * scales.double(), 2 * ULP[dtype])

def check_packed_layers_give_their_operands_to_the_kernels():
    """QuantLinear with other bits of weights than of activations, and codebooks, in float64."""
    layers = [QuantLinear.quest(randn(48, 256, seed=3), bits, a_bits)
              for bits, a_bits in ((4, 8), (8, 4), (2, 4), (1.58, 8))]
    codes = torch.randint(256, (48, 32, 2), generator=torch.Generator().manual_seed(2))
    layers.append(QuantLinear.vq(codes.to(DEVICE), randn(2, 256, 8), randn(48, seed=1).abs()))
    fits, x = kernels.quest_fits, randn(2, 3, 256, dtype=DTYPES[-1])
    kernels.quest_fits = lambda *_: True               # a CPU's tensors too, in the interpreter
    for layer in layers:
        layer.to(DEVICE)
        poison()
        y = kernels.linear(layer, x)
        assert y.shape == (2, 3, 48) and y.dtype == x.dtype
        close(y, layer(x.double()), 2e-2)              # few values lie near a border of codes
        assert DEVICE != "cuda" or torch.equal(layer(x), y)
    kernels.quest_fits = fits

def check_a_repeat_gives_the_same_bits():
    x, w = randn(9, 512, dtype=DTYPES[-1]), randn(96, 512)
    layer = QuantLinear.quest(w, 4, 4).to(DEVICE)
    operand = quest_operand(layer.packed, layer.scale, 4, 512)
    codes = torch.randint(256, (512, 512, 2), dtype=torch.uint8, device=DEVICE)
    books, scales, x1 = randn(2, 256, 8, dtype=x.dtype), randn(512), randn(1, 4096, dtype=x.dtype)
    for f in (lambda: quest_linear(x, operand, 4, 4),
              lambda: vq_matmul(x1, vq_order(codes), books, scales)):
        first = f()
        for _ in range(20 if DEVICE == "cuda" else 2):
            assert torch.equal(f(), first)

CHECKS = [name for name in list(globals()) if name.startswith("check_")]

@pytest.fixture(scope="module")
def outcomes():
    """name -> "ok" or a traceback, of all checks in one process: Triton's interpreter must be
    chosen before Triton is imported."""
    pytest.importorskip("triton", "3.5")
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
    env |= {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, __file__], cwd=ROOT, text=True, capture_output=True,
                            env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])

@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_kernels(name, outcomes):
    assert outcomes[name] == "ok", outcomes[name]

def test_a_packed_layer_gives_its_bits_in_the_order_that_the_kernels_take_them(monkeypatch):
    """On every machine, with stubs in the place of the kernels."""
    tree = ast.parse((ROOT / "kernels.py").read_text())
    takes = {f.name: [a.arg for a in f.args.args] for f in tree.body
             if isinstance(f, ast.FunctionDef)}
    assert takes["quest_linear"] == ["x", "w", "a_bits", "bits"]           # as the stub's
    assert takes["quest_operand"] == ["packed", "scale", "bits", "K"]
    assert takes["quest_fits"] == ["x", "bits", "a_bits"]
    asked = []
    pytest.importorskip("triton", "3.5")
    import kernels
    for name, stub in dict(
        quest_fits=lambda x, bits, a_bits: asked.append((bits, a_bits)) or True,
        quest_operand=lambda packed, scale, bits, K: ("operand", bits, K),
        quest_linear=lambda x, w, a_bits, bits: dict(w=w, a_bits=a_bits, bits=bits)).items():
        monkeypatch.setattr(kernels, name, stub)
    w = torch.randn(8, 256)
    got = kernels.linear(quantizers.QuantLinear.quest(w, 4, 8), torch.randn(3, 256))
    assert got == dict(w=("operand", 4, 256), a_bits=8, bits=4) and asked == [(4, 8)]
    for other in (dict(grid="fp4", a_bits=4), dict(grid="sparse", a_bits=4),
                  dict(rotated=False, a_bits=8), dict(a_bits=8, a_scale=torch.tensor(0.1))):
        layer = quantizers.QuantLinear.quest(w, 4, **other)
        assert kernels.linear(layer, torch.randn(3, 256)) is None

def test_more_gradients_than_the_kernel_adds_are_refused():
    pytest.importorskip("triton", "3.5")
    import kernels
    g, mask = torch.zeros(2, 128), torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="up to 3 gradients; there are 4"):
        kernels.rotate_trusted([g] * 4, mask, torch.float32)

def compiled(kernel, warps, stages=3, **arguments):
    """Compile for an H100 -> registers' spills in bytes, shared memory, counts of instructions.

    arguments: the constants, or types of the others ("*i8", "i32"), pointers aligned as torch's.
    """
    pytest.importorskip("triton", "3.5")
    types = {n: v if isinstance(v, str) else "constexpr" for n, v in arguments.items()}
    constants = {n: v for n, v in arguments.items() if not isinstance(v, str)}
    aligned = [n for n, kind in types.items() if "*" in kind]
    shared, usage, code = machine_code(kernel, types, constants, aligned,
                                       dict(num_warps=warps, num_stages=stages))
    spills = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return spills, shared, collections.Counter(re.findall(r"\b[A-Z]{2,}\b", code))

@pytest.mark.codegen
@pytest.mark.parametrize("b, tile, split", [
    (1, 0, 1), (2, "few", 1), (4, "few", 4), (4, 0, 1), (4, 1, 1), (4, 2, 2), (8, 0, 1),
    (8, "8x8", 1), (8, "8x8 and fewer tokens", 1)])
def test_integer_matmul_compiles_for_an_h100_to_tensor_cores_without_spills(b, tile, split):
    import kernels
    named = {"few": kernels.QUEST_TILE_FEW, "8x8": kernels.QUEST_TILES_8x8[0],
             "8x8 and fewer tokens": kernels.QUEST_TILES_8x8[1]}
    eight = str(tile).startswith("8x8")
    tile = named[tile] if tile in named else kernels.QUEST_TILES[tile]
    spills, shared, count = compiled(
        kernels._quest_matmul, tile.warps, tile.stages, a="*i8", a_scale="*fp32", a_sum="*i32",
        w="*i32", w_scale="*fp32", w_sum="*i32", y="*bf16", parts="*i32", tickets="*i32",
        M="i32", N="i32", K=4096, b=b, SPLIT=split, PDL=True,
        HALF=0 if b == 8 else 0x01010101 << (7 - b), A8=eight, W8=eight,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=256 if b == 1 else tile.BLOCK_K)
    assert spills == 0 and shared <= 227 * 1024 and count["IGMMA"] and count["LDGSTS"]

@pytest.mark.codegen
@pytest.mark.parametrize("eight", [False, True])
def test_integer_matmul_of_tiles_compiles_for_an_h100_without_spills(eight):
    import kernels
    BM, BN, BK, warps, stages = kernels.QUEST_TMA
    spills, shared, count = compiled(
        kernels._quest_matmul_tma, warps, a=f"tensordesc<i8[{BM},{BK}]>", a_scale="*fp32",
        a_sum="*i32", w=f"tensordesc<i8[{BN},{BK}]>", w_scale="*fp32", w_sum="*i32",
        y=f"tensordesc<bf16[{BM},{BN // 2}]>", M="i32", N="i32", K=4096, A8=eight, W8=eight,
        BLOCK_M=BM, BLOCK_N=BN, BLOCK_K=BK, STAGES=stages)
    assert spills == 0 and shared <= 227 * 1024 and count["IGMMA"] and count["UTMALDG"]

@pytest.mark.codegen
@pytest.mark.parametrize("x, C, train", [("*bf16", 4096, False), ("*bf16", 14336, False),
                                         ("*bf16", 1024, True), ("*bf16", 2816, True),
                                         ("*fp32", 1024, True), ("*fp32", 1536, False)])
def test_hadamard_quantize_compiles_for_an_h100_to_tensor_cores_without_spills(x, C, train,
                                                                               monkeypatch):
    import kernels
    kernel = kernels._hadamard_quantize
    monkeypatch.setattr(kernels, "_hadamard_quantize", Launch(kernel))
    rows = torch.zeros(1, C, dtype=torch.float32 if x == "*fp32" else torch.bfloat16)
    kernels.hadamard_quantize(rows, 4, torch.bfloat16 if train else None, 1 if train else 2)
    launch = kernels._hadamard_quantize
    spills, shared, count = compiled(
        kernel, launch.options["num_warps"], x=x, codes="*i8",
        signs="*fp16" if x == "*fp32" else "*bf16", scale="*fp32", sums="*i32", values="*bf16",
        trusted="*u8", T="i32", **launch.constants)
    assert spills == 0 and shared <= 227 * 1024 and count["HGMMA"] + count["HMMA"]

@pytest.mark.codegen
@pytest.mark.parametrize("count, out", [(1, "*fp32"), (3, "*bf16")])
def test_rotation_of_gradients_compiles_for_an_h100_without_spills(count, out):
    import kernels
    R, warps, stages, _ = kernels.ROTATE
    spills, shared, count = compiled(
        kernels._rotate_trusted, warps, stages, g="*bf16", g2="*bf16", g3="*bf16", trusted="*u8",
        signs="*bf16", out=out, blocks="i32", COUNT=count, n=128, R=R, STAGES=stages)
    assert spills == 0 and shared <= 227 * 1024 and count["HGMMA"]

@pytest.mark.codegen
@pytest.mark.parametrize("entry", [0, 1])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_lookups_compile_for_an_h100_without_spills(entry, tokens):
    import kernels
    tile = kernels.VQ_TILES[entry]
    spills, shared, count = compiled(
        kernels._vq_lookups, tile.warps, tables="*bf16", codes="*u8", scales="*fp32", parts="*fp32",
        tickets="*i32", y="*bf16", tokens="i32", N="i32", ROWS=1024, R=tile.tables // tokens,
        TOKENS=tokens, BLOCK_N=tile.outputs, SPLIT=16, PDL=True, UNROLL=tile.unroll)
    assert spills == 0 and shared <= 227 * 1024 and count["ACQBULK"]   # waits for the tables

def main():
    results = {}
    for name in CHECKS:
        try:
            globals()[name]()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))

if __name__ == "__main__":
    import kernels
    import quest
    from kernels import (VQ_TILES, hadamard_quantize, quest_linear, quest_matmul, quest_operand,
                         rotate_trusted, vq_matmul)
    from quantizers import (GAUSSIAN_CLIP, QuantLinear, code_offset, full_float32, quest_codes,
                            rotate, trust_limit, unpack)
    main()
