"""QuEST: train a LLaMA from scratch with 1 to 8-bit weights and activations.

    python quest.py --bits 4                    # tiny preset: train, evaluate, pack, write text
    python quest.py --bits 4 --smoke            # every line of it in a few seconds
    python quest.py --bits 16                   # the dense control: same data, same schedule
    python quest.py --bits 4 --model out/base.pt         # learn to be like a dense model
    python model.py sample out/quest-w4a4.pt    # use the packed result
    python assets/law.py out/results.jsonl      # the scaling law of many such runs
    torchrun --standalone --nproc_per_node=8 quest.py --size 800M --bits 4 --fsdp     # 8 GPUs

The idea:
  1. Rotate both operands of every linear with the same Hadamard matrix H. Outliers spread over
     their block, and the product does not change: (x H)(w H)^T = x w^T.
  2. Round each row to evenly spaced levels, the outermost at +-clip times its root mean square:
     scale = 2 clip rms / (n - 1) for n levels. clip is one constant per bit-width, the one that
     minimizes the squared error on Gaussian data: nothing to learn, nothing to calibrate.
  3. In the backward pass, let the gradient through only where rounding moved a value by at most
     half a step (the trust mask), and rotate it back. Weights and optimizer stay float32.

The symbols:
  h        rotated rows, x H
  scale    width of one step of a row's grid, (..., 1)
  u        h in units of its scale
  q        integer code of u: floor(u), clipped to the grid (ternary, FP4: the nearest level)
  levels   q + 1/2 (ternary, FP4: q), so that levels * scale is the rounded value h_hat
  trusted  bool: |u| is at most the outermost level + 1/2, half a step. FP4, whose codes are
           doubled to be integers, has a widest step of 4: level + 2. At 1 bit the level is 1/2:
           level + 1/2 would be 2 times the level; the paper found that 1.30 times trains better.

Paper: QuEST, Panferov et al. 2025 (arXiv 2502.05003); code: github.com/IST-DASLab/QuEST.
Not here: a speed-up. On a GPU the forward products are integer products, but training is still
slower than dense training; the backward products are in bfloat16.

Where ours differs from the official code: clips are exact (theirs stop early at their optimizer's
tolerance); the ternary grid has three levels (theirs four); FP4's trust zone comes from FP4's own
levels; a row of zeros gets a tiny positive scale, so that u is finite and the gradient passes;
where only weights are quantized x is rotated too (theirs is not), so that the layer still computes
x w^T and can start from a trained w; H is exact, not bfloat16.

Shapes: x (..., C) inputs, w (O, C) weights, y (..., O); B rows of x in all.
"""
import math
import os
from argparse import ArgumentTypeError
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UsageError
from nanobit.checkpoint import tensor_bytes
from nanobit.cli import add_flags, Parser, resolve, run
from nanobit.data import batch
from nanobit.defaults import UNSET, suit
from nanobit.distill import WithTeacher, add_teacher, frozen_copy, open_teacher
from nanobit.generate import sample_text
from nanobit.ranks import say, whole
from nanobit.runs import (header, keep_model, load_training_data, new_model, record, show,
                          through_the_file)
from nanobit.train import evaluate, train
from quantizers import (QuantLinear, bits_per_weight, clip_limit, code_linear, code_offset,
                        find_kernels, hadamard_signs, keep_two_of_four, num_levels, quest_codes,
                        rotate, trust_limit)

kernels = find_kernels() if torch.cuda.is_available() else None        # None: PyTorch does it

# ---- The method for one layer, as the paper writes it (algorithm 1) ---------------------------

class TrustedGradient(torch.autograd.Function):
    """Forward: the rounded value. Backward: the gradient where it is trusted, else zero."""

    @staticmethod
    def forward(ctx, h, h_hat, trusted):
        # h is not read. It is an argument so that backward can return its gradient.
        ctx.save_for_backward(trusted)
        return h_hat.clone()                           # autograd treats a returned input apart

    @staticmethod
    def backward(ctx, g):
        trusted, = ctx.saved_tensors
        return g * trusted, None, None

def quest_fake_quant(x, bits):
    """x (..., C) -> its rotated rows on their grid, (..., C), differentiable."""
    # Rotate: H is block diagonal, in blocks of gcd(C, 128). Outliers spread over their block, and
    # the row looks Gaussian. rotate computes in float32; float64, for tests, stays.
    h = rotate(x if x.dtype == torch.float64 else x.float())

    # Round to the nearest level: q (..., C) integers as floats, scale (..., 1), u = h / scale. The
    # scale is that of a Gaussian with the row's root mean square; no gradient passes through it.
    q, scale, u = quest_codes(h.detach(), bits)
    h_hat = (q + code_offset(bits)) * scale

    # Trust the gradient where rounding moved a value by at most half a step: that is everything
    # inside the grid, and half a step outside. The gradient is computed at h_hat. Farther out h_hat
    # no longer follows h, so a straight-through gradient would keep pushing h without changing the
    # output. A masked weight can still move: rotating back mixes all gradients of its block.
    trusted = u.abs() <= trust_limit(bits)
    return TrustedGradient.apply(h, h_hat, trusted)

def quest_linear(x, w, a_bits, bits):
    """y = x_hat w_hat^T, for a_bits of at most 8. H is symmetric and H H = I: the rotations cancel
    in the product, and the backward pass of `rotate`, which autograd applies to the masked
    gradients, is `rotate` again.

    This is the definition, for reading. Runs take QuestFunction, which tests hold to it.
    """
    return F.linear(quest_fake_quant(x, a_bits), quest_fake_quant(w, bits))  # (..., O)

# ---- The same, kept small: codes in the place of floats ---------------------------------------
# Autograd would keep x_hat and w_hat as floats and both masks, 5 bytes a value. QuestFunction keeps
# int8 codes and masks, 2 bytes; it takes the scales out of the product, and lets weights that read
# the same x share its codes.

class Quantizer(NamedTuple):
    """What QuEST and its baselines differ in."""
    rotates: bool
    limit: Callable              # (bits, grid) -> the largest |u| that gets a gradient

QUANTIZERS = {
    # QuEST: half a step outside of the outermost level; at 1 bit 1.30 times that level
    "quest": Quantizer(rotates=True, limit=trust_limit),
    # Each baseline removes one more part. First the rotation (at 1 bit: 1.25 times),
    "trust": Quantizer(rotates=False,
                       limit=lambda bits, grid: trust_limit(bits, grid, one_bit=1.25)),
    # then the half step outside: the gradient ends where the grid ends,
    "clip": Quantizer(rotates=False, limit=clip_limit),
    # then the mask: the straight-through estimator has a gradient everywhere
    # (pruned values aside).
    "ste": Quantizer(rotates=False, limit=lambda bits, grid: math.inf),
}

class Operand(NamedTuple):
    """One operand of the product on its grid, N = B or O rows. At 16 bits it has only levels: the
    rows themselves, rotated where the quantizer rotates."""
    levels: torch.Tensor                 # (N, C) float: levels * scale is about the rotated rows
    scale: torch.Tensor = None           # (N, 1)
    codes: torch.Tensor = None           # (N, C) int8: q, a quarter of the bytes of levels
    trusted: torch.Tensor = None         # (N, C) bool
    kept: torch.Tensor = None            # (N, C) bool: not pruned (grid "sparse" alone)

def to_grid(v, bits, grid, quantizer):
    """Rows v (N, C) -> Operand. quantizer: a name of QUANTIZERS; grid: see "Other grids" below."""
    how = QUANTIZERS[quantizer]
    h = rotate(v) if how.rotates else v.float()
    if bits == 16:
        return Operand(h.to(v.dtype))

    q, scale, u = quest_codes(h, bits, grid)
    codes = q.to(torch.int8)
    levels = q.add_(code_offset(bits, grid))           # in place: q is not needed any more
    trusted = u.abs_() <= how.limit(bits, grid)        # in place: only |u| is still needed

    kept = None
    if grid == "sparse":
        # A pruned value is rounded to 0: it is trusted where that is within half a step.
        kept = keep_two_of_four(h)
        levels = levels * kept
        trusted = trusted & (kept | (u <= 0.5))
    return Operand(levels, scale, codes, trusted, kept)

def restore(codes, offset, scale, dtype):
    """(codes + offset) * scale, rounded once, to dtype: levels of at most 127.5 in steps of 1/2
    have 8 significant bits and are exact even in bfloat16, and scale is float32."""
    return codes.to(dtype).add_(offset).mul_(scale)    # in float32, then rounded into place

def as_numbers(mask, dtype):
    """Bools as ones and zeros of dtype, by way of int8: a CPU is slow at turning bools into floats,
    and slower at multiplying with them."""
    return mask.view(torch.int8).to(dtype)

class QuestFunction(torch.autograd.Function):
    """y = x_hat w_hat^T with QuEST's gradient, for every w of `weights`: a tuple of (B, O).

    forward:   x_hat = round(x H),  w_hat = round(w H),  y = x_hat w_hat^T
    backward:  g_x = (trusted_x * (g w_hat)) H,   g_w = (trusted_w * (g^T x_hat)) H
    g_x sums g w_hat over the weights. Where only weights are quantized, x_hat is the rotated x
    itself, and all of it is trusted.
    """

    @staticmethod
    def forward(ctx, x, bits, a_bits, grid, quantizer, *weights):      # x (B, C), w (O, C)
        a_grid = activation_grid(grid)                 # "fp4" for both, else "uniform" for x
        xq = to_grid(x, a_bits, a_grid, quantizer)

        ys = []
        saved = [xq.levels if a_bits == 16 else xq.codes, xq.trusted, xq.scale]
        for w in weights:
            wq = to_grid(w, bits, grid, quantizer)
            ys.append(code_linear(xq.levels, xq.scale, wq.levels, wq.scale, x.dtype))  # (B, O)
            saved += [wq.codes, wq.scale, wq.trusted, wq.kept]

        ctx.save_for_backward(*saved)
        ctx.x_offset = code_offset(a_bits, a_grid)
        ctx.w_offset = code_offset(bits, grid)
        ctx.rotates = QUANTIZERS[quantizer].rotates
        ctx.dtype = x.dtype
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gs):
        x_saved, x_trusted, x_scale, *saved = ctx.saved_tensors    # codes, or at 16 bits x H itself
        x_quantized = x_scale is not None
        x_hat = restore(x_saved, ctx.x_offset, x_scale, ctx.dtype) if x_quantized else x_saved

        gx = None
        gws = []
        for i, g in enumerate(gs):                                     # g (B, O)
            w_codes, w_scale, w_trusted, w_kept = saved[4 * i:4 * i + 4]

            # dL/dx_hat, summed over the weights that read x
            w_hat = restore(w_codes, ctx.w_offset, w_scale, ctx.dtype)  # (O, C)
            if w_kept is not None:
                w_hat = w_hat * w_kept
            product = g @ w_hat                                        # (B, C)
            gx = product if gx is None else gx.add_(product)

            # dL/dw: the mask is one of rotated values, so mask first and then rotate back
            gw = g.t() @ x_hat                                         # (O, C)
            gw.mul_(as_numbers(w_trusted, ctx.dtype))
            if ctx.rotates:
                gw = rotate(gw)                        # float32, for the optimizer
            gws.append(gw.float())

        if x_quantized:
            gx.mul_(as_numbers(x_trusted, ctx.dtype))
        if ctx.rotates:
            gx = rotate(gx, dtype=ctx.dtype)           # as the layer before expects it
        return gx, None, None, None, None, *gws

class FusedQuest(torch.autograd.Function):
    """QuestFunction on a GPU: each of its steps is one kernel, and forward products are integer.

    One pass over an operand makes its codes, x_hat in x's dtype and the trust mask, a bit a value.
    It saves x_hat and w_hat in that dtype, of 16 bits, and the masks: 2 1/8 bytes a value against 2
    for codes and bools, and the backward pass has nothing to restore.
    """

    @staticmethod
    def forward(ctx, x, bits, a_bits, *weights):
        # a is (codes, scale, sums of codes), of which the integer product is made. Codes are 2 q +
        # 1, twice the levels. At 8 bits int8 cannot hold that, and they are q: the halves that they
        # lack are then added to the product, by means of the sums.
        *a, x_hat, x_trusted = kernels.hadamard_quantize(x, a_bits, x.dtype)

        ys = []
        saved = [x_hat, x_trusted]
        for weight in weights:
            *w, w_hat, w_trusted = kernels.hadamard_quantize(weight, bits, x.dtype)
            ys.append(kernels.quest_matmul(a, w, a_bits, bits, x.dtype))  # (B, O)
            saved += [w_hat, w_trusted]
        ctx.save_for_backward(*saved)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gs):
        x_hat, x_trusted, *saved = ctx.saved_tensors
        gxs = []
        gws = []
        for i, g in enumerate(gs):
            w_hat, w_trusted = saved[2 * i:2 * i + 2]
            gxs.append(g @ w_hat)                                      # (B, C)
            gw = g.t() @ x_hat                                         # (O, C)
            gws.append(kernels.rotate_trusted([gw], w_trusted, torch.float32))

        # The kernel adds up the summands that it is given, masks and rotates.
        gx = kernels.rotate_trusted(gxs, x_trusted, x_hat.dtype)
        return gx, None, None, *gws

def fused_products(x, bits, a_bits, *weights):
    """What FusedQuest returns, where no gradient is asked for. x is then rounded as for a packed
    layer: the kernel adds up in another order than in training, in less time. That order follows
    from that of the columns, so they come in the packed layer's, here and in the weights."""
    planes = kernels.quest_planes(bits, x.size(1))
    a = kernels.hadamard_quantize(x, a_bits, planes=planes)
    ws = [kernels.hadamard_quantize(weight, bits, planes=planes) for weight in weights]
    return [kernels.quest_matmul(a, w, a_bits, bits, x.dtype) for w in ws]

class QuestLinear(nn.Module):
    """A linear with quantized weights and inputs; `weight` is the float32 master (O, C)."""
    watch = None                 # set by look_on: called with each linear and its x (B, C)

    def __init__(self, weight, bits, a_bits, grid="uniform", quantizer="quest"):
        super().__init__()
        self.weight = weight
        self.bits = bits
        self.a_bits = a_bits
        self.grid = grid
        self.quantizer = quantizer

        # Fill the cache of Hadamard matrices that `rotate` reads: torch.compile has to meet them as
        # constants, made before it traces.
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            hadamard_signs(math.gcd(weight.size(1), 128), weight.device, dtype)

    def forward(self, x):
        return self.fused(x, [self])[0]

    @staticmethod
    def fused(x, linears):
        """[linear(x) for each], quantizing x once. The linears agree in all but their weights.
        model.apply_linears calls this."""
        first = linears[0]
        weights = [m.weight for m in linears]
        flat = x.flatten(0, -2)                                        # (B, C)
        if QuestLinear.watch:
            for m in linears:
                QuestLinear.watch(m, flat)
        if first.has_kernels(x):
            compute = FusedQuest.apply if torch.is_grad_enabled() else fused_products
            ys = compute(flat, first.bits, first.a_bits, *weights)
        else:
            ys = QuestFunction.apply(flat, first.bits, first.a_bits, first.grid, first.quantizer,
                                     *weights)
        # y's own width and not -1, which is undefined where there are no tokens.
        return [y.view(*x.shape[:-1], y.size(-1)) for y in ys]         # (..., O)

    def has_kernels(self, x):
        """Does FusedQuest compute this layer for inputs x? Not for baselines, other grids, x in
        float32, --a-bits 16, and widths that 128 does not divide (kernels.quest_fits)."""
        own = self.quantizer == "quest" and self.grid == "uniform"
        return own and x.is_cuda and kernels and kernels.quest_fits(x, self.bits, self.a_bits)

    def levels(self, x):
        """The levels (O, C) that the forward pass for x (B, C) multiplies with. x only decides
        whether a kernel computes it."""
        if not self.has_kernels(x):
            return to_grid(self.weight, self.bits, self.grid, self.quantizer).levels
        q, _ = kernel_codes(self.weight, self.bits)
        return q + code_offset(self.bits)

    @torch.no_grad()
    def packed(self, dtype=torch.float32):
        """The same layer from packed codes and one float32 scale a row. The codes are rounded by
        what rounds them in training with inputs of dtype, so that the file has training's own:
        where a value lies next to a border, a kernel and PyTorch may take different sides."""
        weight = whole(self.weight)                    # with --fsdp from all ranks
        keep = None
        if self.has_kernels(weight[:1].to(dtype)):
            q, scale = kernel_codes(weight, self.bits)
        else:
            w = to_grid(weight, self.bits, self.grid, self.quantizer)
            q, scale, keep = w.codes, w.scale, w.kept
        return QuantLinear.quest_from_codes(q, scale, keep, self.bits, self.a_bits, self.grid,
                                            rotated=QUANTIZERS[self.quantizer].rotates)

def kernel_codes(weight, bits):
    """The codes q int8 (O, C) and scales (O, 1) of a weight, as FusedQuest multiplies with them:
    float32 is rounded alike with and without a dtype. (Inputs of 16 bits are not: a value next to a
    border may take another side.)"""
    codes, scale, _ = kernels.hadamard_quantize(weight, bits)
    if bits != 8:
        codes = codes >> 1                             # 2 q + 1, or with three levels 2 q
    return codes, scale[:, None]

# ---- What the run looks at --------------------------------------------------------------------

@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def look_on(model, x, see):
    """A forward pass over ids x that calls see(linear, its inputs (B, C)) for each linear."""
    QuestLinear.watch = see
    try:
        model(x)
    finally:
        QuestLinear.watch = None

def trusted_share(masks):
    return sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)

def trust_status(model, x):
    """The trusted shares of weights and inputs over all linears, for the progress line."""
    w_masks, x_masks = [], []

    def see(m, rows):
        if m.quantizer == "lsq":                       # it has no such mask
            return
        w_masks.append(to_grid(m.weight, m.bits, m.grid, m.quantizer).trusted)
        if m.a_bits < 16:
            x_masks.append(to_grid(rows, m.a_bits, activation_grid(m.grid), m.quantizer).trusted)

    look_on(model, x, see)
    text = f" trust w {100 * trusted_share(w_masks):.1f}%" if w_masks else ""
    text += f" a {100 * trusted_share(x_masks):.1f}%" if x_masks else ""
    return text + " |" if text else ""

def levels_in_use(model, x):
    """The levels (O, C), exact in bfloat16, that the linears, in order, multiply with for ids x."""
    found = []
    look_on(model, x, lambda m, rows: found.append(m.levels(rows).to("cpu", torch.bfloat16)))
    return found

# ---- Other grids, and the baseline that learns its step ----------------------------------------
# fp4: the levels of E2M1, in the place of evenly spaced ones. sparse: of every 4 pairs of weights
# the 2 of the largest norm are kept, the others are 0 (section 4.4); inputs are never pruned.

def activation_grid(grid):
    return "fp4" if grid == "fp4" else "uniform"

class LsqLinear(QuestLinear):
    """The paper's learned baseline, LSQ (1902.08153): one learned step a tensor, no rotation.

    lrqat.py has its own LSQ, on a different grid."""

    fused = None                                       # it does not share the codes of x

    def __init__(self, weight, bits, a_bits, grid="uniform", quantizer="lsq"):
        super().__init__(weight, bits, a_bits, grid, quantizer)
        self.w_step = nn.Parameter(lsq_first_step(weight.detach(), bits))
        self.a_step = nn.Parameter(torch.ones_like(self.w_step))       # see lsq_calibrate

    def forward(self, x):
        if QuestLinear.watch:
            QuestLinear.watch(self, x.flatten(0, -2))
        w, w_step = lsq_levels(self.weight, self.w_step, self.bits)
        h, a_step = x, None
        if self.a_bits < 16:
            h, a_step = lsq_levels(x.float(), self.a_step, self.a_bits)
        return code_linear(h, a_step, w, w_step, x.dtype)

    def levels(self, x):
        w, _ = lsq_levels(self.weight, self.w_step, self.bits)
        return (w - 0.5).round() + 0.5                 # v + (q - v) is q but for a last digit

    @torch.no_grad()
    def packed(self, dtype=torch.float32):
        a_step = None if self.a_bits == 16 else self.a_step.detach()
        return QuantLinear.quest(self.weight, self.bits, self.a_bits, self.grid, rotated=False,
                                 w_scale=self.w_step.detach(), a_scale=a_step)

def lsq_first_step(x, bits):
    """2 mean|x| / sqrt(qmax), where qmax is taken as 1 at 1 bit: it would be 0."""
    qmax = max(num_levels(bits) // 2 - 1, 1)
    return 2 * x.float().abs().mean() / qmax ** 0.5

def scale_gradient(x, grad_scale):
    """x forward, grad_scale times the gradient backward."""
    return x.detach() + (x * grad_scale - (x * grad_scale).detach())

def lsq_levels(x, step, bits):
    """(levels, step): floor(x / step) clipped, plus 1/2; straight through inside the clip."""
    half = num_levels(bits) // 2
    count = max(x.numel(), 1)                          # without tokens 1 / sqrt(0) would fail
    step = scale_gradient(step, (count * max(half - 1, 1)) ** -0.5)    # LSQ's 1/sqrt(N qmax)
    u = x / step
    v = (u - 0.5).clamp(-half, half - 1)               # q unrounded: floor(u) = round(u - 1/2)
    q = u.detach().floor().clamp(-half, half - 1)
    return v + (q - v).detach() + 0.5, step            # q forward, v's gradient backward

@torch.no_grad()
def lsq_calibrate(model, x):
    """Set the steps of the inputs from one batch of token ids."""
    def set_step(m, rows):
        m.a_step.copy_(lsq_first_step(rows, min(m.a_bits, 8)))     # at 16 bits it is not used
    look_on(model, x, set_step)

# ---- The run ----------------------------------------------------------------------------------

def main():
    args = parse_args()
    name = f"{args.quantizer}-w{args.bits:g}a{args.a_bits:g}"
    if args.grid != "uniform":
        name += f"-{args.grid}"
    path = os.path.join(args.out, f"{name}.pt")

    # The data and the model, whose linears are replaced by quantized ones.
    data = load_training_data(args)
    model = new_model(args, data)
    if args.model and args.bits < 16:
        suit(args, model, "quest", args.bits)
    keep_model(args, path)                             # refuses to write over --model
    check_shapes(model, args)

    # The dense --model stays as the base of comparison. By default the quantized one learns from
    # it. The dense control learns from the text: from itself there is nothing to learn.
    base = frozen_copy(model) if args.model else None
    own_teacher = args.model if args.bits < 16 else None
    teacher = open_teacher(args, base or model, own_teacher, data)
    if args.bits < 16:
        kind = LsqLinear if args.quantizer == "lsq" else QuestLinear
        model.replace_linears(lambda name, linear: kind(linear.weight, args.bits, args.a_bits,
                                                        args.grid, args.quantizer))
    header(f"{name} | W{args.bits:g}A{args.a_bits:g}", args, model, data)

    # Train. The learner is the model itself, or beside its teacher.
    learner = WithTeacher(model, teacher) if teacher else model
    x, _ = batch(data.train, 0, min(args.batch_size, 8), args.seq_len, args.seed, args.device)
    if args.quantizer == "lsq":
        lsq_calibrate(model, x)
    result = train(learner, data, args, f"{path}.state", lambda: trust_status(learner, x[:2]))

    # Evaluate it as it was trained.
    scores = evaluate(learner.eval(), data.val, args.seq_len, data.tokenizer)
    params = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for _, m in model.linears())
    say(f"trained | {show(scores)} | {len(data.val) - 1} tokens, after "
        f"{result['tokens'] / linear:.3g} training tokens per parameter of the linears")

    # Pack it, and report what the file holds, beside the levels that training multiplied with.
    live = levels_in_use(learner, x[:1]) if args.bits < 16 else []
    report(args, model, data, path, scores, live, result, base, params)

def report(args, model, data, path, scores, live, result, base, params):
    """Pack, save, load again, evaluate and sample what was loaded; print the result row. scores
    and live: of the model as it was trained, its losses and the levels that it multiplies with.
    base: the dense --model, with which the result is compared; None if it began at random."""
    linear = sum(m.weight.numel() for _, m in model.linears())
    if args.bits < 16:
        model.replace_linears(lambda name, linear: linear.packed(model.dtype))
    method = args.quantizer if args.bits < 16 else "dense"
    model, reloaded = through_the_file(path, model, args, data, method, base)
    base_loss = reloaded["loss"] - reloaded["loss_gap"] if base else None

    # Do the file's integers equal those of training?
    bpw, weights = bits_per_weight(model)
    differ, count = None, ""
    if weights:
        # These are QuantLinears, whose levels takes a dtype, not inputs.
        stored = [m.levels(torch.bfloat16).cpu() for _, m in model.linears()]
        differ = sum((a != b).sum().item() for a, b in zip(stored, live, strict=True))
        count = f"{differ} of {weights} integers differ from training's | "

    # Beside the integers the file has training's own scales. What else could differ?
    why = ""
    if weights and args.embed_bits < 16:
        why = f", by the embedding and head in {args.embed_bits} bits"

    # Record the row before printing, so that a later failure cannot lose it.
    row = record(args, method, model, reloaded, result,
                 w_bits=args.bits, a_bits=args.a_bits, grid=args.grid, size=args.size, lr=args.lr,
                 teacher=args.teacher, linear_params=linear, base_val_loss=base_loss,
                 curve=curve(result["losses"]),
                 integers_differ=differ, packed_minus_live=reloaded["loss"] - scores["loss"])
    say(f"packed  | {show(reloaded)} | {count}loss differs by "
        f"{abs(reloaded['loss'] - scores['loss']):.1e}{why}")
    if weights:
        size = tensor_bytes(model.state_dict().values())
        say(f"size | linears {2 * weights} bytes in bfloat16 -> {round(bpw * weights / 8)} packed "
            f"({bpw:.3f} bits per weight with scales) | whole model {2 * params} -> {size} "
            f"with embedding, head and norms | {path}")

    # Text, and the row as the last line.
    prompt = "def "
    text = sample_text(model, data.tokenizer, prompt, 200, args.seed)
    say(f"--- 200 tokens after {prompt!r}, from the saved file ---\n{text}\n---")
    say(row)

def curve(losses, points=40):
    """The training loss over the run: means of equal parts of the steps."""
    parts = torch.tensor(losses).tensor_split(min(points, len(losses)))
    return [round(part.mean().item(), 4) for part in parts]

# ---- Flags ------------------------------------------------------------------------------------

BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8, 16)

def bits_value(text):
    """argparse type: one of BITS, 1.58 as a float and the others as integers."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if value not in BITS:
        raise ArgumentTypeError(f"{text} is not one of {', '.join(map(str, BITS))}")
    return value if value == 1.58 else int(value)

def parse_args(argv=None):
    p = Parser(prog="quest.py", description="Train with quantized weights and activations (QuEST).")
    p.add_argument("--bits", type=bits_value, default=4, help="of the weights, 1, 1.58 (three "
                   "levels), 2 to 8, or 16: the dense control (default: 4)")
    p.add_argument("--a-bits", type=bits_value,
                   help="of the activations; 16: weights only (default: --bits)")
    p.add_argument("--quantizer", choices=(*QUANTIZERS, "lsq"), default="quest",
                   help="quest, or a baseline: trust (no Hadamard), clip (the mask ends at the "
                   "grid), ste (no mask), lsq (learned step) (default: quest)")
    p.add_argument("--grid", choices=("uniform", "fp4", "sparse"), default="uniform",
                   help="fp4: E2M1 levels; sparse: keep 2 of 4 pairs of weights (default: uniform)")
    add_teacher(p, "the dense --model, if one is given; of random weights none")
    add_flags(p, fsdp=True)
    args = p.parse_args(argv)
    args.a_bits = args.a_bits or args.bits
    check_args(args)

    # What --size says is for random weights. From a dense model `suit` chooses instead.
    if args.model and args.bits < 16:
        for name in ("steps", "batch_size", "lr"):
            if getattr(args, name) is None and not args.smoke:
                setattr(args, name, UNSET[name])
    return resolve(args)

def check_args(args):
    """Raise UsageError for flags that do not go together."""
    dense = args.bits == 16
    if dense and not (args.a_bits == 16 and args.quantizer == "quest" and args.grid == "uniform"):
        raise UsageError("--bits 16 is the dense control; leave --a-bits, --quantizer, --grid out")
    if args.grid == "fp4" and not (args.bits == 4 and args.a_bits in (4, 16)):
        raise UsageError(f"--grid fp4 needs --bits 4 and --a-bits 4 or 16, not --bits {args.bits} "
                         f"--a-bits {args.a_bits}")
    if args.grid == "sparse" and args.bits in (1.58, 16):
        raise UsageError(f"--grid sparse needs whole --bits from 1 to 8, not {args.bits}")
    if args.quantizer == "lsq" and (args.grid != "uniform" or 1.58 in (args.bits, args.a_bits)):
        raise UsageError("--quantizer lsq needs --grid uniform and whole --bits and --a-bits")
    if args.quantizer == "lsq" and args.fsdp:
        raise UsageError("--fsdp cannot share out the single numbers of --quantizer lsq; leave one "
                         "of the two out")

def check_shapes(model, args):
    """Raise UsageError where --grid sparse cannot cut a linear's inputs into four pairs."""
    if args.grid != "sparse":
        return
    for name, linear in model.linears():
        C = linear.in_features
        if C % 8:
            raise UsageError(f"--grid sparse keeps 2 of 4 pairs of inputs, and 8 does not divide "
                             f"the {C} of {name}; leave --grid out")

if __name__ == "__main__":
    run(main)
