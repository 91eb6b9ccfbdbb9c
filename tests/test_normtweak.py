"""normtweak.py against closed forms, finite differences in float64, explicit least squares and
recomputation by hand, on a LLaMA of three blocks with grouped-query attention."""
import copy
import json
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as trunk
import nanobit.checkpoint
import nanobit.data
import nanobit.defaults
import nanobit.ranks
import nanobit.selftext
import nanobit.train
import normtweak as nt
import quantizers
from conftest import call, check_refused, double
from model import LLaMA, LlamaConfig, UsageError
from nanobit.checkpoint import save_checkpoint
from quantizers import QuantLinear, fake_quant_tokens

CONFIG = LlamaConfig(vocab_size=300, n_layer=3, n_embd=32, n_head=4, n_kv_head=2, n_hidden=48,
                     seq_len=24)
NORM = re.compile(r"blocks\.\d+\.(attn|mlp)_norm\.weight")

@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = LLaMA(CONFIG).eval().requires_grad_(False)
    # far from the initial values: the norms are uneven and every block matters
    for name, p in model.named_parameters():
        p.mul_(5) if p.dim() == 2 else p.add_(0.3 * torch.randn(p.shape))
    return model

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"line {i * i} of {i}: def f{i}(x): return x + {i}\n"
                                             for i in range(3000)))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder))
        return nanobit.data.load_data(str(folder / "text.txt"), "300", 24)

@pytest.fixture
def options(tmp_path):
    """Flags of a run by the paper's rule, which keeps every tweak."""
    common = ["--out", str(tmp_path), "--steps", "8", "--seq-len", "24", "--keep-all",
              "--group-size", "-1"]
    return lambda *argv: nt.parse_args([*common, *argv])

@pytest.fixture(scope="module")
def ids():
    return torch.randint(300, (8, 24), generator=torch.Generator().manual_seed(1))

def compress(teacher, ids, args, host="rtn", tweak=True, student=None, **more):
    model = copy.deepcopy(student or teacher)
    return model, nt.compress(model, teacher, ids, args, host, tweak, **more)

def same(a, b):
    return {k for k, v in a.state_dict().items() if torch.equal(v, b.state_dict()[k])}

def different(a, b):
    return a.state_dict().keys() - same(a, b)

# ---- the loop as the paper writes it ----------------------------------------------------------

def check_against_the_plain_loop(teacher, ids, args, host, plain_host, loss="paper"):
    """compress and norm_tweaking end with the same weights and norms, bit for bit."""
    ids = ids[:3]                                      # a step each: enough to tell them apart
    model, losses = compress(teacher, ids, args, host)
    plain = copy.deepcopy(teacher)
    nt.norm_tweaking(plain, ids, plain_host, args.lr, nt.LOSSES[loss])
    moved = 0
    for block, want, start in zip(model.blocks, plain.blocks, teacher.blocks):
        for names in nt.ORDER:
            for name in names:
                got = block.get_submodule(name).weight()
                assert torch.equal(got, want.get_submodule(name).weight)
                assert not torch.equal(got, start.get_submodule(name).weight)
        for norm, _ in nt.NORMS:
            gamma = getattr(want, norm).weight
            assert torch.equal(getattr(block, norm).weight, gamma)
            moved += not torch.equal(gamma, getattr(start, norm).weight)
    assert moved == 6 and all(loss.before != loss.after for loss in losses)
    return plain

GRIDS = [f"--bits {bits}" for bits in range(1, 9)]
GRIDS += [f"--bits {bits} --symmetric" for bits in range(2, 9)]
GRIDS += ["--bits 2 --group-size 16", "--bits 3 --symmetric --group-size 8"]

@pytest.mark.parametrize("grid", GRIDS)
def test_compress_is_the_papers_loop_on_every_grid(teacher, ids, options, grid):
    args = options(*grid.split())
    def round_all(block, windows, tables):
        nt.round_block(block, args.bits, args.group_size, args.symmetric)
    plain = check_against_the_plain_loop(teacher, ids, args, "rtn", round_all)
    # The plain loop touches nothing outside of the blocks, and leaves no gradients behind.
    assert all(k.startswith("blocks.") for k in different(plain, teacher))
    assert all(p.grad is None and not p.requires_grad for p in plain.parameters())

@pytest.mark.parametrize("loss", nt.LOSSES)
def test_compress_is_the_papers_loop_for_every_loss(teacher, ids, options, loss):
    def round_all(block, windows, tables):
        nt.round_block(block, bits=3)
    args = options("--bits", "3", "--loss", loss)
    check_against_the_plain_loop(teacher, ids, args, "rtn", round_all, loss)

@pytest.mark.parametrize("host", ["rtn", "gptq"])
@pytest.mark.parametrize("flags", ["--bits 2", "--bits 4 --a-bits 8", "--bits 3 --act-order"])
def test_compress_is_the_papers_loop_for_every_host(teacher, ids, options, host, flags):
    args = options(*flags.split())
    def quantize(block, windows, tables):
        if args.a_bits < 16:
            nt.smooth(block, windows, tables, args.smooth)
        nt.quantize_block(block, windows, tables, args, host, "")
    check_against_the_plain_loop(teacher, ids, args, host, quantize)

# ---- losses -----------------------------------------------------------------------------------

def test_channel_loss_by_hand():
    """Unbiased variances over tokens, absolute differences, mean over channels."""
    f, q = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 9, 3], [8, 5, 6]])
    assert nt.channel_loss(f, q).item() == pytest.approx((2 + 3.5 + 0 + 20 + 3.5 + 0) / 3)
    x = torch.randn(50, 2).double()
    assert nt.channel_loss(x, x + torch.tensor([3.0, 4.0])).item() == pytest.approx(3.5)
    assert nt.channel_loss(x, x + torch.tensor([2.0, -2.0])).item() == pytest.approx(2.0)

def test_channel_loss_sees_statistics_of_channels_only():
    f, q = torch.randn(3, 20, 5).double(), torch.randn(3, 20, 5).double()
    shuffled = q.flatten(0, 1)[torch.randperm(60)].view(3, 20, 5)
    torch.testing.assert_close(nt.channel_loss(f, q), nt.channel_loss(f, shuffled))
    assert nt.channel_loss(f, f.flatten(0, 1)[torch.randperm(60)]) < 1e-14
    assert nt.channel_loss(f, q) > 0.01
    assert (nt.channel_loss(f, q.flip(-1)) - nt.channel_loss(f, q)).abs() > 1e-3

def test_code_mse_and_kl_losses_by_their_formulas():
    f, q = torch.randn(2, 30, 6).double(), torch.randn(2, 30, 6).double()
    a, b = f.numpy().reshape(60, 6), q.numpy().reshape(60, 6)
    std = [np.sqrt(x.var(0, ddof=1) + 1e-6) for x in (a, b)]
    code = ((a.mean(0) - b.mean(0)) ** 2).sum() + ((std[0] - std[1]) ** 2).sum()
    assert nt.LOSSES["code"](f, q).item() == pytest.approx(code)
    assert nt.LOSSES["mse"](f, q).item() == pytest.approx(((a - b) ** 2).mean())
    kl = F.kl_div(q.log_softmax(-1), f.log_softmax(-1), reduction="none", log_target=True)
    assert nt.LOSSES["kl"](f, q).item() == pytest.approx(kl.sum(-1).mean().item())

@pytest.mark.parametrize("loss", nt.LOSSES)
def test_gradient_of_each_loss_equals_central_differences(loss):
    g = torch.Generator().manual_seed(0)
    f, q = (torch.randn(9, 4, generator=g, dtype=torch.float64) for _ in "fq")
    q.requires_grad_()
    nt.LOSSES[loss](f, q).backward()
    numeric, h = torch.empty_like(q), 1e-6
    for i in range(9):
        for j in range(4):
            step = torch.zeros_like(q)
            step[i, j] = h
            difference = nt.LOSSES[loss](f, q + step) - nt.LOSSES[loss](f, q - step)
            numeric[i, j] = difference.item() / (2 * h)
    torch.testing.assert_close(q.grad, numeric, rtol=1e-6, atol=1e-9)

def test_gradient_of_the_channel_loss_in_closed_form():
    f, q = torch.randn(9, 4).double(), torch.randn(9, 4).double().requires_grad_()
    nt.channel_loss(f, q).backward()
    mean = -(f.mean(0) - q.mean(0)).sign() / (9 * 4)
    spread = -(f.var(0) - q.var(0)).sign() * 2 * (q - q.mean(0)) / (8 * 4)
    torch.testing.assert_close(q.grad, mean + spread)

def test_the_loss_of_a_block_is_the_mean_of_its_windows_by_hand():
    """As many windows as there may be, of 0.5, 2 and 3.5: shifts of all channels' means."""
    f = torch.randn(3, 1, 20, 4).double()
    outputs = [x + shift for x, shift in zip(f, (0.5, 2.0, -3.5))]
    assert nt.mean_loss(list(f), outputs) == pytest.approx(2.0)
    assert nt.mean_loss(2 * list(f), 2 * outputs) == pytest.approx(2.0)

@pytest.mark.parametrize("loss", nt.LOSSES)
def test_equal_outputs_have_no_gradient_at_all(loss):
    f = torch.randn(2, 12, 16)
    f[..., 3] = 1.0                                    # a channel without variance
    q = f.clone().requires_grad_()
    nt.LOSSES[loss](f, q).backward()
    assert (q.grad == 0).all()

# ---- the tweak --------------------------------------------------------------------------------

def test_learning_rate_grows_linearly_over_the_blocks(teacher, ids, options, monkeypatch):
    def note(*_, rates, **__):
        seen.append(rates)
    seen = []
    monkeypatch.setattr(nt, "tweak_by_adam", note)
    compress(teacher, ids, options("--lr", "1e-3"))
    rates = [attn for attn, mlp in seen]
    assert rates[0] == 1e-3 and all(attn == mlp for attn, mlp in seen)
    assert rates == pytest.approx([1e-3 * (1 + nt.LR_SCALE * i / 3) for i in range(3)])

def test_gradient_of_a_norm_through_the_block_equals_central_differences(
        teacher, ids, options, in_float64):
    model, _ = compress(teacher, ids, options("--bits", "3"), tweak=False)
    float_block, block = copy.deepcopy(teacher.blocks[1]).double(), model.blocks[1]
    nt.swap(block, QuantLinear, nt.FrozenLinear)
    block.double()
    x = torch.randn(1, 24, 32).double()
    rope = [t.double() for t in trunk.rope_tables(24, 8, 1e4, "cpu")]
    for norm in (block.attn_norm, block.mlp_norm):
        weight = norm.weight.requires_grad_()
        loss = lambda: nt.channel_loss(float_block(x, *rope), block(x, *rope))
        grad, = torch.autograd.grad(loss(), weight)
        weight.requires_grad_(False)
        for c in (0, 7, 31):
            sides = []
            for h in (1e-6, -2e-6):
                weight[c] += h
                sides.append(loss().item())
            weight[c] += 1e-6
            assert grad[c].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-9)

def test_first_step_is_the_learning_rate_and_all_steps_are_bounded(teacher, ids, options):
    """Adam's first step is lr * sign(g); no step is above lr * 0.1 / sqrt(0.001)."""
    args = options("--lr", "1e-3")
    plain, _ = compress(teacher, ids[:1], args, tweak=False)
    one, _ = compress(teacher, ids[:1], args)
    move = (one.blocks[0].attn_norm.weight - plain.blocks[0].attn_norm.weight).abs()
    torch.testing.assert_close(move, torch.full_like(move, 1e-3), rtol=2e-3, atol=0)
    many, _ = compress(teacher, ids, args)
    for i in range(3):
        for name, _ in nt.NORMS:
            before, after = (getattr(m.blocks[i], name).weight for m in (teacher, many))
            move = (after - before).abs()
            assert 1e-4 < move.max() <= 3.17 * 1e-3 * (1 + nt.LR_SCALE * i / 3) * len(ids)

@pytest.mark.parametrize("loss", nt.LOSSES)
def test_a_model_that_is_not_quantized_does_not_move(teacher, ids, options, loss):
    model, losses = compress(teacher, ids, options("--loss", loss, "--lr", "0.1"), host=None)
    assert not different(model, teacher) and losses == [(0.0, 0.0, True)] * 3

@pytest.mark.parametrize("host", ["rtn", "gptq"])
def test_without_a_learning_rate_the_host_is_reproduced(teacher, ids, options, host):
    args = options("--bits", "2")
    plain, _ = compress(teacher, ids, args, host, tweak=False)
    args.lr = 0.0
    assert not different(compress(teacher, ids, args, host)[0], plain)

@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_exactly_two_vectors_a_block_change(teacher, ids, options, solver):
    """Codes, scales, zero points, embedding, head and the last norm are bit-identical; the norms
    stay float32, and most entries differ also after a trip through a file."""
    args = options("--bits", "2", "--solver", solver)
    plain, _ = compress(teacher, ids, args, tweak=False)
    model, _ = compress(teacher, ids, args)
    changed = different(model, plain)
    assert len(changed) == 6 and all(NORM.fullmatch(k) for k in changed)
    path = f"{args.out}/m.pt"
    save_checkpoint(path, model, tokenizer=["x"])
    loaded, _ = nanobit.checkpoint.load_checkpoint(path)
    for k in changed:
        assert loaded.state_dict()[k].dtype == torch.float32
        assert (loaded.state_dict()[k] != plain.state_dict()[k]).float().mean() > 0.5
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(isinstance(m, QuantLinear) for _, m in model.linears())

def test_teacher_sees_the_quantized_stream_and_the_final_norms_make_the_next_input(
        teacher, ids, options, monkeypatch):
    seen, tweak = [], nt.tweak_by_adam
    def spy(block, windows, targets, tables, **rest):
        tweak(block, windows, targets, tables, **rest)
        seen.append((copy.deepcopy(block), windows, targets, tables))
    monkeypatch.setattr(nt, "tweak_by_adam", spy)
    compress(teacher, ids, options("--bits", "2", "--lr", "0.01"))
    float_stream = teacher.embed(ids).split(1)
    for i, (block, windows, targets, rope) in enumerate(seen):
        for x, target in zip(windows, targets):
            assert torch.equal(target, teacher.blocks[i](x, *rope))
        if i:
            before, inputs, _, _ = seen[i - 1]
            assert all(torch.equal(x, before(y, *rope)) for x, y in zip(windows, inputs))
            assert not torch.equal(windows[0], float_stream[0])
        float_stream = [teacher.blocks[i](x, *rope) for x in float_stream]
    assert len(seen) == 3

@pytest.mark.parametrize("host", ["rtn", "gptq"])
def test_channel_loss_of_every_block_falls_at_two_bits(teacher, ids, options, host):
    _, losses = compress(teacher, ids, options("--bits", "2", "--lr", "3e-3"), host)
    assert all(loss.after < loss.before for loss in losses), losses

def test_same_seed_same_norms_and_the_order_of_windows_matters(teacher, ids, options):
    args = options("--bits", "2")
    a, b, c = (compress(teacher, x, args)[0] for x in (ids, ids, ids.flip(0)))
    assert not different(a, b) and len(different(a, c)) == 6

# ---- which tweaks stay ------------------------------------------------------------------------

class Scale(torch.nn.Module):
    """A block whose two norms' weights (1,) are all there is: it multiplies the first of two
    channels by both."""

    def __init__(self):
        super().__init__()
        for name, _ in nt.NORMS:
            self.add_module(name, torch.nn.Module())
            getattr(self, name).weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return scaled(x, self.attn_norm.weight * self.mlp_norm.weight)

def scaled(x, weight):
    return torch.cat((weight * x[..., :1], x[..., 1:]), -1)

def to(value, block, seen):
    """A tweak that sets the first norm's weight, and notes what it was given."""
    def tweak(windows, targets):
        seen.append((block.attn_norm.weight.item(), windows, targets))
        block.attn_norm.weight.fill_(value)
    return tweak

@pytest.mark.parametrize("goal, want", [(2.0, 2.1), (2.6, 3.0), (1.0, 1.0), (1.3, 1.0)])
@torch.no_grad()
def test_the_weight_that_is_nearest_on_the_held_out_windows_stays(goal, want):
    """All tokens are (1, 1) and the targets (goal, 1), so that of the weights 1 (no tweak), 2.1 and
    3 the one whose angle is nearest to that of the goal is best; a tweak that changes nothing, or
    ends in NaN, is not kept."""
    windows = [torch.ones(1, 5, 2) for _ in range(8)]
    targets = [scaled(x, 7.0) for x in windows[:6]]    # what the tweaks are trained on says 7
    targets += [scaled(x, goal) for x in windows[6:]]
    block, seen = Scale(), []
    values = [3.0, 2.1, 1.0, float("nan")]
    tweaks = [to(value, block, seen) for value in values]

    def judge(outputs):
        """Better with every change."""
        return float(all(map(torch.equal, outputs, windows[6:])))

    kept = nt.best_tweak(block, windows, targets, windows, (), tweaks, judge)
    assert block.attn_norm.weight.item() == pytest.approx(want)
    assert block.mlp_norm.weight.item() == 1.0 and kept == (want != 1.0)
    # Each of them began from the untouched norms, and saw the first three quarters alone.
    assert [start for start, _, _ in seen] == [1.0] * 4
    assert all(w == windows[:6] and t == targets[:6] for _, w, t in seen)

@pytest.mark.parametrize("scores, want", [((2.0, 1.0), True), ((1.0, 1.0), False),
                                          ((1.0, 2.0), False), ((1.0, math.nan), False)])
@torch.no_grad()
def test_a_tweak_goes_where_the_model_is_not_better_with_it(scores, want):
    """The judge is asked about the held-out windows: first without the tweak, then with it."""
    windows = [torch.ones(1, 5, 2) * (1 + i) for i in range(4)]
    targets = [scaled(x, 2.0) for x in windows]
    block, asked, answers = Scale(), [], list(scores)

    def judge(outputs):
        asked.append(outputs)
        return answers.pop(0)

    kept = nt.best_tweak(block, windows, targets, windows, (), [to(2.0, block, [])],
                         judge)
    assert kept == want and block.attn_norm.weight.item() == (2.0 if want else 1.0)
    assert [len(outputs) for outputs in asked] == [1, 1]
    assert torch.equal(asked[0][0], windows[3]) and torch.equal(asked[1][0], targets[3])

@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_the_judge_is_the_divergence_of_the_model_with_dense_blocks_after(i, teacher, ids):
    """By the plain model: blocks up to i are others, and torch's kl_div, at every fourth token."""
    model = copy.deepcopy(teacher)
    for block in model.blocks[:i + 1]:
        for p in block.parameters():
            p.mul_(1.1)
    log_p, log_q = (m(ids)[0][:, ::4].log_softmax(-1).flatten(0, 1) for m in (teacher, model))
    want = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    tables = teacher.rope(ids)
    windows = teacher.embed(ids).split(1)
    wanted = nt.read_by_head(teacher, 0, windows, tables)
    for block in model.blocks[:i + 1]:
        windows = [block(x, *tables) for x in windows]
    assert want > 1e-3
    found = nt.divergence_after(teacher, i, wanted, tables, windows)
    assert found == pytest.approx(want.item(), rel=1e-4)

@torch.no_grad()
def test_the_distance_that_decides_counts_every_token_by_its_direction():
    """By hand: (3, 4) and (4, 3) have a root mean square of sqrt(12.5), so their squared distance
    is 2 / 2 / 12.5; a token that is 1000 times larger in both counts no more."""
    f = torch.tensor([[[3.0, 4], [3000, 4000]]])
    q = torch.tensor([[[4.0, 3], [4000, 3000]]])
    for x, target in ((q, f), (q[:, :1], f[:, :1]), (7 * q, f)):
        assert nt.output_distance([x], [target]) == pytest.approx(0.08, rel=1e-5)
    assert nt.output_distance([q, f], [f, f]) == pytest.approx(0.04, rel=1e-5)

@pytest.mark.parametrize("n, held_out", [(2, 1), (3, 1), (4, 1), (8, 2), (64, 16)])
@torch.no_grad()
def test_a_quarter_of_the_windows_is_held_out_and_at_least_one(n, held_out):
    windows, block, seen = [torch.ones(1, 2, 2)] * n, Scale(), []
    nt.best_tweak(block, windows, windows, windows, (), [to(1.0, block, seen)], judge=None)
    assert len(seen[0][1]) == n - held_out

def test_three_rates_are_tried_in_proportion_to_the_norms_weights(
        teacher, ids, options, monkeypatch):
    """A fifth of the given one, itself and five times it; of norms whose weights are 0.1 and 2 in
    the mean a tenth and twice of that."""
    teacher, seen = copy.deepcopy(teacher), []
    teacher.blocks[0].attn_norm.weight.fill_(-0.1)
    teacher.blocks[0].mlp_norm.weight.copy_(torch.linspace(0, 4, 32))
    monkeypatch.setattr(nt, "tweak_by_adam", lambda *_, rates, **__: seen.append(rates))
    args = options("--lr", "5e-3")
    args.keep_all = False
    _, losses = compress(teacher, ids, args)
    want = [[1e-4, 2e-3], [5e-4, 1e-2], [25e-4, 5e-2]]
    assert seen[:3] == [pytest.approx(rates) for rates in want] and len(seen) == 9
    assert not any(loss.kept for loss in losses)       # nothing moved

@pytest.mark.parametrize("solver", ["adam", "closed"])
@pytest.mark.parametrize("host", ["rtn", "gptq"])
def test_what_is_kept_is_no_further_from_the_float_block_on_held_out_windows(
        teacher, ids, options, host, solver):
    """Measured here, block by block, with the untweaked block in the same place."""
    args = options("--bits", "2", "--solver", solver, "--loss", "mse")
    args.keep_all = False
    model, losses = compress(teacher, ids, args, host)
    x, tables = teacher.embed(ids), teacher.rope(ids)
    for i, block in enumerate(model.blocks):
        plain = copy.deepcopy(block)
        plain.attn_norm = teacher.blocks[i].attn_norm
        plain.mlp_norm = teacher.blocks[i].mlp_norm
        target = teacher.blocks[i](x, *tables)
        unit = lambda y: (y / y.square().mean(-1, keepdim=True).sqrt())[6:]
        far, near = ((unit(b(x, *tables)) - unit(target)).square().mean() for b in (plain, block))
        assert near < far if losses[i].kept else near == far
        x = block(x, *tables)
    assert any(loss.kept for loss in losses)

def test_a_tweak_that_blows_up_leaves_the_hosts_model(teacher, ids, options):
    """At a rate of 10 every norm ends far off: no block keeps its tweak."""
    args = options("--bits", "3", "--lr", "10")
    plain, _ = compress(teacher, ids, args, tweak=False)
    args.keep_all = False
    model, losses = compress(teacher, ids, args)
    assert not different(model, plain) and not any(loss.kept for loss in losses)

# ---- the closed form --------------------------------------------------------------------------

@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_closed_form_is_the_least_squares_solution(teacher, ids, options, in_float64, ridge):
    """Against torch.linalg.lstsq on the explicit design matrix, to which a ridge adds a row for
    each factor, which pulls it to 1. The second norm sees what the first one's factors left."""
    model, _ = compress(teacher, ids, options("--bits", "2"), tweak=False)
    block, float_block = copy.deepcopy(model.blocks[0]), copy.deepcopy(teacher.blocks[0]).double()
    nt.swap(block, QuantLinear, nt.FrozenLinear)
    block.double()
    block.attn_norm.weight.mul_(1.1)                   # norms may differ before the tweak as well
    block.mlp_norm.weight.mul_(0.9)
    before = copy.deepcopy(block)
    windows = torch.randn(4, 2, 24, 32).double()
    rope = [t.double() for t in trunk.rope_tables(24, 8, 1e4, "cpu")]
    nt.tweak_by_least_squares(block, float_block, list(windows), rope, ridge=ridge)
    x = windows.flatten(0, 1)                          # what the first norm reads
    hidden = x + block.attn(block.attn_norm(x), *rope)  # and the second: the tweaked attention's
    for norm, names, x in (("attn_norm", nt.ORDER[0], x), ("mlp_norm", nt.ORDER[2], hidden)):
        gamma = getattr(before, norm).weight
        normed = getattr(before, norm)(x).flatten(0, 1)                    # (n, C)
        q = torch.cat([block.get_submodule(n).weight for n in names])      # (O, C)
        w = torch.cat([float_block.get_submodule(n).weight for n in names])
        target = getattr(float_block, norm)(x).flatten(0, 1) @ w.T         # (n, O)
        design = (normed[:, None] * q).flatten(0, 1)                       # (n O, C)
        pull = (ridge * design.square().sum(0).mean()).sqrt()
        rows = torch.cat((design, pull * torch.eye(32).double()))
        goal = torch.cat((target.flatten(), pull.expand(32)))
        s = torch.linalg.lstsq(rows, goal[:, None]).solution[:, 0]
        torch.testing.assert_close(getattr(block, norm).weight, gamma * s, rtol=1e-6, atol=1e-9)
        cost = lambda scale: (design @ scale - target.flatten()).square().sum()
        assert cost(getattr(block, norm).weight / gamma) < cost(torch.ones_like(s))

@pytest.mark.parametrize("zeros", [slice(5, 6), slice(None)])
def test_closed_form_takes_norm_weights_of_exactly_zero(teacher, ids, options, zeros):
    """Its channel is silent in both models: the weight stays 0, the others are as without it."""
    teacher = copy.deepcopy(teacher)
    with torch.no_grad():
        teacher.blocks[0].attn_norm.weight[zeros] = 0
        teacher.blocks[1].mlp_norm.weight[zeros] = 0
    model, losses = compress(teacher, ids, options("--bits", "4", "--solver", "closed"))
    for norm in (model.blocks[0].attn_norm, model.blocks[1].mlp_norm):
        assert (norm.weight[zeros] == 0).all() and norm.weight.isfinite().all()
    assert torch.tensor(losses).isfinite().all()

# ---- hosts ------------------------------------------------------------------------------------

def test_hessian_is_the_second_moment_however_tokens_are_split(teacher, ids, in_float64):
    teacher = double(copy.deepcopy(teacher))
    x, rope = teacher.embed(ids), teacher.rope(ids)
    block, inputs = teacher.blocks[0], {}
    hooks = [block.get_submodule(name).register_forward_pre_hook(
                 lambda m, i, name=name: inputs.update({name: i[0].flatten(0, -2)}))
             for name in sum(nt.ORDER, ())]
    block(x, *rope)
    for hook in hooks:
        hook.remove()
    for size, a_bits in ((1, 16), (3, 16), (8, 16), (8, 4)):
        collected = quantizers.collect_hessians(block, inputs, x.split(size), rope, a_bits)
        for name, h in collected.items():
            h, peak = h
            v = inputs[name] if a_bits == 16 else fake_quant_tokens(inputs[name], 4)
            torch.testing.assert_close(h, v.T @ v / len(v), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(peak, v.abs().amax(0), rtol=1e-10, atol=0)

@pytest.mark.parametrize("extra", [(), ("--a-bits", "8"), ("--act-order",)])
def test_gptq_sees_what_is_quantized_before_it(teacher, ids, options, monkeypatch, extra):
    """Order k, v, q, o, up, gate, down; each Hessian is that of the smoothed block with everything
    before already quantized, recomputed here from the finished block."""
    calls, quantize = [], nt.gptq
    def spy(w, h, **kwargs):
        assert not {"mse", "percdamp"} & set(kwargs)                       # the one recipe
        assert kwargs["act_order"] == ("--act-order" in extra)
        calls.append((w.clone(), h.clone()))
        return quantize(w, h, **kwargs)
    monkeypatch.setattr(nt, "gptq", spy)
    args = options("--bits", "3", *extra)
    model, _ = compress(teacher, ids, args, "gptq", tweak=False)
    names = sum(nt.ORDER, ())
    reference = copy.deepcopy(teacher)
    x, rope = reference.embed(ids), reference.rope(ids)
    if "--a-bits" in extra:
        nt.smooth(reference.blocks[0], x.split(1), rope, args.smooth)
    for i, name in enumerate(names):
        block = copy.deepcopy(reference.blocks[0])
        for earlier in names[:i]:
            if earlier not in next(group for group in nt.ORDER if name in group):
                done = model.blocks[0].get_submodule(earlier)
                block.set_submodule(earlier, nt.FrozenLinear(done))
        w, h = calls[i]
        assert torch.equal(w, block.get_submodule(name).weight)
        expected = quantizers.collect_hessians(block, [name], x.split(1), rope, args.a_bits)
        torch.testing.assert_close(h, expected[name][0])
    assert len(calls) == 7 * 3

def test_gptq_report_has_the_output_error_of_every_linear(teacher, ids, options, capsys):
    compress(teacher, ids, options("--bits", "3"), "gptq", tweak=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "output lost" in line]
    assert len(lines) == 3
    for line in lines:
        pairs = re.findall(r"(\w+) ([\d.]+) -> ([\d.]+)", line)
        assert [name for name, _, _ in pairs] == ["wk", "wv", "wq", "wo",
                                                  "w_up", "w_gate", "w_down"]
        assert all(float(after) <= float(before) for _, before, after in pairs)
    w, w_hat, x = torch.randn(4, 6), torch.randn(4, 6), torch.randn(50, 6)
    expected = ((x @ (w_hat - w).T).square().sum() / (x @ w.T).square().sum()).item()
    assert nt.output_error(w, w_hat, x.T @ x / 50) == pytest.approx(expected, rel=1e-5)

def test_a_hessian_that_is_not_positive_definite_names_layer_tokens_and_fix(teacher, ids, options):
    broken = copy.deepcopy(teacher)
    broken.blocks[1].mlp_norm.weight.mul_(1e25)        # x x^T overflows
    with pytest.raises(UsageError, match=r"block 2/3 \| mlp.w_up: the Hessian of 192 calibration "
                                         r"tokens is not positive definite.*--steps"):
        compress(broken, ids, options("--bits", "3"), "gptq")

def smooth_all(model, ids, alpha):
    x, rope = model.embed(ids), model.rope(ids)
    for block in model.blocks:
        with torch.no_grad():
            nt.smooth(block, x.split(3), rope, alpha)
        x = block(x, *rope)

def test_smoothing_keeps_the_function(teacher, ids, in_float64):
    for alpha in (0.0, 0.5, 1.0):
        model, reference = (copy.deepcopy(teacher).double() for _ in "ab")
        model.dtype = reference.dtype = torch.float64
        smooth_all(model, ids, alpha)
        a, b = model(ids)[0], reference(ids)[0]
        assert (a - b).norm() < 1e-12 * b.norm()
        kept = same(model, reference)
        assert {k for k in kept if "blocks" in k} == {
            f"blocks.{i}.{n}.weight" for i in range(3) for n in ("attn.wo", "mlp.w_down")}

def test_smoothing_takes_peaks_over_all_readers_and_tokens(teacher, ids, in_float64):
    """alpha 0: the columns' peaks become 1; alpha 1: those of the norms' outputs do."""
    model = copy.deepcopy(teacher).double()
    smooth_all(model, ids, 0.0)
    for block in model.blocks:
        for _, names in nt.NORMS:
            peak = torch.stack([block.get_submodule(n).weight.abs().amax(0) for n in names]).amax(0)
            torch.testing.assert_close(peak, torch.ones_like(peak))
    model, peaks = copy.deepcopy(teacher).double(), []
    smooth_all(model, ids, 1.0)
    x, rope = model.embed(ids), model.rope(ids)
    for block in model.blocks:
        for name, _ in nt.NORMS:
            getattr(block, name).register_forward_hook(
                lambda m, i, y: peaks.append(y.abs().amax((0, 1))))
        x = block(x, *rope)
    torch.testing.assert_close(torch.stack(peaks), torch.ones(6, 32).double(), rtol=1e-5, atol=0)

def test_quantized_activations_let_the_gradient_through(teacher, ids, options):
    args = options("--bits", "4", "--a-bits", "8")
    model, _ = compress(teacher, ids, args, tweak=False)
    assert all(m.spec["a_bits"] == 8 for _, m in model.linears())
    block = model.blocks[0]
    nt.swap(block, QuantLinear, nt.FrozenLinear)
    x, rope = model.embed(ids), model.rope(ids)
    weights = [block.attn_norm.weight.requires_grad_(), block.mlp_norm.weight.requires_grad_()]
    loss = nt.channel_loss(teacher.blocks[0](x, *rope), block(x, *rope))
    for grad in torch.autograd.grad(loss, weights):
        assert (grad != 0).float().mean() > 0.9

def test_frozen_linear_equals_the_packed_one(teacher, ids, options):
    """Both round the same inputs; only their products may sum in another order."""
    for extra in ((), ("--a-bits", "4"), ("--symmetric", "--group-size", "16")):
        model, _ = compress(teacher, ids, options("--bits", "3", *extra), tweak=False)
        packed, x = model.blocks[0].mlp.w_down, torch.randn(2, 5, 48)
        torch.testing.assert_close(nt.FrozenLinear(packed)(x), packed(x), rtol=1e-5, atol=1e-4)

# ---- calibration ------------------------------------------------------------------------------

def test_self_calibration_follows_the_rule(teacher, data, options, in_float64):
    """Each window starts with a frequent token, goes on with the likeliest token GREEDY times and
    then with samples from the TOP_K likeliest; all windows have full length, none has the
    end-of-text token, and the validation data is never read."""
    teacher, args = double(copy.deepcopy(teacher)), options("--seed", "3")
    train_only = types.SimpleNamespace(train=data.train, tokenizer=data.tokenizer)
    out = nt.calibration(teacher, train_only, args)
    end, allowed = data.tokenizer.eot_token, nt.frequent_tokens(data)
    assert out.shape == (8, 24) and (out != end).all()
    assert torch.isin(out[:, 0], allowed).all()
    logits = teacher(out)[0]
    logits[..., end] = -torch.inf
    rank = (logits[:, :-1] > logits[:, :-1].gather(-1, out[:, 1:, None])).sum(-1)  # 0: likeliest
    assert (rank[:, :nanobit.selftext.GREEDY] == 0).all()
    assert (rank < nanobit.selftext.TOP_K).all() and (rank[:, nanobit.selftext.GREEDY:] > 0).any()
    assert torch.equal(out, nt.calibration(teacher, train_only, args))
    assert not torch.equal(out, nt.calibration(teacher, train_only, options("--seed", "4")))

@pytest.mark.slow
def test_own_text_comes_from_the_cache_of_this_model_and_these_settings(
        teacher, data, options, tmp_path, monkeypatch):
    """It is written once for the same weights, wherever they lie, and anew for any other weight,
    seed or size, and where the file is damaged or holds something else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written, write = [], nanobit.selftext.write_text
    monkeypatch.setattr(nanobit.selftext, "write_text",
                        lambda *args: written.append(1) or write(*args))
    first = nt.calibration(teacher, data, options())
    file, = (tmp_path / "nanobit").glob("*.npz")
    again = nt.calibration(copy.deepcopy(teacher), data, options())
    assert torch.equal(again, first) and again.dtype == torch.int64 and len(written) == 1

    # Damaged in three ways.
    for damage in (lambda: file.write_bytes(file.read_bytes()[:100]),
                   lambda: np.savez(file, ids=np.full((8, 24), 300)),      # no such token
                   lambda: np.savez(file, ids=np.zeros((8, 23), int))):
        damage()
        assert torch.equal(nt.calibration(teacher, data, options()), first)
    assert len(written) == 4

    # Another model, seed, number and length.
    other = copy.deepcopy(teacher)
    other.blocks[2].mlp.w_down.weight[3, 5] += 1e-3
    nt.calibration(other, data, options())
    for flags in (["--seed", "1"], ["--steps", "9"], ["--seq-len", "23"]):
        nt.calibration(teacher, data, options(*flags))
    assert len(written) == 8 and len(list((tmp_path / "nanobit").glob("*.npz"))) == 5

def test_windows_at_once_fit_into_the_memory_and_one_eta_counts_all_parts(
        teacher, data, options, monkeypatch):
    """3 of 8 windows fit: parts of 3, 3 and 2, whose steps are counted as one."""
    # keys and values of 24 tokens, 3 layers, 2 heads of 8 channels; four numbers for each of 300
    # tokens of the vocabulary; all float32
    each = 4 * (2 * 24 * 3 * 2 * 8 + 4 * 300)
    for memory, windows in ((3 * each, 3), (4 * each - 1, 3), (1, 1)):
        monkeypatch.setattr(nanobit.selftext, "CPU_MEMORY", memory)
        assert nanobit.selftext.windows_at_once(teacher, 24) == windows
    monkeypatch.setattr(nanobit.selftext, "CPU_MEMORY", 3 * each)
    sizes, counts, decode = [], [], nanobit.selftext.decode
    monkeypatch.setattr(nanobit.selftext, "decode", lambda model, ids, *rest:
                        sizes.append(len(ids)) or decode(model, ids, *rest))
    class Counts(nanobit.ranks.Progress):
        def __init__(self, n, label):
            super().__init__(n, label)
            counts.append(self)
    monkeypatch.setattr(nanobit.selftext, "Progress", Counts)
    end = data.tokenizer.eot_token
    starts = torch.arange(8)[:, None]
    out = nanobit.selftext.write_text(teacher, starts, 24, end, torch.Generator().manual_seed(0))
    assert sizes == [3, 3, 2] and torch.equal(out[:, :1], starts)
    assert [(todo.n, todo.done) for todo in counts] == [(3 * 23, 3 * 23)]

@pytest.mark.parametrize("flags, window, want", [([], 24, 24), ([], 4096, 256),
                                                 (["--seq-len", "16"], 4096, 16),
                                                 (["--seq-len", "400"], 4096, 400)])
def test_calibration_windows_are_at_most_256_tokens_unless_a_length_is_given(
        teacher, data, tmp_path, flags, window, want):
    args = nt.parse_args(["--out", str(tmp_path), "--steps", "2", "--calib", "random", *flags])
    args.seq_len = args.seq_len or nanobit.defaults.window(window)         # as open_model does
    assert nt.calibration(teacher, data, args).shape == (2, want)

def test_the_token_after_the_greedy_ones_is_the_first_that_is_drawn(teacher, data, options):
    """In 64 windows: greedy tokens are the likeliest in all of them, draws in few."""
    out = nt.calibration(teacher, data, options("--steps", "64", "--seq-len", "8"))
    logits = teacher(out)[0]
    logits[..., data.tokenizer.eot_token] = -torch.inf
    likeliest = logits[:, :-1].argmax(-1) == out[:, 1:]                    # (64, 7)
    share = likeliest.float().mean(0).tolist()         # of the second to the eighth token
    assert share[:4] == [1.0] * 4 and max(share[4:]) < 0.9

def test_start_tokens_are_the_fewest_that_cover_the_share(data):
    counts = np.bincount(data.train, minlength=300)
    counts[data.tokenizer.eot_token] = 0
    allowed = nt.frequent_tokens(data).numpy()
    others = np.setdiff1d(np.arange(300), allowed)
    assert counts[allowed].sum() >= nt.START_SHARE * counts.sum()
    assert counts[allowed].sum() - counts[allowed].min() < nt.START_SHARE * counts.sum()
    assert counts[allowed].min() >= counts[others].max()

def test_data_calibration_is_training_text_and_random_is_uniform(teacher, data, options):
    train_only = types.SimpleNamespace(train=data.train, tokenizer=data.tokenizer)
    text = "," + ",".join(map(str, data.train.tolist())) + ","
    for window in nt.calibration(teacher, train_only, options("--calib", "data")).tolist():
        assert "," + ",".join(map(str, window)) + "," in text
    out = nt.calibration(teacher, train_only, options("--calib", "random", "--steps", "500"))
    assert out.shape == (500, 24) and out.min() == 0 and out.max() == 299
    # each of 300 tokens is drawn 40 times on average, so the spread is about sqrt(40) = 6.3
    assert np.bincount(out.flatten(), minlength=300).std() < 10

# ---- command line -----------------------------------------------------------------------------

@pytest.fixture
def base(teacher, data, tmp_path):
    path = str(tmp_path / "base.pt")
    save_checkpoint(path, teacher, method="dense", tokenizer=data.spec, data=data.digest,
                    settings={"data": data.name, "vocab": "300", "smoke": False})
    return path

@pytest.mark.slow
@pytest.mark.parametrize("bits, extra", [(2, ""), (4, "--a-bits 8 --group-size 16"),
                                         (3, "--symmetric --solver closed")])
def test_saved_checkpoints_evaluate_to_the_reported_loss(base, teacher, data, tmp_path, capsys,
                                                         bits, extra):
    _, out, _ = call(capsys, f"normtweak.py --model {base} --out {tmp_path} --steps 4 --seq-len 24 "
                             f"--bits {bits} {extra}")
    row = json.loads(out.splitlines()[-1])
    assert row == json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert list(row["arms"]) == ["dense", "rtn", "rtn-tweak", "gptq", "gptq-tweak"]
    for name in ("rtn-tweak", "gptq-tweak"):
        found = re.search(rf"^{name} \|.* kept in (\d) of 3 blocks", out, re.M)
        assert row["arms"][name]["kept"] == int(found[1]) and row["arms"][name]["blocks"] == 3
    assert row["kept"] == row["arms"]["gptq-tweak"]["kept"] and "kept" not in row["arms"]["rtn"]
    assert row["base_val_loss"] == row["arms"]["dense"]["val_loss"]
    dense = nanobit.train.evaluate(teacher, data.val, 24)["loss"]
    assert row["base_val_loss"] == pytest.approx(dense, abs=1e-5) and row["tokens"] == 4 * 24
    # 7680 weights in 224 rows a block; a scale has 16 bits, a zero point as many as a code
    bpw = bits + {2: 18 * 224 / 7680, 3: 16 * 224 / 7680, 4: 20 / 16}[bits]
    for name, arm in row["arms"].items():
        assert arm["bpw"] == pytest.approx(16 if name == "dense" else bpw)
    for name, arm in list(row["arms"].items())[1:]:
        _, line, _ = call(capsys, f"model.py eval {tmp_path}/{name}-w{bits}.pt --seq-len 24")
        assert float(line.split("loss ")[-1]) == pytest.approx(arm["val_loss"], abs=1e-4)
    table = [line for line in out.splitlines() if re.match(r"[\w-]+ +\| +\d\.\d{4} \|", line)]
    assert len(table) == 5 and table[-1].count("->") == 3

@pytest.mark.slow
def test_a_packed_model_keeps_its_codes(base, tmp_path, capsys):
    command = f"normtweak.py --out {tmp_path} --steps 4 --seq-len 24 --embed-bits 16 --model"
    call(capsys, f"{command} {base} --bits 2 --group-size 16")
    _, out, _ = call(capsys, f"{command} {tmp_path}/rtn-w2.pt --teacher {base}")
    row = json.loads(out.splitlines()[-1])
    assert list(row["arms"]) == ["dense", "packed", "packed-tweak"]
    assert (row["w_bits"], row["group_size"], row["a_bits"]) == (2, 16, 16)
    load = lambda name: nanobit.checkpoint.load_checkpoint(str(tmp_path / name))[0]
    assert not different(load("packed-w2.pt"), load("rtn-w2.pt"))
    # tweaking the saved RTN model gives what rounding and tweaking in one run gave
    a, b = load("packed-tweak-w2.pt"), load("rtn-tweak-w2.pt")
    assert all(NORM.fullmatch(k) for k in different(a, b))
    for k, v in a.state_dict().items():
        torch.testing.assert_close(v, b.state_dict()[k], rtol=1e-4, atol=0)

@pytest.mark.parametrize("symmetric", [False, True])
def test_a_packed_models_own_grid_is_that_of_the_run(base, teacher, data, ids, options, tmp_path,
                                                     symmetric):
    grid = ["--bits", "3", "--a-bits", "8", "--group-size", "16", *["--symmetric"] * symmetric]
    model, _ = compress(teacher, ids[:2], options(*grid), tweak=False)
    save_checkpoint(str(tmp_path / "p.pt"), model, method="rtn", tokenizer=data.spec,
                    data=data.digest, settings={"data": data.name})
    for given in ([], grid):                           # flags that repeat it are no mistake
        args = nt.parse_args(["--model", str(tmp_path / "p.pt"), "--teacher", base, *given])
        nt.load_models(args)
        found = args.bits, args.a_bits, args.group_size, args.symmetric
        assert found == (3, 8, 16, symmetric)

def test_few_calibration_tokens_are_said(base, tmp_path, capsys):
    _, out, _ = call(capsys, f"normtweak.py --model {base} --out {tmp_path} --steps 1 --keep-all "
                     "--seq-len 24")
    assert "warning: 24 calibration tokens cannot tell 48 inputs" in out

@pytest.mark.parametrize("flags, message", [
    ("--bits 9", "9 is not int from 1 to 8"), ("--bits 0", "0 is not int from 1 to 8"),
    ("--group-size 20 --model BASE", "--group-size 20 does not divide the 32 input channels"),
    ("--group-size 0 --model BASE", "--group-size 0 does not divide"),
    ("--a-bits 3", "invalid choice: 3"), ("--smooth 0.5", "add --a-bits 8"),
    ("--smooth 1.5 --a-bits 8", "1.5 is not float from 0 to 1"),
    ("--steps 1 --model BASE", "--steps 1 leaves no window to choose by"),
    ("--teacher BASE", "needs the packed checkpoint as --model"),
    ("--teacher BASE --model PACKED --host rtn", "--host rtn quantizes, but the codes"),
    ("--teacher BASE --model PACKED --bits 3", "--bits 3 is not the 2 of --model"),
    ("--teacher BASE --model PACKED --a-bits 8", "--a-bits 8 is not the 16 of --model"),
    ("--teacher BASE --model PACKED --group-size 16", "--group-size 16 is not the -1 of --model"),
    ("--teacher BASE --model PACKED --symmetric", "--symmetric True is not the False of --model"),
    ("--teacher BASE --model BASE", "has no packed affine linears"),
    ("--model PACKED", "is packed already"),
    ("--model PACKED --teacher PACKED", "is packed already"),
    ("--model nowhere.pt", "no such checkpoint"), ("--resume", "nothing to go on from")])
def test_bad_input_is_one_line(base, teacher, data, ids, options, tmp_path, capsys, flags, message):
    packed = str(tmp_path / "packed.pt")
    if "PACKED" in flags:
        model, _ = compress(teacher, ids[:2], options(), tweak=False)
        save_checkpoint(packed, model, method="rtn", tokenizer=data.spec, data=data.digest,
                        settings={"data": data.name})
    flags = flags.replace("BASE", base).replace("PACKED", packed)
    check_refused(call(capsys, f"normtweak.py --out {tmp_path} {flags}"), message)

def test_a_teacher_of_another_tokenizer_is_refused(base, teacher, data, ids, options, tmp_path):
    """One whose last two merges have changed places."""
    model, _ = compress(teacher, ids[:2], options(), tweak=False)
    spec = copy.deepcopy(data.spec)
    spec[-2:] = reversed(spec[-2:])
    save_checkpoint(str(tmp_path / "p.pt"), model, method="rtn", tokenizer=spec,
                    data=data.digest, settings={})
    with pytest.raises(UsageError, match="has another tokenizer of"):
        nt.load_models(options("--model", str(tmp_path / "p.pt"), "--teacher", base))

def test_a_teacher_of_another_shape_is_refused(base, teacher, data, ids, options, tmp_path):
    model, _ = compress(teacher, ids[:2], options(), tweak=False)
    model.config.n_layer = 2
    model.blocks = model.blocks[:2]
    save_checkpoint(str(tmp_path / "p.pt"), model, method="rtn", tokenizer=data.spec,
                    data=data.digest, settings={})
    with pytest.raises(UsageError, match="is not what"):
        nt.load_models(options("--model", str(tmp_path / "p.pt"), "--teacher", base))
