"""Norm Tweaking: repair a quantized LLaMA by retraining nothing but its norms' weights.

    python normtweak.py --bits 2                # RTN and GPTQ, without and with the tweak
    python normtweak.py --bits 2 --smoke        # every line of it in a few seconds
    python normtweak.py --bits 4 --a-bits 8     # activations too, with SmoothQuant folded in
    python normtweak.py --model out/gptq-w2.pt --teacher out/base.pt    # codes that exist already
    python normtweak.py --model DIR --host gptq --bits 3 --group-size 64 --seq-len 128
                                                # a Hugging Face folder, one block in float at once

The idea:
  1. The float model writes its own calibration text: a frequent first token, a few greedy ones,
     then samples up to full length.
  2. Quantize block after block, by round to nearest or by GPTQ. That shifts mean and spread of
     the channels of a block's output.
  3. Before the next block, train this block's two norm weights by Adam, one pass, so that mean
     and variance of every channel match the float block's on the same input. Codes and scales do
     not move, and the norms stay float32: the result is as small and as fast as before.

Paper: Norm Tweaking, Li et al. 2024 (arXiv 2309.02784), without official code. Hosts: GPTQ
(2210.17323), SmoothQuant (2211.10438). Generating from a start token is LLM-QAT's (2305.17888).
Ours differs: start tokens are restricted to frequent tokens, the paper's to frequent languages;
calibration runs in float32; SmoothQuant's peaks are those of the quantized stream; `--solver
closed` is not in the paper. Not here: LayerNorm, or correcting what earlier blocks did wrong (the
float block sees the quantized stream too, so each block answers for its own error only).

Shapes: N windows of T tokens, B of them a step; C channels; O outputs of a linear.
"""
import copy
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UsageError
from nanobit.checkpoint import load_checkpoint
from nanobit.cli import add_flags, number, Parser, resolve, run
from nanobit.data import batch
from nanobit.generate import Chooser, decode
from nanobit.ranks import progress, say
from nanobit.runs import (arm_row, check_groups, definite_hessian, finish, header, keep_model,
                          load_base, score, through_the_file)
from nanobit.train import kl_loss
from quantizers import (QuantLinear, bits_per_weight, collect_hessians, dequantize,
                        fake_quant_tokens, full_float32, gptq, output_error, rtn)

ORDER = (("attn.wk", "attn.wv", "attn.wq"), ("attn.wo",),        # GPTQ's "true sequential" order:
         ("mlp.w_up", "mlp.w_gate"), ("mlp.w_down",))            # each sees what is quantized
NORMS = (("attn_norm", ORDER[0]), ("mlp_norm", ORDER[2]))        # and the linears that they feed
LR_SCALE = 1.0                # the learning rate grows by up to this share of it over the blocks
START_SHARE = 0.9             # first tokens: the most frequent ones, this share of the text
GREEDY, TOP_K = 4, 50         # then so many most likely ones; the others are drawn from TOP_K

def parse_args(argv=None):
    p = Parser(prog="normtweak.py", description="Quantize, then tweak the norms (Norm Tweaking).")
    add = p.add_argument
    add("--bits", type=number(int, 1, 8), default=2, help="of the weights, 1 to 8 (default: 2)")
    add("--group-size", type=number(int, -1), default=-1,
        help="input channels that share one scale; -1: one scale a row (default: -1)")
    add("--symmetric", action="store_true", help="grids without zero points")
    add("--act-order", action="store_true", help="GPTQ rounds the columns of the largest inputs "
        "first, as in the paper's runs (default: from left to right, as everywhere here)")
    add("--a-bits", type=int, choices=(4, 8, 16), default=16,
        help="of the linears' inputs, one scale a token; 16: not quantized (default: 16)")
    add("--smooth", type=number(float, 0, 1),
        help="SmoothQuant's alpha, with --a-bits 8 or 4 (default: 0.5)")
    add("--loss", choices=tuple(LOSSES), default="paper", help="what the tweak lowers: paper "
        "(channel means and variances), code (the authors' form), mse, kl (default: paper)")
    add("--solver", choices=("adam", "closed"), default="adam",
        help="closed: least squares instead of --loss and --lr (default: adam)")
    add("--calib", choices=("self", "data", "random"), default="self",
        help="calibration: text by the model, training text, random tokens (default: self)")
    add("--host", choices=("rtn", "gptq"), help="quantize by this one alone (default: by both)")
    add("--teacher", help="dense checkpoint of a packed --model, whose codes stay as they are")
    add_flags(p)
    # A step is one window, so --steps is the size of the calibration set. The paper takes 128
    # windows of 2048 tokens and searches lr from 1e-5 up; few and short windows need more. Of
    # 3e-4, 1e-3, 3e-3 and 1e-2 this lr left 2-bit RTN the lowest loss on the dev split.
    p.set_defaults(batch_size=1, accumulate=1, lr=3e-3, seq_len=0)
    args = p.parse_args(argv)
    args.steps = args.steps or (4 if args.smoke else 64)
    if args.smooth is not None and args.a_bits == 16:
        raise UsageError(f"--smooth {args.smooth} is for quantized activations; add --a-bits 8")
    if args.bits == 1 and args.symmetric:              # codes -1 and 0, in steps of 2 max|w|
        raise UsageError("--bits 1 --symmetric rounds every weight to 0; leave --symmetric out, or "
                         "use --bits 2")
    if args.teacher and not args.model:
        raise UsageError(f"--teacher {args.teacher} needs the packed checkpoint as --model")
    args.smooth = 0.5 if args.smooth is None else args.smooth
    args = resolve(args)
    if args.resume and (args.model or os.path.exists(os.path.join(args.out, "base.pt"))):
        raise UsageError("--resume has nothing to go on from: normtweak.py keeps no state but that "
                         "of the base model's training")
    return args

# ---- The losses: a block's float output f and quantized output q, (B, T, C) each -> a scalar.
# Equal outputs have a gradient of exactly zero, so that Adam does not move at all.

def channel_loss(f, q):
    """The paper's: |difference of means| + |difference of variances| a channel, over tokens."""
    f, q = f.flatten(0, -2), q.flatten(0, -2)                              # (B T, C)
    return ((f.mean(0) - q.mean(0)).abs() + (f.var(0) - q.var(0)).abs()).mean()

def code_loss(f, q):
    """The authors' scripts': squared differences of means and of standard deviations, summed."""
    f, q = f.flatten(0, -2), q.flatten(0, -2)
    std_f, std_q = (f.var(0) + 1e-6).sqrt(), (q.var(0) + 1e-6).sqrt()      # finite slope at 0
    return (f.mean(0) - q.mean(0)).square().sum() + (std_f - std_q).square().sum()

LOSSES = {"paper": channel_loss, "code": code_loss, "kl": kl_loss,
          "mse": lambda f, q: F.mse_loss(q, f)}

# ---- Calibration tokens -----------------------------------------------------------------------

def calibration(model, data, args):
    """Token ids (N, T) of --calib. The validation split is never touched."""
    n = args.steps * args.batch_size
    if args.calib == "data":
        return batch(data.train, 0, n, args.seq_len, args.seed, args.device)[0]
    generator = torch.Generator(args.device).manual_seed(args.seed)
    draw = dict(generator=generator, device=args.device)
    if args.calib == "random":
        return torch.randint(data.tokenizer.n_vocab, (n, args.seq_len), **draw)
    allowed = frequent_tokens(data).to(args.device)
    start = allowed[torch.randint(len(allowed), (n, 1), **draw)]           # (N, 1)
    windows, end = [], data.tokenizer.eot_token
    chunks = start.split(max(1, 2**14 // args.seq_len))                    # bounds the cache
    for ids in chunks:
        n = args.seq_len - 1
        tokens = decode(model, ids, n, Writer(model, len(ids), end, generator))
        rest = [next(tokens).clone() for _ in progress(range(n), "calibration: token")]
        windows.append(torch.cat((ids, *rest), dim=1))                     # (N, T)
    return torch.cat(windows)

def frequent_tokens(data):
    """The fewest ids that make up START_SHARE of the training text; END is not one of them."""
    counts = np.bincount(data.train, minlength=data.tokenizer.n_vocab)
    counts[data.tokenizer.eot_token] = 0
    order = np.argsort(-counts, kind="stable")
    n = np.searchsorted(counts[order].cumsum(), START_SHARE * counts.sum()) + 1
    return torch.from_numpy(order[:n])

class Writer(Chooser):
    """The GREEDY likeliest tokens, then samples. END is never chosen, and ids stay ids: text would
    be cut into other tokens on the way back."""

    def __init__(self, model, batch, end, generator):
        super().__init__(model, batch, 1.0, TOP_K, generator)
        self.end, self.written = end, 0

    def draw(self):
        self.written += 1
        if self.written > GREEDY:                      # until then the noise is equal for all
            super().draw()

    def __call__(self, logits):
        logits = logits.float().clone()                                    # (N, vocab)
        logits[:, self.end] = -torch.inf
        return super().__call__(logits)

# ---- The hosts: RTN, GPTQ, and SmoothQuant in front of either. `windows` are the inputs (B, T, C)
# of a block, which come from the quantized blocks before it; `tables` are the rotary ones.

class FrozenLinear(nn.Module):
    """A packed linear with its weight spelled out in floats: differentiable in its input."""

    def __init__(self, packed):
        super().__init__()
        self.packed, self.a_bits = packed, packed.spec["a_bits"]
        self.register_buffer("weight", packed.weight())                    # (O, C)

    def forward(self, x):
        x = fake_quant_tokens(x, self.a_bits) if self.a_bits < 16 else x
        return F.linear(x, self.weight.to(x.dtype))

def swap(block, kind, make):
    """Put make(module) in the place of every module of a kind."""
    for name, module in list(block.named_modules()):
        if isinstance(module, kind):
            block.set_submodule(name, make(module))

def smooth(block, windows, tables, alpha):
    """SmoothQuant: divide each norm's weight by s and multiply the columns it feeds, in place.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), over all calibration tokens and all rows that read
    channel j. The function stays the same; the inputs' outliers move into the weights.
    """
    found = collect_hessians(block, [names[0] for _, names in NORMS], windows, tables)
    for norm, names in NORMS:
        weights = [block.get_submodule(name).weight for name in names]     # (O, C) each
        w_peak = torch.cat(weights).abs().amax(0).clamp(min=1e-5)          # (C,)
        s = (found[names[0]][1] ** alpha / w_peak ** (1 - alpha)).clamp(min=1e-5)
        for weight in weights:
            weight.mul_(s)
        getattr(block, norm).weight.div_(s)

def quantize_block(block, windows, tables, args, host, label):
    """Replace the linears by FrozenLinears in ORDER; GPTQ reports the output error of each."""
    how = dict(bits=args.bits, group_size=args.group_size, symmetric=args.symmetric)
    report = []
    for names in ORDER:
        if host == "gptq":                             # one input, one Hessian
            h, _ = collect_hessians(block, names[:1], windows, tables, args.a_bits)[names[0]]
        for name in names:
            w = block.get_submodule(name).weight
            codes = rtn(w, **how)
            if host == "gptq":
                lost = output_error(w, dequantize(*codes, args.group_size), h)
                tokens = sum(x[..., 0].numel() for x in windows)
                with definite_hessian(f"{label}{name}", tokens,
                                      "give more with --steps, or another --calib"):
                    codes = gptq(w, h, act_order=args.act_order, **how)
                left = output_error(w, dequantize(*codes, args.group_size), h)
                report.append(f"{name.split('.')[1]} {100 * lost:.1f} -> {100 * left:.1f}")
            block.set_submodule(name, FrozenLinear(
                QuantLinear.affine(*codes, args.bits, args.group_size, args.a_bits)))
    if report:
        say(f"{label}% of output lost, rtn -> gptq | " + " | ".join(report))

# ---- The tweak --------------------------------------------------------------------------------

@torch.enable_grad()
def tweak_by_adam(block, windows, targets, tables, loss, lr):
    """Train the two norm weights (C,): one step of a fresh Adam for each window."""
    weights = [getattr(block, norm).weight.requires_grad_() for norm, _ in NORMS]
    optimizer = torch.optim.Adam(weights, lr=lr)
    for x, target in zip(windows, targets):
        LOSSES[loss](target, block(x, *tables)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for weight in weights:
        weight.requires_grad_(False)

@torch.no_grad()
def tweak_by_least_squares(block, float_block, windows, tables, ridge=0.01):
    """Multiply each norm's weight by the s (C,) that brings the linears it feeds closest to float.

    min_s sum_l E|W_l r x - Q_l s x|^2 + ridge * mean(diag A) |s - 1|^2 over the linears l, with x
    the norm's output and r the float norm's weight over this one's. Its normal equations A s = b:
    A = H * sum_l Q_l^T Q_l,  b = diag(H sum_l r W_l^T Q_l),  H = E[x x^T].
    """
    for norm, names in NORMS:
        h = collect_hessians(block, names[:1], windows, tables)[names[0]][0].double()
        gamma = getattr(block, norm).weight
        # A weight of exactly 0 hides its channel: x is 0 there, any r does, and s becomes 1.
        r = getattr(float_block, norm).weight / torch.where(gamma == 0, 1, gamma)
        r = r.double()                                                     # (C,)
        qs = [block.get_submodule(name).weight.double() for name in names]  # (O, C) each
        ws = [float_block.get_submodule(name).weight.double() * r for name in names]
        A = h * sum(q.t() @ q for q in qs)                                 # (C, C)
        b = (h * sum(q.t() @ w for q, w in zip(qs, ws))).sum(1)            # (C,)
        size = A.diagonal().mean()
        damp = ridge * torch.where(size > 0, size, 1.0)                    # all inputs zero: s = 1
        gamma.mul_(torch.linalg.solve(A + damp * torch.eye(len(b)).to(A), b + damp))

@full_float32()
@torch.no_grad()
def compress(student, teacher, ids, args, host=None, tweak=True):
    """Quantize `student` block by block in place and tweak its norms; `teacher` is the dense model.

    host: "rtn", "gptq", or None where the student's linears are packed already. Returns one pair
    a block, the mean channel loss of a window before and after the tweak. One block at a time is
    float32: the others stay as the teacher stores them, or are packed.
    """
    losses, L, tables = [], len(student.blocks), student.rope(ids)
    windows = student.embed(ids).float().split(args.batch_size)            # (B, T, C) each
    for i in progress(range(L), f"{host or 'packed'}{'-tweak' * tweak}: block"):
        block, float_block = (copy.deepcopy(m.blocks[i]).float().requires_grad_(False)
                              for m in (student, teacher))
        targets = [float_block(x, *tables) for x in windows]               # of the quantized stream
        if host and args.a_bits < 16:
            smooth(block, windows, tables, args.smooth)
        if host:
            quantize_block(block, windows, tables, args, host, f"block {i + 1}/{L} | ")
        else:
            swap(block, QuantLinear, FrozenLinear)
        outputs = [block(x, *tables) for x in windows]
        before = mean_loss(targets, outputs)
        if tweak and args.solver == "adam":
            lr = args.lr * (1 + LR_SCALE * i / L)      # grows, as the stream's error does
            tweak_by_adam(block, windows, targets, tables, args.loss, lr)
        elif tweak:
            tweak_by_least_squares(block, float_block, windows, tables)
        windows = [block(x, *tables) for x in windows] if tweak else outputs  # the final norms'
        losses.append((before, mean_loss(targets, windows)))
        swap(block, FrozenLinear, lambda linear: linear.packed)
        student.blocks[i] = block
    return losses

def mean_loss(targets, outputs):
    return (sum(map(channel_loss, targets, outputs)) / len(targets)).item()

# ---- The run ----------------------------------------------------------------------------------

def load_models(args):
    """(student, teacher, data); the student is None unless --model is packed."""
    student, path = None, args.model
    if args.teacher:
        student, content = load_checkpoint(path, args.device, getattr(torch, args.dtype))
        specs = list(content["linears"].values())
        if {spec["kind"] for spec in specs} != {"affine"}:
            raise UsageError(f"--model {path} has no packed affine linears; --teacher is for those")
        args.bits, args.a_bits, args.group_size, args.symmetric = (
            specs[0][k] for k in ("bits", "a_bits", "group_size", "signed"))
        args.model = args.teacher
    teacher, data = load_base(args, as_stored=True)
    dense, args.model = args.model or os.path.join(args.out, "base.pt"), path
    if student and student.config != teacher.config:
        raise UsageError(f"--teacher {dense} is not what {path} was made from: {teacher.config} "
                         f"there, {student.config} here")
    check_groups(teacher, args.group_size)
    return student, teacher, data

def main():
    args = parse_args()
    student, teacher, data = load_models(args)
    hosts = ("packed",) if student else (args.host,) if args.host else ("rtn", "gptq")
    names = [host + "-tweak" * tweak for host in hosts for tweak in (False, True)]
    keep_model(args, *[os.path.join(args.out, f"{name}-w{args.bits}.pt") for name in names])
    header(f"normtweak | W{args.bits}A{args.a_bits}", args, teacher, data)
    start = time.perf_counter()
    ids = calibration(teacher, data, args)                                 # (N, T)
    seconds = time.perf_counter() - start
    say(f"calibration: {args.calib}, {len(ids)} windows of {ids.size(1)} tokens | "
        f"{seconds:.1f} s | {data.tokenizer.decode(ids[0, :32].tolist())!r} ...")
    if ids.numel() < teacher.config.n_hidden:
        say(f"warning: {ids.numel()} calibration tokens cannot tell {teacher.config.n_hidden} "
            "inputs of a layer apart; give more with --steps")
    base = score(teacher, data, args)
    arms, rows = {"dense": arm_row(base, 16.0, 0.0)}, [line("dense", base, 16)]
    for host in hosts:
        for tweak in (False, True):
            name, begin = host + "-tweak" * tweak, time.perf_counter()
            memo = {id(p): p for p in (student or teacher).parameters()}   # shared, not copied
            model = copy.deepcopy(student or teacher, memo)
            losses = compress(model, teacher, ids, args, None if student else host, tweak)
            seconds, (bpw, _) = time.perf_counter() - begin, bits_per_weight(model)
            path = os.path.join(args.out, f"{name}-w{args.bits}.pt")
            model, scores = through_the_file(path, model, args, data, name)
            say(f"{name} | val loss {scores['loss']:.4f} | {seconds:.1f} s | saved {path}")
            arms[name] = arm_row(scores, bpw, seconds)
            rows.append(line(name, scores, bpw, seconds, losses))
    say("method       | val loss |     ppl |   bpw | seconds | channel loss of each block\n"
        + "\n".join(rows))
    finish(args, "normtweak", model, scores, {"tokens": ids.numel(), "seconds": seconds},
           w_bits=args.bits, a_bits=args.a_bits, group_size=args.group_size,
           base_val_loss=base["loss"], symmetric=args.symmetric, act_order=args.act_order,
           solver=args.solver, loss=args.loss, calib=args.calib, lr=args.lr, arms=arms)

def line(name, scores, bpw, seconds=0.0, losses=()):
    """One row of the final table."""
    return (f"{name:<12} | {scores['loss']:8.4f} | {scores['ppl']:7.2f} | {bpw:5.2f} | "
            f"{seconds:7.1f} | " + "  ".join(f"{a:.4f} -> {b:.4f}" for a, b in losses))

if __name__ == "__main__":
    run(main)
