"""quest.py: QuEST forward and backward, its baselines, and training with it.

Oracles: autograd and finite differences, in float64, of the method as the paper writes it (rotate,
round, mask by the rounding error, rotate back); published shares and errors of Gaussian operands.
P1..P32 label the properties of QuEST (arXiv 2502.05003); those not here are in test_quantizers.py,
the recipe's (P28: rates, P29: decay, and the presets' sizes) in test_model.py.
P31, gradients closer to the exact ones than the baselines', was measured after billions of tokens:
a fresh model cannot show it, so here the alignment must only grow with the bits.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import quantizers
import quest
from model import Linear, LLaMA, LlamaConfig, UsageError
from nanobit.checkpoint import load_checkpoint, save_checkpoint
from nanobit.train import make_optimizer
from quantizers import (GAUSSIAN_CLIP, QuantLinear, clip_limit, code_offset, keep_two_of_four,
                        quest_codes, quest_fake_quant, rotate, trust_limit)
from quest import LsqLinear, QuestFunction, QuestLinear, lsq_calibrate, trust_status

BITS = list(GAUSSIAN_CLIP)
QUEST = [*((b, b, "uniform", "quest") for b in BITS), (1, 16, "uniform", "quest"),
         (4, 16, "uniform", "quest"), (4, 4, "fp4", "quest"), (4, 16, "fp4", "quest"),
         (4, 4, "sparse", "quest"), (1, 1, "uniform", "trust"), (4, 4, "uniform", "trust"),
         (2, 2, "uniform", "clip"), (2, 2, "uniform", "ste"), (2, 8, "sparse", "trust")]
LSQ = [(1, 1, "uniform", "lsq"), (4, 4, "uniform", "lsq"), (8, 8, "uniform", "lsq"),
       (4, 16, "uniform", "lsq")]

def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def operands(c=256):
    """x (24, c), w (16, c), upstream gradient (24, 16)."""
    return (randn(24, c).requires_grad_(), randn(16, c, seed=1).requires_grad_(),
            randn(24, 16, seed=2))

def rounded(h, bits, grid="uniform", quantizer="quest"):
    """Rotated rows -> grid values and the mask: errors of at most half a step, or the clips."""
    q, scale, _ = quest_codes(h, bits, grid)
    h_hat = (q + code_offset(bits, grid)) * scale * (keep_two_of_four(h) if grid == "sparse" else 1)
    if quantizer in ("clip", "ste"):
        return h_hat, h.abs() <= (clip_limit(bits) * scale if quantizer == "clip" else math.inf)
    if bits == 1:
        return h_hat, h.abs() <= (1.30 if quantizer == "quest" else 1.25) * scale / 2
    widest = 4 if grid == "fp4" else 1                 # the gap from 8 to 12
    return h_hat, (h_hat - h).abs() <= widest * scale / 2

def restored(v, bits, grid, quantizer):
    """v -> v_hat, in the original domain, differentiable: the paper's formulation, rotated back."""
    if bits == 16:
        return v
    h = rotate(v) if quantizer == "quest" else v
    h_hat, trusted = rounded(h.detach(), bits, grid, quantizer)
    v_hat = h * trusted + (h_hat - h * trusted).detach()
    return rotate(v_hat) if quantizer == "quest" else v_hat

def tiny(bits=16, a_bits=16, grid="uniform", quantizer="quest", n_embd=64, n_layer=1):
    """A LLaMA with quantized linears, and ids (4, 16)."""
    torch.manual_seed(0)
    model, idx = LLaMA(LlamaConfig(64, n_layer, n_embd, 2, 2, 96, 16)), torch.randint(64, (4, 16))
    kind = LsqLinear if quantizer == "lsq" else QuestLinear
    if bits < 16:
        model.replace_linears(lambda name, m: kind(m.weight, bits, a_bits, grid, quantizer))
    if quantizer == "lsq":
        lsq_calibrate(model, idx)
    return model, idx

def fit(model, idx, steps):
    optimizer, losses = make_optimizer(model, 1e-2), []
    for _ in range(steps):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

@pytest.mark.parametrize("bits", BITS)
def test_rotated_gradient_is_upstream_times_mask_and_values_ignore_the_mask(bits):
    """P15, P17, P19: nothing passes through the scale, the mask acts before the rotation back."""
    x, g = randn(8, 384), randn(8, 384, seed=1)
    x[:, 128:] *= 0.01                                 # the first block has many large values
    x.requires_grad_()
    h_hat, trusted = rounded(rotate(x.detach()), bits)
    y = quest_fake_quant(x, bits)
    assert torch.equal(y, h_hat) and not trusted.all()
    ones, = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert (rotate(ones) - trusted.double()).abs().max() < 1e-12
    assert (rotate(torch.autograd.grad(y, x, g)[0]) - g * trusted).abs().max() < 1e-12

@pytest.mark.parametrize("how", QUEST, ids=str)
def test_layer_equals_autograd_of_the_formulation_that_rotates_back(how):
    """P13, P15, P16, P17, P21: output and gradients of every grid and baseline."""
    bits, a_bits, grid, quantizer = how
    x, w, g = operands()
    x_hat = restored(x, a_bits, "fp4" if grid == "fp4" else "uniform", quantizer)
    y, expected = QuestLinear(w, *how)(x), x_hat @ restored(w, bits, grid, quantizer).T
    error = 1e-12 if quantizer == "quest" else 1e-6    # unrotated rows are rounded in float32
    assert (y - expected).abs().max() < error * expected.abs().max()
    (gx, gw), (ex, ew) = (torch.autograd.grad(v, (x, w), g) for v in (y, expected))
    assert (gx - ex).abs().max() < error * ex.abs().max()
    assert (gw - ew).abs().max() < 1e-6 * ew.abs().max()           # g_w is float32

@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradient_is_the_finite_difference_with_codes_frozen(bits):
    """P18: g_w sees the quantized rotated x, g_x the quantized rotated w."""
    x, w, g = operands()
    dx, dw = randn(24, 256, seed=3), randn(16, 256, seed=4)
    (x_hat, x_mask), (w_hat, w_mask) = (rounded(rotate(v.detach()), bits) for v in (x, w))
    def loss(e_x, e_w):
        return (g * ((x_hat + x_mask * rotate(e_x * dx))
                     @ (w_hat + w_mask * rotate(e_w * dw)).T)).sum()
    y = QuestLinear(w, bits, bits)(x)
    gx, gw = torch.autograd.grad(y, (x, w), g)
    assert abs((gx * dx).sum() / ((loss(1, 0) - loss(-1, 0)) / 2) - 1) < 1e-9
    assert abs((gw * dw).sum() / ((loss(0, 1) - loss(0, -1)) / 2) - 1) < 1e-6

def test_where_all_is_trusted_the_input_gradient_is_that_of_the_quantized_weight():
    """P19"""
    x = rotate(2 * torch.rand(24, 256, dtype=torch.float64) - 1).requires_grad_()
    assert rounded(rotate(x.detach()), 2)[1].all()
    _, w, g = operands()
    gx, = torch.autograd.grad(QuestLinear(w, 2, 2)(x), x, g)
    assert (gx - g @ restored(w, 2, "uniform", "quest")).abs().max() < 1e-12

@pytest.mark.parametrize("bits, both, weights", [(1, .7712, .6028), (2, .4728, .3447), (
    3, .2711, .1935), (4, .1515, .1074), (8, .01324, .00936)])
def test_relative_error_of_a_layer_is_that_of_gaussian_operands(bits, both, weights):
    """P5, P13: sqrt(1 - (1 - m)^2), weights only sqrt(m); w alone rotated leaves no signal."""
    x, w = randn(256, 4096), randn(256, 4096, seed=1)
    y = x @ w.T
    for a_bits, error in ((bits, both), (16, weights)):
        y_hat = QuestLinear(w, bits, a_bits)(x)
        cosine = F.cosine_similarity(y_hat.flatten(), y.flatten(), 0)
        assert abs((y_hat - y).norm() / y.norm() / error - 1) < 0.02     # sampling
        assert abs(cosine - math.sqrt(1 - error**2)) < 2e-3
    alone = x @ rounded(rotate(w), bits)[0].T
    assert abs((alone - y).norm() / y.norm() - math.sqrt(2 - weights**2)) < 0.02

@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros_are_finite_and_keep_learning(bits):
    """P20: with a scale of zero the mask would be zero for ever."""
    x, w, g = operands()
    x.data[0], w.data[0] = 0, 0
    y = QuestLinear(w, bits, bits)(x)
    gx, gw = torch.autograd.grad(y, (x, w), g)
    assert all(v.isfinite().all() for v in (y, gx, gw))
    assert max(y[0].abs().max(), y[:, 0].abs().max()) < 1e-5
    assert min(gx[0].abs().max(), gw[0].abs().max()) > 1

def test_backward_keeps_codes_and_masks_and_bfloat16_inputs_are_rounded_in_float32():
    x, w = randn(24, 256, dtype=torch.bfloat16).requires_grad_(), randn(16, 256).float()
    y, exact = (QuestFunction.apply(v, 4, 4, "sparse", "quest", w)[0] for v in (x, x.float()))
    assert {t.dtype for t in y.grad_fn.saved_tensors if t.numel() > 24} == {torch.int8, torch.bool}
    for a, b in zip(y.grad_fn.saved_tensors, exact.grad_fn.saved_tensors):
        assert torch.equal(a, b)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 2**-8 * exact.norm()
    g = randn(24, 16, seed=2)
    (a,), (b,) = (torch.autograd.grad(v, x, g.to(v.dtype)) for v in (y, exact))
    assert (a - b).norm() < 2**-7 * b.norm()

def test_shared_inputs_and_micro_batches_change_nothing():
    """Every row of the weights and every token has its own scale."""
    x, w, g = operands()
    layers = [QuestLinear(w, 2, 2), QuestLinear(w + 1, 2, 2)]
    for ours, layer in zip(QuestLinear.fused(x, layers), layers):
        assert (ours - layer(x)).abs().max() < 1e-12
    full, = torch.autograd.grad(layers[0](x), w, g)
    parts = [torch.autograd.grad(layers[0](a), w, b)[0] for a, b in zip(x.split(8), g.split(8))]
    assert (full - sum(parts)).abs().max() < 1e-6 * full.abs().max()

@pytest.mark.parametrize("how", QUEST + LSQ, ids=str)
def test_no_tokens_give_no_outputs_and_a_gradient_of_zero(how):
    """As of nn.Linear; the packed layer too."""
    x, w = torch.zeros(2, 0, 64, requires_grad=True), torch.nn.Parameter(randn(48, 64).float())
    layer = (LsqLinear if how[-1] == "lsq" else QuestLinear)(w, *how)
    y = layer(x)
    assert y.shape == layer.packed()(x).shape == (2, 0, 48)
    y.sum().backward()
    assert x.grad.shape == x.shape and (w.grad == 0).all()

class OnGpu(torch.Tensor):
    """A CPU's tensor that says it is a GPU's."""
    is_cuda = True

@pytest.mark.parametrize("how", [(4, 4, "uniform", "quest"), (2, 8, "uniform", "quest"),
                                 (4, 4, "fp4", "quest"), (4, 4, "sparse", "quest"),
                                 (4, 4, "uniform", "trust"), (4, 4, "uniform", "clip"),
                                 (4, 4, "uniform", "ste")], ids=str)
def test_on_a_gpu_only_quest_on_the_uniform_grid_goes_to_its_kernels(how, monkeypatch):
    """A baseline would be rotated there."""
    bits, a_bits, grid, quantizer = how
    calls = []
    class Fused:
        @staticmethod
        def apply(x, bits, a_bits, *weights):
            calls.append((bits, a_bits))
            return tuple(x.new_zeros(len(x), len(w)) for w in weights)
    class Kernels:
        quest_fits = staticmethod(lambda x, bits, a_bits: True)
    monkeypatch.setattr(quest, "kernels", Kernels, raising=False)
    monkeypatch.setattr(quest, "FusedQuest", Fused)
    monkeypatch.setattr(quantizers, "MM_HAS_OUT_DTYPE", False)  # rotate would believe the tensor
    x, w = randn(6, 64).float(), randn(8, 64, seed=1).float()
    layer = QuestLinear(w, *how)
    y = layer(x.as_subclass(OnGpu))
    if (grid, quantizer) == ("uniform", "quest"):
        assert calls == [(bits, a_bits)]
    else:
        assert not calls and (y - layer(x)).abs().max() < 1e-5

@pytest.mark.parametrize("bits", [4, 1.58, 8])
def test_what_rounds_in_training_also_rounds_for_the_file(bits, monkeypatch):
    """A kernel and PyTorch may round a value next to a border to different sides."""
    offset = quantizers.code_offset(bits)
    q = torch.randint(-1, 2 if bits == 1.58 else 1, (8, 128)).to(torch.int8)
    scale = torch.rand(8) + 1
    class Kernels:
        quest_fits = staticmethod(lambda x, bits, a_bits: x.dtype == torch.bfloat16)
        @staticmethod
        def hadamard_quantize(w, bits):
            return q if bits == 8 else (2 * (q + offset)).to(torch.int8), scale, None
    monkeypatch.setattr(quest, "kernels", Kernels, raising=False)
    monkeypatch.setattr(quest, "whole", lambda w: w.as_subclass(OnGpu))
    layer = QuestLinear(randn(8, 128).float(), bits, bits)
    packed = layer.packed(torch.bfloat16)
    assert torch.equal(packed.levels(torch.float32), q + offset)
    assert torch.equal(packed.scale, scale[:, None])
    assert torch.equal(layer.levels(torch.ones(1, 128).bfloat16().as_subclass(OnGpu)), q + offset)

    # Float32 is rounded by PyTorch, and then so is the file.
    monkeypatch.setattr(quest, "whole", lambda w: w)
    levels = quest.to_grid(layer.weight, bits, "uniform", "quest").levels
    assert torch.equal(layer.packed(torch.float32).levels(torch.float32), levels)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [how for how in QUEST if max(how[:2]) <= 8], ids=str)
@pytest.mark.parametrize("C", [576, 1536])             # 128 divides one: a kernel computes it
def test_a_gpus_file_has_the_bits_of_evaluation(how, C):
    layer = QuestLinear(randn(512, C, seed=1).float().cuda(), *how)
    x = randn(300, C).to("cuda", torch.bfloat16)
    packed = layer.packed(torch.bfloat16)
    assert torch.equal(packed.levels(torch.float32), layer.levels(x).float())
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [how for how in QUEST if max(how[:2]) <= 8], ids=str)
def test_a_gpus_output_and_gradients_are_a_cpus(how):
    x, g = (randn(*shape).bfloat16().float() for shape in ((64, 256), (64, 48)))
    w, results = randn(48, 256, seed=1).float(), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        a, b = x.to(device, dtype).requires_grad_(), w.to(device).requires_grad_()
        y = QuestLinear(b, *how)(a)
        results.append((y, *torch.autograd.grad(y, (a, b), g.to(device, dtype))))
    for got, want in zip(*results[::-1]):              # codes near a border may differ
        assert (got.cpu().float() - want).norm() < 0.05 * want.norm()

def test_dense_control_is_bit_identical_to_a_linear(tmp_path):
    """P22: --bits 16 leaves model.Linear in place, and no flag may quantize beside it."""
    layer, x = Linear(64, 32), randn(5, 64).float()
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert quest.parse_args(["--bits", "16", "--out", str(tmp_path)]).a_bits == 16
    with pytest.raises(UsageError, match="--bits 16 is the dense control"):
        quest.parse_args(["--bits", "16", "--a-bits", "4"])

@pytest.mark.parametrize("how", QUEST + LSQ, ids=str)
def test_packed_checkpoint_reproduces_the_logits_of_training(tmp_path, how):
    """P25: in both modes; b / 8 bytes a weight and 4 bytes a row (LSQ: a tensor)."""
    model, idx = tiny(*how, n_layer=2)
    fit(model, idx, 3)
    live = model.train()(idx)[0]
    assert torch.equal(model.eval()(idx)[0], live)
    model.replace_linears(lambda name, m: m.packed(torch.float32))
    save_checkpoint(tmp_path / "m.pt", model, tokenizer="gpt2")
    loaded, _ = load_checkpoint(str(tmp_path / "m.pt"))
    assert all(isinstance(m, QuantLinear) for _, m in loaded.linears())
    assert (loaded(idx)[0] - live).abs().max() < 1e-6
    layer, row = loaded.blocks[0].mlp.w_down, 20 if how[0] == 1.58 else 96 * how[0] // 8
    assert layer.packed.shape == (64, row // (1 + (how[2] == "sparse")))
    assert layer.scale.numel() == (1 if how[3] == "lsq" else 64)
    assert layer.scale.dtype == torch.float32

def test_only_the_seven_linears_of_each_block_are_quantized_and_inputs_four_times(monkeypatch):
    """P27: q, k, v share the codes of their inputs, gate and up too."""
    model, idx = tiny(4, 4, n_layer=2)
    kinds = [n for n, m in model.named_modules() if isinstance(m, QuestLinear)]
    assert len(kinds) == 2 * 7 and not any("embed" in n or "head" in n for n in kinds)
    assert model.state_dict().keys() == tiny(n_layer=2)[0].state_dict().keys()
    rounds, to_grid = [], quest.to_grid
    monkeypatch.setattr(quest, "to_grid", lambda v, *how: rounds.append(v) or to_grid(v, *how))
    model(idx)
    weights = {id(m.weight) for _, m in model.linears()}
    of_weights = [v for v in rounds if id(v) in weights]
    assert len(of_weights) == 2 * 7 and len(rounds) - len(of_weights) == 2 * 4

@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_training_overfits_one_batch_and_stays_finite(bits):
    """P30"""
    losses = fit(*tiny(bits, bits), 200)
    assert all(map(math.isfinite, losses)) and losses[0] > 4 and losses[-1] < 0.4

def test_gradient_alignment_of_the_lowest_block_grows_with_the_bits():
    """P31: cosine with the gradient at inputs that are not quantized."""
    def gradient(a_bits):
        model, idx = tiny(8, a_bits, n_embd=128, n_layer=2)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        return torch.cat([m.weight.grad.flatten() for n, m in model.linears() if "blocks.0" in n])
    cosine = [F.cosine_similarity(gradient(a), gradient(16), 0) for a in (1, 2, 4, 8)]
    assert cosine == sorted(cosine) and cosine[-1] > 0.99

@pytest.mark.parametrize("how, share", [((1, 1), .70038), ((2, 2), .95356), ((4, 4), .99267),
                                        ((2, 2, "uniform", "clip"), .8647)], ids=str)
def test_progress_reports_the_share_of_weights_that_get_a_gradient(how, share):
    """P16: fresh weights are Gaussian."""
    status = trust_status(*tiny(*how, n_embd=128)).split()
    assert status[:2] == ["trust", "w"] and abs(float(status[2][:-1]) / 100 - share) < 3e-3
    assert trust_status(*tiny(2, 2, quantizer="lsq")) == ""        # it has no trust mask

def test_trusted_shares_are_of_all_values_and_nobody_looks_on_afterwards():
    """Of the values and not of the layers, whose sizes differ; only inputs that are quantized."""
    wide = QuestLinear(randn(6, 128).float(), 2, 2)
    narrow = QuestLinear(randn(3, 32).float(), 2, 16)
    x = torch.randn(5, 128)
    x[0, 0] = 40                                       # far outside of its row's grid
    def forward(ids):
        wide(x), narrow(x[:, :32])
    status = trust_status(forward, None)
    inside = [(rotate(m.weight).abs() <= trust_limit(2) * quest_codes(rotate(m.weight), 2)[1])
              for m in (wide, narrow)]
    w = sum(m.sum() for m in inside) / sum(m.numel() for m in inside)
    h = rotate(x)
    a = (h.abs() <= trust_limit(2) * quest_codes(h, 2)[1]).float().mean()
    assert a < 1 and status == f" trust w {100 * w:.1f}% a {100 * a:.1f}% |"
    assert QuestLinear.watch is None                   # or training would go on telling

def test_the_fast_layer_is_the_plain_one_forward_and_backward():
    for bits in [*BITS, 16]:
        for a_bits in {bits, 4} if bits < 16 else ():
            x, w, g = operands()
            plain, fast = quest.quest_linear(x, w, a_bits, bits), QuestLinear(w, bits, a_bits)(x)
            assert (plain - fast).abs().max() < 1e-6
            for a, b in zip(torch.autograd.grad(plain, (x, w), g),
                            torch.autograd.grad(fast, (x, w), g)):
                assert (a - b).abs().max() < 1e-5 * a.abs().max()

def frozen_lsq(v, step, v0, step0, bits):
    """LSQ near (v0, step0): what is clipped, and how far the rest is rounded, stays fixed."""
    u0, half = v0 / step0, 2**bits // 2
    level = u0.floor().clamp(-half, half - 1) + 0.5
    return torch.where(u0.abs() <= half - 0.5, v / step + level - u0, level) * step

@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lsq_gradients_are_finite_differences_with_codes_frozen(bits):
    """P32: a step's is scaled by (numel qmax)^-1/2; values have one inside of the clip only."""
    x, w, g = operands(64)
    layer = LsqLinear(torch.nn.Parameter(w.detach()), bits, bits)
    layer.a_step.data.fill_(1.6 / max(2**bits / 2 - 1, 1) ** 0.5)
    args = [x, layer.a_step, layer.weight, layer.w_step]
    grads, at = torch.autograd.grad(layer(x), args, g), [t.detach().double() for t in args]
    def loss(x, a_step, w, w_step):
        x_hat = frozen_lsq(x, a_step, at[0], at[1], bits)
        return (g * (x_hat @ frozen_lsq(w, w_step, at[2], at[3], bits).T)).sum()
    for i, (grad, now) in enumerate(zip(grads, at)):
        d = 1e-5 * randn(*now.shape, seed=5)
        up, down = (loss(*at[:i], now + s * d, *at[i + 1:]) for s in (1, -1))
        scale = (at[i - 1].numel() * max(2**bits / 2 - 1, 1)) ** -0.5 if i % 2 else 1
        assert abs((grad * d).sum() / scale / ((up - down) / 2) - 1) < 1e-4

@pytest.mark.parametrize("bits, qmax", [(1, 1), (2, 1), (4, 7), (8, 127)])
def test_lsq_starts_at_the_published_step_and_one_bit_does_not_divide_by_zero(bits, qmax):
    """P32: 2 mean|v| / sqrt(qmax); at 1 bit qmax is 0, taken as 1."""
    model, idx = tiny(bits, bits, quantizer="lsq")
    layer, x = model.blocks[0].attn.wq, model.blocks[0].attn_norm(model.embed(idx))
    for step, v in ((layer.w_step, layer.weight), (layer.a_step, x)):
        assert step.item() == pytest.approx(2 * v.abs().mean().item() / qmax**0.5, rel=1e-5)
    assert all(map(math.isfinite, fit(model, idx, 20)))
