"""Quantizers: the number grids, the packing and the packed linear layer that all methods share.

  1. A grid turns floats into small integers `q` and a few real numbers.
     affine:  w_hat = (q - zero_point) * scale     `rtn` and `gptq`, one scale a row or a group
     QuEST:   h_hat = (q + 1/2) * scale            `quest_codes`, on Hadamard-rotated rows
     vector:  w_hat = (a sum of M codewords) * scale, one code for g weights      `vq_fit`
  2. `pack` lays the integers side by side, `bits` bits each; `unpack` is its exact inverse.
  3. `QuantLinear` holds packed integers and scales, and multiplies with them.

Papers: QuEST (arXiv 2502.05003) for the Gaussian grids and the rotation; GPTQ (2210.17323) and
its code for the affine grid; AQLM (2401.06118) for the codebooks. Not here: training a model (see
the method files); `vq_fit` takes Adam steps on the codebooks of one linear.

Shapes: O output channels, C input channels, g = group_size, G = C / g groups, ... any others.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

EPS = 1e-8  # the smallest clip: a row of zeros gets codes of about zero and a live gradient

@functools.cache
def find_kernels():
    """The module kernels, or None where there is no Triton that it can use: PyTorch does the work.
    Asked for where it is used, as it imports this file."""
    try:
        import kernels
    except ImportError as e:
        if "triton" not in str(e).lower():
            raise
        return None
    return kernels

# ---- The Hadamard rotation (QuEST section 3.1) ----------------------------------------------
# It spreads an outlier over its block. Rows become nearly Gaussian, and one clip fits them all.

_SIGNS = {}  # made once, so that torch.compile sees a constant
WIDE_MM = hasattr(torch.ops.aten.mm, "dtype")  # torch.mm has out_dtype

def hadamard_signs(n, device, dtype):
    """sqrt(n) * hadamard(n): entries +-1, exact in every format, also in TF32 and bfloat16."""
    if (n, device, dtype) not in _SIGNS:
        h = torch.ones(1, 1)
        while h.size(0) < n:
            h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
        _SIGNS[n, device, dtype] = h.to(device, dtype)
    return _SIGNS[n, device, dtype]

def rotate(x, block=128, dtype=torch.float32):
    """Block-diagonal Hadamard transform of the last dimension (..., C), in dtype; float64 stays.

    The block is the largest power of two <= `block` that divides C. It is orthonormal and its own
    inverse: rotate(x) @ rotate(w).T == x @ w.T. Differentiable, but not from bfloat16 on a GPU.
    """
    n = math.gcd(x.size(-1), block)
    if WIDE_MM and x.is_cuda and dtype == torch.float32 and x.dtype != torch.float64 and not (
            torch.is_grad_enabled() and x.requires_grad):
        return rotate_by_bfloat16(x, n)
    x = x if x.dtype == torch.float64 else x.to(dtype)
    signs = hadamard_signs(n, x.device, x.dtype)       # the factor below is alpha: a free pass
    return torch.addmm(signs[0], x.reshape(-1, n), signs, beta=0, alpha=n**-0.5).view(x.shape)

def rotate_by_bfloat16(x, n):
    """rotate in blocks of n, on a GPU: x (..., C) bfloat16 or float32 -> float32 (..., C).

    TF32 would round float32 weights to 11 bits before they are rotated, and then codes near a
    border differ between machines and from the packed file. Three bfloat16 numbers hold a float32
    exactly; their products with +-1 are exact, and the sums are float32.
    """
    signs = hadamard_signs(n, x.device, torch.bfloat16)
    parts, rest = [], x.reshape(-1, n)
    for _ in range(1 if x.dtype == torch.bfloat16 else 3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]
    h = torch.mm(torch.cat(parts, 1), signs.repeat(len(parts), 1), out_dtype=torch.float32)
    return (h * n**-0.5).view(x.shape)

# ---- QuEST's grid (section 3.1) -------------------------------------------------------------
# N even levels over +-clip times the row's root mean square; the clip suits a Gaussian row best.
# Exact minimizers of E (g - Q(g))^2, g ~ N(0, 1). The authors' own constants stop at their
# optimizer's tolerance. 1.58 stands for log2(3) bits: the three levels -1, 0, 1.
GAUSSIAN_CLIP = {
    1: 0.7978845608, 1.58: 1.2240063619, 2: 1.4935300289, 3: 2.0510680451, 4: 2.5140045915,
    5: 2.9161512493, 6: 3.2779847974, 7: 3.6110971963, 8: 3.9222044167,
}
FP4_CLIP = 2.9224750714  # the same for E2M1: magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6, stored times two
FP4_CODES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # by 4-bit index

def num_levels(bits):
    return 3 if bits == 1.58 else 2 ** int(bits)

def code_offset(bits, grid="uniform"):
    """1/2 on even grids, which have no level at zero; 0 on the ternary grid and on FP4."""
    return 0.0 if bits == 1.58 or grid == "fp4" else 0.5

def clip_limit(bits, grid="uniform"):
    """The outermost level in units of `scale`."""
    return 12.0 if grid == "fp4" else (num_levels(bits) - 1) / 2

def trust_limit(bits, grid="uniform", one_bit=1.30):
    """The largest |h| / scale that still receives a gradient (QuEST section 3.2).

    Trusted is what rounding moves by half a step at most (FP4: half of the widest gap). Inside
    the clip that is everything, so the limit is the outermost level plus that much. At 1 bit the
    paper ends the zone at `one_bit` clips instead (section 3.3; 1.30 rotated, 1.25 not).
    """
    if bits == 1:
        return one_bit * clip_limit(1)
    return clip_limit(bits, grid) + (2.0 if grid == "fp4" else 0.5)

def quest_codes(h, bits, grid="uniform", scale=None):
    """Nearest codes of rows that are already rotated; no gradient reaches the scale (QuEST).

    h (..., C) float -> q (..., C) integers in h's dtype, scale (..., 1), u = h / scale. The value
    is (q + code_offset(bits, grid)) * scale. Unless given, the scale follows from the root mean
    square of the whole row, no mean subtracted.
    """
    clip = FP4_CLIP if grid == "fp4" else GAUSSIAN_CLIP[bits]
    if scale is None:
        rms = torch.linalg.vector_norm(h, dim=-1, keepdim=True) * h.size(-1) ** -0.5
        scale = (clip * rms + EPS) / clip_limit(bits, grid)                        # (..., 1)
    u = h / scale
    if grid == "fp4":                                  # gaps of 1 up to 4, 2 up to 8, then 4
        a = u.abs()
        gap = torch.where(a < 4, 1.0, torch.where(a < 8, 2.0, 4.0))
        return ((a / gap).round() * gap).clamp(max=12) * u.sign(), scale, u
    if bits == 1.58:
        return u.round().clamp(-1, 1), scale, u
    half = num_levels(bits) // 2
    return u.floor().clamp_(-half, half - 1), scale, u

def keep_two_of_four(h):
    """The sparse pattern (QuEST section 4.4): of the 4 pairs in 8 inputs keep the 2 longest.

    h (..., C), 8 divides C -> bool (..., C), half of it True.
    """
    length = h.reshape(*h.shape[:-1], -1, 4, 2).square().sum(-1)                   # (..., C/8, 4)
    keep = torch.zeros_like(length, dtype=torch.bool)
    keep.scatter_(-1, length.topk(2, dim=-1).indices, True)
    return keep.repeat_interleave(2, dim=-1).view(h.shape)

def quest_fake_quant(x, bits):
    """QuEST's fake quantizer, the heart of quest.py, where it is written out."""
    from quest import quest_fake_quant
    return quest_fake_quant(x, bits)

def code_linear(x, x_scale, w, w_scale, dtype):
    """y = (x * x_scale) @ (w * w_scale).T, with the scales outside of the product.

    x (..., C), w (O, C) levels, or plain values whose scale is None; x_scale (..., 1), w_scale
    (O, 1) -> (..., O). Levels up to 8 bits are exact in bfloat16, levels times scales are not.
    Training and packed inference both call this, so that they agree.
    """
    y = F.linear(x.to(dtype), w.to(dtype)) * w_scale.view(-1)                      # (..., O)
    return (y if x_scale is None else y.mul_(x_scale)).to(dtype)

# ---- The affine grid and round-to-nearest ---------------------------------------------------

def rtn(w, bits, group_size=-1, symmetric=False, mse=True):
    """Round to nearest, the baseline of every table: w (O, C) -> q (O, C), scale and zero (O, G).

    asymmetric: q uint8 in 0..2^bits-1 over the range of the row or group, widened to hold 0.
    symmetric:  q int8 in -2^(bits-1)..2^(bits-1)-1, zero_point None. As in GPTQ's code one step
    is 2 max|w| / (2^bits - 1), so that the largest positive weight is clipped.
    mse: the shrink of the range, among 1, 0.99 .. 0.21, with the least sum of |error|^2.4. It is on
    in every table here; without it the range is that of the extremes.
    """
    groups = _grouped(w, group_size)                                               # (O, G, g)
    scale, zero_point = affine_grid(groups, bits, symmetric, mse)                  # (O, G)
    q = affine_codes(groups, scale.unsqueeze(-1), zero_point.unsqueeze(-1), bits).view(w.shape)
    return _affine_result(q, scale, zero_point, bits, symmetric)

def _affine_result(q, scale, zero_point, bits, symmetric):
    if symmetric:
        return (q - 2 ** (bits - 1)).to(torch.int8), scale, None
    return q.to(torch.uint8), scale, zero_point

def affine_grid(x, bits, symmetric=False, mse=False):
    """Scale and zero point of the codes 0..2^bits-1 over the last dimension: (..., g) -> (...)."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    # All zeros, or so small that a step would be no normal number: any scale does, and w_hat is 0.
    empty = high - low < (2**bits - 1) * torch.finfo(torch.float32).tiny
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    best = torch.full_like(low, math.inf)
    for shrink in ([1 - k / 100 for k in range(80)] if mse else [1]):
        s = (high - low) * shrink / (2**bits - 1)
        z = torch.full_like(s, 2 ** (bits - 1)) if symmetric else (-low * shrink / s).round()
        w_hat = affine_codes(x, s.unsqueeze(-1), z.unsqueeze(-1), bits) - z.unsqueeze(-1)
        error = (w_hat * s.unsqueeze(-1) - x).abs().pow(2.4).sum(-1)
        if shrink == 1:
            scale, zero_point = s, z
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, s, scale), torch.where(better, z, zero_point)
    return scale, zero_point

def affine_codes(x, scale, zero_point, bits):
    """Codes 0..2^bits-1 of x, in x's dtype; scale and zero_point broadcast against x."""
    return ((x / scale).round() + zero_point).clamp(0, 2**bits - 1)

def dequantize(q, scale, zero_point=None, group_size=-1):
    """(q - zero_point) * scale: integers (O, C), scale and zero_point (O, G) -> floats (O, C)."""
    q = _grouped(q, group_size).to(scale.dtype)                                    # (O, G, g)
    if zero_point is not None:
        q = q - zero_point.to(scale.dtype).unsqueeze(-1)
    return (q * scale.unsqueeze(-1)).flatten(1)

def _grouped(w, group_size):
    """(O, C) -> (O, G, g). Raises ValueError where g does not divide C."""
    g = w.size(-1) if group_size == -1 else group_size
    if g < 1 or w.size(-1) % g:
        raise ValueError(f"--group-size {group_size} does not divide {w.size(-1)} input channels; "
                         f"try {math.gcd(w.size(-1), 128)} or -1 (one scale per row)")
    return w.reshape(w.size(0), -1, g)

def fake_quant_tokens(x, bits, symmetric=True):
    """Every token on its own grid, back as floats; the gradient goes straight through.

    x (..., C), symmetric: integers within +-(2^(bits-1) - 1) times the token's largest |x| over
    that. Else: 2^bits codes over the token's range, widened to hold 0, and an integer zero point,
    so that 0 stays 0. At 16 bits x comes back as it is.
    """
    if bits == 16:
        return x
    h = x.detach().float()
    if symmetric:
        scale = (h.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=EPS)  # (..., 1)
        h = (h / scale).round() * scale
    else:
        low, high = h.amin(-1, keepdim=True).clamp(max=0), h.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=EPS)                      # (..., 1)
        zero_point = (-low / scale).round()
        h = (affine_codes(h, scale, zero_point, bits) - zero_point) * scale
    return h.to(x.dtype) + (x - x.detach())

# ---- GPTQ (2210.17323) ----------------------------------------------------------------------
# It rounds a weight's columns from left to right, and after each moves the columns
# still to come so that they make up for its error on the calibration inputs as well as they can.
# With H = E[x x^T] + damping and the upper U of U^T U = H^-1 that step is exact: an error of
# e = (w_i - w_hat_i) / U_ii moves the columns j > i by -e U_ij and costs the output e^2.

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
    """w (O, C), hessian (C, C) = E[x x^T] over the inputs, in any unit -> as `rtn` returns it.

    Groups take their grid from the weights as they stand when their turn comes. act_order: the
    columns with the largest H_ii first; then a group's grid is that of the original weights, so
    that it stays one group. percdamp: of the mean of H's diagonal, added to it. Raises
    torch.linalg.LinAlgError where H is not positive definite even so.
    """
    w = w if w.dtype == torch.float64 else w.float()
    # An input that was always zero tells nothing of its column, and the column becomes zero. As in
    # GPTQ's code the grid of a whole row is made before, the grids of groups after that: there the
    # old weights do not widen the range.
    dead = hessian.diagonal() == 0                                                 # (C,)
    alive = w.masked_fill(dead, 0)
    groups = _grouped(w if group_size == -1 else alive, group_size)                # (O, G, g)
    w, C = alive, w.size(1)
    g, static = groups.size(-1), act_order or group_size == -1
    if static:
        scale, zero_point = affine_grid(groups, bits, symmetric, mse)              # (O, G)
    else:                                              # each group's when its turn comes
        scale, zero_point = w.new_empty(groups.shape[:2]), w.new_empty(groups.shape[:2])
    order = torch.arange(C, device=w.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    h = (hessian + torch.diag(dead.to(hessian))).to(w)[order][:, order]
    u, w, q = inverse_factor(h, percdamp), w[:, order], torch.empty_like(w)
    columns = _gptq_columns
    if w.is_cuda and w.dtype == torch.float32 and find_kernels():
        columns = find_kernels().gptq_columns          # the same arithmetic, in one kernel
    step = LAZY_BLOCK if static else max(n for n in range(1, LAZY_BLOCK + 1) if g % n == 0)
    for a in range(0, C, step):
        b = min(a + step, C)
        if not static and a % g == 0:                  # w holds every update of columns < a
            grid = affine_grid(w[:, a:a + g], bits, symmetric, mse)
            scale[:, a // g], zero_point[:, a // g] = grid
        group = order[a:b] // g                                                    # (b - a,)
        q[:, a:b], e = columns(w[:, a:b], u[a:b, a:b], scale[:, group], zero_point[:, group], bits)
        w[:, b:] -= e @ u[a:b, b:]
    return _affine_result(q[:, order.argsort()], scale, zero_point, bits, symmetric)

def inverse_factor(hessian, percdamp=0.01):
    """The upper U (C, C) with U^T U = (H + percdamp * mean(diag H) I)^-1, by GPTQ's own steps."""
    h = hessian + torch.diag(percdamp * hessian.diagonal().mean().expand(len(hessian)))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)

def _gptq_columns(w, u, scale, zero_point, bits):
    """The columns of one lazy block: w, scale, zero_point (O, n), u (n, n) -> codes, errors e."""
    w, q, error = w.clone(), torch.empty_like(w), torch.empty_like(w)
    for i in range(w.size(1)):
        s, z = scale[:, i], zero_point[:, i]                                       # (O,)
        q[:, i] = affine_codes(w[:, i], s, z, bits)
        error[:, i] = (w[:, i] - (q[:, i] - z) * s) / u[i, i]
        w[:, i:] -= error[:, i:i + 1] * u[i, i:]
    return q, error

class Seen(Exception):
    """Ends a block's forward pass early: every linear that was asked for has had its input."""

@full_float32()
@torch.no_grad()
def collect_hessians(block, names, windows, tables, a_bits=16):
    """{name: (E[x x^T] (C, C), max|x| (C,))} of the named linears' inputs x, over all tokens.

    windows: inputs (B, T, C) of the block, one after the other; tables: cos and sin (T, hs). Sums
    are float32 without TF32, or float64. a_bits: of the inputs as the linears will quantize them.
    """
    found, tokens, missing = {}, dict.fromkeys(names, 0), set()

    def see(name, x):
        x = x if x.dtype == torch.float64 else x.float()
        x = fake_quant_tokens(x, a_bits)                                           # (n, C)
        if name not in found:
            found[name] = x.new_zeros(x.size(1), x.size(1)), x.new_zeros(x.size(1))
        h, peak = found[name]

        # A running mean: what was seen before counts by its share of all tokens so far.
        before, tokens[name] = tokens[name], tokens[name] + len(x)
        h.mul_(before / tokens[name]).addmm_(x.t(), x, alpha=1 / tokens[name])
        found[name] = h, torch.maximum(x.abs().amax(0), peak)
        missing.discard(name)
        if not missing:
            raise Seen

    hooks = [block.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs, name=name: see(name, inputs[0].flatten(0, -2))) for name in names]
    for x in windows:
        missing.update(names)
        with contextlib.suppress(Seen):
            block(x, *tables)
    for hook in hooks:
        hook.remove()
    return found

@torch.no_grad()
def block_hessians(model, idx):
    """Yield, block by block, [(name, linear, E[x x^T] (C, C))] of its linears, for ids (N, T).

    What was put into a linear's place before the next block is asked for feeds that block: each is
    quantized on what those before it give. Every block runs twice on every window.
    """
    tables = model.rope(idx)
    windows = model.embed(idx).to(model.dtype).split(16)                           # (B, T, C) each
    for i, block in enumerate(model.blocks):
        linears = [(name, m) for name, m in block.named_modules()
                   if name.rsplit(".", 1)[-1].startswith("w")]
        found = collect_hessians(block, [name for name, _ in linears], windows, tables)
        yield [(f"blocks.{i}.{name}", m, found[name][0]) for name, m in linears]
        windows = [block(x, *tables) for x in windows]

def output_error(w, w_hat, hessian):
    """E|(w_hat - w) x|^2 / E|w x|^2, given E[x x^T] in any unit; 0 where there was no output."""
    error = w_hat - w
    lost, whole = ((v @ hessian * v).sum().item() for v in (error, w))
    return lost / whole if whole else 0.0

# ---- Vector quantization: additive codebooks (AQLM) -----------------------------------------
# g neighbouring inputs of a row share M codes, one into each of M codebooks of K = 2^B vectors:
# W[i, jg:jg+g] = scales_i * sum_m codebooks[m, codes[i, j, m]]. J = C / g groups a row.

class _LookUp(torch.autograd.Function):
    """codebook[codes]: codes (L, n), codebook (L, K, g) -> (L, n, g). Its backward pass adds up in
    a fixed order on a CPU; on a GPU by a product with one-hot codes, as atomic sums would queue."""

    @staticmethod
    def forward(ctx, codes, codebook):
        L, K, _ = ctx.shape = codebook.shape
        rows = codes + K * torch.arange(L, device=codes.device).unsqueeze(1)
        ctx.save_for_backward(rows)
        return F.embedding(rows, codebook.flatten(0, 1))

    @staticmethod
    def backward(ctx, grad):
        (rows,), (L, K, g) = ctx.saved_tensors, ctx.shape
        if not grad.is_cuda or K > 64:
            total = grad.new_zeros(L * K, g).index_add_(0, rows.flatten(), grad.flatten(0, 1))
            return None, total.view(L, K, g)
        parts = L * math.gcd(rows.size(1), 512)        # or the sum would run on few cores
        hot = (rows.unsqueeze(2) % K == torch.arange(K, device=rows.device)).to(grad.dtype)
        with full_float32():
            total = hot.view(parts, -1, K).mT @ grad.reshape(parts, -1, g)
        return None, total.view(L, -1, K, g).sum(1)

def vq_sum(codes, codebooks):
    """codes (L, n, M), codebooks (L, M, K, g) -> sums of codewords (L, n, g), differentiable."""
    return sum(_LookUp.apply(codes[..., m], codebooks[:, m]) for m in range(codes.size(2)))

def vq_dequantize(codes, codebooks, scales):
    """codes (O, J, M), codebooks (M, K, g), scales (O,) -> floats (O, C), differentiable; also for
    a stack of L linears of one shape, each of the four with L in front."""
    if codes.dim() == 3:
        return vq_dequantize(codes[None], codebooks[None], scales[None])[0]
    return vq_sum(codes.flatten(1, 2), codebooks).view(*scales.shape, -1) * scales.unsqueeze(2)

def kmeans(x, k, iterations=100, generator=None):
    """Lloyd's algorithm from k random points: x (n, g) -> centroids (k, g), the nearest (n,).

    A cluster without points keeps its centroid. generator: of the CPU, as everywhere here.
    """
    if k > len(x):
        raise ValueError(f"{k} centroids need as many points; there are {len(x)}")
    def nearest(c):                                    # |x - c|^2 without |x|^2, in bounded memory
        return torch.cat([torch.addmm(c.square().sum(1), part, c.t(), alpha=-2).min(1)[1]
                          for part in x.split(max(1, 2**24 // k))])
    centroids = x[torch.randperm(len(x), generator=generator)[:k].to(x.device)]
    for i in range(iterations):
        owner, before = nearest(centroids), centroids
        total = torch.zeros_like(before).index_add_(0, owner, x)
        count = owner.bincount(minlength=k).unsqueeze(1)                           # (k, 1)
        centroids = torch.where(count > 0, total / count.clamp(min=1), before)
        if i % 10 == 9 and torch.allclose(centroids, before, rtol=1e-6, atol=1e-8):
            break
    return centroids, nearest(centroids)

@full_float32()
def vq_search(x, codes, codebooks, beam=1, generator=None, keep=1):
    """The best `keep` codes (L, n, keep, M) near x (L, n, g) that a search from codes (L, n, M)
    finds, each of the L in its own codebooks (L, M, K, g).

    A beam search: it visits the codebooks once, in random order, and replaces that codebook's part
    of every hypothesis. The error never grows. With one codebook, or two and beam >= K, it tries
    everything. All groups at once, in bounded memory.
    """
    (L, M, K, g), found = codebooks.shape, []
    order = torch.randperm(M, generator=generator).tolist()
    size = max(1, 2**24 // (L * beam * K))
    for x, q in zip(x.split(size, 1), codes.long().split(size, 1)):
        n, rest = x.size(1), (x - vq_sum(q, codebooks)).unsqueeze(2)               # (L, n, b, g)
        q = q.unsqueeze(2)                                                         # (L, n, b, M)
        for i, m in enumerate(order):
            c, b = codebooks[:, m], q.size(2)                                      # (L, K, g)
            part = lambda q: _LookUp.apply(q[..., m].flatten(1), c).view(*q.shape[:3], g)
            rest = rest + part(q)
            score = torch.baddbmm(c.square().sum(2).unsqueeze(1), rest.flatten(1, 2), c.mT,
                                  alpha=-2).view(L, n, b, K)
            if b > 1:
                score = score + rest.square().sum(-1, True)
            index = _lowest(score.flatten(2), keep if i == M - 1 else beam)        # (L, n, b')
            parent = (index // K).unsqueeze(-1)
            q = q.gather(2, parent.expand(-1, -1, -1, M))
            q[..., m] = index % K
            rest = rest.gather(2, parent.expand(-1, -1, -1, g)) - part(q)
        found.append(q)
    return torch.cat(found, 1)

def _lowest(score, n):
    """Indices of the n lowest along the last dimension, fast where n is 1."""
    if n == 1:
        return score.min(-1, keepdim=True).indices
    return score.topk(min(n, score.size(-1)), largest=False).indices

def vq_search_xtx(w, hessian, codes, codebooks, scales, beam=1, generator=None):
    """One pass of AQLM's search for codes with a small <(w_hat - w) H, w_hat - w> of each row.

    Groups and codebooks in random order, all rows at once -> codes (O, J, M), loss (O,), which
    never grows. A change of one part by d changes the loss by 2 d (w_hat - w) H + d H_gg d.
    """
    (M, K, g), O, s = codebooks.shape, len(w), scales.view(-1, 1, 1)
    rows, q = torch.arange(O, device=w.device).unsqueeze(1), codes.unsqueeze(1)    # (O, b, J, M)
    error = vq_dequantize(codes, codebooks, scales) - w
    slope = (error @ hessian).unsqueeze(1)                                         # (O, b, C)
    loss = (slope[:, 0] * error).sum(-1, keepdim=True)                             # (O, b)
    for j in torch.randperm(codes.size(1), generator=generator).tolist():
        part = slice(j * g, j * g + g)
        h = hessian[part, part]                                                    # H_gg (g, g)
        for m in torch.randperm(M, generator=generator).tolist():
            old, c = s * codebooks[m, q[:, :, j, m]], codebooks[m]                 # (O, b, g)
            here = slope[..., part]
            fixed = ((old @ h - 2 * here) * old).sum(-1) + loss
            change = (2 * s * (here - old @ h)) @ c.t() + s**2 * ((c @ h) * c).sum(1)
            total = (change + fixed.unsqueeze(-1)).flatten(1)                      # (O, b K)
            index = _lowest(total, beam)                                           # (O, b')
            loss = total.gather(1, index)
            parent, code = index // K, index % K
            q = q[rows, parent]
            q[:, :, j, m] = code
            slope = slope[rows, parent] + (s * c[code] - old[rows, parent]) @ hessian[part]
    return q[:, 0], loss[:, 0]

@full_float32()
def vq_fit(w, hessian, num_codebooks, bits, group_size, rounds=4, steps=19, generator=None):
    """w (O, C), hessian (C, C) = E[x x^T] -> codes (O, J, M), codebooks (M, K, g), scales (O,).

    Residual k-means on the rows over their norms; then `rounds` times Adam on codebooks and scales
    (`steps` of a percent) and a pass of vq_search_xtx, until both win less than 1 % a round.
    """
    w = w.detach().float()
    scales = torch.linalg.vector_norm(w, dim=1) + 1e-9                             # whole rows
    rest, codes, codebooks = (w / scales.unsqueeze(1)).reshape(-1, group_size), [], []
    for _ in range(num_codebooks):
        c, q = kmeans(rest, 2**bits, generator=generator)
        rest = rest - c[q]
        codebooks.append(c)
        codes.append(q)
    codes, codebooks = torch.stack(codes, 1).view(len(w), -1, num_codebooks), torch.stack(codebooks)
    # The unit of H changes no minimum. Inputs that were all zero ask for nothing: H stays zero.
    size = hessian.diagonal().mean()
    h, best = hessian.to(w) / torch.where(size > 0, size, 1.0), math.inf
    learn = [codebooks.requires_grad_(), scales.requires_grad_()]
    adam = torch.optim.Adam([{"params": [p], "lr": 0.01 * p.detach().square().mean().sqrt().item()}
                             for p in learn], betas=(0.0, 0.95), amsgrad=True)
    for _ in range(rounds):
        for _ in range(steps):
            w_hat = vq_dequantize(codes, codebooks, scales)
            slope = (w_hat.detach() - w) @ h           # half of the loss's gradient
            adam.zero_grad()
            w_hat.backward(slope)
            adam.step()
        # A search comes last: codes that were best for the codebooks before Adam moved them are
        # not the best for those that it leaves.
        with torch.no_grad():
            codes, losses = vq_search_xtx(w, h, codes, *learn, generator=generator)
        loss = losses.sum()
        if loss > 0.99 * best:
            break
        best = loss
    return codes, codebooks.detach(), scales.detach()

# ---- Packing: bits only, lossless -----------------------------------------------------------

def pack(q, bits):
    """Codes (O, n) -> uint8 (O, ceil(n * bits / 8)), the first code in the lowest bits.

    1 to 16 bits. Signed codes keep their low bits (two's complement). At 1.58 bits, five of the
    codes -1, 0, 1 share a byte in base 3: 1.6 bits each.
    """
    if bits == 1.58:
        q = F.pad(q.to(torch.int32) + 1, (0, -q.size(1) % 5)).view(q.size(0), -1, 5)
        return (q * _powers(3, 5, q.device)).sum(-1).to(torch.uint8)
    q = q.to(torch.int32).unsqueeze(-1) >> torch.arange(bits, device=q.device) & 1  # (O, n, bits)
    stream = F.pad(q.flatten(1), (0, -q.size(1) * bits % 8)).view(q.size(0), -1, 8)
    return (stream * _powers(2, 8, q.device)).sum(-1).to(torch.uint8)

def unpack(packed, bits, n, signed=False):
    """The exact inverse of pack: uint8 (O, bytes) -> (O, n) uint8; int8 if signed or 1.58 bits;
    int32 above 8 bits."""
    if bits == 1.58:
        digits = packed.to(torch.int32).unsqueeze(-1) // _powers(3, 5, packed.device) % 3
        return (digits.flatten(1)[:, :n] - 1).to(torch.int8)
    if 8 % bits == 0:                                  # whole codes in every byte
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        q = (packed.unsqueeze(-1) >> shifts & 2**bits - 1).flatten(1)[:, :n]
    else:                                              # codes that cross the bytes' borders
        stream = packed.unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1
        stream = stream.flatten(1)[:, :n * bits].reshape(-1, n, bits)
        q = (stream * _powers(2, bits, packed.device)).sum(-1, dtype=torch.int32)
    q, half = q if bits > 8 else q.to(torch.uint8), 2 ** (bits - 1)
    return ((q.int() ^ half) - half).to(torch.int8 if bits <= 8 else torch.int32) if signed else q

def _powers(base, n, device):
    return torch.tensor([base**i for i in range(n)], dtype=torch.int32, device=device)

def half_if_held(t, size):
    """t as float16, or as float32 where float16 would change an element by more than 2^-10 of
    `size` (which broadcasts against t): above 65504 it is infinite, below 6e-5 it is coarse, and
    below 3e-8 it is 0."""
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
    tensors: packed uint8 (O, bytes), and those of the form.
    """
    tensors = ()                                       # names of all that a form may hold

    def __init__(self, spec, tensors):
        super().__init__()
        self.spec = dict(spec)
        self.bits = spec["bits"]
        self.a_bits = spec["a_bits"]
        self.in_features = spec["in_features"]
        for name in ("packed", *self.tensors):
            self.register_buffer(name, tensors.get(name))
        self.fast = None                               # see kernels.linear

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
    def vq(codes, codebooks, scales):
        """From what `vq_fit` returns; codebooks and scales become float16 where that holds them."""
        return PackedVQ.from_codes(codes, codebooks, scales)

    def by_kernel(self, x):
        """The product for x (..., C) by kernels.py -> (..., O); None: compute it in PyTorch."""
        half = x.dtype in (torch.float16, torch.bfloat16)
        if not (x.is_cuda and half and x.numel()) or x.requires_grad:
            return None
        kernels = find_kernels()
        return kernels.linear(self, x) if kernels else None

class PackedAffine(QuantLinear):
    """w_hat = (q - zero_point) * scale, as `rtn` and `gptq` give it.

    spec: group_size (-1: one scale a row). scale float32 (O, G), zero_point uint8 (O, G) where
    asymmetric. a_bits below 16: inputs on a symmetric grid of their own for each token.
    """
    tensors = ("scale", "zero_point")

    @classmethod
    def from_codes(cls, q, scale, zero_point, bits, group_size, a_bits):
        spec = dict(kind="affine", bits=bits, a_bits=a_bits, in_features=q.size(1),
                    group_size=group_size, signed=zero_point is None)
        tensors = dict(packed=pack(q, bits), scale=scale.float())
        if zero_point is not None:
            tensors["zero_point"] = zero_point.to(torch.uint8)
        return cls(spec, tensors)

    def codes(self):
        """The integers (O, C)."""
        return unpack(self.packed, self.bits, self.in_features, self.spec["signed"])

    def weight(self):
        """The weight that the codes stand for, float32 (O, C)."""
        return dequantize(self.codes(), self.scale, self.zero_point, self.spec["group_size"])

    def forward(self, x):
        if self.a_bits < 16:
            x = fake_quant_tokens(x, self.a_bits)
        y = self.by_kernel(x)
        return F.linear(x, self.weight().to(x.dtype)) if y is None else y

class PackedQuest(QuantLinear):
    """w_hat = (q + 1/2) * scale of the rotated weight, and rotated inputs on the same kind of grid.

    spec: rotate, grid ("uniform", "fp4" or "sparse"). scale float32 (O, 1) or (1, 1); keep (sparse:
    one bit a pair of inputs); a_scale (a fixed scale of the inputs, instead of one a token).
    """
    tensors = ("scale", "keep", "a_scale")

    @classmethod
    def from_weight(cls, w, bits, a_bits, grid, rotated, w_scale, a_scale):
        with full_float32():                           # as in training
            h = rotate(w) if rotated else w
        q, scale, _ = quest_codes(h, bits, grid, w_scale)
        tensors = dict(scale=scale.view(-1, 1), a_scale=a_scale)
        if grid == "fp4":                              # +-0..12 -> sign bit, 3 bits of magnitude
            magnitudes = torch.tensor(FP4_CODES[1:8], device=q.device)
            q = (q.abs().unsqueeze(-1) >= magnitudes).sum(-1) + 8 * (q < 0)
        if grid == "sparse":                           # half of the codes, and which they are
            keep = keep_two_of_four(h)
            q = q[keep].view(w.size(0), -1)
            tensors["keep"] = pack(keep[:, ::2], 1)
        spec = dict(kind="quest", bits=bits, in_features=w.size(1), a_bits=a_bits, grid=grid,
                    signed=grid != "fp4", rotate=rotated)
        return cls(spec, {"packed": pack(q, bits), **tensors})

    def levels(self, dtype):
        """The rotated weight (O, C) in units of its scale."""
        n, grid = self.in_features, self.spec["grid"]
        stored = n // 2 if grid == "sparse" else n
        q = unpack(self.packed, self.bits, stored, self.spec["signed"])
        if grid == "fp4":
            q = torch.tensor(FP4_CODES, device=q.device)[q.long()]
        levels = q.to(dtype) + code_offset(self.bits, grid)
        if self.keep is None:
            return levels
        keep = unpack(self.keep, 1, n // 2).bool().repeat_interleave(2, dim=-1)    # (O, C)
        return levels.new_zeros(keep.shape).masked_scatter(keep, levels)

    def weight(self):
        """The weight that the codes stand for, float32 (O, C), rotated back where they were."""
        w = self.levels(torch.float32) * self.scale
        return rotate(w) if self.spec["rotate"] else w

    def forward(self, x):
        y = self.by_kernel(x)
        if y is not None:
            return y
        h = rotate(x) if self.spec["rotate"] else x.float()
        h_scale = None
        if self.a_bits < 16:
            grid = "fp4" if self.spec["grid"] == "fp4" else "uniform"      # sparse: weights only
            q, h_scale, _ = quest_codes(h, self.a_bits, grid, self.a_scale)
            h = q + code_offset(self.a_bits, grid)
        return code_linear(h, h_scale, self.levels(x.dtype), self.scale, x.dtype)

class PackedVQ(QuantLinear):
    """w_hat = (a sum of M codewords) * scale, one code into each codebook for g weights.

    codebooks float16 (M, K, g), scale float16 (O,); float32 where float16 cannot hold them.
    """
    tensors = ("scale", "codebooks")

    @classmethod
    def from_codes(cls, codes, codebooks, scales):
        bits = (codebooks.size(1) - 1).bit_length()
        spec = dict(kind="vq", bits=bits, a_bits=16, signed=False,
                    in_features=codes.size(1) * codebooks.size(2))
        # A scale serves a whole row, so each has to be held by itself. Of a codebook's entries
        # the small ones may be held as coarsely as the largest.
        largest = codebooks.abs().amax((1, 2), keepdim=True)                       # (M, 1, 1)
        return cls(spec, dict(packed=pack(codes.flatten(1), bits),
                              scale=half_if_held(scales, scales),
                              codebooks=half_if_held(codebooks, largest)))

    def codes(self):
        """The indices (O, J, M)."""
        M, _, g = self.codebooks.shape
        q = unpack(self.packed, self.bits, self.in_features // g * M)
        return q.view(len(q), -1, M)

    def weight(self):
        """The weight that the codes stand for, float32 (O, C)."""
        return vq_dequantize(self.codes().long(), self.codebooks.float(), self.scale.float())

    def forward(self, x):
        y = self.by_kernel(x)
        return F.linear(x, self.weight().to(x.dtype)) if y is None else y

def bits_per_weight(model):
    """(bits of codes, scales, zero points and masks per weight they stand for, those weights).

    Counts QuantLinear layers only: embedding, head and norms are not quantized.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    weights = sum(m.packed.size(0) * m.in_features for m in layers)
    stored = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    return (8 * stored / weights if weights else 0.0), weights
