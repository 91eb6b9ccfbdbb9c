"""model.py's network, recipe, evaluation, checkpoints and generation, against oracles.

Network: float64 closed forms written here (rotary positions as complex numbers, attention as
loops) and published parameter counts. Recipe: the schedule's and AdamW's formulas, one big batch.
Evaluation: one token at a time. Resuming after Ctrl-C: a run that nobody stopped, compared bit for
bit. Generation: argmax by hand, the softmax's shares.
"""
import errno
import math
import os
import pickle
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
import nanobit.checkpoint
import nanobit.runs
import nanobit.train
import quest
from conftest import double
from model import LLaMA, LlamaConfig, UsageError
from quantizers import QuantLinear, rtn

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

def small(seed=0, loud=True, **changes):
    """A LLaMA whose weights are large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=40, seq_len=8)
    llama = LLaMA(LlamaConfig(**shape | changes))
    for p in llama.parameters() if loud else ():
        torch.nn.init.normal_(p, *((0, 0.3) if p.dim() == 2 else (1, 0.2)))
    return llama

def ids(*shape, seed=0, vocab=61):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, shape))

def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)

# ---- The network, in float64 ------------------------------------------------------------------

def norm64(x, m):
    return x / (x.square().mean(-1, keepdim=True) + m.eps).sqrt() * m.weight.double()

def rope64(x, theta=10000.0, first=0):
    """x (T, hs): the complex number x_i + i x_(i + hs/2) turns by position * theta^(-2i/hs)."""
    T, hs = x.shape
    freq = theta ** (-2 * torch.arange(hs // 2).double() / hs)
    angle = (torch.arange(T).double() + first)[:, None] * freq
    z = torch.complex(x[:, :hs // 2], x[:, hs // 2:]) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), dim=-1)

def attention64(x, m, theta=10000.0):
    """x (T, C), one head and one position at a time."""
    T, hs = x.size(0), m.head_size
    q, k, v = (x @ w.weight.double().t() for w in (m.wq, m.wk, m.wv))
    group = q.size(1) // k.size(1)
    heads = []
    for h in range(q.size(1) // hs):
        own, shared = slice(h * hs, (h + 1) * hs), slice(h // group * hs, (h // group + 1) * hs)
        qh, kh, vh = rope64(q[:, own], theta), rope64(k[:, shared], theta), v[:, shared]
        rows = [torch.softmax(kh[:t + 1] @ qh[t] / math.sqrt(hs), 0) @ vh[:t + 1] for t in range(T)]
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1) @ m.wo.weight.double().t()

def mlp64(x, m):
    gate, up, down = (w.weight.double().t() for w in (m.w_gate, m.w_up, m.w_down))
    return (x @ gate / (1 + torch.exp(-x @ gate)) * (x @ up)) @ down

def llama64(m, row):
    x = m.embed.weight.double()[row]
    for block in m.blocks:
        x = x + attention64(norm64(x, block.attn_norm), block.attn, m.config.rope_theta)
        x = x + mlp64(norm64(x, block.mlp_norm), block.mlp)
    return norm64(x, m.norm) @ m.head.weight.double().t()

@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_rmsnorm_is_the_closed_form(size):
    m = small().norm
    x = size * torch.randn(3, 5, 32)
    close(m(x), norm64(x.double(), m))
    half = x.bfloat16()                                # statistics in float32: one rounding only
    assert m(half).dtype == torch.bfloat16
    close(m(half), norm64(half.double(), m), 2**-8)

@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope_is_a_rotation_of_complex_numbers(theta):
    x = torch.randn(2, 3, 300, 16)
    got = model.apply_rope(x, *model.rope_tables(300, 16, theta, "cpu"))
    want = torch.stack([rope64(h.double(), theta) for h in x.flatten(0, 1)]).view_as(x)
    close(got, want, 1e-4)

def test_rope_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 16)
    cos, sin = model.rope_tables(40, 16, 1e4, "cpu")
    q, k = (model.apply_rope(v.expand(1, 1, 40, 16), cos, sin)[0, 0] for v in (q, k))
    products = q @ k.t()                                                   # (40, 40)
    for distance in (-7, 0, 1, 12):
        diagonal = products.diagonal(distance)
        close(diagonal, diagonal[:1].double().expand_as(diagonal), 1e-4)
    assert (products.diagonal(3).mean() - products.diagonal(4).mean()).abs() > 1e-3

@torch.no_grad()
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_is_a_softmax_over_the_past_with_shared_keys(n_kv_head):
    m = small(n_kv_head=n_kv_head).blocks[0].attn
    x = torch.randn(2, 8, 32)
    got = m(x, *model.rope_tables(8, m.head_size, 1e4, "cpu"))
    close(got, torch.stack([attention64(row.double(), m) for row in x]), 1e-4)

@torch.no_grad()
def test_swiglu_is_the_closed_form():
    m, x = small().blocks[0].mlp, torch.randn(2, 8, 32)
    close(m(x), mlp64(x.double(), m), 1e-4)

@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_loss_equal_float64(tied):
    m, x = small(tied=tied, rope_theta=500.0), ids(3, 9)
    logits, loss = m(x[:, :-1], x[:, 1:])
    want = torch.stack([llama64(m, row[:-1]) for row in x])
    close(logits, want, 1e-4)
    nll = [-torch.log_softmax(want[b, t], 0)[x[b, t + 1]] for b in range(3) for t in range(8)]
    close(loss, sum(nll) / len(nll), 1e-4)

@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit():
    m, x = small(), ids(1, 8)
    before = m(x)[0]
    for t in range(8):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % 61
        same = (m(changed)[0] == before)[0].all(-1)
        assert same[:t].all() and not same[t:].any()

def test_initial_weights_have_the_documented_spread():
    m = small(loud=False, vocab_size=1024, n_layer=3, n_embd=256, n_hidden=768)
    for name, p in m.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        std = 0.02 / math.sqrt(6) if name.endswith(("wo.weight", "w_down.weight")) else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name

def test_tied_head_is_the_embedding_itself(tmp_path):
    tied, untied = small(tied=True), small()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (tied, untied)]
    assert sizes[1] - sizes[0] == 61 * 32
    nanobit.checkpoint.save_checkpoint(tmp_path / "a.pt", tied, tokenizer="gpt2")
    again, _ = nanobit.checkpoint.load_checkpoint(tmp_path / "a.pt")
    for m in (tied, again):
        assert m.head.weight is m.embed.weight

@pytest.mark.parametrize("size, count", [
    ("30M", 30482560), ("50M", 49556736), ("100M", 102777856), ("200M", 203188480),
    ("430M", 443068288), ("800M", 822151168), ("7B", 6738415616 - 2 * 32000 * 4096)])
def test_presets_have_the_published_parameter_counts(size, count):
    with torch.device("meta"):
        m = LLaMA(model.PRESETS[size].config(32000))
    total = sum(p.numel() for p in m.parameters())
    assert total - m.embed.weight.numel() - m.head.weight.numel() == count

# ---- The recipe -------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [20, 100, 700, 11444])
def test_learning_rate_rises_for_a_tenth_and_falls_to_a_tenth(steps):
    lr = [nanobit.train.learning_rate(i, steps, 4.0) for i in range(steps)]
    warm = round(steps / 10)
    assert lr[0] == pytest.approx(0.04) and lr[-1] == pytest.approx(0.4)
    assert lr[warm] == max(lr) == pytest.approx(4.0)
    assert lr[:warm + 1] == sorted(lr[:warm + 1]) and lr[warm:] == sorted(lr[warm:])[::-1]
    middle = (warm + steps - 1) / 2                    # half-way down a cosine is the mean
    both = lr[math.floor(middle)] + lr[math.ceil(middle)]
    assert both / 2 == pytest.approx((4.0 + 0.4) / 2, rel=1e-2)

KINDS = {"dense": None, "quest": (quest.QuestLinear, 4), "lsq": (quest.LsqLinear, 2)}

def quantized(m, kind):
    if KINDS[kind]:
        cls, bits = KINDS[kind]
        m.replace_linears(lambda name, linear: cls(linear.weight, bits, bits, "uniform", kind))
    return m

@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_blocks_linears_own_decays(kind):
    """For LSQ that includes its steps, as in the QuEST authors' runs."""
    m = quantized(small(), kind)
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    optimizer = nanobit.train.make_optimizer(m, lr=0.5)
    for p in m.parameters():
        p.grad = torch.zeros_like(p)                   # without a gradient AdamW only decays
    optimizer.step()
    for name, p in m.named_parameters():
        decays = re.fullmatch(r"blocks\.\d\.(attn\.w[qkvo]|mlp\.w_(gate|up|down))\.\w+", name)
        close(p.detach(), before[name].double() * (1 - 0.5 * 0.1 if decays else 1), 1e-6)

def test_adamw_forgets_gradients_at_the_rates_of_the_recipe():
    """Adam's formula with 0.9 and 0.95, one number at a time, on gradients that vary in size."""
    m, lr = small(), 0.01
    optimizer, p = nanobit.train.make_optimizer(m, lr), m.norm.weight  # a norm does not decay
    want, first, second = p.detach().double(), 0.0, 0.0
    for t, size in enumerate([1.0, 10.0, 0.1, 0.01], 1):
        g = size * torch.randn(p.shape)
        for q in m.parameters():
            q.grad = torch.zeros_like(q)
        p.grad = g
        optimizer.step()
        first = 0.9 * first + 0.1 * g.double()
        second = 0.95 * second + 0.05 * g.double() ** 2
        want = want - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        close(p.detach(), want, 1e-6)

@pytest.mark.parametrize("kind", ["dense", "quest"])
def test_accumulated_gradients_equal_one_big_batch(kind, in_float64):
    data = SimpleNamespace(train=ids(200).numpy())
    results = []
    for accumulate in (1, 2, 8):
        m = double(quantized(small(loud=False, n_kv_head=4), kind))
        args = SimpleNamespace(steps=10, lr=1.0, batch_size=8, seq_len=8, seed=3, device="cpu",
                               accumulate=accumulate)
        sgd = torch.optim.SGD(m.parameters())
        loss, gnorm = nanobit.train.train_step(m, sgd, data, args, 4)
        results.append(torch.cat([p.detach().flatten() for p in m.parameters()] +
                                 [loss.view(1), gnorm.view(1)]))
    for other in results[1:]:
        close(other, results[0], 1e-9)

def test_gradients_longer_than_one_are_cut_to_one():
    m = small()
    before = torch.cat([p.detach().clone().flatten() for p in m.parameters()])
    args = SimpleNamespace(steps=1, lr=100.0, batch_size=4, seq_len=8, seed=0, device="cpu",
                           accumulate=1)
    sgd = torch.optim.SGD(m.parameters())
    _, gnorm = nanobit.train.train_step(m, sgd, SimpleNamespace(train=ids(99).numpy()), args, 0)
    moved = torch.cat([p.detach().flatten() for p in m.parameters()]) - before
    assert gnorm > 1 and moved.norm().item() == pytest.approx(1.0, rel=1e-3)   # lr is 100/100

@torch.no_grad()
@pytest.mark.parametrize("n", [2, 9, 41, 46])
def test_evaluation_scores_every_target_once(n):
    m, tokens = small(), ids(n).numpy()
    nll = 0.0
    for t in range(1, n):                              # the context starts where its window does
        context = torch.from_numpy(tokens[(t - 1) // 8 * 8:t])[None]
        nll -= torch.log_softmax(m(context)[0][0, -1].double(), 0)[tokens[t]].item()
    for batch_size in (1, 2, 32):
        scores = nanobit.train.evaluate(m, tokens, 8, batch_size=batch_size)
        assert scores["loss"] == pytest.approx(nll / (n - 1), abs=1e-5)
        assert scores["ppl"] == pytest.approx(math.exp(scores["loss"]))

@pytest.mark.parametrize("lean", [False, True])
def test_evaluation_leaves_the_model_as_lean_as_it_was(lean):
    m = small()
    m.lean = lean
    nanobit.train.evaluate(m, ids(40).numpy(), 8)
    assert m.lean == lean

def test_a_look_at_the_dev_split_is_of_its_first_64_windows(tmp_path, monkeypatch):
    m, data, args = training(seq_len=4)
    data.dev, seen = ids(400, seed=1).numpy(), []
    monkeypatch.setattr(nanobit.train, "evaluate", lambda m, tokens, seq_len: seen.append(
        (tokens, seq_len)) or {"loss": 0.0})
    nanobit.train.train(m, data, args, tmp_path / "state")
    assert len(seen) == 3                              # of 6 steps, each second
    for tokens, seq_len in seen:                       # 64 x 4 targets, and one token before
        assert seq_len == 4 and tokens.tolist() == data.dev[:257].tolist()

def test_an_arm_that_is_not_yet_begun_begins_where_another_is_resumed(tmp_path):
    results = []
    for resume in (False, True):
        m, data, args = training(resume=resume)
        results.append(nanobit.train.train_arm(m, data, args, tmp_path / f"{resume}", lambda: "",
                                       nanobit.train.make_optimizer(m, 1e-2)))
        assert args.resume == resume
    assert results[1]["losses"] == pytest.approx(results[0]["losses"]) and len(
        results[1]["losses"]) == 6

# ---- Checkpoints ------------------------------------------------------------------------------

def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_checkpoint_gives_back_the_same_model(tmp_path, packed):
    m, x = small(), ids(2, 8)
    if packed:
        quantized(m, "quest").replace_linears(lambda name, linear: linear.packed(torch.float32))
    nanobit.checkpoint.save_checkpoint(tmp_path / "a.pt", m, tokenizer=["a"], method="test")
    again, content = nanobit.checkpoint.load_checkpoint(tmp_path / "a.pt")
    assert again.config == m.config and torch.equal(again(x)[0], m(x)[0])
    assert content["tokenizer"] == ["a"] and content["method"] == "test"
    assert os.listdir(tmp_path) == ["a.pt"]

def test_a_flipped_bit_is_refused_or_harmless(tmp_path):
    path, m = tmp_path / "a.pt", small(n_layer=1, n_embd=8, n_hidden=8)
    nanobit.checkpoint.save_checkpoint(path, m, tokenizer=["a"])
    good, content = path.read_bytes(), nanobit.checkpoint.read_checkpoint(path)
    for place in np.random.default_rng(0).integers(0, 8 * len(good), 300).tolist():
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            assert same(nanobit.checkpoint.read_checkpoint(path), content)
        except UsageError as e:
            assert str(path) in str(e)

class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["XDG_CACHE_HOME"] + "-executed",)

@pytest.mark.parametrize("save", [torch.save, lambda c, path: path.write_bytes(pickle.dumps(c))])
def test_a_checkpoint_cannot_run_code(tmp_path, save):
    save({"format": "nanobit-1", "tokenizer": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UsageError, match="evil.pt"):
        nanobit.checkpoint.load_checkpoint(tmp_path / "evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"]

@pytest.mark.parametrize("room", [0, 5000, "no space"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, room):
    resource = pytest.importorskip("resource")         # Windows has none
    path, limit = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    nanobit.checkpoint.save_checkpoint(path, small())
    old = path.read_bytes()
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    if room == "no space":
        monkeypatch.setattr(torch, "save", full)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(UsageError, match="(No space|File too large).*--out") as e:
            nanobit.checkpoint.save_checkpoint(path, small(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert os.listdir(tmp_path) == ["a.pt"] and path.read_bytes() == old

def test_ctrl_c_in_the_middle_of_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    nanobit.checkpoint.save_checkpoint(path, small())
    old = path.read_bytes()
    def interrupted(content, f):
        f.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nanobit.checkpoint.save_checkpoint(path, small(seed=1))
    assert os.listdir(tmp_path) == ["a.pt"] and path.read_bytes() == old

# ---- Numbers that are none --------------------------------------------------------------------

def packings():
    """{kind: a packed model}: each has other tensors of floats."""
    def vq(name, linear):
        codes = torch.randint(4, (len(linear.weight), linear.in_features // 4, 2))
        return QuantLinear.vq(codes, torch.randn(2, 4, 4), torch.rand(len(linear.weight)) + 1)
    def affine(name, linear):
        return QuantLinear.affine(*rtn(linear.weight.detach(), 4, 8), 4, 8)
    def quest_fixed(name, linear):
        w = linear.weight.detach()
        return QuantLinear.quest(w, 4, 4, a_scale=torch.tensor(0.1))
    makers = {"vq": vq, "affine": affine, "quest": quest_fixed}
    return {"dense": small()} | {kind: small().replace_linears(f) for kind, f in makers.items()}

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["dense", "vq", "affine", "quest"])
def test_no_checkpoint_with_a_number_that_is_none_is_written_or_read(tmp_path, kind, value):
    path, m = tmp_path / "a.pt", packings()[kind]
    nanobit.checkpoint.save_checkpoint(path, m, tokenizer=["a"])
    old, names = path.read_bytes(), set()
    for name, tensor in m.state_dict().items():
        if not tensor.is_floating_point():
            continue
        names.add(name.rsplit(".", 1)[1])
        last = tensor.view(-1)[-1].clone()
        with torch.no_grad():
            tensor.view(-1)[-1] = value
        with pytest.raises(UsageError, match=f"a.pt: the weight {name} is not finite"):
            nanobit.checkpoint.save_checkpoint(path, m, tokenizer=["a"])
        assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.pt"]
        content = torch.load(path, weights_only=True)
        content["model"][name].view(-1)[-1] = value    # by an older version, or another tool
        torch.save(content, tmp_path / "b.pt")
        with pytest.raises(UsageError, match=f"b.pt: the weight {name} is not finite"):
            nanobit.checkpoint.load_checkpoint(tmp_path / "b.pt")
        os.remove(tmp_path / "b.pt")
        with torch.no_grad():
            tensor.view(-1)[-1] = last
    assert names == {"dense": {"weight"}, "vq": {"weight", "scale", "codebooks"},
                     "affine": {"weight", "scale"}, "quest": {"weight", "scale", "a_scale"}}[kind]
    nanobit.checkpoint.load_checkpoint(path)

def test_a_state_with_a_number_that_is_none_is_not_resumed(tmp_path):
    nanobit.train.train(*training(), tmp_path / "state")
    content = torch.load(tmp_path / "state", weights_only=True)
    content["model"]["norm.weight"][0] = math.nan
    torch.save(content, tmp_path / "state")
    m, data, args = training(resume=True)
    with pytest.raises(UsageError, match="norm.weight is not finite"):
        nanobit.train.train(m, data, args, tmp_path / "state")

@pytest.mark.parametrize("more, name", [
    ({"base_val_loss": math.nan}, "base_val_loss"),
    ({"arms": {"rtn": {"val_loss": 1.0}, "gptq": {"val_loss": math.inf}}}, "gptq's val_loss"),
    ({"curve": [3.0, math.nan]}, "curve"), ({}, "val_loss")])
def test_no_row_with_a_number_that_is_none_is_written(tmp_path, more, name):
    args = SimpleNamespace(out=str(tmp_path), device="cpu", seed=0)
    scores = {"loss": 1.0, "ppl": math.exp(1), "bits_per_byte": 1.0}
    result = {"tokens": 1, "seconds": 1.0}
    bad = scores if more else scores | {"loss": -math.inf}
    with pytest.raises(UsageError, match=f"{name} is not finite"):
        nanobit.runs.finish(args, "test", small(), bad, result, **more)
    assert not os.listdir(tmp_path)
    nanobit.runs.finish(args, "test", small(), scores, result, base_val_loss=None,
                        arms={"rtn": [1.0]})
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1

def training(kind="dense", seed=0, **changes):
    """(model, data, args) of a run of 6 steps that looks at the dev split every second."""
    data = SimpleNamespace(train=ids(400).numpy(), dev=ids(50).numpy(), digest="d", name="n")
    args = dict(steps=6, lr=1e-2, batch_size=4, accumulate=2, seq_len=8, seed=0, device="cpu",
                compile=False, eval_every=2, resume=False, out="", model=None)
    return quantized(small(seed, loud=False), kind), data, SimpleNamespace(**args | changes)

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 4])
def test_training_resumed_after_ctrl_c_is_bit_identical(tmp_path, monkeypatch, capsys, kind, stop):
    m, data, args = training(kind)
    whole = nanobit.train.train(m, data, args, tmp_path / "whole")
    step = nanobit.train.train_step
    def interrupted(forward, optimizer, data, args, i):
        if i == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(forward, optimizer, data, args, i)
    monkeypatch.setattr(nanobit.train, "train_step", interrupted)
    with pytest.raises(SystemExit) as e:
        nanobit.train.train(*training(kind), tmp_path / "state")
    assert e.value.code == 130 and f"holds step {stop};" in capsys.readouterr().out
    monkeypatch.setattr(nanobit.train, "train_step", step)
    again, data, args = training(kind, seed=9, resume=True)  # other first weights: all come back
    result = nanobit.train.train(again, data, args, tmp_path / "state")
    assert f"at step {stop}/6" in capsys.readouterr().out
    assert same(again.state_dict(), m.state_dict()) and result["losses"] == whole["losses"]
    a, b = (nanobit.checkpoint.read_checkpoint(tmp_path / name) for name in ("whole", "state"))
    assert all(same(a[k], b[k]) for k in ("model", "optimizer", "losses"))
    assert len(whole["losses"]) == 6 and whole["tokens"] == 6 * 4 * 8

# ---- Generation -------------------------------------------------------------------------------

def test_greedy_text_is_the_most_likely_token_each_time(in_float64):
    m, x = double(small()), ids(2, 3)
    want = x
    for _ in range(12):                                # past seq_len: the window slides
        want = torch.cat((want, m(want[:, -8:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(m.generate(x, 12, temperature=0), want)
    assert torch.equal(m.generate(x, 12, top_k=1), want)
    assert torch.equal(m.generate(x, 12, temperature=1e-4), want)

@pytest.mark.parametrize("top_k, temperature", [(None, 1.0), (3, 0.5), (99, 2.0)])
def test_sampled_shares_are_the_softmax_of_the_top(top_k, temperature):
    m, x, n = small(vocab_size=9), ids(1, 4, vocab=9), 5000
    logits = m(x)[0][0, -1].detach().double() / temperature
    p = logits.softmax(0)
    p = torch.where(p >= p.sort(descending=True).values[min(top_k or 9, 9) - 1], p, 0)
    got = m.generate(x.expand(n, -1), 1, temperature, top_k, torch.Generator().manual_seed(0))
    shares = got[:, -1].bincount(minlength=9) / n
    close(shares, p / p.sum(), 5 * 0.5 / math.sqrt(n))
    assert not (shares * (p == 0)).any()
