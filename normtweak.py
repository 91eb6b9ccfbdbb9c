"""Norm Tweaking: repair a quantized LLaMA by retraining nothing but its norms' weights.

    python normtweak.py --bits 2                # RTN and GPTQ, without and with the tweak: 40 s on
                                                # two CPU cores once out/base.pt exists
    python normtweak.py --bits 2 --smoke        # the same on little text, in a few seconds
    python normtweak.py --bits 4 --a-bits 8     # activations too, with SmoothQuant folded in
    python normtweak.py --model out/gptq-w2.pt --teacher out/base.pt    # codes that exist already
    python normtweak.py --model DIR --bits 3    # a Hugging Face folder, of which one
                                                # block at a time is copied to float32

The idea:
  1. The float model writes its own calibration text: a frequent first token, a few greedy ones,
     then samples up to full length.
  2. Quantize block after block, by round to nearest or by GPTQ. That shifts mean and spread of
     the channels of a block's output.
  3. Before the next block, train this block's two norm weights by Adam, one pass, so that mean
     and variance of every channel match the float block's on the same input. Codes and scales do
     not move, and the norms stay float32: the result is as small and as fast as before.
  4. Ours: train on three quarters of the windows, at three rates. On the last quarter, the held-out
     windows, pick the rate with which the block's outputs come closest to the float block's. Keep
     that tweak if the model's predictions, all later blocks being dense, come closer too.

The symbols:
  gamma      a norm's weight, (C,): all that is ever trained
  windows    the inputs of a block, a list of N / B batches (B, T, C); B is 1 unless --batch-size
             is given. They come from the quantized blocks before: the quantized stream
  targets    what the float block makes of the same windows
  f, q       one batch's output, of the float block and of the quantized one
  host       the method that quantizes: "rtn" (round to nearest) or "gptq"
  tables     cos and sin of the positions, (T, hs) each, hs the head size; every block takes them

Shapes: N windows of T tokens, B of them a step; C channels, in a linear's shapes its inputs;
O outputs of a linear; L blocks.

Paper: Norm Tweaking, Li et al. 2024 (arXiv 2309.02784). There is no official release; the authors'
scripts, from which the choice `--loss code` comes, are not complete. Hosts: GPTQ (2210.17323),
SmoothQuant (2211.10438). Generating from a start token is LLM-QAT's (2305.17888). As in the paper,
a block corrects its own error only, not what earlier blocks did. Not here: LayerNorm.

Where ours differs from the paper: first tokens are frequent tokens, the paper's are tokens of
frequent languages; the learning rate is larger, since the windows are fewer and shorter; GPTQ
rounds from left to right unless --act-order is given; SmoothQuant measures
max|x| of each channel on the quantized stream, not on the float model's; calibration runs in
float32; held-out windows choose a rate for each block, or no tweak at all, unless --keep-all is
given; these rates are in proportion to the norms' mean weights; --solver closed is not in the
paper.
"""
import copy
import functools
import os
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UsageError
from nanobit.checkpoint import load_checkpoint
from nanobit.cli import add_flags, number, Parser, resolve, run
from nanobit.compare import check_same_tokens
from nanobit.data import batch
from nanobit.defaults import UNSET, suit_calibration
from nanobit.distill import divergence_of_heads
from nanobit.ranks import progress, say
from nanobit.runs import (arm_row, definite_hessian, finish, header, keep_model, load_base, score,
                          suit_groups, through_the_file)
from nanobit.selftext import own_text
from nanobit.train import kl_loss
from quantizers import (QuantLinear, bits_per_weight, collect_hessians, dequantize,
                        fake_quant_tokens, full_float32, gptq, output_error, rtn)

# ---- The method, as the paper writes it (algorithm 1) -----------------------------------------

# The linears of a block as a token meets them; those of one line share an input.
QKV = ("attn.wk", "attn.wv", "attn.wq")
UP_GATE = ("mlp.w_up", "mlp.w_gate")
ORDER = (QKV, ("attn.wo",), UP_GATE, ("mlp.w_down",))

class Norm(NamedTuple):
    """One of a block's two norms, and the linears that read its output."""
    name: str
    linears: tuple

NORMS = (Norm("attn_norm", QKV), Norm("mlp_norm", UP_GATE))

LR_SCALE = 1.0                # block i of L is trained at lr * (1 + LR_SCALE * i / L)

def channel_loss(f, q):
    """f, q (B, T, C) -> how far the channels' means and variances over tokens differ.

    Rounding shifts and stretches whole channels. This loss sees that and no more: an
    elementwise error would be dominated by the few largest channels, and would tempt the
    norms to memorize the calibration text.
    """
    f = f.flatten(0, -2)                                               # (B T, C)
    q = q.flatten(0, -2)
    means = (f.mean(0) - q.mean(0)).abs()                              # (C,)
    variances = (f.var(0) - q.var(0)).abs()
    return (means + variances).mean()

@torch.enable_grad()                                   # compress switches gradients off
def tweak_by_adam(block, windows, targets, tables, loss, rates):
    """Train the two norms' weights, each at its rate, so that the block's outputs come close to
    the targets.

    The norms alone: their weights are floats in any case, so codes and scales stay what
    they are and inference costs nothing more. A norm scales what the block's linears
    read, and moves the output's means and variances only through them: C knobs per norm,
    and no exact fix. But 2 C numbers can hardly overfit, so that little text suffices.
    """
    gammas = [block.attn_norm.weight, block.mlp_norm.weight]
    for gamma in gammas:
        gamma.requires_grad_(True)

    # A fresh Adam, because another block's moments do not apply. It also makes the size of
    # the loss unimportant: a step is about the rate in any case.
    groups = [{"params": [gamma], "lr": rate} for gamma, rate in zip(gammas, rates)]
    optimizer = torch.optim.Adam(groups)

    # One pass, a step per batch. The paper found that more passes hurt: the loss keeps
    # falling, but the norms begin to fit the calibration text.
    for x, target in zip(windows, targets):
        loss(target, block(x, *tables)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for gamma in gammas:
        gamma.requires_grad_(False)

def block_rate(lr, i, L):
    """The learning rate of block i of L. It grows: errors pile up in the stream, and the
    later the block, the further its inputs are from those that its norms were trained on.
    That is the paper's argument for the rule; it is not derived from the loss."""
    return lr * (1 + LR_SCALE * i / L)

def norm_tweaking(model, ids, quantize, lr, loss=channel_loss):
    """Quantize and tweak a LLaMA in place, on calibration text ids (N, T).

    This is for reading; the commands run compress, below, and a test holds it to this.
    quantize(block, windows, tables) rounds the linears of a block in place, for example
    lambda block, windows, tables: round_block(block, bits=2).
    """
    model.requires_grad_(False)
    tables = model.rope(ids)
    windows = model.embed(ids).split(1)                                # N of (1, T, C)
    L = len(model.blocks)
    for i, block in enumerate(model.blocks):
        # What the float block makes of its inputs is the target. The inputs are those of
        # the quantized stream, for both: they are what this block will get in use, and
        # the difference of the outputs is then this block's own error. Its two norms can
        # repair that, but not the error that has piled up before.
        targets = [block(x, *tables) for x in windows]

        # Round the weights. From here on they are frozen.
        quantize(block, windows, tables)

        # Tweak the norms, both at one rate.
        rate = block_rate(lr, i, L)
        tweak_by_adam(block, windows, targets, tables, loss, (rate, rate))

        # The next block reads what this one computes now.
        windows = [block(x, *tables) for x in windows]

def round_block(block, bits, group_size=-1, symmetric=False):
    """The plainest host: round a block's weights to nearest, and keep them as floats."""
    for names in ORDER:
        for name in names:
            w = block.get_submodule(name).weight                       # (O, C)
            codes = rtn(w, bits, group_size, symmetric)
            w.copy_(dequantize(*codes, group_size))

# ---- The same for large models: one block in float at a time ----------------------------------
# norm_tweaking keeps all weights as floats. compress keeps the integer codes, and needs
# float32 copies of a single block. It also reports the loss, and takes a student that is
# packed already. Unless --keep-all is given, it chooses among tweaks, as the next section says.

class BlockLoss(NamedTuple):
    """The mean channel loss of one block, before and after its tweak."""
    before: float
    after: float
    kept: bool                           # False: its norms are as they were

@full_float32()                                        # no TF32
@torch.no_grad()
def compress(student, teacher, ids, args, host=None, tweak=True):
    """Quantize `student` block by block, in place, and tweak its norms.

    teacher: the dense model. The student is a copy of it, still to be quantized, or (host
    None) was quantized from it earlier. host: "rtn" or "gptq". Returns a BlockLoss for
    each block. One block at a time has float32 copies: the others stay as the teacher stores
    them, or are packed. Of a finished block the norms stay float32; like all norms they
    return the dtype of their input.
    """
    # The stream is float32, also where the model runs in bfloat16: the tweak is about small
    # differences of outputs.
    losses = []
    L = len(student.blocks)
    tables = student.rope(ids)
    windows = student.embed(ids).float().split(args.batch_size)        # (B, T, C) each
    if tweak and not args.keep_all:                    # then held-out windows decide
        dense_windows = held_out(teacher.embed(ids).float().split(args.batch_size))
        wanted = read_by_head(teacher, 0, dense_windows, tables)       # (n, C)
    for i in progress(range(L), f"{arm_name(host, tweak)}: block"):
        # The float32 copies: one to be quantized, and one to compare it with.
        block = float_copy(student.blocks[i])
        float_block = float_copy(teacher.blocks[i])

        # The float block on the quantized stream.
        targets = [float_block(x, *tables) for x in windows]

        # Put rounded weights into the block, still as floats.
        if host is None:
            swap(block, QuantLinear, FrozenLinear)
        else:
            if args.a_bits < 16:
                smooth(block, windows, tables, args.smooth)
            quantize_block(block, windows, tables, args, host, f"block {i + 1}/{L} | ")
        outputs = [block(x, *tables) for x in windows]
        before = mean_loss(targets, outputs)

        # Tweak, and compute the next block's inputs again, now with the final norms.
        kept = False
        if tweak:
            tweaks = possible_tweaks(block, float_block, tables, args, i, L)
            if args.keep_all:
                tweaks[0](windows, targets)
                kept = True
            else:
                judge = functools.partial(divergence_after, teacher, i, wanted, tables)
                kept = best_tweak(block, windows, targets, outputs, tables, tweaks, judge)
            if kept:
                outputs = [block(x, *tables) for x in windows]
        losses.append(BlockLoss(before, mean_loss(targets, outputs), kept))
        windows = outputs

        # Keep the codes and let go of the floats.
        swap(block, FrozenLinear, lambda linear: linear.packed)
        student.blocks[i] = block
    return losses

# Ours, not the paper's: whether a tweak stays, and at which rate. The channel loss cannot decide
# it: it sees only statistics of channels and falls in almost every block, also where the outputs
# move away from the float block's. So held-out windows decide. They answer two questions:
#
#   1. At which rate do the block's outputs come closest to the float block's? `output_distance`
#   2. With that tweak, do the model's predictions come closer to the dense model's, when all later
#      blocks are dense? `divergence_after`
#
# The second alone would do, but takes all later blocks for every rate. The first alone does not do:
# on SmolLM2-135M, rounded to nearest with 3 bits in groups of 64, it kept 28 of 30 tweaks, each of
# which brought its block closer, and the validation loss on Python's library rose from 3.06 to
# 3.13. It counts all tokens alike, and the model does not: probably a few tokens with huge channels
# reach every later block.

HELD_OUT = 4                  # the last of so many parts of the windows is held out

# Factors of a norm's rate. With a factor of 1 it is --lr, times what block_rate adds, times the
# mean absolute weight of the norm. The best product of factor and --lr depends on the block, the
# bits and the model. From 3M to 135M parameters it was between 3e-3 and 3e-2, and the optimum was
# flat.
RATES = (0.2, 1, 5)

def possible_tweaks(block, float_block, tables, args, i, L):
    """The tweaks of block i of L to choose from: functions of (windows, targets). --solver closed
    and --keep-all give one, otherwise there is one for each of RATES."""
    if args.solver == "closed":
        def solve(windows, targets):
            tweak_by_least_squares(block, float_block, windows, tables)
        return [solve]

    # The paper's rule: one rate for both norms.
    rate = block_rate(args.lr, i, L)
    rate_pairs = [(rate, rate)]                        # attn_norm's, mlp_norm's

    # Ours: three tries, each at rates in proportion to the norms' mean weights. Adam's steps are as
    # large as the rate, and the means of one model differ: those of SmolLM2-135M go from 0.03 to
    # 0.41. So --lr is the rate of a norm whose weights are 1 in the mean.
    if not args.keep_all:
        sizes = [getattr(block, norm.name).weight.abs().mean().item() for norm in NORMS]
        rate_pairs = [[factor * rate * size for size in sizes] for factor in RATES]

    tweaks = []
    for rates in rate_pairs:
        tweaks.append(functools.partial(tweak_by_adam, block, tables=tables,
                                        loss=LOSSES[args.loss], rates=rates))
    return tweaks

def held_out(windows):
    """The last quarter of the batches of windows, at least one. It is calibration text like the
    rest: the splits dev and val have no part in it."""
    return windows[len(windows) - max(1, len(windows) // HELD_OUT):]

def best_tweak(block, windows, targets, outputs, tables, tweaks, judge):
    """Apply the tweak that brings the block closest to the float one on windows that were held out
    of it, if `judge` finds the model better with it. Returns whether one was applied.

    outputs: of the block as it is now. judge: the outputs of a block on the held-out windows -> how
    bad the model is with them.
    """
    n = len(windows) - len(held_out(windows))

    # Try every tweak from the same norms. One that blew up has the error NaN, which is not below
    # any number, and is not kept.
    gammas = [block.attn_norm.weight, block.mlp_norm.weight]
    before = [gamma.clone() for gamma in gammas]
    best = None                                        # its norms; None: no tweak was better yet
    best_outputs = outputs[n:]
    least = output_distance(best_outputs, targets[n:])
    for tweak in tweaks:
        tweak(windows[:n], targets[:n])
        found = [block(x, *tables) for x in windows[n:]]
        distance = output_distance(found, targets[n:])
        if distance < least:
            best = [gamma.clone() for gamma in gammas]
            best_outputs = found
            least = distance
        restore(gammas, before)

    # Is the model better with the best of them?
    if best is None:
        return False
    without = judge(outputs[n:])
    if not judge(best_outputs) < without:
        return False
    restore(gammas, best)
    return True

def output_distance(outputs, targets):
    """How far a block's outputs are from the targets, lists of (B, T, C): the mean square of the
    difference, after each token was divided by its root mean square.

    Unlike the channel loss, this distance is zero only where every token is right up to a positive
    factor. Why divide? The norm that reads an output next does the same. Without the division, the
    few tokens whose channels are a thousand times larger would decide alone.
    """
    total = 0
    for q, f in zip(outputs, targets):
        total = total + F.mse_loss(normed(q), normed(f))
    return (total / len(targets)).item()

def normed(x):
    """Each token divided by its root mean square."""
    return F.rms_norm(x, x.shape[-1:])

EVERY = 4                     # predictions are compared at every fourth token: heads are large

def divergence_after(teacher, i, wanted, tables, outputs):
    """KL(dense model || model whose blocks after block i are dense), mean over tokens.

    outputs: of block i, a list of (B, T, C). wanted: `read_by_head` of the dense model, (n, C).
    """
    found = read_by_head(teacher, i + 1, outputs, tables)              # (n, C)
    return divergence_of_heads(teacher, teacher, found, wanted).item()

def read_by_head(teacher, first, windows, tables):
    """What the dense model's head reads if its blocks from number `first` on, counted from 0, read
    these windows: (n, C), of every fourth token."""
    found = []
    for x in windows:
        for block in teacher.blocks[first:]:
            x = block(x, *tables)                                      # (B, T, C)
        found.append(teacher.norm(x[:, ::EVERY]).flatten(0, 1))
    return torch.cat(found)

def restore(gammas, values):
    """Put the values back into the norms' weights."""
    for gamma, value in zip(gammas, values):
        gamma.copy_(value)

def arm_name(host, tweak):
    """What a host, with or without the tweak, is called in tables and file names."""
    name = host or "packed"
    return f"{name}-tweak" if tweak else name

def float_copy(block):
    block = copy.deepcopy(block).requires_grad_(False)
    for p in block.parameters():                       # packed linears have none: they stay
        p.data = p.data.float()
    return block

def mean_loss(targets, outputs):
    """The channel loss, whatever loss the tweak lowers, so that arms can be compared."""
    total = sum(channel_loss(f, q) for f, q in zip(targets, outputs))
    return (total / len(targets)).item()

class FrozenLinear(nn.Module):
    """A packed linear with its weight spelled out in floats: differentiable in its input,
    which the norms' gradients pass through, and faster than unpacking every time."""

    def __init__(self, packed):
        super().__init__()
        self.packed = packed
        self.a_bits = packed.a_bits
        self.register_buffer("weight", packed.weight())                # (O, C)

    def forward(self, x):
        x = fake_quant_tokens(x, self.a_bits)          # straight through: rounding has no slope
        return F.linear(x, self.weight.to(x.dtype))

def swap(block, kind, make):
    """Put make(module) in the place of every module of a kind."""
    for name, module in list(block.named_modules()):
        if isinstance(module, kind):
            block.set_submodule(name, make(module))

# ---- The hosts: round to nearest and GPTQ -----------------------------------------------------

def inputs_of(block, name, windows, tables, a_bits=16):
    """The InputStatistics of the named linear, as the block stands now: its hessian and its peak,
    over all tokens. a_bits: round the inputs first, as the linear will."""
    return collect_hessians(block, [name], windows, tables, a_bits)[name]

def quantize_block(block, windows, tables, args, host, label):
    """Replace the linears by FrozenLinears. GPTQ reports the output error of each.

    The order is GPTQ's "true sequential" one: the inputs of a group of linears are
    computed when all groups before it are quantized already, so that GPTQ fits the inputs
    that the group will get.
    """
    grid = dict(bits=args.bits, group_size=args.group_size, symmetric=args.symmetric)
    tokens = sum(x.size(0) * x.size(1) for x in windows)
    report = []
    for names in ORDER:
        # The linears of a group read one input: one Hessian serves all of them.
        if host == "gptq":
            hessian = inputs_of(block, names[0], windows, tables, args.a_bits).hessian

        for name in names:
            w = block.get_submodule(name).weight                       # (O, C)
            codes = rtn(w, **grid)
            if host == "gptq":
                # Round to nearest is what its error is compared with.
                lost = 100 * output_error(w, dequantize(*codes, args.group_size), hessian)
                # A Hessian without a Cholesky factor becomes a UsageError with this advice.
                with definite_hessian(f"{label}{name}", tokens,
                                      "give more with --steps, or another --calib"):
                    codes = gptq(w, hessian, act_order=args.act_order, **grid)
                left = 100 * output_error(w, dequantize(*codes, args.group_size), hessian)
                report.append(f"{name.split('.')[1]} {lost:.1f} -> {left:.1f}")

            packed = QuantLinear.affine(*codes, args.bits, args.group_size, args.a_bits)
            block.set_submodule(name, FrozenLinear(packed))
    if report:
        say(f"{label}% of output lost, rtn -> gptq | " + " | ".join(report))

# ---- The calibration text ---------------------------------------------------------------------
# The model knows best which inputs it will meet: what it writes has the distribution that
# it was trained on. It starts from one token, goes on greedily for a few, so that the
# beginning makes sense, and is then sampled, so that windows differ (nanobit/selftext.py).

START_SHARE = 0.9             # first tokens: the most frequent ones, this share of the text
LONGEST = 256                 # tokens of a window, where no --seq-len says otherwise

def calibration(model, data, args):
    """Token ids (N, T) of --calib. The validation split is never touched."""
    n_windows = args.steps * args.batch_size
    length = args.calib_len or min(args.seq_len, LONGEST)

    # Training text.
    if args.calib == "data":
        inputs, _ = batch(data.train, 0, n_windows, length, args.seed, args.device)
        return inputs

    # Random tokens.
    generator = torch.Generator(args.device).manual_seed(args.seed)
    draw = dict(generator=generator, device=args.device)
    if args.calib == "random":
        return torch.randint(data.tokenizer.n_vocab, (n_windows, length), **draw)

    # The model's own text. It starts from frequent tokens, each as likely as the other.
    allowed = frequent_tokens(data).to(args.device)
    starts = allowed[torch.randint(len(allowed), (n_windows, 1), **draw)]  # (N, 1)
    return own_text(model, starts, length, data.tokenizer.eot_token, generator)

def frequent_tokens(data):
    """The fewest ids, without END, that make up START_SHARE of the training text. (The paper
    takes tokens of the languages that are most frequent in it.)"""
    counts = np.bincount(data.train, minlength=data.tokenizer.n_vocab)
    counts[data.tokenizer.eot_token] = 0               # END, which separates texts

    # From the most frequent one on, until their counts add up to the share.
    order = np.argsort(-counts, kind="stable")
    n = np.searchsorted(counts[order].cumsum(), START_SHARE * counts.sum()) + 1
    return torch.from_numpy(order[:n])

# ---- Other losses (--loss) --------------------------------------------------------------------
# Equal outputs have a gradient of exactly zero in each of them. So a block that rounding left
# unharmed is left alone, although Adam divides by the gradient's size. kl takes the softmax
# over channels, and is here to compare with.

def code_loss(f, q):
    """The loss in the authors' scripts: the sum of squared differences of means and of
    standard deviations."""
    f = f.flatten(0, -2)                                               # (B T, C)
    q = q.flatten(0, -2)
    std_f = (f.var(0) + 1e-6).sqrt()                   # the root's slope is infinite at 0
    std_q = (q.var(0) + 1e-6).sqrt()
    return (f.mean(0) - q.mean(0)).square().sum() + (std_f - std_q).square().sum()

LOSSES = {"paper": channel_loss, "code": code_loss, "mse": F.mse_loss, "kl": kl_loss}

# ---- Quantized activations: SmoothQuant in front of the host (--a-bits, --smooth) -------------

def smooth(block, windows, tables, alpha):
    """SmoothQuant, in place: divide each norm's weight by s, multiply the columns it feeds.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), over all calibration tokens and all rows that read
    channel j. The function stays the same; the inputs' outliers move into the weights.
    """
    # SmoothQuant takes the peaks of the float model. Ours are those of the quantized
    # stream, which is what the block will read. Look at both norms before either changes.
    peaks = {}
    for norm in NORMS:
        peaks[norm] = inputs_of(block, norm.linears[0], windows, tables).peak  # (C,)

    for norm in NORMS:
        # One s for all linears that read the norm: it is divided out of the norm only
        # once. The clamps keep s finite and above zero where a channel is zero everywhere.
        # (wo and w_down read no norm, and are not smoothed.)
        weights = [block.get_submodule(name).weight for name in norm.linears]  # (O, C) each
        w_peak = torch.cat(weights).abs().amax(0).clamp(min=1e-5)      # (C,)
        s = (peaks[norm] ** alpha / w_peak ** (1 - alpha)).clamp(min=1e-5)

        # (x / s) (w s)^T = x w^T
        for weight in weights:
            weight.mul_(s)
        getattr(block, norm.name).weight.div_(s)

# ---- The norms by least squares (--solver closed): not in the paper ---------------------------

@torch.no_grad()
def tweak_by_least_squares(block, float_block, windows, tables, ridge=0.01):
    """Multiply each norm's weight by the s (C,) that brings its linears closest to float.

    min_s sum_l E|W_l diag(r) x - Q_l diag(s) x|^2 + damp |s - 1|^2 over the linears l. x is the
    norm's output in `block`, r the norm's weight in float_block over that in block. With
    H = E[x x^T] and * by element, s solves (A + damp I) s = b + damp, where
    A = H * sum_l Q_l^T Q_l,  b = row sums of H * sum_l Q_l^T W_l diag(r),
    damp = ridge * mean(diag A).
    """
    for norm in NORMS:
        # H is taken anew for the second norm: its inputs depend on the first one's weight.
        # What attention's error does to them is not corrected, nor the rounding of inputs.
        H = inputs_of(block, norm.linears[0], windows, tables).hessian.double()  # (C, C)
        gamma = getattr(block, norm.name).weight

        # SmoothQuant may have changed gamma, so the float norm's output is r x. A weight
        # of exactly 0 hides its channel: x is 0 there, any r will do, and s becomes 1.
        float_gamma = getattr(float_block, norm.name).weight
        r = (float_gamma / torch.where(gamma == 0, 1, gamma)).double()  # (C,)

        # Add up both sides over the linears.
        QtQ = 0
        QtW = 0
        for name in norm.linears:
            Q = block.get_submodule(name).weight.double()              # (O, C)
            W = float_block.get_submodule(name).weight.double() * r
            QtQ = QtQ + Q.t() @ Q                                      # (C, C)
            QtW = QtW + Q.t() @ W
        A = H * QtQ
        b = (H * QtW).sum(1)                                           # (C,)

        # The ridge pulls s to 1: damp is added on both sides. Where all inputs are zero, A
        # and b are zero, and damp alone gives s = 1.
        size = A.diagonal().mean()
        damp = ridge * torch.where(size > 0, size, 1.0)
        eye = torch.eye(len(b)).to(A)                  # dtype and device
        s = torch.linalg.solve(A + damp * eye, b + damp)
        gamma.mul_(s)

# ---- The run ----------------------------------------------------------------------------------

def main():
    args = parse_args()
    student, teacher, data = load_models(args)
    suit_calibration(args, teacher)
    arms = chosen_arms(args, student)
    keep_model(args, *[arm.path for arm in arms])      # refuses to write over --model
    header(f"normtweak | W{args.bits}A{args.a_bits}", args, teacher, data)

    # The calibration text, which all arms share.
    start = time.perf_counter()
    ids = calibration(teacher, data, args)                             # (N, T)
    show_calibration(ids, time.perf_counter() - start, teacher, data, args)

    # The dense model is what all are compared with: each arm needs its last block's outputs.
    outputs = []
    base = score(teacher, data, args, base_outputs=outputs)
    rows = {"dense": arm_row(base, 16.0, 0.0)}
    table = [table_row("dense", base, rows["dense"])]

    # Compress a copy for each arm. What is scored is what the arm's file holds.
    for arm in arms:
        start = time.perf_counter()
        model = sharing_copy(student or teacher)
        losses = compress(model, teacher, ids, args, arm.host, arm.tweak)
        seconds = time.perf_counter() - start
        bpw, _ = bits_per_weight(model)
        model, scores = through_the_file(arm.path, model, args, data, arm.name, teacher, outputs,
                                         tell=arm is arms[0])
        kept = {}
        choice = ""
        if arm.tweak:
            kept = kept_row(losses)
            choice = f"tweak kept in {kept['kept']} of {kept['blocks']} blocks | "
        say(f"{arm.name} | val loss {scores['loss']:.4f} | same top token "
            f"{scores['same_top']:.2f}% | {choice}{seconds:.1f} s | saved {arm.path}")
        rows[arm.name] = arm_row(scores, bpw, seconds, **kept)
        table.append(table_row(arm.name, scores, rows[arm.name], losses))

    # The table, and the result row. The row's own numbers are those of the last arm, the
    # tweaked one of the last host; those of all arms are under "arms".
    say("method       | val loss |     ppl |     KL |   bpw | seconds | channel loss of each block")
    say("\n".join(table))
    finish(args, "normtweak", model, scores, {"tokens": ids.numel(), "seconds": seconds},
           w_bits=args.bits, a_bits=args.a_bits, group_size=args.group_size,
           base_val_loss=base["loss"], symmetric=args.symmetric, act_order=args.act_order,
           solver=args.solver, loss=args.loss, calib=args.calib, lr=args.lr,
           keep_all=args.keep_all, **kept, arms=rows)

def load_models(args):
    """(student, teacher, data); without --teacher the student is None."""
    # A packed student comes from --model, and its dense teacher from --teacher.
    student = None
    packed_path = args.model
    if args.teacher:
        student, tokenizer = load_packed(args)
        args.model = args.teacher                      # only while load_base reads it from there
    teacher, data = load_base(args, as_stored=True)
    args.model = packed_path

    # Do the two belong together, and do the groups fit?
    if student:
        if student.config != teacher.config:
            raise UsageError(f"--teacher {args.teacher} is not what {args.model} was made from: "
                             f"{teacher.config} there, {student.config} here")
        check_same_tokens(student, tokenizer, f"--model {args.model}", teacher, data.spec,
                          f"--teacher {args.teacher}", "give the dense model that it was made from")
    suit_groups(args, teacher)
    return student, teacher, data

def load_packed(args):
    """The packed --model and its tokenizer. Its grid becomes the run's. Raises UsageError for a
    flag that asks for another."""
    model, content = load_checkpoint(args.model, args.device, getattr(torch, args.dtype))
    specs = list(content["linears"].values())
    if {spec["kind"] for spec in specs} != {"affine"}:
        raise UsageError(f"--model {args.model} has no packed affine linears; --teacher is for "
                         "those")

    # All linears of a file have one grid. Flags that are not given are None here.
    spec = specs[0]
    grid = {"bits": spec["bits"], "a_bits": spec["a_bits"], "group_size": spec["group_size"],
            "symmetric": spec["signed"]}               # codes around zero, no zero points
    for name, own in grid.items():
        given = getattr(args, name)
        if given not in (None, own):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {given} is not the {own} of --model {args.model}, whose "
                             f"codes exist already; leave {flag} out")
        setattr(args, name, own)
    return model, content["tokenizer"]

class Arm(NamedTuple):
    """One row of the table."""
    host: str                            # as compress takes it; None: packed already
    tweak: bool
    name: str
    path: str                            # of the checkpoint that it writes

def chosen_arms(args, student):
    """Every host that the run uses, without and with the tweak."""
    if student:
        hosts = (None,)                                # its codes exist already
    elif args.host == "both":
        hosts = ("rtn", "gptq")
    else:
        hosts = (args.host,)

    arms = []
    for host in hosts:
        for tweak in (False, True):
            name = arm_name(host, tweak)
            path = os.path.join(args.out, f"{name}-w{args.bits}.pt")
            arms.append(Arm(host, tweak, name, path))
    return arms

def kept_row(losses):
    """In how many blocks the tweak stayed, for the row of results."""
    return {"kept": sum(block_loss.kept for block_loss in losses), "blocks": len(losses)}

def show_calibration(ids, seconds, model, data, args):
    """What the calibration text is, how it begins, and whether it may be too short."""
    text = data.tokenizer.decode(ids[0, :32].tolist())
    say(f"calibration: {args.calib}, {len(ids)} windows of {ids.size(1)} tokens | "
        f"{seconds:.1f} s | {text!r} ...")
    n_hidden = model.config.n_hidden
    if ids.numel() < n_hidden:
        say(f"warning: {ids.numel()} calibration tokens cannot tell {n_hidden} inputs of a layer "
            "apart; give more with --steps")

def sharing_copy(model):
    """A copy with modules of its own, whose parameters are the model's. compress puts new
    blocks into the copy, one by one, and changes no shared parameter: a second set is
    never needed. Packed codes are buffers, and are copied."""
    # deepcopy treats the ids in memo as already copied.
    memo = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)

def table_row(name, scores, row, losses=()):
    """One row of the final table."""
    kl = "-" if row["kl"] is None else f"{row['kl']:.4f}"
    blocks = "  ".join(f"{loss.before:.4f} -> {loss.after:.4f}" for loss in losses)
    return (f"{name:<12} | {scores['loss']:8.4f} | {scores['ppl']:7.2f} | {kl:>6} | "
            f"{row['bpw']:5.2f} | {row['seconds']:7.1f} | {blocks}")

# ---- Flags ------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(prog="normtweak.py", description="Quantize, then tweak the norms (Norm Tweaking).")
    add = p.add_argument
    add("--bits", type=number(int, 1, 8), help="of the weights, 1 to 8 (default: 2)")
    add("--group-size", type=number(int, -1), help="inputs that share a scale; -1: all of a row "
        "(default: -1; for a model of 10M weights and more 128, or what divides its inputs)")
    add("--symmetric", action="store_true", default=None, help="grids without zero points")
    add("--act-order", action="store_true", help="GPTQ rounds the columns of the largest inputs "
        "first, as in the paper's runs (default: from left to right, as everywhere here)")
    add("--a-bits", type=int, choices=(4, 8, 16),
        help="of the linears' inputs, one scale a token; 16: not quantized (default: 16)")
    add("--smooth", type=number(float, 0, 1),
        help="SmoothQuant's alpha, with --a-bits 8 or 4 (default: 0.5)")
    add("--loss", choices=tuple(LOSSES), default="paper", help="what the tweak lowers: paper "
        "(channel means and variances), code (the authors' form), mse, kl (default: paper)")
    add("--keep-all", action="store_true", help="the paper's rule: every tweak stays, at --lr "
        "itself (default: held-out windows choose among a fifth of --lr, --lr, 5 --lr and none)")
    add("--solver", choices=("adam", "closed"), default="adam",
        help="closed: least squares instead of --loss and --lr (default: adam)")
    add("--calib", choices=("self", "data", "random"), default="self",
        help="calibration: text by the model, training text, random tokens (default: self)")
    add("--host", choices=("rtn", "gptq", "both"), help="what quantizes (default: both; on a CPU "
        "gptq alone for a model of 10M weights and more)")
    add("--teacher", help="dense checkpoint of a packed --model, whose codes stay as they are")
    add_flags(p)

    # add_flags made --model, --out, --steps, --lr and those that all scripts have. A step is
    # one window by default, so --steps is the size of the calibration set. UNSET stands for what is
    # not given. The paper takes 128 windows of 2048 tokens, and searches lr from 1e-5.
    p.set_defaults(batch_size=1, accumulate=1, lr=5e-3, steps=UNSET["steps"],
                   seq_len=UNSET["seq_len"])
    args = p.parse_args(argv)
    args.calib_len = args.seq_len                      # 0: see `calibration`
    if args.smoke and not args.steps:
        args.steps = 4
    args = resolve(args)
    check_args(args)
    if args.smooth is None:
        args.smooth = 0.5

    # The grid, where it is not that of a packed --model (see load_packed).
    if not args.teacher:
        args.bits = args.bits or 2
        args.a_bits = args.a_bits or 16
        args.symmetric = bool(args.symmetric)
    return args

def check_args(args):
    """Raise UsageError for flags that do not go together."""
    if args.smooth is not None and args.a_bits in (None, 16):
        raise UsageError(f"--smooth {args.smooth} is for quantized activations; add --a-bits 8")
    if args.bits == 1 and args.symmetric:
        # The codes -1 and 0 stand for -2 max|w| and 0: no weight is nearer to the first.
        raise UsageError("--bits 1 --symmetric rounds every weight to 0; leave --symmetric out, or "
                         "use --bits 2")
    if args.steps == 1 and not args.keep_all:
        raise UsageError("--steps 1 leaves no window to choose by; give 2 or more, or --keep-all")
    if args.teacher and not args.model:
        raise UsageError(f"--teacher {args.teacher} needs the packed checkpoint as --model")
    if args.teacher and args.host:
        raise UsageError(f"--host {args.host} quantizes, but the codes of a --model with a "
                         "--teacher exist already; leave one of the two out")
    if args.resume and (args.model or os.path.exists(os.path.join(args.out, "base.pt"))):
        raise UsageError("--resume has nothing to go on from: normtweak.py keeps no state but that "
                         "of the base model's training")

if __name__ == "__main__":
    run(main)
