"""Triton kernels for low-bit layers.

`gptq_columns` is the column loop of quantizers.gptq for one lazy block. Rows do not depend on
each other, so one program keeps its rows' whole block in registers through all of the columns:
one launch a block, where the loop of GPTQ's code makes about ten a column. The arithmetic is that
of the plain loop to the bit: no multiply and add are fused, and divisions are rounded as IEEE says.
"""
import torch
import triton
import triton.language as tl

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
