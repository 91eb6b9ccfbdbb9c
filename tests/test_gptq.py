"""quantizers.gptq against float64 oracles: optimal brain surgery with explicit inverses, brute
force over hand-made cases, and the closed form of its loss."""
import pathlib
import subprocess
import sys

import pytest
import torch

import quantizers
from quantizers import (QuantLinear, affine_codes, affine_grid, dequantize, fake_quant_tokens, gptq,
                        inverse_factor, rtn)

ROOT = pathlib.Path(__file__).parent.parent

def problem(O=48, C=96, tokens=400, seed=0, dtype=torch.float64):
    """A weight (O, C) and the second moment (C, C) of correlated inputs with unequal variances."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(C, C, generator=g, dtype=torch.float64) / C**0.5
    mix = (mix + torch.randn(C, 1, generator=g, dtype=torch.float64)) * torch.linspace(0.3, 2, C)
    x = torch.randn(tokens, C, generator=g, dtype=torch.float64) @ mix
    w = torch.randn(O, C, generator=g, dtype=torch.float64)
    return w.to(dtype), (x.T @ x / tokens).to(dtype)

def damped(h, percdamp=0.01):
    return h + percdamp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)

def surgery(w, h, scale, zero_point, bits):
    """Optimal brain surgery from left to right: after each column its row and column leave H^-1.

    scale and zero_point (O, C): the grid of each weight."""
    w, inverse, q = w.clone(), torch.linalg.inv(h), torch.empty_like(w)
    for i in range(w.size(1)):
        q[:, i] = affine_codes(w[:, i], scale[:, i], zero_point[:, i], bits)
        error = w[:, i] - (q[:, i] - zero_point[:, i]) * scale[:, i]
        w -= error[:, None] * (inverse[i] / inverse[i, i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return q

@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_equal_optimal_brain_surgery_with_explicit_inverses(bits, symmetric):
    w, h = problem()
    q, scale, zero_point = gptq(w, h, bits, symmetric=symmetric, mse=False)
    grid = affine_grid(w, bits, symmetric)
    expected = surgery(w, damped(h), *(t[:, None].expand_as(w) for t in grid), bits)
    assert torch.equal(q.double(), expected - 2 ** (bits - 1) * symmetric)
    assert torch.equal(scale[:, 0], grid[0])
    assert (zero_point is None) == symmetric

@pytest.mark.parametrize("g", [8, 32, 48, 96])
def test_groups_take_their_grid_from_fresh_weights(g):
    """The oracle recomputes a group's grid from weights that hold every earlier update."""
    w, h = problem()
    work, inverse, expected = w.clone(), torch.linalg.inv(damped(h)), torch.empty_like(w)
    stale = 0
    for i in range(w.size(1)):
        if i % g == 0:
            s, z = affine_grid(work[:, i:i + g], 3)
            stale += (s != affine_grid(w[:, i:i + g], 3)[0]).sum().item()
        expected[:, i] = affine_codes(work[:, i], s, z, 3)
        error = work[:, i] - (expected[:, i] - z) * s
        work -= error[:, None] * (inverse[i] / inverse[i, i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    q, scale, zero_point = gptq(w, h, 3, group_size=g, mse=False)
    assert torch.equal(q.double(), expected)
    assert scale.shape == zero_point.shape == (48, 96 // g)
    assert stale > 0 or g == 96                        # the grids of the original weights differ

@pytest.mark.parametrize("g", [256, 192, 200])
def test_a_group_wider_than_a_lazy_block_is_fresh_too(g):
    w, h = problem(O=6, C=2 * g, tokens=900)
    # It fixes the first group's codes and grid.
    first = gptq(w[:, :g], h[:g, :g], 3, mse=False, percdamp=0)
    q, scale, _ = gptq(w, h, 3, group_size=g, mse=False, percdamp=0)
    # what is left for group 2 is w2 + (w1 - w1_hat) H12 H22^-1: the least squares answer
    error = w[:, :g] - dequantize(q[:, :g], scale[:, :1], _[:, :1])
    fresh = w[:, g:] + error @ h[:g, g:] @ torch.linalg.inv(h[g:, g:])
    torch.testing.assert_close(scale[:, 1], affine_grid(fresh, 3)[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(scale[:, :1], first[1])

@pytest.mark.parametrize("kwargs", [{}, {"act_order": True}, {"act_order": True, "group_size": 24},
                                    {"symmetric": True, "mse": True}])
def test_size_of_the_lazy_block_does_not_matter(kwargs, monkeypatch):
    w, h = problem()
    results = []
    for size in (1, 7, 32, 128):
        monkeypatch.setattr(quantizers, "LAZY_BLOCK", size)
        results.append(gptq(w, h, 3, **kwargs))
    for result in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], result))

@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loss_is_the_sum_of_squared_column_errors(bits):
    """sum_i e_i^2 = tr (W - Q)(H + damping)(W - Q)^T, the identity behind GPTQ's bookkeeping."""
    w, h = problem()
    u = inverse_factor(h)
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(damped(h)), rtol=1e-9, atol=1e-12)
    assert torch.equal(u, u.triu())
    grid = [t[:, None].expand_as(w) for t in affine_grid(w, bits)]
    q, error = quantizers._gptq_columns(w, u, *grid, bits)
    d = w - (q - grid[1]) * grid[0]
    torch.testing.assert_close(error.square().sum(), (d @ damped(h) * d).sum(), rtol=1e-12, atol=0)

@pytest.mark.parametrize("kwargs", [{"act_order": True}, {"mse": True}, {"symmetric": True},
                                    {"symmetric": True, "act_order": True}])
def test_weights_of_inputs_that_were_always_zero_count_for_nothing_in_groups(kwargs):
    """A dead column's weights neither move the others nor widen the range of their group: any
    values there give the codes, scales and zero points that zeros give."""
    w, h = problem()
    dead = torch.tensor([3, 30, 31, 95])
    h[dead], h[:, dead] = 0, 0
    clean = w.index_fill(1, dead, 0)
    wild = w.index_copy(1, dead, 50 * torch.randn(len(w), 4).double())
    a, b = (gptq(x, h, 3, group_size=24, **kwargs) for x in (clean, wild))
    assert all(x is y or torch.equal(x, y) for x, y in zip(a, b))
    assert (dequantize(*a, 24)[:, dead] == 0).all()

def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    w, h = problem()
    for kwargs in ({}, {"group_size": 32}, {"symmetric": True}, {"mse": True}):
        assert all(a is b or torch.equal(a, b) for a, b in
                   zip(gptq(w, h.diagonal().diag(), 3, **kwargs), rtn(w, 3, **kwargs)))

@pytest.mark.parametrize("factor", [2.0**-20, 1000.0])
def test_the_unit_of_the_hessian_does_not_matter(factor):
    w, h = problem()
    for act_order in (False, True):
        assert torch.equal(gptq(w, h, 3, act_order=act_order)[0],
                           gptq(w, h * factor, 3, act_order=act_order)[0])

def test_two_weights_by_hand():
    """H = [[2, 1], [1, 2]], integer grid, w = (.4, .4): 0 first, then .4 + .4 / 2 = .6 -> 1, which
    costs .56; rounding to nearest costs .96."""
    w, h = torch.tensor([[0.4, 0.4]]).double(), torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    one = torch.ones(1, 2).double()
    q, error = quantizers._gptq_columns(w, inverse_factor(h, 0.0), one, 0 * one, 8)
    assert q.tolist() == [[0, 1]]
    torch.testing.assert_close(error.square().sum().item(), 0.56)

@pytest.mark.parametrize("bits, correlated", [(2, True), (3, True), (4, True), (3, False)])
def test_output_error_over_all_rows_is_below_that_of_rtn(bits, correlated):
    """Summed over the rows; a single row may be worse."""
    w, h = problem(O=256)
    if not correlated:
        x = torch.randn(400, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        h = x.T @ x / 400
    errors = []
    for q in (gptq(w, h, bits), rtn(w, bits)):
        d = dequantize(*q) - w
        errors.append((d @ h * d).sum())
    assert errors[0] < errors[1]

def test_without_clipping_every_row_keeps_babais_bound():
    """On an unbounded grid of step s a row costs at most s^2 / 4 * sum_i 1 / U_ii^2
    (arXiv 2507.18553)."""
    w, h = problem()
    u = inverse_factor(h)
    s = torch.full_like(w, 0.25)
    _, error = quantizers._gptq_columns(w, u, s, s * 0 + 2**29, 30)
    bound = 0.25**2 / 4 * u.diagonal().square().reciprocal().sum()
    assert (error.square().sum(1) <= bound * (1 + 1e-12)).all()
    assert error.square().sum(1).max() > bound / 10    # the bound is not vacuous

def test_rows_do_not_depend_on_each_other():
    w, h = problem()
    q = gptq(w, h, 3, group_size=32)[0]
    assert torch.equal(q, torch.cat([gptq(row[None], h, 3, group_size=32)[0] for row in w]))

@pytest.mark.parametrize("symmetric", [False, True])
def test_act_order_moves_with_a_permutation_of_the_inputs(symmetric):
    w, h = problem()
    p = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    q, scale, _ = gptq(w, h, 3, act_order=True, symmetric=symmetric)
    permuted = gptq(w[:, p], h[p][:, p], 3, act_order=True, symmetric=symmetric)
    assert torch.equal(permuted[0], q[:, p]) and torch.equal(permuted[1], scale)
    assert not torch.equal(q, gptq(w, h, 3, symmetric=symmetric)[0])

def test_act_order_with_groups_is_surgery_in_order_of_variance_on_the_original_grids():
    w, h = problem()
    q, scale, zero_point = gptq(w, h, 3, group_size=24, mse=False, act_order=True)
    s, z = affine_grid(w.view(48, 4, 24), 3)
    assert torch.equal(scale, s) and torch.equal(zero_point, z)
    order = sorted(range(96), key=lambda i: -h[i, i].item())
    expected = torch.empty_like(w)
    expected[:, order] = surgery(w[:, order], damped(h)[order][:, order],
                                 s.repeat_interleave(24, 1)[:, order],
                                 z.repeat_interleave(24, 1)[:, order], 3)
    assert torch.equal(q.double(), expected)

@pytest.mark.parametrize("kwargs", [{}, {"group_size": 24}, {"act_order": True, "group_size": 24},
                                    {"symmetric": True}, {"mse": True, "group_size": 48}])
def test_codes_fit_the_grid_and_rounding_the_result_again_changes_nothing(kwargs):
    w, h = problem()
    q, scale, zero_point = gptq(w, h, 2, **kwargs)
    low, high = (-2, 1) if kwargs.get("symmetric") else (0, 3)
    assert q.min() >= low and q.max() <= high
    assert q.dtype == (torch.int8 if kwargs.get("symmetric") else torch.uint8)
    g = kwargs.get("group_size", 96)
    w_hat = dequantize(q, scale, zero_point, g).view(48, -1, g)
    z = torch.full_like(scale, 2) if zero_point is None else zero_point
    again = affine_codes(w_hat, scale[..., None], z[..., None], 2).view(48, 96)
    assert torch.equal(again + low, q.double())
    assert (z >= 0).all() and (z <= 3).all() and torch.equal(z, z.round())     # zero is a level

def test_inputs_that_are_always_zero_get_the_code_of_zero():
    """As in GPTQ's code such an input counts 1 in the mean of the diagonal that scales the damping,
    and the grid is that of the row before its weights are dropped."""
    w, h = problem()
    h, dead = 1e-3 * h, list(range(0, 96, 3))
    h[dead], h[:, dead] = 0, 0
    for kwargs in ({}, {"group_size": 24}, {"act_order": True}):
        q, scale, zero_point = gptq(w, h, 3, **kwargs)
        w_hat = dequantize(q, scale, zero_point, kwargs.get("group_size", -1))
        assert w_hat.isfinite().all() and (w_hat[:, dead] == 0).all()
    alive = [i for i in range(96) if i % 3]
    grid = [t[:, None].expand(48, len(alive)) for t in affine_grid(w, 3)]
    damping = 0.01 * (h.diagonal().sum() + len(dead)) / 96
    expected = surgery(w[:, alive], h[alive][:, alive] + damping * torch.eye(len(alive)), *grid, 3)
    assert torch.equal(gptq(w, h, 3, mse=False)[0][:, alive].double(), expected)

@pytest.mark.parametrize("bits, clipped", [(2, 2 / 3), (3, 6 / 7), (4, 14 / 15)])
def test_symmetric_grid_of_a_row_without_negative_weights_clips_the_top_only(bits, clipped):
    """One step is 2 max / (2^bits - 1) also there, not half of that."""
    w = torch.linspace(0, 1, 101).double()[None]
    q, scale, _ = rtn(w, bits, symmetric=True)
    w_hat = dequantize(q, scale)
    assert w_hat.max().item() == pytest.approx(clipped, rel=2**-11)        # the scale is float16
    assert q.max() == 2 ** (bits - 1) - 1
    worst = max(1 - clipped, scale.item() / 2)
    assert (w_hat - w).abs().max().item() == pytest.approx(worst, rel=0.05)

def test_rows_of_zeros_stay_zero():
    w, h = problem()
    w[5] = 0
    for symmetric in (False, True):
        assert (dequantize(*gptq(w, h, 2, symmetric=symmetric))[5] == 0).all()

@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_rows_too_small_for_a_float32_step_become_zeros(bits, symmetric, mse):
    w, h = problem(dtype=torch.float32)
    w[:4] *= torch.tensor([1e-37, 1e-40, 1e-42, 1e-44]).unsqueeze(1)
    for result in (rtn(w, bits, 16, symmetric, mse), gptq(w, h, bits, 16, symmetric, mse)):
        assert (result[1] > 0).all()
        w_hat = dequantize(*result, group_size=16)
        assert w_hat.isfinite().all() and (w_hat[:4].abs() < 1e-36).all()
        assert (w_hat[4:].abs().amax(1) > 0.1).all()

@pytest.mark.parametrize("symmetric", [False, True])
def test_shrink_search_never_costs_more_than_the_whole_range(symmetric):
    w, _ = problem()
    cost = [(dequantize(*rtn(w, 2, symmetric=symmetric, mse=mse)) - w).abs().pow(2.4).sum(1)
            for mse in (False, True)]
    assert (cost[1] <= cost[0]).all() and (cost[1] < cost[0]).any()
    w, h = problem()
    assert torch.equal(gptq(w, h, 2, symmetric=symmetric, mse=True)[1],
                       rtn(w, 2, symmetric=symmetric, mse=True)[1])

def test_a_singular_hessian_is_refused():
    w, _ = problem()
    x = torch.randn(10, 96, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(w, x.T @ x, 3, percdamp=0)
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(w, torch.full((96, 96), torch.nan).double(), 3)
    gptq(w, x.T @ x, 3)                                # the damping is there for this

def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="--group-size 36 does not divide 96"):
        gptq(*problem(), 3, group_size=36)

def test_arguments_and_matmul_precision_stay_as_they_were():
    w, h = problem(dtype=torch.float32)
    w0, h0 = w.clone(), h.clone()
    torch.set_float32_matmul_precision("high")
    try:
        gptq(w, h, 3, act_order=True, group_size=24)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(w, w0) and torch.equal(h, h0)

def test_float32_agrees_with_float64():
    w, h = problem(O=256)
    a, b = gptq(w.float(), h.float(), 4), gptq(w, h, 4)
    assert a[1].dtype == torch.float32
    assert (a[0] == b[0]).double().mean() > 0.99
    loss = [((dequantize(*r).double() - w) @ h * (dequantize(*r).double() - w)).sum()
            for r in (a, b)]
    assert abs(loss[0] / loss[1] - 1) < 1e-3

@pytest.mark.slow
def test_kernel_for_gpus_equals_the_plain_loop_bit_for_bit():
    """In Triton's interpreter, so that no GPU is needed; rows and columns are no powers of two."""
    code = """
import torch, quantizers, kernels
torch.manual_seed(0)
x, w = torch.randn(300, 150) @ torch.randn(150, 150), torch.randn(21, 150)
u = quantizers.inverse_factor(x.T @ x / 300)
for bits, n in ((2, 128), (4, 100), (8, 1)):
    grid = [t[:, None].expand(21, n) for t in quantizers.affine_grid(w, bits)]
    a = quantizers._gptq_columns(w[:, :n], u[:n, :n], *grid, bits)
    b = kernels.gptq_columns(w[:, :n], u[:n, :n], *grid, bits)
    assert all(torch.equal(p, q) for p, q in zip(a, b)), (bits, n)
print("equal")
"""
    pytest.importorskip("triton", "3.5")
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, text=True,
                            capture_output=True,
                            env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"})
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("Triton 3.6's interpreter cannot loop up to a loaded value with this NumPy")
    assert result.stdout == "equal\n", result.stderr

def test_packed_layer_with_quantized_inputs_multiplies_both_grids():
    w, h = problem(dtype=torch.float32)
    x = torch.randn(5, 7, 96)
    packed = QuantLinear.affine(*gptq(w, h, 4, group_size=24), 4, group_size=24, a_bits=8)
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / step).round() * step).double() @ packed.weight().double().T
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert packed.spec["a_bits"] == 8

@pytest.mark.parametrize("bits", [4, 8])
def test_token_grid_is_symmetric_with_a_straight_gradient(bits):
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    x_hat = fake_quant_tokens(x, bits)
    levels = x_hat / (x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1))
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert levels.abs().amax() < 2 ** (bits - 1) - 0.5
    weight = torch.randn(3, 64, dtype=torch.float64)
    (x_hat * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert (fake_quant_tokens(torch.zeros(2, 4), bits) == 0).all()
