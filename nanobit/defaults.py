"""Settings that nobody gave, from the model that was given: one rule for each method.

  1. `window` is the length of a window where a model's own is long.
  2. `suit` sets --steps, --batch-size and --lr by RULES, for the scripts that start from a dense
     model. What starts from random weights has its settings in model.py's PRESETS.

Every rate was chosen by dev loss in small searches: on the tiny base (2.5M weights in its linears,
windows of 128 tokens) and on SmolLM2-135M (106M, windows of 512, groups of 64). The function of
each rate says what was found; what it does not name was not tried. Sizes between the two were not
searched.
"""
import math
from typing import Callable, NamedTuple

from nanobit.ranks import world_size

WINDOW = 512                     # tokens
LARGE = 10_000_000               # weights in the linears, from which a model is like SmolLM2-135M

def window(longest):
    """Tokens of a window for a model whose own window has `longest`. A model of the hub has 2,048
    or more. 512 are enough to compare methods by, and cost a quarter of the time."""
    return min(longest, WINDOW)

class Rule(NamedTuple):
    """How long to train, and at which peak rate."""
    steps: int                   # of a small model
    large_steps: int
    rate: Callable               # (bits, is_large) -> --lr

def lrqat_rate(bits, is_large):
    """The rate of A and B. At 3e-3, 1e-2 and 3e-2 the dev loss of SmolLM2 was 3.876, 3.632 and
    3.961 with 2 bits, 2.909, 2.863 and 2.918 with 3 bits, and with 4 bits 2.726 and 2.721 at the
    first two. The tiny base does not tell the last two apart: 3.0245 and 3.0237 with 2 bits."""
    return 1e-2

def pv_rate(bits, is_large):
    """The rate of the P half, relative to a tensor's norm. It halves with each bit, as the error
    that is there to repair does. At 3e-4, 1e-3 and 3e-3 the dev loss of SmolLM2, P only on a grid,
    was 3.462, 3.170 and 3.073 with 2 bits, 2.791, 2.740 and 2.745 with 3, 2.692, 2.684 and 2.700
    with 4; with 3 bits and 1.5e-3 it was 2.733. On the tiny base 6e-3 was best for 2 bits."""
    return (3e-3 if is_large else 6e-3) * 2.0 ** (2 - bits)

def quest_rate(bits, is_large):
    """The rate of a dense model that is trained further with rounded weights and activations. At
    1e-4, 3e-4 and 1e-3 the dev loss of SmolLM2 was 2.901, 2.838 and 2.828 with 4 bits, where
    the divergence from the dense model was least at 3e-4; with 8 bits it was least at 1e-4."""
    return 5e-4 if bits <= 4 else 1e-4

RULES = {
    "lrqat": Rule(80, 120, lrqat_rate),
    "pvtune": Rule(70, 120, pv_rate),
    "quest": Rule(100, 120, quest_rate),
}
TOKENS = 2048                    # a step, of a small model: 16 windows of 128
LARGE_TOKENS = 4096              # 8 windows of 512

# What a script sets these flags to, where the rule of its method shall choose.
UNSET = {"steps": 0, "batch_size": 0, "lr": 0.0, "seq_len": 0}

def suit(args, model, method, bits):
    """Set --steps, --batch-size and --lr of a script that trains from the dense `model`, where they
    were not given, which is 0."""
    weights = sum(linear.weight.numel() for _, linear in model.linears())
    is_large = weights >= LARGE
    rule = RULES[method]
    args.steps = args.steps or (rule.large_steps if is_large else rule.steps)
    args.lr = args.lr or rule.rate(bits, is_large)

    # A batch can be cut into equal parts, and shared out to all ranks.
    if not args.batch_size:
        windows = max(1, (LARGE_TOKENS if is_large else TOKENS) // args.seq_len)
        parts = math.lcm(args.accumulate, world_size())
        args.batch_size = math.ceil(windows / parts) * parts
