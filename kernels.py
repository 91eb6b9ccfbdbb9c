"""Triton kernels for low-bit layers, each beside the plain PyTorch mathematics that it replaces.

    python tests/time_kernels.py              # this GPU: every shape, bits and batch against peers

`gptq_columns` is the column loop of quantizers.gptq for one lazy block. Rows do not depend on
each other, so one program keeps its rows' whole block in registers through all of the columns:
one launch a block, where the loop of GPTQ's code makes about ten a column. The arithmetic is that
of the plain loop to the bit: no multiply and add are fused, and divisions are rounded as IEEE says.

`lowbit_matmul` multiplies 16-bit activations with packed weights; QuantLinear calls it on a GPU:
  1. up to 16 tokens `_decode` reads the weights once, straight into the tensor cores' registers,
  2. up to 1024 `_tile` does the same for tiles of tokens, with the activations in shared memory,
  3. above that `_dequantize` writes parts of the weight in 16 bits, and cuBLAS multiplies.

`hadamard_quantize` is QuEST's rotation, scale, codes and trust mask in one pass, `quest_matmul` the
product of such codes in integers, `rotate_trusted` the backward pass: quest.py trains with them.
`vq_matmul` multiplies with additive codebooks by look-ups.

Shapes: M tokens, O output and C input channels, g = group_size, G = C / g groups.
"""
import functools
import importlib.metadata
import math
import warnings
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

def triton_version():
    """(major, minor) of the installed Triton, (0, 0) where there is none."""
    for name in ("triton", "pytorch-triton", "triton-windows"):    # released, nightly, Windows
        try:
            major, minor, *_ = importlib.metadata.version(name).split(".")
            return int(major), int(minor)
        except importlib.metadata.PackageNotFoundError:
            continue
    return 0, 0

if triton_version() < (3, 5):                          # which came with PyTorch 2.9
    raise ImportError("kernels.py needs Triton 3.5 or newer")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quantizers import (EPS, GAUSSIAN_CLIP, clip_limit, code_offset, hadamard_signs, pack,
                        trust_limit, unpack)

# ---- What a packed linear asks ------------------------------------------------------------------

def linear(layer, x):
    """The product of a QuantLinear with inputs x (..., C) in 16 bits -> (..., O), or None where
    there is no kernel for it. Its weight in the order that the kernels read is made at the first
    use and kept in layer.fast, beside the `packed` tensor that it was made from."""
    if torch.compiler.is_compiling():
        # One operation to the compiler, which knows neither the layer nor the kernels. The weight
        # was made in a call before, or else there is no kernel.
        if layer.fast is None or layer.fast[1] is None:
            return None
        return torch.ops.nanobit.packed_linear(x, id(layer), len(layer.packed))

    product, operand = FORMS[layer.spec["kind"]]
    if layer.fast is None or layer.fast[0] is not layer.packed:        # first use, or it moved
        layer.fast = layer.packed, operand(layer, x)
        LAYERS[id(layer)] = layer
    if layer.fast[1] is None:
        return None
    return product(layer, x, layer.fast[1])

LAYERS = weakref.WeakValueDictionary()  # id: a layer that compiled code asks for

@torch.library.custom_op("nanobit::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, layer: int, outputs: int) -> torch.Tensor:
    return linear(LAYERS[layer], x)

@packed_linear.register_fake
def _(x, layer, outputs):
    return x.new_empty(*x.shape[:-1], outputs)

def affine_operand(layer, x):
    """A LowBit; None, and a warning, for a shape without a kernel."""
    g = layer.spec["group_size"]
    w = pack_weight(layer.codes(), layer.scale, layer.zero_point, layer.bits, g)
    if w is None:
        warnings.warn(f"kernels.py has no kernel for {layer.bits} bits, {layer.in_features} "
                      f"inputs, groups of {g}: these layers run in PyTorch")
    return w

def affine_product(layer, x, w):
    return lowbit_matmul(x, w)

def quest_layer_operand(layer, x):
    """What quest_operand makes; None for a baseline's layer or a shape without a kernel."""
    plain = layer.a_scale is None and layer.spec["rotate"] and layer.spec["grid"] == "uniform"
    if not (plain and quest_fits(x, layer.bits, layer.a_bits)):
        return None
    return quest_operand(layer.packed, layer.scale, layer.bits, layer.in_features)

def quest_product(layer, x, w):
    return quest_linear(x, w, layer.a_bits, layer.bits)

def vq_operand(layer, x):
    """Codes (M, J, O), codebooks in x's dtype and scales; None for codebooks without a kernel."""
    if layer.codebooks.shape[1:] != (256, 8):
        return None
    codes = layer.codes().permute(2, 1, 0).contiguous()
    return codes, layer.codebooks.to(x.dtype), layer.scale.float()

def vq_product(layer, x, w):
    codes, codebooks, scale = w
    y = vq_matmul(x.flatten(0, -2), codes, codebooks.to(x.dtype), scale)
    return y.view(*x.shape[:-1], -1)

def launch(early):
    """Options of a launch that may start while the kernel before it still runs, Hopper's
    programmatic dependent launch: that kernel says when, and this one waits before it reads what
    that wrote."""
    return {"launch_pdl": True} if early else {}       # the interpreter does not know the option

# ---- GPTQ's columns ---------------------------------------------------------------------------

@triton.jit
def _gptq_columns(w, u, scale, zero_point, q, error, O, n, qmax,
                  ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)     # (ROWS,)
    cols = tl.arange(0, COLS)
    live, inside = rows < O, cols < n
    block = tl.load(w + rows[:, None] * n + cols[None, :],
                    mask=live[:, None] & inside[None, :], other=0.0)       # (ROWS, COLS)
    for i in range(n):
        x = tl.sum(tl.where(cols[None, :] == i, block, 0.0), 1)            # (ROWS,) column i
        s = tl.load(scale + rows * n + i, mask=live, other=1.0)
        z = tl.load(zero_point + rows * n + i, mask=live, other=0.0)
        nearest = tl.div_rn(x, s) + 12582912.0 - 12582912.0               # 1.5 * 2^23: half to even
        code = tl.minimum(tl.maximum(nearest + z, 0.0), qmax)
        e = tl.div_rn(x - (code - z) * s, tl.load(u + i * n + i))
        tl.store(q + rows * n + i, code, mask=live)
        tl.store(error + rows * n + i, e, mask=live)
        u_row = tl.load(u + i * n + cols, mask=inside, other=0.0)   # zero left of column i
        block -= e[:, None] * u_row[None, :]

def gptq_columns(w, u, scale, zero_point, bits):
    """w (O, n) float32, u (n, n) upper, scale and zero_point (O, n) -> codes, errors (O, n)."""
    O, n = w.shape
    q, error = w.new_empty(O, n), w.new_empty(O, n)
    ROWS = 16
    inputs = (t.contiguous() for t in (w, u, scale, zero_point))       # Cholesky's u is transposed
    _gptq_columns[triton.cdiv(O, ROWS),](
        *inputs, q, error, O, n, float(2**bits - 1), ROWS=ROWS, COLS=triton.next_power_of_2(n),
        num_warps=4, enable_fp_fusion=False)
    return q, error

# ---- Weights of 1, 2, 3, 4 or 8 bits times 16-bit activations -----------------------------------
# A few tokens' product costs what it costs to read the weights, if unpacking keeps up: at 2 bits
# that leaves about two instructions a weight. So the codes lie in memory as the tensor cores want
# them: one 16-byte load gives a thread its part of 16 outputs, and a 32-bit word holds *pairs* of
# neighbouring k's, one in each half. (word >> shift & mask | magic) is then a pair of floats
# 2^p + q 2^f, where p is the width of the mantissa and f the field's place in its nibble, and one
# fused multiply-add makes the pair q - zero_point from it, exactly.

class LowBit(NamedTuple):
    """A weight (O, C) in the kernels' order, from `pack_weight`. O and C there are padded."""
    words: torch.Tensor         # int32 (O / 16, C * bits / 256, 128); at 3 bits the low two bits
    high: torch.Tensor          # at 3 bits the third bits; else `words` again
    grid: torch.Tensor          # int32 (G, O): a float32 scale, its last 8 bits the zero point
    bits: int
    group: int
    shape: tuple                # (O, C), not padded

def pack_weight(q, scale, zero_point, bits, group_size=-1):
    """Codes (O, C) and grids (O, G) as `rtn` returns them -> LowBit, or None: no kernel for these.

    Every 32 k's are two planes of 16: k = 32 (j // 2) + 4 w + 2 (j % 2) + h lies in half h of the
    row's word w of 8, in plane j. The scale loses its last 8 bits to the zero point: 2^-17 of it.
    """
    (O, C), g = q.shape, q.size(1) if group_size == -1 else group_size
    if bits not in (1, 2, 3, 4, 8) or C % 32 or g % 32:
        return None
    half = 2 ** (bits - 1)
    if zero_point is None:                             # signed codes: shifted, so is their zero
        q, zero_point = q.to(torch.int32) + half, torch.full_like(scale, half)
    q = F.pad(q.to(torch.int32), (0, -C % 256, 0, -O % 16))
    grid = (scale.float().view(torch.int32) + 128 & ~255) | zero_point.to(torch.int32)
    grid = F.pad(grid, (0, 0, 0, -O % 16)).T.contiguous()                          # (G, O)
    words = high = _pack_words(q & 3, 2) if bits == 3 else _pack_words(q, bits)
    if bits == 3:
        high = _pack_words(q >> 2, 1, third=True)
    return LowBit(words, high, grid, bits, g, (O, C))

def _places(bits, third, device):
    """The lowest bit in its word of each (pair of planes, plane, half)."""
    pair = torch.arange(max(8 // bits, 1), device=device).view(-1, 1, 1)
    plane, half = torch.arange(2, device=device).view(2, 1), torch.arange(2, device=device)
    if third:         # two bits above the fields of the low word, once shifted as far as that is
        return pair // 2 * 4 + pair % 2 + 2 * plane + 16 * half
    return (2 * pair + plane) * bits + 16 * half

def _pack_words(q, bits, third=False):
    """int32 (O, C) -> int32 (O / 16, C * bits / 256, 128), 16 bytes for each of 32 threads."""
    q = q.view(len(q) // 16, 2, 8, -1, max(8 // bits, 1), 4, 2, 2, 2)  # .. i p plane half
    q = q.permute(0, 3, 2, 5, 1, 6, 4, 7, 8)           # tile block | r8 i | r16 p | pair plane half
    words = (q.long() << _places(bits, third, q.device)).sum((-3, -2, -1))
    words = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    return words.reshape(len(q), -1, 128)

@triton.jit
def _half(t, shift: tl.constexpr, dt: tl.constexpr):
    return (t >> shift & 0xFFFF).to(tl.uint16).to(dt, bitcast=True)

@triton.jit
def _fma_pair(a, b, c, dt: tl.constexpr, ASM: tl.constexpr):
    """a * b + c on both 16-bit floats of each word. Written as two operations, ptxas swaps the
    halves forth and back, a fifth of all instructions; the interpreter knows no assembly."""
    if ASM:
        asm: tl.constexpr = ("fma.rn.bf16x2 $0, $1, $2, $3;" if dt == tl.bfloat16 else
                             "fma.rn.f16x2 $0, $1, $2, $3;")
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], tl.uint32, True, 1)
    else:
        lo = tl.fma(_half(a, 0, dt), _half(b, 0, dt), _half(c, 0, dt)).to(tl.uint16, bitcast=True)
        hi = tl.fma(_half(a, 16, dt), _half(b, 16, dt), _half(c, 16, dt))
        return lo.to(tl.uint32) | hi.to(tl.uint16, bitcast=True).to(tl.uint32) << 16

@triton.jit
def _minus_128(t, MASK, ASM: tl.constexpr):
    """q - 128 in bfloat16 of the low bytes q of a word's halves: seven bits are the mantissa of
    128 + q % 128; the eighth, lowest bit of an exponent, turns -256 into -128."""
    low = t & MASK.to(tl.uint32) | 0x43004300
    high = t & MASK.to(tl.uint32) + 0x10001 ^ 0xC380C380
    return _fma_pair(low, tl.full(t.shape, 0x3F803F80, tl.uint32), high, tl.bfloat16, ASM)

@triton.jit
def _numbers(w, high, zero, MASK, FIRST: tl.constexpr, PAIRS: tl.constexpr, A: tl.constexpr,
             B: tl.constexpr, BITS: tl.constexpr, dt: tl.constexpr, ASM: tl.constexpr):
    """q - zero_point of PAIRS pairs of planes of the words (A, B, 128); zero (A, 1, 16).

    -> (A, B, r8, i, r16, p, plane, h): 8 rows, twice; the threads' i, p and h as in pack_weight.
    MASK is an argument, not a constant, so that & and | become one instruction.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    j = tl.reshape(tl.arange(0, 2 * PAIRS) + 2 * FIRST, (1, 1, 1, 1, 1, 1, 2 * PAIRS))
    j = j.to(tl.uint32)
    t = tl.reshape(w, (A, B, 8, 4, 2, 2, 1)).to(tl.uint32, bitcast=True)
    z = tl.reshape(tl.trans(tl.reshape(zero, (A, 1, 2, 8)), (0, 1, 3, 2)), (A, 1, 8, 1, 2, 1, 1))
    if BITS == 8 and dt == tl.bfloat16:                # whose mantissa of 7 bits cannot hold q
        t, z = _minus_128(t >> j * 8, MASK, ASM), _minus_128(z * 0x10001, MASK, ASM)
        t = _fma_pair(z, tl.full(z.shape, 0xBF80BF80, tl.uint32), t, dt, ASM)      # t - z
    else:
        P: tl.constexpr = 7 if dt == tl.bfloat16 else 10                   # bits of the mantissa
        ONE: tl.constexpr = 0x3F80 if dt == tl.bfloat16 else 0x3C00
        TOP: tl.constexpr = ONE + (P << P)                                 # 2^P, as bits
        f = j * LOW % 4
        t = t >> j * LOW // 4 * 4 % 16
        mask = MASK.to(tl.uint32) << f
        if BITS == 3:
            h = tl.reshape(high, (A, B, 8, 4, 2, 2, 1)).to(tl.uint32, bitcast=True)
            place = j // 4 * 4 + j // 2 % 2
            h = h << 2 >> place if FIRST + PAIRS <= 4 else h >> place - 2
            t = h ^ (h ^ t) & mask                                         # t inside the mask
            mask |= MASK.to(tl.uint32) + 0x10001 << f
        t = t & mask | TOP * 0x10001                                       # 2^P + q 2^f
        c = ((z | TOP) ^ 0x8000) * 0x10001                                 # -(2^P + z)
        if LOW < 4:                                # -(2^(P - f) + z): add 2^P - 2^(P - f), by bits
            up = tl.where(f == 0, 0, TOP - (2 << P >> f)).to(tl.uint32) * 0x10001
            c = _fma_pair(c, tl.full(up.shape, ONE * 0x10001, tl.uint32), up, dt, ASM)
        t = _fma_pair(t, (ONE - (f << P)) * 0x10001, c, dt, ASM)           # q - z
    return tl.join(_half(t, 0, dt), _half(t, 16, dt))

@triton.jit
def _load(at, ok, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=ok, other=0, eviction_policy="evict_first")

@triton.jit
def _fetch(words, high, grid, t, k0, O, C: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
           SPAN: tl.constexpr, SUB: tl.constexpr, EVEN: tl.constexpr):
    """Words, third bits and grids of SPAN k's of the 16 outputs of tile t, as tuples.

    k0 (S, 1, 1): where the span of each warp begins. A grid serves SUB k's."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW                     # k's in a block of 128 words
    ROW: tl.constexpr = (C + 255) // 256 * 256
    u, r = tl.arange(0, 128)[None, None, :], tl.arange(0, 16)[None, None, :]
    ws, hs, gs = (), (), ()
    for i in tl.static_range(0, SPAN, 32):
        k = k0 + i
        if i % BLK == 0:
            ws += (_load(words + (t * (ROW // BLK) + k // BLK) * 128 + u, k < C, EVEN),)
        if BITS == 3 and i % 256 == 0:
            hs += (_load(high + (t * (ROW // 256) + k // 256) * 128 + u, k < C, EVEN),)
        if i % SUB == 0:
            g = _load(grid + k // GROUP * O + t * 16 + r, k < C, EVEN)
            gs += (g.to(tl.uint32, bitcast=True),)
    return ws, hs, gs

# A dot of three dimensions gives every warp its own slice of the first: the weights, shifted in
# place, and x, read as float pairs, are operands without a detour or a barrier.
@triton.jit(do_not_specialize=["M", "MASK"])
def _decode(x, words, high, grid, y, M, O, N, MASK, C: tl.constexpr, GROUP: tl.constexpr,
            BITS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr,
            SPAN: tl.constexpr, SUB: tl.constexpr, WAIT: tl.constexpr, ASM: tl.constexpr):
    """16 T outputs of all tokens. S warps take turns along k, SPAN k's each, and add up last."""
    dt: tl.constexpr = x.dtype.element_ty
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW
    EVEN: tl.constexpr = C % (S * SPAN) == 0
    pid, s = tl.program_id(0), tl.arange(0, S)
    i, m8 = tl.arange(0, 4)[:, None, None, None, None], tl.arange(0, 8)[None, :, None, None, None]
    m = m8 + 8 * tl.arange(0, BLOCK_M // 8)[None, None, None, :, None]
    e = tl.arange(0, 8)[None, None, None, None, :]
    xs = x + tl.minimum(m, M - 1) * C + i * 8 + e                      # i m8 s m/8 e
    acc = ()
    for t in tl.static_range(T):
        acc += (tl.zeros((S, 16, BLOCK_M), tl.float32),)
    for step in range(0, (C + S * SPAN - 1) // (S * SPAN)):
        k0 = (step * S + s) * SPAN
        ws, hs, gs = (), (), ()
        for t in tl.static_range(T):
            w, h, g = _fetch(words, high, grid, pid * T + t, k0[:, None, None], O, C, GROUP, BITS,
                             SPAN, SUB, EVEN)
            ws, hs, gs = ws + w, hs + h, gs + g
        if WAIT:                # else ptxas moves the loads to their uses, one after the other
            tl.debug_barrier()
        k0 = k0[None, None, :, None, None]
        for f in tl.static_range(0, SPAN, 32):
            if f % SUB == 0:
                part = ()
                for t in tl.static_range(T):
                    part += (tl.zeros((S, 16, BLOCK_M), tl.float32),)
            xk = tl.load(xs + (k0 + f)) if EVEN else tl.load(xs + (k0 + f), mask=k0 + f < C,
                                                             other=0.0)
            b = tl.reshape(xk, (4, 8, S, BLOCK_M // 8, 2, 2, 2))       # i m8 s m/8 p plane h
            b = tl.reshape(tl.trans(b, (2, 5, 0, 4, 6, 3, 1)), (S, 32, BLOCK_M))
            new, total = (), ()
            for t in tl.static_range(T):
                g = gs[t * (SPAN // SUB) + f // SUB]
                a = _numbers(ws[t * (SPAN // BLK) + f // BLK], hs[t] if BITS == 3 else 0, g & 255,
                             MASK, f % (256 if BITS == 3 else BLK) // 32, 1, S, 1, BITS, dt, ASM)
                a = tl.reshape(tl.trans(a, (0, 1, 4, 2, 6, 3, 5, 7)), (S, 16, 32))
                new += (tl.dot(a, b, part[t]),)
                if (f + 32) % SUB == 0:
                    scale = (g & 0xFFFFFF00).to(tl.float32, bitcast=True)
                    total += (acc[t] + new[t] * tl.reshape(scale, (S, 16, 1)),)
            part = new
            if (f + 32) % SUB == 0:
                acc = total
    m = tl.arange(0, BLOCK_M)
    for t in tl.static_range(T):
        n = (pid * T + t) * 16 + tl.arange(0, 16)
        tl.store(y + m[None, :] * N + n[:, None], tl.sum(acc[t], 0).to(dt),
                 mask=(m < M)[None, :] & (n < N)[:, None])

@triton.jit(do_not_specialize=["MASK"])
def _dequantize(words, high, grid, w, O, N, MASK, C: tl.constexpr, GROUP: tl.constexpr,
                BITS: tl.constexpr, S: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr,
                ASM: tl.constexpr):
    """w (N, C) in 16 bits; S spans of k for one tile of 16 outputs a program."""
    dt: tl.constexpr = w.dtype.element_ty
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW
    pid, k0 = tl.program_id(1), (tl.program_id(0) * S + tl.arange(0, S)) * SPAN
    ws, hs, gs = _fetch(words, high, grid, pid, k0[:, None, None], O, C, GROUP, BITS, SPAN, SUB,
                        C % (S * SPAN) == 0)
    i, r8 = tl.arange(0, 4)[:, None, None, None, None], tl.arange(0, 8)[None, :, None, None, None]
    n = pid * 16 + r8 + 8 * tl.arange(0, 2)[None, None, None, :, None]
    at = w + n.to(tl.int64) * C + i * 8 + tl.arange(0, 8)[None, None, None, None, :]
    for f in tl.static_range(0, SPAN, 32):
        g = gs[f // SUB]
        a = _numbers(ws[f // BLK], hs[0] if BITS == 3 else 0, g & 255, MASK,
                     f % (256 if BITS == 3 else BLK) // 32, 1, S, 1, BITS, dt, ASM)
        scale = tl.reshape((g & 0xFFFFFF00).to(tl.float32, bitcast=True), (S, 1, 2, 8))
        scale = tl.reshape(tl.trans(scale, (0, 1, 3, 2)), (S, 1, 8, 1, 2, 1, 1, 1))
        a = (a.to(tl.float32) * scale).to(dt)                          # s 1 r8 i r16 p plane h
        a = tl.reshape(tl.trans(a, (3, 2, 0, 1, 4, 5, 6, 7)), (4, 8, S, 2, 8))
        k = k0[None, None, :, None, None] + f
        tl.store(at + k, a, mask=(k < C) & (n < N))

@triton.jit
def _shuffle(x, out, tickets, n, tiles, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x's pairs of 16-bit floats, as int32, in the order of `_tile`'s k's; and zeros in tickets."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(tickets + at, 0, mask=at < tiles)
    k = at % 16                                        # plane p i -> i p plane
    k = at - k + k % 4 * 4 + k // 4 % 2 * 2 + k // 8
    tl.store(out + at, tl.load(x + k, mask=at < n), mask=at < n)
    if PDL:        # last: programs of `_tile` that start beside these would crowd some processors
        tl.extra.cuda.gdc_launch_dependents()

@triton.constexpr_function
def _scale_asm(n, dt):
    """Wait for wgmma, then multiply n pairs of floats, $(i + n), by $(i + 2 n) into $i."""
    kind = "bf16x2" if dt == tl.bfloat16 else "f16x2"
    return "wgmma.wait_group.sync.aligned 0; " + " ".join(
        f"mul.rn.{kind} ${i}, ${i + n}, ${i + 2 * n};" for i in range(n))

@triton.constexpr_function
def _registers(n):
    return ",".join(["=&r"] * n + ["r"] * 2 * n)

@triton.jit
def _scaled(a, g, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr):
    """`_numbers` times their scales, as an operand (BLOCK_N, BLOCK_K).

    Triton 3.6 unpacks the next step's numbers while wgmma multiplies, but would do so in the very
    registers that wgmma still reads. So these products, 2 PAIRS a piece of assembly, wait for it.
    """
    scale = tl.reshape((g & 0xFFFFFF00).to(tl.float32, bitcast=True), (BLOCK_N // 16, 1, 2, 8))
    scale = tl.reshape(tl.trans(scale, (0, 1, 3, 2)), (BLOCK_N // 16, 1, 8, 1, 2, 1, 1, 1))
    a, scale = tl.broadcast(a, scale.to(a.dtype))
    a = tl.reshape(tl.trans(a, (0, 4, 2, 1, 6, 5, 3, 7)), (BLOCK_N, BLOCK_K))
    scale = tl.reshape(tl.trans(scale, (0, 4, 2, 1, 6, 5, 3, 7)), (BLOCK_N, BLOCK_K))
    if PAIRS:
        return tl.inline_asm_elementwise(_scale_asm(PAIRS, a.dtype), _registers(PAIRS), [a, scale],
                                         a.dtype, False, 2 * PAIRS)
    else:
        return a * scale

@triton.jit(do_not_specialize=["M", "MASK"])
def _tile(x, words, high, grid, y, parts, tickets, M, O, N, MASK, C: tl.constexpr,
          GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, PAIRS: tl.constexpr,
          TMA: tl.constexpr, PDL: tl.constexpr):
    """One tile of outputs x tokens over one of SPLIT parts of k; x comes from `_shuffle`, with TMA
    as a tensor descriptor.

    The weights are wgmma's left operand, which may lie in registers. With SPLIT > 1 each program
    leaves its sum in `parts`, and a tile's last program adds them up in their order.
    """
    dt: tl.constexpr = y.dtype.element_ty
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW
    ROW: tl.constexpr = (C + 255) // 256 * 256
    T: tl.constexpr = BLOCK_N // 16
    B: tl.constexpr = BLOCK_K // BLK if BLOCK_K > BLK else 1           # blocks of words a step
    rows = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)                             # the tiles of one weight run side by side
    m = pid % rows * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.minimum(pid // rows * T + tl.arange(0, T), O // 16 - 1)[:, None, None]
    u, r = tl.arange(0, 128)[None, None, :], tl.arange(0, 16)[None, None, :]
    if not TMA:
        xs = x + m[None, :] * C + tl.arange(0, BLOCK_K)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(1) * (C // BLOCK_K // SPLIT)
    if PDL:
        tl.extra.cuda.gdc_wait()                       # for x and the tickets
    for step in range(0, C // BLOCK_K // SPLIT):
        k = (first + step) * BLOCK_K
        block = t * (ROW // BLK) + k // BLK + tl.arange(0, B)[None, :, None]
        w = tl.load(words + block * 128 + u)
        if BLOCK_K < BLK:
            w = w.to(tl.uint32, bitcast=True) >> k % BLK // 16 * LOW
        h = 0
        if BITS == 3:
            h = tl.load(high + (t * (ROW // 256) + k // 256) * 128 + u)
            h = h.to(tl.uint32, bitcast=True) >> k % 256 // 64 * 4 + k % 64 // 32
        g = tl.load(grid + k // GROUP * O + t * 16 + r).to(tl.uint32, bitcast=True)
        a = _numbers(w, h, g & 255, MASK, 0, BLOCK_K // B // 32, T, B, BITS, dt, ASM)
        b = x.load([pid % rows * BLOCK_M, k]).T if TMA else tl.load(xs + k)        # (k, tokens)
        acc = tl.dot(_scaled(a, g, BLOCK_N, BLOCK_K, PAIRS), b, acc)
    if SPLIT > 1:
        size: tl.constexpr = BLOCK_N * BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(parts + (pid * SPLIT + tl.program_id(1)) * size + at, acc)
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets + pid, 1, sem="acq_rel")
        if ticket < SPLIT - 1:
            return
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in range(0, SPLIT):
            acc += tl.load(parts + (pid * SPLIT + i) * size + at)
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(dt),
             mask=(m < M)[None, :] & (n < N)[:, None])

# In the interpreter, plain Triton; on a Hopper GPU, `_tile`'s assembly and loads of whole tiles.
ASM = isinstance(_half, triton.JITFunction) and torch.version.hip is None
TMA = HOPPER = ASM and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DECODE = {    # (bits, tokens up to): tiles of 16 outputs a warp, k's a step, wait for the loads?
    # Measured on an H100. One tile: more programs in flight hide the memory's latency. From 9
    # tokens on reading x costs more than that, and two tiles share it. 256 k's: 512 cost registers
    # and with them warps. The barrier brings the loads forward, but a warp then waits for three.
    (1, 8): (1, 256, True), (2, 8): (1, 256, True), (3, 8): (1, 256, True),
    (4, 8): (1, 256, True), (8, 8): (1, 128, True),
    (1, 16): (2, 256, False), (2, 16): (2, 256, False), (3, 16): (2, 256, True),
    (4, 16): (2, 256, False), (8, 16): (1, 128, False)}
DECODE_FEW = {(1, 16): (1, 256, False), (3, 16): (1, 256, False)}      # instead, for few outputs
TILE = {      # BLOCK_M: BLOCK_N, BLOCK_K, warps, stages, and programs worth splitting k for
    # 4 warps: two programs an SM, so that one unpacks while the other multiplies; splitting k for
    # more of them than 264 cost time. At 256 tokens the sums fill the registers of 8 warps, and
    # the weights of 64 k's twice, unpacked and in use, what those leave.
    32: (64, 128, 4, 4, 264), 64: (64, 128, 4, 4, 264), 128: (64, 128, 4, 3, 264),
    256: (128, 64, 8, 3, 132)}
# With x by Hopper's TMA. 256 tokens: another stage. 128, at 8 bits only: twice the outputs, which
# read x half as often (38 us for 45 at 96 tokens, 14336 x 4096), if there are enough of them.
TILE_TMA = {256: (128, 64, 8, 4), 128: (128, 128, 8, 3)}
# Above so many tokens the weight is written out. 14336 x 4096, us by _tile and written out: 2,048
# tokens at 4 bits 384 and 424, at 8 bits 436 and 425; 4,096 tokens 790 and 738, 868 and 750.
FUSED = 1024
PIECE = 2 * 132 * 256 * 128                            # outputs x tokens: two tiles of cuBLAS an SM

def plan(M, w):
    """How lowbit_matmul multiplies M <= FUSED tokens: kernel, grid, its constants, its options."""
    (O, C), bits, tiles = w.shape, w.bits, len(w.words)
    constants = dict(C=C, GROUP=w.group, BITS=bits, ASM=ASM)
    if M <= 16:
        BLOCK_M = 8 if M <= 8 else 16
        few = O <= 8192
        T, SPAN, WAIT = few and DECODE_FEW.get((bits, BLOCK_M)) or DECODE[bits, BLOCK_M]
        T, S = T if tiles % T == 0 else 1, 8 if few else 4             # few outputs: split k more
        constants.update(S=S, T=T, BLOCK_M=BLOCK_M, SPAN=SPAN, SUB=math.gcd(SPAN, w.group),
                         WAIT=WAIT)
        return _decode, (tiles // T,), constants, dict(num_warps=S, num_stages=1)
    BLOCK_M = min(max(32, triton.next_power_of_2(M)), 256)
    if triton.cdiv(O, 128) * triton.cdiv(M, 256) <= 66:                # of the 132 SMs
        BLOCK_M = min(BLOCK_M, 128)
    BLOCK_N, BLOCK_K, warps, stages, enough = TILE[BLOCK_M]
    tiles = triton.cdiv(O, BLOCK_N) * triton.cdiv(M, BLOCK_M)
    # x by Hopper's TMA, 1 to 14 % faster; not where k is split, up to 10 % slower in so few steps
    eager = not torch.compiler.is_compiling()
    tma = TMA and eager and M > 32 and tiles * 2 > enough
    if tma and (BLOCK_M == 256 or BLOCK_M == 128 and bits == 8 and tiles > 200):
        BLOCK_N, BLOCK_K, warps, stages = TILE_TMA[BLOCK_M]
        tiles = triton.cdiv(O, BLOCK_N) * triton.cdiv(M, BLOCK_M)
    BLOCK_K = math.gcd(BLOCK_K, w.group, C)
    SPLIT = max(s for s in (1, 2, 4, 8)
                if s == 1 or not tma and tiles * s <= enough and C // BLOCK_K % s == 0)
    pairs = min(BLOCK_N * BLOCK_K // warps // 64, 16)                  # of a thread
    constants.update(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, SPLIT=SPLIT,
                     PAIRS=pairs if HOPPER else 0, TMA=tma, PDL=HOPPER and eager)
    return _tile, (tiles, SPLIT), constants, dict(num_warps=warps, num_stages=stages,
                                                  **launch(HOPPER and eager))

def lowbit_matmul(x, w):
    """y = x w_hat^T: x (..., C) float16 or bfloat16 on w's GPU, w a LowBit -> (..., O)."""
    O, C = w.shape
    flat = x.reshape(-1, C).contiguous()                                           # (M, C)
    M = len(flat)
    y, scratch = x.new_empty(M, O), ()
    if M > FUSED:
        n = max(1, PIECE // M // 128) * 128            # outputs
        for i in range(0, O, n):
            part = LowBit(w.words[i // 16:(i + n) // 16], w.high[i // 16:(i + n) // 16],
                          w.grid[:, i:i + n], w.bits, w.group, (min(n, O - i), C))
            torch.mm(flat, write_out(part, x.dtype).T, out=y[:, i:i + n])
        return y.view(*x.shape[:-1], O)
    kernel, grid, constants, options = plan(M, w)
    if kernel is _tile:
        SPLIT, size = constants["SPLIT"], constants["BLOCK_M"] * constants["BLOCK_N"]
        parts = x.new_empty(grid[0] * SPLIT * size if SPLIT > 1 else 0, dtype=torch.float32)
        scratch = parts, w.words.new_empty(grid[0])
        # For whole tiles: programs that all read the last token again took up to twice as long.
        rows = triton.cdiv(M, constants["BLOCK_M"]) * constants["BLOCK_M"]
        pairs, flat = flat.view(torch.int32), x.new_empty(rows, C)
        _shuffle[triton.cdiv(pairs.numel(), 1024),](
            pairs, flat.view(torch.int32), scratch[1], pairs.numel(), grid[0], BLOCK=1024,
            PDL=constants["PDL"])
        if constants["TMA"]:
            block = [constants["BLOCK_M"], constants["BLOCK_K"]]
            flat = TensorDescriptor.from_tensor(flat, block)
    kernel[grid](flat, *w[:3], y, *scratch, M, w.grid.size(1), O, _mask(w.bits, x.dtype),
                 **constants, **options)
    return y.view(*x.shape[:-1], O)

def _mask(bits, dtype):
    """Of one field, in both halves of a word; of 8 bits what bfloat16's mantissa holds."""
    field = 7 if bits == 8 and dtype == torch.bfloat16 else 2 if bits == 3 else bits
    return (2**field - 1) * 0x10001

def write_out(w, dtype):
    """The weight (O, C) of a LowBit in 16 bits, by `_dequantize`."""
    (O, C), bits = w.shape, w.bits
    out = torch.empty(O, C, dtype=dtype, device=w.words.device)
    S, SPAN = 4, 256 if bits in (1, 3) else 128
    _dequantize[triton.cdiv(C, S * SPAN), len(w.words)](
        *w[:3], out, w.grid.stride(0), O, _mask(bits, dtype), C, w.group, bits, S, SPAN,
        math.gcd(SPAN, w.group), ASM, num_warps=S)
    return out

# ---- QuEST: rotation, scale, codes and trust mask in one pass ---------------------------------
# H is orthonormal: a row has one root mean square, rotated or not. Codes are integers
# around zero, 2 q + 1 (ternary: 2 q), so that no product has to make up for the grid's half step;
# only at 8 bits, where that would leave int8, they are q. A program loads H once.

@triton.jit
def _row_scale(square, C, CLIP: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr,
               ROWS: tl.constexpr, NB: tl.constexpr):
    """Squares (ROWS NB, h), which add up to C times a row's mean -> scale (ROWS,), (ROWS NB, 1)."""
    square = tl.sum(tl.reshape(tl.sum(square, 1), (ROWS, NB)), 1)
    s = (CLIP * tl.sqrt(square / C) + EPS) * (2.0 / TOP)
    return s, tl.reshape(tl.broadcast_to(s[:, None], (ROWS, NB)), (ROWS * NB,))[:, None]

@triton.jit
def _hadamard_quantize(x, signs, codes, scale, sums, values, trusted, T, C: tl.constexpr,
                       CLIP: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr,
                       SHIFT: tl.constexpr, LIMIT: tl.constexpr, PLANES: tl.constexpr,
                       TRAIN: tl.constexpr, n: tl.constexpr, HALVES: tl.constexpr,
                       NB: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    """signs: H (h, h), h = n / HALVES; two halves a, b of a block give a H + b H and a H - b H."""
    LOW: tl.constexpr = SHIFT - 0.5 - 0.5 * TOP        # the least integer; LOW + TOP the largest
    ODD: tl.constexpr = 1 if SHIFT == 0.0 else 0
    h: tl.constexpr = n // HALVES
    WIDE: tl.constexpr = h // PLANES                   # columns of one half in one plane
    i, r, col = tl.arange(0, ROWS * NB), tl.arange(0, ROWS), tl.arange(0, h)
    order, place = col % WIDE * PLANES + col // WIDE, col
    if HALVES == 2:
        place = col // WIDE * (2 * WIDE) + col % WIDE
    H = tl.trans(tl.load(signs + order[:, None] * h + col[None, :]))       # (h, h)
    start = (i // NB * C + i % NB * n)[:, None]                            # NB blocks of n a row
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0),
                         num_stages=STAGES):
        at, out = tl.cast(tile, tl.int64) * (ROWS * C), tile * ROWS + r
        live = ((tile * ROWS + i // NB < T) & (i % NB < C // n))[:, None]
        v = tl.load(x + at + (start + col[None, :]), mask=live, other=0.0)         # (ROWS NB, h)
        unit, far = 1.0, LIMIT
        if x.dtype.element_ty == tl.float32:           # two float16 hold 22 bits of v / scale
            s, each = _row_scale(v * v, C, CLIP, EPS, TOP, ROWS, NB)
            v *= n**-0.5 / each
            high = v.to(tl.float16)
            us = (tl.dot(high, H, tl.dot((v - high.to(tl.float32)).to(tl.float16), H)),)
        else:                                          # tensor cores read v where it lies
            u = tl.dot(v, H)
            us, square = (u,), u * u
            if HALVES == 2:
                late = tl.dot(tl.load(x + at + (start + h + col[None, :]), mask=live, other=0.0), H)
                us = (u + late, u - late)
                square = us[0] * us[0] + us[1] * us[1]
            s, each = _row_scale(square, C * n, CLIP, EPS, TOP, ROWS, NB)
            unit, far = n**-0.5 / each, each * (LIMIT * n**0.5)
        total = tl.zeros((ROWS * NB,), tl.int32)
        for half in tl.static_range(HALVES):
            near = tl.minimum(tl.maximum(us[half] * unit + (SHIFT - 0.5), LOW), LOW + TOP)
            near += 12582912.0                         # 1.5 * 2^23: rounds to the nearest
            q = near.to(tl.int32, bitcast=True) - 0x4B400000               # its bits without q
            c = 2 * q + ODD
            to = at + (start + half * WIDE + place[None, :])
            tl.store(codes + to, (c if TOP < 128 else q).to(tl.int8), mask=live)
            total += tl.sum(c, 1)
        total = tl.sum(tl.reshape(total, (ROWS, NB)), 1) - (NB * n - C) * ODD
        tl.store(scale + out, s, mask=out < T)
        tl.store(sums + out, total, mask=out < T)
        if TRAIN:                                      # with HALVES = 1
            value = (near - 12582912.0 + 0.5 * ODD) * each
            tl.store(values + to, value.to(values.dtype.element_ty), mask=live)
            bit = (tl.abs(us[0]) <= far).to(tl.int32) << (col % 8)[None, :]
            byte = tl.sum(tl.reshape(bit, (ROWS * NB, n // 8, 8)), 2).to(tl.uint8)
            tl.store(trusted + at // 8 + (start // 8 + tl.arange(0, n // 8)[None, :]), byte,
                     mask=live)

# (blocks a tile, warps, tiles in flight, programs), the fastest measured on an H100. 64 blocks are
# the least that its wide tensor-core instruction takes; more, or more than two programs an SM, did
# not pay, tiles loaded ahead did. Float32 takes too many registers for 64, and rows of more than 64
# blocks need wider tiles. For codes alone H comes in halves: a quarter of it to wait for at the
# start and to hold in shared memory, which leaves room for more tiles in flight.
QUANTIZE, QUANTIZE_WIDE = (64, 4, 3, 264), (128, 4, 2, 264)
QUANTIZE_HALVES, QUANTIZE_HALVES_WIDE = (64, 4, 4, 264), (128, 8, 3, 264)
QUANTIZE_FLOAT32, ROTATE = (32, 4, 1, 264), (64, 4, 1, 396)

def quantize_tile(wide, train, n, NB):
    """HALVES and a tuple of these, for float32 rows (wide) or 16 bits, of NB blocks of n."""
    if wide or train or n < 32:                        # a dot takes 16 columns and more
        return 1, QUANTIZE_WIDE if NB > 64 else QUANTIZE_FLOAT32 if wide else QUANTIZE
    return 2, QUANTIZE_HALVES_WIDE if NB > 64 else QUANTIZE_HALVES

def hadamard_quantize(x, bits, dtype=None, planes=1):
    """Rows x (T, C) -> codes int8 (T, C) of rotate(x), scale float32 (T,), sums int32 (T,).

    sums: of 2 q + 1 (ternary: 2 q) over a row. With a dtype, for training, two more: values (T, C),
    the rotated rows on their grid, and trusted (T, C / 8), the trust mask, first column in the
    lowest bit. planes: of a block's n columns, planes i + f comes at f n / planes + i.
    x float16, bfloat16 or float32; n = gcd(C, 128) >= 16; C <= 32768.
    """
    (T, C), empty = x.shape, functools.partial(torch.empty, device=x.device)
    n, wide = math.gcd(C, 128), x.dtype == torch.float32
    out = [empty(T, C, dtype=torch.int8), empty(T), empty(T, dtype=torch.int32)]
    if dtype is not None:
        out += [empty(T, C, dtype=dtype), empty(T, C // 8, dtype=torch.uint8)]
    NB = triton.next_power_of_2(C // n)
    halves, (tile, warps, stages, programs) = quantize_tile(wide, dtype is not None, n, NB)
    ROWS = max(1, tile // NB)                          # whatever T: a row's sums keep their order
    tiles = triton.cdiv(T, ROWS)
    _hadamard_quantize[triton.cdiv(tiles, triton.cdiv(tiles, programs)),](
        x.contiguous(), hadamard_signs(n // halves, x.device, torch.float16 if wide else x.dtype),
        *out[:3], out[-2], out[-1], T, C, GAUSSIAN_CLIP[bits], EPS, 2.0 * clip_limit(bits),
        0.5 - code_offset(bits), trust_limit(bits), planes, dtype is not None, n, halves, NB, ROWS,
        stages, num_warps=warps)
    return out

@triton.jit
def _rotate_trusted(g, g2, g3, trusted, signs, out, blocks, COUNT: tl.constexpr,
                    n: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr):
    i, col, bits = tl.arange(0, R)[:, None], tl.arange(0, n)[None, :], tl.arange(0, 8)
    H = tl.load(signs + tl.arange(0, n)[:, None] * n + col)
    for tile in tl.range(tl.program_id(0), tl.cdiv(blocks, R), tl.num_programs(0),
                         num_stages=STAGES):
        live, at = tile * R + i < blocks, tl.cast(tile, tl.int64) * (R * n)
        v = tl.load(g + at + (i * n + col), mask=live, other=0.0)          # (R, n)
        if COUNT > 1:
            v = v.to(tl.float32) + tl.load(g2 + at + (i * n + col), mask=live, other=0.0)
        if COUNT > 2:
            v += tl.load(g3 + at + (i * n + col), mask=live, other=0.0)
        byte = tl.load(trusted + at // 8 + (i * (n // 8) + tl.arange(0, n // 8)[None, :]),
                       mask=live, other=0)
        keep = tl.reshape(byte[:, :, None] >> bits & 1, (R, n)) != 0
        h = tl.dot(tl.where(keep, v, 0.0).to(signs.dtype.element_ty), H) * n**-0.5
        tl.store(out + at + (i * n + col), h.to(out.dtype.element_ty), mask=live)

def rotate_trusted(gs, trusted, dtype):
    """rotate(sum(gs) * mask) in dtype: QuEST's backward pass. gs: up to three (T, C) of float16 or
    bfloat16; trusted of hadamard_quantize. Products are exact, sums are float32 (and rounded once
    before the rotation where there are several)."""
    g, (R, warps, stages, programs) = gs[0].contiguous(), ROTATE
    n, out = math.gcd(g.size(1), 128), torch.empty(g.shape, dtype=dtype, device=g.device)
    _rotate_trusted[min(triton.cdiv(g.numel() // n, R), programs),](
        g, gs[len(gs) // 2].contiguous(), gs[-1].contiguous(), trusted,
        hadamard_signs(n, g.device, g.dtype), out, g.numel() // n, len(gs), n, R, stages,
        num_warps=warps)
    return out

# ---- QuEST: integer matmul ----------------------------------------------------------------------
# The weight is the left operand, which Hopper's tensor cores take from registers: codes of 1, 2, 4
# or 8 bits go there from packed words, as checkpoints hold them. Four codes at a time are moved to
# the top of their bytes and the bit below is set: 2^(8 - b) (q + 1/2), two instructions for four.

@triton.jit
def _tile_of(i, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """First token and first output of tile i: 8 rows of tiles go together, L2 holds them."""
    tiles, wide = tl.cdiv(M, BM), tl.cdiv(N, BN)
    high = tl.minimum(wide - i // (8 * tiles) * 8, 8)
    return i % (8 * tiles) // high * BM, (i // (8 * tiles) * 8 + i % (8 * tiles) % high) * BN

@triton.jit
def _quest_matmul(a, a_scale, a_sum, w, w_scale, w_sum, y, M, N, K: tl.constexpr, b: tl.constexpr,
                  HALF: tl.constexpr, A8: tl.constexpr, W8: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr):
    m, n = _tile_of(tl.program_id(0), M, N, BM, BN)
    m, n = m + tl.arange(0, BM), n + tl.arange(0, BN)
    PLANES: tl.constexpr = 8 // b
    WIDE: tl.constexpr = 128 // PLANES
    j, live, row = tl.arange(0, BK // PLANES), (m < M)[None, :], (n % N).to(tl.int64)[:, None] * K
    w8 = w.to(tl.pointer_type(tl.int8), bitcast=True) + row + j[None, :]
    w += row // 32 * b + tl.arange(0, BK * b // 32)[None, :]
    a += m.to(tl.int64)[None, :] * K
    acc = tl.zeros((BN, BM), tl.int32)
    for k in range(0, K, BK):
        if A8 and W8:                                  # the registers are needed for the sums
            acc = tl.dot(tl.load(w8 + k), tl.load(a + (k + j)[:, None], mask=live, other=0), acc,
                         out_dtype=tl.int32)
        else:
            words = tl.load(w + k // 32 * b).to(tl.uint32)                 # (BN, BK b / 32)
            for f in tl.static_range(PLANES):
                top = (words << (8 - b - b * f)) & (0x01010101 * (256 - 2**(8 - b))) | HALF
                b0, b1 = top.to(tl.int8), (top >> 8).to(tl.int8)
                b2, b3 = (top >> 16).to(tl.int8), (top >> 24).to(tl.int8)
                tile = tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (BN, BK // PLANES))
                at = k + j // WIDE * 128 + f * WIDE + j % WIDE             # this plane's columns
                acc = tl.dot(tile, tl.load(a + at[:, None], mask=live, other=0), acc,
                             out_dtype=tl.int32)
    acc *= (2 if A8 else 1) * (2 if W8 else 1)         # and the half steps that 8-bit codes lack:
    if A8:
        acc += (tl.load(w_sum + n % N) * 2**(7 - b if b < 8 else 0))[:, None]
    if W8:
        acc += tl.load(a_sum + m[None, :], mask=live, other=0) - (K if A8 else 0)
    unit = 0.25 if b == 8 else 2.0**(b - 9)
    out = acc.to(tl.float32) * (unit * tl.load(w_scale + n % N))[:, None]
    out = tl.trans(out * tl.load(a_scale + m[None, :], mask=live, other=0.0))      # (BM, BN)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], out.to(y.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])

@triton.jit
def _quest_matmul_tma(a, a_scale, a_sum, w, w_scale, w_sum, y, M, N, K: tl.constexpr,
                      A8: tl.constexpr, W8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                      BK: tl.constexpr, STAGES: tl.constexpr):
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0),
                      flatten=True):                   # loads of the next tile go on below
        m, n = _tile_of(i, M, N, BM, BN)
        acc = tl.zeros((BM, BN), tl.int32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            acc = tl.dot(a.load([m, k]), w.load([n, k]).T, acc, out_dtype=tl.int32)
        at_m, at_n = (m + tl.arange(0, BM)) % M, (n + tl.arange(0, BN)) % N
        acc *= (2 if A8 else 1) * (2 if W8 else 1)
        if A8:
            acc += tl.load(w_sum + at_n)[None, :]
        if W8:
            acc += tl.load(a_sum + at_m)[:, None] - (K if A8 else 0)
        out = acc.to(tl.float32) * (0.25 * tl.load(w_scale + at_n))[None, :]
        out = (out * tl.load(a_scale + at_m)[:, None]).to(y.dtype)
        halves = tl.permute(tl.reshape(out, (BM, 2, BN // 2)), (0, 2, 1))  # for shared memory
        left, right = tl.split(halves)
        y.store([m, n], left)
        y.store([m, n + BN // 2], right)

# (most tokens, BM, BN, BK, warps, stages). A few tokens: small tiles, so that there are programs
# enough to read the weight at the pace of memory. Many: two programs of 8 warps share a processor
# and hide each other's waits; for 8 x 8 bits one with twice the tokens, which halves the traffic.
# QUEST_TMA is for as many tiles as there are processors: what limits them is the traffic from L2,
# 6 to 7 TB/s, and tiles that Hopper's TMA loads leave registers and time for tiles twice the size.
QUEST_TILES = ((16, 16, 64, 256, 4, 4), (64, 64, 64, 256, 4, 3), (2**31, 128, 128, 128, 8, 4))
QUEST_TILE_8x8, QUEST_TMA, PROCESSORS = (256, 128, 128, 8, 4), (128, 256, 128, 8, 4), 132

def quest_matmul(a, w, a_bits, bits, dtype):
    """QuEST inputs times QuEST weights, (M, N) in dtype; sums are exact integers.

    a: codes (M, K), scale, sums of hadamard_quantize. w: the same of a weight (N, K), or what
    quest_operand gives: codes uint8 (N, K b / 8), b = 1, 2 or 4, for which a's codes come in
    planes = 8 / b. 128 divides K (at b = 1 256) and K <= 32512.
    """
    (M, K), N, b = a[0].shape, w[0].size(0), 8 * w[0].size(1) // a[0].size(1)
    y = torch.empty(M, N, dtype=dtype, device=a[0].device)
    BM, BN, BK, warps, stages = QUEST_TMA              # torch.compile: its descriptors are untried
    if (TMA and b == 8 and triton.cdiv(M, BM) * triton.cdiv(N, BN) >= PROCESSORS and N % 8 == 0
            and dtype.itemsize == 2 and not torch.compiler.is_compiling()):
        _quest_matmul_tma[PROCESSORS,](
            TensorDescriptor.from_tensor(a[0], [BM, BK]), *a[1:3],
            TensorDescriptor.from_tensor(w[0].view(torch.int8), [BN, BK]), *w[1:3],
            TensorDescriptor.from_tensor(y, [BM, BN // 2]), M, N, K, a_bits == 8, bits == 8, BM,
            BN, BK, stages, num_warps=warps)
        return y
    BM, BN, BK, warps, stages = next(tile[1:] for tile in QUEST_TILES if M <= tile[0])
    if M > 64 and a_bits == bits == 8:
        BM, BN, BK, warps, stages = QUEST_TILE_8x8
    BK = math.gcd(K, 256 if b == 1 else BK)            # a plane of a tile has 32 columns at least
    _quest_matmul[triton.cdiv(M, BM) * triton.cdiv(N, BN),](
        *a[:3], w[0].view(torch.int32), *w[1:3], y, M, N, K, b,
        0 if bits == 1.58 or b == 8 else 0x01010101 << (7 - b), a_bits == 8, bits == 8, BM, BN, BK,
        num_warps=warps, num_stages=stages)
    return y

def quest_operand(packed, scale, bits, K):
    """A checkpoint's packed weight and scale -> w of quest_matmul. 1, 2, 4 and 8 bits stay as they
    are; 1.58 and 3 bits (and 1 where 256 does not divide K) get 4, 5 to 7 bits get 8."""
    q = unpack(packed, bits, K, signed=True)
    sums = 2 * (q.to(torch.int32) + code_offset(bits)).sum(1)
    if bits in (1.58, 3) or bits == 1 and K % 256:
        packed = pack(q, 4)
    elif bits > 4:
        packed = q if bits == 8 else 2 * q + 1
    return packed, scale.view(-1), sums.to(torch.int32)

def quest_linear(x, w, a_bits, bits):
    """QuantLinear's forward for QuEST: x (..., K), w of quest_operand -> (..., N)."""
    a = hadamard_quantize(x.flatten(0, -2), a_bits, planes=x.size(-1) // w[0].size(1))
    return quest_matmul(a, w, a_bits, bits, x.dtype).view(*x.shape[:-1], -1)

def quest_fits(x, bits, a_bits):
    """Whether the kernels above take inputs x (..., K) on the uniform grid."""
    return (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and max(bits, a_bits) <= 8
            and x.numel() > 0 and x.size(-1) % 128 == 0 and x.size(-1) <= 32512)

# ---- Additive codebooks -------------------------------------------------------------------------
# A codebook has 256 vectors of 8. Against one token's 8 inputs they have 256 products, a small
# table; then every code of these inputs is a look-up and an addition in place of 8 multiplications.
# `_vq_tables` makes the tables, `_vq_lookups` adds up: its warps walk along the outputs, so that 32
# look-ups go to one table of 512 bytes in L1. (Lanes along the groups would touch 32 lines each
# time, and take three times as long: hence outputs come first in its tensors.) Triton must not know
# what divides N, or a thread loads four words of codes, which then go through shared memory.

@triton.jit
def _vq_tables(x, books, tables, tickets, G, R: tl.constexpr, CODES: tl.constexpr,
               TILES: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()          # the look-ups' programs may load codes now
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(tickets + tl.arange(0, TILES), tl.zeros((TILES,), tl.int32))
    r, e = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, 16)        # 8 inputs and 8 zeros
    c, token = tl.program_id(1) * CODES + tl.arange(0, CODES), tl.program_id(0) * R // G
    v = tl.load(x + r[:, None] * 8 + e[None, :], mask=(e < 8)[None, :], other=0.0)         # (R, 16)
    book = tl.load(books + c[None, :] * 8 + e[:, None], mask=(e < 8)[:, None], other=0.0)
    row = (token * (tl.num_programs(1) * CODES // 256) + c // 256)[None, :] * G + (r % G)[:, None]
    tl.store(tables + row * 256 + (c % 256)[None, :], tl.dot(v, book).to(tables.dtype.element_ty))

@triton.jit(do_not_specialize=["N"])
def _vq_lookups(tables, codes, scales, parts, tickets, y, tokens, N, ROWS: tl.constexpr,
                R: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
                PDL: tl.constexpr, UNROLL: tl.constexpr):
    tile, part = tl.program_id(0), tl.program_id(1)
    i, j = tile * (BN // 4) + tl.arange(0, BN // 4), tl.arange(0, 4)       # output 4 i + j
    q, token = tl.arange(0, R * TOKENS) % R, tl.arange(0, R * TOKENS) // R
    codes = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    acc = tl.zeros((BN // 4, R * TOKENS, 4), tl.float32)
    first = part * (ROWS // SPLIT) + q                 # rows of codes: codebook * G + group
    inside = (i < N // 4)[:, None]
    word = tl.load(codes + first[None, :] * (N // 4) + i[:, None], mask=inside, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()                       # the tables are there
    for k in tl.range(0, ROWS // SPLIT, R, loop_unroll_factor=UNROLL):
        row, now = first + k, word                     # the next codes come ahead of their use
        word = tl.load(codes + (row + R)[None, :] * (N // 4) + i[:, None],
                       mask=inside & (k + R < ROWS // SPLIT), other=0)
        at = (tl.minimum(token, tokens - 1) * ROWS + row) * 256
        code = now[:, :, None] >> (8 * j)[None, None, :] & 255
        acc += tl.load(tables + at[None, :, None] + code).to(tl.float32)
    sums = tl.sum(tl.reshape(acc, (BN // 4, TOKENS, R, 4)), 2)             # (BN / 4, TOKENS, 4)
    t = tl.arange(0, TOKENS)[None, :, None]
    at = t * N + (4 * i)[:, None, None] + j[None, None, :]
    live = (t < tokens) & (i < N // 4)[:, None, None]
    tl.store(parts + part * tokens * N + at, sums, mask=live)
    tl.debug_barrier()
    if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLIT - 1:   # all parts are there: the
        sums = tl.zeros((BN // 4, TOKENS, 4), tl.float32)              # same order every time
        for p in tl.range(SPLIT, loop_unroll_factor=16 // TOKENS):
            sums += tl.load(parts + p * tokens * N + at, mask=live, other=0.0, cache_modifier=".cg")
        n = (4 * i)[:, None, None] + j[None, None, :]
        sums *= tl.load(scales + n, mask=n < N, other=0.0)
        tl.store(y + at, sums.to(y.dtype.element_ty), mask=live)

# (most outputs, outputs a program, the least programs, tables a step, warps, steps unrolled), the
# fastest measured on an H100.
VQ_TILES = ((8192, 256, 256, 32, 4, 2), (2**31, 512, 256, 16, 4, 1))

def vq_matmul(x, codes, codebooks, scales):
    """x (B, 8 G) times a weight of additive codebooks -> (B, N), in x's dtype.

    codes uint8 (M, G, N): a checkpoint's (N, G, M) as permute(2, 1, 0).contiguous(); codebooks
    (M, 256, 8) in x's dtype, float16 or bfloat16, which the tables have as well; scales float32
    (N,). The kernel takes up to 4 tokens, 32 | G and 16 | N; PyTorch and cuBLAS the rest.
    """
    B, (M, G, N) = len(x), codes.shape
    if B > 4 or G % 32 or N % 16 or codebooks.shape != (M, 256, 8) or x.dtype == torch.float32:
        return vq_matmul_reference(x, codes, codebooks, scales)
    BN, programs, R, warps, unroll = next(tile[1:] for tile in VQ_TILES if N <= tile[0])
    TOKENS, tiles = triton.next_power_of_2(B), triton.cdiv(N, BN)
    R //= TOKENS
    SPLIT = math.gcd(M * G // R, triton.next_power_of_2(triton.cdiv(programs, tiles)))
    TILES, early = triton.next_power_of_2(tiles), HOPPER and not torch.compiler.is_compiling()
    tables, parts = x.new_empty(B * M * G * 256), scales.new_empty(SPLIT * B * N)
    tickets, y = codes.new_empty(TILES, dtype=torch.int32), x.new_empty(B, N)
    _vq_tables[B * G // 16, 2 * M](x.contiguous(), codebooks, tables, tickets, G, 16, 128, TILES,
                                   early, num_warps=2)
    _vq_lookups[tiles, SPLIT](tables, codes, scales, parts, tickets, y, B, N, M * G, R, TOKENS, BN,
                              SPLIT, early, unroll, num_warps=warps, **launch(early))
    return y

def vq_matmul_reference(x, codes, codebooks, scales):
    """The same by a dense weight (N, 8 G): row n's vectors are sums of codebooks[m, codes[m, g, n]]
    over m."""
    w = sum(book[index.long()] for book, index in zip(codebooks, codes))          # (G, N, 8)
    return F.linear(x, w.transpose(0, 1).flatten(1)) * scales.to(x.dtype)

FORMS = {  # of QuantLinear: its product, and what makes the weight for it
    "affine": (affine_product, affine_operand), "quest": (quest_product, quest_layer_operand),
    "vq": (vq_product, vq_operand)}
