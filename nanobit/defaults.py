"""Settings that nobody gave, from the model that was given: one rule for each method.

  1. `window` gives --seq-len: the model's own window, but at most 512 tokens. nanobit/runs.py
     asks for it when it opens the model.
  2. `suit_calibration` gives normtweak.py's --host and --steps, `group_of` the --group-size of all.
  3. `suit` sets --steps, --batch-size and --lr by RULES, for the scripts that start from a dense
     model. What starts from random weights has its settings in model.py's PRESETS.

The rates follow small searches on the tiny base (2.5M weights in its linears, windows of 128
tokens) and on SmolLM2-135M (106M, windows of 512, groups of 64). The dev loss was looked at, for
QuEST also the divergence from the dense model. The docstring of each rate lists what was tried. A
chosen rate may lie between two of those. A model of 30M (groups of 128) was tried afterwards, with
LR-QAT, full QAT and PV-Tuning: the rates here were within 0.006 nats of the best of two or three.
"""
import math
from typing import Callable, NamedTuple

import torch

from nanobit.ranks import world_size

WINDOW = 512                     # tokens
LARGE = 10_000_000               # weights in the linears; from so many on, a model counts as large

def window(longest):
    """Tokens of a window for a model whose own window has `longest`. A model of the hub has 2,048
    or more. 512 are enough to compare methods by, and cost a quarter of the time."""
    return min(longest, WINDOW)

def is_large(model):
    return sum(linear.weight.numel() for _, linear in model.linears()) >= LARGE

def suit_calibration(args, model):
    """Set normtweak.py's --host and --steps, its calibration windows, where they are not given:
    None and 0. Both hosts and 64 windows, where that is quick. A large model without a GPU gets
    GPTQ alone and 32: on two CPU cores SmolLM2-135M then takes 15 minutes, half of them for
    scores."""
    slow = torch.device(args.device).type == "cpu" and is_large(model)
    if not args.teacher:                               # else the codes exist already
        args.host = args.host or ("gptq" if slow else "both")
    args.steps = args.steps or (32 if slow else 64)

GROUP = 128                      # inputs that share a scale: the usual size

def group_of(model):
    """--group-size. Small models get a scale a row. Large ones get groups, of GROUP inputs or of as
    many below it as divide the inputs of every linear: 64 for SmolLM2-135M."""
    if not is_large(model):
        return -1
    g = math.gcd(GROUP, *[linear.in_features for _, linear in model.linears()])
    return g if g >= 32 else -1                        # below 32 scales take half a bit a weight

class Rule(NamedTuple):
    """How long to train, and at which peak rate."""
    small_steps: int
    large_steps: int
    rate: Callable               # (bits, is_large) -> --lr; a rule may ignore either

def lrqat_rate(bits, is_large):
    """The rate of LR-QAT's adapters A and B. Dev loss of SmolLM2 at three rates:

             3e-3   1e-2   3e-2
    2 bits  3.876  3.632  3.961
    3 bits  2.909  2.863  2.918
    4 bits  2.726  2.721      -

    On the tiny base with 2 bits, 1e-2 and 3e-2 are level: 3.0245 and 3.0237.
    """
    return 1e-2

def weight_rate(lr, weights):
    """The rate of full QAT's weights, a list of tensors: half of --lr, times their root mean
    square. AdamW moves a weight by about the rate in a step, however large it is, and models
    differ: that root is 0.028 on the tiny base and 0.193 on SmolLM2. Dev loss at several rates of
    the weights, each divided by it; --lr, by which the scales learn too, was 1e-2, and so the half
    of it is the column 0.005:

                      0.0016   0.005   0.011   0.016   0.036    0.11
    tiny, 2 bits           -   3.025   3.023       -   3.030   3.072
    SmolLM2, 2 bits    3.898   3.260       -   3.248       -       -
             3 bits    2.830   2.778       -   2.911       -       -
             4 bits    2.692   2.684       -   2.824       -       -
    """
    total = sum(w.square().sum() for w in weights)
    count = sum(w.numel() for w in weights)
    return 0.5 * lr * (total / count).sqrt().item()

def pv_rate(bits, is_large):
    """The rate of PV-Tuning's P half, which trains all that is continuous, relative to a tensor's
    norm. It halves with each bit, because the rounding error halves. Dev loss of SmolLM2, P only,
    on a grid:

             3e-4   1e-3  1.5e-3   3e-3
    2 bits  3.462  3.170       -  3.073
    3 bits  2.791  2.740   2.733  2.745
    4 bits  2.692  2.684       -  2.700

    With 4 bits the rule gives 7.5e-4, between two that were tried. On the tiny base 6e-3 was best
    with 2 bits.
    """
    return (3e-3 if is_large else 6e-3) * 2.0 ** (2 - bits)

def quest_rate(bits, is_large):
    """The rate of QuEST from a dense model. With 4 bits, 1e-4, 3e-4 and 1e-3 gave SmolLM2 a dev
    loss of 2.901, 2.838 and 2.828, but the divergence from the dense model was least at 3e-4. So
    5e-4 stands between the two. With 8 bits the divergence was least at 1e-4."""
    return 5e-4 if bits <= 4 else 1e-4

RULES = {
    "lrqat": Rule(80, 120, lrqat_rate),
    "pvtune": Rule(70, 120, pv_rate),
    "quest": Rule(100, 120, quest_rate),
}
# Tokens of a training step.
TOKENS = 2048                    # small models: 16 windows of 128
LARGE_TOKENS = 4096              # large models: 8 windows of 512

# A script gives its flags these defaults where the model decides. The first three are set by
# `suit`; seq_len is set before that, when the model is opened.
UNSET = {"steps": 0, "batch_size": 0, "lr": 0.0, "seq_len": 0}

def suit(args, model, method, bits):
    """Set --steps, --batch-size and --lr where they are still 0, that is, not given. The script
    trains from the dense `model`. args.seq_len has to be set already."""
    large = is_large(model)

    # Steps and rate, by the method's rule.
    rule = RULES[method]
    args.steps = args.steps or (rule.large_steps if large else rule.small_steps)
    args.lr = args.lr or rule.rate(bits, large)

    # About so many tokens a step. The batch is a multiple of the micro-batches and of the ranks, so
    # that each gets an equal part.
    if not args.batch_size:
        windows = max(1, (LARGE_TOKENS if large else TOKENS) // args.seq_len)
        parts = math.lcm(args.accumulate, world_size())
        args.batch_size = math.ceil(windows / parts) * parts
