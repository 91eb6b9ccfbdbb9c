"""quantizers.py: the rotation, Gaussian grids, affine grid, packing and the packed linear layer.

Oracles: float64 integrals of the Gaussian density (math.erf), brute force over all levels, codes
and clips, and published constants: those of QuEST's authors (arXiv 2502.05003) and table II of Max,
"Quantizing for minimum distortion" (1960). P1..P32 label the properties of QuEST; those that are
not here are in test_quest.py.
"""
import importlib.metadata
import math
import sys

import numpy as np
import pytest
import torch

import quantizers
from quantizers import (FP4_CLIP, FP4_CODES, GAUSSIAN_CLIP, PackedEmbedding, PackedHead,
                        QuantLinear, bits_per_weight, clip_limit, code_linear, code_offset,
                        dequantize, gaussian_clip, gptq, keep_two_of_four, pack, quest_codes,
                        quest_fake_quant, rotate, rtn, trust_limit, unpack)

BITS = list(GAUSSIAN_CLIP)                             # 1, 1.58, 2 .. 8
EVEN = [b for b in BITS if b != 1.58]
GRIDS = [*((b, "uniform") for b in BITS), (4, "fp4")]
AUTHORS_CLIP = dict(zip(BITS, (
    0.7978845587140913, 1.2240089519030855, 1.4935346200015913, 2.051068354131873,
    2.513930578568423, 2.9160938834961225, 3.276597282593217, 3.6010497188221655,
    3.884938678807525)))
MSE = dict(zip(BITS, (1 - 2 / math.pi, 0.19017404, 0.11884605, 0.03743966, 0.01154288443,
                      0.0034952114, 0.00104004541, 3.04332771e-4, 8.768619e-5)))
MAX_1960 = {1: (1.596, 0.3634), 1.58: (1.224, 0.1902), 2: (0.9957, 0.1188), 3: (0.5860, 0.03744),
            4: (0.3352, 0.01154)}                      # step and mean squared error

def levels(bits, grid="uniform", clip=None):
    """All levels in root mean squares; the paper's formula, for any number of them."""
    if grid == "fp4":
        e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        return [(clip or FP4_CLIP) / 6 * m for m in [-m for m in e2m1[:0:-1]] + e2m1]
    n = 3 if bits == 1.58 else 2**bits
    return [(clip or GAUSSIAN_CLIP[bits]) * (2 * k / (n - 1) - 1) for k in range(n)]

def moments(levels):
    """E[g Q], E[Q Q] and E[(g - Q)^2] of g ~ N(0, 1) rounded to the nearest of the levels."""
    edges = [-math.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:])), math.inf]
    below = [0.5 + 0.5 * math.erf(t / 2**0.5) for t in edges]
    density = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in edges]
    gq = sum(v * (a - b) for v, a, b in zip(levels, density, density[1:]))
    qq = sum(v * v * (b - a) for v, a, b in zip(levels, below, below[1:]))
    return gq, qq, 1 - 2 * gq + qq

def best_clip(bits, grid="uniform"):
    """The clip where the error is stationary, E[g Q] = E[Q Q], by bisection."""
    low, high = 0.5, 8.0
    for _ in range(100):
        clip = (low + high) / 2
        gq, qq, _ = moments(levels(bits, grid, clip))
        low, high = (clip, high) if gq > qq else (low, clip)
    return clip

def gaussian_row(n=2**20):
    """The quantiles of N(0, 1) at the centres of n equal shares: a row without sampling noise."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).view(1, n)

def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def on_grid(h, bits, grid="uniform"):
    q, scale, _ = quest_codes(h, bits, grid)
    return (q + code_offset(bits, grid)) * scale

def nearest(h, bits, grid="uniform"):
    """Brute force: each row of h to the nearest of all levels times its root mean square."""
    rms = h.square().mean(-1, keepdim=True).sqrt()
    grid = rms.unsqueeze(-1) * torch.tensor(levels(bits, grid), dtype=h.dtype)     # (..., 1, N)
    i = (grid - h.unsqueeze(-1)).abs().argmin(-1, keepdim=True)                    # (..., C, 1)
    return grid.expand(*h.shape, -1).gather(-1, i).squeeze(-1)

def hadamard(n):
    """Orthonormal Sylvester matrix, float32 (n, n); it is its own inverse."""
    return quantizers.hadamard_signs(n, torch.device("cpu"), torch.float32) * n**-0.5

@pytest.mark.parametrize("n", [1, 2, 64, 128])
def test_hadamard_is_the_orthonormal_symmetric_sylvester_matrix(n):
    """P11: entries +-1 / sqrt(n), by the parity of the common bits of row and column."""
    signs = torch.tensor([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)])
    assert torch.equal(hadamard(n), signs * torch.tensor(n**-0.5))
    assert (hadamard(n) @ hadamard(n) - torch.eye(n)).abs().max() < 1e-6

@pytest.mark.parametrize("c, block", [(128, 128), (384, 128), (192, 64), (96, 32), (7, 1)])
def test_rotation_is_blockwise_orthonormal_and_keeps_products(c, block):
    """P12: blocks of the largest power of two up to 128, along the inputs of both operands."""
    x, w = randn(3, 5, c), randn(4, c, seed=1)
    blocks = torch.block_diag(*[hadamard(block).double()] * (c // block))
    assert (rotate(x) - x @ blocks).abs().max() < 1e-6            # hadamard() is float32
    assert (rotate(x) @ rotate(w).T - x @ w.T).abs().max() < 1e-12
    assert (rotate(rotate(x)) - x).abs().max() < 1e-13
    assert rotate(x.bfloat16()).dtype == torch.float32

def test_constant_row_keeps_one_coefficient_a_block_and_lone_outlier_becomes_two_valued():
    """P11: without random signs, and with few large values, rows stay far from Gaussian."""
    h, expected = rotate(torch.full((1, 256), 3.0).double()), torch.zeros(1, 256)
    expected[:, ::128] = 3 * math.sqrt(128)
    assert (h - expected).abs().max() < 1e-5
    h = rotate(9 * torch.eye(128).double()[5])
    assert (h.abs() - 9 / math.sqrt(128)).abs().max() < 1e-14 and h.sum().abs() < 1e-12

def test_rotation_saves_rows_with_an_outlier_column():
    """P14: one column of 256 times 60 costs 66% relative error at 4 bits, rotated 0.96%."""
    x = randn(2000, 256)
    x[:, 7] *= 60
    raw, rotated = ((on_grid(h, 4) - h).square().sum() / h.square().sum() for h in (x, rotate(x)))
    assert abs(raw - 0.66) < 0.01 and abs(rotated - 0.0096) < 2e-4

@pytest.mark.parametrize("bits", EVEN)
def test_levels_are_all_the_odd_integers_and_none_is_zero(bits):
    """P1: in half steps; the largest is the clip times the root mean square."""
    h = gaussian_row()
    q, scale, _ = quest_codes(h, bits)
    assert torch.equal((2 * q + 1).unique(), torch.arange(1 - 2**bits, 2**bits, 2).double())
    assert abs(on_grid(h, bits).max() - GAUSSIAN_CLIP[bits] * h.square().mean().sqrt()) < 1e-7

@pytest.mark.parametrize("bits", BITS)
def test_clip_is_the_optimum_and_the_authors_constant_costs_two_per_mille_at_most(bits):
    """P2: E[(g - Q) Q] = 0; 2% more or less costs error; theirs end at an optimizer's tolerance."""
    gq, qq, mse = moments(levels(bits))
    assert abs(GAUSSIAN_CLIP[bits] - best_clip(bits)) < 1e-6 and abs(gq - qq) < 1e-7
    assert all(moments(levels(bits, clip=GAUSSIAN_CLIP[bits] * f))[2] > mse for f in (0.98, 1.02))
    theirs = moments(levels(bits, clip=AUTHORS_CLIP[bits]))[2]
    assert mse <= theirs + 1e-15 and theirs / mse - 1 <= 2e-3      # 1e-15: float64

@pytest.mark.parametrize("bits", BITS)
def test_error_and_step_of_a_gaussian_row_are_the_published_ones(bits):
    """P2; integers times a step, with a level at zero, would give 0.0129 at 4 bits, not 0.0115."""
    h = gaussian_row()
    assert abs(moments(levels(bits))[2] / MSE[bits] - 1) < 1e-6
    assert abs((on_grid(h, bits) - h).square().mean() - MSE[bits]) < 2e-6
    if bits in MAX_1960:
        step, mse = MAX_1960[bits]
        assert abs(quest_codes(h, bits)[1] - step) < 5e-4 and abs(mse - MSE[bits]) < 5e-5

def test_one_bit_is_the_sign_times_the_mean_magnitude_of_a_gaussian():
    """P3: sqrt(2 / pi) root mean squares."""
    h = randn(4, 256)
    clip = h.square().mean(-1, keepdim=True).sqrt() * math.sqrt(2 / math.pi)
    assert (on_grid(h, 1) - h.sign() * clip).abs().max() < 2e-8

@pytest.mark.parametrize("bits, ratio", [(1, .79788), (2, .93870), (3, .98110), (4, .99421),
                                         (8, .99996)])
def test_rounded_rows_are_shorter_so_that_quantizing_them_again_shrinks_them(bits, ratio):
    """P4, P7: E[x Q] = E[Q Q] = 1 - MSE. Hence checkpoints hold codes, never rounded values."""
    h = gaussian_row()
    once = on_grid(h, bits)
    assert abs((h * once).mean() - (1 - MSE[bits])) < 2e-6
    assert abs(once.square().mean() - (1 - MSE[bits])) < 2e-6
    assert abs(once.square().mean().sqrt() - ratio) < 1e-5
    assert abs(on_grid(once, bits).max() / once.max() - ratio) < 1e-5

@pytest.mark.parametrize("bits, grid", GRIDS)
def test_grid_is_odd_and_equivariant_and_idempotent_at_a_frozen_scale(bits, grid):
    """P6, P7"""
    h = randn(4, 96)
    (q, scale, _), value = quest_codes(h, bits, grid), on_grid(h, bits, grid)
    assert torch.equal(on_grid(-h, bits, grid), -value)
    assert (on_grid(1000 * h, bits, grid) - 1000 * value).abs().max() < 2e-5      # 1000 EPS
    assert torch.equal(quest_codes(value, bits, grid, scale)[0], q)

@pytest.mark.parametrize("bits, grid", GRIDS)
def test_codes_are_the_nearest_levels_of_the_general_formula(bits, grid):
    """P8, P9: brute force. 1.58 bits: exactly {-clip, 0, clip}. Half a step off at most if near."""
    h = randn(3, 512) ** 3                             # long tails: some are clipped
    value, (_, scale, u) = on_grid(h, bits, grid), quest_codes(h, bits, grid)
    assert (value - nearest(h, bits, grid)).abs().max() < 2e-8
    assert value[0].unique().numel() == 3 or bits != 1.58
    if grid == "uniform":
        near = u.abs() <= clip_limit(bits) + 0.5
        assert ((value - h).abs() <= 0.5 * scale + 1e-12)[near].all() and not near.all()

def test_fp4_clip_is_the_optimum_and_its_error_exceeds_that_of_uniform_levels():
    """P10"""
    h = gaussian_row()
    assert sorted({c / 2 for c in FP4_CODES}) == [v * 6 for v in levels(4, "fp4", 1)]
    assert abs(moments(levels(4, "fp4"))[2] - 0.0126849) < 1e-7 and MSE[4] < 0.0126849
    assert abs((on_grid(h, 4, "fp4") - h).square().mean() - 0.0126849) < 2e-6
    assert abs(best_clip(4, "fp4") - 2.92247856) < 5e-6            # the authors' constant
    assert abs(FP4_CLIP - best_clip(4, "fp4")) < 1e-6

@pytest.mark.parametrize("bits,grid", GRIDS)
def test_the_table_holds_what_gaussian_clip_computes(bits, grid):
    table = FP4_CLIP if grid == "fp4" else GAUSSIAN_CLIP[bits]
    assert abs(gaussian_clip(bits, grid) - table) <= 6e-11                 # half of the last digit
    assert abs(gaussian_clip(bits, grid) - best_clip(bits, grid)) < 1e-9

@pytest.mark.parametrize("bits", BITS)
def test_trust_mask_by_error_equals_closed_form(bits):
    """P16: an error of at most clip / (N - 1) root mean squares (at 1 bit the rule before 1.30)."""
    h = randn(4, 250_000)
    n, rms = 3 if bits == 1.58 else 2**bits, h.square().mean(-1, keepdim=True).sqrt()
    by_error = (on_grid(h, bits) - h).abs() <= rms * GAUSSIAN_CLIP[bits] / (n - 1)
    assert torch.equal(quest_codes(h, bits)[2].abs() <= trust_limit(bits, one_bit=2.0), by_error)

@pytest.mark.parametrize("bits, grid, cut, masked", [
    (1, "uniform", 1.0372, .29962), (1.58, "uniform", 1.8360, .06636),
    (2, "uniform", 1.9914, .04644), (3, "uniform", 2.3441, .01907), (4, "uniform", 2.6816, .00733),
    (8, "uniform", 3.9376, 8.2e-5), (4, "fp4", 3.40956, 6.5e-4)])
def test_trust_ends_where_the_paper_says(bits, grid, cut, masked):
    """P16: the cut-off in root mean squares (1.30 clips at 1 bit only), the share of a Gaussian."""
    _, scale, u = quest_codes(gaussian_row(), bits, grid)
    share = (u.abs() > trust_limit(bits, grid)).double().mean()
    assert abs(trust_limit(bits, grid) * scale - cut) < 1e-4 and abs(share / masked - 1) < 0.01
    if bits == 1:                                      # 1.25 unrotated; 2 would be the general rule
        assert trust_limit(1, one_bit=1.25) == 0.625
        assert abs((u.abs() > trust_limit(1, one_bit=2.0)).double().mean() - .11054) < 1e-5

def test_scale_is_the_root_mean_square_of_the_whole_row_without_mean():
    """Neither one scale a block or a tensor nor a standard deviation."""
    h = randn(3, 256) + torch.tensor([[0.0], [5.0], [-1.0]])
    h[:, 128:] *= 10
    expected = 2 * GAUSSIAN_CLIP[4] * h.square().mean(-1, keepdim=True).sqrt() / 15
    assert (quest_codes(h, 4)[1] - expected).abs().max() < 1e-8

@pytest.mark.parametrize("bits", BITS)
def test_fake_quant_is_the_codes_values_and_zero_rows_are_finite(bits):
    """P20; bfloat16 inputs are rotated in float32, zeros stay below the least clip."""
    x = randn(5, 256, dtype=torch.bfloat16)
    x[0] = 0
    q, scale, _ = quest_codes(rotate(x), bits)
    assert (scale.dtype, scale.shape) == (torch.float32, (5, 1)) and (scale > 0).all()
    value = (q + code_offset(bits)) * scale
    assert torch.equal(value, quest_fake_quant(x, bits)) and value[0].abs().max() <= 1.01e-8
    assert torch.equal(value, quest_fake_quant(x.float(), bits))

def test_sparse_keeps_the_two_longest_aligned_pairs_of_four():
    """P21, brute force"""
    h = randn(6, 64)
    for row, kept in zip(h.tolist(), keep_two_of_four(h).tolist()):
        for i in range(0, 64, 8):
            pairs = sorted(range(i, i + 8, 2), key=lambda j: -(row[j] ** 2 + row[j + 1] ** 2))
            assert [j for j in range(i, i + 8) if kept[j]] == sorted(
                j + k for j in pairs[:2] for k in (0, 1))

def brute_rtn(w, bits, symmetric, shrink):
    """w, a list -> scale, zero point, the least |error| of any code for each, their sum |e|^2.4;
    the least |error| once more with the scale in float16, as files hold it."""
    low, high = min(w + [0.0]), max(w + [0.0])
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    scale = (high - low) * shrink / (2**bits - 1)
    zero = 2 ** (bits - 1) if symmetric else round(-low * shrink / scale)
    def errors(scale):
        return [min(abs((q - zero) * scale - v) for q in range(2**bits)) for v in w]
    half = float(np.float16(scale))
    return half, zero, errors(half), sum(e**2.4 for e in errors(scale))

@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group_size, mse", [(1, -1, True), (2, 8, True), (3, -1, True),
                                                   (4, 16, True), (8, 8, False)])
def test_rtn_is_the_nearest_code_and_mse_the_best_of_80_shrinks(bits, group_size, mse, symmetric):
    """By brute force; QuantLinear.affine multiplies by the same values, in batches of any shape."""
    w, x = randn(3, 32) ** 3, randn(2, 5, 32, seed=1)
    w[0], w[1] = 1 + 0.1 * w[0], -w[1].abs() - 1       # the range is widened to hold 0
    w[0, 0] = 3                                        # at 1 bit the best shrink is 0.38
    q, scale, zero_point = rtn(w, bits, group_size, symmetric, mse)
    assert q.dtype == (torch.int8 if symmetric else torch.uint8)
    assert (zero_point is None) == symmetric
    g = w.size(1) if group_size == -1 else group_size
    w_hat = dequantize(q, scale, zero_point, group_size).view(-1, g)
    for i, group in enumerate(w.view(-1, g).tolist()):
        tried = [brute_rtn(group, bits, symmetric, 1 - k / 100) for k in range(80 if mse else 1)]
        s, z, errors, _ = min(tried, key=lambda t: t[-1])
        assert abs(scale.flatten()[i] - s) < 1e-12 and (symmetric or zero_point.flatten()[i] == z)
        assert (w_hat[i] - w.view(-1, g)[i]).abs().tolist() == pytest.approx(errors, abs=1e-12)
    y, layer = x @ w_hat.view(3, 32).T, QuantLinear.affine(q, scale, zero_point, bits, group_size)
    for v, error in ((x, 1e-6), (x.float(), 1e-5)):    # weight() is float32
        assert (layer(v) - y).abs().max() <= error * y.abs().max()

def test_rtn_keeps_weights_on_its_grid_and_zeros_and_clips_the_positive_end_if_symmetric():
    """Symmetric: one step is 2 max|w| / (2^bits - 1), as in GPTQ's code; -max gets -8, max 7."""
    w = (torch.arange(16).repeat(2, 2) - 5.0) * 0.25   # exact in binary
    w[1] = 0
    q, scale, zero_point = rtn(w, 4, 16)
    assert torch.equal(dequantize(q, scale, zero_point, 16), w) and zero_point[0].tolist() == [5, 5]
    q, scale, _ = rtn(torch.tensor([[-15.0, 15.0, 2.2, -1.9]]), 4, symmetric=True)
    assert q.tolist() == [[-8, 7, 1, -1]] and scale.item() == 2.0
    with pytest.raises(ValueError, match="--group-size 100 does not divide 96 .*try 32 or -1"):
        rtn(randn(2, 96), 4, 100)

@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("n", [1, 7, 64, 101])
@pytest.mark.parametrize("bits", [*BITS, *range(9, 17)])
def test_pack_is_lossless_and_wastes_less_than_a_byte_a_row(bits, n, signed):
    """P23: two's complement codes come back with their sign; five ternary codes share a byte."""
    low, n_codes = (-1, 3) if bits == 1.58 else (-signed * 2**bits // 2, 2**bits)
    q = torch.randint(n_codes, (3, n), generator=torch.Generator().manual_seed(n)) + low
    q[0], q[1] = low, low + n_codes - 1
    packed, signed = pack(q, bits), signed or bits == 1.58
    assert packed.shape == (3, -(-n // 5) if bits == 1.58 else -(-n * bits // 8))
    assert packed.dtype == torch.uint8
    dtype = torch.int32 if bits > 8 else torch.int8 if signed else torch.uint8
    again = unpack(packed, bits, n, signed)
    assert torch.equal(again, q.to(dtype)) and again.dtype == dtype

def test_low_nibble_holds_the_even_index_and_negative_nibbles_extend_their_sign():
    """P23"""
    assert pack(torch.tensor([[1, -1, -8, 7]]), 4).tolist() == [[0xF1, 0x78]]
    packed = torch.tensor([[0xF1, 0x78]], dtype=torch.uint8)
    assert unpack(packed, 4, 4, signed=True).tolist() == [[1, -1, -8, 7]]
    assert pack(torch.tensor([[1, 5, 2]]), 3).tolist() == [[0b10101001, 0]]
    assert pack(torch.tensor([[-1, 0, 1, -1, 1, 0]]), 1.58).tolist() == [[3 + 2 * 9 + 2 * 81, 1]]

@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("bits, a_bits, grid", [
    *((b, b, "uniform") for b in BITS), (4, 16, "uniform"), (1.58, 8, "uniform"), (4, 4, "fp4"),
    (4, 16, "fp4"), (4, 4, "sparse"), (1, 16, "sparse"), (3, 8, "sparse")])
def test_quest_quant_linear_multiplies_levels_found_by_brute_force(bits, a_bits, grid, rotated):
    """P24, P25: also after a checkpoint, and inputs of 16 bits rotate like the weights."""
    w, x, dense = randn(7, 192), randn(2, 3, 192, seed=1), "fp4" if grid == "fp4" else "uniform"
    h_w, h_x = (rotate(w), rotate(x)) if rotated else (w, x)
    w_hat = nearest(h_w, bits, dense) * (keep_two_of_four(h_w) if grid == "sparse" else 1)
    y = (h_x if a_bits == 16 else nearest(h_x, a_bits, dense)) @ w_hat.T
    layer = QuantLinear.quest(w, bits, a_bits, grid, rotated)
    again = QuantLinear.of(layer.spec, layer.state_dict())
    assert torch.equal(again(x), layer(x)) and not list(layer.parameters())
    assert (again(x) - y).abs().max() < 1e-6 * y.abs().max()
    assert (again(x.float()) - y).abs().max() < 1e-5 * y.abs().max()

def test_fixed_scales_replace_those_of_the_rows():
    w, x, step, a_step = randn(4, 64), randn(3, 64, seed=1), torch.tensor(0.4), torch.tensor(0.3)
    w_hat, x_hat = (((v / s).floor().clamp(-8, 7) + 0.5) * s for v, s in ((w, step), (x, a_step)))
    layer = QuantLinear.quest(w, 4, 4, rotated=False, w_scale=step, a_scale=a_step)
    assert (layer(x) - x_hat @ w_hat.T).abs().max() < 1e-6

@pytest.mark.parametrize("bits", EVEN)
def test_integer_product_with_scales_outside_equals_the_fake_quantized_product(bits):
    """P24: the integers 2 q + 1 are odd and at most 2^bits - 1, their product is exact."""
    (x, x_scale, _), (w, w_scale, _) = (quest_codes(randn(5, 128, seed=s), bits) for s in (0, 1))
    c_x, c_w = (2 * x + 1).long(), (2 * w + 1).long()
    assert c_x.abs().max() < 2**bits and (c_x % 2 == 1).all()
    y = c_x @ c_w.T * (x_scale * w_scale.T / 4)
    assert (((x + 0.5) * x_scale) @ ((w + 0.5) * w_scale).T - y).abs().max() < 1e-12 * y.abs().max()
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        ours = code_linear(x + 0.5, x_scale, w + 0.5, w_scale, dtype)
        assert ours.dtype == dtype and (ours - y).abs().max() < error * y.abs().max()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_outermost_code_do_not_overflow(dtype):
    """P26: 4096 products of 15 * 15 quarters, 230400, overflow float16."""
    x = torch.full((1, 4096), 7.5)
    y = code_linear(x, torch.ones(1, 1), torch.cat((x, -x)), torch.ones(2, 1), dtype)
    assert torch.equal(y, torch.tensor([[230400.0, -230400.0]]).to(dtype))

@pytest.mark.parametrize("scales, codebooks, wide", [
    (1.0, 1.0, set()), (3e4, 1.0, set()), (1e6, 1.0, {"scale"}), (1e-9, 1.0, {"scale"}),
    (2e-6, 1.0, {"scale"}), (1.0, 1e5, {"codebooks"}), (1.0, 1e-7, {"codebooks"}),
    (1e6, 1e-7, {"scale", "codebooks"}), (0.0, 1.0, set())])
def test_vq_keeps_what_float16_cannot_hold(scales, codebooks, wide):
    """One row's scale, or one of two codebooks, of an unusual size; the oracle is float64. What
    float16 holds stays in it, and the bits that are counted are those that are stored."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (6, 8, 2), generator=generator)
    c = torch.randn(2, 16, 4, generator=generator)
    s = 1 + torch.rand(6, generator=generator)
    c[1, :, :] *= codebooks
    s[3] *= scales
    packed = QuantLinear.vq(codes, c, s)
    assert {n for n, t in packed.named_buffers() if t.dtype == torch.float32} == wide
    weight = packed.weight()
    assert weight.isfinite().all()
    for part in (0, 1):                                # both codebooks, however small one is
        alone = c * torch.tensor([part == 0, part == 1]).view(2, 1, 1)
        want = alone.double()[torch.arange(2), codes].sum(2).flatten(1) * s.double().unsqueeze(1)
        got = QuantLinear.vq(codes, alone, s).weight().double()
        error = torch.linalg.vector_norm(got - want, dim=1)
        assert (error <= 2**-9 * torch.linalg.vector_norm(want, dim=1)).all()
    bits = 6 * 8 * 2 * 4 + (32 if "scale" in wide else 16) * 6 + (
        32 if "codebooks" in wide else 16) * 2 * 16 * 4
    assert bits_per_weight(packed) == (bits / (6 * 32), 6 * 32)

def test_small_entries_of_a_codebook_are_held_as_coarsely_as_its_largest():
    """A trained codebook has some near zero; they are no reason for twice the bytes."""
    codebooks = torch.tensor([1.0, 1e-3, 1e-6, 1e-9]).view(1, 4, 1)
    packed = QuantLinear.vq(torch.arange(4).view(1, 4, 1), codebooks, torch.ones(1))
    assert packed.codebooks.dtype == packed.scale.dtype == torch.float16

def test_bits_per_weight_is_all_stored_bytes_over_the_weights():
    """By hand for 16 x 64 weights: bytes a row of codes, scales, zero points, masks. An affine
    grid has float16 scales and zero points of as many bits as a code, QuEST's float32 scales."""
    w = randn(16, 64, dtype=torch.float32)
    cases = [(QuantLinear.affine(*rtn(w, 4, 32), 4, 32), 32 + 2 * (2 + 4 / 8)),
             (QuantLinear.affine(*rtn(w, 1), 1), 8 + 2 + 1 / 8),
             (QuantLinear.affine(*rtn(w, 3, symmetric=True), 3), 24 + 2),
             (QuantLinear.quest(w, 4, 4), 32 + 4), (QuantLinear.quest(w, 1.58, 8), 13 + 4),
             (QuantLinear.quest(w, 4, 4, "sparse"), 16 + 4 + 4),
             (QuantLinear.quest(w, 4, 4, "fp4"), 32 + 4),
             (QuantLinear.quest(w, 2, 2, a_scale=torch.tensor(1.0)), 16 + 4 + 4 / 16)]
    for layer, row in cases:
        assert bits_per_weight(layer) == (8 * row / 64, 1024)
    model = torch.nn.ModuleList([torch.nn.Linear(64, 16), *(layer for layer, _ in cases)])
    assert bits_per_weight(model)[0] == pytest.approx(sum(row for _, row in cases) / 8 / len(cases))
    assert bits_per_weight(model[0]) == (0.0, 0)

@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_and_embedding_are_the_nearest_of_a_rows_codes(bits):
    """By brute force over all codes of each row's own step; ids of any shape, and 5000 rows, which
    are rounded in parts. Neither counts in the linears' bits per weight."""
    w = randn(5000, 6, dtype=torch.float32) * torch.logspace(-2, 2, 5000).unsqueeze(1)
    w[7] = 0
    head = PackedHead.from_weight(w, bits)
    embed = PackedEmbedding(head)
    codes = torch.arange(-2 ** (bits - 1), 2 ** (bits - 1))
    levels = head.scale.double().unsqueeze(-1) * codes                     # (V, 1, 2^bits)
    distance = (levels - w.unsqueeze(-1)).abs().amin(-1)
    assert ((head.weight() - w).abs() - distance).abs().max() < 1e-5
    assert (distance.amax(1) <= 0.35 * w.abs().amax(1)).all()
    idx = torch.tensor([[4999, 7, 0], [7, 4096, 4095]])
    assert torch.equal(embed(idx), head.weight()[idx]) and embed.packed is head.packed
    assert torch.equal(embed.weight(), head.weight()) and embed(idx[:, :0]).shape == (2, 0, 6)
    x = randn(3, 6, dtype=torch.float32)
    assert torch.equal(head(x), x @ head.weight().t())
    assert bits_per_weight(torch.nn.ModuleList([head, embed])) == (0.0, 0)

def test_two_bits_in_groups_of_128_cost_2_14_bits_per_weight():
    """2 of a code; 16 of a scale and 2 of a zero point for 128 weights."""
    w = randn(8, 256, dtype=torch.float32)
    layer = QuantLinear.affine(*rtn(w, 2, 128), 2, 128)
    assert bits_per_weight(layer)[0] == 2 + (16 + 2) / 128

@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("odd", [1e9, 1e-9, 3e-7, 2e-5])
def test_a_layer_with_a_scale_that_float16_cannot_hold_keeps_float32(odd, symmetric):
    """One row of unusual size among usual ones, which is neither infinite nor zero in the file; the
    scales are then those of the row alone. 2e-5 is no zero in float16, but coarse."""
    w = randn(6, 32, dtype=torch.float32)
    w[3] *= odd
    layers = [QuantLinear.affine(*codes, 4, 16) for codes in (
        rtn(w, 4, 16, symmetric), gptq(w, torch.eye(32), 4, 16, symmetric))]
    for layer in layers:
        assert layer.scale.dtype == torch.float32
        error = (layer.weight() - w).abs().amax(1) / w.abs().amax(1)
        assert (error < 0.12).all(), error
    usual = QuantLinear.affine(*rtn(w[[0, 1, 2, 4, 5]], 4, 16, symmetric), 4, 16)
    assert usual.scale.dtype == torch.float16

@pytest.mark.parametrize("bits, group_size", [(1, 8), (2, -1), (3, 16), (5, 8), (8, 16)])
def test_an_older_files_bytes_of_zero_points_and_float32_scales_are_read(bits, group_size):
    """Such a layer computes what its tensors say, in float64, and keeps its scales."""
    w = randn(7, 48, dtype=torch.float32) + 0.3
    q, scale, zero = rtn(w, bits, group_size)
    scale = scale * 1.0003                             # no number of float16
    spec = dict(kind="affine", bits=bits, a_bits=16, in_features=48, group_size=group_size,
                signed=False)
    old = {"packed": pack(q, bits), "scale": scale, "zero_point": zero.byte()}
    layer = QuantLinear.of(spec, old)
    again = QuantLinear.of(layer.spec, layer.state_dict())                 # as it is saved anew
    for m in (layer, again):
        assert torch.equal(m.zero_point, zero.byte()) and torch.equal(m.scale, scale)
        want = dequantize(q, scale.double(), zero, group_size)
        assert (m.weight() - want).abs().max() < 1e-6

def test_a_zero_point_that_is_no_code_is_refused():
    q, scale, zero = rtn(randn(4, 16), 2)
    with pytest.raises(ValueError, match="zero point 4 is no code of 2 bits"):
        QuantLinear.affine(q, scale, zero.fill_(4), 2)

@pytest.mark.parametrize("installed, can", [
    ({}, False), ({"triton": "3.4.0"}, False), ({"triton": "3.5.0"}, True),
    ({"triton": "3.10.1"}, True), ({"pytorch-triton": "3.6.0+git9844da95"}, True)])
def test_kernels_are_left_alone_where_triton_is_missing_or_too_old(installed, can, monkeypatch):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]
    if can:
        pytest.importorskip("triton", "3.5")           # which is then what is imported
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert (quantizers.find_kernels.__wrapped__() is not None) == can
