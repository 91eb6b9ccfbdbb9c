"""`model.py eval CKPT --against BASE`: how far a model is from the one it was made from.

The oracles are closed forms in float64, written out here token by token and window by window, and
cases that are computed by hand. `compare` must find the same with any number of windows at a time,
and its loss must be that of `evaluate` to the last bit.
"""
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import nanobit.checkpoint
import nanobit.data
import nanobit.train
from conftest import TEXT, call, check_refused, random_base
from nanobit.compare import Differences, compare, differences, standard_error, statistics
from nanobit.train import evaluate
from quantizers import QuantLinear, rtn

def random_logits(n, vocab, distance):
    """Logits of a base, of a model that is so far from it, and targets."""
    base = 3 * torch.randn(n, vocab)
    return base, base + distance * torch.randn(n, vocab), torch.randint(vocab, (n,))

def found_in(base, ours, targets):
    """`differences` of logits."""
    return differences(F.log_softmax(base.float(), -1), F.log_softmax(ours.float(), -1), targets)

def softmax64(logits):
    """Probabilities in float64, numpy."""
    x = logits.double().numpy()
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

def tiny(seed, vocab=61, n_layer=2):
    torch.manual_seed(seed)
    m = model.LLaMA(model.LlamaConfig(vocab, n_layer, 32, 4, 2, 48, 16))
    for p in m.parameters():                           # far from uniform predictions
        p.data.mul_(3)
    return m.eval()

def rounded(m, bits):
    """A copy with packed linears, rounded to nearest."""
    def make(_, linear):
        q, scale, zero_point = rtn(linear.weight.detach(), bits, -1)
        return QuantLinear.affine(q, scale, zero_point, bits, -1)
    copy = model.LLaMA(m.config)
    copy.load_state_dict(m.state_dict())
    return copy.eval().replace_linears(make)

# ---- One token ----------------------------------------------------------------------------------

@pytest.mark.parametrize("distance", [3.0, 0.3, 0.01])
def test_differences_are_the_closed_form_of_each_token(distance):
    base, ours, targets = random_logits(200, 37, distance)
    found = found_in(base, ours, targets)
    p = softmax64(base)
    q = softmax64(ours)
    for i, y in enumerate(targets.tolist()):
        kl = sum(p[i, v] * math.log(p[i, v] / q[i, v]) for v in range(37))
        assert found.kl[i].item() == pytest.approx(kl, rel=1e-4, abs=2e-6)
        assert found.same[i].item() == (p[i].argmax() == q[i].argmax())
        assert found.prob[i].item() == pytest.approx(q[i, y] - p[i, y], abs=1e-6)
        assert found.loss[i].item() == pytest.approx(math.log(p[i, y] / q[i, y]), abs=5e-6)

def test_two_tokens_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2. The other token has q = p."""
    base = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    ours = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log()
    found = found_in(base, ours, torch.tensor([1, 1]))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.kl.tolist() == pytest.approx([kl, 0], abs=1e-7)
    assert found.same.tolist() == [1, 1]
    assert found.prob.tolist() == pytest.approx([0.25, 0], abs=1e-7)
    assert found.loss.tolist() == pytest.approx([-math.log(2), 0], abs=1e-7)

    # Two windows of one token each: the error of a mean of a and 0 is a / 2.
    s = statistics(found, 1)
    assert s["kl"] == pytest.approx(kl / 2, abs=1e-7)
    assert s["kl_error"] == pytest.approx(kl / 2, abs=1e-7)
    assert s["same_top"] == 100 and s["same_top_error"] == 0
    assert s["rms_prob"] == pytest.approx(100 * 0.25 / math.sqrt(2), abs=1e-5)
    assert s["loss_gap_error"] == pytest.approx(math.log(2) / 2, abs=1e-7)

def test_the_divergence_is_from_the_base_to_the_model():
    """A model that rules out what the base finds possible is far away; the other way it is not."""
    unsure = torch.zeros(1, 2)
    sure = torch.tensor([[20.0, 0.0]])
    y = torch.tensor([0])
    assert found_in(unsure, sure, y).kl.item() == pytest.approx(10 - math.log(2), abs=1e-5)
    assert found_in(sure, unsure, y).kl.item() == pytest.approx(math.log(2), abs=1e-5)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_differ_by_exactly_nothing(dtype):
    base = (30 * torch.randn(50, 1000)).to(dtype)
    found = found_in(base, base.clone(), torch.randint(1000, (50,)))
    assert not found.kl.any() and not found.prob.any() and not found.loss.any()
    assert found.same.all()

# ---- A text -------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [96, 100])               # the last window is whole, or has 4 tokens
def test_statistics_are_those_of_the_tokens(n):
    found = found_in(*random_logits(n, 11, 0.5))
    s = statistics(found, 8)
    kl, same, prob, loss = (x.double().numpy() for x in found)
    in_order = np.sort(kl)
    assert s["kl"] == pytest.approx(sum(kl) / n)
    assert s["kl_median"] == pytest.approx((in_order[n // 2 - 1] + in_order[n // 2]) / 2)
    assert in_order[int(0.99 * (n - 1))] <= s["kl_99"] <= in_order[int(0.99 * (n - 1)) + 1]
    assert s["kl_max"] == in_order[-1]
    assert s["same_top"] == pytest.approx(100 * sum(same) / n)
    assert s["rms_prob"] == pytest.approx(100 * math.sqrt(sum(prob**2) / n))
    assert s["loss_gap"] == pytest.approx(sum(loss) / n)
    for name, values, factor in (("kl", kl, 1), ("same_top", same, 100), ("loss_gap", loss, 1)):
        squares = 0
        windows = [values[i:i + 8] for i in range(0, n, 8)]
        for window in windows:
            squares += (window.sum() - len(window) * values.mean()) ** 2
        error = math.sqrt(squares * len(windows) / (len(windows) - 1)) / n
        assert s[f"{name}_error"] == pytest.approx(factor * error)

def test_the_error_of_equal_windows_is_that_of_their_means():
    values = np.random.default_rng(0).normal(size=(40, 16))
    means = values.mean(1)
    error = standard_error(values.flatten(), 16)
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(40))

def test_the_error_is_as_large_as_means_really_scatter():
    """Tokens of one window share a part: as if independent, the error would be too small."""
    rng = np.random.default_rng(0)
    means = []
    errors = []
    naive = []
    for _ in range(300):
        values = (rng.normal(size=(50, 1)) + rng.normal(size=(50, 16))).flatten()
        means.append(values.mean())
        errors.append(standard_error(values, 16))
        naive.append(values.std() / math.sqrt(values.size))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(naive) < 0.5 * np.std(means)

def test_the_paired_error_is_smaller_than_that_of_two_losses():
    base, ours, y = random_logits(640, 37, 0.1)
    paired = statistics(found_in(base, ours, y), 16)["loss_gap_error"]
    unpaired = math.hypot(*(standard_error(F.cross_entropy(x, y, reduction="none").numpy(), 16)
                            for x in (base, ours)))
    assert paired < unpaired / 5

def test_one_window_has_no_error():
    assert math.isnan(standard_error(np.ones(5), 8))

# ---- Two models ---------------------------------------------------------------------------------

def test_the_comparison_is_that_of_all_logits_at_once():
    base = tiny(0)
    packed = rounded(base, 3)
    tokens = np.random.default_rng(0).integers(61, size=16 * 9 + 6)
    found = compare(base, packed, tokens, 16)

    # Window by window, whole logits.
    parts = []
    for i in range(0, len(tokens) - 1, 16):
        y = torch.from_numpy(tokens[i + 1:i + 17])
        x = torch.from_numpy(tokens[i:i + len(y)])[None]
        with torch.no_grad():
            parts.append(torch.stack(found_in(base(x)[0][0], packed(x)[0][0], y)))
    expected = statistics(Differences(*torch.cat(parts, 1)), 16)
    assert expected["kl"] > 0.001
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name

@pytest.mark.parametrize("batch_size, at_once", [(1, 256), (4, 256), (None, 7), (3, 20)])
def test_windows_and_tokens_at_a_time_do_not_matter(batch_size, at_once, monkeypatch):
    base = tiny(0)
    packed = rounded(base, 3)
    tokens = np.random.default_rng(1).integers(61, size=16 * 9 + 6)
    expected = compare(base, packed, tokens, 16)
    monkeypatch.setattr(model.LLaMA, "tokens_at_once", lambda self: at_once)
    found = compare(base, packed, tokens, 16, batch_size=batch_size)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name

@pytest.mark.parametrize("at_once", [7, 256])
def test_the_loss_is_that_of_evaluate_to_the_last_bit(at_once, monkeypatch):
    base = tiny(0)
    packed = rounded(base, 3)
    tokens = np.random.default_rng(2).integers(61, size=16 * 9 + 6)
    monkeypatch.setattr(model.LLaMA, "tokens_at_once", lambda self: at_once)
    found = compare(base, packed, tokens, 16)
    scores = evaluate(packed, tokens, 16)
    assert {name: found[name] for name in scores} == scores
    gap = scores["loss"] - evaluate(base, tokens, 16)["loss"]
    assert found["loss_gap"] == pytest.approx(gap, abs=1e-6)

@pytest.mark.parametrize("n", [16 * 9 + 6, 2**13 + 40])    # one batch of windows, and several
def test_outputs_of_the_base_that_evaluate_kept_serve_as_well(n, monkeypatch):
    base = tiny(0)
    packed = rounded(base, 3)
    tokens = np.random.default_rng(2).integers(61, size=n)
    kept = []
    assert evaluate(base, tokens, 16, keep=kept) == evaluate(base, tokens, 16)
    assert sum(x.shape[:2].numel() for x in kept) == n - 1
    expected = compare(base, packed, tokens, 16)
    blocks = []
    base.blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    assert compare(base, packed, tokens, 16, base_outputs=kept) == expected and not blocks

    # Too many are not kept; `compare` then computes them, as without a list.
    monkeypatch.setattr(nanobit.train, "KEPT", n * 32 * 4 - 1)
    kept = []
    assert evaluate(base, tokens, 16, keep=kept)["loss"] > 0 and kept == []
    assert compare(base, packed, tokens, 16, base_outputs=kept) == expected and blocks

def test_never_more_logits_than_asked_for(monkeypatch):
    base = tiny(0)
    seen = []
    base.head.register_forward_hook(lambda _, inputs, out: seen.append(out.numel() // 61))
    monkeypatch.setattr(model.LLaMA, "tokens_at_once", lambda self: 20)
    compare(base, base, np.arange(150) % 61, 16)
    assert max(seen) == 20 and sum(seen) == 2 * 149

def test_a_model_against_itself():
    m = tiny(0)
    s = compare(m, m, np.arange(150) % 61, 16)
    zeros = [name for name in s if name.startswith(("kl", "rms", "loss_gap"))]
    assert len(zeros) == 8 and all(s[name] == 0 for name in zeros)
    assert s["same_top"] == 100 and s["same_top_error"] == 0

# ---- The command line, and the rows ------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base.pt, w3.pt rounded from it, and models that cannot be compared with it."""
    path = tmp_path_factory.mktemp("against")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(path / "cache"))
        m.chdir(path)
        data = random_base(path, 1)
        base, content = nanobit.checkpoint.load_checkpoint("base.pt")
        keep = {k: content[k] for k in ("method", "settings", "tokenizer", "data")}
        save = nanobit.checkpoint.save_checkpoint
        save("w3.pt", rounded(base, 3), **keep | {"method": "rtn"})
        vocab = base.config.vocab_size
        larger = model.LLaMA(model.LlamaConfig(vocab + 1, 1, 32, 4, 4, 48, 32))
        save("vocab.pt", larger, **keep)
        (path / "other.txt").write_text(TEXT.replace("return", "yield"))
        other = nanobit.data.load_data(str(path / "other.txt"), "300", 32)
        assert other.tokenizer.n_vocab == vocab
        save("tokenizer.pt", base, **keep | {"tokenizer": other.spec})
        yield path, data

def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder[0] / "cache"))

def test_a_packed_file_against_its_base(folder, capsys, monkeypatch):
    in_folder(folder, monkeypatch)
    _, alone, _ = call(capsys, "model.py eval w3.pt")
    status, out, err = call(capsys, "model.py eval w3.pt --against base.pt")
    assert status == 0, err
    assert out.startswith(alone)                       # the same line, and then the comparison

    base, _ = nanobit.checkpoint.load_checkpoint("base.pt")
    packed, _ = nanobit.checkpoint.load_checkpoint("w3.pt")
    s = compare(base, packed, folder[1].val, 32)
    assert s["kl"] > 0
    for name in ("kl", "kl_error", "kl_median"):
        assert f"{s[name]:.5f}" in out
    assert f"{s['same_top']:.2f} ± {s['same_top_error']:.2f} %" in out
    assert f"{s['loss_gap']:+.5f} ± {s['loss_gap_error']:.5f}" in out

def test_a_file_against_itself(folder, capsys, monkeypatch):
    in_folder(folder, monkeypatch)
    _, out, _ = call(capsys, "model.py eval w3.pt --against w3.pt")
    assert "0.00000 ± 0.00000 nats/token | median 0.00000 | 99 % 0.0000 | max 0.000" in out
    assert "100.00 ± 0.00 %" in out and "+0.00000 ± 0.00000" in out

@pytest.mark.parametrize("base, names", [
    ("nowhere.pt", ["nowhere.pt"]), ("text.txt", ["text.txt"]),
    ("vocab.pt", ["--against vocab.pt", "w3.pt", "give"]),
    ("tokenizer.pt", ["--against tokenizer.pt", "tokenizer", "w3.pt", "give"])])
def test_what_cannot_be_compared_is_refused(base, names, folder, capsys, monkeypatch):
    in_folder(folder, monkeypatch)
    check_refused(call(capsys, f"model.py eval w3.pt --against {base}"), *names)

@pytest.mark.parametrize("command, file", [
    ("normtweak.py --bits 3 --host rtn --steps 4 --calib data", "out/rtn-tweak-w3.pt"),
    ("lrqat.py --bits 3 --arm lr-qat --steps 2 --batch-size 2 --rank 4", "out/lrqat-w3-lr-qat.pt"),
    ("pvtune.py --scheme affine --bits 3 --variant p --steps 2 --batch-size 2",
     "out/pvtune-affine-w3.pt")])
def test_rows_say_how_far_each_arm_is_from_the_dense_base(command, file, folder, capsys,
                                                          monkeypatch):
    in_folder(folder, monkeypatch)
    status, out, err = call(capsys, f"{command} --model base.pt --out out --eval-every 0")
    assert status == 0, err
    row = json.loads(out.splitlines()[-1])
    for name, arm in row["arms"].items():
        if name == "dense":
            assert arm["kl"] is None and arm["same_top"] is None
        else:
            assert arm["kl"] > 0 and 0 < arm["same_top"] <= 100

    # The row's own numbers are those of the file that was written.
    base, _ = nanobit.checkpoint.load_checkpoint("base.pt")
    packed, _ = nanobit.checkpoint.load_checkpoint(file)
    s = compare(base, packed, folder[1].val, 32)
    assert row["kl"] == pytest.approx(s["kl"], abs=1e-6)
    assert row["same_top"] == pytest.approx(s["same_top"], abs=1e-6)

    # The table has a column for it, and a dash where there is nothing to compare.
    last = list(row["arms"])[-1]
    assert "|     KL |" in out and re.search(r"^dense +\|.* - \|", out, re.M)
    assert f"| {row['arms'][last]['kl']:.4f} |" in out
