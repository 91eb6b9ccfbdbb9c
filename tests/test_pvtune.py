"""PV-Tuning against brute force in float64, hand-written loops and exhaustive code searches.

Theory (A): all c^d vectors on problems of six numbers. Code search (B): full distance matrices.
Optimizer (C): a straight-through loop, a layer that autograd differentiates, LAMB's formula.
Format (D): the published bits per weight. What needs several trained models (E1 to E4: P only below
the fit, the subspace below P only, a naive step ten times as large above it) is measured, not
asserted: assets/pvtune.jsonl. Only E5 and "a naive step that is small changes no code" are here.
"""
import copy
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import nanobit.checkpoint
import nanobit.data
import nanobit.distill
import pvtune
from conftest import TrainingTextOnly, call, check_refused, double, random_base
from model import LlamaConfig, LLaMA
from pvtune import (Codebooks, Distilled, Grid, PVLinear, PVOptimizer, exact_p, exact_v, lamb_step,
                    linear_v, move_codes, pv_step, ste_iterates, v_step)
from quantizers import (QuantLinear, bits_per_weight, dequantize, kmeans, output_error, rtn,
                        vq_dequantize, vq_fit, vq_search, vq_search_xtx)

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def vq_bits(O, C, num_codebooks, bits, group_size):
    """Bits per weight of one matrix: codes, 16-bit codebooks and 16-bit scales."""
    codes = O * (C // group_size) * num_codebooks * bits
    return (codes + 16 * num_codebooks * 2**bits * group_size + 16 * O) / (O * C)

# ---- A: the exact theory ------------------------------------------------------------------------

def quadratic(seed, d=6, c=3, coupling=3.0):
    """A random SPD problem (A, b), phi, and a start of c values."""
    g = seeded(seed)
    root = torch.randn(d, d, generator=g, dtype=torch.float64)
    A = root @ root.t() / d + coupling * torch.ones(d, d).double() + 0.1 * torch.eye(d).double()
    b, values = (torch.randn(n, generator=g, dtype=torch.float64) for n in (d, c))
    codes = torch.cat((torch.arange(c), torch.randint(c, (d - c,), generator=g)))
    return A, b, (lambda x: (x @ A @ x / 2 - b @ x).item()), values[codes]

@pytest.mark.parametrize("c", [1, 2, 3])
def test_exact_pv_never_rises_stays_feasible_and_both_halves_are_brute_force(c):
    for seed in range(10):
        A, b, phi, x = quadratic(seed, c=c)
        for _ in range(3):
            y = exact_p(A, b, x)
            assert phi(y) <= phi(x) + 1e-12 and len(y.unique()) <= c
            for v in x.unique():                       # no slope along what x ties together
                assert abs((A @ y - b) @ (x == v).double()) < 1e-9
            assert all((y[x == v] == y[x == v][0]).all() for v in x.unique())
            x = exact_v(A, b, y)
            best = min(phi(torch.stack(t)) for t in itertools.product(y.unique(), repeat=6))
            assert phi(x) <= phi(y) + 1e-12 and abs(phi(x) - best) < 1e-12
            assert set(x.tolist()) <= set(y.tolist())

@pytest.mark.parametrize("tau", [6, 1, 2, 4])
def test_linear_v_step_descends_and_is_the_minimum_of_its_bound(tau):
    changes = 0
    for seed in range(20):
        A, b, phi, x = quadratic(seed, c=3)
        y = exact_p(A, b, x) + 0.0
        values = y.unique()
        x, g = linear_v(A, b, y, values, tau), A @ y - b
        moved = (x != y).nonzero().flatten()
        assert phi(x) <= phi(y) + 1e-12 and set(x.tolist()) <= set(values.tolist())
        assert len(moved) <= tau
        ahead = torch.tensor([any((v - y[i]) * -g[i] > 0 for v in values) for i in range(6)])
        S = torch.where(ahead, g.abs(), -1.0).argsort(descending=True, stable=True)[:tau]
        L = torch.linalg.eigvalsh(A[S][:, S])[-1]
        bound = lambda v: (g[S] @ (v - y[S]) + L / 2 * (v - y[S]).square().sum()).item()
        best = min(bound(torch.stack(t)) for t in itertools.product(values, repeat=len(S)))
        assert abs(bound(x[S]) - best) < 1e-10
        d = (x - y).abs()[moved]
        assert phi(y) - phi(x) >= (g[moved].abs() * d - L * d.square() / 2).sum() - 1e-12
        gap = [min((abs(v - y[i]) for v in values if (v - y[i]) * -g[i] > 1e-12),
                   default=math.inf) for i in S]
        assert bool(len(moved)) == any(2 * abs(g[i]) > L * w for i, w in zip(S, gap))
        changes += len(moved)
    assert changes > 0

def test_ten_coordinates_stuck_swinging_and_solved():
    A, b, values = torch.ones(10, 10).double(), torch.full((10,), 4.0).double(), torch.arange(2.)
    values, phi = values.double(), lambda x: (x.sum().item() - 4) ** 2 / 2
    def curve(tau, n=6):
        x, out = torch.zeros(10).double(), []
        for _ in range(n):
            out.append(phi(x))
            x = linear_v(A, b, x, values, tau)
        return out
    assert curve(10, 50) == [8.0] * 50
    assert curve(1) == [8, 4.5, 2, 0.5, 0, 0] and curve(2) == [8, 2, 0, 0, 0, 0]
    assert curve(3) == [8] + [0.5] * 5
    for lr in (0.02, 0.05, 0.1):
        seen = [phi(x) for x in ste_iterates(A, b, torch.zeros(10).double(), values, lr, 200)]
        assert set(seen) == {8.0, 18.0}

def test_as_many_values_as_numbers_is_the_minimum_and_one_value_the_best_constant():
    A, b, phi, x = quadratic(3, c=6)
    assert (exact_p(A, b, x) - torch.linalg.solve(A, b)).abs().max() < 1e-10
    A, b, phi, x = quadratic(3, c=1)
    assert (exact_p(A, b, x) - b.sum() / A.sum()).abs().max() < 1e-12

# ---- B: the code search -------------------------------------------------------------------------

def layer(O=8, C=32, M=2, K=16, g=4, seed=0, dtype=torch.float64):
    """codes (O, J, M), codebooks (M, K, g), scales (O,) and a reference (O, C) near by."""
    gen = seeded(seed)
    codes = torch.randint(K, (O, C // g, M), generator=gen)
    codebooks = torch.randn(M, K, g, generator=gen, dtype=dtype)
    scales = torch.rand(O, generator=gen, dtype=dtype) + 0.5
    w = vq_dequantize(codes, codebooks, scales)
    return codes, codebooks, scales, w + 0.7 * torch.randn(O, C, generator=gen, dtype=dtype)

def one(*parts):
    """Codebooks of a stack of one linear."""
    return Codebooks(*(x[None] for x in parts))

def search(x, codes, codebooks, *args, **how):
    """vq_search of one linear: x (n, g), codes (n, M) -> (n, keep, M)."""
    return vq_search(x[None], codes[None], codebooks[None], *args, **how)[0]

def brute(x, codebooks):
    """The nearest of all sums of codewords: codes (n, M) and squared errors (n,)."""
    M, K, _ = codebooks.shape
    every = torch.tensor(list(itertools.product(range(K), repeat=M)))
    sums = sum(codebooks[m][every[:, m]] for m in range(M))                        # (K^M, g)
    errors = (x.unsqueeze(1) - sums).square().sum(-1)
    return every[errors.argmin(1)], errors.amin(1)

def test_dequantize_sums_one_codeword_of_each_codebook_along_the_inputs():
    codes, codebooks, scales, _ = layer(M=3)
    w = vq_dequantize(codes, codebooks, scales)
    for i, j in itertools.product(range(8), range(8)):
        part = scales[i] * sum(codebooks[m, codes[i, j, m]] for m in range(3))
        assert (w[i, 4 * j:4 * j + 4] - part).abs().max() < 1e-14
    disjoint = torch.stack((torch.eye(4), 10 * torch.eye(4)))                      # (2, 4, 4)
    assert vq_dequantize(torch.tensor([[[1, 2]]]), disjoint, torch.ones(1)).tolist() == [
        [0, 1, 10, 0]]

def test_one_codebook_is_the_argmin_of_the_distance_matrix():
    codes, codebooks, scales, w = layer(M=1)
    x = (w / scales.unsqueeze(1)).view(-1, 4)
    assert torch.equal(search(x, codes.flatten(0, 1), codebooks)[:, 0], brute(x, codebooks)[0])

def test_two_codebooks_and_a_full_beam_are_exhaustive():
    codes, codebooks, scales, w = layer(O=50)
    x = (w / scales.unsqueeze(1)).view(-1, 4)
    found = search(x, codes.flatten(0, 1), codebooks, beam=16)
    assert len(x) == 400 and torch.equal(found[:, 0], brute(x, codebooks)[0])

@pytest.mark.parametrize("M,beam", [(1, 1), (2, 1), (2, 3), (3, 1), (3, 4)])
def test_the_search_never_raises_an_error_and_its_runner_up_is_another_code(M, beam):
    codes, codebooks, scales, w = layer(M=M)
    x, start = (w / scales.unsqueeze(1)).view(-1, 4), codes.flatten(0, 1)
    error = lambda q: (x - sum(codebooks[m][q[:, m]] for m in range(M))).square().sum(1)
    found, before = search(x, start, codebooks, beam, seeded(), keep=2), error(start)
    first, second = error(found[:, 0]), error(found[:, 1])
    assert (first <= before + 1e-12).all() and (first < before - 1e-6).any()
    assert (first <= second).all() and (found[:, 0] != found[:, 1]).any(1).all()

def test_the_search_in_pieces_equals_the_search_at_once():
    codes, codebooks, scales, w = layer(M=2)
    x = (w / scales.unsqueeze(1)).view(-1, 4)
    whole = search(x, codes.flatten(0, 1), codebooks, 2, seeded(1))
    parts = [search(a, b, codebooks, 2, seeded(1))
             for a, b in zip(x.split(7), codes.flatten(0, 1).split(7))]
    assert torch.equal(whole, torch.cat(parts))

def test_the_search_visits_the_codebooks_in_each_order_that_the_generator_may_draw():
    """Of three codebooks, beside a search by hand for each of the six orders."""
    codes, codebooks, scales, w = layer(M=3)
    x, start = (w / scales.unsqueeze(1)).view(-1, 4), codes.flatten(0, 1)
    def by_hand(order):
        q = start.clone()
        for m in order:
            others = sum(codebooks[k][q[:, k]] for k in range(3) if k != m)
            distance = (x - others).unsqueeze(1) - codebooks[m]                    # (n, K, g)
            q[:, m] = distance.square().sum(-1).argmin(1)
        return q
    known, seen = {order: by_hand(order) for order in itertools.permutations(range(3))}, set()
    for seed in range(40):
        found = search(x, start, codebooks, generator=seeded(seed))[:, 0]
        matches = [order for order, q in known.items() if torch.equal(q, found)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 6

@pytest.mark.parametrize("rank", ["residual", "improvement"])
def test_at_most_the_fraction_changes_and_the_chosen_groups_are_those_of_the_rank(rank):
    codes, codebooks, scales, w = layer(M=1)
    for fraction in (0.01, 0.1, 0.5, 1.0):
        new = v_step(w, codes, codebooks, scales, fraction, rank=rank)
        moved = (new != codes).any(-1).flatten()
        assert moved.sum() <= math.ceil(fraction * 64)
        x = (w / scales.unsqueeze(1)).view(-1, 4)
        best, lowest = brute(x, codebooks)
        s = scales.repeat_interleave(8).square()
        error = (w - vq_dequantize(codes, codebooks, scales)).view(-1, 4).square().sum(1)
        score = error if rank == "residual" else error - lowest * s
        top = score.argsort(descending=True)[:math.ceil(fraction * 64)]
        expected = codes.flatten(0, 1).clone()
        expected[top] = best[top]
        assert torch.equal(new.flatten(0, 1), expected)
    assert torch.equal(new, v_step(w, codes, codebooks, scales, 1.0, rank=rank, trust=1e9))

def test_a_group_counts_once_and_a_tiny_weight_may_always_change_one(monkeypatch):
    monkeypatch.setattr(Codebooks, "beam", 8)
    codes, codebooks, scales, w = layer(M=3)
    for fraction, groups in ((1e-9, 1), (4.5 / 64, 5)):
        new = v_step(w, codes, codebooks, scales, fraction, generator=seeded())
        assert (new != codes).any(-1).sum() == groups
    assert (new != codes).sum() > groups

def test_ranking_is_in_the_weights_own_unit():
    codes, codebooks, scales, w = layer(M=1)
    before = v_step(w, codes, codebooks, scales, 1.0)
    scales[3] *= 100
    w[3] *= 100
    new = v_step(w, codes, codebooks, scales, 8 / 64, rank="residual")
    assert (new != codes).any(-1).any(-1).nonzero().flatten().tolist() == [3]
    assert torch.equal(v_step(w, codes, codebooks, scales, 1.0), before)

def test_published_ranking_starves_and_improvement_does_not():
    codes, codebooks = torch.zeros(1, 2, 1).long(), torch.tensor([[[0.0], [1.0]]])
    R, ones = torch.tensor([[-5.0, 0.9]]), torch.ones(1)
    stuck = codes
    for _ in range(5):
        stuck = v_step(R, stuck, codebooks, ones, 0.5, rank="residual")
    assert torch.equal(stuck, codes)
    moved = v_step(R, codes, codebooks, ones, 0.5, rank="improvement")
    assert moved.flatten().tolist() == [0, 1]

def test_trust_region_keeps_the_groups_up_to_the_one_that_crosses_it():
    codes, codebooks, scales, w = layer(O=32, M=1)
    before = vq_dequantize(codes, codebooks, scales)
    for rho in (1e-6, 0.1, 0.2, 0.4):
        form = one(codes, codebooks, scales)
        made, moved, used = move_codes(form, w[None], 0.9, trust=rho)
        assert torch.equal(made, form.dequantize())
        change = (form.dequantize()[0] - before).detach().view(-1, 4).square().sum(1)
        limit = (rho * before.norm()).square()
        assert moved == (change > 0).sum() and moved >= 1
        error = (w - before).view(-1, 4).square().sum(1)
        gain = error - (w - form.dequantize()[0]).detach().view(-1, 4).square().sum(1)
        last = torch.where(change > 0, gain, math.inf).argmin()            # the lowest rank kept
        assert change.sum() - change[last] < limit
        assert abs(used - (change.sum() / limit).sqrt()) < 1e-9
    free = one(codes, codebooks, scales)
    assert move_codes(free, w[None], 0.9)[1] > moved

def test_stochastic_rounding_has_the_published_odds_and_keeps_exact_matches():
    codebooks = torch.tensor([[[-1.0], [2.0]]])        # 0 is at errors 1 and 2
    form = one(torch.zeros(1, 9000, 1).long(), codebooks, torch.ones(1))
    move_codes(form, torch.zeros(1, 1, 9000), 1.0, rounding=1.0, generator=seeded())
    assert abs((form.codes == 0).float().mean() - 2 / 3) < 0.02
    move_codes(form, torch.full((1, 1, 9000), 2.0), 1.0, rounding=1.0, generator=seeded())
    assert (form.codes == 1).all()

def test_lazy_improvement_searches_a_group_again_only_as_its_error_grows():
    form = one(torch.zeros(1, 2, 1).long(), torch.tensor([[[0.0], [1.0]]]), torch.ones(1))
    R, left = torch.tensor([[[-5.0, 0.9]]]), torch.zeros(1, 2)
    move = lambda: move_codes(form, R, 0.5, rank="improvement", left=left)[1]
    assert move() == 0 and left.tolist() == [[25, 0]]
    assert move() == 1 and form.codes.flatten().tolist() == [0, 1]

@pytest.mark.parametrize("beam", [1, 3])
def test_the_search_on_inputs_reports_its_loss_and_never_raises_it(beam):
    codes, codebooks, scales, w = layer()
    x = torch.randn(100, 32, generator=seeded(), dtype=torch.float64)
    H = x.t() @ x / 100
    loss = lambda q: (((vq_dequantize(q, codebooks, scales) - w) @ H)
                      * (vq_dequantize(q, codebooks, scales) - w)).sum(1)
    before = loss(codes)
    for seed in range(3):
        codes, reported = vq_search_xtx(w, H, codes, codebooks, scales, beam, seeded(seed))
        assert (loss(codes) - reported).abs().max() < 1e-9
        assert (reported <= before + 1e-9).all() and (seed or (reported < before - 1e-3).any())
        before = reported
    assert codes.shape == (8, 8, 2)

def test_the_search_on_inputs_visits_groups_and_codebooks_in_orders_that_are_drawn():
    """Of two groups and two codebooks, beside a search by hand in each of the eight orders."""
    codes, codebooks, scales, w = layer(C=8)
    root = torch.randn(8, 8, generator=seeded(), dtype=torch.float64)
    H = root @ root.t()
    def loss(q):
        e = vq_dequantize(q, codebooks, scales) - w
        return ((e @ H) * e).sum(1)                                                # (O,)
    def by_hand(order):
        q = codes.clone()
        for j, m in order:
            tries = []
            for k in range(16):
                q[:, j, m] = k
                tries.append(loss(q))
            q[:, j, m] = torch.stack(tries).argmin(0)
        return q
    one_way, other = ((0, 1), (1, 0))
    orders = [[(j, m) for j, books in zip(groups, pair) for m in books]
              for groups in (one_way, other) for pair in itertools.product((one_way, other),
                                                                           repeat=2)]
    known, seen = [by_hand(order) for order in orders], set()
    for seed in range(60):
        found = vq_search_xtx(w, H, codes, codebooks, scales, generator=seeded(seed))[0]
        matches = [i for i, q in enumerate(known) if torch.equal(q, found)]
        assert matches
        seen |= set(matches)
    assert len(seen) == 8

def test_the_search_on_white_inputs_is_the_plain_one():
    codes, codebooks, scales, w = layer(M=1)
    found = vq_search_xtx(w, torch.eye(32).double(), codes, codebooks, scales)[0]
    assert torch.equal(found, v_step(w, codes, codebooks, scales, 1.0))

# ---- The fit ------------------------------------------------------------------------------------

def test_kmeans_finds_separate_clusters_and_survives_duplicates():
    centers = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    x = centers.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=seeded())
    best = min(((x - c[q]).square().sum().item() for c, q in
                (kmeans(x, 3, generator=seeded(s)) for s in range(5))))
    assert best < 6
    c, q = kmeans(torch.ones(20, 2), 4, generator=seeded())                # three stay empty
    assert torch.isfinite(c).all() and (c[q] == 1).all()
    with pytest.raises(ValueError, match="4 centroids need as many points"):
        kmeans(torch.ones(3, 2), 4)
    a, b = (kmeans(x, 3, generator=seeded(7)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

def test_kmeans_ends_where_every_centroid_is_the_mean_of_its_points():
    x = torch.randn(500, 3, generator=seeded(), dtype=torch.float64)
    c, q = kmeans(x, 8, 1000, seeded(1))
    assert torch.equal(q, (x.unsqueeze(1) - c).square().sum(-1).argmin(1))
    for k in range(8):
        assert (x[q == k].mean(0) - c[k]).abs().max() < 1e-4

def test_fit_starts_at_row_norms_and_each_part_of_it_lowers_the_loss_on_the_inputs():
    g = seeded()
    w = torch.randn(32, 64, generator=g) * torch.logspace(-2, 0, 32).unsqueeze(1)
    x = torch.randn(500, 64, generator=g) @ torch.randn(64, 64, generator=g)
    H = x.t() @ x / 500
    def loss(codes, codebooks, scales):
        e = vq_dequantize(codes, codebooks, scales) - w
        return ((e @ H) * e).sum().item()
    start = vq_fit(w, H, 2, 4, 4, rounds=0, generator=seeded(1))
    torch.testing.assert_close(start[2], w.double().square().sum(1).sqrt().float())
    search = vq_fit(w, H, 2, 4, 4, rounds=1, steps=0, generator=seeded(1))
    assert torch.equal(search[1], start[1]) and torch.equal(search[2], start[2])
    both = vq_fit(w, H, 2, 4, 4, rounds=1, generator=seeded(1))
    more = vq_fit(w, H, 2, 4, 4, generator=seeded(1))
    assert loss(*more) < 0.9 * loss(*both) < 0.9 * loss(*search) < 0.9 * loss(*start)

def test_the_fit_ends_with_codes_that_suit_its_last_codebooks():
    """One more search over them wins little: 1 %, where a fit that ends with Adam leaves 5 %."""
    g = seeded()
    w = torch.randn(64, 128, generator=g) * torch.logspace(-1, 0, 64).unsqueeze(1)
    x = torch.randn(2000, 128, generator=g) @ torch.randn(128, 128, generator=g)
    H = x.t() @ x / 2000
    fitted = vq_fit(w, H, 2, 4, 4, generator=seeded(1))
    error = vq_dequantize(*fitted) - w
    _, losses = vq_search_xtx(w, H, *fitted, generator=seeded(2))
    assert losses.sum() > 0.985 * ((error @ H) * error).sum()

def test_the_fit_takes_inputs_that_were_always_zero():
    w = torch.randn(16, 32, generator=seeded())
    x = torch.randn(200, 32, generator=seeded(1))
    x[:, 4:8] = 0
    for H in (torch.zeros(32, 32), x.t() @ x):
        codes, codebooks, scales = vq_fit(w, H, 1, 3, 4, generator=seeded())
        assert vq_dequantize(codes, codebooks, scales).isfinite().all()
        assert output_error(w, vq_dequantize(codes, codebooks, scales), H) < 0.5

def test_a_scale_that_became_zero_can_be_searched():
    """The P half may take a scale there; its row stands for zeros, whatever its codes are."""
    codes, codebooks, scales, w = layer(M=1)
    scales[3] = 0
    new = v_step(w, codes, codebooks, scales, 1.0)
    others = [i for i in range(len(w)) if i != 3]
    expected = v_step(w[others], codes[others], codebooks, scales[others], 1.0)
    assert torch.equal(new[others], expected)
    form = Grid(*(x[None] for x in rtn(w, 2, 8)), 2)
    form.scale.data[0, 3, 1] = 0
    made, _, _ = move_codes(form, w[None], 1.0)
    assert made.isfinite().all() and form.codes.min() >= 0 and form.codes.max() <= 3

def test_the_codebooks_of_the_fit_are_those_of_a_k_means_that_has_converged():
    """Lloyd's steps here, from where the fit ended, win less than 2 % of its error; one step from
    random points leaves them far more to win."""
    w = torch.randn(64, 128, generator=seeded())
    codes, codebooks, scales = vq_fit(w, torch.eye(128), 1, 4, 4, rounds=1, steps=0,
                                      generator=seeded(1))
    x = (w / w.norm(dim=1, keepdim=True)).view(-1, 4)
    def lloyd(c, steps):
        for _ in range(steps):
            q = torch.cdist(x, c).argmin(1)
            c = torch.stack([x[q == k].mean(0) if (q == k).any() else c[k] for k in range(16)])
        return torch.cdist(x, c).amin(1).square().sum()
    made = vq_dequantize(codes, codebooks, scales) / w.norm(dim=1, keepdim=True)
    error = (made.view(-1, 4) - x).square().sum()
    assert lloyd(codebooks[0], 50) > 0.98 * error
    assert lloyd(x[:16], 50) < 0.9 * lloyd(x[:16], 1)

def test_the_fit_is_calibrated_on_the_training_text_alone():
    _, teacher = copy.deepcopy(fitted(1, 0, False, False))
    args = settings(scheme="affine", bits=2, group_size=-1, smoke=False)
    made = pvtune.fit(teacher, TrainingTextOnly(tokens().train), args)
    assert len(made.linears()) == 14 and all(isinstance(m, PVLinear) for _, m in made.linears())

def test_the_fit_draws_from_its_seed_and_reports_what_its_layers_lose(monkeypatch, capsys):
    _, teacher = copy.deepcopy(fitted(1, 0, False, False))
    args, data, draws = settings(scheme="1x3g4", smoke=True, seed=3), tokens(), []
    made = vq_fit
    def spy(*how, generator, **more):
        draws.append(generator.initial_seed())
        return made(*how, generator=generator, **more)
    monkeypatch.setattr(pvtune, "vq_fit", spy)
    w = teacher.blocks[0].attn.wq.weight.double()
    idx = nanobit.data.batch(data.train, 0, 64, 32, 3, "cpu")[0]
    x = teacher.blocks[0].attn_norm(teacher.embed(idx)).flatten(0, 1).double()     # wq reads it
    student = pvtune.fit(teacher, data, args)
    w_hat = student.blocks[0].attn.wq.weight.double()
    lost = (x @ (w_hat - w).t()).square().sum() / (x @ w.t()).square().sum()
    first = capsys.readouterr().out.splitlines()[0]
    assert float(first.split("wq ")[1].split()[0]) == pytest.approx(100 * lost.item(), abs=0.06)
    assert set(draws) == {3} and len(draws) == 4       # one stack for each shape

def stacks(L=3, O=24, C=32):
    """L linears of one shape, each with a Hessian of its own: w (L, O, C), H (L, C, C)."""
    w = torch.randn(L, O, C, generator=seeded(3)) * torch.tensor([0.02, 1, 5]).view(L, 1, 1)
    mix = torch.randn(L, C, C, generator=seeded(4))
    return w, mix @ mix.mT / C

def test_a_stack_is_fitted_as_its_linears_are_one_by_one():
    """Also where one of them ends earlier than the others, and with more than one hypothesis."""
    w, H = stacks()
    ended = []
    for rounds in (0, 1, 2, 4, 9):
        fitted = vq_fit(w, H, 2, 3, 4, rounds, 6, generator=seeded(1))
        for i in range(len(w)):
            alone = vq_fit(w[i], H[i], 2, 3, 4, rounds, 6, generator=seeded(1))
            for mine, theirs in zip(alone, fitted):
                torch.testing.assert_close(mine, theirs[i], rtol=1e-5, atol=1e-6)
            if rounds > 4:
                before = vq_fit(w[i], H[i], 2, 3, 4, rounds - 1, 6, generator=seeded(1))
                ended.append(all(map(torch.equal, alone, before)))
    assert any(ended)                                  # some ended before the last round
    for beam in (1, 3):
        codes, loss = vq_search_xtx(w, H, *fitted, beam, seeded(2))
        for i in range(len(w)):
            alone = vq_search_xtx(w[i], H[i], *[x[i] for x in fitted], beam, seeded(2))
            assert torch.equal(alone[0], codes[i])
            torch.testing.assert_close(alone[1], loss[i], rtol=1e-4, atol=1e-5)

def test_sets_of_points_have_the_centroids_that_they_have_alone():
    """Two clusters that are found at once, and noise that moves much longer."""
    far = torch.cat((torch.randn(30, 2, generator=seeded(1)) / 100,
                     torch.randn(30, 2, generator=seeded(2)) / 100 + 9))
    x = torch.stack((far, torch.randn(60, 2, generator=seeded(3)), far.flip(1)))
    c, q = kmeans(x, 5, 200, seeded(4))
    for i in range(3):
        c_alone, q_alone = kmeans(x[i], 5, 200, seeded(4))
        assert torch.equal(q_alone, q[i])
        torch.testing.assert_close(c_alone, c[i])

def test_codebooks_of_all_blocks_are_those_of_the_dense_models_inputs():
    """Where the model is small enough, all blocks are one stack; each linear is what vq_fit makes
    of its weight and of the inputs that it has in the dense model."""
    _, teacher = copy.deepcopy(fitted(1, 0, False, False))
    args, data = settings(scheme="1x3g4", smoke=False, seed=3), tokens()
    idx = nanobit.data.batch(data.train, 0, 64, 32, 3, "cpu")[0]
    seen = {}
    for name, m in teacher.linears():
        m.register_forward_hook(lambda m, x, y, name=name: seen.update({name: x[0]}))
    student = pvtune.fit(copy.deepcopy(teacher), data, args)
    teacher(idx)
    dense = dict(teacher.linears())
    for name, m in student.linears():
        x = seen[name].flatten(0, 1)
        alone = vq_fit(dense[name].weight, x.t() @ x / len(x), 1, 3, 4, generator=seeded(3))
        torch.testing.assert_close(m.weight, vq_dequantize(*alone), rtol=1e-3, atol=1e-5)

# ---- The code rate ------------------------------------------------------------------------------

def test_half_the_gap_is_half_a_step_of_a_grid_and_half_the_way_to_the_next_codeword():
    w = torch.randn(16, 64, generator=seeded())
    q, scale, zero = rtn(w, 3, 16)
    form = Grid(q[None], scale[None], zero[None], 3)
    unit = dequantize(q, scale, zero, 16).square().mean().sqrt()
    want = (scale / 2 / unit).repeat_interleave(16, 1).flatten()
    torch.testing.assert_close(pvtune.half_gap(form)[0], want)

    # One codebook: by brute force.
    codes, codebooks, scales, _ = layer(O=6, C=16, M=1, K=8, g=4)
    form = one(codes, codebooks, scales)
    here = form.dequantize()[0].view(-1, 4)
    vectors = codebooks[0] * scales.repeat_interleave(4).view(-1, 1, 1)          # (n, K, g)
    apart = (vectors - here.unsqueeze(1)).norm(dim=2).sort(1).values[:, 1]
    unit = here.square().mean().sqrt() * 2                                       # of 4 weights
    torch.testing.assert_close(pvtune.half_gap(form)[0], apart / 2 / unit)

@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("steps", [20, 150])
def test_at_the_default_code_rate_a_steady_gradient_changes_codes_early_and_noise_hardly_any(
        bits, steps):
    """LAMB's own steps, from the codes' values, with gradients that keep or draw their signs."""
    w = torch.randn(64, 64, generator=seeded())
    q, scale, zero = rtn(w, bits, 16)
    form = Grid(q[None], scale[None], zero[None], bits)
    rate = pvtune.default_code_lr([form], steps)
    steady = torch.randn(1, 64, 64, generator=seeded(1)).sign()
    generator = seeded(2)
    R, W, state = {}, form.dequantize().detach(), {"steady": {}, "noise": {}}
    for kind in state:
        R[kind] = W.clone()
    half = scale.repeat_interleave(16, 1)[None] / 2
    for t in range(steps):
        lr = PVOptimizer.schedule(t, steps, rate)
        drawn = torch.randn(1, 64, 64, generator=generator)
        for kind, g in (("steady", steady), ("noise", drawn)):
            R[kind] += pvtune.lamb_step(R[kind], g, state[kind], lr, (0.0, 0.95))
        if t == steps // 2:
            assert ((R["steady"] - W).abs() > half).float().mean() > 0.9
    assert ((R["noise"] - W).abs() > half).float().mean() < 0.2

@pytest.mark.slow
def test_the_tables_rtn_is_the_one_that_comes_closest_in_stored_bits():
    """Beside every grid, packed: bytes of codes, 2 of a scale, `bits` bits of a zero point."""
    model = LLaMA(LlamaConfig(32, 1, 128, 4, 4, 256, 16)).requires_grad_(False)
    def stored(bits, g):
        tensors, weights = [], 0
        for _, linear in model.linears():
            q, scale, zero = rtn(linear.weight, bits, g)
            tensors += [(q.numel() * bits / 8, scale.numel() * 2, zero.numel() * bits / 8)]
            weights += q.numel()
        return 8 * sum(map(sum, tensors)) / weights
    every = [stored(bits, g) for bits in range(1, 9) for g in (-1, 128, 64, 32)]
    for bpw in (1.3, 2.2, 2.7, 3.0, 3.6, 4.4, 5.0, 8.5):
        found = bits_per_weight(pvtune.nearest_rtn(model, bpw))[0]
        assert abs(found - bpw) == pytest.approx(min(abs(b - bpw) for b in every), abs=1e-9)

# ---- The grid -----------------------------------------------------------------------------------

@pytest.mark.parametrize("bits,group_size", [(2, 8), (3, -1)])
def test_grid_codes_are_the_nearest_integers_and_the_runner_up(bits, group_size):
    w = torch.randn(6, 32, generator=seeded(), dtype=torch.float64)
    q, scale, zero = rtn(w, bits, group_size)
    form = Grid(q[None], scale[None], zero[None], bits)
    assert torch.equal(form.dequantize()[0], dequantize(q, scale, zero, group_size))
    R = w + 0.5 * torch.randn(6, 32, generator=seeded(1), dtype=torch.float64)
    codes, values = (x[0] for x in form.nearest(R.view(1, -1, 1), torch.arange(192)[None], keep=2))
    C = 32 // scale.size(1)
    levels = (torch.arange(2**bits) - zero.repeat_interleave(C, 1).unsqueeze(-1)) * (
        scale.repeat_interleave(C, 1).unsqueeze(-1))                               # (O, C, 2^b)
    distance = (levels - R.unsqueeze(-1)).square().flatten(0, 1)
    lowest = distance.topk(2, largest=False)
    assert torch.equal(codes[:, :, 0].long(), lowest.indices)
    errors = (values[:, :, 0] - R.view(-1, 1)).square()
    assert (errors - lowest.values).abs().max() < 1e-12

def test_grid_moves_codes_keeps_zero_points_and_packs_what_it_stands_for():
    w = torch.randn(6, 32, generator=seeded())
    q, scale, zero = rtn(w, 2, 8)
    form = Grid(q[None], scale[None], zero[None], 2)
    R = w + 0.3 * torch.randn(6, 32, generator=seeded(1))
    _, moved, _ = move_codes(form, R[None], 0.1)
    assert 0 < moved <= math.ceil(0.1 * 192) and torch.equal(form.zero_point[0], zero)
    assert (form.codes.view(6, 32) != q).sum() == moved
    assert torch.equal(form.pack()[0].weight(), form.dequantize()[0])
    made = form.dequantize()[0]
    G = torch.randn(6, 32, generator=seeded(2))
    g, = torch.autograd.grad(made, form.scale, G)
    plain = ((form.codes.view(6, 4, 8) - zero.unsqueeze(-1)) * G.view(6, 4, 8)).sum(-1)
    assert (g[0] - plain).abs().max() < 1e-5

# ---- The plain step -----------------------------------------------------------------------------

class Stacked(nn.Module):
    """A model of one stack of L layers (16, 24) and a norm, as PVOptimizer needs it."""

    def __init__(self, kind, M, L):
        super().__init__()
        w = torch.randn(L, 16, 24, generator=seeded(L)).double()
        if kind == "grid":
            forms = [Grid(*(x[None] for x in rtn(v, M, 8)), M) for v in w]
        else:
            forms = [one(*layer(16, 24, M, K=8, seed=i)[:3]) for i in range(L)]
        layers = [PVLinear(form) for form in forms]
        self.layers, self.forms = [layers], nn.ModuleList([pvtune.stack(forms)])
        self.weights = nn.ParameterList([m.weight for m in layers])

def plain_nearest(kind, bits, draws):
    """`nearest` of pv_step for a grid or codebooks; with draws, (generator, T), one that takes the
    runner-up at the published odds."""
    def candidates(R, codes, *values):
        """All codes that are reached by the last decision, (O, J, K, M), and their errors."""
        if kind == "grid":
            scale, zero = (x.repeat_interleave(8, 1) for x in values)              # (O, C)
            every = torch.arange(2**bits).expand(*R.shape, -1).unsqueeze(3)
            made = (every[..., 0] - zero.unsqueeze(2)) * scale.unsqueeze(2)
            return every, (made - R.unsqueeze(2)).square()
        codebooks, scales = values
        generator = draws[0] if draws else seeded()
        order = torch.randperm(codes.size(2), generator=generator).tolist()
        codes = codes.clone()
        for m in order:
            every = codes.unsqueeze(2).repeat(1, 1, codebooks.size(1), 1)
            every[..., m] = torch.arange(codebooks.size(1))
            made = sum(codebooks[k][every[..., k]] for k in range(codes.size(2)))
            x = (R / scales.unsqueeze(1)).view(*codes.shape[:2], 1, -1)
            errors = (x - made).square().sum(-1)
            codes[..., m] = errors.argmin(2)
        return every, errors
    def nearest(R, codes, *values):
        every, errors = candidates(R, codes, *values)
        lowest = errors.topk(2, largest=False)
        pick = lowest.indices[..., 0]
        if draws:
            generator, T = draws
            e1, e2 = lowest.values.sqrt().unbind(2)
            p = e1 ** (-1 / T) / (e1 ** (-1 / T) + e2 ** (-1 / T))
            u = torch.rand(1, p.numel(), generator=generator, dtype=p.dtype).view(p.shape)
            pick = torch.where(u < p, pick, lowest.indices[..., 1])
        chosen = pick.view(*pick.shape, 1, 1).expand(-1, -1, 1, codes.size(2))
        return every.gather(2, chosen)[:, :, 0]
    return nearest

@pytest.mark.parametrize("variant", tuple(pvtune.VARIANTS))
@pytest.mark.parametrize("kind,M", [("codebooks", 1), ("codebooks", 2), ("codebooks", 3),
                                    ("grid", 1), ("grid", 2), ("grid", 4)])
def test_a_stack_takes_the_plain_step_of_each_of_its_layers(kind, M, variant, in_float64):
    """M: codebooks, or bits of a grid. Codes, values and buffer, after each of eight steps; with
    stochastic rounding a stack of one layer, whose draws are then the plain step's own."""
    how = pvtune.VARIANTS[variant]
    trust = 0.15 if how.share is None else None
    args = settings(rank="residual", trust=trust, tau=0.1, lr=0.02, code_lr=0.2)
    model = Stacked(kind, M, 1 if how.rounding else 3)
    optimizer = PVOptimizer(model, args, variant)
    form, = model.forms
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]

    plain = []
    for i, m in enumerate(model.weights):
        codes, *values = (x[i].detach().clone() for x in parts_of(form))
        if kind == "grid":
            codes = codes.unsqueeze(2)
        plain.append([codes.long(), [v.requires_grad_() for v in values], m.detach().clone(),
                      [{}, {}, {}]])
    changes = 0
    for t in range(8):
        G = torch.randn(len(plain), 16, 24, generator=seeded(100 + t)).double()
        for w, g in zip(model.weights, G):
            w.grad = g.clone()
        optimizer.step()
        optimizer.zero_grad()

        for i, own in enumerate(plain):
            codes, values, buffer, states = own
            generator = torch.Generator()
            seed = np.random.SeedSequence([0, t]).generate_state(1)
            generator.manual_seed(int(seed[0]))
            nearest = plain_nearest(kind, M, (generator, how.rounding) if how.rounding else None)
            if kind == "grid":
                learn = values[:1]
                make = lambda q, s: dequantize(q.squeeze(2), s, values[1], 8)
                search = lambda R, q, s: nearest(R, q, s, values[1])
            else:
                learn, make, search = values, vq_dequantize, nearest
                if not how.rounding:
                    search = functools.partial(pvtune.nearest_codes, generator=generator)
            if how.share == 0:                         # P only: no V half
                new, _ = pv_step(G[i], codes, learn, buffer, states, make, search, 0.02, 0.0, 1e-9,
                                 trust=0.0)
                assert torch.equal(new, codes)
                buffer = make(new, *learn).detach()
            else:
                new, buffer = pv_step(G[i], codes, learn, buffer, states, make, search, 0.02, 0.2,
                                      how.share or 0.1, how.forget, trust or math.inf)
            changes += (new != codes).any(2).sum().item()
            own[0], own[2] = new, buffer

            stacked = parts_of(form)
            assert torch.equal(stacked[0][i].view(new.shape).long(), new), (t, i)
            for mine, theirs in zip(values, stacked[1:]):
                torch.testing.assert_close(mine, theirs[i], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(make(new, *learn), model.weights[i], rtol=1e-9, atol=1e-12)
            if how.forget < 1:
                kept = optimizer.state[model.weights[0]]["buffer"][i]
                torch.testing.assert_close(buffer, kept, rtol=1e-9, atol=1e-12)
    if how.share == 0:
        assert changes == 0
    else:
        assert optimizer.changed() == changes > 0

# ---- C: the optimizer ---------------------------------------------------------------------------

def settings(**flags):
    return types.SimpleNamespace(**dict(
        lr=3e-3, code_lr=0.3, tau=0.05, rank="improvement", trust=None, seed=0, device="cpu",
        batch_size=4, accumulate=1, seq_len=32, steps=1000, compile=False) | flags)

def tokens(n=4000, vocab=64):
    rng = np.random.default_rng(0)
    return types.SimpleNamespace(train=(rng.integers(0, 3, n).cumsum() % vocab).astype(np.int64))

@functools.lru_cache(maxsize=None)
def fitted(M, seed, tied, grid):
    torch.manual_seed(seed)
    teacher = LLaMA(LlamaConfig(64, 2, 32, 4, 2, 48, 32, tied=tied)).requires_grad_(False)
    def compress(_, m):
        if grid:
            return PVLinear(Grid(*(x[None] for x in rtn(m.weight.detach(), 2, 16)), 2))
        return PVLinear(one(*vq_fit(m.weight, torch.eye(m.weight.size(1)), M, 3, 4, rounds=1,
                                    generator=seeded())))
    return copy.deepcopy(teacher).requires_grad_(True).replace_linears(compress), teacher

def student(M=2, seed=0, tied=False, grid=False, exact=False):
    """A Distilled 2-layer LLaMA of random weights in codebooks of 8, and its teacher. exact: both
    in float64, to be used with in_float64."""
    models = copy.deepcopy(fitted(M, seed, tied, grid))
    return Distilled(*map(double, models) if exact else models)

def take_steps(model, optimizer, args, steps, first=0):
    return [nanobit.train.train_step(model, optimizer, tokens(), args, first + i)[0].item()
            for i in range(steps)]

def lamb(p, g, v, m, t, lr, b1, b2):
    """The formula, written out: the new p, v and m."""
    v = b2 * v + (1 - b2) * g * g
    m = b1 * m + (1 - b1) * g
    u = m / (v.sqrt() + 1e-6)
    u = u * (p.norm() / u.norm()) * lr
    return p - u * math.sqrt(1 - b2**t) / (1 - b1**t), v, m

def parts_of(form):
    """What a stack is made from, each with L in front."""
    codes = form.codes.view(form.shape)
    if isinstance(form, Grid):
        return codes, form.scale, form.zero_point
    return codes, form.codebooks, form.scales

def linears(model):
    """Of every linear: its layer, and codes (O, J, M), codebooks, scales (or those of a grid)."""
    return [(m, [x[i] for x in parts_of(form)]) for form, layers in zip(model.forms, model.layers)
            for i, m in enumerate(layers)]

def divergence(model, x):
    """The loss by its formula: sum of p log(p / q), p the teacher's, in the mean over tokens."""
    p, q = (m(x)[0].softmax(-1) for m in (model.teacher[0], model.student))
    return (p * (p / q).log()).sum() / x.numel()

def test_codes_are_those_of_a_plain_straight_through_loop(in_float64):
    model, args = student(M=1, exact=True), settings(lr=0.0)
    optimizer, by_hand = PVOptimizer(model, args, "ste"), copy.deepcopy(model)
    optimizer.schedule = lambda step, steps, peak: peak
    shadows = [[m, *(x.detach().clone() for x in parts), m.weight.detach().clone(), 0]
               for m, parts in linears(by_hand)]
    flips = 0
    for t in range(1, 13):
        take_steps(model, optimizer, args, 1, t)
        x, _ = nanobit.data.batch(tokens().train, t, 4, 32, 0, "cpu")
        divergence(by_hand, x).backward()
        nn.utils.clip_grad_norm_(by_hand.student.parameters(), 1.0)
        for own, (_, (codes, _, _)) in zip(shadows, linears(model)):
            m, q, codebooks, scales, shadow, v = own
            shadow, v, _ = lamb(shadow, m.weight.grad, v, 0, t, 0.3, 0.0, 0.95)
            groups = (shadow / scales.unsqueeze(1)).view(-1, 1, 4)
            new = (groups - codebooks[0]).square().sum(-1).argmin(1).view(q.shape)
            flips += (new != q).sum().item()
            m.weight.data = vq_dequantize(new, codebooks, scales)
            own[1], own[4], own[5] = new, shadow, v
            assert torch.equal(codes, new.int()), t
        by_hand.zero_grad()
    assert flips > 100

def test_the_rates_fall_in_a_line_from_their_peaks_to_nothing():
    model, args = student(M=1), settings(lr=0.02, code_lr=0.5, steps=10)
    optimizer = PVOptimizer(model, args, "pv")
    for t, share in ((0, 1.0), (1, 0.9), (5, 0.5), (9, 0.1)):
        take_steps(model, optimizer, args, 1, t)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.02 * share, 0.02 * share, 0.5 * share])

@pytest.mark.parametrize("variant", ["naive", "stochastic", "ste", "subspace", "pv"])
def test_the_trust_region_binds_the_arms_with_a_share_tau_and_no_other(variant):
    """So small a region leaves each linear the one group that crosses its border, if any moves."""
    codes, changes = [], []
    for trust in (None, 1e-6):
        model, args = student(M=1), settings(trust=trust, code_lr=3.0)
        optimizer = PVOptimizer(model, args, variant)
        take_steps(model, optimizer, args, 1)
        codes.append(torch.cat([form.codes.flatten() for form in model.forms]))
        changes.append(torch.cat([moved for moved, _ in optimizer.moved]))         # (14,)
    free, bound = changes
    if variant in ("subspace", "pv"):
        assert free.sum() > 14 and torch.equal(bound, free.clamp(max=1))
    else:
        assert torch.equal(*codes) and free.sum() > 14

def test_a_small_naive_step_is_p_only_with_no_code_changed():
    states = []
    for variant, code_lr in (("p", 1.0), ("naive", 1e-4)):
        model, args = student(), settings(code_lr=code_lr)
        optimizer = PVOptimizer(model, args, variant)
        take_steps(model, optimizer, args, 4)
        assert optimizer.changed() == 0
        states.append(model.state_dict())
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x)

class Direct(nn.Module):
    """The layer as autograd differentiates it: no dense weight in between."""

    def __init__(self, codes, codebooks, scales):
        super().__init__()
        self.codes = codes.clone()
        self.codebooks = nn.Parameter(codebooks.detach().clone())
        self.scales = nn.Parameter(scales.detach().clone())

    def forward(self, x):
        return F.linear(x, vq_dequantize(self.codes, self.codebooks, self.scales))

def test_p_half_is_training_the_layer_that_autograd_differentiates():
    model, args = student(), settings()
    plain, made = copy.deepcopy(model), {m: parts for m, parts in linears(model)}
    names = [(n, Direct(*made[m])) for n, m in model.student.linears()]
    plain.student.replace_linears(lambda name, _: dict(names)[name])
    optimizer, state = PVOptimizer(model, args, "p"), {}
    optimizer.schedule = lambda step, steps, peak: peak
    for t in range(1, 4):
        take_steps(model, optimizer, args, 1, t)
        x, _ = nanobit.data.batch(tokens().train, t, 4, 32, 0, "cpu")
        divergence(plain, x).backward()
        for name, p in plain.student.named_parameters():
            v, m = state.get(name, (0, 0))
            p.data, *state[name] = lamb(p.detach(), p.grad, v, m, t, 3e-3, 0.9, 0.95)
        plain.zero_grad()
    made = {m: parts for m, parts in linears(model)}
    for (_, direct), (_, m) in zip(names, model.student.linears()):
        codes, codebooks, scales = made[m]
        assert torch.equal(codes, direct.codes)
        assert (codebooks - direct.codebooks).abs().max() < 2e-6
        assert (scales - direct.scales).abs().max() < 2e-6
    rest, other = (dict(m.student.named_parameters()) for m in (model, plain))
    rest = [n for n in rest if n in other]
    assert len(rest) == 7                              # norms, embedding and head learn too
    assert all((dict(model.student.named_parameters())[n] - other[n]).abs().max() < 2e-6
               for n in rest)

@pytest.mark.parametrize("grid", [False, True])
def test_without_the_p_half_only_codes_move(grid):
    model, args = student(grid=grid), settings(lr=0.0)
    optimizer = PVOptimizer(model, args, "pv")
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, args, 8)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and {k.rsplit(".", 1)[1] for k in changed} == {"codes", "weight"}
    assert not any("norm" in k or "embed" in k or "head" in k for k in changed)

def test_codebook_and_scale_gradients_are_sums_over_the_groups_times_the_scale():
    codes, codebooks, scales, G = layer()
    codebooks.requires_grad_(), scales.requires_grad_()
    got = torch.autograd.grad(vq_dequantize(codes, codebooks, scales), (codebooks, scales), G)
    expected = torch.zeros_like(codebooks)
    for i, j, m in itertools.product(range(8), range(8), range(2)):
        expected[m, codes[i, j, m]] += (scales[i] * G[i, 4 * j:4 * j + 4]).detach()
    w = vq_dequantize(codes, codebooks, torch.ones(8).double())
    assert (got[0] - expected).abs().max() < 1e-12
    assert (got[1] - (w * G).sum(1)).abs().max() < 1e-12

@pytest.mark.parametrize("variant", tuple(pvtune.VARIANTS))
def test_dense_weights_are_always_what_the_codes_stand_for(variant):
    model, args = student(), settings()
    optimizer = PVOptimizer(model, args, variant)
    take_steps(model, optimizer, args, 3)
    for form, layers in zip(model.forms, model.layers):
        for m, w in zip(layers, form.dequantize()):
            assert torch.equal(m.weight, w)
        state = optimizer.state[layers[0].weight]
        assert ("buffer" in state) == (variant in ("ste", "pv"))
        assert all(t.dtype == torch.float32 for t in state.values() if torch.is_tensor(t))
    assert 0 <= optimizer.changed() <= 3 * optimizer.allowed()[0]
    assert variant not in ("stochastic", "ste", "pv") or optimizer.changed() > 0

def test_codes_move_on_the_codebooks_that_the_p_half_has_moved(in_float64):
    model, args = student(M=1, exact=True), settings(lr=0.3, code_lr=0.3)
    optimizer = PVOptimizer(model, args, "ste")
    old, stale = copy.deepcopy(model.forms), 0
    take_steps(model, optimizer, args, 1)
    for before, form, layers in zip(old, model.forms, model.layers):
        R = optimizer.state[layers[0].weight]["buffer"].view(len(layers), -1, 4)
        everything = torch.arange(R.size(1)).expand(len(layers), -1)
        assert torch.equal(form.nearest(R, everything)[0][:, :, 0].int(), form.codes)
        stale += (before.nearest(R, everything)[0][:, :, 0] != form.codes).sum()
    assert stale > 0

@pytest.mark.parametrize("variant", ["pv", "stochastic"])
def test_a_loaded_state_takes_the_same_next_steps(variant):
    model, args = student(), settings(trust=0.2)
    optimizer = PVOptimizer(model, args, variant)
    take_steps(model, optimizer, args, 3)
    other = student(seed=1)
    again = PVOptimizer(other, args, variant)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(saved[0])
    other.teacher = model.teacher
    again.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (other, again)):
        take_steps(m, o, args, 3, first=3)
    a, b = model.state_dict(), other.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and optimizer.changed() == again.changed() > 0

@pytest.mark.parametrize("betas,first,second", [((0.0, 0.95), 0.2236, 0.3122),
                                                 ((0.9, 0.95), 2.236, 1.643)])
def test_lamb_steps_have_the_norm_of_the_formula_for_each_tensor_of_a_stack(betas, first, second):
    p, state = torch.randn(3, 5, 10, generator=seeded()), {}
    p[1] *= 100
    for t, factor in ((1, first), (2, second)):
        g = torch.randn(3, 5, 10, generator=seeded(t)) * torch.tensor([1, 1e3, 1]).view(3, 1, 1)
        step = lamb_step(p, g, state, 0.01, betas)
        exact = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        for l in range(3):
            assert abs(step[l].norm() / (0.01 * p[l].norm()) - exact) < 1e-5
        assert abs(exact - factor) < 1e-3

def test_nothing_moves_where_the_student_is_the_teacher():
    model, args = student(), settings()
    same = LLaMA(model.config)
    same.load_state_dict(model.student.state_dict())
    model.teacher[0] = same.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    losses = take_steps(model, PVOptimizer(model, args, "pv"), args, 3)
    assert max(map(abs, losses)) < 1e-6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def test_order_of_the_codewords_does_not_matter(in_float64):
    models = [student(M=1, exact=True), student(M=1, exact=True)]
    for form in models[1].forms:
        order = torch.randperm(8, generator=seeded())
        form.codebooks.data = form.codebooks.data[:, :, order]
        form.codes.copy_(order.argsort()[form.codes.long()])
    args = settings()
    for model in models:
        take_steps(model, PVOptimizer(model, args, "pv"), args, 5)
    for (a, _), (b, _) in zip(*map(linears, models)):
        assert (a.weight - b.weight).abs().max() < 1e-10

@pytest.mark.parametrize("grid", [False, True])
def test_a_stack_moves_as_its_linears_do_one_by_one(grid, in_float64):
    model = student(M=1, grid=grid, exact=True)
    form = model.forms[0]
    more = [form.bits] if grid else []
    alone = [type(form)(*(x[i:i + 1] for x in parts_of(copy.deepcopy(form))), *more)
             for i in range(4)]
    w, left = form.dequantize().detach(), torch.zeros(form.codes.shape[:2]).double()
    R = w + 0.02 * torch.randn(w.shape, generator=seeded())
    for _ in range(2):
        new, changed, used = move_codes(form, R, 0.1, trust=0.3, left=left)
    for i, f in enumerate(alone):
        own = torch.zeros(1, left.size(1)).double()
        for _ in range(2):
            made, moved, share = move_codes(f, R[i:i + 1], 0.1, trust=0.3, left=own)
        assert torch.equal(f.codes[0], form.codes[i]) and moved == changed[i]
        for a, b in ((made[0], new[i]), (share[0], used[i]), (own[0], left[i])):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert changed.sum() > 0

def test_order_of_the_codebooks_does_not_matter_to_a_full_search(monkeypatch):
    monkeypatch.setattr(Codebooks, "beam", 16)
    codes, codebooks, scales, w = layer()
    a = v_step(w, codes, codebooks, scales, 0.5)
    b = v_step(w, codes.flip(-1), codebooks.flip(0), scales, 0.5)
    assert torch.equal(a, b.flip(-1)) and not torch.equal(a, codes)

class One(nn.Module):
    """A model of one weight (2, 4) of ones, the first of the values 1 and 1 + gap."""

    def __init__(self, gap):
        super().__init__()
        self.layer = PVLinear(one(torch.zeros(2, 4, 1).long(),
                                  torch.tensor([[[1.0], [1.0 + gap]]]), torch.ones(2)))
        self.layers, self.forms = [[self.layer]], [self.layer.form]

def push(optimizer, s):
    """A step whose virtual dense weight moves by s everywhere, the rest by nothing."""
    (form, (w,)), = optimizer.stacks
    t = optimizer.state[w].get("t", 0) + 1
    start = optimizer.state[w].get("buffer", w)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    size = start.norm().item() * math.sqrt(1 - 0.95**t) / math.sqrt(8)     # of a step at rate 1
    optimizer.param_groups[2]["lr"] = s / size
    w.grad = -torch.ones(2, 4)
    optimizer.step()
    optimizer.zero_grad()
    return form.codes.sum().item()

@pytest.mark.parametrize("variant,flips", [("naive", [0, 0, 0]), ("ste", [0, 8, 8])])
def test_the_buffer_remembers_half_steps_and_without_it_they_are_forgotten(variant, flips):
    optimizer = PVOptimizer(One(1.0), settings(), variant)
    assert [push(optimizer, 0.3) for _ in range(3)] == flips

@pytest.mark.parametrize("delta,gap", [(0.9, 0.111), (0.5, 1.0), (0.1, 9.0)])
def test_a_leaky_buffer_stops_at_its_fixed_point(delta, gap, monkeypatch):
    monkeypatch.setitem(pvtune.VARIANTS, "leaky", pvtune.Variant("leaky", forget=delta, share=1))
    model, s = One(100.0), 0.01
    optimizer = PVOptimizer(model, settings(), "leaky")
    for _ in range(120):
        assert push(optimizer, s) == 0
    buffer = optimizer.state[model.layer.weight]["buffer"]
    assert ((buffer - 1) / s - gap).abs().max() < 0.01 * max(gap, 0.1)

def test_buffers_are_float32_because_bfloat16_loses_small_steps():
    model, args = student(), settings()
    model.student.dtype = model.teacher[0].dtype = torch.bfloat16
    optimizer = PVOptimizer(model, args, "pv")
    take_steps(model, optimizer, args, 1)
    for layers in model.layers:
        buffer = optimizer.state[layers[0].weight]["buffer"]
        assert layers[0].weight.dtype == buffer.dtype == torch.float32

def test_the_teacher_is_frozen_and_not_saved_and_evaluation_scores_the_text():
    model, args = student(), settings()
    before = copy.deepcopy(model.teacher[0].state_dict())
    take_steps(model, PVOptimizer(model, args, "pv"), args, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.teacher[0].state_dict().items())
    assert not any("teacher" in k for k in model.state_dict())
    ids = tokens().train[:200]
    assert nanobit.train.evaluate(model, ids, 32) == nanobit.train.evaluate(model.student, ids, 32)

def test_the_student_is_evaluated_with_few_logits_at_a_time():
    """`evaluate` makes the student itself lean while it runs, and not only what wraps it."""
    model, seen = student(), []
    model.student.head.register_forward_hook(lambda *_: seen.append(model.student.lean))
    nanobit.train.evaluate(model, np.arange(129) % 64, 32)
    assert seen and all(seen) and not model.student.lean and not model.lean

def test_the_student_is_taught_by_the_divergence_from_its_teacher():
    """KL(teacher || student), which a student that is too sure of itself pays most for."""
    model, x = student(), torch.randint(64, (2, 16))
    model.teacher[0].head.weight.mul_(30)
    goal = model.teacher[0](x)[0].double().log_softmax(-1)
    own = model.student(x)[0].double().log_softmax(-1)
    loss = model(x, x)[1].item()
    forward = (goal.exp() * (goal - own)).sum(-1).mean().item()
    backward = (own.exp() * (own - goal)).sum(-1).mean().item()
    assert loss == pytest.approx(forward, rel=1e-4) and abs(forward / backward - 1) > 0.1

def test_a_student_is_taught_with_few_logits_of_both_at_a_time(monkeypatch):
    """The same loss and gradients from parts as from the formula over all tokens at once."""
    model, x = student(), torch.randint(64, (20, 31), generator=seeded())
    goal = model.teacher[0](x)[0].log_softmax(-1).detach()
    own = model.student(x)[0].log_softmax(-1)
    whole = (goal.exp() * (goal - own)).sum(-1).mean()
    whole.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(nanobit.distill, "LOGITS", 300 * 64)
    seen = []
    for m in (model.student, model.teacher[0]):
        m.head.register_forward_hook(lambda m, x, y: seen.append(y.shape[-2]))
    loss = model(x, x)[1]
    loss.backward()
    assert set(seen) == {300, 20} and sum(seen) >= 2 * 620
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-7)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-6)

def test_norms_embedding_and_head_learn_and_tied_ones_stay_tied():
    model, args = student(tied=True), settings()
    before = copy.deepcopy(model.state_dict())
    take_steps(model, PVOptimizer(model, args, "p"), args, 2)
    s = model.student
    assert s.head.weight is s.embed.weight
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())

def test_every_step_draws_other_numbers_that_follow_from_the_seed_and_the_step(monkeypatch):
    move, draws = pvtune.move_codes, []
    def spy(*args, generator, **how):
        draws.append(torch.rand(3, generator=generator).tolist())
        return move(*args, generator=generator, **how)
    monkeypatch.setattr(pvtune, "move_codes", spy)
    def run(seed):
        draws.clear()
        model, args = student(M=1), settings(seed=seed)
        take_steps(model, PVOptimizer(model, args, "stochastic"), args, 3)
        assert len(draws) == 3 * len(model.forms)
        return [tuple(d) for d in draws]
    first = run(0)
    assert run(0) == first and not set(run(1)) & set(first)
    assert len(set(first)) == len(first)               # of all stacks and steps

def test_changes_and_their_budget_are_counts_of_codes_and_ceilings_of_shares():
    """Each linear may change at least one of its groups: tau n, rounded up."""
    model, args = student(M=2), settings(tau=0.013, code_lr=3.0)
    optimizer, changed = PVOptimizer(model, args, "pv"), 0
    for t in range(4):
        before = [form.codes.clone() for form in model.forms]
        take_steps(model, optimizer, args, 1, t)
        for old, form in zip(before, model.forms):
            changed += (form.codes != old).any(-1).sum().item()
    n = [m.weight.numel() // 4 for m, _ in linears(model)]
    assert optimizer.changed() == changed > 0
    assert optimizer.allowed() == (sum(math.ceil(0.013 * k) for k in n), sum(n))
    assert PVOptimizer(model, args, "ste").allowed() == (sum(n), sum(n))

def test_same_seed_same_bits_other_seed_others():
    states = []
    for seed in (0, 0, 1):
        model, args = student(), settings(seed=seed)
        take_steps(model, PVOptimizer(model, args, "stochastic"), args, 3)
        states.append(torch.cat([form.codes.flatten() for form in model.forms]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])

def test_pv_changes_codes_within_its_budget_and_lowers_the_loss():
    model, args = student(M=1), settings(steps=40, code_lr=0.3, tau=0.02)
    optimizer = PVOptimizer(model, args, "pv")
    losses = take_steps(model, optimizer, args, 40)
    allowed, groups = optimizer.allowed()
    assert groups == sum(m.weight.numel() // 4 for m, _ in linears(model))
    assert 0 < optimizer.changed() <= 40 * allowed
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

# ---- D: the format ------------------------------------------------------------------------------

LLAMA = {"7B": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
         "13B": [(5120, 5120)] * 4 + [(13824, 5120)] * 2 + [(5120, 13824)],
         "70B": [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)],
         "3-8B": [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]}
PUBLISHED = {"7B": (2.294, 2.023, 2.006, 1.584, 1.231, 1.023, 1.004, 3.012),
             "13B": (2.188, 1.970, 2.004, 1.373, 1.125, 0.970, 1.003, 3.008),
             "70B": (2.070, 1.911, 2.002, 1.139, 1.008, 0.911, 1.002, 3.004),
             "3-8B": (2.272, 2.013, 2.005, 1.542, 1.210, 1.013, 1.004, 3.012)}

@pytest.mark.parametrize("name", LLAMA)
def test_bits_per_weight_are_the_published_ones(name):
    schemes = ("1x16g8", "1x15g8", "2x8g8", "1x16g16", "1x15g16", "1x14g16", "1x8g8", "1x12g4")
    shapes = LLAMA[name]
    weights = sum(O * C for O, C in shapes)
    got = [sum(O * C * vq_bits(O, C, *pvtune.parse_scheme(s)) for O, C in shapes) / weights
           for s in schemes]
    assert [round(x, 3) for x in got] == list(PUBLISHED[name])

def test_bits_of_one_matrix_and_of_the_tiny_blocks():
    assert round(vq_bits(4096, 4096, 1, 16, 8), 3) == 2.504
    assert round(vq_bits(4096, 4096, 2, 8, 8), 3) == 2.008
    blocks = {(128, 384): (2.17, 1.14, 2.18), (256, 688): (2.07, 1.06, 1.34),
              (384, 1024): (2.04, 1.04, 1.17), (512, 1376): (2.03, 1.03, 1.10)}
    for (d, f), expected in blocks.items():
        shapes = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]
        for (M, B, g), bpw in zip(((2, 4, 4), (1, 4, 4), (1, 8, 8)), expected):
            total = sum(O * C * vq_bits(O, C, M, B, g) for O, C in shapes)
            assert round(total / sum(O * C for O, C in shapes), 2) == bpw

@pytest.mark.parametrize("M,B,g", [(2, 4, 4), (1, 8, 8), (1, 10, 2), (1, 16, 1)])
def test_packed_layer_stores_exactly_the_counted_bits(M, B, g):
    codes, codebooks, scales, _ = layer(O=16, C=64, M=M, K=2**B, g=g, dtype=torch.float32)
    packed = QuantLinear.vq(codes, codebooks, scales)
    assert torch.equal(packed.weight(), vq_dequantize(codes, codebooks.half().float(),
                                                      scales.half().float()))
    x = torch.randn(3, 64, generator=seeded())
    dense = F.linear(x, vq_dequantize(codes, codebooks, scales))
    assert (packed(x) - dense).norm() < 2e-3 * dense.norm()
    assert abs(bits_per_weight(nn.Sequential(packed))[0] - vq_bits(16, 64, M, B, g)) < 1e-12

def test_changed_codes_change_the_weight():
    codes, codebooks, scales, _ = layer(dtype=torch.float32)
    form = one(codes, codebooks, scales)
    before = form.dequantize().detach()
    form.codes[0, 5] = (form.codes[0, 5] + 1) % 16
    assert (form.dequantize() != before).view(-1, 4).any(1).nonzero().flatten().tolist() == [5]

# ---- The script ---------------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RTN_BITS = {"pvtune-2x3g4": 2, "pvtune-affine-w2": 3}                    # closest to the fit

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a text, a small base and a token cache of its own."""
    path = tmp_path_factory.mktemp("pv")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(path))
        random_base(path, 2)
        yield path

def script(work, capsys, flags):
    """Run pvtune.py in this process -> (status, stdout, its row of results)."""
    flags += f" --model {work}/base.pt --out {work} --device cpu"
    status, out, _ = call(capsys, f"pvtune.py {flags}")
    return status, out, None if status else json.loads(out.strip().splitlines()[-1])

@pytest.mark.parametrize("flags,name,arms", [
    ("--scheme 2x3g4", "pvtune-2x3g4", ["P only", "STE", "PV"]),
    ("--scheme affine --bits 2 --group-size 16 --variant pv", "pvtune-affine-w2", ["PV"])])
def test_main_job_compares_packs_and_resumes(work, capsys, flags, name, arms):
    flags += " --steps 4 --batch-size 4 --seq-len 32 --code-lr 3"          # so that codes move
    _, out, row = script(work, capsys, flags)
    assert list(row["arms"]) == ["dense", "RTN", "as fitted", *arms]
    assert float(out.split("differs from live by ")[1].split()[0]) < 1e-3
    assert row["w_bits"] == (2 if "affine" in name else 2 * 3 / 4)
    scales = 2 * (4 * 32 + 3 * 32 + 2 * 16)            # rows: no group divides 48 inputs
    bits = RTN_BITS[name]
    assert row["arms"]["RTN"]["bpw"] == pytest.approx(bits + (16 + bits) * scales / 17408)
    n = [size // (1 if "affine" in name else 4) for size in 2 * (4 * [1024] + 3 * [1536])]
    may = {"STE": sum(n), "PV": sum(math.ceil(0.01 * k) for k in n)}       # change in one step
    for arm in arms[-2:]:                              # P only changes nothing
        changes = row["arms"][arm]["changed"] * sum(n)
        assert changes == pytest.approx(round(changes), abs=0.01) and changes > 1
        assert row["arms"][arm]["budget"] == pytest.approx(changes / (4 * may[arm]), abs=1e-3)
        if "P only" in arms:
            own = row["arms"][arm]["val_loss"] - row["arms"]["P only"]["val_loss"]
            assert row["arms"][arm]["minus_p"] == pytest.approx(own, abs=2e-6)
            assert f"{arm} {row['arms'][arm]['minus_p']:+.4f}" in out
    m, _ = nanobit.checkpoint.load_checkpoint(str(work / f"{name}.pt"))
    data = nanobit.data.load_data(str(work / "text.txt"), "300", 32)
    assert abs(nanobit.train.evaluate(m, data.val, 32)["loss"] - row["val_loss"]) < 1e-6
    assert bits_per_weight(m)[0] == pytest.approx(row["bpw"], abs=1e-6)
    assert "codes " in out and "trust " in out and "eta " in out
    whole = nanobit.checkpoint.read_checkpoint(str(work / f"{name}.pt"))["model"]
    _, out, again = script(work, capsys, flags + " --resume")
    assert "resumed" in out and again["arms"]["PV"]["val_loss"] == row["arms"]["PV"]["val_loss"]
    other = nanobit.checkpoint.read_checkpoint(str(work / f"{name}.pt"))["model"]
    assert all(torch.equal(whole[k], other[k]) for k in whole)

def test_three_arms_at_a_code_rate_of_their_own_are_the_default_of_a_grid_too(work, capsys):
    flags = "--scheme affine --bits 3 --group-size 16 --steps 5 --batch-size 2 --seq-len 32"
    _, out, row = script(work, capsys, flags)
    assert list(row["arms"])[3:] == ["P only", "STE", "PV"]
    assert 0 < row["code_lr"] < 10 and f"--code-lr {row['code_lr']:g} " in out
    _, out, again = script(work, capsys, flags + " --resume")
    assert out.count("resumed") == 3 and again["code_lr"] == row["code_lr"]
    _, _, half = script(work, capsys, flags + f" --code-lr {row['code_lr'] / 2}")
    assert half["code_lr"] == row["code_lr"] / 2

def test_an_interrupted_run_goes_on_bit_for_bit(work, capsys, monkeypatch):
    flags = "--scheme 1x4g4 --variant pv --steps 6 --batch-size 4 --seq-len 32 --code-lr 0.5"
    _, _, whole = script(work, capsys, flags)
    packed = nanobit.checkpoint.read_checkpoint(str(work / "pvtune-1x4g4.pt"))["model"]
    step = nanobit.train.train_step
    def interrupt(model, optimizer, data, args, i):
        if i == 3:
            nanobit.train.STOP.append(True)                    # as Ctrl-C does
        return step(model, optimizer, data, args, i)
    monkeypatch.setattr(nanobit.train, "train_step", interrupt)
    status, out, _ = script(work, capsys, flags)
    assert status == 130 and "--resume" in out
    monkeypatch.setattr(nanobit.train, "train_step", step)
    _, out, again = script(work, capsys, flags + " --resume")
    assert "at step 4/6" in out and again["val_loss"] == whole["val_loss"]
    assert again["arms"]["PV"]["changed"] == whole["arms"]["PV"]["changed"] > 0
    other = nanobit.checkpoint.read_checkpoint(str(work / "pvtune-1x4g4.pt"))["model"]
    assert all(torch.equal(packed[k], other[k]) for k in packed)

@pytest.mark.slow
def test_demo_prints_the_theory_in_a_process_of_its_own():
    out = subprocess.run([sys.executable, "pvtune.py", "--demo"], cwd=ROOT, text=True,
                         capture_output=True, check=True).stdout.splitlines()
    rows = {line.split("|")[0].strip(): line.split("|")[1].split() for line in out if "|" in line}
    rows = {name: [float(v) for v in values if v[0].isdigit()] for name, values in rows.items()}
    assert rows["naive, step 1/L"] == [8] * 10
    assert rows["subspace, tau 1"] == [8, 4.5, 2, 0.5] + [0] * 6
    assert all(set(rows[f"STE, lr {lr}"][:10]) == {8, 18} for lr in (0.02, 0.05, 0.1))
    for c in range(1, 7):
        exact, linear, subspace = (rows[f"c = {c}, {name}"] for name in ("exact", "linear",
                                                                        "subspace"))
        assert all(a >= b for curve in (exact, linear, subspace) for a, b in zip(curve, curve[1:]))
        assert exact[-1] <= min(linear[-1], subspace[-1]) + 1e-9

# ---- Bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,words", [
    ("--scheme 2x8", ["2x8", "MxBgG"]), ("--scheme 0x8g8", ["0x8g8"]),
    ("--scheme 1x17g8", ["2^17", "16 bits"]), ("--scheme 2x8g7", ["7", "256", "divide"]),
    ("--scheme 1x16g8", ["65536", "quarter", "8192"]), ("--tau 0", ["--tau 0", "(0, 1]"]),
    ("--tau 1.5", ["--tau 1.5"]), ("--tau nan", ["--tau nan"]), ("--bits 9", ["9", "1 to 8"]),
    ("--bits 2 --group-size 64", ["--group-size 64", "affine"]),
    ("--bits 3 --scheme 2x8g8", ["--bits 3", "2x8g8", "2 bits"]),
    ("--scheme affine --group-size 100", ["100", "256", "divide"]),
    ("--scheme affine --group-size 0", ["--group-size 0"]),
    ("--variant vp", ["vp"]), ("--rank best", ["best"]), ("--code-lr 0", ["--code-lr"]),
    ("--trust 0", ["--trust"])])
def test_bad_input_is_one_line(flags, words, tmp_path, monkeypatch, capsys):
    base = LLaMA(LlamaConfig(64, 1, 256, 4, 4, 768, 32))
    monkeypatch.setattr(pvtune, "load_base", lambda args: (base, None))
    check_refused(call(capsys, f"pvtune.py {flags} --device cpu --out {tmp_path}"), *words)

def test_a_packed_model_is_refused(work, tmp_path, capsys):
    m = LLaMA(LlamaConfig(300, 1, 32, 4, 4, 64, 32))
    m.replace_linears(lambda _, w: QuantLinear.affine(*rtn(w.weight.detach(), 2), 2))
    content = nanobit.checkpoint.read_checkpoint(str(work / "base.pt"))
    nanobit.checkpoint.save_checkpoint(str(tmp_path / "p.pt"), m, **{
        k: content[k] for k in ("tokenizer", "data", "method", "settings")})
    command = f"pvtune.py --model {tmp_path}/p.pt --out {tmp_path} --device cpu"
    check_refused(call(capsys, command), "is packed")

def test_schemes_follow_from_the_bits():
    for bits in (1, 2, 3):
        args = pvtune.parse_args(["--bits", str(bits), "--device", "cpu"])
        assert args.scheme == f"{bits}x4g4" and args.group_size == 4
    args = pvtune.parse_args(["--scheme", "affine", "--device", "cpu"])
    assert (args.bits, args.group_size) == (2, None)
    args = pvtune.parse_args("--bits 3 --scheme 3x8g8 --device cpu".split())   # the two agree
    assert (args.scheme, args.group_size) == ("3x8g8", 8)
