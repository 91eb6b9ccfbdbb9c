"""Triton kernels for packed layers: a plain one first, then fast ones for an H100.

    python kernels.py                 # one 4-bit layer, plain and tuned against cuBLAS: a minute
    python tests/time_kernels.py      # this GPU: every shape, bits and number of tokens, and peers

What limits y = x w_hat^T, for M tokens and a weight of O outputs and C inputs?

  A few tokens: bytes of weights. Even one token's product has to read all O x C weights, and it
  uses each of them once. An H100 reads 3.0 TB/s: a weight of 14336 x 4096 takes 39 us in bfloat16
  and 10 us in 4 bits. This is where packed weights pay. But unpacking has to keep up: while memory
  delivers one weight of b bits, the processors issue about 1.2 b instructions (of one lane) for it,
  five at 4 bits. A kernel that spends ten on a weight waits for itself, not for the memory.

  Many tokens: tensor cores. 2 M O C operations at 790 TFLOP/s take longer than reading 4-bit
  weights from about 65 tokens on. The operations are those of a dense product, so packed weights
  gain nothing any more; the aim is to lose nothing. A weight is unpacked once for a whole tile of
  tokens, as many as the registers hold sums for, and while the tensor cores multiply one step of k
  the next one is unpacked. Where tokens are very many, even that costs more than writing out the
  weight in 16 bits, once, and calling cuBLAS.

  QuEST has 8-bit integers on both sides, for which the tensor cores are twice as fast. So there
  many tokens gain as well.

How the file goes:

  the plain kernel      reads a checkpoint's own bytes; any group, 1 to 8 bits. The product on GPUs
                        other than Hopper up to 1024 tokens, and what the tests hold the tuned
                        kernels to. Then, in a list, why it is slow
  the packed order      how the tuned kernels want the bits to lie, and why
  the fields of a word  `_numbers`: from words to the floats that the tensor cores take
  up to 16 tokens       `_decode`: weights go from memory straight into tensor cores' registers
  up to 1024 tokens     `_tile`: tiles of tokens; words and x come by way of shared memory, the
                        unpacked weights stay in registers
  more                  `_dequantize`: parts of the weight in 16 bits, and cuBLAS
  which of the three    and in which tiles: plain Python
  QuEST                 `hadamard_quantize` (rotation, scale, codes and trust mask in one pass),
                        `rotate_trusted` (the backward pass), `quest_matmul` (integers)
  additive codebooks    `vq_matmul`: products by look-ups
  GPTQ's columns        `gptq_columns`: the column loop of quantizers.gptq
  what a layer calls    `linear(layer, x)`; last, the minute that `python kernels.py` takes

Shapes: M tokens, O output and C input channels, g = group_size, G = C / g groups. Tile sizes and
splits of k are chosen by functions of plain Python, from small tables measured on an H100.
"""
import importlib.metadata
import math
import warnings
import weakref
from typing import Callable, NamedTuple

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

from quantizers import (EPS, GAUSSIAN_CLIP, clip_limit, code_offset, hadamard_signs, pack, rtn,
                        trust_limit, unpack)

# ---- The plain kernel ---------------------------------------------------------------------------

@triton.jit
def _plain(x, packed, scale, zero_point, y, M, O, C: tl.constexpr, GROUP: tl.constexpr,
           BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of y: BLOCK_M tokens times BLOCK_N outputs. packed is what quantizers.pack gives."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]        # (BLOCK_M, 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]        # (1, BLOCK_N)
    row = n * ((C * BITS + 7) // 8)                                        # n's first byte
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, C, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)                                     # (BLOCK_K,)
        xs = tl.load(x + m * C + k[None, :], mask=(m < M) & (k < C)[None, :], other=0.0)

        # Code k has BITS bits from bit k BITS of its row on. They may end in the next byte.
        k = k[:, None]
        inside = (k < C) & (n < O)                                         # (BLOCK_K, BLOCK_N)
        byte = packed + row + k * BITS // 8
        shift = k * BITS % 8
        low = tl.load(byte, mask=inside, other=0).to(tl.int32)
        high = tl.load(byte + 1, mask=inside & (shift + BITS > 8), other=0).to(tl.int32)
        q = ((low | high << 8) >> shift) & (2**BITS - 1)

        # w_hat = (q - zero_point) scale. Signed codes, two's complement, have zero point 0.
        group = n * (C // GROUP) + k // GROUP
        if SIGNED:
            q = (q ^ 2**(BITS - 1)) - 2**(BITS - 1)                        # extends the sign
        else:
            q -= tl.load(zero_point + group, mask=inside, other=0).to(tl.int32)
        w = q.to(tl.float32) * tl.load(scale + group, mask=inside, other=0.0)
        acc += tl.dot(xs, w.to(xs.dtype))
    tl.store(y + m * O + n, acc.to(y.dtype.element_ty), mask=(m < M) & (n < O))

def plain_matmul(x, packed, scale, zero_point, bits, group_size=-1):
    """y = x w_hat^T: x (..., C) float16 or bfloat16 and an affine layer's tensors -> (..., O).

    packed uint8 (O, bytes) of 1 to 8 bits, scale float32 (O, G), zero_point uint8 (O, G), or None
    for signed codes.
    """
    C = x.size(-1)
    O = len(packed)
    flat = x.reshape(-1, C).contiguous()                                           # (M, C)
    M = len(flat)
    y = x.new_empty(M, O)
    BLOCK_M = 16 if M <= 16 else 64
    BLOCK_N = 64
    signed = zero_point is None
    _plain[triton.cdiv(M, BLOCK_M), triton.cdiv(O, BLOCK_N)](
        flat, packed, scale, scale if signed else zero_point, y, M, O, C,
        C if group_size == -1 else group_size, bits, signed, BLOCK_M, BLOCK_N, BLOCK_K=64)
    return y.view(*x.shape[:-1], O)

# ---- Why it is slow -----------------------------------------------------------------------------
# 1. Every weight loads its byte, its scale and its zero point anew, from the L1 cache: at 4 bits a
#    byte is loaded twice, at 1 bit eight times, and a group's scale 128 times.
# 2. A weight costs more than ten instructions: addresses, shift, mask, subtract, a conversion to
#    float, a multiplication, a rounding. Memory at its full pace leaves time for 1.2 a bit.
# 3. A warp's 32 lanes walk along the outputs, whose rows lie far apart in memory: each load touches
#    many cache lines for a few bytes of each.
# 4. The weight is the dot's right operand. With 64 tokens and more Hopper's tensor cores read that
#    from shared memory, so each tile is written there, and the warps wait for each other, at every
#    step of k.
# 5. A tile of outputs is one program, whatever C: 4096 outputs are 64 programs for 132 processors.
# 6. Above 64 tokens a weight is unpacked once for every tile of tokens.
# The tuned kernels have an answer to each: whole words of codes in the order of the tensor cores'
# own registers (1, 3), two weights an instruction (2), the weight as left operand, which may lie in
# registers (4), k split over warps or programs (5), tiles of up to 320 tokens (6).

# ---- What this machine can do -------------------------------------------------------------------

# Compiled for NVIDIA, the kernels hold a few lines of assembly. The interpreter knows none of it.
ASM = isinstance(_plain, triton.JITFunction) and torch.version.hip is None

# The tuned kernels are for Hopper: its tensor cores take a left operand from registers (wgmma), and
# its TMA loads whole tiles.
HOPPER = ASM and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
TMA = HOPPER

def launch(early):
    """Options of a launch that may start while the kernel before it still runs, Hopper's
    programmatic dependent launch: that kernel says when, and this one waits before it reads what
    that wrote."""
    return {"launch_pdl": True} if early else {}       # the interpreter does not know the option

# ---- The packed order: codes where the tensor cores want them -----------------------------------
# A tensor core multiplies 16 outputs x 16 k's at a time, and each of a warp's 32 threads has to
# hold certain of these 256 weights, two to a 32-bit register. pack_weight puts the codes in memory
# so that a 16-byte load gives every thread its own codes: nothing is exchanged between threads.
#
# Of the 16 outputs of a tile, thread 4 r8 + i has outputs r8 and r8 + 8. The k's come in stripes of
# 32. For each of its two outputs it has eight of them, 8 i to 8 i + 7, in a pair of words p = 0, 1
# (so the four words of its 16 bytes are two outputs' pairs):
#
#     k in the stripe      8 i +   0 1    2 3    4 5    6 7
#     word p                       0      0      1      1
#     plane                        0      1      0      1         k = 8 i + 4 p + 2 plane + h
#     half h of the word           0 1    0 1    0 1    0 1
#
# The two planes of a stripe are two operands of 16 k's. Its 8 x's of a token are neighbours, so
# that a thread reads them, too, by one 16-byte load. (Which k's a tensor core calls the first does
# not matter, as long as both operands agree.)
#
# A word has 16 bits a half: room for 16 / b planes, of 8 / b stripes. So plane j = 2 stripe + plane
# of its block of 256 / b k's lies b j bits above the bottom of each half. At 4 bits, two stripes:
#
#     bits      31-28  27-24  23-20  19-16 | 15-12  11-8   7-4    3-0
#     half h              1                |           0
#     plane j   3      2      1      0     | 3      2      1      0
#
# Two neighbouring k's are thus one field of either half, and one instruction serves both. One case
# worked out, at 4 bits: thread 5 is r8 = 1, i = 1. Its word 3 is r16 = 1, p = 1: output 8 + 1 = 9.
# There bits 7-4 are half 0 and plane j = 1, so stripe 0 and plane 1: k = 8 + 4 + 2 + 0 = 14.
# 3 bits are words of the low two bits, blocks of 128 k's, beside words of the third, 256 k's.

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

    A scale and its zero point travel as one word: the scale loses its last 8 bits, at most 2^-16 of
    it.
    """
    O, C = q.shape
    g = C if group_size == -1 else group_size
    if bits not in (1, 2, 3, 4, 8) or C % 32 or g % 32:
        return None

    # Signed codes are shifted to 0 ... 2^bits - 1, and so is the zero that they stand around.
    if zero_point is None:
        half = 2 ** (bits - 1)
        q = q.to(torch.int32) + half
        zero_point = torch.full_like(scale, half)

    # Pad to whole tiles of 16 outputs and whole blocks of k's. + 128 rounds the scale.
    q = F.pad(q.to(torch.int32), (0, -C % 256, 0, -O % 16))
    grid = (scale.float().view(torch.int32) + 128) & ~255
    grid = grid | zero_point.to(torch.int32)
    grid = F.pad(grid, (0, 0, 0, -O % 16)).T.contiguous()                          # (G, O)

    if bits == 3:
        words = _pack_words(q & 3, 2)
        high = _pack_words(q >> 2, 1, third=True)
    else:
        words = _pack_words(q, bits)
        high = words
    return LowBit(words, high, grid, bits, g, (O, C))

def _places(bits, third, device):
    """The lowest bit in its word of each (stripe of the block, plane, half)."""
    stripe = torch.arange(max(8 // bits, 1), device=device).view(-1, 1, 1)
    plane = torch.arange(2, device=device).view(2, 1)
    half = torch.arange(2, device=device)
    if third:
        # `_numbers` shifts the low word so that a stripe's two fields are at bits 0 and 2. Third
        # bits lie so that one shift brings both two bits above these: 2 bits apart as well.
        return stripe // 2 * 4 + stripe % 2 + 2 * plane + 16 * half
    return (2 * stripe + plane) * bits + 16 * half

def _pack_words(q, bits, third=False):
    """int32 (O, C) -> int32 (O / 16, C * bits / 256, 128), 16 bytes for each of 32 threads."""
    # Output = 16 tile + 8 r16 + r8, and k = 256 / bits block + 32 stripe + 8 i + 4 p + 2 plane + h.
    stripes = max(8 // bits, 1)
    # Axes: tile r16 r8 block stripe i p plane h
    q = q.view(len(q) // 16, 2, 8, -1, stripes, 4, 2, 2, 2)

    # A thread is (r8, i) and its four words are (r16, p). The last three axes make a word.
    # Axes: tile block r8 i r16 p stripe plane h
    q = q.permute(0, 3, 2, 5, 1, 6, 4, 7, 8)
    words = (q.long() << _places(bits, third, q.device)).sum((-3, -2, -1))

    # As signed numbers of 32 bits
    words = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    return words.reshape(len(q), -1, 128)

# ---- The fields of a word as floats -------------------------------------------------------------

@triton.jit
def _half(t, shift: tl.constexpr, dt: tl.constexpr):
    """The float of 16 bits that begins at bit `shift` of each word."""
    return (t >> shift & 0xFFFF).to(tl.uint16).to(dt, bitcast=True)

@triton.jit
def _fma_pair(a, b, c, dt: tl.constexpr, ASM: tl.constexpr):
    """a * b + c on both 16-bit floats of each word, rounded once.

    Written as two operations, ptxas swaps the halves forth and back, a fifth of all instructions.
    """
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
    """q - 128 in bfloat16, of the low byte q of each half of the words; MASK: 7 bits a half.

    bfloat16 has 7 bits of mantissa, and q has 8. So the low seven become the mantissa of
    128 + q % 128, and the eighth decides what is added: it is the lowest exponent bit of a number
    that is -256 without it and -128 with it. Together: q - 128, exactly.
    """
    low = t & MASK.to(tl.uint32) | 0x43004300                              # 128 + q % 128
    high = t & MASK.to(tl.uint32) + 0x10001 ^ 0xC380C380                   # -256 or -128
    return _fma_pair(low, tl.full(t.shape, 0x3F803F80, tl.uint32), high, tl.bfloat16, ASM)

@triton.jit
def _numbers(w, high, zero, MASK, FIRST: tl.constexpr, STRIPES: tl.constexpr, A: tl.constexpr,
             B: tl.constexpr, BITS: tl.constexpr, dt: tl.constexpr, ASM: tl.constexpr):
    """q - zero_point, as exact floats of type dt, of STRIPES stripes from stripe FIRST on.

    w (A, B, 128): words of A tiles of outputs (in `_decode`: of A warps), B blocks each; high: the
    third bits' words, at 3 bits; zero (A, 1, 16). MASK: `_mask`, an argument and no constant: an
    instruction takes one constant, and that is 2^P; with the mask in a register & and | become one.
    -> (A, B, r8, i, r16, p, j, h), j the plane of 2 STRIPES, the others as in the packed order.

    No instruction converts integers to floats two at a time. But a float between 2^P and 2^(P+1),
    where P is the width of the mantissa, has its units in the last place: it is 2^P + q if q is put
    into the mantissa. A field that lies f bits higher counts 2^f as much, and the same fused
    multiply-add that subtracts 2^P and the zero point can take that back:

        half a word     dddd cccc bbbb aaaa         4 bits; plane j = 1 is b
        >> shift        .... dddd cccc bbbb         by whole nibbles; at 4 bits f is 0
        & mask          0000 0000 0000 bbbb         the field alone
        | 2^P           0100 0011 0000 bbbb         bfloat16: 128 + q     float16: 1024 + q
        * 2^-f + c      q - zero_point              c = -(2^(P-f) + zero_point)

    Shifting by nibbles and not by fields saves shifts: planes of one nibble (four at 1 bit, two at
    2 bits) share the shifted word. Then f is not 0. The same with 2 bits, for plane j = 1, f = 2:

        half a word     hhgg ffee ddcc bbaa         the field is b
        & mask << f     0000 0000 0000 bb00         no shift: it is in the lowest nibble
        | 2^P           0100 0011 0000 bb00         bfloat16: 128 + 4 q
        * 1/4 + c       q - zero_point              c = -(32 + zero_point)

    And all of this is done to both halves of a word at once.
    """
    # j runs within a thread: all that depends on it alone is a constant to the compiler.
    LOW: tl.constexpr = 2 if BITS == 3 else BITS       # bits of a field of w
    j = tl.reshape(tl.arange(0, 2 * STRIPES) + 2 * FIRST, (1, 1, 1, 1, 1, 1, 2 * STRIPES))
    j = j.to(tl.uint32)
    t = tl.reshape(w, (A, B, 8, 4, 2, 2, 1)).to(tl.uint32, bitcast=True)   # r8 i r16 p, one j
    z = tl.reshape(tl.trans(tl.reshape(zero, (A, 1, 2, 8)), (0, 1, 3, 2)), (A, 1, 8, 1, 2, 1, 1))

    if BITS == 8 and dt == tl.bfloat16:
        # Its mantissa cannot hold q: both numbers are shifted by 128, then t - z = z * -1 + t.
        t, z = _minus_128(t >> j * 8, MASK, ASM), _minus_128(z * 0x10001, MASK, ASM)
        t = _fma_pair(z, tl.full(z.shape, 0xBF80BF80, tl.uint32), t, dt, ASM)
    else:
        P: tl.constexpr = 7 if dt == tl.bfloat16 else 10
        ONE: tl.constexpr = 0x3F80 if dt == tl.bfloat16 else 0x3C00        # 1.0, as bits
        TOP: tl.constexpr = ONE + (P << P)                                 # 2^P: P more exponents

        # The word, moved down by whole nibbles, and the mask of its field, f bits up. (% 16: at 3
        # bits j counts in blocks of 256 k's, two words of low bits.)
        f = j * LOW % 4
        t = t >> j * LOW // 4 * 4 % 16
        mask = MASK.to(tl.uint32) << f
        if BITS == 3:
            t = _with_third_bit(t, high, mask, j, FIRST, STRIPES, A, B)
            mask |= MASK.to(tl.uint32) + 0x10001 << f
        t = t & mask | TOP * 0x10001                                       # 2^P + q 2^f

        # c. Setting z's bits in 2^P adds z, as it does q's; 0x8000 is the sign.
        c = ((z | TOP) ^ 0x8000) * 0x10001                                 # -(2^P + z)
        if LOW < 4:
            # Fields that begin inside a nibble: + (2^P - 2^(P-f)) = 2^(P-1) (2 - 2^(1-f)), whose
            # bits are TOP - 2^(P+1-f).
            up = tl.where(f == 0, 0, TOP - (2 << P >> f)).to(tl.uint32) * 0x10001
            c = _fma_pair(c, tl.full(up.shape, ONE * 0x10001, tl.uint32), up, dt, ASM)
        t = _fma_pair(t, (ONE - (f << P)) * 0x10001, c, dt, ASM)           # t 2^-f + c
    return tl.join(_half(t, 0, dt), _half(t, 16, dt))

@triton.jit
def _with_third_bit(t, high, mask, j, FIRST: tl.constexpr, STRIPES: tl.constexpr,
                    A: tl.constexpr, B: tl.constexpr):
    """3 bits: the words t inside their mask of two bits a half, the third bit above them."""
    h = tl.reshape(high, (A, B, 8, 4, 2, 2, 1)).to(tl.uint32, bitcast=True)
    place = j // 4 * 4 + j // 2 % 2                    # of the stripe's first, see `_places`
    # Shifted by place - 2. Of the stripes 0 to 3 that may be negative, and << 2 loses no bit that
    # is used; of the stripes 4 to 7 it is not, and << 2 would lose some. No call has both kinds.
    h = h << 2 >> place if FIRST + STRIPES <= 4 else h >> place - 2        # 2 bits above it
    return h ^ (h ^ t) & mask                          # t where the mask is set, else h

def _mask(bits, dtype):
    """Of one field, in both halves of a word; of 8 bits what bfloat16's mantissa holds."""
    field = bits
    if bits == 3:
        field = 2
    if bits == 8 and dtype == torch.bfloat16:
        field = 7
    return (2**field - 1) * 0x10001

@triton.jit
def _load(at, ok, EVEN: tl.constexpr):
    """Words that are read once: the L2 cache may forget them first. EVEN: all are there."""
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=ok, other=0, eviction_policy="evict_first")

@triton.jit
def _fetch(words, high, grid, t, k0, O, C: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
           SPAN: tl.constexpr, SUB: tl.constexpr, EVEN: tl.constexpr):
    """Everything of SPAN k's of the 16 outputs of tile t -> three tuples: words and third bits
    (S, 1, 128), a block each, and grids (S, 1, 16), each of which serves SUB k's.

    k0 (S, 1, 1): where the span of each warp begins. t is one number.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW                     # k's in a block of 128 words
    ROW: tl.constexpr = (C + 255) // 256 * 256         # k's of a row, padded
    u = tl.arange(0, 128)[None, None, :]
    r = tl.arange(0, 16)[None, None, :]
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

@triton.jit
def _scale_of(g):
    """The scales of words of the grid, whose last 8 bits are zero points."""
    return (g & 0xFFFFFF00).to(tl.float32, bitcast=True)

# ---- Up to 16 tokens: from memory into the tensor cores -----------------------------------------

@triton.jit
def _zeros(T: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tuple of T sums (S, 16, BLOCK_M)."""
    zeros = ()
    for t in tl.static_range(T):
        zeros += (tl.zeros((S, 16, BLOCK_M), tl.float32),)
    return zeros

@triton.jit
def _x_operand(xs, k, C: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr,
               EVEN: tl.constexpr):
    """A stripe of x, from k on, as the dots' right operand (S, 32, BLOCK_M).

    xs: addresses (i, m8, S, m / 8, e). e counts 8 neighbouring k's: it is (p, plane, h).
    """
    if EVEN:
        xk = tl.load(xs + k)
    else:
        xk = tl.load(xs + k, mask=k < C, other=0.0)
    b = tl.reshape(xk, (4, 8, S, BLOCK_M // 8, 2, 2, 2))                   # i m8 s m/8 p plane h
    return tl.reshape(tl.trans(b, (2, 5, 0, 4, 6, 3, 1)), (S, 32, BLOCK_M))

@triton.jit(do_not_specialize=["M", "MASK"])
def _decode(x, words, high, grid, y, M, O, N, MASK, C: tl.constexpr, GROUP: tl.constexpr,
            BITS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr,
            SPAN: tl.constexpr, SUB: tl.constexpr, WAIT: tl.constexpr, ASM: tl.constexpr):
    """16 T outputs of all M <= BLOCK_M tokens; O outputs with padding, N without.

    The program's S warps take turns along k, SPAN k's each, and add up last:

        k         0 ...      SPAN ...   2 SPAN ...        S SPAN ...
        warp      0          1          2           ...   0           ...

    For this a dot has three dimensions, (S, 16, 32) times (S, 32, BLOCK_M): Triton gives every warp
    one slice of the first, and so no warp needs what another one holds. A warp fetches the words
    and grids of its span, all at once, then goes through the span by stripes of 32 k's:

        a (16 outputs, 32 k's)      the words, shifted and masked in the registers they came in
        b (32 k's, BLOCK_M)         x, 16 bytes a thread: its 8 k's of a token
        part += a b                 one tensor-core instruction a plane and 8 tokens

    Both have the k's in the order (plane, i, p, h), so that the four that thread i holds of a plane
    are neighbours: what Triton calls kWidth = 4. After SUB k's (gcd of span and group: they lie
    under one grid) the part times their scale is added to the sum: a multiplication an output, not
    a weight.
    """
    dt: tl.constexpr = x.dtype.element_ty
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW                     # k's in a block of 128 words
    EVEN: tl.constexpr = C % (S * SPAN) == 0           # no warp's last span ends beyond C
    pid = tl.program_id(0)
    s = tl.arange(0, S)

    # Addresses of x, (i, m8, S, m / 8, e): thread (m8, i) of a warp has tokens m8 and m8 + 8, and
    # of each 8 neighbouring k's e. Tokens that are not there read the last one; y leaves them out.
    i = tl.arange(0, 4)[:, None, None, None, None]
    m8 = tl.arange(0, 8)[None, :, None, None, None]
    m = m8 + 8 * tl.arange(0, BLOCK_M // 8)[None, None, None, :, None]
    e = tl.arange(0, 8)[None, None, None, None, :]
    xs = x + tl.minimum(m, M - 1) * C + i * 8 + e

    acc = _zeros(T, S, BLOCK_M)
    for step in range(0, (C + S * SPAN - 1) // (S * SPAN)):
        # All loads of the step's words come first, so that they are in flight together.
        k0 = (step * S + s) * SPAN                     # (S,) where each warp's span begins
        ws, hs, gs = (), (), ()
        for t in tl.static_range(T):
            w, h, g = _fetch(words, high, grid, pid * T + t, k0[:, None, None], O, C, GROUP, BITS,
                             SPAN, SUB, EVEN)
            ws += w
            hs += h
            gs += g
        if WAIT:
            # Else ptxas moves the loads down to their uses, one after the other.
            tl.debug_barrier()

        k0 = k0[None, None, :, None, None]
        for f in tl.static_range(0, SPAN, 32):
            if f % SUB == 0:
                part = _zeros(T, S, BLOCK_M)

            # One stripe: x serves all T tiles of outputs.
            b = _x_operand(xs, k0 + f, C, S, BLOCK_M, EVEN)
            new, total = (), ()
            for t in tl.static_range(T):
                # The stripe's numbers, as operand: from s 1 r8 i r16 p plane h
                w = ws[t * (SPAN // BLK) + f // BLK]
                h = hs[t] if BITS == 3 else 0
                g = gs[t * (SPAN // SUB) + f // SUB]
                a = _numbers(w, h, g & 255, MASK, f % (256 if BITS == 3 else BLK) // 32, 1, S, 1,
                             BITS, dt, ASM)
                a = tl.reshape(tl.trans(a, (0, 1, 4, 2, 6, 3, 5, 7)), (S, 16, 32))
                new += (tl.dot(a, b, part[t]),)

                # The last stripe under this grid: its scale.
                if (f + 32) % SUB == 0:
                    total += (acc[t] + new[t] * tl.reshape(_scale_of(g), (S, 16, 1)),)
            part = new
            if (f + 32) % SUB == 0:
                acc = total

    # The warps' sums together
    m = tl.arange(0, BLOCK_M)
    for t in tl.static_range(T):
        n = (pid * T + t) * 16 + tl.arange(0, 16)
        tl.store(y + m[None, :] * N + n[:, None], tl.sum(acc[t], 0).to(dt),
                 mask=(m < M)[None, :] & (n < N)[:, None])

# ---- Up to 1024 tokens: tiles -------------------------------------------------------------------

@triton.jit
def _shuffle(x, out, tickets, n, tiles, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x in the order of `_tile`'s k's, and zeros in tickets.

    x and out hold pairs of 16-bit floats, as int32: 16 pairs are the stripe's 32 k's. The packed
    order is (i, p, plane), pairs of k that differ in h being together; wgmma's is (plane, p, i).
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(tickets + at, 0, mask=at < tiles)
    k = at % 16                                        # plane p i
    k = at - k + k % 4 * 4 + k // 4 % 2 * 2 + k // 8   # i p plane
    tl.store(out + at, tl.load(x + k, mask=at < n), mask=at < n)
    if PDL:
        # Last: programs of `_tile` that start beside these would crowd some processors.
        tl.extra.cuda.gdc_launch_dependents()

@triton.constexpr_function
def _scale_asm(n, dt):
    """Wait for wgmma, then multiply n pairs of floats, $(i + n), by $(i + 2 n) into $i."""
    kind = "bf16x2" if dt == tl.bfloat16 else "f16x2"
    return "wgmma.wait_group.sync.aligned 0; " + " ".join(
        f"mul.rn.{kind} ${i}, ${i + n}, ${i + 2 * n};" for i in range(n))

@triton.constexpr_function
def _registers(n):
    """Of n results, which must not share a register with any of the 2 n inputs."""
    return ",".join(["=&r"] * n + ["r"] * 2 * n)

@triton.jit
def _scaled(a, g, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr):
    """`_numbers` a times the scales in words g of the grid, as an operand (BLOCK_N, BLOCK_K). The
    scale and the product are rounded to 16 bits here, as in a dense 16-bit weight; `_decode` has
    both in float32.

    The k's come in the order (plane, p, i, h), that of wgmma's left operand: thread i of a row
    holds pairs h of 2 i and of 8 + 2 i.

    Triton 3.6 unpacks the next step's numbers while wgmma multiplies, but may put them into the
    very registers that wgmma still reads: wrong sums. So these products, PAIRS of them a piece of
    assembly, wait for it: what comes before, `_numbers`, overlaps. (False below, is_pure, keeps
    them where they are.) PAIRS = 0: no wgmma here, nothing to wait for.
    """
    scale = tl.reshape(_scale_of(g), (BLOCK_N // 16, 1, 2, 8))
    scale = tl.reshape(tl.trans(scale, (0, 1, 3, 2)), (BLOCK_N // 16, 1, 8, 1, 2, 1, 1, 1))
    a, scale = tl.broadcast(a, scale.to(a.dtype))
    a = tl.reshape(tl.trans(a, (0, 4, 2, 1, 6, 5, 3, 7)), (BLOCK_N, BLOCK_K))
    scale = tl.reshape(tl.trans(scale, (0, 4, 2, 1, 6, 5, 3, 7)), (BLOCK_N, BLOCK_K))
    if PAIRS:
        return tl.inline_asm_elementwise(_scale_asm(PAIRS, a.dtype), _registers(PAIRS), [a, scale],
                                         a.dtype, False, 2 * PAIRS)
    else:
        return a * scale

# Few tiles leave processors idle. Then SPLIT programs share a tile, each over a part of k. Each
# leaves its sum in `parts` and draws the tile's next ticket; the one that draws the last goes on
# from here with the sum of all.

@triton.jit
def _is_early(tickets, pid, SPLIT: tl.constexpr):
    """Whether other parts of tile pid are still to come, after this program left its own."""
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets + pid, 1, sem="acq_rel")
    return ticket < SPLIT - 1

@triton.jit
def _sum_of_parts(acc, parts, pid, at, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """Add the SPLIT parts of tile pid to zeros, in their order: the same bits every time.

    A part is SIZE numbers, of which this is those at `at`, in the shape and the type of acc.
    """
    acc = tl.zeros(acc.shape, acc.dtype)
    for i in range(0, SPLIT):
        acc += tl.load(parts + (pid * SPLIT + i) * SIZE + at)
    return acc

@triton.jit(do_not_specialize=["M", "MASK"])
def _tile(x, x2, words, high, grid, y, parts, tickets, M, O, N, MASK, C: tl.constexpr,
          GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, EXTRA: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr,
          PAIRS: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr):
    """One tile of BLOCK_N outputs x BLOCK_M + EXTRA tokens, over one of SPLIT parts of k.

    acc (BLOCK_N, BLOCK_M) += a (BLOCK_N, BLOCK_K) b (BLOCK_K, BLOCK_M), by wgmma:

        a      the weights, on the left, since wgmma takes its left operand from registers: each
               thread unpacks and scales its own words, and the results stay where they are
        b      x, from shared memory: padded to whole tiles and in the order of `_shuffle`; with TMA
               x is a tensor descriptor, which loads whole tiles and costs no registers

    Triton's blocks are powers of two, and 300 tokens in blocks of 256 are work for 512. So a tile
    may have EXTRA tokens more (0: none), the product of the same weights, unpacked once, with a
    second b: acc2 (BLOCK_N, EXTRA). x2 is x, with TMA a descriptor of blocks of EXTRA tokens.

    Triton copies words, grids and x into shared memory some steps ahead of their use (num_stages).
    A step's BLOCK_K k's lie under one grid. They are B whole blocks of words, or part of one, whose
    words are then shifted so that the part's stripes come first.
    """
    dt: tl.constexpr = y.dtype.element_ty
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW                     # k's in a block of 128 words
    ROW: tl.constexpr = (C + 255) // 256 * 256         # k's of a row, padded
    T: tl.constexpr = BLOCK_N // 16                    # tiles of 16 outputs, as the words lie
    B: tl.constexpr = BLOCK_K // BLK if BLOCK_K > BLK else 1

    # Which tile: those of one weight run side by side, so that L2 reads it once.
    rows = tl.cdiv(M, BLOCK_M + EXTRA)
    pid = tl.program_id(0)
    m0 = pid % rows * (BLOCK_M + EXTRA)
    m = m0 + tl.arange(0, BLOCK_M)
    n = pid // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.minimum(pid // rows * T + tl.arange(0, T), O // 16 - 1)[:, None, None]
    u = tl.arange(0, 128)[None, None, :]
    r = tl.arange(0, 16)[None, None, :]
    if not TMA:
        xs = x + m[None, :] * C + tl.arange(0, BLOCK_K)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if EXTRA:
        m2 = m0 + BLOCK_M + tl.arange(0, EXTRA)
        if not TMA:
            xs2 = x2 + m2[None, :] * C + tl.arange(0, BLOCK_K)[:, None]
        acc2 = tl.zeros((BLOCK_N, EXTRA), tl.float32)

    first = tl.program_id(1) * (C // BLOCK_K // SPLIT)
    if PDL:
        tl.extra.cuda.gdc_wait()                       # for x and the tickets
    for step in range(0, C // BLOCK_K // SPLIT):
        # Words and grids, which hold the codes of a thread side by side
        k = (first + step) * BLOCK_K
        block = t * (ROW // BLK) + k // BLK + tl.arange(0, B)[None, :, None]
        w = tl.load(words + block * 128 + u)
        if BLOCK_K < BLK:
            # Stripe number k % BLK / 32 comes first, and so on: 2 LOW bits lower for each.
            w = w.to(tl.uint32, bitcast=True) >> k % BLK // 16 * LOW
        h = 0
        if BITS == 3:
            h = tl.load(high + (t * (ROW // 256) + k // 256) * 128 + u)
            h = h.to(tl.uint32, bitcast=True) >> k % 256 // 64 * 4 + k % 64 // 32  # see `_places`
        g = tl.load(grid + k // GROUP * O + t * 16 + r).to(tl.uint32, bitcast=True)

        # The operands and their product
        a = _numbers(w, h, g & 255, MASK, 0, BLOCK_K // B // 32, T, B, BITS, dt, ASM)
        if TMA:
            b = x.load([m0, k]).T                      # (k, tokens)
        else:
            b = tl.load(xs + k)
        a = _scaled(a, g, BLOCK_N, BLOCK_K, PAIRS)
        if EXTRA:
            if TMA:
                b2 = x2.load([m0 + BLOCK_M, k]).T
            else:
                b2 = tl.load(xs2 + k)
        acc = tl.dot(a, b, acc)
        if EXTRA:
            acc2 = tl.dot(a, b2, acc2)

    if SPLIT > 1:
        size: tl.constexpr = BLOCK_N * (BLOCK_M + EXTRA)
        mine = parts + (pid * SPLIT + tl.program_id(1)) * size
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(mine + at, acc)
        if EXTRA:
            row = BLOCK_N * BLOCK_M + tl.arange(0, BLOCK_N) * EXTRA
            at2 = row[:, None] + tl.arange(0, EXTRA)[None, :]
            tl.store(mine + at2, acc2)
        if _is_early(tickets, pid, SPLIT):
            return
        acc = _sum_of_parts(acc, parts, pid, at, size, SPLIT)
        if EXTRA:
            acc2 = _sum_of_parts(acc2, parts, pid, at2, size, SPLIT)

    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(dt),
             mask=(m < M)[None, :] & (n < N)[:, None])
    if EXTRA:
        tl.store(y + m2[None, :].to(tl.int64) * N + n[:, None], acc2.to(dt),
                 mask=(m2 < M)[None, :] & (n < N)[:, None])

# ---- More tokens: the weight in 16 bits ---------------------------------------------------------

@triton.jit(do_not_specialize=["MASK"])
def _dequantize(words, high, grid, w, O, N, MASK, C: tl.constexpr, GROUP: tl.constexpr,
                BITS: tl.constexpr, S: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr,
                ASM: tl.constexpr):
    """w (N, C) in 16 bits; a program writes S spans of k, one a warp, of one tile of 16 outputs.

    A thread's 8 numbers of a row and a stripe are neighbours, and so one 16-byte store.
    """
    dt: tl.constexpr = w.dtype.element_ty
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    BLK: tl.constexpr = 256 // LOW
    pid = tl.program_id(1)
    k0 = (tl.program_id(0) * S + tl.arange(0, S)) * SPAN
    ws, hs, gs = _fetch(words, high, grid, pid, k0[:, None, None], O, C, GROUP, BITS, SPAN, SUB,
                        C % (S * SPAN) == 0)

    # Addresses of w, (i, r8, S, r16, e); e is (p, plane, h).
    i = tl.arange(0, 4)[:, None, None, None, None]
    r8 = tl.arange(0, 8)[None, :, None, None, None]
    n = pid * 16 + r8 + 8 * tl.arange(0, 2)[None, None, None, :, None]
    at = w + n.to(tl.int64) * C + i * 8 + tl.arange(0, 8)[None, None, None, None, :]

    for f in tl.static_range(0, SPAN, 32):
        g = gs[f // SUB]
        a = _numbers(ws[f // BLK], hs[0] if BITS == 3 else 0, g & 255, MASK,
                     f % (256 if BITS == 3 else BLK) // 32, 1, S, 1, BITS, dt, ASM)
        scale = tl.reshape(_scale_of(g), (S, 1, 2, 8))
        scale = tl.reshape(tl.trans(scale, (0, 1, 3, 2)), (S, 1, 8, 1, 2, 1, 1, 1))
        a = (a.to(tl.float32) * scale).to(dt)          # s 1 r8 i r16 p plane h
        a = tl.reshape(tl.trans(a, (3, 2, 0, 1, 4, 5, 6, 7)), (4, 8, S, 2, 8))
        k = k0[None, None, :, None, None] + f
        tl.store(at + k, a, mask=(k < C) & (n < N))

def write_out(w, dtype):
    """The weight (O, C) of a LowBit in 16 bits, by `_dequantize`."""
    O, C = w.shape
    out = torch.empty(O, C, dtype=dtype, device=w.words.device)
    S = 4
    SPAN = 256 if w.bits in (1, 3) else 128
    _dequantize[triton.cdiv(C, S * SPAN), len(w.words)](
        w.words, w.high, w.grid, out, w.grid.stride(0), O, _mask(w.bits, dtype), C, w.group,
        w.bits, S, SPAN, math.gcd(SPAN, w.group), ASM, num_warps=S)
    return out

# ---- Which of the three, and in which tiles -----------------------------------------------------

FEW = 16       # tokens up to which `_decode` has them all in one tile

# Above so many tokens the weight is written out. 14336 x 4096, us by _tile and written out: 2,048
# tokens at 4 bits 384 and 424, at 8 bits 436 and 425; 4,096 tokens 790 and 738, 868 and 750.
FUSED = 1024
PIECE = 2 * 132 * 256 * 128    # outputs x tokens of a written part: two tiles of cuBLAS an SM

class Span(NamedTuple):
    """What a warp of `_decode` does in a step."""
    tiles: int                 # of 16 outputs; T of the kernel
    inputs: int                # k's; SPAN of the kernel: whole blocks of words, at 3 bits 256
    wait: bool                 # a barrier between the loads and the first product

# (bits, tokens up to), measured on an H100. One tile: more programs in flight hide the memory's
# latency. From 9 tokens on reading x costs more than that, and two tiles share it. 256 k's: 512
# cost registers and with them warps. The barrier of `wait` brings the loads forward, but a warp
# then waits for the program's others.
DECODE = {
    (1, 8): Span(1, 256, True),
    (2, 8): Span(1, 256, True),
    (3, 8): Span(1, 256, True),
    (4, 8): Span(1, 256, True),
    (8, 8): Span(1, 128, True),
    (1, 16): Span(2, 256, False),
    (2, 16): Span(2, 256, False),
    (3, 16): Span(2, 256, True),
    (4, 16): Span(2, 256, False),
    (8, 16): Span(1, 128, False),
}
DECODE_FEW = {                 # instead, for few outputs
    (3, 8): Span(1, 256, False),
    (1, 16): Span(1, 256, False),
    (3, 16): Span(1, 256, False),
}

class Tile(NamedTuple):
    """How `_tile` covers a product. BLOCK_K may be cut to what a group and C allow."""
    BLOCK_M: int               # tokens
    EXTRA: int                 # tokens besides
    BLOCK_N: int               # outputs
    BLOCK_K: int               # inputs a step
    warps: int
    stages: int                # tiles of x in flight
    split: int = 1             # parts of k, each a program
    tma: bool = False          # x by Hopper's TMA

    @property
    def tokens(self):
        return self.BLOCK_M + self.EXTRA

# 4 warps: two programs an SM, so that one unpacks while the other multiplies. From 160 tokens on
# BLOCK_K is 64: the weights of a step stand in registers twice, unpacked and in use, beside the
# sums. At 256 tokens these fill the registers of 8 warps. Of the two tiles of 320 tokens that of
# 128 outputs reads x half as often (4 bits and 14336 x 4096, 300 tokens 68 us in place of 72, 640
# tokens 136 in place of 147); `choose_tile` takes the first of two that are level.
TILES = (
    Tile(32, 0, 64, 128, warps=4, stages=4),
    Tile(64, 0, 64, 128, warps=4, stages=4),
    Tile(64, 32, 64, 128, warps=4, stages=3),
    Tile(128, 0, 64, 128, warps=4, stages=3),
    Tile(128, 32, 64, 64, warps=4, stages=4),
    Tile(128, 64, 64, 64, warps=4, stages=4),
    Tile(256, 0, 128, 64, warps=8, stages=4),
    Tile(256, 64, 128, 64, warps=8, stages=3),
    Tile(256, 64, 64, 64, warps=4, stages=3),
    Tile(128, 0, 128, 128, warps=8, stages=3),
)
SMS = 132                      # of an H100
# Programs worth splitting k for, two an SM, or one where it has 8 warps: more cost time.
ENOUGH = {4: 2 * SMS, 8: SMS}

class Launch(NamedTuple):
    """How a kernel is started."""
    kernel: Callable
    grid: tuple                # of programs
    constants: dict
    options: dict

def plan_decode(M, w):
    """The Launch of `_decode` for M <= FEW tokens."""
    BLOCK_M = 8 if M <= 8 else 16
    key = w.bits, BLOCK_M
    few = w.shape[0] <= 8192                           # outputs
    span = DECODE[key]
    if few:
        span = DECODE_FEW.get(key, span)

    # Few outputs are few programs: more warps, each with less of k.
    warps = 8 if few else 4
    tiles = len(w.words)
    T = span.tiles if tiles % span.tiles == 0 else 1
    constants = dict(C=w.shape[1], GROUP=w.group, BITS=w.bits, ASM=ASM, S=warps, T=T,
                     BLOCK_M=BLOCK_M, SPAN=span.inputs, SUB=math.gcd(span.inputs, w.group),
                     WAIT=span.wait)

    # With more stages Triton would send the loads through shared memory: 5 to 13 times slower.
    return Launch(_decode, (tiles // T,), constants, dict(num_warps=warps, num_stages=1))

def count_tiles(M, O, tile):
    return triton.cdiv(O, tile.BLOCK_N) * triton.cdiv(M, tile.tokens)

def choose_tile(M, w):
    """The Tile for FEW < M <= FUSED tokens, with the parts of k that make it fastest:

    1. Every tile of TILES is tried, of more than 640 tokens those with the most outputs alone.
    2. Its k is split into 8, 4, 2 parts and not, as far as that keeps processors busy.
    3. `predicted_time` is least; then see `rank`.
    4. x is loaded by TMA where that pays.
    """
    found = []
    for tile in TILES:
        # Many tokens: tiles of the most outputs, which read x the least often. That of 320 tokens
        # is slower by then, as few registers are left to unpack ahead (768 tokens: 202 us to 152).
        if M > 640 and (tile.BLOCK_N < 128 or tile.EXTRA):
            continue
        tile = tile._replace(BLOCK_K=math.gcd(tile.BLOCK_K, w.group, w.shape[1]))
        for split in (8, 4, 2, 1):
            programs = count_tiles(M, w.shape[0], tile) * split
            fits = programs <= ENOUGH[tile.warps] and w.shape[1] // tile.BLOCK_K % split == 0
            if split == 1 or fits:
                found.append(tile._replace(split=split))

    # Of equal ones: at 8 bits the tile of more outputs, which reads x less often (at 96 tokens and
    # 14336 x 4096 38 us in place of 45); then the one in more parts; then the first in TILES.
    def rank(tile):
        outputs = -tile.BLOCK_N if w.bits == 8 else 0
        return predicted_time(M, w, tile), outputs, -tile.split
    tile = min(found, key=rank)

    # x by TMA is 1 to 14 % faster, but where k is split, in so few steps, up to 10 % slower. Its
    # descriptors are made on the CPU, which torch.compile does not trace.
    tma = TMA and not torch.compiler.is_compiling() and tile.tokens > 32 and tile.split == 1
    return tile._replace(tma=tma)

def predicted_time(M, w, tile):
    """What the busiest SM has to do. The unit is the time of one multiply-add. Bits do not count:
    unpacking costs about the same at all of them.

    Unpacking and scaling a weight costs as much as multiplying it with 80 tokens. A program of 4
    warps without a second one beside it, which works while it waits, takes a tenth longer. Where k
    is split, leaving a sum and reading it again costs as much as 500 multiplications. With these
    three numbers the choice comes closest to the fastest of 25 tiles that were measured on an H100
    (these and others, at 16 token counts, 3 shapes, 2 and 4 bits): 2.6 % slower on average.
    """
    O, C = w.shape
    programs = count_tiles(M, O, tile) * tile.split
    busiest = triton.cdiv(programs, SMS)
    if busiest == 1 and tile.warps == 4:
        busiest = 1.1
    time = busiest * tile.BLOCK_N * (tile.tokens + 80) * C / tile.split
    if tile.split > 1:
        time += 500 * tile.split * tile.BLOCK_N * tile.tokens
    return time

def plan_tile(M, w, tile):
    """The Launch of `_tile` for M tokens."""
    early = HOPPER and not torch.compiler.is_compiling()
    pairs = min(tile.BLOCK_N * tile.BLOCK_K // tile.warps // 64, 16)       # of a thread
    constants = dict(C=w.shape[1], GROUP=w.group, BITS=w.bits, ASM=ASM, BLOCK_M=tile.BLOCK_M,
                     EXTRA=tile.EXTRA, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
                     SPLIT=tile.split, PAIRS=pairs if HOPPER else 0, TMA=tile.tma, PDL=early)
    return Launch(_tile, (count_tiles(M, w.shape[0], tile), tile.split), constants,
                  dict(num_warps=tile.warps, num_stages=tile.stages, **launch(early)))

def plan(M, w):
    """The Launch of the kernel that multiplies M <= FUSED tokens with w."""
    return plan_decode(M, w) if M <= FEW else plan_tile(M, w, choose_tile(M, w))

def lowbit_matmul(x, w):
    """y = x w_hat^T: x (..., C) float16 or bfloat16 on w's GPU, w a LowBit -> (..., O)."""
    O, C = w.shape
    flat = x.reshape(-1, C).contiguous()                                           # (M, C)
    M = len(flat)
    y = x.new_empty(M, O)
    if M > FUSED:
        multiply_written_out(flat, w, y)
    elif M > FEW:
        multiply_tiles(flat, w, choose_tile(M, w), y)
    else:
        how = plan_decode(M, w)
        how.kernel[how.grid](flat, w.words, w.high, w.grid, y, M, w.grid.size(1), O,
                             _mask(w.bits, x.dtype), **how.constants, **how.options)
    return y.view(*x.shape[:-1], O)

def multiply_tiles(x, w, tile, y):
    """y (M, O) = x (M, C) w_hat^T by `_tile`."""
    M, C = x.shape
    how = plan_tile(M, w, tile)
    tiles = how.grid[0]
    size = tile.split * tile.tokens * tile.BLOCK_N if tile.split > 1 else 0
    parts = x.new_empty(tiles * size, dtype=torch.float32)
    tickets = w.words.new_empty(tiles)

    # x in `_tile`'s order. There are whole tiles of it, whatever the last one's tokens hold:
    # programs that all read the last token again took up to twice as long.
    padded = x.new_empty(triton.cdiv(M, tile.tokens) * tile.tokens, C)
    pairs = x.view(torch.int32)
    _shuffle[triton.cdiv(pairs.numel(), 1024),](
        pairs, padded.view(torch.int32), tickets, pairs.numel(), tiles, BLOCK=1024,
        PDL=how.constants["PDL"])

    x, x2 = padded, padded
    if tile.tma:
        x = TensorDescriptor.from_tensor(padded, [tile.BLOCK_M, tile.BLOCK_K])
        if tile.EXTRA:
            x2 = TensorDescriptor.from_tensor(padded, [tile.EXTRA, tile.BLOCK_K])
    how.kernel[how.grid](x, x2, w.words, w.high, w.grid, y, parts, tickets, M, w.grid.size(1),
                         w.shape[0], _mask(w.bits, y.dtype), **how.constants, **how.options)

def multiply_written_out(x, w, y):
    """y (M, O) = x (M, C) w_hat^T, in parts of some outputs, whose weight is written out for
    cuBLAS."""
    O, C = w.shape
    n = max(1, PIECE // len(x) // 128) * 128           # outputs a part
    for i in range(0, O, n):
        tiles = slice(i // 16, (i + n) // 16)
        part = LowBit(w.words[tiles], w.high[tiles], w.grid[:, i:i + n], w.bits, w.group,
                      (min(n, O - i), C))
        torch.mm(x, write_out(part, x.dtype).T, out=y[:, i:i + n])

# ---- QuEST: rotation, scale, codes and trust mask in one pass -----------------------------------
# QuEST treats x and w alike. Each block of n = gcd(C, 128) columns of a row is multiplied by the
# Hadamard matrix H (entries +-n^-0.5). The row gets one scale s, the step of its grid, from its
# root mean square, and u / s is rounded to the nearest level q + 1/2 (ternary: q), q an integer of
# b bits. The trust mask marks where u was near enough to the grid for its gradient to pass.
#
# H is orthonormal, so a row has one root mean square, rotated or not. Codes are integers around
# zero, 2 q + 1 (ternary: 2 q), so that no product has to make up for the grid's half step; only at
# 8 bits, where that would leave int8, they are q. A program stays for many tiles and loads H once.

@triton.jit
def _row_scale(square, C, CLIP: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr,
               ROWS: tl.constexpr, NB: tl.constexpr):
    """Squares (ROWS NB, h), which add up to C times a row's mean -> its scale (ROWS,), and that of
    each block's row, (ROWS NB, 1)."""
    square = tl.sum(tl.reshape(tl.sum(square, 1), (ROWS, NB)), 1)
    s = (CLIP * tl.sqrt(square / C) + EPS) * (2.0 / TOP)
    return s, tl.reshape(tl.broadcast_to(s[:, None], (ROWS, NB)), (ROWS * NB,))[:, None]

@triton.jit
def _hadamard_quantize(x, signs, codes, scale, sums, values, trusted, T, C: tl.constexpr,
                       CLIP: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr,
                       SHIFT: tl.constexpr, LIMIT: tl.constexpr, PLANES: tl.constexpr,
                       TRAIN: tl.constexpr, n: tl.constexpr, HALVES: tl.constexpr,
                       NB: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
                       PDL: tl.constexpr):
    """Rows x (T, C) -> codes, scale and sums, and with TRAIN values and trusted: hadamard_quantize.

    A tile is ROWS rows, as a matrix of ROWS NB rows of n: NB blocks a row, a power of two, of which
    the first C / n are there. So the rotation is one product with H.

        TOP    the largest code less the smallest; 0.5 - SHIFT is the level of code 0
        LIMIT  the trust limit, in steps
        PLANES the columns of a block go where quest_matmul wants them: column PLANES i + f of a
               block to f n / PLANES + i. The columns of H are permuted to begin with.
        HALVES = 2: signs is H' = H of half the size, h x h, and two halves a, b of a block give
               a H' + b H' and a H' - b H'. Half the multiplications, a quarter of H.
    """
    LOW: tl.constexpr = SHIFT - 0.5 - 0.5 * TOP        # the least integer; LOW + TOP the largest
    ODD: tl.constexpr = 1 if SHIFT == 0.0 else 0       # the grid has levels at halves
    h: tl.constexpr = n // HALVES
    WIDE: tl.constexpr = h // PLANES                   # columns of one half in one plane

    # H with its columns in the order of the planes, and where each column is stored
    i = tl.arange(0, ROWS * NB)
    r = tl.arange(0, ROWS)
    col = tl.arange(0, h)
    order = col % WIDE * PLANES + col // WIDE
    place = col
    if HALVES == 2:
        place = col // WIDE * (2 * WIDE) + col % WIDE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()          # quest_matmul may be set up meanwhile
    H = tl.trans(tl.load(signs + order[:, None] * h + col[None, :]))       # (h, h)
    start = (i // NB * C + i % NB * n)[:, None]                            # NB blocks of n a row

    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0),
                         num_stages=STAGES):
        at = tl.cast(tile, tl.int64) * (ROWS * C)
        out = tile * ROWS + r
        live = ((tile * ROWS + i // NB < T) & (i % NB < C // n))[:, None]
        v = tl.load(x + at + (start + col[None, :]), mask=live, other=0.0)         # (ROWS NB, h)

        # Rotate: us, one part a half. us * unit is in steps of the grid; `far` is the trust limit
        # in the units of us.
        unit = 1.0
        far = LIMIT
        if x.dtype.element_ty == tl.float32:
            # Tensor cores take 16 bits: two float16 hold 22 bits of v / scale.
            s, each = _row_scale(v * v, C, CLIP, EPS, TOP, ROWS, NB)
            v *= n**-0.5 / each
            high = v.to(tl.float16)
            us = (tl.dot(high, H, tl.dot((v - high.to(tl.float32)).to(tl.float16), H)),)
        else:
            # Tensor cores read v where it lies. The squares are those of the rotated row.
            u = tl.dot(v, H)
            us, square = (u,), u * u
            if HALVES == 2:
                late = tl.dot(tl.load(x + at + (start + h + col[None, :]), mask=live, other=0.0), H)
                us = (u + late, u - late)
                square = us[0] * us[0] + us[1] * us[1]
            s, each = _row_scale(square, C * n, CLIP, EPS, TOP, ROWS, NB)
            unit, far = n**-0.5 / each, each * (LIMIT * n**0.5)

        # Round. 1.5 * 2^23 has units in the last place: adding it rounds to an integer, q, which
        # stands in the lowest bits of the sum.
        total = tl.zeros((ROWS * NB,), tl.int32)
        for half in tl.static_range(HALVES):
            near = tl.minimum(tl.maximum(us[half] * unit + (SHIFT - 0.5), LOW), LOW + TOP)
            near += 12582912.0
            q = near.to(tl.int32, bitcast=True) - 0x4B400000
            c = 2 * q + ODD
            to = at + (start + half * WIDE + place[None, :])
            tl.store(codes + to, (c if TOP < 128 else q).to(tl.int8), mask=live)
            total += tl.sum(c, 1)

        # Blocks that are not there held zeros, which became codes ODD.
        total = tl.sum(tl.reshape(total, (ROWS, NB)), 1) - (NB * n - C) * ODD
        tl.store(scale + out, s, mask=out < T)
        tl.store(sums + out, total, mask=out < T)

        if TRAIN:
            # With HALVES = 1: the values on the grid, and eight bools of the mask in a byte.
            value = (near - 12582912.0 + 0.5 * ODD) * each
            tl.store(values + to, value.to(values.dtype.element_ty), mask=live)
            bit = (tl.abs(us[0]) <= far).to(tl.int32) << (col % 8)[None, :]
            byte = tl.sum(tl.reshape(bit, (ROWS * NB, n // 8, 8)), 2).to(tl.uint8)
            tl.store(trusted + at // 8 + (start // 8 + tl.arange(0, n // 8)[None, :]), byte,
                     mask=live)

class Rows(NamedTuple):
    """How programs that stay walk through rows, a tile of blocks at a time."""
    blocks: int                # of up to 128 numbers, in a tile
    warps: int
    stages: int                # tiles in flight
    programs: int              # at most

# The fastest measured on an H100. 64 blocks are the least that its wide tensor-core instruction
# takes; more, or more than two programs an SM, did not pay, tiles loaded ahead did. Float32 takes
# too many registers for 64, and rows of more than 64 blocks need wider tiles. For codes alone H
# comes in halves: a quarter of it to wait for at the start and to hold in shared memory, which
# leaves room for more tiles in flight.
QUANTIZE = Rows(64, 4, 3, 264)
QUANTIZE_WIDE = Rows(128, 4, 2, 264)
QUANTIZE_HALVES = Rows(64, 4, 4, 264)
QUANTIZE_HALVES_WIDE = Rows(128, 8, 3, 264)
QUANTIZE_FLOAT32 = Rows(32, 4, 1, 264)
ROTATE = Rows(64, 4, 1, 396)

def quantize_tile(float32, train, n, NB):
    """HALVES and Rows of `_hadamard_quantize` for rows of NB blocks of n."""
    wide = NB > 64
    if float32 or train or n < 32:                     # a dot takes 16 columns and more
        narrow = QUANTIZE_FLOAT32 if float32 else QUANTIZE
        return 1, QUANTIZE_WIDE if wide else narrow
    return 2, QUANTIZE_HALVES_WIDE if wide else QUANTIZE_HALVES

def hadamard_quantize(x, bits, dtype=None, planes=1):
    """Rows x (T, C) -> codes int8 (T, C) of rotate(x), scale float32 (T,), sums int32 (T,).

    sums: of 2 q + 1 (ternary: 2 q) over a row. With a dtype, for training, two more: values (T, C),
    the rotated rows on their grid, and trusted (T, C / 8), the trust mask, first column in the
    lowest bit. planes: of a block's n columns, planes i + f comes at f n / planes + i.
    x float16, bfloat16 or float32; n = gcd(C, 128) >= 16; C <= 32768.
    """
    T, C = x.shape
    train = dtype is not None
    out = [x.new_empty(T, C, dtype=torch.int8),
           x.new_empty(T, dtype=torch.float32),
           x.new_empty(T, dtype=torch.int32)]
    if train:
        out += [x.new_empty(T, C, dtype=dtype), x.new_empty(T, C // 8, dtype=torch.uint8)]

    # The tile is the same for every T: so a row's sums keep their order.
    n = math.gcd(C, 128)
    NB = triton.next_power_of_2(C // n)
    float32 = x.dtype == torch.float32
    halves, rows = quantize_tile(float32, train, n, NB)
    ROWS = max(1, rows.blocks // NB)
    tiles = triton.cdiv(T, ROWS)
    turns = triton.cdiv(tiles, rows.programs)          # tiles a program

    signs = hadamard_signs(n // halves, x.device, torch.float16 if float32 else x.dtype)
    codes, scale, sums = out[:3]
    values, trusted = out[-2:]                         # without a dtype they are not written
    _hadamard_quantize[triton.cdiv(tiles, turns),](
        x.contiguous(), signs, codes, scale, sums, values, trusted, T, C, GAUSSIAN_CLIP[bits], EPS,
        2.0 * clip_limit(bits), 0.5 - code_offset(bits), trust_limit(bits), planes, train, n,
        halves, NB, ROWS, rows.stages, HOPPER and not train, num_warps=rows.warps)
    return out

@triton.jit
def _rotate_trusted(g, g2, g3, trusted, signs, out, blocks, COUNT: tl.constexpr,
                    n: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr):
    """Blocks of n, R a tile: COUNT gradients added, masked by a bit each, rotated."""
    i = tl.arange(0, R)[:, None]
    col = tl.arange(0, n)[None, :]
    bits = tl.arange(0, 8)
    H = tl.load(signs + tl.arange(0, n)[:, None] * n + col)
    for tile in tl.range(tl.program_id(0), tl.cdiv(blocks, R), tl.num_programs(0),
                         num_stages=STAGES):
        live = tile * R + i < blocks
        at = tl.cast(tile, tl.int64) * (R * n)
        v = tl.load(g + at + (i * n + col), mask=live, other=0.0)          # (R, n)
        if COUNT > 1:
            v = v.to(tl.float32) + tl.load(g2 + at + (i * n + col), mask=live, other=0.0)
        if COUNT > 2:
            v += tl.load(g3 + at + (i * n + col), mask=live, other=0.0)

        # A byte is the mask of eight columns.
        byte = tl.load(trusted + at // 8 + (i * (n // 8) + tl.arange(0, n // 8)[None, :]),
                       mask=live, other=0)
        keep = tl.reshape(byte[:, :, None] >> bits & 1, (R, n)) != 0
        h = tl.dot(tl.where(keep, v, 0.0).to(signs.dtype.element_ty), H) * n**-0.5
        tl.store(out + at + (i * n + col), h.to(out.dtype.element_ty), mask=live)

def rotate_trusted(gs, trusted, dtype):
    """rotate(sum(gs) * mask) in dtype: QuEST's backward pass. gs: up to three (T, C) of float16 or
    bfloat16; trusted of hadamard_quantize. Products are exact, sums are float32 (and rounded once
    before the rotation where there are several). Raises ValueError for more than three."""
    if len(gs) > 3:
        raise ValueError(f"rotate_trusted adds up to 3 gradients; there are {len(gs)}")
    first = gs[0].contiguous()
    second = gs[len(gs) // 2].contiguous()             # not read where there are fewer
    third = gs[-1].contiguous()
    n = math.gcd(first.size(1), 128)
    blocks = first.numel() // n
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    _rotate_trusted[min(triton.cdiv(blocks, ROTATE.blocks), ROTATE.programs),](
        first, second, third, trusted, hadamard_signs(n, first.device, first.dtype), out, blocks,
        len(gs), n, ROTATE.blocks, ROTATE.stages, num_warps=ROTATE.warps)
    return out

# ---- QuEST: integer matmul ----------------------------------------------------------------------
# The weight is the left operand, which Hopper's tensor cores take from registers: codes of 1, 2, 4
# or 8 bits go there from packed words, as checkpoints hold them. Four codes at a time, one a byte,
# are moved to the top of their bytes, and the bit below is set:
#
#     byte of a word     hhhh llll          two codes of 4 bits, two's complement
#     f = 0, << 4        llll 0000          16 q            as a signed byte
#     | HALF             llll 1000          16 (q + 1/2)    = 2^(8 - b) (q + 1/2)
#
# Two instructions for four codes. Plane f of a word, the codes that lie f b bits up in its bytes,
# holds every (8 / b)th column: hadamard_quantize puts x's columns of a plane side by side.

@triton.jit
def _tile_of(i, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First token and first output of tile i. As in Triton's tutorial tiles go in bands, here of 8
    tiles of outputs, whose weights L2 holds."""
    tiles, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    high = tl.minimum(wide - i // (8 * tiles) * 8, 8)
    return (i % (8 * tiles) // high * BLOCK_M,
            (i // (8 * tiles) * 8 + i % (8 * tiles) % high) * BLOCK_N)

@triton.jit
def _quest_matmul(a, a_scale, a_sum, w, w_scale, w_sum, y, parts, tickets, M, N, K: tl.constexpr,
                  b: tl.constexpr, HALF: tl.constexpr, A8: tl.constexpr, W8: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  SPLIT: tl.constexpr, PDL: tl.constexpr):
    """y (M, N) of codes a (M, K) and words w of b bits a code; see quest_matmul.

    A8, W8: these codes are q and not 2 q + 1. Then (2 q_a + 1) (2 q_w + 1) is made up for by the
    sums of the other side: c_a c_w = 2 q_a c_w + c_w and so on; with both,
    4 q_a q_w + c_a + c_w - 1. All of this is exact, in int32. SPLIT: parts of k, as in `_tile`; of
    integers the sum is the same in any order.
    """
    pid = tl.program_id(0)
    m, n = _tile_of(pid, M, N, BLOCK_M, BLOCK_N)
    m, n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    PLANES: tl.constexpr = 8 // b
    WIDE: tl.constexpr = 128 // PLANES                 # columns of a block in one plane
    j = tl.arange(0, BLOCK_K // PLANES)
    live = (m < M)[None, :]
    row = (n % N).to(tl.int64)[:, None] * K
    w8 = w.to(tl.pointer_type(tl.int8), bitcast=True) + row + j[None, :]
    w += row // 32 * b + tl.arange(0, BLOCK_K * b // 32)[None, :]
    a += m.to(tl.int64)[None, :] * K

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    first = tl.program_id(1) * (K // SPLIT)
    if PDL:
        tl.extra.cuda.gdc_wait()                       # for a
    for step in range(0, K // SPLIT, BLOCK_K):
        k = first + step
        if A8 and W8:
            # Both from shared memory: the registers are needed for the sums.
            acc = tl.dot(tl.load(w8 + k), tl.load(a + (k + j)[:, None], mask=live, other=0), acc,
                         out_dtype=tl.int32)
        else:
            words = tl.load(w + k // 32 * b).to(tl.uint32)             # (BLOCK_N, BLOCK_K b / 32)
            for f in tl.static_range(PLANES):
                # The plane's codes at the top of their bytes, then the four bytes in their order
                top = (words << (8 - b - b * f)) & (0x01010101 * (256 - 2**(8 - b))) | HALF
                b0, b1 = top.to(tl.int8), (top >> 8).to(tl.int8)
                b2, b3 = (top >> 16).to(tl.int8), (top >> 24).to(tl.int8)
                tile = tl.join(tl.join(b0, b2), tl.join(b1, b3))
                tile = tl.reshape(tile, (BLOCK_N, BLOCK_K // PLANES))

                # times the same columns of a
                at = k + j // WIDE * 128 + f * WIDE + j % WIDE
                acc = tl.dot(tile, tl.load(a + at[:, None], mask=live, other=0), acc,
                             out_dtype=tl.int32)

    if SPLIT > 1:
        size: tl.constexpr = BLOCK_N * BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(parts + (pid * SPLIT + tl.program_id(1)) * size + at, acc)
        if _is_early(tickets, pid, SPLIT):
            return
        acc = _sum_of_parts(acc, parts, pid, at, size, SPLIT)

    # The half steps that 8-bit codes lack. a_sum and w_sum are sums of 2 q + 1; packed codes of w
    # stand in acc as 2^(8-b) (q + 1/2) = 2^(7-b) (2 q + 1).
    acc *= (2 if A8 else 1) * (2 if W8 else 1)
    if A8:
        acc += (tl.load(w_sum + n % N) * 2**(7 - b if b < 8 else 0))[:, None]
    if W8:
        acc += tl.load(a_sum + m[None, :], mask=live, other=0) - (K if A8 else 0)

    # Integers to numbers: a unit is half a step of a and, at the top of a byte, 2^(b - 8) of w's;
    # at b = 8, half a step of each.
    unit = 0.25 if b == 8 else 2.0**(b - 9)
    out = acc.to(tl.float32) * (unit * tl.load(w_scale + n % N))[:, None]
    out = tl.trans(out * tl.load(a_scale + m[None, :], mask=live, other=0.0))      # tokens first
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], out.to(y.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])

@triton.jit
def _quest_matmul_tma(a, a_scale, a_sum, w, w_scale, w_sum, y, M, N, K: tl.constexpr,
                      A8: tl.constexpr, W8: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """The same for weights of 8 bits and many tokens. a, w and y are tensor descriptors: TMA loads
    whole tiles, which leaves registers for tiles twice the size. Programs stay for many tiles."""
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N),
                      tl.num_programs(0), flatten=True):           # next loads go on below
        m, n = _tile_of(i, M, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            acc = tl.dot(a.load([m, k]), w.load([n, k]).T, acc, out_dtype=tl.int32)

        # The half steps, and the scales: as above.
        at_m, at_n = (m + tl.arange(0, BLOCK_M)) % M, (n + tl.arange(0, BLOCK_N)) % N
        acc *= (2 if A8 else 1) * (2 if W8 else 1)
        if A8:
            acc += tl.load(w_sum + at_n)[None, :]
        if W8:
            acc += tl.load(a_sum + at_m)[:, None] - (K if A8 else 0)
        out = acc.to(tl.float32) * (0.25 * tl.load(w_scale + at_n))[None, :]
        out = (out * tl.load(a_scale + at_m)[:, None]).to(y.dtype)

        # Stored by halves, as a whole tile of y does not fit into shared memory beside a and w.
        halves = tl.permute(tl.reshape(out, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        y.store([m, n], left)
        y.store([m, n + BLOCK_N // 2], right)

class QuestTile(NamedTuple):
    """How the integer product is covered."""
    BLOCK_M: int               # tokens
    BLOCK_N: int               # outputs
    BLOCK_K: int               # inputs a step
    warps: int
    stages: int

# From large to small. Large tiles read less from L2, but leave processors idle where there are few
# of them. Two programs share a processor and hide each other's waits.
QUEST_TILES = (
    QuestTile(128, 128, 128, warps=8, stages=4),
    QuestTile(64, 128, 256, warps=8, stages=3),
    QuestTile(64, 64, 256, warps=4, stages=4),
)
QUEST_TILES_8x8 = (            # 8 x 8 bits: nothing to unpack, and 4 warps do
    QuestTile(128, 128, 128, warps=4, stages=3),
    QuestTile(128, 64, 128, warps=4, stages=4),
    QuestTile(64, 64, 256, warps=4, stages=4),
)
QUEST_TILE_FEW = QuestTile(16, 64, 256, warps=4, stages=4)         # up to 16 tokens
# For as many tiles as there are processors: what limits them is the traffic from L2, 6 to 7 TB/s,
# and tiles that Hopper's TMA loads leave registers and time for tiles twice the size.
QUEST_TMA = QuestTile(128, 256, 128, warps=8, stages=4)

def count_quest_tiles(M, N, tile):
    return triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)

def quest_tile(M, N, a_bits, bits):
    """The QuestTile for M tokens and N outputs, without TMA: the largest of which there is one for
    every processor, else the smallest."""
    if M <= 16:
        return QUEST_TILE_FEW
    for tile in QUEST_TILES_8x8 if a_bits == bits == 8 else QUEST_TILES:
        if count_quest_tiles(M, N, tile) >= SMS:
            break
    return tile

def quest_split(tiles, K, BLOCK_K):
    """Parts of k: for few tiles and so many k's that a part has 3,000 of them or more."""
    for split in (4, 2):
        if tiles * split <= 2 * SMS and K >= 3000 * split and K % (split * BLOCK_K) == 0:
            return split
    return 1

def quest_matmul(a, w, a_bits, bits, dtype, tile=None):
    """QuEST inputs times QuEST weights, (M, N) in dtype; sums are exact integers.

    a: codes (M, K), scale, sums of hadamard_quantize. w: the same of a weight (N, K), or what
    quest_operand gives: codes uint8 (N, K b / 8), b = 1, 2 or 4, for which a's codes come in
    planes = 8 / b. 128 divides K (at b = 1 256) and K <= 32512. tile: another than the tables'.
    """
    a_codes, a_scale, a_sum = a[:3]
    w_codes, w_scale, w_sum = w[:3]
    M, K = a_codes.shape
    N = len(w_codes)
    b = 8 * w_codes.size(1) // K
    y = torch.empty(M, N, dtype=dtype, device=a_codes.device)

    if tile is None and use_tma(M, N, b, dtype):
        tile = QUEST_TMA
        _quest_matmul_tma[SMS,](
            TensorDescriptor.from_tensor(a_codes, [tile.BLOCK_M, tile.BLOCK_K]), a_scale, a_sum,
            TensorDescriptor.from_tensor(w_codes.view(torch.int8), [tile.BLOCK_N, tile.BLOCK_K]),
            w_scale, w_sum, TensorDescriptor.from_tensor(y, [tile.BLOCK_M, tile.BLOCK_N // 2]),
            M, N, K, a_bits == 8, bits == 8, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.stages,
            num_warps=tile.warps)
        return y

    tile = tile or quest_tile(M, N, a_bits, bits)
    half = 0 if bits == 1.58 or b == 8 else 0x01010101 << (7 - b)          # ternary codes have none
    BLOCK_K = math.gcd(K, 256 if b == 1 else tile.BLOCK_K)     # 32 columns of a plane at least
    tiles = count_quest_tiles(M, N, tile)
    split = quest_split(tiles, K, BLOCK_K)
    parts = tickets = y                                # not read
    if split > 1:
        size = tiles * split * tile.BLOCK_M * tile.BLOCK_N
        parts = torch.empty(size, dtype=torch.int32, device=y.device)
        tickets = torch.zeros(tiles, dtype=torch.int32, device=y.device)
    early = HOPPER and not torch.compiler.is_compiling()
    _quest_matmul[tiles, split](
        a_codes, a_scale, a_sum, w_codes.view(torch.int32), w_scale, w_sum, y, parts, tickets, M, N,
        K, b, half, a_bits == 8, bits == 8, tile.BLOCK_M, tile.BLOCK_N, BLOCK_K, split, early,
        num_warps=tile.warps, num_stages=tile.stages, **launch(early))
    return y

def use_tma(M, N, b, dtype):
    """Does the kernel with descriptors take this product? Under torch.compile they are untried."""
    if not TMA or torch.compiler.is_compiling():
        return False
    enough = count_quest_tiles(M, N, QUEST_TMA) >= SMS
    return b == 8 and enough and N % 8 == 0 and dtype.itemsize == 2

def quest_planes(bits, K):
    """How many codes a byte holds in the weight that `quest_operand` gives."""
    if bits == 1 and K % 256 == 0:
        return 8
    if bits == 2:
        return 4
    return 2 if bits <= 4 else 1

def quest_operand(packed, scale, bits, K):
    """A checkpoint's packed weight and scale -> w of quest_matmul. 1, 2, 4 and 8 bits stay as they
    are; 1.58 and 3 bits (and 1 where 256 does not divide K) get 4, 5 to 7 bits get 8."""
    q = unpack(packed, bits, K, signed=True)
    sums = 2 * (q.to(torch.int32) + code_offset(bits)).sum(1)
    planes = quest_planes(bits, K)
    if bits == 8:
        packed = q
    elif planes == 1:
        packed = 2 * q + 1
    elif planes * bits != 8:
        packed = pack(q, 8 // planes)
    return packed, scale.view(-1), sums.to(torch.int32)

def quest_linear(x, w, a_bits, bits):
    """QuantLinear's forward for QuEST: x (..., K), w of quest_operand -> (..., N)."""
    a = hadamard_quantize(x.flatten(0, -2), a_bits, planes=quest_planes(bits, x.size(-1)))
    y = quest_matmul(a, w, a_bits, bits, x.dtype)
    return y.view(*x.shape[:-1], y.size(-1))

def quest_fits(x, bits, a_bits):
    """Whether the kernels above take inputs x (..., K) on the uniform grid. Of more than 32512
    inputs the sums may leave int32."""
    K = x.size(-1)
    half = x.dtype in (torch.float16, torch.bfloat16)
    return (x.is_cuda and half and max(bits, a_bits) <= 8 and x.numel() > 0 and K % 128 == 0
            and K <= 32512)

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
    """tables (tokens, M, G, 256): products of R groups of inputs and CODES entries of a codebook.

    A dot takes 16 k's at least: a group's 8 inputs, then zeros.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()          # the look-ups' programs may load codes now
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(tickets + tl.arange(0, TILES), tl.zeros((TILES,), tl.int32))
    r = tl.program_id(0) * R + tl.arange(0, R)         # group of all tokens' groups
    e = tl.arange(0, 16)
    c = tl.program_id(1) * CODES + tl.arange(0, CODES) # entry of all codebooks' entries
    token = tl.program_id(0) * R // G
    v = tl.load(x + r[:, None] * 8 + e[None, :], mask=(e < 8)[None, :], other=0.0)         # (R, 16)
    book = tl.load(books + c[None, :] * 8 + e[:, None], mask=(e < 8)[:, None], other=0.0)
    row = (token * (tl.num_programs(1) * CODES // 256) + c // 256)[None, :] * G + (r % G)[:, None]
    tl.store(tables + row * 256 + (c % 256)[None, :], tl.dot(v, book).to(tables.dtype.element_ty))

@triton.jit(do_not_specialize=["N"])
def _vq_lookups(tables, codes, scales, parts, tickets, y, tokens, N, ROWS: tl.constexpr,
                R: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
                PDL: tl.constexpr, UNROLL: tl.constexpr):
    """y (tokens, N) from the tables: BLOCK_N outputs, one of SPLIT parts of the ROWS = M G tables.

    A step looks up R tables for each token. A word holds the codes of 4 neighbouring outputs, so
    that sums are (BLOCK_N / 4, R TOKENS, 4).
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    i = tile * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
    j = tl.arange(0, 4)                                # output 4 i + j
    q = tl.arange(0, R * TOKENS) % R
    token = tl.arange(0, R * TOKENS) // R
    codes = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    acc = tl.zeros((BLOCK_N // 4, R * TOKENS, 4), tl.float32)
    first = part * (ROWS // SPLIT) + q                 # rows of codes: codebook * G + group
    inside = (i < N // 4)[:, None]
    word = tl.load(codes + first[None, :] * (N // 4) + i[:, None], mask=inside, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()                       # the tables are there

    for k in tl.range(0, ROWS // SPLIT, R, loop_unroll_factor=UNROLL):
        # The next step's codes come ahead of their use.
        row = first + k
        now = word
        word = tl.load(codes + (row + R)[None, :] * (N // 4) + i[:, None],
                       mask=inside & (k + R < ROWS // SPLIT), other=0)
        at = (tl.minimum(token, tokens - 1) * ROWS + row) * 256
        code = now[:, :, None] >> (8 * j)[None, None, :] & 255
        acc += tl.load(tables + at[None, :, None] + code).to(tl.float32)

    # Leave this part's sums. The program with the tile's last ticket, when all parts are there,
    # adds them in the same order every time.
    sums = tl.sum(tl.reshape(acc, (BLOCK_N // 4, TOKENS, R, 4)), 2)        # of the R tables
    t = tl.arange(0, TOKENS)[None, :, None]
    at = t * N + (4 * i)[:, None, None] + j[None, None, :]
    live = (t < tokens) & (i < N // 4)[:, None, None]
    tl.store(parts + part * tokens * N + at, sums, mask=live)
    tl.debug_barrier()
    if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLIT - 1:
        sums = tl.zeros((BLOCK_N // 4, TOKENS, 4), tl.float32)
        for p in tl.range(SPLIT, loop_unroll_factor=16 // TOKENS):
            sums += tl.load(parts + p * tokens * N + at, mask=live, other=0.0,
                            cache_modifier=".cg")
        n = (4 * i)[:, None, None] + j[None, None, :]
        sums *= tl.load(scales + n, mask=n < N, other=0.0)
        tl.store(y + at, sums.to(y.dtype.element_ty), mask=live)

MANY = 2**31

class VqTile(NamedTuple):
    """How look-ups are shared out."""
    most: int                  # outputs
    outputs: int               # a program; BLOCK_N of the kernel
    programs: int              # at least
    tables: int                # a step, for one token; R of the kernel
    warps: int
    unroll: int                # steps

# The fastest measured on an H100.
VQ_TILES = (VqTile(8192, 256, 256, 32, warps=4, unroll=2),
            VqTile(MANY, 512, 256, 16, warps=4, unroll=1))

def vq_matmul(x, codes, codebooks, scales):
    """x (B, 8 G) times a weight of additive codebooks -> (B, N), in x's dtype.

    codes uint8 (M, G, N): a checkpoint's (N, G, M) as permute(2, 1, 0).contiguous(); codebooks
    (M, 256, 8) in x's dtype, float16 or bfloat16, which the tables have as well; scales float32
    (N,). The kernel takes up to 4 tokens, 32 | G and 16 | N; PyTorch and cuBLAS the rest.
    """
    B = len(x)
    M, G, N = codes.shape
    if B > 4 or G % 32 or N % 16 or codebooks.shape != (M, 256, 8) or x.dtype == torch.float32:
        return vq_matmul_reference(x, codes, codebooks, scales)

    # Few outputs are few tiles: then the tables are shared out over more programs.
    tile = next(tile for tile in VQ_TILES if N <= tile.most)
    TOKENS = triton.next_power_of_2(B)
    R = tile.tables // TOKENS
    tiles = triton.cdiv(N, tile.outputs)
    parts_wanted = triton.next_power_of_2(triton.cdiv(tile.programs, tiles))
    SPLIT = math.gcd(M * G // R, parts_wanted)

    tables = x.new_empty(B * M * G * 256)
    parts = scales.new_empty(SPLIT * B * N)
    TILES = triton.next_power_of_2(tiles)
    tickets = codes.new_empty(TILES, dtype=torch.int32)
    y = x.new_empty(B, N)
    early = HOPPER and not torch.compiler.is_compiling()
    _vq_tables[B * G // 16, 2 * M](x.contiguous(), codebooks, tables, tickets, G, 16, 128, TILES,
                                   early, num_warps=2)
    _vq_lookups[tiles, SPLIT](tables, codes, scales, parts, tickets, y, B, N, M * G, R, TOKENS,
                              tile.outputs, SPLIT, early, tile.unroll, num_warps=tile.warps,
                              **launch(early))
    return y

def vq_matmul_reference(x, codes, codebooks, scales):
    """The same by a dense weight (N, 8 G): row n's vectors are sums of codebooks[m, codes[m, g, n]]
    over m."""
    w = sum(book[index.long()] for book, index in zip(codebooks, codes))          # (G, N, 8)
    return F.linear(x, w.transpose(0, 1).flatten(1)) * scales.to(x.dtype)

# ---- GPTQ's columns -----------------------------------------------------------------------------

@triton.jit
def _gptq_columns(w, u, scale, zero_point, q, error, O, n, qmax,
                  ROWS: tl.constexpr, COLS: tl.constexpr):
    """The column loop of quantizers.gptq for one lazy block w (O, n).

    Rows do not depend on each other, so one program keeps its rows' whole block in registers
    through all of the columns: one launch a block, where the loop of GPTQ's code makes about ten a
    column. The arithmetic is that of the plain loop to the bit: no multiply and add are fused, and
    divisions are rounded as IEEE says.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)     # (ROWS,)
    cols = tl.arange(0, COLS)
    live = rows < O
    inside = cols < n
    block = tl.load(w + rows[:, None] * n + cols[None, :],
                    mask=live[:, None] & inside[None, :], other=0.0)       # (ROWS, COLS)
    for i in range(n):
        # Column i to its grid. Adding 1.5 * 2^23 rounds to integers, half to even.
        x = tl.sum(tl.where(cols[None, :] == i, block, 0.0), 1)            # (ROWS,)
        s = tl.load(scale + rows * n + i, mask=live, other=1.0)
        z = tl.load(zero_point + rows * n + i, mask=live, other=0.0)
        nearest = tl.div_rn(x, s) + 12582912.0 - 12582912.0
        code = tl.minimum(tl.maximum(nearest + z, 0.0), qmax)

        # Its error, spread over the columns to the right: u is zero left of column i.
        e = tl.div_rn(x - (code - z) * s, tl.load(u + i * n + i))
        tl.store(q + rows * n + i, code, mask=live)
        tl.store(error + rows * n + i, e, mask=live)
        u_row = tl.load(u + i * n + cols, mask=inside, other=0.0)
        block -= e[:, None] * u_row[None, :]

def gptq_columns(w, u, scale, zero_point, bits):
    """w (O, n) float32, u (n, n) upper, scale and zero_point (O, n) -> codes, errors (O, n)."""
    O, n = w.shape
    q = w.new_empty(O, n)
    error = w.new_empty(O, n)
    ROWS = 16
    _gptq_columns[triton.cdiv(O, ROWS),](
        w.contiguous(), u.contiguous(), scale.contiguous(), zero_point.contiguous(), q, error, O, n,
        float(2**bits - 1), ROWS=ROWS, COLS=triton.next_power_of_2(n), num_warps=4,
        enable_fp_fusion=False)
    return q, error

# ---- What a packed layer calls ------------------------------------------------------------------

class Form(NamedTuple):
    """How a form of QuantLinear is multiplied."""
    operand: Callable          # (layer, x) -> its weight as a kernel reads it; None: no kernel
    product: Callable          # (layer, x, that weight) -> y

class Kept(NamedTuple):
    """layer.fast: an operand, and what it was made from and for."""
    packed: torch.Tensor       # the layer's, that is, this very tensor: another has been moved
    operand: object
    version: int               # of packed: load_state_dict writes into it
    dtype: torch.dtype         # of x

def linear(layer, x):
    """The product of a QuantLinear with inputs x (..., C) in 16 bits -> (..., O), or None where
    there is no kernel for it. Its weight in the order that the kernels read is made at the first
    use and kept in layer.fast."""
    if torch.compiler.is_compiling():
        # One operation to the compiler, which knows neither the layer nor the kernels. The weight
        # was made in a call before, or else there is no kernel.
        if layer.fast is None or layer.fast.operand is None:
            return None
        return torch.ops.nanobit.packed_linear(x, id(layer), len(layer.packed))

    form = FORMS[layer.spec["kind"]]
    if not up_to_date(layer, x):
        layer.fast = Kept(layer.packed, form.operand(layer, x), version(layer.packed), x.dtype)
        LAYERS[id(layer)] = layer
    if layer.fast.operand is None:
        return None
    return form.product(layer, x, layer.fast.operand)

def up_to_date(layer, x):
    """Is layer.fast that of this weight and these inputs?"""
    kept = layer.fast
    if kept is None or kept.packed is not layer.packed:
        return False
    return kept.version == version(layer.packed) and kept.dtype == x.dtype

def version(t):
    """How often a tensor was written to; inference tensors do not count that."""
    return None if t.is_inference() else t._version

LAYERS = weakref.WeakValueDictionary()  # id: a layer that compiled code asks for

@torch.library.custom_op("nanobit::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, layer: int, outputs: int) -> torch.Tensor:
    return linear(LAYERS[layer], x)

@packed_linear.register_fake
def _(x, layer, outputs):
    return x.new_empty(*x.shape[:-1], outputs)

def affine_operand(layer, x):
    """A LowBit, on a Hopper GPU; on others the first arguments of the plain kernel: the scale in
    float32, and a byte for a zero point. None, and a warning, for a shape without a kernel."""
    g = layer.spec["group_size"]
    if HOPPER:
        w = pack_weight(layer.codes(), layer.scale, layer.zero_point, layer.bits, g)
    else:
        w = (layer.packed, layer.scale.float(), layer.zero_point) if layer.bits <= 8 else None
    if w is None:
        warnings.warn(f"kernels.py has no kernel for {layer.bits} bits, {layer.in_features} "
                      f"inputs, groups of {g}: these layers run in PyTorch")
    return w

def affine_product(layer, x, w):
    if isinstance(w, LowBit):
        return lowbit_matmul(x, w)
    if x.numel() > FUSED * x.size(-1):
        # The plain kernel would unpack a weight once for every 64 tokens.
        return F.linear(x, layer.weight().to(x.dtype))
    return plain_matmul(x, *w, layer.bits, layer.spec["group_size"])

def quest_layer_operand(layer, x):
    """What quest_operand makes; None for a layer of a baseline of QuEST (not rotated, or of a fixed
    scale), another grid, or a shape without a kernel."""
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
    y = vq_matmul(x.flatten(0, -2), codes, codebooks, scale)
    return y.view(*x.shape[:-1], y.size(-1))

FORMS = {                      # by the kind that a layer's spec names
    "affine": Form(affine_operand, affine_product),
    "quest": Form(quest_layer_operand, quest_product),
    "vq": Form(vq_operand, vq_product),
}

# ---- One shape, timed ---------------------------------------------------------------------------

def main(O=14336, C=4096, bits=4, group=128, copies=8):
    """Microseconds of one layer by cuBLAS, the plain kernel and the tuned ones."""
    Parser(prog="kernels.py", description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        raise UsageError("kernels.py times its kernels, and there is no GPU here; run it on one")

    # Calls take turns among copies of the weight, so that none finds its own in the L2 cache.
    dense = torch.randn(copies, O, C, device="cuda").bfloat16()
    q, scale, zero = rtn(dense[0].float(), bits, group)
    packed = pack(q, bits).repeat(copies, 1, 1)
    tuned = [pack_weight(q, scale, zero, bits, group) for _ in range(copies)]

    def time(call, x):
        def every_copy():
            for i in range(copies):
                call(x, i)
        return 1e3 / copies * triton.testing.do_bench_cudagraph(every_copy)

    print(f"{torch.cuda.get_device_name()} | {O} x {C}, {bits} bits, groups of {group}")
    for M in (1, 16, 64, 300, 512, 4096):
        x = torch.randn(M, C, device="cuda").bfloat16()
        cublas = time(lambda x, i: F.linear(x, dense[i]), x)
        plain = time(lambda x, i: plain_matmul(x, packed[i], scale, zero, bits, group), x)
        fast = time(lambda x, i: lowbit_matmul(x, tuned[i]), x)
        print(f"{M:4} tokens | cuBLAS {cublas:6.1f} us | plain {plain:7.1f} us, "
              f"{cublas / plain:.2f} x | tuned {fast:6.1f} us, {cublas / fast:.2f} x")

if __name__ == "__main__":
    from model import UsageError
    from nanobit.cli import Parser, run
    run(main)
