"""How far a model is from the one it was made from: both read the same windows of text.

  1. `differences` compares what two models predict for each token: pure mathematics.
  2. `statistics` makes means, quantiles and standard errors of that.
  3. `compare` does both for a whole text, and is `evaluate` too.

A loss alone says less. On one text two models' losses rise and fall together, so the difference,
token by token, is known far better than either loss. And a model can lose nothing on average while
it predicts other tokens: the KL divergence and the most likely token tell.

Every ± is a standard error of a mean over the text, with windows as its units, since the tokens of
one window are correlated. Neighbouring windows often come from one file and are correlated too;
that it leaves out, and so is somewhat too small.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import UsageError
from nanobit.ranks import progress
from nanobit.train import ValWindows, scores_of

class Differences(NamedTuple):
    """What `differences` says of each token."""
    kl: torch.Tensor             # KL(base || model) in nats
    same: torch.Tensor           # 1 where both find the same token most likely, else 0
    prob: torch.Tensor           # probability of the right token: the model's minus the base's
    loss: torch.Tensor           # loss in nats: the model's minus the base's

def differences(log_p, log_q, targets):
    """Log-probabilities (n, vocab) of the base, p, and of the model, q, and targets (n,) ->
    Differences of (n,) each, float32."""
    kl = log_p.exp().mul_(log_p - log_q).sum(-1)       # of equal predictions exactly 0
    same = log_p.argmax(-1) == log_q.argmax(-1)

    # The right token, under both.
    right = targets[:, None]
    log_p_right = log_p.gather(1, right)[:, 0]                             # (n,)
    log_q_right = log_q.gather(1, right)[:, 0]                             # (n,)
    return Differences(kl, same.float(), log_q_right.exp() - log_p_right.exp(),
                       log_p_right - log_q_right)

def standard_error(values, seq_len):
    """The standard error of the mean of values (n,), one for each token of consecutive windows. The
    last window may be shorter than seq_len. NaN where there is only one window."""
    # How far each window's sum is from what it would be if all tokens had the mean. With W windows
    # of one length this is the standard deviation of their means over the root of W.
    starts = np.arange(0, len(values), seq_len)
    sums = np.add.reduceat(values - values.mean(), starts)                 # (W,)
    W = len(starts)
    if W == 1:
        return float("nan")
    return float(np.sqrt(W / (W - 1) * np.square(sums).sum()) / len(values))

def statistics(found, seq_len):
    """Differences of all tokens, in the order of the text -> {name: float}. *_error: the standard
    error. KL and losses are in nats per token, same_top is in percent, rms_prob in percentage
    points."""
    kl, same, prob, loss = [x.cpu().double().numpy() for x in found]
    return {"kl": float(kl.mean()), "kl_error": standard_error(kl, seq_len),
            "kl_median": float(np.median(kl)), "kl_99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "same_top": 100 * float(same.mean()),
            "same_top_error": 100 * standard_error(same, seq_len),
            "rms_prob": 100 * float(np.sqrt(np.square(prob).mean())),
            "loss_gap": float(loss.mean()), "loss_gap_error": standard_error(loss, seq_len)}

@torch.no_grad()
@torch.compiler.set_stance("force_eager")              # as in `evaluate`
def compare(base, model, tokens, seq_len, tokenizer=None, batch_size=None, base_outputs=None):
    """What `evaluate` returns of the model, bit for bit, and the `statistics` of its distance from
    the base, in one pass over the windows. Both models have one vocabulary and one device.

    base_outputs: the base's last block's outputs, for each batch of windows in order, where
    `evaluate` of these tokens has kept them; otherwise they are computed here.

    It takes twice the time of `evaluate`: a pass of the base, one of the model, and a little for
    the softmaxes. With base_outputs the first is the base's head alone. Of logits it holds those of
    2^26 / vocab tokens of both, with as much again for their softmaxes and the divergence, some
    1.5 GB; of each token it keeps four numbers.
    """
    windows = ValWindows(model, tokens, seq_len, batch_size)
    n = model.tokens_at_once()
    total = 0.0
    found = []
    for i, part in enumerate(progress(windows.parts, "comparing")):
        # Both models, up to their heads.
        ids, targets = windows.batch(part)
        base_x = base_outputs[i] if base_outputs else base.trunk(ids)
        base_x = base_x.flatten(0, 1).split(n)                             # parts of (n, C)
        model_x = model.trunk(ids).flatten(0, 1).split(n)
        y_parts = targets.flatten().split(n)                               # parts of (n,)

        # Their predictions for n tokens at a time. The loss is summed in the order of
        # LLaMA.loss_in_parts, which `evaluate` calls; cross_entropy takes the same two steps.
        loss = 0
        for x_base, x, y in zip(base_x, model_x, y_parts):
            log_p = log_probabilities(base, x_base)                        # (n, vocab)
            log_q = log_probabilities(model, x)
            loss = loss + F.nll_loss(log_q, y, reduction="sum")
            found.append(torch.stack(differences(log_p, log_q, y)))        # (4, n)

        # As `evaluate` does, a mean and back: the same rounding, bit for bit.
        total += (loss / targets.numel()).item() * targets.numel()

    # One Differences of the whole text, from rows in the order of its fields.
    whole = Differences(*torch.cat(found, dim=1))
    return scores_of(total, tokens, tokenizer) | statistics(whole, seq_len)

def log_probabilities(model, x):
    """Of the tokens that come next, where the last block's outputs are x (n, C): (n, vocab)."""
    logits, _ = model.predict(x[None])                                     # (1, n, vocab)
    return F.log_softmax(logits[0].float(), -1)

def check_same_tokens(model, tokenizer, name, other, other_tokenizer, other_name, fix):
    """Raise UsageError where two models do not predict the same tokens: `name` and `other_name` are
    what the sentence calls them, and `fix` is its end."""
    ours = model.config.vocab_size
    theirs = other.config.vocab_size
    if theirs != ours:
        raise UsageError(f"{other_name} predicts {theirs} tokens, and {name} {ours}: {fix}")
    if other_tokenizer != tokenizer:
        raise UsageError(f"{other_name} has another tokenizer of {theirs} tokens than {name}: "
                         f"{fix}")

def show_comparison(scores, path):
    """The lines that `model.py eval --against` prints below the loss."""
    s = scores
    return "\n".join([
        f"against {path}, window by window; ±: standard error, windows as units",
        f"  KL divergence      {s['kl']:.5f} ± {s['kl_error']:.5f} nats/token | median "
        f"{s['kl_median']:.5f} | 99 % {s['kl_99']:.4f} | max {s['kl_max']:.3f}",
        f"  same top token     {s['same_top']:.2f} ± {s['same_top_error']:.2f} %",
        f"  right token        probability changed by {s['rms_prob']:.2f} percentage points (RMS)",
        f"  loss difference    {s['loss_gap']:+.5f} ± {s['loss_gap_error']:.5f} nats/token"])
