"""Quantizers: the number grids, the packing and the packed linear layer that all methods share.

  1. A grid turns floats into small integers `q` and a few real numbers.
     QuEST:   h_hat = (q + 1/2) * scale            `quest_codes`, on Hadamard-rotated rows
     affine:  w_hat = (q - zero_point) * scale     `rtn` and `gptq`, one scale per row or group
     vector:  w_hat = (a sum of M codewords) * scale, one code each for g weights     `vq_fit`
  2. `pack` lays the integers side by side, `bits` bits each; `unpack` is its exact inverse.
  3. `QuantLinear` holds packed integers and scales, and multiplies with them.

The sections follow that order: rotation, QuEST's grid, affine grids, GPTQ, codebooks, packing,
packed linears. At the end come details that the rest calls by name: the grids that only QuEST's
variants use (FP4, sparse), and what finds or replaces PyTorch on a GPU.

Papers: QuEST (arXiv 2502.05003) for the Gaussian grids and the rotation; GPTQ (2210.17323) and
its code for the affine grid; AQLM (2401.06118) for the codebooks. Not here: training a model (see
the method files); `vq_fit` takes Adam steps on the codebooks of one linear.

Names: q or codes are integers; scale is the real width of one step; zero_point is the code that
means 0.0; qmin and qmax are the smallest and the largest code; bits are per code.
Shapes: O output channels, C input channels, g = group_size, G = C / g groups (J where a group has a
code, not a scale), ... any other dimensions.
"""
import contextlib
import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

EPS = 1e-8  # added to a clip: a row of zeros has a scale above 0 and still receives a gradient

# ---- The Hadamard rotation (QuEST section 3.1) ----------------------------------------------
# It spreads an outlier over its block. Rows become nearly Gaussian, and one clip fits them all.

def rotate(x, block=128, dtype=torch.float32):
    """Block-diagonal Hadamard transform of the last dimension (..., C), in dtype; float64 stays.

    Each block of x is multiplied by H, a matrix of +-1 over sqrt(n). H is symmetric and H H = I,
    so rotate is its own inverse, and products stay: rotate(x) @ rotate(w).T == x @ w.T. `block` is
    a power of two; blocks have n columns, the largest power of two <= `block` that divides C.
    It is computed in one of two ways: by a plain product, which is differentiable, or by
    _rotate_by_bfloat16, which has no backward pass. The methods call rotate without gradients,
    inside of their autograd functions, so that training and packing take the same way.
    """
    n = math.gcd(x.size(-1), block)
    if _rotates_by_bfloat16(x, dtype):
        return _rotate_by_bfloat16(x, n)
    if x.dtype != torch.float64:
        x = x.to(dtype)

    # x @ signs / sqrt(n). addmm multiplies by alpha on the way, which saves a pass over the result;
    # with beta = 0 its first argument, a matrix to add, is not read.
    signs = hadamard_signs(n, x.device, x.dtype)
    h = torch.addmm(signs[0], x.reshape(-1, n), signs, beta=0, alpha=n**-0.5)
    return h.view(x.shape)

# (n, device, dtype) -> matrix. Call hadamard_signs before torch.compile traces: a tensor that
# exists is a constant to it, the loop below is not.
_SIGNS = {}

def hadamard_signs(n, device, dtype):
    """sqrt(n) * H (n, n): entries +-1, exact in every format, also in TF32 and bfloat16."""
    if (n, device, dtype) not in _SIGNS:
        # Sylvester's construction: every entry h becomes the 2 x 2 matrix ((h, h), (h, -h)).
        h = torch.ones(1, 1)
        while h.size(0) < n:
            h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
        _SIGNS[n, device, dtype] = h.to(device, dtype)
    return _SIGNS[n, device, dtype]

MM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")     # torch.mm(..., out_dtype=) exists

def _rotates_by_bfloat16(x, dtype):
    """Whether _rotate_by_bfloat16 can be used: it is exact, but has no backward pass."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    float32_result = dtype == torch.float32 and x.dtype != torch.float64
    return MM_HAS_OUT_DTYPE and x.is_cuda and float32_result and not needs_gradient

def _rotate_by_bfloat16(x, n):
    """rotate in blocks of n, on a GPU: x (..., C) bfloat16 or float32 -> float32 (..., C).

    TF32 would round float32 weights to 11 bits before they are rotated, and then codes near a
    border differ between machines and from the packed file. Three bfloat16 numbers hold a float32
    exactly; their products with +-1 are exact, and the sums are float32.
    """
    signs = hadamard_signs(n, x.device, torch.bfloat16)
    rest = x.reshape(-1, n)
    parts = []
    for _ in range(1 if x.dtype == torch.bfloat16 else 3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]

    # (part 1 | part 2 | part 3) times the matrix three times above itself: the sum in one product.
    h = torch.mm(torch.cat(parts, 1), signs.repeat(len(parts), 1), out_dtype=torch.float32)
    return (h * n**-0.5).view(x.shape)

# ---- QuEST's grid (section 3.1) -------------------------------------------------------------
# N equally spaced levels over +-clip times the row's root mean square; the clip suits a Gaussian
# row best.

# The minimizers of E (g - Q(g))^2 for g ~ N(0, 1), as `gaussian_clip` computes them. The authors'
# own constants stop at their optimizer's tolerance: at 8 bits theirs is 1 % lower. 1.58 stands for
# log2(3) bits: the three levels -1, 0, 1.
GAUSSIAN_CLIP = {
    1: 0.7978845608, 1.58: 1.2240063619, 2: 1.4935300289, 3: 2.0510680451, 4: 2.5140045915,
    5: 2.9161512493, 6: 3.2779847974, 7: 3.6110971963, 8: 3.9222044167,
}

def gaussian_clip(bits, grid="uniform"):
    """The clip of GAUSSIAN_CLIP[bits], or of grid "fp4", by bisection.

    Q(g) = clip * v, where v in -1..1 is the level whose cell g falls into. The error E (g - Q(g))^2
    has the derivative 2 E[(clip v - g) v] by the clip, negative below the best clip and positive
    above. (The clip also moves the cells' borders. But a border lies halfway between two levels,
    where both are equally wrong, so that moving it changes nothing to first order.)
    """
    if grid == "fp4":
        levels = torch.tensor(sorted(set(FP4_CODES)), dtype=torch.float64) / max(FP4_CODES)
    else:
        levels = torch.linspace(-1, 1, num_levels(bits), dtype=torch.float64)  # (N,)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    borders = torch.cat((-infinity, middles, infinity))                # (N + 1,)

    low, high = 0.1, 10.0
    for _ in range(60):
        clip = (low + high) / 2
        t = clip * borders
        probability = (torch.special.ndtr(t[1:]) - torch.special.ndtr(t[:-1]))  # of each cell
        density = (-t * t / 2).exp() / math.sqrt(2 * math.pi)
        mean = density[:-1] - density[1:]              # E[g where g is in the cell]
        slope = (levels * (clip * levels * probability - mean)).sum()  # half the derivative
        if slope < 0:
            low = clip
        else:
            high = clip
    return clip

def num_levels(bits):
    return 3 if bits == 1.58 else 2 ** int(bits)

def code_offset(bits, grid="uniform"):
    """levels = q + this: 1/2 where the number of levels is even, so that none is at zero; 0 on the
    ternary grid and on FP4."""
    return 0.0 if bits == 1.58 or grid == "fp4" else 0.5

def clip_limit(bits, grid="uniform"):
    """The outermost level, in units of `scale`. FP4's is 6, and its codes are stored doubled."""
    return 12.0 if grid == "fp4" else (num_levels(bits) - 1) / 2

def trust_limit(bits, grid="uniform", one_bit=1.30):
    """The largest |h| / scale that still receives a gradient (QuEST section 3.2).

    A value is trusted if rounding moves it by at most half a step (FP4: half of the widest gap).
    Inside the clip that is every value, so the limit is the outermost level plus that much. At 1
    bit the paper ends the zone at `one_bit` clips instead (section 3.3; 1.30 rotated, 1.25 not).
    """
    if bits == 1:
        return one_bit * clip_limit(1)
    half_a_step = 2.0 if grid == "fp4" else 0.5
    return clip_limit(bits, grid) + half_a_step

def quest_codes(h, bits, grid="uniform", scale=None):
    """Nearest codes of rows that are already rotated. QuEST's scale gets no gradient: h comes
    detached, or inside of an autograd function.

    h (..., C) float -> q (..., C) integers in h's dtype, scale (..., 1), u = h / scale. The value
    is (q + code_offset(bits, grid)) * scale. Unless given, the scale follows from the root mean
    square of the whole row, no mean subtracted. grid: "uniform" or "fp4"; "sparse" gets the uniform
    codes, and `keep_two_of_four` says which of them stay.
    """
    # The outermost level lies at clip times the row's root mean square.
    if scale is None:
        clip = FP4_CLIP if grid == "fp4" else GAUSSIAN_CLIP[bits]
        rms = torch.linalg.vector_norm(h, dim=-1, keepdim=True) * h.size(-1) ** -0.5
        scale = (clip * rms + EPS) / clip_limit(bits, grid)            # (..., 1)

    u = h / scale
    if grid == "fp4":
        q = fp4_codes(u)
    elif bits == 1.58:
        q = u.round().clamp(-1, 1)
    else:
        # Levels are at q + 1/2, so the nearest is that of the integer below u.
        half = num_levels(bits) // 2
        q = u.floor().clamp_(-half, half - 1)
    return q, scale, u

def quest_fake_quant(x, bits):
    """QuEST's fake quantizer, for who looks for it among the quantizers. It is the heart of
    quest.py and written out there; the import is late because quest.py imports this file."""
    from quest import quest_fake_quant
    return quest_fake_quant(x, bits)

def code_linear(x, x_scale, w, w_scale, dtype):
    """y = (x * x_scale) @ (w * w_scale).T, with the scales outside of the product.

    x (..., C) levels, or plain values and no scale; x_scale (..., 1), w (O, C) levels, w_scale
    (O, 1) or a single number -> (..., O). Levels up to 8 bits are exact in bfloat16, levels times
    scales are not: so the product is taken in dtype, and scaled in the scales' float32. Training
    and packed inference both call this, so that they agree.
    """
    y = F.linear(x.to(dtype), w.to(dtype)) * w_scale.view(-1)          # (..., O)
    if x_scale is not None:
        y = y.mul_(x_scale)
    return y.to(dtype)

# ---- The affine grid and round-to-nearest ---------------------------------------------------
# Codes 0..qmax = 2^bits - 1 at equal steps; w_hat = (q - zero_point) * scale. The zero point is an
# integer, so that a weight of 0 stays 0.

class AffineCodes(NamedTuple):
    """A weight (O, C) on an affine grid, as `rtn` and `gptq` return it."""
    q: torch.Tensor              # (O, C) uint8 in 0..2^bits-1; symmetric: int8 around 0
    scale: torch.Tensor          # (O, G), numbers of float16: see affine_grid
    zero_point: torch.Tensor     # (O, G) integers as floats; symmetric: None, and 0 is meant

def rtn(w, bits, group_size=-1, symmetric=False, mse=True):
    """Round to nearest, the baseline of every table: w (O, C) -> AffineCodes.

    asymmetric: q uint8 in 0..2^bits-1 over the range of the row or group, widened to hold 0.
    symmetric:  q int8 in -2^(bits-1)..2^(bits-1)-1, zero_point None. As in GPTQ's code one step
    is 2 max|w| / (2^bits - 1). The codes then reach half a step below -max|w| and end half a step
    below max|w|, so a largest weight that is positive is clipped by half a step.
    mse (GPTQ's name): search 80 shrunken ranges (1, 0.99 .. 0.21 of the extremes') for the least
    sum of |error|^2.4. It is on in every table here.
    """
    groups = _grouped(w, group_size)                                   # (O, G, g)
    scale, zero_point = affine_grid(groups, bits, symmetric, mse)      # (O, G)
    q = affine_codes(groups, scale.unsqueeze(-1), zero_point.unsqueeze(-1), bits)
    return _affine_result(q.view(w.shape), scale, zero_point, bits, symmetric)

def _affine_result(q, scale, zero_point, bits, symmetric):
    """AffineCodes of codes 0..qmax in floats. A symmetric grid's zero point is the middle code for
    all, so it is taken off the codes and not stored."""
    if symmetric:
        return AffineCodes((q - 2 ** (bits - 1)).to(torch.int8), scale, None)
    return AffineCodes(q.to(torch.uint8), scale, zero_point)

ERROR_POWER = 2.4            # of the range search; GPTQ's. Above 2, large errors count for more
SHRINKS = [1 - k / 100 for k in range(80)]             # of the range: 1, 0.99 ... 0.21

def affine_grid(x, bits, symmetric=False, mse=False):
    """Scale and zero point of the codes 0..2^bits-1 over the last dimension: (..., g) -> (...).

    The scale is rounded to what a packed file keeps (`half_if_held`) before any code is chosen: so
    the codes, and all that GPTQ or training does next, belong to the file's own scale.
    """
    qmax = 2**bits - 1

    # The range of the values, widened to hold 0, as 0 has to be a code.
    low = x.amin(-1, keepdim=True).clamp(max=0)                        # (..., 1)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high

    # If the range is zero, or one step of it no normal float32, any scale serves: w_hat is 0.
    empty = high - low < qmax * torch.finfo(torch.float32).tiny
    low = torch.where(empty, -1.0, low)
    high = torch.where(empty, 1.0, high)

    def grid(shrink):
        scale = (high - low) * shrink / qmax
        if symmetric:
            return scale, torch.full_like(scale, 2 ** (bits - 1))
        return scale, (-low * shrink / scale).round()  # for every shrink the same code

    def error(scale, zero_point):
        w_hat = (affine_codes(x, scale, zero_point, bits) - zero_point) * scale
        return (w_hat - x).abs().pow(ERROR_POWER).sum(-1, keepdim=True)

    scale, zero_point = grid(shrink=1)
    if mse:
        # A smaller range clips the few largest values, and rounds all others finer.
        best = error(scale, zero_point)
        for shrink in SHRINKS[1:]:
            new_scale, new_zero_point = grid(shrink)
            new = error(new_scale, new_zero_point)
            better = new < best
            best = torch.where(better, new, best)
            scale = torch.where(better, new_scale, scale)
            zero_point = torch.where(better, new_zero_point, zero_point)
    scale = half_if_held(scale, scale).to(x.dtype)
    return scale.squeeze(-1), zero_point.squeeze(-1)

def affine_codes(x, scale, zero_point, bits):
    """Codes 0..2^bits-1 of x, in x's dtype; scale and zero_point broadcast against x."""
    return ((x / scale).round() + zero_point).clamp(0, 2**bits - 1)

def dequantize(q, scale, zero_point=None, group_size=-1):
    """(q - zero_point) * scale: integers (O, C), scale and zero_point (O, G) -> floats (O, C)."""
    q = _grouped(q, group_size).to(scale.dtype)                        # (O, G, g)
    if zero_point is not None:
        q = q - zero_point.to(scale.dtype).unsqueeze(-1)
    return (q * scale.unsqueeze(-1)).flatten(1)

def group_width(C, group_size):
    """How many of C inputs share a scale; -1: all of them. None where that does not divide C."""
    g = C if group_size == -1 else group_size
    return g if g >= 1 and C % g == 0 else None

def _grouped(w, group_size):
    """(O, C) -> (O, G, g). Raises ValueError where g does not divide C."""
    O, C = w.shape
    g = group_width(C, group_size)
    if g is None:
        raise ValueError(f"--group-size {group_size} does not divide {C} input channels; "
                         f"try {math.gcd(C, 128)} or -1 (one scale per row)")
    return w.reshape(O, -1, g)

# Activations have a grid of their own for each token, made when the token comes.

def fake_quant_tokens(x, bits, symmetric=True):
    """x (..., C) on each token's grid, back as floats; the gradient goes straight through.

    symmetric: scale = max|x| / qmax with qmax = 2^(bits-1) - 1, so that nothing is clipped. Else:
    2^bits codes over the token's range, widened to hold 0, and an integer zero point, so that 0
    stays 0. At 16 bits x comes back as it is.
    """
    if bits == 16:
        return x
    h = x.detach().float()
    if symmetric:
        qmax = 2 ** (bits - 1) - 1
        scale = (h.abs().amax(-1, keepdim=True) / qmax).clamp(min=EPS)  # (..., 1)
        h = (h / scale).round() * scale
    else:
        low = h.amin(-1, keepdim=True).clamp(max=0)
        high = h.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=EPS)          # (..., 1)
        zero_point = (-low / scale).round()
        h = (affine_codes(h, scale, zero_point, bits) - zero_point) * scale

    # The value of h and the gradient of x: straight-through.
    return h.to(x.dtype) + (x - x.detach())

# ---- GPTQ (2210.17323) ----------------------------------------------------------------------
# It rounds a weight's columns from left to right, and after each moves the columns
# still to come so that they make up for its error on the calibration inputs as well as they can.
# What a row loses, E|(w_hat - w) x|^2 = (w_hat - w) H (w_hat - w)^T with H = E[x x^T], then damped,
# is quadratic in the columns still to come, so the best move is known (optimal brain surgery).
# Take the upper U of U^T U = H^-1. The inverse of H[i:, i:] is U[i:, i:]^T U[i:, i:], so that one U
# serves all steps: row i of U over U_ii is how far the columns from i on move for a move of column
# i by 1. An error of e = (w_i - w_hat_i) / U_ii moves the columns j > i by -e U_ij, and adds e^2 to
# the loss.

LAZY_BLOCK = 128  # columns that are finished before the columns to their right are touched

@contextlib.contextmanager
def full_float32():
    """Matrix products of float32 without TF32 inside the block, or inside a decorated function."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

@full_float32()
@torch.no_grad()
def gptq(w, hessian, bits, group_size=-1, symmetric=False, mse=True, act_order=False,
         percdamp=0.01):
    """w (O, C), hessian (C, C) = E[x x^T] over the inputs -> AffineCodes.

    Groups take their grid from the weights as they stand when their turn comes. act_order: the
    columns with the largest H_ii first. That scatters a group's columns over the order, so all
    grids are made first, of the original weights. percdamp: this share of the mean of H's diagonal
    is added to its diagonal. Raises torch.linalg.LinAlgError where H is not positive definite even
    so.
    """
    w = w if w.dtype == torch.float64 else w.float()
    C = w.size(1)

    # An input that was always zero tells nothing of its column, and the column becomes zero.
    dead = hessian.diagonal() == 0                                     # (C,)
    alive = w.masked_fill(dead, 0)

    # The grids. Those of whole rows, and with act_order those of groups too, are made once, before
    # anything is rounded. As in GPTQ's code the grid of a row still sees the dead columns' weights;
    # that of a group does not, so that they do not widen its range.
    groups = _grouped(w if group_size == -1 else alive, group_size)    # (O, G, g)
    g = groups.size(-1)
    grids_first = act_order or group_size == -1
    if grids_first:
        scale, zero_point = affine_grid(groups, bits, symmetric, mse)  # (O, G)
    else:
        scale = w.new_empty(groups.shape[:2])
        zero_point = w.new_empty(groups.shape[:2])

    # From here on, columns stand in the order in which they are rounded.
    order = torch.arange(C, device=w.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    w = alive[:, order]                                # a copy: it is written into below
    q = torch.empty_like(w)
    h = (hessian + torch.diag(dead.to(hessian))).to(w)     # a dead input gets a diagonal of 1
    u = inverse_factor(h[order][:, order], percdamp)                   # (C, C)

    # A lazy block must not cross the border of a group whose grid is not made yet.
    step = LAZY_BLOCK
    if not grids_first:
        step = max(n for n in range(1, LAZY_BLOCK + 1) if g % n == 0)
    round_columns = _gptq_columns
    if w.is_cuda and w.dtype == torch.float32 and find_kernels():
        round_columns = find_kernels().gptq_columns    # the same arithmetic, in one kernel

    for a in range(0, C, step):
        b = min(a + step, C)
        if not grids_first and a % g == 0:             # w holds every update of columns < a
            grid = affine_grid(w[:, a:a + g], bits, symmetric, mse)
            scale[:, a // g], zero_point[:, a // g] = grid

        # Round the block's columns; then their errors move all columns to the right at once.
        group = order[a:b] // g                                        # (b - a,)
        q[:, a:b], e = round_columns(w[:, a:b], u[a:b, a:b], scale[:, group],
                                     zero_point[:, group], bits)
        w[:, b:] -= e @ u[a:b, b:]

    q = q[:, order.argsort()]                          # back to the weight's own order
    return _affine_result(q, scale, zero_point, bits, symmetric)

def inverse_factor(hessian, percdamp=0.01):
    """The upper U (C, C) with U^T U = (H + percdamp * mean(diag H) I)^-1, by GPTQ's own steps."""
    damping = percdamp * hessian.diagonal().mean().expand(len(hessian))
    lower = torch.linalg.cholesky(hessian + torch.diag(damping))
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)

def _gptq_columns(w, u, scale, zero_point, bits):
    """The columns of one lazy block: w, scale, zero_point (O, n), u (n, n) -> codes, errors e."""
    w = w.clone()
    q = torch.empty_like(w)
    error = torch.empty_like(w)
    for i in range(w.size(1)):
        s, z = scale[:, i], zero_point[:, i]                           # (O,)
        q[:, i] = affine_codes(w[:, i], s, z, bits)
        w_hat = (q[:, i] - z) * s
        error[:, i] = (w[:, i] - w_hat) / u[i, i]
        w[:, i:] -= error[:, i:i + 1] * u[i, i:]       # column i itself becomes w_hat
    return q, error

def output_error(w, w_hat, hessian):
    """E|(w_hat - w) x|^2 / E|w x|^2, given E[x x^T] in any unit; 0 where there was no output."""
    def size(v):
        return ((v @ hessian) * v).sum().item()

    lost = size(w_hat - w)
    whole = size(w)
    return lost / whole if whole else 0.0

# The inputs that GPTQ and the fit of codebooks ask for: E[x x^T] of every linear, block by block.

class InputStatistics(NamedTuple):
    """Of the inputs x (C,) of one linear, over all calibration tokens."""
    hessian: torch.Tensor        # (C, C): E[x x^T]
    peak: torch.Tensor           # (C,): max |x|, which SmoothQuant in normtweak.py asks for

class Seen(Exception):
    """Ends a block's forward pass early: every linear that was asked for has had its input."""

@full_float32()
@torch.no_grad()
def collect_hessians(block, names, windows, tables, a_bits=16):
    """{name: InputStatistics} of the named linears of a block.

    windows: batches (B, T, C) of the block's inputs; tables: the rotary cos and sin that a block
    takes besides. Sums are float32 without TF32, or float64. a_bits: quantize the linears' inputs
    to so many bits first, as the linears will.
    """
    found = {}
    tokens = dict.fromkeys(names, 0)
    missing = set()

    def see(name, linear, inputs):
        """A forward pre-hook, which gets the linear's inputs: a tuple of one tensor."""
        x = inputs[0].flatten(0, -2)                                   # (n, C)
        if x.dtype != torch.float64:
            x = x.float()
        x = fake_quant_tokens(x, a_bits)
        if name not in found:
            C = x.size(1)
            found[name] = InputStatistics(x.new_zeros(C, C), x.new_zeros(C))
        hessian, peak = found[name]

        # A running mean: what was seen before counts by its share of all tokens so far.
        before = tokens[name]
        tokens[name] += len(x)
        hessian.mul_(before / tokens[name]).addmm_(x.t(), x, alpha=1 / tokens[name])
        peak = torch.maximum(x.abs().amax(0), peak)
        found[name] = InputStatistics(hessian, peak)

        missing.discard(name)
        if not missing:
            raise Seen

    hooks = []
    for name in names:
        hook = functools.partial(see, name)
        hooks.append(block.get_submodule(name).register_forward_pre_hook(hook))
    for x in windows:
        missing.update(names)
        with contextlib.suppress(Seen):
            block(x, *tables)
    for hook in hooks:
        hook.remove()
    return found

@torch.no_grad()
def block_hessians(model, idx, together=1):
    """Yield, for each next `together` blocks, [(name, linear, E[x x^T] (C, C))] of their linears,
    for ids (N, T).

    Replace these linears before asking for the next: the next blocks' inputs are the outputs of
    the blocks as they then are. Within one yield they are those of the blocks as they were. A block
    runs twice on every window, and three times where another follows in its yield.

    model: a LLaMA of model.py, whose linears are the modules of a block with a name like wq or
    w_up.
    """
    tables = model.rope(idx)
    windows = model.embed(idx).to(model.dtype).split(16)               # (B, T, C) each
    for first in range(0, len(model.blocks), together):
        blocks = model.blocks[first:first + together]
        passed = windows
        result = []
        for i, block in enumerate(blocks, first):
            linears = {name: m for name, m in block.named_modules()
                       if name.rsplit(".", 1)[-1].startswith("w")}
            found = collect_hessians(block, list(linears), passed, tables)
            result += [(f"blocks.{i}.{name}", linear, found[name].hessian)
                       for name, linear in linears.items()]
            if i + 1 < first + len(blocks):
                passed = [block(x, *tables) for x in passed]
        yield result

        # The caller has quantized the linears: now their blocks' outputs, if there is a next.
        if first + together < len(model.blocks):
            for block in blocks:
                windows = [block(x, *tables) for x in windows]

# ---- Vector quantization: additive codebooks (AQLM) -----------------------------------------
# g neighbouring inputs of a row share M codes, one into each of M codebooks of K = 2^B vectors:
# W[i, jg:jg+g] = scales_i * sum_m codebooks[m, codes[i, j, m]]. J = C / g groups per row.
# pvtune.py fits and fine-tunes such codes, of L linears of one shape at once: what it calls takes
# stacks, with L in front of every shape.

SCORES = 2**24               # distances that exist at a time: 64 MB in float32

def vq_sum(codes, codebooks):
    """codes (L, n, M), codebooks (L, M, K, g) -> sums of codewords (L, n, g), differentiable."""
    total = 0
    for m in range(codes.size(2)):
        total = total + look_up(codebooks[:, m], codes[..., m])
    return total

def vq_dequantize(codes, codebooks, scales):
    """codes (O, J, M), codebooks (M, K, g), scales (O,) -> floats (O, C), differentiable; also for
    a stack of L linears of one shape, arguments and result with L in front."""
    if codes.dim() == 3:
        return vq_dequantize(codes[None], codebooks[None], scales[None])[0]
    groups = vq_sum(codes.flatten(1, 2), codebooks)                    # (L, O J, g)
    return groups.view(*scales.shape, -1) * scales.unsqueeze(2)        # (L, O, C)

def kmeans(x, k, iterations=100, generator=None):
    """Lloyd's algorithm from k random points: x (n, g) -> centroids (k, g), the nearest (n,).

    Also for L sets of points at once, arguments and result with L in front. All start from the
    points of the same k indices, and each ends where it would end alone. A cluster without points
    keeps its centroid. generator: of the CPU, as everywhere here.
    """
    if x.dim() == 2:
        centroids, owner = kmeans(x[None], k, iterations, generator)
        return centroids[0], owner[0]
    L, n, g = x.shape
    if k > n:
        raise ValueError(f"{k} centroids need as many points; there are {n}")

    def nearest(centroids):
        """The nearest centroid of every point (L, n). |x|^2 is the same for all, and left out."""
        squares = centroids.square().sum(2).unsqueeze(1)               # (L, 1, k)
        owners = []
        for part in x.split(max(1, SCORES // (L * k)), 1):
            distance = torch.baddbmm(squares, part, centroids.mT, alpha=-2)
            owners.append(distance.min(2).indices)
        return torch.cat(owners, 1)

    start = torch.randperm(n, generator=generator)[:k]
    centroids = x[:, start.to(x.device)]
    counted = torch.cat((x, x.new_ones(L, n, 1)), 2)   # the sums of the ones are counts
    moves = torch.ones(L, 1, 1, dtype=torch.bool, device=x.device)
    for i in range(iterations):
        # Every point goes to the nearest centroid, and every centroid to the mean of its points.
        total = sum_by_code(nearest(centroids), counted, k)            # (L, k, g + 1)
        count = total[..., g:]
        before = centroids
        mean = total[..., :g] / count.clamp(min=1)
        centroids = torch.where(moves & (count > 0), mean, before)

        # Asking whether they still move waits for a GPU, so it is asked now and then only. A set
        # whose centroids stand still is finished.
        if i % 10 == 9:
            stand = torch.isclose(centroids, before, rtol=1e-6, atol=1e-8)
            moves = moves & ~stand.all(2, keepdim=True).all(1, keepdim=True)
            if not moves.any():
                break
    return centroids, nearest(centroids)

@full_float32()
def vq_search(x, codes, codebooks, beam=1, generator=None, keep=1):
    """The best `keep` codes (L, n, keep, M) near x (L, n, g) that a search from codes (L, n, M)
    finds, each of the L in its own codebooks (L, M, K, g).

    A beam search: it visits the codebooks once, in random order, and replaces that codebook's part
    of every hypothesis. The error never grows, as the old code is always among those tried. With
    one codebook it tries everything, and with two and beam >= K too, as then no first choice is
    dropped. All groups, in parts that bound the memory. keep = 2 also gives the runner-up, which
    stochastic rounding asks for (at most as many as the last step tries).
    """
    L, M, K, g = codebooks.shape
    order = torch.randperm(M, generator=generator).tolist()
    size = max(1, SCORES // (L * beam * K))            # groups at a time
    parts = zip(x.split(size, 1), codes.long().split(size, 1))
    found = [_search_part(x_part, codes_part, codebooks, order, beam, keep)
             for x_part, codes_part in parts]
    return torch.cat(found, 1)

def _search_part(x, codes, codebooks, order, beam, keep):
    """vq_search for few groups. A hypothesis is one choice of all M codes; there are b of them."""
    L, M, K, g = codebooks.shape
    n = x.size(1)
    q = codes.unsqueeze(2)                                             # (L, n, b, M)
    rest = (x - vq_sum(codes, codebooks)).unsqueeze(2)                 # (L, n, b, g)

    for m in order:
        # What is left of x once this codebook's part is taken out, for each hypothesis.
        codebook = codebooks[:, m]                                     # (L, K, g)
        b = q.size(2)
        old = look_up(codebook, q[..., m].flatten(1)).view(L, n, b, g)
        rest = rest + old

        # |rest - c|^2 of every codeword c. |rest|^2 only matters between hypotheses.
        score = torch.baddbmm(codebook.square().sum(2).unsqueeze(1), rest.flatten(1, 2),
                              codebook.mT, alpha=-2).view(L, n, b, K)
        if b > 1:
            score = score + rest.square().sum(-1, keepdim=True)

        # The best pairs of a hypothesis and a codeword are the next hypotheses.
        count = keep if m == order[-1] else beam
        index = _lowest(score.flatten(2), count)                       # (L, n, b')
        parent = (index // K).unsqueeze(-1)
        q = q.gather(2, parent.expand(-1, -1, -1, M))
        q[..., m] = index % K
        new = look_up(codebook, q[..., m].flatten(1)).view(L, n, -1, g)
        rest = rest.gather(2, parent.expand(-1, -1, -1, g)) - new
    return q

def _lowest(score, n):
    """Indices of the n lowest along the last dimension, the lowest first; fast where n is 1."""
    if n == 1:
        return score.min(-1, keepdim=True).indices
    return score.topk(min(n, score.size(-1)), largest=False).indices

def vq_search_xtx(w, hessian, codes, codebooks, scales, beam=1, generator=None):
    """One pass of AQLM's search over all codes, which lowers each row's loss e H e^T, where
    e = w_hat - w is the row's error and H = E[x x^T] (AQLM's X^T X).

    Groups and codebooks in random order, all rows at once -> codes (O, J, M), loss (O,), which
    never grows. Also for a stack of L linears of one shape, arguments and results with L in front;
    the orders are then the same for all.

    A change of one group by d changes the loss by 2 d (e H) + d H_gg d, with the group's parts of
    e H and of H. Here d is new - old, two codewords times the row's scale. With `here` for the
    group's part of e H, which is half of the loss's gradient:
        old H_gg old - 2 here old               the same for all codewords
      + 2 (here - old H_gg) new + new H_gg new
    """
    if w.dim() == 2:
        stack = (w[None], hessian[None], codes[None], codebooks[None], scales[None])
        codes, loss = vq_search_xtx(*stack, beam, generator)
        return codes[0], loss[0]
    L, M, K, g = codebooks.shape
    O, J = codes.shape[1:3]
    s = scales.view(L, O, 1, 1)
    q = codes.unsqueeze(2).clone()                                     # (L, O, b, J, M)
    error = vq_dequantize(codes, codebooks, scales) - w                # (L, O, C)
    slope = (error @ hessian).unsqueeze(2)                             # (L, O, b, C)
    loss = (slope[:, :, 0] * error).sum(-1, keepdim=True)              # (L, O, b)

    def scaled(m, code):
        """The codewords (L, O, b, g) of codebook m, times the scales of their rows."""
        return s * look_up(codebooks[:, m], code.flatten(1)).view(L, O, -1, g)

    for j in torch.randperm(J, generator=generator).tolist():
        part = slice(j * g, j * g + g)
        rows = hessian[:, part]                                        # (L, g, C)
        h = rows[..., part]                                            # H_gg (L, g, g)
        for m in torch.randperm(M, generator=generator).tolist():
            # The loss (L, O, b, K) of every hypothesis with every codeword in this place.
            codebook = codebooks[:, m]                                 # (L, K, g)
            old = scaled(m, q[..., j, m])                              # (L, O, b, g)
            here = slope[..., part]                                    # (L, O, b, g)
            old_h = (old.flatten(1, 2) @ h).view(old.shape)
            fixed = ((old_h - 2 * here) * old).sum(-1) + loss          # (L, O, b)
            cross = (2 * s * (here - old_h)).flatten(1, 2) @ codebook.mT
            square = ((codebook @ h) * codebook).sum(2)                # (L, K)
            total = cross.view(L, O, -1, K) + s**2 * square.view(L, 1, 1, K)
            total = (total + fixed.unsqueeze(-1)).flatten(2)           # (L, O, b K)

            # The best pairs of a hypothesis and a codeword are the next hypotheses. With a beam
            # of 1 the only hypothesis is the parent, and there is nothing to gather.
            index = _lowest(total, beam)                               # (L, O, b')
            loss = total.gather(2, index)
            if beam > 1:
                parent = (index // K).unsqueeze(-1)                    # (L, O, b', 1)
                q = q.gather(2, parent.unsqueeze(-1).expand(-1, -1, -1, J, M))
                old = old.gather(2, parent.expand(-1, -1, -1, g))
                slope = slope.gather(2, parent.expand(-1, -1, -1, slope.size(3)))
            code = index % K
            q[..., j, m] = code
            moved = scaled(m, code) - old                              # (L, O, b', g)
            slope.flatten(1, 2).baddbmm_(moved.flatten(1, 2), rows)    # in place: slope is large
    return q[:, :, 0], loss[..., 0]                    # the best hypothesis comes first

@full_float32()
def vq_fit(w, hessian, num_codebooks, bits, group_size, rounds=4, steps=19, generator=None):
    """w (O, C), hessian (C, C) = E[x x^T] -> codes (O, J, M), codebooks (M, K, g), scales (O,).

    Residual k-means on the rows over their norms; then at most `rounds` rounds of `steps` Adam
    steps on codebooks and scales and a pass of vq_search_xtx, until a round lowers the loss by less
    than 1 %. Adam's betas are AQLM's. 4 rounds of 19 steps are what fits into the time of a quick
    run; AQLM takes up to 100 rounds of 100 steps, at a rate of 1e-4.

    Also for a stack of L linears of one shape, arguments and results with L in front. Each gets
    what it would get alone with a generator in the same state; all together take far less time on
    a GPU, which would otherwise wait for many small operations.
    """
    if w.dim() == 2:
        fitted = vq_fit(w[None], hessian[None], num_codebooks, bits, group_size, rounds, steps,
                        generator)
        return tuple(x[0] for x in fitted)

    # The start. Rows get length 1, so that the codewords serve all; each codebook is made for what
    # those before it left.
    w = w.detach().float()
    L, O, C = w.shape
    scales = torch.linalg.vector_norm(w, dim=2) + 1e-9                 # (L, O), of whole rows
    rest = (w / scales.unsqueeze(2)).view(L, -1, group_size)           # (L, O J, g)
    centroids = []
    owners = []
    for _ in range(num_codebooks):
        c, owner = kmeans(rest, 2**bits, generator=generator)
        rest = rest - look_up(c, owner)
        centroids.append(c)
        owners.append(owner)
    codebooks = torch.stack(centroids, 1)                              # (L, M, K, g)
    codes = torch.stack(owners, 2).view(L, O, -1, num_codebooks)       # (L, O, J, M)

    # The unit of H changes no minimum. Inputs that were all zero ask for nothing: H stays zero.
    size = hessian.diagonal(dim1=1, dim2=2).mean(1).view(L, 1, 1)
    h = hessian.to(w) / torch.where(size > 0, size, 1.0)

    # What is learned is a change of each tensor, in units of its root mean square: an Adam step is
    # about as long as its rate, 1 % of that.
    def unit(x):
        return x.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (x.dim() - 1))

    change = [torch.zeros_like(codebooks, requires_grad=True),
              torch.zeros_like(scales, requires_grad=True)]
    units = unit(codebooks), unit(scales)
    start = codebooks, scales
    adam = torch.optim.Adam(change, lr=0.01, betas=(0.0, 0.95), amsgrad=True)

    def values():
        """Codebooks and scales with their changes so far."""
        return [x + u * c for x, u, c in zip(start, units, change)]

    last_loss = w.new_full((L,), math.inf)
    goes_on = torch.ones_like(last_loss, dtype=torch.bool)
    for _ in range(rounds):
        for _ in range(steps):
            # Half of the gradient of <(w_hat - w) H, w_hat - w> by w_hat is (w_hat - w) H. Written
            # out, it costs one product with H; autograd would take two. Adam's step does not depend
            # on the factor.
            w_hat = vq_dequantize(codes, *values())
            slope = (w_hat.detach() - w) @ h
            adam.zero_grad()
            w_hat.backward(slope)
            adam.step()

        # A search comes last: codes that were best for the codebooks before Adam moved them are
        # not the best for those that it leaves.
        with torch.no_grad():
            new_codebooks, new_scales = values()
            new_codes, losses = vq_search_xtx(w, h, codes, new_codebooks, new_scales,
                                              generator=generator)

        # Those that had ended keep what they had. The others end with this round where it won
        # less than 1 %, and keep its result even so.
        codes = torch.where(goes_on.view(L, 1, 1, 1), new_codes, codes)
        codebooks = torch.where(goes_on.view(L, 1, 1, 1), new_codebooks, codebooks)
        scales = torch.where(goes_on.view(L, 1), new_scales, scales)
        loss = losses.sum(1)                                           # (L,)
        goes_on = goes_on & ~(loss > 0.99 * last_loss)
        last_loss = loss
        if not goes_on.any():
            break
    return codes, codebooks, scales

# ---- Packing: bits only, lossless -----------------------------------------------------------

def pack(q, bits):
    """Codes (O, n) -> uint8 (O, ceil(n * bits / 8)), the first code in the lowest bits.

    1 to 16 bits. Signed codes keep their low bits (two's complement). At 1.58 bits, five of the
    codes -1, 0, 1 share a byte in base 3: 1.6 bits each.
    """
    q = q.to(torch.int32)
    O, n = q.shape
    if bits == 1.58:
        digits = F.pad(q + 1, (0, -n % 5)).view(O, -1, 5)              # 0, 1, 2
        return (digits * _powers(3, 5, q.device)).sum(-1).to(torch.uint8)

    if bits <= 8:
        # Eight codes fill `bits` bytes: the lowest ones of an integer of 64 bits.
        q = F.pad(q.long() & (2**bits - 1), (0, -n % 8)).view(O, -1, 8)
        words = (q << bits * torch.arange(8, device=q.device)).sum(-1, keepdim=True)
        stream = words.view(torch.uint8)[..., :bits].flatten(1)[:, :-(-n * bits // 8)]
        return stream.clone(memory_format=torch.contiguous_format)     # also the strides of one row

    # All bits of a row in one stream, padded with zeros to whole bytes.
    places = torch.arange(bits, device=q.device)
    stream = ((q.unsqueeze(-1) >> places) & 1).flatten(1)              # (O, n * bits)
    stream = F.pad(stream, (0, -n * bits % 8)).view(O, -1, 8)
    return (stream * _powers(2, 8, q.device)).sum(-1).to(torch.uint8)

def unpack(packed, bits, n, signed=False):
    """The exact inverse of pack: uint8 (O, bytes) -> (O, n) uint8; int8 if signed or 1.58 bits;
    int32 above 8 bits."""
    device = packed.device
    if bits == 1.58:
        digits = packed.to(torch.int32).unsqueeze(-1) // _powers(3, 5, device) % 3
        return (digits.flatten(1)[:, :n] - 1).to(torch.int8)

    if 8 % bits == 0:
        # Every byte holds whole codes.
        shifts = torch.arange(0, 8, bits, device=device, dtype=torch.uint8)
        q = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)[:, :n]
    else:
        # Codes cross the borders of bytes: all bits in one stream, then cut anew.
        stream = (packed.unsqueeze(-1) >> torch.arange(8, device=device)) & 1
        stream = stream.flatten(1)[:, :n * bits].reshape(-1, n, bits)
        q = (stream * _powers(2, bits, device)).sum(-1, dtype=torch.int32)
    if bits <= 8:
        q = q.to(torch.uint8)
    if not signed:
        return q

    # Two's complement: (q ^ half) - half extends the sign.
    half = 2 ** (bits - 1)
    q = (q.int() ^ half) - half
    return q.to(torch.int8) if bits <= 8 else q

def _powers(base, n, device):
    return torch.tensor([base**i for i in range(n)], dtype=torch.int32, device=device)

def half_if_held(t, size):
    """t as float16, or as float32 where float16 would change an element by more than 2^-10 of
    `size` (which broadcasts against t). float16 overflows above 65504, is coarse below 6e-5, and
    is 0 below 3e-8."""
    half = t.half()
    held = (half.float() - t).abs() <= 2**-10 * size.abs()
    return half if held.all() else t.float()

# ---- The packed linears ----------------------------------------------------------------------

class QuantLinear(nn.Module):
    """y = x w_hat^T from packed codes: (..., C) -> (..., O). For inference; nothing to train.

    The base of three forms: PackedAffine, PackedQuest and PackedVQ. What a checkpoint keeps of one
    is its `spec`, plain values, and its tensors. On a GPU a form asks kernels.py for the product;
    elsewhere, and where there is no kernel for its shape, it computes it in plain PyTorch.

    spec: kind "affine", "quest" or "vq", bits, a_bits (of the inputs; 16: not quantized),
    in_features, signed (two's complement codes); what else a form needs stands at the form.
    tensors: packed uint8 (O, bytes), and those that the form names in `tensor_names`.
    """
    tensor_names = ()                                  # of all that a form may hold

    def __init__(self, spec, tensors):
        super().__init__()
        self.spec = dict(spec)
        self.bits = spec["bits"]
        self.a_bits = spec["a_bits"]
        self.in_features = spec["in_features"]
        for name in ("packed", *self.tensor_names):
            self.register_buffer(name, tensors.get(name))
        self.fast = None       # for kernels.linear: the weight in the order that its kernels read

    @staticmethod
    def of(spec, tensors):
        """The form that a checkpoint's spec names, with its tensors."""
        forms = {"affine": PackedAffine, "quest": PackedQuest, "vq": PackedVQ}
        return forms[spec["kind"]](spec, tensors)

    @staticmethod
    def affine(q, scale, zero_point, bits, group_size=-1, a_bits=16):
        """From what `rtn` or `gptq` returns."""
        return PackedAffine.from_codes(q, scale, zero_point, bits, group_size, a_bits)

    @staticmethod
    def quest(w, bits, a_bits, grid="uniform", rotated=True, w_scale=None, a_scale=None):
        """QuEST codes of the weight w (O, C); the scales follow from the rows unless given."""
        return PackedQuest.from_weight(w, bits, a_bits, grid, rotated, w_scale, a_scale)

    @staticmethod
    def quest_from_codes(q, scale, keep, bits, a_bits, grid="uniform", rotated=True):
        """The same from codes q (O, C) and scales (O, 1) that `quest_codes` or a kernel returned;
        keep: bool (O, C), which of them stay on the grid "sparse", else None."""
        return PackedQuest.from_codes(q, scale, keep, bits, a_bits, grid, rotated)

    @staticmethod
    def vq(codes, codebooks, scales):
        """From what `vq_fit` returns; codebooks and scales become float16 where that holds them."""
        return PackedVQ.from_codes(codes, codebooks, scales)

    def rows(self):
        """The tensors by name, as `of` takes them; where it can be, with a row for each output."""
        return dict(self.named_buffers())

    def by_kernel(self, x):
        """The product for x (..., C) by kernels.py -> (..., O); None: compute it in PyTorch."""
        half = x.dtype in (torch.float16, torch.bfloat16)
        usable = x.is_cuda and half and x.numel() > 0 and not x.requires_grad
        if not usable or find_kernels() is None:
            return None
        return find_kernels().linear(self, x)

class PackedAffine(QuantLinear):
    """w_hat = (q - zero_point) * scale, as `rtn` and `gptq` give it.

    spec: group_size (-1: one scale per row). scale float16 (O, G), float32 where float16 cannot
    hold it. zeros, where asymmetric: uint8 (G, bytes), of each group the zero points of the O rows,
    `bits` bits each. a_bits below 16: inputs on a symmetric grid of their own for each token.
    """
    tensor_names = ("scale", "zeros")

    def __init__(self, spec, tensors):
        # Older checkpoints keep a byte for each zero point: uint8 (O, G).
        old = tensors.get("zero_point")
        if old is not None:
            tensors = {**tensors, "zeros": pack(old.t(), spec["bits"])}
        super().__init__(spec, tensors)

    @classmethod
    def from_codes(cls, q, scale, zero_point, bits, group_size, a_bits):
        spec = dict(kind="affine", bits=bits, a_bits=a_bits, in_features=q.size(1),
                    group_size=group_size, signed=zero_point is None)
        tensors = dict(packed=pack(q, bits), scale=half_if_held(scale, scale))
        if zero_point is not None:
            largest = zero_point.max().item()          # a number: a byte cannot hold 2^8
            if largest >= 2**bits:
                raise ValueError(f"the zero point {largest:g} is no code of {bits} bits")
            tensors["zeros"] = pack(zero_point.t(), bits)
        return cls(spec, tensors)

    @property
    def zero_point(self):
        """The zero points, uint8 (O, G); None where the grid is symmetric."""
        if self.zeros is None:
            return None
        return unpack(self.zeros, self.bits, len(self.packed)).t().contiguous()

    def rows(self):
        rows = super().rows()
        if rows.pop("zeros", None) is not None:
            rows["zero_point"] = self.zero_point
        return rows

    def codes(self):
        """The integers (O, C)."""
        return unpack(self.packed, self.bits, self.in_features, self.spec["signed"])

    def weight(self):
        """The weight that the codes stand for, float32 (O, C)."""
        scale = self.scale.float()
        return dequantize(self.codes(), scale, self.zero_point, self.spec["group_size"])

    def forward(self, x):
        if self.a_bits < 16:
            x = fake_quant_tokens(x, self.a_bits)
        y = self.by_kernel(x)
        if y is None:
            y = F.linear(x, self.weight().to(x.dtype))
        return y

class PackedHead(PackedAffine):
    """A model's head. It is not one of the linears whose bits per weight are reported."""

    @classmethod
    def from_weight(cls, w, bits):
        """w (V, C) rounded to nearest: symmetric, one scale per row."""
        # In parts, as the range search keeps several copies of what it is given.
        parts = [rtn(rows.detach().float(), bits, symmetric=True) for rows in w.split(4096)]
        q = torch.cat([part.q for part in parts])
        scale = torch.cat([part.scale for part in parts])
        return cls.from_codes(q, scale, None, bits, group_size=-1, a_bits=16)

class PackedEmbedding(nn.Module):
    """The rows of a packed matrix (V, C), such as a PackedHead's, by their ids (...) -> float32
    (..., C). It shares the matrix's tensors. No more than the rows asked for are unpacked."""

    def __init__(self, matrix):
        super().__init__()
        self.bits = matrix.bits
        self.n_embd = matrix.in_features
        self.register_buffer("packed", matrix.packed)
        self.register_buffer("scale", matrix.scale)

    def forward(self, idx):
        flat = idx.flatten()
        q = unpack(self.packed[flat], self.bits, self.n_embd, signed=True)         # (n, C)
        return (q * self.scale[flat].float()).view(*idx.shape, self.n_embd)

    def weight(self):
        """All rows, float32 (V, C)."""
        return self(torch.arange(len(self.packed), device=self.packed.device))

class PackedQuest(QuantLinear):
    """w_hat = levels * scale of the rotated weight, levels = q + 1/2 (ternary and FP4: q), and
    rotated inputs on the same kind of grid.

    The scales stay float32: training multiplies with float32 scales that follow from the weights,
    and the file is to give exactly the loss of training.

    spec: rotate, grid ("uniform", "fp4" or "sparse"). scale float32 (O, 1) or (1, 1); keep (sparse:
    one bit per pair of inputs); a_scale (a fixed scale of the inputs, instead of one per token).
    """
    tensor_names = ("scale", "keep", "a_scale")

    @classmethod
    def from_weight(cls, w, bits, a_bits, grid, rotated, w_scale, a_scale):
        with full_float32():                           # where rotate takes the plain product
            h = rotate(w) if rotated else w
        q, scale, _ = quest_codes(h, bits, grid, w_scale)
        keep = keep_two_of_four(h) if grid == "sparse" else None
        return cls.from_codes(q, scale, keep, bits, a_bits, grid, rotated, a_scale)

    @classmethod
    def from_codes(cls, q, scale, keep, bits, a_bits, grid, rotated, a_scale=None):
        """keep: bool (O, C), which codes stay; for the grid "sparse" alone."""
        tensors = dict(scale=scale.view(-1, 1), a_scale=a_scale)
        O, C = q.shape
        if grid == "fp4":
            q = fp4_indices(q)
        if grid == "sparse":
            # Half of the codes, the same number in each row, and one bit per pair of inputs that
            # says which they are.
            q = q[keep].view(O, -1)
            tensors["keep"] = pack(keep[:, ::2], 1)
        spec = dict(kind="quest", bits=bits, in_features=C, a_bits=a_bits, grid=grid,
                    signed=grid != "fp4", rotate=rotated)
        return cls(spec, {"packed": pack(q, bits), **tensors})

    def levels(self, dtype):
        """The rotated weight (O, C) in units of its scale."""
        n = self.in_features
        grid = self.spec["grid"]
        stored = n // 2 if grid == "sparse" else n
        q = unpack(self.packed, self.bits, stored, self.spec["signed"])
        if grid == "fp4":
            q = torch.tensor(FP4_CODES, device=q.device)[q.long()]
        levels = q.to(dtype) + code_offset(self.bits, grid)
        if self.keep is None:
            return levels

        # Sparse: the stored levels go where pairs are kept, zeros elsewhere.
        keep = unpack(self.keep, 1, n // 2).bool().repeat_interleave(2, dim=-1)  # (O, C)
        return levels.new_zeros(keep.shape).masked_scatter(keep, levels)

    def weight(self):
        """The weight that the codes stand for, float32 (O, C), rotated back where they were."""
        w = self.levels(torch.float32) * self.scale
        return rotate(w) if self.spec["rotate"] else w

    def forward(self, x):
        y = self.by_kernel(x)                          # which rotates and quantizes x itself
        if y is not None:
            return y

        # The inputs on a grid of the same kind; "sparse" is one of weights only.
        h = rotate(x) if self.spec["rotate"] else x.float()
        h_scale = None
        if self.a_bits < 16:
            grid = "fp4" if self.spec["grid"] == "fp4" else "uniform"
            q, h_scale, _ = quest_codes(h, self.a_bits, grid, self.a_scale)
            h = q + code_offset(self.a_bits, grid)
        return code_linear(h, h_scale, self.levels(x.dtype), self.scale, x.dtype)

class PackedVQ(QuantLinear):
    """w_hat = (a sum of M codewords) * scale, one code into each codebook for g weights.

    codebooks float16 (M, K, g), scale float16 (O,); float32 where float16 cannot hold them.
    """
    tensor_names = ("scale", "codebooks")

    @classmethod
    def from_codes(cls, codes, codebooks, scales):
        bits = (codebooks.size(1) - 1).bit_length()
        spec = dict(kind="vq", bits=bits, a_bits=16, signed=False,
                    in_features=codes.size(1) * codebooks.size(2))
        # A scale serves a whole row, so each has to be held by itself. A codebook's small entries
        # may carry the same absolute error as its largest.
        largest = codebooks.abs().amax((1, 2), keepdim=True)           # (M, 1, 1)
        return cls(spec, dict(packed=pack(codes.flatten(1), bits),
                              scale=half_if_held(scales, scales),
                              codebooks=half_if_held(codebooks, largest)))

    def codes(self):
        """The indices (O, J, M)."""
        M, K, g = self.codebooks.shape
        q = unpack(self.packed, self.bits, self.in_features // g * M)
        return q.view(len(q), -1, M)

    def weight(self):
        """The weight that the codes stand for, float32 (O, C)."""
        return vq_dequantize(self.codes().long(), self.codebooks.float(), self.scale.float())

    def forward(self, x):
        y = self.by_kernel(x)
        if y is None:
            y = F.linear(x, self.weight().to(x.dtype))
        return y

def bits_per_weight(model):
    """(stored bits per weight, number of weights) of the QuantLinear layers; (0, 0) without any.

    Stored are codes, scales, zero points, masks and codebooks. Embedding, head and norms are not
    counted, whether they are packed or not.
    """
    layers = [m for m in model.modules()
              if isinstance(m, QuantLinear) and not isinstance(m, PackedHead)]
    weights = sum(m.packed.size(0) * m.in_features for m in layers)
    stored = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    return (8 * stored / weights if weights else 0.0), weights

# ---- Corners ---------------------------------------------------------------------------------
# Grids of QuEST that only `quest.py --grid` uses. FP4 (E2M1) has the magnitudes 0, 1/2, 1, 3/2, 2,
# 3, 4 and 6. Codes are these doubled, so that they are integers; `scale` is the width of half a
# unit.

# By their 4-bit index, a sign and 3 bits; index 8 would be -0, which no weight gets.
FP4_CODES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
FP4_CLIP = 2.9224750714                                # gaussian_clip(4, "fp4")

def fp4_codes(u):
    """The nearest FP4 code of each u (...). Codes are 1 apart up to 4, 2 up to 8, then 4."""
    size = u.abs()
    gap = torch.where(size < 4, 1.0, torch.where(size < 8, 2.0, 4.0))
    return ((size / gap).round() * gap).clamp(max=12) * u.sign()

def fp4_indices(q):
    """FP4 codes -12..12 -> their 4 bits: a sign, and 3 bits that count the magnitudes up to |q|."""
    magnitudes = torch.tensor(FP4_CODES[1:8], device=q.device)
    return (q.abs().unsqueeze(-1) >= magnitudes).sum(-1) + 8 * (q < 0)

def keep_two_of_four(h):
    """The sparse pattern (QuEST section 4.4): of the 4 pairs in 8 inputs keep the 2 longest.

    h (..., C), 8 divides C -> bool (..., C), half of it True.
    """
    pairs = h.reshape(*h.shape[:-1], -1, 4, 2)
    length = pairs.square().sum(-1)                                    # (..., C/8, 4)
    keep = torch.zeros_like(length, dtype=torch.bool)
    keep.scatter_(-1, length.topk(2, dim=-1).indices, True)
    return keep.repeat_interleave(2, dim=-1).view(h.shape)

# What replaces PyTorch on a GPU.

@functools.cache
def find_kernels():
    """The module kernels, or None where there is no Triton that it can use: PyTorch does the work.
    It is imported late, because kernels.py imports this file."""
    try:
        import kernels
    except ImportError as e:
        if "triton" not in str(e).lower():
            raise
        return None
    return kernels

def look_up(codebook, codes):
    """codebook[codes] for each of L linears: codebook (L, K, g), codes (L, n) -> (L, n, g)."""
    return _LookUp.apply(codes, codebook)

class _LookUp(torch.autograd.Function):
    """look_up with a backward pass of its own, sum_by_code."""

    @staticmethod
    def forward(ctx, codes, codebook):
        L, K, _ = codebook.shape
        rows = codes + K * torch.arange(L, device=codes.device).unsqueeze(1)
        ctx.save_for_backward(codes)
        ctx.K = K
        return F.embedding(rows, codebook.flatten(0, 1))

    @staticmethod
    def backward(ctx, grad):
        codes, = ctx.saved_tensors
        return None, sum_by_code(codes, grad, ctx.K)

def sum_by_code(codes, x, K):
    """For each of L linears the sums of the vectors x (L, n, g) that have the same code: codes
    (L, n) of 0..K-1 -> (L, K, g).

    On a CPU it adds up in a fixed order. On a GPU it is a product with one-hot codes where K <= 64:
    thousands of atomic additions into so few rows would wait for each other. For more it is the
    atomic additions.
    """
    L, n, g = x.shape
    if not x.is_cuda or K > 64:
        rows = codes + K * torch.arange(L, device=codes.device).unsqueeze(1)
        total = x.new_zeros(L * K, g).index_add_(0, rows.flatten(), x.flatten(0, 1))
        return total.view(L, K, g)

    # Each linear's vectors in up to 512 parts, or the sum would run on few cores.
    parts = L * math.gcd(n, 512)
    one_hot = codes.unsqueeze(2) == torch.arange(K, device=codes.device)
    one_hot = one_hot.to(x.dtype).view(parts, -1, K)
    with full_float32():
        total = one_hot.mT @ x.reshape(parts, -1, g)                   # (parts, K, g)
    return total.view(L, -1, K, g).sum(1)
