"""Triton kernels for low-bit layers.

`gptq_columns` is the column loop of quantizers.gptq for one lazy block. Rows do not depend on
each other, so one program keeps its rows' whole block in registers through all of the columns:
one launch a block, where the loop of GPTQ's code makes about ten a column. The arithmetic is that
of the plain loop to the bit: no multiply and add are fused, and divisions are rounded as IEEE says.
"""
import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quantizers import (EPS, GAUSSIAN_CLIP, clip_limit, code_offset, hadamard_signs, pack,
                        quest_codes, rotate, trust_limit, unpack)

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

# ---- QuEST: rotation, scale, codes and trust mask in one pass ---------------------------------
# H is orthonormal: a row's root mean square is known before it is rotated. Codes are integers
# around zero, 2 q + 1 (ternary: 2 q), so that no product has to make up for the grid's half step;
# only at 8 bits, where that would leave int8, they are q. A program loads H once.

@triton.jit
def _hadamard_quantize(x, signs, codes, scale, sums, values, trusted, T, C: tl.constexpr,
                       CLIP: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr,
                       SHIFT: tl.constexpr, LIMIT: tl.constexpr, PLANES: tl.constexpr,
                       TRAIN: tl.constexpr, n: tl.constexpr, NB: tl.constexpr,
                       ROWS: tl.constexpr, STAGES: tl.constexpr):
    i, r, col = tl.arange(0, ROWS * NB), tl.arange(0, ROWS), tl.arange(0, n)
    order = (col % (n // PLANES)) * PLANES + col // (n // PLANES)
    H = tl.trans(tl.load(signs + order[:, None] * n + col[None, :]))       # (n, n)
    start = (i // NB * C + i % NB * n)[:, None]                            # NB blocks of n a row
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0),
                         num_stages=STAGES):
        at, out = tl.cast(tile, tl.int64) * (ROWS * C), tile * ROWS + r
        live = ((tile * ROWS + i // NB < T) & (i % NB < C // n))[:, None]
        v = tl.load(x + at + (start + col[None, :]), mask=live, other=0.0)         # (ROWS NB, n)
        f = v.to(tl.float32)
        square = tl.sum(tl.reshape(tl.sum(f * f, 1), (ROWS, NB)), 1)       # (ROWS,)
        s = (CLIP * tl.sqrt(square / C) + EPS) * (2.0 / TOP)
        each = tl.reshape(tl.broadcast_to(s[:, None], (ROWS, NB)), (ROWS * NB,))[:, None]
        if x.dtype.element_ty == tl.float32:           # two float16 hold 22 bits of it
            f *= n**-0.5 / each
            high = f.to(tl.float16)
            u = tl.dot(high, H, tl.dot((f - high.to(tl.float32)).to(tl.float16), H))
        else:
            u = tl.dot(v, H) * (n**-0.5 / each)
        near = (u + (SHIFT - 0.5)) + 12582912.0 - 12582912.0       # 1.5 * 2^23: to the nearest
        c = tl.minimum(tl.maximum(2.0 * near + (1.0 - 2.0 * SHIFT), -TOP), TOP)
        k = (c if TOP < 128 else 0.5 * c - 0.5) + 12582912.0       # its low byte is the integer
        tl.store(codes + at + (start + col[None, :]), k.to(tl.int32, bitcast=True).to(tl.int8),
                 mask=live)
        total = tl.sum(tl.reshape(tl.sum(tl.where(live, c, 0.0), 1), (ROWS, NB)), 1)
        tl.store(scale + out, s, mask=out < T)
        tl.store(sums + out, total.to(tl.int32), mask=out < T)
        if TRAIN:
            tl.store(values + at + (start + col[None, :]),
                     (c * (0.5 * each)).to(values.dtype.element_ty), mask=live)
            bit = (tl.abs(u) <= LIMIT).to(tl.int32) << (col % 8)[None, :]
            byte = tl.sum(tl.reshape(bit, (ROWS * NB, n // 8, 8)), 2).to(tl.uint8)
            tl.store(trusted + at // 8 + (start // 8 + tl.arange(0, n // 8)[None, :]), byte,
                     mask=live)

# (rows of H's width a tile, warps, tiles in flight, programs), the fastest measured on an H100.
# 64 rows are the least that its wide tensor-core instruction takes; more rows, or more than two
# programs a processor, did not pay, tiles loaded ahead did. Float32 rows take too many registers
# for 64, and rows of more than 64 blocks need wider tiles.
QUANTIZE, QUANTIZE_WIDE = (64, 4, 3, 264), (128, 8, 2, 264)
QUANTIZE_FLOAT32, ROTATE = (32, 4, 1, 264), (64, 4, 1, 396)

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
    tile, warps, stages, programs = (QUANTIZE_WIDE if NB > 64 else QUANTIZE_FLOAT32 if wide else
                                     QUANTIZE)
    ROWS = max(1, (tile if T * C >= 2**20 else 16) // NB)  # few tokens: one each, for latency
    _hadamard_quantize[min(triton.cdiv(T, ROWS), programs),](
        x.contiguous(), hadamard_signs(n, x.device, torch.float16 if wide else x.dtype), *out[:3],
        out[-2], out[-1], T, C, GAUSSIAN_CLIP[bits], EPS, 2.0 * clip_limit(bits),
        0.5 - code_offset(bits), trust_limit(bits), planes, dtype is not None, n, NB, ROWS, stages,
        num_warps=warps)
    return out

def hadamard_quantize_reference(x, bits):
    """The same as plain PyTorch, with the mask as bool (T, C)."""
    q, scale, u = quest_codes(rotate(x), bits)
    c = 2 * (q + code_offset(bits))
    return ((q if bits == 8 else c).to(torch.int8), scale.squeeze(-1), c.sum(-1).to(torch.int32),
            0.5 * c * scale, u.abs() <= trust_limit(bits))

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
def _quest_matmul(a, a_scale, a_sum, w, w_scale, w_sum, y, M, N, K: tl.constexpr, b: tl.constexpr,
                  HALF: tl.constexpr, A8: tl.constexpr, W8: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr):
    i, tiles = tl.program_id(0), tl.cdiv(M, BM)        # 8 rows of tiles together: L2 holds them
    high = tl.minimum(tl.cdiv(N, BN) - i // (8 * tiles) * 8, 8)
    n = (i // (8 * tiles) * 8 + i % (8 * tiles) % high) * BN + tl.arange(0, BN)
    m = i % (8 * tiles) // high * BM + tl.arange(0, BM)
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

# (most tokens, BM, BN, BK, warps, stages). A few tokens: small tiles, so that there are programs
# enough to read the weight at the pace of memory. Many: two programs of 8 warps share a processor
# and hide each other's waits; for 8 x 8 bits one with twice the tokens, which halves the traffic.
QUEST_TILES = ((16, 16, 64, 256, 4, 4), (64, 64, 64, 256, 4, 3), (2**31, 128, 128, 128, 8, 4))
QUEST_TILE_8x8 = (256, 128, 128, 8, 4)

def quest_matmul(a, w, a_bits, bits, dtype):
    """QuEST inputs times QuEST weights, (M, N) in dtype; sums are exact integers.

    a: codes (M, K), scale, sums of hadamard_quantize. w: the same of a weight (N, K), or what
    quest_operand gives: codes uint8 (N, K b / 8), b = 1, 2 or 4, for which a's codes come in
    planes = 8 / b. 128 divides K (at b = 1 256) and K <= 32512.
    """
    (M, K), N, b = a[0].shape, w[0].size(0), 8 * w[0].size(1) // a[0].size(1)
    y = torch.empty(M, N, dtype=dtype, device=a[0].device)
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

def quest_linear_reference(x, q, w_scale, a_bits, bits):
    """The same by plain PyTorch in float64: x (..., K), q integers (N, K), w_scale (N, 1)."""
    codes, scale, _ = quest_codes(rotate(x), a_bits)
    y = (codes + code_offset(a_bits)).double() @ (q.double() + code_offset(bits)).T
    return y * scale.double() * w_scale.double().T

def quest_fits(x, bits, a_bits):
    """Whether the kernels above take inputs x (..., K) on the uniform grid."""
    return (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and max(bits, a_bits) <= 8
            and x.numel() > 0 and x.size(-1) % 128 == 0 and x.size(-1) <= 32512)

# ---- Additive codebooks -------------------------------------------------------------------------
# A codebook has 256 vectors of 8. Against one token's 8 inputs they have 256 products, a small
# table; then every code of these inputs is a look-up and an addition in place of 8 multiplications.

@triton.jit
def _vq_matvec(x, codes, books, scales, table, parts, tickets, y, tokens, N, G: tl.constexpr,
               BOOKS: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
               R: tl.constexpr):
    tile, part = tl.program_id(0), tl.program_id(1)
    n, r = tile * BN + tl.arange(0, BN), tl.arange(0, R)                   # row = token, group
    token, group, e = r // BG, r % BG, tl.arange(0, 16)                    # 8 inputs and 8 zeros
    c, inside = tl.arange(0, 256), (n < N)[None, :]
    table += (tile * SPLIT + part).to(tl.int64) * R * 256                  # this program's own
    acc = tl.zeros((R, BN), tl.float32)
    for g in range(0, G, BG * SPLIT):
        first = g + part * BG
        v = tl.load(x + (token * G + first + group)[:, None] * 8 + e[None, :],
                    mask=(token < tokens)[:, None] & (e < 8)[None, :], other=0.0)  # (R, 16)
        for m in tl.static_range(BOOKS):
            code = tl.load(codes + ((m * G + first + group) * N.to(tl.int64))[:, None] + n[None, :],
                           mask=inside, other=0).to(tl.int32)              # (R, BN)
            book = tl.load(books + (m * 256 + c)[None, :] * 8 + e[:, None],
                           mask=(e < 8)[:, None], other=0.0)               # (16, 256)
            tl.debug_barrier()                         # the last look-ups are done
            tl.store(table + r[:, None] * 256 + c[None, :],
                     tl.dot(v, book).to(table.dtype.element_ty))
            tl.debug_barrier()
            acc += tl.load(table + r[:, None] * 256 + code).to(tl.float32)
    sums = tl.sum(tl.reshape(acc, (R // BG, BG, BN)), 1)                   # (tokens, BN)
    t = tl.arange(0, R // BG)
    at, live = t[:, None] * N + n[None, :], (t < tokens)[:, None] & inside
    tl.store(parts + part * tokens * N + at, sums, mask=live)
    tl.debug_barrier()
    if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLIT - 1:   # all parts are there: the
        sums = tl.zeros((R // BG, BN), tl.float32)                     # same order every time
        for p in range(SPLIT):
            sums += tl.load(parts + p * tokens * N + at, mask=live, other=0.0, cache_modifier=".cg")
        sums *= tl.load(scales + n, mask=n < N, other=0.0)[None, :]
        tl.store(y + at, sums.to(y.dtype.element_ty), mask=live)
        tl.atomic_xchg(tickets + tile, 0)

# (outputs a program, programs in all, tables a step, warps), the fastest measured of seven
VQ_TILE = (512, 264, 16, 4)
_TICKETS = {}  # zeros, which every call leaves as zeros

def vq_matmul(x, codes, codebooks, scales):
    """x (B, 8 G) times a weight of additive codebooks -> (B, N), in x's dtype.

    codes uint8 (M, G, N): a checkpoint's (N, G, M) as permute(2, 1, 0).contiguous(); codebooks
    (M, 256, 8) in x's dtype, float16 or bfloat16, which the tables have as well; scales float32
    (N,). The kernel takes up to 4 tokens, 32 | G and 16 | N; PyTorch and cuBLAS the rest.
    """
    (B, K), (M, G, N) = x.shape, codes.shape
    if B > 4 or G % 32 or N % 16 or codebooks.shape != (M, 256, 8) or x.dtype == torch.float32:
        return vq_matmul_reference(x, codes, codebooks, scales)
    BN, programs, R, warps = VQ_TILE
    BG, tiles = R // triton.next_power_of_2(B), triton.cdiv(N, BN)
    SPLIT = math.gcd(G // BG, triton.next_power_of_2(max(1, programs // tiles)))
    if x.device not in _TICKETS:
        _TICKETS[x.device] = torch.zeros(4096, dtype=torch.int32, device=x.device)
    table = x.new_empty(tiles * SPLIT * R * 256)
    parts, y = scales.new_empty(SPLIT * B * N), x.new_empty(B, N)
    _vq_matvec[tiles, SPLIT](x.contiguous(), codes, codebooks, scales, table, parts,
                             _TICKETS[x.device], y, B, N, G, M, BG, BN, SPLIT, R, num_warps=warps)
    return y

def vq_matmul_reference(x, codes, codebooks, scales):
    """The same by a dense weight (N, 8 G): row n's vectors are sums of codebooks[m, codes[m, g, n]]
    over m."""
    w = sum(book[index.long()] for book, index in zip(codebooks, codes))          # (G, N, 8)
    return F.linear(x, w.transpose(0, 1).flatten(1)) * scales.to(x.dtype)
