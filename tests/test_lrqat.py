"""LR-QAT against float64 closed forms, finite differences, brute force and byte counts.

The oracle `reference` writes the method's formula in plain float64; all else is compared with it,
with hand-made tables, or with what autograd and the allocator of storages really hold.
"""
import copy
import hashlib
import json
import math
import pathlib
import subprocess
import sys
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrqat
import model as trunk
import nanobit.checkpoint
import nanobit.data
import nanobit.runs
import nanobit.train
import quantizers
from conftest import TrainingTextOnly, call, check_refused, double, random_base
from lrqat import (ALPHA, ARMS, PHI, FullQATLinear, LRQATFunction, LRQATLinear, PlainLRQAT,
                   arm_optimizer, code_range, convert, downcast, integers, latent,
                   linear_schedule, start_grid, svd_start, to_grid, upcast)
from model import LlamaConfig, LLaMA, UsageError, quantized
from nanobit.checkpoint import tensor_bytes
from quantizers import EPS, QuantLinear, bits_per_weight, dequantize, rtn, unpack
from time_lrqat_memory import ledger, measure, random_model

def layer(O=6, C=256, bits=4, group_size=-1, rank=4, phi="fp32", svd=False, seed=0, moved=1.0):
    """An LRQATLinear of Gaussian weights in float64 whose A B already moved the latent weight."""
    torch.manual_seed(seed)
    w = torch.randn(O, C) * 0.02 * (1 + torch.arange(O).unsqueeze(1))
    m = LRQATLinear(w, *start_grid(w, bits, group_size), rank, phi, svd)
    m = m.double()
    m.codes = m.codes.float() if phi == "fp32" else m.codes.bfloat16() if phi == "bf16" else m.codes
    if not svd and rank:
        m.A.data.normal_().mul_(moved)
        m.B.data.normal_()
    return m

def spread(x, scale, C):
    """A scale or zero point (O, G) for every weight (O, C)."""
    return x.repeat_interleave(C // scale.size(1), dim=1)

def stored(m):
    """The numbers (O, C) that the codes of a layer stand for, in float64."""
    if m.phi == "packed":
        bytes_ = m.codes.int()
        return torch.stack((bytes_ % 16 - 8, bytes_ // 16 - 8), -1).flatten(1).double()
    return m.codes.double() / (2 ** (8 - m.bits) if m.phi == "fixed" else 1)

def reference(m):
    """Z, Q, M, s and z (O, C each) of the formula, in float64."""
    bits, up = m.bits, stored(m)
    A, B = m.A.detach().double(), m.B.detach().double()
    z = up + ALPHA / A.size(1) * A @ B
    low, high = code_range(bits)
    q, C = z.round().clamp(low, high), z.size(1)
    mask = (z.round() >= low) & (z.round() <= high)
    zero = torch.zeros_like(m.scale) if m.zero_point is None else m.zero_point.double()
    zero = spread(zero, m.scale, C)
    return z, q, mask.double(), spread(m.scale.detach().double(), m.scale, C), zero

def small_model(bits=4, phi="fixed", arm="lr-qat", seed=0, **flags):
    """(model, args, config) of a 2-layer LLaMA of random weights, as ARMS[arm] trains it."""
    torch.manual_seed(seed)
    flags = dict(bits=bits, phi=phi, rank=4, group_size=-1, init="zero", a_bits=16, kv_bits=16,
                 device="cpu", dtype="float32", seed=0, batch_size=4, accumulate=2, seq_len=32,
                 steps=3, lr=1e-2, compile=False, size="tiny", tied=False) | flags
    args = types.SimpleNamespace(**flags)
    c = LlamaConfig(64, 2, 32, 4, 2, 48, 32)
    m = LLaMA(c)
    grids = {n: start_grid(w.weight, bits, args.group_size) for n, w in m.linears()}
    return convert(m, ARMS[arm], args, grids), args, c

def memory_args(**flags):
    """The settings of a lean run of random weights."""
    return types.SimpleNamespace(**dict(
        bits=4, phi="packed", rank=32, group_size=-1, init="zero", lean=True, a_bits=16, kv_bits=16,
        arm=None, device="cpu", dtype="bfloat16", seed=0, tied=False, size="7B", batch_size=1,
        accumulate=1, seq_len=1024, steps=2, lr=1e-2, compile=False) | flags)

def tokens(n=4000, vocab=64):
    """A text to learn: a noisy walk over the ids."""
    rng = np.random.default_rng(0)
    return types.SimpleNamespace(train=(rng.integers(0, 3, n).cumsum() % vocab).astype(np.int64))

def take_steps(m, args, data, steps):
    optimizer, losses = arm_optimizer(m, args.lr), []
    for step in range(steps):
        losses.append(nanobit.train.train_step(m, optimizer, data, args, step)[0].item())
    return losses

# ---- The formula and its gradients --------------------------------------------------------------

@pytest.mark.parametrize("phi,bits", [
    (phi, bits) for phi in PHI for bits in range(2, PHI[phi].max_bits + 1)])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("svd", [False, True])
def test_the_small_layer_is_the_plain_one_forward_and_backward(phi, bits, group_size, svd):
    torch.manual_seed(0)
    O, C, rank = 12, 48, 4
    w = torch.randn(O, C) * torch.logspace(-2, 0, O).unsqueeze(1) + 0.01
    grid = start_grid(w, bits, group_size)
    small = LRQATLinear(w, *grid, rank=rank, phi=phi, svd=svd)

    # In "fixed" and without the SVD the plain layer freezes the weight itself, and starts with
    # A B = 0; its other starts are taken over from the codes.
    z = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    plain = PlainLRQAT(w, grid.scale, z, bits, rank)
    plain.Phi = plain.Phi.double()
    assert not plain.A.any() and plain.B.any() and (svd or not small.A.any()) and small.B.any()
    if phi != "fixed" or svd:
        plain.Phi = stored(small)
    assert torch.equal(plain.Phi, stored(small))
    plain, small = plain.double(), small.double()
    if phi in ("fp32", "bf16"):                        # double() is for what learns
        small.codes = small.codes.to(torch.float32 if phi == "fp32" else torch.bfloat16)

    # A and B as training might leave them: A B pushes some weights out of the range.
    push = 0.4 * 2**bits / ALPHA
    for ours, theirs in ((small.A, plain.A), (small.B, plain.B)):
        moved = ours.detach() + push ** 0.5 * torch.randn_like(ours)
        ours.data.copy_(moved)
        theirs.data.copy_(moved)
    _, _, inside, _, _ = reference(small)
    assert 0.005 < 1 - inside.mean() < 0.6

    x = torch.randn(3, 5, C, dtype=torch.float64)
    g = torch.randn(3, 5, O, dtype=torch.float64)
    found = []
    for layer in (small, plain):
        own = x.clone().requires_grad_()
        y = layer(own)
        y.backward(g)
        scale = layer.scale if layer is small else layer.s
        found.append((y, own.grad, layer.A.grad, layer.B.grad, scale.grad))
    for name, ours, theirs in zip(("y", "x", "A", "B", "s"), *found):
        assert ours.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)

@pytest.mark.parametrize("bits,phi,group_size", [
    (2, "fp32", -1), (2, "fixed", 64), (3, "fixed", 128), (3, "packed", -1), (4, "bf16", 64),
    (4, "packed", 128)])
def test_weight_is_scale_times_clipped_rounded_latent(bits, phi, group_size):
    m = layer(bits=bits, phi=phi, group_size=group_size)
    z, q, mask, s, zero = reference(m)
    assert 0.02 < 1 - mask.mean() < 0.98                                   # clips, and not all
    w_hat = m(torch.eye(256, dtype=torch.float64)).t()                     # each column by itself
    assert torch.equal(w_hat, s * (q - zero))
    low, high = code_range(bits)
    codes = (w_hat / s + zero).round()
    assert codes.min() >= low and codes.max() <= high and torch.equal(codes, q)

@pytest.mark.parametrize("bits,group_size", [(2, -1), (3, 64), (4, -1)])
def test_gradients_equal_the_closed_form(bits, group_size):
    m = layer(bits=bits, group_size=group_size, moved=0.02)
    x = torch.randn(3, 5, 256, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 6, dtype=torch.float64)
    m(x).backward(dy)
    z, q, mask, s, zero = reference(m)
    D = dy.flatten(0, 1).t() @ x.detach().flatten(0, 1)
    dz, c = s * D * mask, ALPHA / 4
    assert 0 < 1 - mask.mean() < 0.5
    expected = {"A": c * dz @ m.B.t(), "B": c * m.A.t() @ dz, "x": dy @ (s * (q - zero)),
                "scale": (D * (q - zero)).view(*m.scale.shape, -1).sum(-1)}
    for name, g in expected.items():
        got = x.grad if name == "x" else getattr(m, name).grad
        assert (got - g).abs().max() <= 1e-12 * max(1, g.abs().max()), name

def test_float32_gradients_are_close_to_float64():
    m = layer(moved=0.02)
    f = copy.deepcopy(m).float()
    x = torch.randn(7, 256, dtype=torch.float64)
    dy = torch.randn(7, 6, dtype=torch.float64)
    m(x).backward(dy), f(x.float()).backward(dy.float())
    for name in ("A", "B", "scale"):
        a, b = getattr(m, name).grad, getattr(f, name).grad.double()
        assert (a - b).norm() <= 1e-5 * a.norm(), name

def test_scale_gradient_is_the_true_derivative_and_not_lsqs():
    m = layer(moved=0.02)
    x, dy = torch.randn(7, 256).double(), torch.randn(7, 6).double()
    m(x).backward(dy)
    z, q, mask, s, _ = reference(m)
    lsq = ((dy.t() @ x) * (q - mask * z)).sum(1, keepdim=True)
    assert (m.scale.grad - lsq).abs().max() > 1e-3
    for i in range(6):
        with torch.no_grad():
            values = []
            for h in (1e-6, -2e-6):
                m.scale[i] += h
                values.append((m(x) * dy).sum().item())
            m.scale[i] += 1e-6
        assert math.isclose((values[0] - values[1]) / 2e-6, m.scale.grad[i].item(), rel_tol=1e-6,
                            abs_tol=1e-6)

def test_straight_through_surrogate_has_the_same_derivative():
    m = layer(moved=0.02)
    x, dy = torch.randn(7, 256).double(), torch.randn(7, 6).double()
    m(x).backward(dy)
    z0, q0, mask, s, zero = reference(m)
    def surrogate():
        z = latent(m.codes, m.A.detach(), m.B.detach(), m.bits, m.phi)
        return ((x @ (s * (q0 + mask * (z - z0) - zero)).t()) * dy).sum().item()
    for p, index in ((m.A, (1, 2)), (m.A, (5, 0)), (m.B, (0, 7)), (m.B, (3, 200))):
        values, true = [], []
        for h in (1e-5, -2e-5):
            p.data[index] += h
            values.append(surrogate())
            true.append(m(x).sum().item())
        p.data[index] += 1e-5
        assert math.isclose((values[0] - values[1]) / 2e-5, p.grad[index].item(), rel_tol=1e-7)
    assert true[0] == true[1]                                              # really a staircase

@pytest.mark.parametrize("phi", tuple(PHI))
def test_step_zero_is_rtn_of_phi_and_only_the_zero_factor_learns(phi):
    torch.manual_seed(0)
    w = torch.randn(6, 64)
    m = LRQATLinear(w, *start_grid(w, 4, -1), 4, phi)
    x = torch.randn(5, 64)
    q = upcast(m.codes, 4, phi).round().clamp(-8, 7)
    y = m(x)
    torch.testing.assert_close(y, F.linear(x, dequantize(q, m.scale, None)))
    y.square().sum().backward()
    assert m.B.grad.abs().max() == 0 < m.A.grad.abs().max()

def test_output_is_linear_in_scale_and_codes_do_not_depend_on_it():
    m = layer(phi="fixed")
    x, codes = torch.randn(5, 256).double(), m.merge()[0]
    y = m(x)
    with torch.no_grad():
        m.scale.mul_(2)
        assert torch.equal(m(x), 2 * y)
        m.scale.mul_(0.65)
    assert torch.equal(m.merge()[0], codes)

def test_mask_is_of_the_rounded_latent():
    values = torch.tensor([[-8.6, -8.5, -8.4, 7.4, 7.5, 7.6, 7.3, -9.0]])
    A, B, scale = torch.zeros(1, 1), torch.ones(1, 8), torch.ones(1, 1)
    A.requires_grad_(), scale.requires_grad_()
    passed = []
    for j in range(8):                                 # one input at a time: dA is that column's M
        y = LRQATFunction.apply(torch.eye(8)[j:j + 1], values, A, B, scale, None, 4, "fp32", -1)
        passed.append(torch.autograd.grad(y.sum(), A)[0].item() / ALPHA)
    assert passed == [0, 1, 1, 1, 0, 0, 1, 0]

def test_mask_follows_the_adapter_not_phi_alone():
    values, B, scale = torch.tensor([[6.0, 6.0]]), torch.eye(2)[:1], torch.ones(1, 1)
    A = torch.tensor([[3.0 / ALPHA]], requires_grad=True)                  # pushes column 0 to 9
    LRQATFunction.apply(torch.ones(1, 2), values, A, B, scale, None, 4, "fp32", -1).sum().backward()
    assert A.grad.item() == 0

# ---- phi ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_fixed_point_round_trip(bits):
    low, high = code_range(bits)
    z = torch.linspace(low - 3, high + 3, 100_001).view(1, -1)
    codes = downcast(z, bits, "fixed")
    up = upcast(codes, bits, "fixed")
    assert (up - z.clamp(low, high)).abs().max() <= 2.0 ** -(9 - bits)
    assert codes.min() == -128 and codes.max() == 2 ** (8 - bits) * high
    assert (up.diff() >= 0).all()
    every = torch.arange(-128, 2 ** (8 - bits) * high + 1).to(torch.int8).view(1, -1)
    assert torch.equal(downcast(upcast(every, bits, "fixed"), bits, "fixed"), every)
    assert torch.equal(upcast(every, bits, "fixed").bfloat16().float(),
                       upcast(every, bits, "fixed"))                       # exact in bfloat16

def test_round_takes_ties_to_even():
    z = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    assert integers(z, None, None, 4, "fp32").tolist() == [[-2, -2, 0, 0, 2, 2]]
    assert downcast(z / 16, 4, "fixed").tolist() == [[-2, -2, 0, 0, 2, 2]]

@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fixed_point_moves_few_integers_and_float32_none(bits):
    low, high = code_range(bits)
    torch.manual_seed(0)
    z = torch.rand(100, 1000) * (high - low + 1) + low - 0.5
    rtn = z.round().clamp(low, high)
    assert torch.equal(integers(downcast(z, bits, "fp32"), None, None, bits, "fp32"), rtn)
    off = integers(downcast(z, bits, "fixed"), None, None, bits, "fixed") - rtn
    share, expected = (off != 0).float().mean().item(), 2.0 ** -(9 - bits)
    assert off.abs().max() <= 1
    assert 0 < share <= expected + 3 * math.sqrt(expected / z.numel())

def test_packing_is_lossless_on_every_byte():
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    up = upcast(every, 4, "packed")                                        # (1, 512)
    assert up.min() == -8 and up.max() == 7
    assert torch.equal(downcast(up, 4, "packed"), every)
    assert downcast(torch.tensor([[-8.0, 7.0]]), 4, "packed").tolist() == [[0xF0]]
    assert downcast(torch.zeros(6, 10), 3, "packed").shape == (6, 5)

def test_packed_integers_plus_a_half_round_the_sum():
    codes = downcast(torch.tensor([[1.0, 2.0]]), 4, "packed")              # 1.5 -> 2, 2.5 -> 2
    A, B = torch.tensor([[0.5 / ALPHA]]), torch.ones(1, 2)
    assert integers(codes, A, B, 4, "packed").tolist() == [[2, 2]]

def test_latent_sum_is_float32():
    one = torch.tensor([[7.25]])                       # bfloat16 would lose the 0.01
    for codes in (one, one.bfloat16()):
        z = latent(codes, torch.tensor([[0.01 / ALPHA]]), torch.ones(1, 1), 4, "bf16")
        assert z.dtype == torch.float32 and z.item() > 7.255

# ---- Bytes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("phi,width", [(p, s.bytes_per_weight) for p, s in PHI.items()])
def test_persistent_bytes_are_exact(phi, width):
    O, C, r = 48, 64, 4
    w = torch.randn(O, C)
    m = LRQATLinear(w, *start_grid(w, 4, -1), r, phi)
    held = tensor_bytes([*m.parameters(), *m.buffers()])
    assert held == O * C * width + 4 * r * (O + C) + 4 * O
    everything = [*m.__dict__.values(), *m._parameters.values(), *m._buffers.values()]
    dense = [t for t in everything if isinstance(t, torch.Tensor) and t.numel() >= O * C]
    assert [t.dtype for t in dense] == ([] if phi == "packed" else [m.codes.dtype])
    if phi == "packed":
        assert m.codes.shape == (O, C // 2)

def naive(m, x, dtype):
    """The same layer as plain autograd writes it; dtype: of the chain that builds the weight."""
    z = upcast(m.codes, m.bits, m.phi).to(dtype)
    z = z + ALPHA / 4 * m.A.to(dtype) @ m.B.to(dtype)
    q = (z + (z.round() - z).detach()).clamp(*code_range(4))
    return F.linear(x, (q * m.scale.to(dtype)).to(x.dtype))

def dense_bytes(f, m, O, C):
    """Bytes a weight of dense tensors (O C elements or more) that autograd saves in f()."""
    kept, own = [], [*m.parameters(), *m.buffers()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f()
    dense = [t for t in kept if t.numel() >= O * C]
    return (tensor_bytes(dense + own) - tensor_bytes(own)) / (O * C), kept

def test_nothing_dense_is_saved_where_plain_autograd_saves_6_to_10_bytes_a_weight():
    O, C = 96, 64
    w = torch.randn(O, C)
    m = LRQATLinear(w, *start_grid(w, 4, -1), 4, "fixed")
    x = torch.randn(8, C, dtype=torch.bfloat16, requires_grad=True)
    assert dense_bytes(lambda: naive(m, x, torch.bfloat16), m, O, C)[0] == 6
    assert dense_bytes(lambda: naive(m, x, torch.float32), m, O, C)[0] == 10
    saved, kept = dense_bytes(lambda: m(x), m, O, C)
    assert saved == 0
    assert sum(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept) == 1

def test_phi_bytes_of_llama_7b():
    c = trunk.PRESETS["7B"].config(32000)
    with torch.device("meta"):
        linears = [m.weight.shape for _, m in LLaMA(c).linears()]
    assert sum(O * C for O, C in linears) == 6_476_005_376
    assert sum(32 * (O + C) for O, C in linears) == 79_953_920             # A and B at rank 32
    args = memory_args()
    predicted = ledger(c, args)
    assert predicted["frozen weights"] == 6_476_005_376 // 2 + 2 * 32000 * 4096 * 2 + 65 * 4096 * 2
    assert sum(predicted.values()) < 7.5 * 2**30

class Meter(TorchDispatchMode):
    """Bytes of all live storages that operations made, and their peak: a CPU's allocator meter."""

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def free(self, key, size):
        self.seen.discard(key)
        self.live -= size

@pytest.mark.parametrize("bits,phi,dtype,micro", [
    (4, "packed", "bfloat16", 1), (2, "fixed", "bfloat16", 1), (4, "fixed", "bfloat16", 4),
    (4, "bf16", "float32", 2)])
def test_ledger_predicts_every_component_within_ten_percent(bits, phi, dtype, micro):
    if dtype == "bfloat16" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch's attention in bfloat16 goes by the processor, not by what "
                    "ATEN_CPU_CAPABILITY leaves of it, and raises")
    c = LlamaConfig(512, 2, 256, 4, 4, 704, 128)
    args = memory_args(bits=bits, phi=phi, rank=8, dtype=dtype, batch_size=2 * micro, accumulate=2,
                       seq_len=128)
    m = random_model("lr-qat", c, args)
    found, expected = measure(m, args, tokens(vocab=512), report=True), ledger(c, args)
    for name in ("frozen weights", "adapters", "gradients", "optimizer", "activations"):
        assert abs(found[name] / expected[name] - 1) < 0.1, name
    for p in m.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    x = torch.randint(0, 512, (micro, 129))
    x, y = x[:, :-1], x[:, 1:]
    grads = [p.grad for p in m.parameters() if p.requires_grad]
    meter = Meter([*m.parameters(), *m.buffers(), *grads, x])
    with meter:
        m(x, y)[1].backward()
    assert abs((meter.peak - expected["activations"]) / expected["temporaries"] - 1) < 0.1

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's allocator")
def test_gpu_peak_is_within_ten_percent_of_the_ledger():
    args = memory_args(device="cuda", batch_size=2, accumulate=2)
    c = LlamaConfig(32000, 4, 4096, 32, 32, 11008, 1024)
    found = measure(random_model("lr-qat", c, args), args, tokens(vocab=32000), report=True)
    for name, size in ledger(c, args).items():
        assert abs(found[name] / size - 1) < 0.1, name

# ---- Block checkpointing, merging ---------------------------------------------------------------

@pytest.mark.parametrize("a_bits", [16, 8])
def test_lean_gradients_are_the_same(a_bits, in_float64):
    m, args, _ = small_model(a_bits=a_bits, kv_bits=a_bits)
    for p in m.parameters():
        if p.requires_grad and p.dim() == 2:
            p.data.normal_().mul_(0.05)
    double(m)
    x = torch.randint(0, 64, (2, 33))
    grads = []
    for lean in (False, True):
        m.lean = lean
        m(x[:, :-1], x[:, 1:])[1].backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.requires_grad])
        m.zero_grad()
    assert len(grads[0]) == 42 and min(g.abs().max() for g in grads[0]) > 0
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

def test_lean_loss_of_several_chunks_is_the_mean_over_all_tokens():
    """Of 384 tokens, 256 at a time, in float64 here; without gradients too."""
    m, _, _ = small_model()
    x = torch.randint(0, 64, (12, 33))
    logits = m(x[:, :-1])[0]
    want = -torch.log_softmax(logits.double(), -1).gather(-1, x[:, 1:, None]).mean()
    learn = [p for p in m.parameters() if p.requires_grad]
    expected = torch.autograd.grad(want, learn)
    m.lean = True
    loss = m(x[:, :-1], x[:, 1:])[1]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for got, g in zip(torch.autograd.grad(loss, learn), expected):
        assert (got - g).norm() <= 1e-4 * g.norm()
    with torch.no_grad():
        assert m(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(want.item(), rel=1e-5)

@pytest.mark.parametrize("bits,phi,a_bits", [(2, "fixed", 16), (3, "packed", 16), (4, "bf16", 8)])
def test_merged_checkpoint_has_the_integers_and_logits_of_training(bits, phi, a_bits, tmp_path):
    m, args, _ = small_model(bits, phi, a_bits=a_bits, kv_bits=a_bits)
    take_steps(m, args, tokens(), 4)
    m.eval()
    for _, linear in m.linears():
        linear.round_scale()                           # as after the last step of a run
    x = torch.randint(0, 64, (2, 32))
    y = m(x)[0]
    trained = {n: reference_integers(linear) for n, linear in m.linears()}
    m.replace_linears(lambda _, linear: QuantLinear.affine(*linear.merge(), bits))
    path = str(tmp_path / "merged.pt")
    nanobit.checkpoint.save_checkpoint(path, m, tokenizer=["a"], method="lrqat")
    loaded, content = nanobit.checkpoint.load_checkpoint(path)
    differ = 0
    for n, linear in loaded.linears():
        q = unpack(linear.packed, bits, linear.spec["in_features"], linear.spec["signed"]).int()
        differ += (q != trained[n]).sum().item()
    assert differ == 0
    # an activation of 8 bits that falls on the other side of a border costs 4e-4
    assert (loaded(x)[0] - y).norm() < (1e-6 if a_bits == 16 else 2e-3) * y.norm()
    assert not [k for k in content["model"] if k.rsplit(".", 1)[1] in ("A", "B", "codes")]
    rtn = small_model(bits, "fp32", arm="rtn", seed=1)[0]
    rtn.replace_linears(lambda _, linear: QuantLinear.affine(*linear.merge(), bits))
    size = lambda m: tensor_bytes(t for _, linear in m.linears() for t in linear.buffers())
    assert size(loaded) == size(rtn)

def reference_integers(m):
    """What the forward pass multiplies with, recovered from its output on the identity."""
    eye = torch.eye(m.B.size(1))
    w = m(eye).t()                                                         # (O, C)
    zero = 0 if m.zero_point is None else m.zero_point
    q = (w / m.scale.detach() + zero).round().int()
    return q if m.zero_point is None else q - code_range(m.bits)[0]

def test_merge_saturates():
    A = torch.tensor([[200.0 / ALPHA], [-140.0 / ALPHA]])
    m = LRQATLinear(torch.ones(2, 8) * 0.01, torch.ones(2, 1), None, 4, -1, 1, "fixed")
    m.A.data, m.B.data = A, torch.ones(1, 8)
    q, _, _ = m.merge()
    assert q.dtype == torch.int8 and (q[0] == 7).all() and (q[1] == -8).all()

def test_merge_is_idempotent_and_free_of_the_adapters():
    m = layer(phi="fixed").float()
    first, packed = m.merge(), QuantLinear.affine(*m.merge(), 4)
    x = torch.randn(3, 256)
    y = packed(x)
    assert torch.equal(first[0], m.merge()[0])
    torch.testing.assert_close(y, m(x))
    m.A.data.zero_()
    assert torch.equal(packed(x), y) and not torch.equal(m(x), y)
    w = dequantize(*first)
    again = LRQATLinear(w, first[1], None, 4, -1, 4, "packed")             # once more
    assert torch.equal(again.merge()[0], first[0])

# ---- Ranges, other starts, other arms -----------------------------------------------------------

@pytest.mark.parametrize("bits,group_size", [(2, -1), (3, -1), (4, 16)])
def test_range_search_equals_brute_force(bits, group_size):
    torch.manual_seed(0)
    w = torch.randn(5, 32) * torch.logspace(-2, 1, 5).unsqueeze(1)
    scale, zero_point, _, _ = start_grid(w, bits, group_size)
    low, high = code_range(bits)
    rows = w.reshape(-1, 32 if group_size == -1 else group_size).double()
    for i, row in enumerate(rows):
        a, b = (min(row.min(), 0), max(row.max(), 0)) if bits == 2 else (0, 2 * row.abs().max())
        full = (b - a) / (2**bits - 1)
        zero = round(low - (a / full).item()) if bits == 2 else 0
        def loss(s):
            q = (row / s).round() + zero
            return ((q.clamp(low, high) - zero) * s - row).abs().pow(2.4).sum()
        steps = torch.stack([full * (1 - j / 100) for j in range(80)])
        losses = torch.stack([loss(s) for s in steps])
        best = steps[losses <= losses.min() * (1 + 1e-5)]
        s = scale.flatten()[i].double()
        assert ((s / best - 1).abs() <= 2**-11).any() and s.half() == s    # rounded to float16
        assert zero_point is None or zero_point.flatten()[i] == zero

def test_range_is_per_row_and_positive(in_float64):
    torch.manual_seed(0)
    w = torch.randn(8, 512).double()
    alone = torch.cat([start_grid(row[None], 3, -1).scale for row in w])
    torch.testing.assert_close(start_grid(w, 3, -1).scale, alone)
    assert start_grid(torch.zeros(2, 8), 4, -1).scale.min() > 0           # a row of zeros
    assert start_grid(w, 3, -1, search=False).scale.min() >= start_grid(w, 3, -1).scale.min()

def test_asymmetric_two_bit_grid_keeps_zero_and_uses_four_codes():
    w = torch.linspace(-0.1, 0.9, 64).repeat(2, 1)
    m = LRQATLinear(w, *start_grid(w, 2, -1), 4, "fixed")
    q, scale, zero_point = m.merge()
    assert q.dtype == torch.uint8 and set(q.flatten().tolist()) == {0, 1, 2, 3}
    assert zero_point.dtype == torch.uint8 and zero_point.max() <= 3
    symmetric = torch.stack([((w / s).round().clamp(-2, 1) * s - w).square().mean()
                             for s in torch.linspace(0.01, 1, 100)]).min()
    assert (dequantize(q, scale, zero_point) - w).square().mean() < symmetric

def test_full_rank_sgd_step_is_the_projected_qat_step():
    m = layer(6, 8, rank=6, moved=0.05)
    m.A.data.copy_(torch.eye(6) * 6 / ALPHA)           # alpha/r A B = B: B is C itself
    m.B.data.normal_().mul_(0.3)
    x, dy, lr = torch.randn(9, 8).double(), torch.randn(9, 6).double(), 0.1
    m(x).backward(dy)
    _, _, mask, s, _ = reference(m)
    before = latent(m.codes, m.A.detach(), m.B.detach(), m.bits, m.phi)
    m.B.data.sub_(lr * m.B.grad)
    moved = latent(m.codes, m.A.detach(), m.B.detach(), m.bits, m.phi) - before
    assert (moved + lr * s * (dy.t() @ x) * mask).abs().max() < 1e-12

@pytest.mark.parametrize("bits,group_size", [(2, 16), (3, 16), (4, -1)])
@pytest.mark.parametrize("kind", ["LR-QAT", "full QAT"])
@pytest.mark.parametrize("usual", [False, True])
def test_the_packed_layer_multiplies_as_the_trained_one_did(kind, bits, group_size, usual):
    """Also where training brought a scale to zero or below: there it is EPS in both. Else the file
    holds float16, and so does the trained layer once it is rounded."""
    torch.manual_seed(0)
    w = torch.randn(8, 32) + 0.5                       # so that 2 bits have other zero points
    grid = start_grid(w, bits, group_size)
    m = FullQATLinear(w, *grid) if kind == "full QAT" else LRQATLinear(w, *grid, 4, "fp32")
    with torch.no_grad():
        m.scale.mul_(0.8)
        if usual:
            m.scale.mul_(1.0003)                       # no number of float16
        else:
            m.scale[2], m.scale[5] = 0.0, -0.3
        if kind == "LR-QAT":
            m.A.normal_().mul_(0.02)
        else:
            m.weight.add_(0.1 * torch.randn(8, 32))
    before = m.positive_scale
    m.round_scale()
    trained = m(torch.eye(32)).t()                                         # W_hat (O, C)
    layer = QuantLinear.affine(*m.merge(), bits, group_size)
    assert (layer.weight() - trained).abs().max() < 1e-5
    if usual:
        assert layer.scale.dtype == torch.float16 and torch.equal(layer.scale, before.half())
        return
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, before)
    assert max(trained[2].abs().max(), trained[5].abs().max()) <= 2**bits * EPS
    assert trained[[0, 1, 3, 4]].abs().max() > 0.5

@pytest.mark.parametrize("arm", ["dense", "longer"])
def test_dense_arms_are_the_base_without_a_grid_on_activations(arm):
    x = torch.randint(0, 64, (2, 16))
    torch.manual_seed(0)                               # as in small_model
    base = LLaMA(LlamaConfig(64, 2, 32, 4, 2, 48, 32))
    def logits(arm, bits):                             # bits of the activations
        return small_model(arm=arm, a_bits=bits, kv_bits=bits)[0](x)[0]
    assert (logits(arm, 3) - base(x)[0]).abs().max() < 1e-6
    assert (logits("rtn", 3) - logits("rtn", 16)).abs().max() > 1e-3

@pytest.mark.parametrize("O,C", [(24, 24), (16, 40), (40, 16)])
def test_svd_start_is_the_best_copy_of_the_rounding_error(O, C):
    torch.manual_seed(0)
    w = (torch.randn(O, C) * torch.logspace(-2, 0, O).unsqueeze(1)).double()
    scale = start_grid(w, 3, -1).scale
    scale = scale.double()
    v = to_grid(w, scale, None)
    A, B = svd_start(v, scale, 5, 3)
    error = w - scale * v.round().clamp(-4, 3)
    U, S, V = torch.linalg.svd(error)
    best = U[:, :5] * S[:5] @ V[:5]
    assert (scale * (ALPHA / 5) * A @ B - best).norm() <= 1e-6 * best.norm()
    assert scale.max() > 10 * scale.min()              # not the scale of a tensor

def test_svd_start_leaves_the_latent_weight_where_it_was():
    torch.manual_seed(0)
    w = torch.randn(16, 32)
    scale, zero_point, _, _ = start_grid(w, 2, 16)
    m = LRQATLinear(w, scale, zero_point, 2, 16, 4, "fp32", svd=True)
    z = latent(m.codes, m.A, m.B, 2, "fp32")
    assert m.A.abs().max() > 0 and (z - to_grid(w, scale, zero_point)).abs().max() < 1e-5

def test_full_qat_has_lsqs_gradients():
    torch.manual_seed(0)
    w = torch.randn(6, 64).double()
    m = FullQATLinear(w, start_grid(w, 3, -1).scale.double() * 0.7, None, 3, -1)
    x, dy = torch.randn(9, 64).double(), torch.randn(9, 6).double()
    m(x).backward(dy)
    D, z = dy.t() @ x, w / m.scale.detach()
    q, mask = z.round().clamp(-4, 3), (z.round() == z.round().clamp(-4, 3)).double()
    assert 0 < 1 - mask.mean() < 0.3
    assert (m.weight.grad - D * mask).abs().max() < 1e-12
    assert (m.scale.grad - (D * (q - mask * z)).sum(1, keepdim=True)).abs().max() < 1e-11

@pytest.mark.parametrize("bits", [2, 3])
def test_gptqs_row_has_the_bits_of_the_grid_that_the_other_arms_have(bits):
    """A scale of 16 bits a row, and at 2 bits a zero point of as many as a code."""
    m, args, _ = small_model(arm="gptq", bits=bits)
    sizes = [linear.weight.shape for _, linear in m.linears()]
    lrqat.gptq_model(m, TrainingTextOnly(tokens().train), args)
    extra = 16 + bits * (bits == 2)
    stored = sum(O * C * bits + O * extra for O, C in sizes)
    weights = sum(O * C for O, C in sizes)
    assert bits_per_weight(m) == (pytest.approx(stored / weights), weights)
    ours = small_model(bits=bits)[0]
    ours.replace_linears(lambda _, linear: QuantLinear.affine(*linear.merge(), bits))
    assert bits_per_weight(ours)[0] == pytest.approx(stored / weights)

def test_hessians_are_of_all_windows_behind_the_blocks_that_are_quantized_already():
    """Up to a unit: 64 windows of the training text, run here one by one, summed in float64."""
    m, args, _ = small_model(arm="gptq", seed=5, seq_len=16)
    idx, blocks = nanobit.data.batch(tokens().train, 0, 64, 16, args.seed, "cpu")[0], 0
    assert len(idx) == 64
    def second_moment(linear):
        seen = []
        hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        for window in idx:
            m(window[None])
        hook.remove()
        return sum(x.double().t() @ x.double() for x in seen)
    for block in quantizers.block_hessians(m, idx):
        for name, linear, h in block:
            want = second_moment(linear)
            error = h.double() / h.double().trace() - want / want.trace()
            assert error.abs().max() < 1e-5 * (want / want.trace()).abs().max(), name
        for name, linear, _ in block:                  # so coarse that the next block sees it
            codes = rtn(linear.weight, 1)
            m.set_submodule(name, QuantLinear.affine(*codes, 1))
        blocks += 1
    assert blocks == 2

@pytest.mark.parametrize("phi", ["fixed", "packed", "bf16"])
@pytest.mark.parametrize("arm", ["rtn", "scales"])
def test_arms_without_adapters_round_the_float_weight_whatever_phi_is(arm, phi):
    """Not what phi keeps of it, which rounds other integers (fixed: some 2^-6 of them)."""
    m, args, _ = small_model(bits=3, phi=phi, arm=arm)
    torch.manual_seed(0)                               # as in small_model
    dense, differ, total = LLaMA(LlamaConfig(64, 2, 32, 4, 2, 48, 32)), 0, 0
    for (_, linear), (_, base) in zip(m.linears(), dense.linears()):
        want = rtn(base.weight.detach(), 3, symmetric=True, mse=True)[0]
        differ += (linear.merge()[0] != want).sum().item()
        total += want.numel()
    assert differ <= total / 10_000                    # a tie may fall to either side

def test_scales_only_arm_keeps_rtns_integers():
    m, args, _ = small_model(arm="scales", bits=3)
    before = [linear.merge()[0] for _, linear in m.linears()]
    take_steps(m, args, tokens(), 3)
    assert all(torch.equal(a, linear.merge()[0]) for a, (_, linear) in zip(before, m.linears()))
    rtn = small_model(arm="rtn", bits=3)[0]
    assert all(torch.equal(a, linear.merge()[0]) for a, (_, linear) in zip(before, rtn.linears()))
    assert not any(p.requires_grad for p in rtn.parameters())

# ---- Training -----------------------------------------------------------------------------------

def test_only_adapters_and_scales_learn_and_the_codes_never_change():
    m, args, _ = small_model()
    digest = lambda: hashlib.sha256(b"".join(
        t.detach().numpy().tobytes() for n, t in sorted(m.state_dict().items())
        if n.rsplit(".", 1)[1] not in ("A", "B", "scale"))).hexdigest()
    frozen = digest()
    learn = {n: p for n, p in m.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in learn} == {"A", "B", "scale"}
    before = [p.detach().clone() for p in learn.values()]
    take_steps(m, args, tokens(), 3)
    assert digest() == frozen
    assert all(not torch.equal(a, p) for a, p in zip(before, learn.values()))
    assert not any(p.grad is not None for p in m.parameters() if not p.requires_grad)

def test_frozen_scales_stay():
    m, args, _ = small_model(arm="frozen")
    before = [linear.scale.clone() for _, linear in m.linears()]
    take_steps(m, args, tokens(), 3)
    assert all(torch.equal(a, linear.scale) for a, (_, linear) in zip(before, m.linears()))

def test_optimizer_has_two_rates_and_no_decay():
    m, args, _ = small_model()
    groups = arm_optimizer(m, 1e-2).param_groups
    count = {g["peak"]: sum(p.numel() for p in g["params"]) for g in groups}
    shapes = [(linear.scale.size(0), linear.B.size(1)) for _, linear in m.linears()]
    assert all(g["weight_decay"] == 0 for g in groups)
    assert len(set(count)) == 2
    assert sum(p.numel() for g in groups if g["peak"] == 1e-2 for p in g["params"]) == sum(
        4 * (O + C) for O, C in shapes)
    assert count[lrqat.RATES["scale"] * 1e-2] == sum(O for O, _ in shapes)
    full = arm_optimizer(small_model(arm="full")[0], 1e-2).param_groups
    assert sorted(g["weight_decay"] for g in full) == [0, 0.1]

@pytest.mark.parametrize("size", [0.02, 0.2])
def test_the_weights_rate_is_in_proportion_to_their_root_mean_square(size):
    """Over all of them, and of full QAT and the dense control alike."""
    m = torch.nn.Module()
    m.a, m.b = torch.nn.Module(), torch.nn.Module()
    m.a.weight = torch.nn.Parameter(torch.full((3, 5), size))
    m.b.weight = torch.nn.Parameter(torch.full((30,), -2 * size))
    [group] = arm_optimizer(m, 1e-2).param_groups
    assert group["peak"] == pytest.approx(0.5e-2 * size * 3 ** 0.5)    # (15 + 4 * 30) / 45 = 3
    assert group["params"] == [m.a.weight, m.b.weight] and group["weight_decay"] == 0.1
    for arm in ("full", "longer"):
        model, _, _ = small_model(arm=arm)
        [peak] = {g["peak"] for g in arm_optimizer(model, 1e-2).param_groups if g["weight_decay"]}
        weights = torch.cat([linear.weight.detach().flatten() for _, linear in model.linears()])
        assert peak == pytest.approx(0.5e-2 * weights.square().mean().sqrt().item(), rel=1e-5)

def test_progress_counts_the_integers_that_the_adapters_moved():
    """Of the whole model's: none at first, then those of rows that A B pushes up by one step."""
    m, _, _ = small_model(phi="fp32")
    assert lrqat.flipped(m) == 0 and lrqat.status(m) == " flipped 0.00% |"
    linear = m.blocks[0].mlp.w_down                           # 32 x 48
    before = linear.merge()[0]
    with torch.no_grad():
        linear.A[:3] = 4 / ALPHA / 4                   # rank 4: alpha/r A B = 1
        linear.B.fill_(1.0)
    pushed = (before[:3] < code_range(4)[1]).sum().item()  # the others are clipped already
    total = sum(w.codes.numel() for _, w in m.linears())
    # Of a pair of ties, -1/2 and 1/2, both become 0: that one is pushed and does not move.
    assert pushed > 100 and abs(lrqat.flipped(m) * total - pushed) < 3

def test_schedule_is_linear_up_and_down():
    assert [linear_schedule(t, 1000, 1.0) for t in (0, 50, 100, 1000)] == [0, 0.5, 1, 0]
    assert math.isclose(linear_schedule(500, 1000, 1.0), 5 / 9)
    m, args, _ = small_model()
    optimizer = arm_optimizer(m, 1e-2)
    nanobit.train.train_step(m, optimizer, tokens(), args, 1)     # steps = 3: the peak
    assert [g["lr"] for g in optimizer.param_groups] == [g["peak"] for g in optimizer.param_groups]

def test_same_seed_same_bits():
    states = []
    for _ in range(2):
        m, args, _ = small_model(bits=2)
        take_steps(m, args, tokens(), 3)
        states.append(m.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])

def test_training_at_two_bits_lowers_the_loss_by_moving_integers():
    m, args, _ = small_model(bits=2, steps=60)
    data = tokens()
    x = torch.from_numpy(data.train[:33 * 16].reshape(16, 33))
    before = m(x[:, :-1], x[:, 1:])[1].item()
    start = [linear.merge()[0] for _, linear in m.linears()]
    take_steps(m, args, data, 60)
    assert m(x[:, :-1], x[:, 1:])[1].item() < before - 0.05
    assert all((a != linear.merge()[0]).any() for a, (_, linear) in zip(start, m.linears()))

def test_gradients_reach_the_first_block_although_the_embedding_is_frozen():
    m, _, _ = small_model()
    m.lean = True
    x = torch.randint(0, 64, (2, 33))
    m(x[:, :-1], x[:, 1:])[1].backward()
    assert all(linear.A.grad.abs().max() > 0 for _, linear in m.linears())

# ---- Activations --------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [4, 8])
def test_activation_grid_is_per_token_with_an_integer_zero_point(bits):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 64) * torch.logspace(-3, 2, 7).view(1, 7, 1) + 0.5
    x[0, 0], x[0, 1] = 0.3, 0                          # a constant token, a token of zeros
    y = quantized(x, bits)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    assert torch.isfinite(y).all() and (y[0, 1] == 0).all()
    assert ((y - x).abs() <= scale * 1.0001).all()
    assert (y[0, 0] - 0.3).abs().max() < 1e-6
    q = (y / scale.clamp(min=1e-8)).double()
    assert (q - q.round()).abs().max() < 1e-3          # integers, so that 0 is on the grid
    assert (q.round().amax(-1) - q.round().amin(-1)).max() <= 2**bits - 1
    for i in range(7):                                 # the token alone gives the same
        assert torch.equal(quantized(x[1, i], bits), y[1, i])

def test_activation_grid_is_straight_through_and_absent_at_16_bits():
    x = torch.randn(4, 8, requires_grad=True)
    assert quantized(x, 16) is x
    g = torch.randn(4, 8)
    quantized(x, 3).backward(g)
    assert torch.equal(x.grad, g)

def test_activation_bits_reach_every_site_and_kv_bits_only_keys_and_values(monkeypatch):
    sites = []
    monkeypatch.setattr(trunk, "quantized",
                        lambda x, bits: sites.append((bits, x.dim(), x.size(-1))) or x)
    m, _, _ = small_model(a_bits=8, kv_bits=4)
    m(torch.randint(0, 64, (1, 8)))
    attention = [(8, 3, 32), (4, 3, 16), (4, 3, 16), (8, 4, 8), (8, 4, 8), (8, 4, 8)]
    assert sites == (attention + [(8, 3, 32), (8, 3, 48)]) * 2

# ---- The script ---------------------------------------------------------------------------------

@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

def test_script_compares_all_arms_packs_and_resumes(own_cache, tmp_path, capsys):
    data = random_base(tmp_path, 2)
    flags = ("--bits 2 --group-size 16 --rank 4 --init svd --a-bits 8 --kv-bits 4 --steps 3 "
             "--batch-size 4 --seq-len 32 --device cpu --teacher none --embed-bits 16")
    command, rows = f"lrqat.py {flags} --model {tmp_path}/base.pt --out {tmp_path}", []
    for more in ("", " --resume"):
        _, out, _ = call(capsys, command + more)
        rows.append(json.loads(out.strip().splitlines()[-1]))
        assert rows[-1]["integers_differ"] == 0 and abs(rows[-1]["packed_minus_live"]) < 1e-5
    first, again = ({arm: row["val_loss"] for arm, row in r["arms"].items()} for r in rows)
    assert list(first) == [
        "dense", "dense, longer", "RTN", "GPTQ", "scales only (PEQA)", "full QAT (LSQ)",
        "LR-QAT, s frozen", "LR-QAT"] and first == again
    base = nanobit.checkpoint.load_checkpoint(str(tmp_path / "base.pt"))[0]  # floats, also inside
    dense = nanobit.train.evaluate(base, data.val, 32)["loss"]
    assert rows[0]["base_val_loss"] == pytest.approx(dense, abs=1e-5)
    assert first["dense"] == pytest.approx(dense, abs=1e-5) and first["RTN"] != first["dense"]
    scales, sides = 17408 // 16, 2 * (4 * 64 + 3 * 80)                     # of a scale; O + C
    assert [row["learn"] for row in rows[0]["arms"].values()] == [
        0, 17408, 0, 0, scales, 17408 + scales, 4 * sides, 4 * sides + scales]
    assert {row["bpw"] for arm, row in rows[0]["arms"].items() if arm.startswith("dense")} == {16.0}
    assert rows[0]["bpw"] == 2 + (16 + 2) / 16
    packed = {row["bpw"] for arm, row in rows[0]["arms"].items() if not arm.startswith("dense")}
    assert packed == {rows[0]["bpw"]}
    assert "resumed" in out
    m, content = nanobit.checkpoint.load_checkpoint(str(tmp_path / "lrqat-w2a8.pt"))
    loss = nanobit.train.evaluate(m, data.val, 32)["loss"]
    assert abs(loss - rows[0]["val_loss"]) < 1e-6 and content["config"]["kv_bits"] == 4

@pytest.mark.parametrize("arm", ["full", "scales", "lr-qat"])
def test_one_arm_alone_ends_as_beside_the_others_and_is_packed(arm, own_cache, tmp_path, capsys):
    data = random_base(tmp_path, 1)
    command = (f"lrqat.py --bits 3 --rank 4 --steps 4 --batch-size 4 --seq-len 32 --device cpu "
               f"--embed-bits 16 --model {tmp_path}/base.pt --out {tmp_path}")
    rows = []
    for more in ("", f" --arm {arm}"):
        _, out, _ = call(capsys, command + more)
        assert " 0 of 8704 integers differ" in out
        rows.append(json.loads(out.strip().splitlines()[-1]))
    name = ARMS[arm].label
    assert list(rows[1]["arms"]) == ["dense", "RTN", name] and rows[1]["arm"] == arm
    assert rows[1]["arms"][name]["val_loss"] == rows[0]["arms"][name]["val_loss"]
    assert rows[1]["val_loss"] == pytest.approx(rows[1]["arms"][name]["val_loss"], abs=1e-5)
    m, _ = nanobit.checkpoint.load_checkpoint(str(tmp_path / f"lrqat-w3-{arm}.pt"))
    loss = nanobit.train.evaluate(m, data.val, 32)["loss"]
    assert loss == pytest.approx(rows[1]["val_loss"], abs=1e-6)

# ---- Its bytes and speed: tests/time_lrqat_memory.py --------------------------------------------

SHORT = "--rank 4 --steps 2 --batch-size 2 --accumulate 2 --device cpu"

def test_random_run_needs_no_base_and_reports_three_arms(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trunk.PRESETS, "tiny", trunk.PRESETS["tiny"]._replace(n_layer=1))
    flags = f"--bits 4 --phi packed --seq-len 8 {SHORT} --out {tmp_path}"
    _, out, _ = call(capsys, f"time_lrqat_memory.py {flags}")
    row = json.loads(out.strip().splitlines()[-1])
    assert (tmp_path / "results.jsonl").read_text() == out.strip().splitlines()[-1] + "\n"
    assert row["method"] == "lrqat-random" and out.count("predicted") == 0
    ours, full = row["results"]["LR-QAT"], row["results"]["full QAT (LSQ)"]
    assert row["val_loss"] is None and "dense, longer" in row["results"]
    assert row["tokens"] == 2 * 2 * 8                  # steps, windows a step, tokens a window
    assert ours["frozen weights"] + 3 * ours["adapters"] < full["adapters"] + full["frozen weights"]

@pytest.mark.slow
def test_lean_run_keeps_fewer_activations_and_prints_the_ledger(tmp_path, monkeypatch, capsys):
    """By default at 7B alone: at other sizes by --lean."""
    monkeypatch.setitem(trunk.PRESETS, "tiny", trunk.PRESETS["tiny"]._replace(n_layer=1))
    kept = {}
    for flag in ("--lean", "--no-lean"):
        flags = f"{flag} --seq-len 64 {SHORT} --out {tmp_path}"
        _, out, _ = call(capsys, f"time_lrqat_memory.py {flags}")
        kept[flag] = json.loads(out.strip().splitlines()[-1])["results"]["LR-QAT"]["activations"]
        assert out.count("predicted") == (6 if flag == "--lean" else 0)
    assert 2 * kept["--lean"] < kept["--no-lean"]

def test_ledger_of_a_trained_base_is_of_its_shapes_and_writes_no_row(tmp_path, capsys):
    """17,408 weights in 2 blocks, half a byte each; 4 bytes for each of A, B and the scales."""
    random_base(tmp_path, 2)
    flags = f"--base {tmp_path}/base.pt {SHORT} --out {tmp_path}"
    status, out, err = call(capsys, f"time_lrqat_memory.py {flags}")
    assert status == 0, err
    lines = dict(line.split("|", 1) for line in out.splitlines() if "predicted" in line)
    measured = {name.strip(): int(line.split("measured")[1].split("|")[0])
                for name, line in lines.items() if "GPU only" not in line}
    sides, rows = 2 * (4 * 64 + 3 * 80), 2 * (4 * 32 + 2 * 48 + 32)        # O + C; O
    assert len(lines) == 6 and measured["adapters"] == 4 * (4 * sides + rows)
    assert measured["frozen weights"] == 17408 // 2 + 4 * (2 * 300 * 32 + 5 * 32)
    assert not (tmp_path / "results.jsonl").exists()

@pytest.mark.parametrize("flags,words", [
    ("--rank 300", ["300", "256"]), ("--group-size 100", ["100", "256", "128"]),
    ("--phi packed --bits 6", ["packed", "4"]), ("--bits 9", ["--bits", "9"]),
    ("--limit 0", ["--limit", "0"]), ("--size 9B", ["--size", "9B"]),
    ("--base x.pt --size tiny", ["--base x.pt", "--size"]), ("--base x.pt", ["x.pt"]),
    ("--size 7B", ["7B", "GPU", "GiB"])])
def test_a_memory_run_refuses_in_one_line(flags, words, tmp_path, capsys):
    command = f"time_lrqat_memory.py {flags} --device cpu --out {tmp_path}"
    check_refused(call(capsys, command), *words)
    assert not list(tmp_path.iterdir())

@pytest.mark.slow
def test_a_memory_run_starts_in_any_folder(tmp_path):
    script = pathlib.Path(__file__).with_name("time_lrqat_memory.py")
    result = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, text=True,
                            capture_output=True)
    assert result.returncode == 0 and "--phi" in result.stdout, result.stderr

# ---- Bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,words", [
    ("--rank 0", ["0", ">= 1"]), ("--bits 8", ["fixed", "7", "bf16"]),
    ("--bits 6 --phi packed", ["packed", "4"]), ("--bits 1", ["1", "2 to 8"]),
    ("--init random", ["--init", "random", "svd"]), ("--init-base zero", ["--init-base"])])
def test_bad_input_is_one_line(flags, words, tmp_path, capsys):
    check_refused(call(capsys, f"lrqat.py {flags} --device cpu --out {tmp_path}"), *words)

def test_a_rank_or_a_group_that_the_base_cannot_have_is_one_line(own_cache, tmp_path, capsys):
    random_base(tmp_path, 1)
    base = f"--model {tmp_path}/base.pt --device cpu --out {tmp_path}"
    check_refused(call(capsys, f"lrqat.py --rank 33 {base}"), "--rank 33", "wq, 32 x 32")
    check_refused(call(capsys, f"lrqat.py --rank 4 --group-size 20 {base}"), "20", "32", "wq")

def test_rank_and_phi_are_checked_where_an_arm_has_adapters_alone(own_cache, tmp_path, capsys):
    random_base(tmp_path, 1)
    base = f"lrqat.py --bits 8 --rank 33 --model {tmp_path}/base.pt --device cpu --out {tmp_path}"
    check_refused(call(capsys, f"{base} --arm lr-qat"), "--phi fixed", "--bits 8")
    assert call(capsys, f"{base} --arm scales --steps 1 --batch-size 2")[0] == 0

def test_odd_columns_cannot_be_packed_and_groups_must_divide():
    m = LLaMA(LlamaConfig(64, 1, 32, 4, 4, 33, 32))
    args = types.SimpleNamespace(rank=4, phi="packed", group_size=-1, arm=None)
    with pytest.raises(UsageError, match="even number of columns, blocks.0.mlp.w_down has 33"):
        lrqat.check_shapes(m, args)
    args.phi, args.group_size = "fixed", 128
    with pytest.raises(UsageError, match="--group-size 128 does not divide"):
        lrqat.check_shapes(m, args)
