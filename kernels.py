"""Triton kernels for low-bit layers.

`gptq_columns` is the column loop of quantizers.gptq for one lazy block. Rows do not depend on
each other, so one program keeps its rows' whole block in registers through all of the columns:
one launch a block, where the loop of GPTQ's code makes about ten a column. The arithmetic is that
of the plain loop to the bit: no multiply and add are fused, and divisions are rounded as IEEE says.
"""
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quantizers import (EPS, GAUSSIAN_CLIP, hadamard_signs, clip_limit, code_linear, code_offset, pack,
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

# ---- QuEST: rotation, scale and codes in one pass ----------------------------------------------
# H is orthonormal, so a row's root mean square is known before it is rotated, and its codes are
# written in the same pass that reads it. Codes are integers around zero: 2 q + 1, ternary 2 q, so
# that a matmul needs no correction for the grid's half step; at 8 bits, where that leaves int8, q.

@triton.jit
def _hadamard_quantize(x, signs, codes, scale, sums, values, trusted, T, C: tl.constexpr,
                       CLIP: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr,
                       SHIFT: tl.constexpr, LIMIT: tl.constexpr, PLANES: tl.constexpr,
                       TRAIN: tl.constexpr, n: tl.constexpr, NB: tl.constexpr,
                       ROWS: tl.constexpr, STAGES: tl.constexpr):
    i, r, col = tl.arange(0, ROWS * NB), tl.arange(0, ROWS), tl.arange(0, n)
    order = (col % (n // PLANES)) * PLANES + col // (n // PLANES)
    H = tl.trans(tl.load(signs + order[:, None] * n + col[None, :]))       # (n, n), once a program
    within = (i // NB * C + i % NB * n)[:, None] + col[None, :]            # NB blocks of n a row
    within8 = (i // NB * C + i % NB * n)[:, None] // 8 + tl.arange(0, n // 8)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0),
                         num_stages=STAGES):
        at = tl.cast(tile, tl.int64) * (ROWS * C)
        live = ((tile * ROWS + i // NB < T) & (i % NB < C // n))[:, None]
        v = tl.load(x + at + within, mask=live, other=0.0)                 # (ROWS NB, n)
        f = v.to(tl.float32)
        square = tl.sum(tl.reshape(tl.sum(f * f, 1), (ROWS, NB)), 1)       # (ROWS,)
        s = (CLIP * tl.sqrt(square / C) + EPS) * (2.0 / TOP)
        each = tl.reshape(tl.broadcast_to(s[:, None], (ROWS, NB)), (ROWS * NB,))[:, None]
        if x.dtype.element_ty == tl.float32:           # two float16 hold 22 bits of it
            f = f * (n**-0.5 / each)
            high = f.to(tl.float16)
            u = tl.dot(high, H, tl.dot((f - high.to(tl.float32)).to(tl.float16), H))
        else:
            u = tl.dot(v, H) * (n**-0.5 / each)
        near = (u + (SHIFT - 0.5)) + 12582912.0 - 12582912.0       # 1.5 * 2^23: to the nearest
        c = tl.minimum(tl.maximum(2.0 * near + (1.0 - 2.0 * SHIFT), -TOP), TOP)
        k = (c if TOP < 128 else 0.5 * c - 0.5) + 12582912.0       # its low byte is the integer
        tl.store(codes + at + within, k.to(tl.int32, bitcast=True).to(tl.int8), mask=live)
        total = tl.sum(tl.reshape(tl.sum(tl.where(live, c, 0.0), 1), (ROWS, NB)), 1)
        out = tile * ROWS + r
        tl.store(scale + out, s, mask=out < T)
        tl.store(sums + out, total.to(tl.int32), mask=out < T)
        if TRAIN:
            tl.store(values + at + within, (c * (0.5 * each)).to(values.dtype.element_ty), mask=live)
            bit = (tl.abs(u) <= LIMIT).to(tl.int32) << (col % 8)[None, :]
            byte = tl.sum(tl.reshape(bit, (ROWS * NB, n // 8, 8)), 2).to(tl.uint8)
            tl.store(trusted + at // 8 + within8, byte, mask=live)

TILE, WARPS, TILE32, WARPS32, STAGES, PROGRAMS = 64, 4, 64, 4, 1, 396

def hadamard_quantize(x, bits, dtype=None, planes=1):
    """QuEST's codes of the rows of x (T, C): codes int8 (T, C), scale float32 (T,), sums int32 (T,).

    Codes as above, of rotate(x); sums are those of 2 q + 1 (ternary: 2 q) over a row. For training
    give a dtype: values (T, C), the rotated rows on their grid, and trusted (T, C / 8), the trust
    mask, first column in the lowest bit, follow. With planes > 1 column PLANES i + f of a block of
    n = 128 comes at f n / PLANES + i, as quest_matmul wants it. x float16, bfloat16 or float32,
    contiguous; n = gcd(C, 128) >= 16; C <= 32768.
    """
    (T, C), n = x.shape, math.gcd(x.size(1), 128)
    codes = torch.empty(T, C, dtype=torch.int8, device=x.device)
    scale = torch.empty(T, dtype=torch.float32, device=x.device)
    sums = torch.empty(T, dtype=torch.int32, device=x.device)
    outputs = (codes, scale, sums)
    if dtype is not None:
        outputs += (torch.empty(T, C, dtype=dtype, device=x.device),
                    torch.empty(T, C // 8, dtype=torch.uint8, device=x.device))
    half = torch.float16 if x.dtype == torch.float32 else x.dtype
    NB = triton.next_power_of_2(C // n)
    wide, warps = (TILE32, WARPS32) if x.dtype == torch.float32 else (TILE, WARPS)
    ROWS = max(1, (wide if T * C >= 2**20 else 16) // NB)  # few tokens: one each, for latency
    _hadamard_quantize[min(triton.cdiv(T, ROWS), PROGRAMS),](
        x.contiguous(), hadamard_signs(n, x.device, half), codes, scale, sums, outputs[-2], outputs[-1], T, C,
        GAUSSIAN_CLIP[bits], EPS, 2.0 * clip_limit(bits), 0.5 - code_offset(bits),
        trust_limit(bits), planes, dtype is not None, n, NB, ROWS, STAGES,
        num_warps=8 if NB * ROWS > 64 else warps)
    return outputs

@triton.jit
def _rotate_trusted(g, trusted, signs, out, blocks, n: tl.constexpr, R: tl.constexpr,
                    STAGES: tl.constexpr):
    i, col, bits = tl.arange(0, R)[:, None], tl.arange(0, n)[None, :], tl.arange(0, 8)
    H = tl.load(signs + tl.arange(0, n)[:, None] * n + col)
    bytes = i * (n // 8) + tl.arange(0, n // 8)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(blocks, R), tl.num_programs(0),
                         num_stages=STAGES):
        live, at = tile * R + i < blocks, tl.cast(tile, tl.int64) * (R * n)
        v = tl.load(g + at + i * n + col, mask=live, other=0.0)            # (R, n)
        mask = tl.load(trusted + at // 8 + bytes, mask=live, other=0)[:, :, None] >> bits & 1
        v = tl.where(tl.reshape(mask, (R, n)) != 0, v, 0.0).to(signs.dtype.element_ty)
        tl.store(out + at + i * n + col, (tl.dot(v, H) * n**-0.5).to(out.dtype.element_ty),
                 mask=live)

ROTATE_R, ROTATE_W, ROTATE_S, ROTATE_P = 64, 4, 2, 396

def rotate_trusted(g, trusted, dtype):
    """rotate(g * mask) in dtype, for the backward pass: g (T, C) float16 or bfloat16, contiguous,
    trusted (T, C / 8) as hadamard_quantize returns it. Products are exact, sums float32."""
    n, out = math.gcd(g.size(1), 128), torch.empty(g.shape, dtype=dtype, device=g.device)
    blocks = g.numel() // n
    _rotate_trusted[min(triton.cdiv(blocks, ROTATE_R), ROTATE_P),](
        g.contiguous(), trusted, hadamard_signs(n, g.device, g.dtype), out, blocks, n, ROTATE_R, ROTATE_S,
        num_warps=ROTATE_W)
    return out

def hadamard_quantize_reference(x, bits):
    """What hadamard_quantize computes: codes, scale, sums, values, mask, as plain PyTorch."""
    q, scale, u = quest_codes(rotate(x), bits)
    c = 2 * (q + code_offset(bits))
    return ((q if bits == 8 else c).to(torch.int8), scale.squeeze(-1), c.sum(-1).to(torch.int32),
            0.5 * c * scale, u.abs() <= trust_limit(bits))

# ---- QuEST: integer matmul -----------------------------------------------------------------------
# The weight is the left operand, which Hopper's tensor cores may take from registers: fields of 1,
# 2 or 4 bits go there straight from packed words. Four of them at a time are moved to the top of
# their bytes, and the bit below is set: 2^(8 - b) (q + 1/2), an exact int8, for two instructions.

@triton.jit
def _quest_matmul(a, a_scale, a_sum, w, w_scale, w_sum, y, M, N, K: tl.constexpr,
                  FIELD: tl.constexpr, HALF: tl.constexpr, A8: tl.constexpr, W8: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    tiles_n = tl.cdiv(N, BN)                           # GROUP columns of tiles share the L2 cache
    tiles_m = tl.cdiv(M, BM)
    group = tl.program_id(0) // (GROUP * tiles_m)
    wide = tl.minimum(tiles_n - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * tiles_m)
    rows = (group * GROUP + inside % wide) * BN + tl.arange(0, BN)         # (BN,) of the weight
    tokens = inside // wide * BM + tl.arange(0, BM)                        # (BM,)
    PLANES: tl.constexpr = 8 // FIELD
    WIDTH: tl.constexpr = BK // PLANES
    SEGMENT: tl.constexpr = 128 // PLANES
    word, j = tl.arange(0, BK * FIELD // 32)[None, :], tl.arange(0, WIDTH)
    w += (rows % N).to(tl.int64)[:, None] * (K * FIELD // 32)
    a += tokens.to(tl.int64)[None, :] * K
    acc = tl.zeros((BN, BM), tl.int32)
    for k in range(0, K, BK):
        words = tl.load(w + k * FIELD // 32 + word).to(tl.uint32)          # (BN, BK FIELD / 32)
        for f in tl.static_range(PLANES):
            x = words << (8 - FIELD - FIELD * f)
            x = (x & (0x01010101 * (256 - 2**(8 - FIELD)))) | HALF
            b0, b1 = x.to(tl.int8), (x >> 8).to(tl.int8)
            b2, b3 = (x >> 16).to(tl.int8), (x >> 24).to(tl.int8)
            tile = tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (BN, WIDTH))
            at = k + j // SEGMENT * 128 + f * SEGMENT + j % SEGMENT        # this plane's columns
            acc = tl.dot(tile, tl.load(a + at[:, None], mask=(tokens < M)[None, :], other=0), acc,
                         out_dtype=tl.int32)
    if A8 or W8:                                       # the half steps that 8-bit codes leave out
        acc = acc * (4 if A8 and W8 else 2)
    if A8:
        acc += tl.load(w_sum + rows % N)[:, None] * 2**(7 - FIELD if FIELD < 8 else 0)
    if W8:
        acc += tl.load(a_sum + tokens, mask=tokens < M, other=0)[None, :] - (K if A8 else 0)
    unit = 0.25 if FIELD == 8 else 2.0**(FIELD - 9)
    out = acc.to(tl.float32) * unit * tl.load(w_scale + rows % N)[:, None]
    out = tl.trans(out * tl.load(a_scale + tokens, mask=tokens < M, other=0.0)[None, :])  # (BM, BN)
    tl.store(y + tokens.to(tl.int64)[:, None] * N + rows[None, :], out.to(y.dtype.element_ty),
             mask=(tokens < M)[:, None] & (rows < N)[None, :])

# (most tokens, BM, BN, BK, warps, stages): few tokens read the weight once, at the pace of memory,
# with small tiles for many programs; many tokens need wide tiles for the tensor cores.
QUEST_TILES = ((16, 16, 64, 256, 4, 4), (64, 64, 64, 256, 4, 3), (256, 128, 128, 128, 8, 3),
               (1 << 62, 256, 128, 128, 8, 3))

def quest_matmul(a, w, a_bits, bits, dtype):
    """QuEST inputs times QuEST weights, (M, N) in dtype; exact integers up to the last product.

    a = (codes, scale, sums) of hadamard_quantize. w = the same three of a weight (N, K), whose
    codes may also be uint8 (N, K b / 8), as `quest_operand` gives them: quantizers.pack's fields of
    b = 1, 2 or 4 bits. Then a's codes are in the order of planes = 8 / b. 128 divides K <= 32512.
    """
    (M, K), N = a[0].shape, w[0].size(0)
    field = 8 * w[0].size(1) // K
    y = torch.empty(M, N, dtype=dtype, device=a[0].device)
    BM, BN, BK, warps, stages = next(tile[1:] for tile in QUEST_TILES if M <= tile[0])
    BK = math.gcd(K, 256 if field == 1 else BK)        # a plane of a tile has 32 columns at least
    _quest_matmul[triton.cdiv(M, BM) * triton.cdiv(N, BN),](
        a[0], a[1], a[2], w[0].view(torch.int32), w[1], w[2], y, M, N, K,
        field, 0 if bits == 1.58 or field == 8 else 0x01010101 << (7 - field), a_bits == 8,
        bits == 8, BM, BN, BK, 8, num_warps=warps, num_stages=stages)
    return y

def quest_operand(packed, scale, bits, K):
    """A checkpoint's packed weight (N, ...) and scale (N, 1) -> w for quest_matmul.

    1, 2, 4 and 8 bits stay as they are; 3 and 1.58 bits are packed again in 4, 5 to 7 in 8, and 1
    in 4 where 256 does not divide K.
    """
    q = unpack(packed, bits, K, signed=True)
    sums = 2 * (q.to(torch.int32) + code_offset(bits)).sum(1)
    if bits in (1.58, 3) or bits == 1 and K % 256:
        packed = pack(q, 4)
    elif bits > 4:
        packed = q if bits == 8 else 2 * q + 1
    return packed, scale.view(-1), sums.to(torch.int32)

def quest_linear(x, w, a_bits, bits):
    """QuantLinear's forward for QuEST: x (..., K), w of quest_operand -> (..., N)."""
    planes = x.size(-1) // w[0].size(1)
    a = hadamard_quantize(x.reshape(-1, x.size(-1)), a_bits, planes=planes)
    return quest_matmul(a, w, a_bits, bits, x.dtype).view(*x.shape[:-1], -1)

def quest_fits(x, bits, a_bits):
    """Whether the two kernels take inputs x (..., K) on the uniform grid."""
    return (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and max(bits, a_bits) <= 8
            and x.numel() > 0 and x.size(-1) % 128 == 0 and x.size(-1) <= 32512)

# ---- Additive codebooks ----------------------------------------------------------------------------
# A codebook has 256 vectors of 8. Against one token's 8 inputs they have 256 products, a small
# table; then every code of these inputs is a look-up and an addition in place of 8 multiplications.

@triton.jit
def _vq_matvec(x, codes, books, scales, table, parts, tickets, y, B, N, G: tl.constexpr,
               M: tl.constexpr, MP: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr,
               SPLIT: tl.constexpr, R: tl.constexpr):
    tile, part = tl.program_id(0), tl.program_id(1)
    n, e, c = tile * BN + tl.arange(0, BN), tl.arange(0, 16), tl.arange(0, MP * 256)
    r, q = tl.arange(0, R), tl.arange(0, MP * R)       # r: token and group, q: book and r
    inside, has = (n < N)[None, :], (q // R < M)[:, None]
    book = tl.load(books + c[None, :] * 8 + e[:, None],                    # 8 inputs and 8 zeros
                   mask=(e < 8)[:, None] & (c < M * 256)[None, :], other=0.0)      # (16, MP 256)
    table += (tile * SPLIT + part).to(tl.int64) * R * MP * 256             # this program's own
    acc = tl.zeros((MP * R, BN), tl.float32)
    for g in range(part * BG, G, BG * SPLIT):
        code = tl.load(codes + (q // R * G + g + q % BG)[:, None] * N.to(tl.int64) + n[None, :],
                       mask=has & inside, other=0).to(tl.int32)            # (MP R, BN)
        v = tl.load(x + (r // BG * G + g + r % BG)[:, None] * 8 + e[None, :],
                    mask=(r // BG < B)[:, None] & (e < 8)[None, :], other=0.0)     # (R, 16)
        tl.debug_barrier()                             # the last look-ups are done
        tl.store(table + r[:, None] * (MP * 256) + c[None, :],
                 tl.dot(v, book).to(table.dtype.element_ty))
        tl.debug_barrier()
        acc += tl.load(table + (q % R * (MP * 256) + q // R * 256)[:, None] + code).to(tl.float32)
    TOKENS: tl.constexpr = R // BG
    t, p = tl.arange(0, TOKENS)[:, None], tl.arange(0, SPLIT)[:, None, None]
    sums = tl.sum(tl.sum(tl.reshape(acc, (MP, TOKENS, BG, BN)), 2), 0)     # (tokens, BN)
    tl.store(parts + (part * TOKENS + t) * N + n[None, :], sums, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLIT - 1:       # all parts are there
        each = tl.load(parts + (p * TOKENS + t[None, :, :]) * N + n[None, None, :],
                       mask=inside[None, :, :], other=0.0, cache_modifier=".cg")
        scale = tl.load(scales + n, mask=n < N, other=0.0)[None, :]
        tl.store(y + t * N + n[None, :], (tl.sum(each, 0) * scale).to(y.dtype.element_ty),
                 mask=(t < B) & inside)
        tl.atomic_xchg(tickets + tile, 0)

VQ_BN, VQ_PROGRAMS, VQ_R, VQ_WARPS = 512, 264, 16, 8
_TICKETS = {}  # zeros, which every call leaves as zeros

def vq_codes(codes):
    """A checkpoint's codes (N, G, M) -> (M, G, N), in which neighbouring outputs are neighbours."""
    return codes.permute(2, 1, 0).contiguous()

def vq_matmul(x, codes, codebooks, scales):
    """x (B, 8 G) times a weight of additive codebooks -> (B, N), in x's dtype.

    codes uint8 (M, G, N) of vq_codes, codebooks (M, 256, 8) in x's dtype, scales float32 (N,). Up
    to 4 tokens, 32 | G and 16 | N: the kernel, whose tables have x's dtype; else PyTorch.
    """
    (B, K), (M, G, N) = x.shape, codes.shape
    if B > 4 or G % 32 or N % 16 or codebooks.shape != (M, 256, 8) or x.dtype == torch.float32:
        return vq_matmul_reference(x, codes, codebooks, scales)
    BN, R = VQ_BN, VQ_R
    BG, tiles = R // triton.next_power_of_2(B), triton.cdiv(N, BN)
    SPLIT = math.gcd(G // BG, triton.next_power_of_2(max(1, VQ_PROGRAMS // tiles)), 128 * BG // R)
    if x.device not in _TICKETS:
        _TICKETS[x.device] = torch.zeros(4096, dtype=torch.int32, device=x.device)
    MP = triton.next_power_of_2(M)
    table = torch.empty(tiles * SPLIT * R * MP * 256, dtype=x.dtype, device=x.device)
    parts = torch.empty(SPLIT * R // BG * N, dtype=torch.float32, device=x.device)
    y = torch.empty(B, N, dtype=x.dtype, device=x.device)
    _vq_matvec[tiles, SPLIT](x, codes, codebooks, scales, table, parts, _TICKETS[x.device], y, B, N,
                             G, M, MP, BG, BN, SPLIT, R, num_warps=VQ_WARPS)
    return y

def vq_matmul_reference(x, codes, codebooks, scales):
    """The same by a dense weight: w[n, 8 g + e] = scales[n] * sum_m codebooks[m, codes[m, g, n], e].
    """
    w = sum(book[index.long()] for book, index in zip(codebooks, codes))          # (G, N, 8)
    return F.linear(x, w.transpose(0, 1).flatten(1)) * scales.to(x.dtype)
