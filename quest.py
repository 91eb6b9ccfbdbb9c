"""QuEST: train a LLaMA from scratch with 1 to 8-bit weights and activations.

    python quest.py --bits 4                    # tiny preset: train, evaluate, pack, write text
    python quest.py --bits 4 --smoke            # every line of it in a few seconds
    python quest.py --bits 16                   # the dense control: same data, same schedule
    python model.py sample out/quest-w4a4.pt    # use the packed result
    torchrun --standalone --nproc_per_node=8 quest.py --size 800M --bits 4 --fsdp     # 8 GPUs

The idea:
  1. Rotate both operands of every linear with the same Hadamard matrix H. Outliers spread over
     their block, and the product does not change: (x H)(w H)^T = x w^T.
  2. Round each row to the levels that suit a Gaussian of the row's root mean square best: one
     constant per bit-width, nothing to learn, nothing to calibrate.
  3. In the backward pass, let the gradient through only where rounding moved a value by at most
     half a step (the trust mask), and rotate it back. Weights and optimizer stay float32.

Paper: QuEST, Panferov et al. 2025 (arXiv 2502.05003); code: github.com/IST-DASLab/QuEST.
Ours differs: clips are exact (theirs stop early); the ternary grid has three levels (theirs four);
FP4's trust zone comes from FP4's own levels; rows of zeros keep learning; weight-only runs rotate
both operands, so that they also suit a trained model; H is exact, not bfloat16.
Not here: a speed-up. On a GPU the forward products are integer products, but training is still
slower than dense training; the gradients' products are of bfloat16.

Shapes: x (..., C) inputs, w (O, C) weights, y (..., O); h rotated rows, q integer codes.
"""
import math
import os

import torch
import torch.nn as nn

from model import UsageError
from nanobit.checkpoint import tensor_bytes
from nanobit.cli import add_flags, Parser, resolve, run
from nanobit.data import batch
from nanobit.generate import sample_text
from nanobit.ranks import say, whole
from nanobit.runs import (header, keep_model, load_training_data, new_model, record, show,
                          through_the_file)
from nanobit.train import evaluate, train
from quantizers import (QuantLinear, bits_per_weight, clip_limit, code_linear, code_offset,
                        find_kernels, hadamard_signs, keep_two_of_four, num_levels, quest_codes,
                        rotate, trust_limit)

kernels = find_kernels() if torch.cuda.is_available() else None

BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8, 16)
# --quantizer: rotate?, and the largest |h| / scale that gets a gradient, from (bits, grid). The
# baselines share QuEST's grid and scale; "lsq" learns its step instead (LsqLinear).
QUANTIZERS = {
    "quest": (True, trust_limit),
    "trust": (False, lambda bits, grid: trust_limit(bits, grid, one_bit=1.25)),
    "clip": (False, clip_limit),
    "ste": (False, lambda bits, grid: math.inf),
    "lsq": (False, clip_limit),
}

def parse_args(argv=None):
    def bits(text):
        try:
            value = float(text)
        except ValueError:
            value = 0
        if value not in BITS:
            raise ValueError
        return value if value == 1.58 else int(value)

    bits.__name__ = f"bits value (one of {', '.join(map(str, BITS))})"     # argparse prints it
    p = Parser(prog="quest.py", description="Train with quantized weights and activations (QuEST).")
    p.add_argument("--bits", type=bits, default=4, help="of the weights, 1, 1.58 (three levels), "
                   "2 to 8, or 16: the dense control (default: 4)")
    p.add_argument("--a-bits", type=bits,
                   help="of the activations; 16: weights only (default: --bits)")
    p.add_argument("--quantizer", choices=tuple(QUANTIZERS), default="quest",
                   help="quest, or a baseline: trust (no Hadamard), clip and ste (no trust mask "
                   "either), lsq (learned step) (default: quest)")
    p.add_argument("--grid", choices=("uniform", "fp4", "sparse"), default="uniform",
                   help="fp4: E2M1 levels; sparse: keep 2 of 4 pairs of weights (default: uniform)")
    add_flags(p, fsdp=True)
    args = p.parse_args(argv)
    args.a_bits = args.a_bits or args.bits
    if args.bits == 16 and (args.a_bits, args.quantizer, args.grid) != (16, "quest", "uniform"):
        raise UsageError("--bits 16 is the dense control; leave --a-bits, --quantizer, --grid out")
    if args.grid == "fp4" and (args.bits, args.a_bits) not in ((4, 4), (4, 16)):
        raise UsageError(f"--grid fp4 has 4 bits; --bits {args.bits} --a-bits {args.a_bits} do not")
    if args.grid == "sparse" and args.bits in (1.58, 16):
        raise UsageError(f"--grid sparse needs whole --bits from 1 to 8, not {args.bits}")
    if args.quantizer == "lsq" and (args.grid != "uniform" or 1.58 in (args.bits, args.a_bits)):
        raise UsageError("--quantizer lsq needs --grid uniform and whole --bits and --a-bits")
    if args.quantizer == "lsq" and args.fsdp:
        raise UsageError("--fsdp cannot share out the single numbers of --quantizer lsq; leave one "
                         "of the two out")
    return resolve(args)

def check_shapes(model, args):
    """Raise UsageError where --grid sparse cannot cut a linear's inputs into four pairs."""
    for name, linear in model.linears() if args.grid == "sparse" else ():
        C = linear.in_features
        if C % 8:
            raise UsageError(f"--grid sparse keeps 2 of 4 pairs of inputs, and 8 does not divide "
                             f"the {C} of {name}; leave --grid out")

# ---- The method -------------------------------------------------------------------------------

TRUST = None  # a list while `trust_status` collects masks
LEVELS = None  # a list while `levels_in_use` collects what the weights' products are made of

def quantize_operand(v, bits, grid, quantizer):
    """One operand's rows v (..., C) -> levels, scale (..., 1), saved; levels * scale ~ rotated v.

    saved = (q int8, trusted bool, keep bool or None) is all that the backward pass needs. At 16
    bits v is only rotated: (h, None, (h, None, None)).
    """
    rotated, limit = QUANTIZERS[quantizer]
    h = rotate(v) if rotated else v.float()
    if bits == 16:
        h = h.to(v.dtype)
        return h, None, (h, None, None)
    q, scale, u = quest_codes(h, bits, grid)
    trusted, keep = u.abs() <= limit(bits, grid), None
    codes, levels = q.to(torch.int8), q.add_(code_offset(bits, grid))
    if grid == "sparse":                               # a pruned value is 0, trusted within half
        keep = keep_two_of_four(h)                     # a step of it
        levels, trusted = levels * keep, trusted & (keep | (u.abs() <= 0.5))
    return levels, scale, (codes, trusted, keep)

def restore(q, offset, scale, dtype):
    """(q + offset) * scale from int8 codes; levels are exact in every dtype."""
    return (q.to(dtype).add_(offset) * scale).to(dtype)

class QuestFunction(torch.autograd.Function):
    """y = x_hat w_hat^T with QuEST's gradient (paper, algorithm 1): x (B, C), w (O, C) -> (B, O).

    forward:   x_h = x H,  w_h = w H,  x_hat and w_hat their nearest grid values
               y = (q_x + 1/2) (q_w + 1/2)^T * s_x s_w^T
    backward:  g_x = (M_x * (g w_hat)) H,   g_w = (M_w * (g^T x_hat)) H,   M the trust masks
    Kept in between: int8 codes, boolean masks, one scale a row; no float copy of x or w (except
    the rotated x where only weights are quantized).
    Several weights may share x: its codes are made once and a tuple of results comes back.
    """

    @staticmethod
    def forward(ctx, x, bits, a_bits, grid, quantizer, *weights):
        a_grid = "fp4" if grid == "fp4" else "uniform"                     # sparse: weights only
        x_levels, x_scale, (x_q, x_trusted, _) = quantize_operand(x, a_bits, a_grid, quantizer)
        saved, ys = [x_q, x_trusted, x_scale], []
        for w in weights:
            w_levels, w_scale, w_saved = quantize_operand(w, bits, grid, quantizer)
            if LEVELS is not None:
                LEVELS.append(w_levels.to("cpu", torch.bfloat16))          # exact up to 8 bits
            ys.append(code_linear(x_levels, x_scale, w_levels, w_scale, x.dtype))
            saved += [*w_saved, w_scale]
            if TRUST is not None:
                TRUST.append((w_saved[1], x_trusted))
        ctx.save_for_backward(*saved)
        ctx.x_offset, ctx.w_offset = code_offset(a_bits, a_grid), code_offset(bits, grid)
        ctx.rotated, ctx.dtype = QUANTIZERS[quantizer][0], x.dtype
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gs):
        x_q, x_trusted, x_scale, *saved = ctx.saved_tensors
        x_hat = x_q if x_scale is None else restore(x_q, ctx.x_offset, x_scale, ctx.dtype)
        gx, gws = 0, []
        for g, w_q, w_trusted, keep, w_scale in zip(gs, *(saved[i::4] for i in range(4))):
            w_hat = restore(w_q, ctx.w_offset, w_scale, ctx.dtype)         # (O, C)
            if keep is not None:
                w_hat = w_hat * keep
            gx = gx + g @ w_hat                                            # (B, C)
            gw = (g.t() @ x_hat) * w_trusted.to(ctx.dtype)                 # (O, C)
            gws.append((rotate(gw) if ctx.rotated else gw).float())
        if x_trusted is not None:
            gx = gx * x_trusted.to(ctx.dtype)          # a CPU is slow at float times bool
        if ctx.rotated:
            gx = rotate(gx, dtype=ctx.dtype)
        return gx, None, None, None, None, *gws

class FusedQuest(torch.autograd.Function):
    """QuestFunction on a GPU: a kernel for each of its lines, and integer products forward.

    One pass makes codes, x_hat in x's dtype and the trust mask, a bit a value. x_hat and w_hat are
    kept as they are, as the backward pass multiplies with them: 2 1/8 bytes a value.
    """

    @staticmethod
    def forward(ctx, x, bits, a_bits, *weights):
        *a, x_hat, x_trusted = kernels.hadamard_quantize(x, a_bits, x.dtype)
        ys, saved = [], [x_hat, x_trusted]
        for weight in weights:
            *w, w_hat, w_trusted = kernels.hadamard_quantize(weight, bits, x.dtype)
            if LEVELS is not None:                     # below 8 bits the kernel doubles them
                levels = w[0] + 0.5 if bits == 8 else w[0] / 2
                LEVELS.append(levels.to("cpu", torch.bfloat16))
            ys.append(kernels.quest_matmul(a, w, a_bits, bits, x.dtype))           # (B, O)
            saved += [w_hat, w_trusted]
        ctx.save_for_backward(*saved)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gs):
        x_hat, x_trusted, *saved = ctx.saved_tensors
        gxs, gws = [], []
        for g, w_hat, w_trusted in zip(gs, saved[::2], saved[1::2]):
            gxs.append(g @ w_hat)                                                  # (B, C)
            gws.append(kernels.rotate_trusted([g.t() @ x_hat], w_trusted, torch.float32))
        return kernels.rotate_trusted(gxs, x_trusted, x_hat.dtype), None, None, *gws

class QuestLinear(nn.Module):
    """A linear with quantized weights and inputs; `weight` is the float32 master (O, C)."""

    def __init__(self, weight, bits, a_bits, grid="uniform", quantizer="quest"):
        super().__init__()
        self.weight, self.how = weight, (bits, a_bits, grid, quantizer)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):       # or torch.compile sees
            hadamard_signs(math.gcd(weight.size(1), 128), weight.device, dtype)    # them change

    def forward(self, x):
        return self.fused(x, [self])[0]

    @staticmethod
    def fused(x, linears):
        """[linear(x) for each], quantizing x once."""
        (bits, a_bits, grid, quantizer), weights = linears[0].how, [m.weight for m in linears]
        flat = x.flatten(0, -2)                                                    # (B, C)
        if (TRUST is None and (grid, quantizer) == ("uniform", "quest") and x.is_cuda and kernels
                and kernels.quest_fits(x, bits, a_bits)):
            ys = FusedQuest.apply(flat, bits, a_bits, *weights)
        else:
            ys = QuestFunction.apply(flat, *linears[0].how, *weights)
        return [y.view(*x.shape[:-1], -1) for y in ys]

    @torch.no_grad()
    def packed(self):
        """The same layer from packed codes and one float32 scale a row."""
        bits, a_bits, grid, quantizer = self.how
        return QuantLinear.quest(whole(self.weight), bits, a_bits, grid, QUANTIZERS[quantizer][0])

class LsqLinear(QuestLinear):
    """The paper's learned baseline, LSQ (1902.08153): one learned step a tensor, no rotation."""

    fused = None

    def __init__(self, weight, bits, a_bits, grid="uniform", quantizer="lsq"):
        super().__init__(weight, bits, a_bits, grid, quantizer)
        self.w_step = nn.Parameter(lsq_first_step(weight.detach(), bits))
        self.a_step = nn.Parameter(torch.ones_like(self.w_step))           # see lsq_calibrate

    def forward(self, x):
        bits, a_bits, _, _ = self.how
        w, w_step = lsq_levels(self.weight, self.w_step, bits)
        if LEVELS is not None:                         # straight through: off by a last digit
            LEVELS.append(((w - 0.5).round() + 0.5).to("cpu", torch.bfloat16))
        h, a_step = (x, None) if a_bits == 16 else lsq_levels(x.float(), self.a_step, a_bits)
        return code_linear(h, a_step, w, w_step, x.dtype)

    @torch.no_grad()
    def packed(self):
        bits, a_bits, grid, _ = self.how
        return QuantLinear.quest(self.weight, bits, a_bits, grid, False, self.w_step.detach(),
                                 None if a_bits == 16 else self.a_step.detach())

def lsq_first_step(x, bits):
    """2 mean|x| / sqrt(qmax), where qmax is taken as 1 at 1 bit: it would be 0."""
    return 2 * x.float().abs().mean() / max(num_levels(bits) // 2 - 1, 1) ** 0.5

def lsq_levels(x, step, bits):
    """(levels, step): floor(x / step) clipped, plus 1/2; straight through inside the clip."""
    half = num_levels(bits) // 2
    scale = (x.numel() * max(half - 1, 1)) ** -0.5     # LSQ's scale of the step's gradient only
    step = step.detach() + (step * scale - (step * scale).detach())
    u = x / step
    v = (u - 0.5).clamp(-half, half - 1)               # carries the gradient
    q = u.detach().floor().clamp(-half, half - 1)      # carries the value
    return v + (q - v).detach() + 0.5, step

@torch.no_grad()
def lsq_calibrate(model, x):
    """Set the steps of the inputs from one batch of token ids."""
    def set_step(m, inputs):
        m.a_step.copy_(lsq_first_step(inputs[0], min(m.how[1], 8)))
    hooks = [m.register_forward_pre_hook(set_step) for _, m in model.linears()]
    model(x)
    for hook in hooks:
        hook.remove()

@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def trust_status(model, x):
    """The trusted shares of weights and inputs over all linears, for the progress line."""
    global TRUST
    TRUST, text = [], ""
    model(x)
    for name, masks in zip(("trust w", "a"), zip(*TRUST)):
        masks = [m for m in masks if m is not None]    # there are none of unquantized inputs
        if masks:
            share = sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
            text += f" {name} {100 * share:.1f}%"
    TRUST = None
    return text and text + " |"

@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def levels_in_use(model, x):
    """The levels (O, C) that the linears, in order, multiply with in a forward pass over ids x."""
    global LEVELS
    LEVELS = []
    model(x)
    found, LEVELS = LEVELS, None
    return found

# ---- The run ----------------------------------------------------------------------------------

def main():
    args = parse_args()
    name = f"{args.quantizer}-w{args.bits:g}a{args.a_bits:g}"
    name += "" if args.grid == "uniform" else f"-{args.grid}"
    path = os.path.join(args.out, f"{name}.pt")
    data = load_training_data(args)
    model = new_model(args, data)
    keep_model(args, path)
    check_shapes(model, args)
    base = evaluate(model, data.val, args.seq_len)["loss"] if args.model else None
    if args.bits < 16:
        kind = LsqLinear if args.quantizer == "lsq" else QuestLinear
        model.replace_linears(lambda name, linear: kind(linear.weight, args.bits, args.a_bits,
                                                        args.grid, args.quantizer))
    header(f"{name} | W{args.bits:g}A{args.a_bits:g}", args, model, data)
    x, _ = batch(data.train, 0, min(args.batch_size, 8), args.seq_len, args.seed, args.device)
    if args.quantizer == "lsq":
        lsq_calibrate(model, x)
    result = train(model, data, args, f"{path}.state", lambda: trust_status(model, x[:2]))
    scores = evaluate(model.eval(), data.val, args.seq_len, data.tokenizer)
    params = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for _, m in model.linears())
    say(f"trained | {show(scores)} | {len(data.val) - 1} tokens, after "
        f"{result['tokens'] / linear:.3g} training tokens per parameter of the linears")
    live = levels_in_use(model, x[:1])
    report(args, model, data, path, scores, live, result, base, params)

def report(args, model, data, path, scores, live, result, base, params):
    """Pack, save, load again, evaluate and sample what was loaded; print the result row. scores
    and live: of the model as it was trained, its losses and the levels that it multiplies with."""
    linear = sum(m.weight.numel() for _, m in model.linears())
    if args.bits < 16:
        model.replace_linears(lambda name, linear: linear.packed())
    method = args.quantizer if args.bits < 16 else "dense"
    model, reloaded = through_the_file(path, model, args, data, method)
    bpw, weights = bits_per_weight(model)
    differ, count = None, ""
    if weights:
        stored = [m.levels(torch.bfloat16).cpu() for _, m in model.linears()]
        differ = sum((a != b).sum().item() for a, b in zip(stored, live, strict=True))
        count = f"{differ} of {weights} integers differ from training's | "

    # The row comes before all that is printed about it: nothing after this can lose the result.
    row = record(args, method, model, reloaded, result,
                 w_bits=args.bits, a_bits=args.a_bits, grid=args.grid, size=args.size, lr=args.lr,
                 linear_params=linear, base_val_loss=base, curve=curve(result["losses"]),
                 integers_differ=differ, packed_minus_live=reloaded["loss"] - scores["loss"])
    say(f"packed  | {show(reloaded)} | {count}loss differs by "
        f"{abs(reloaded['loss'] - scores['loss']):.1e}")
    if weights:
        size = tensor_bytes(model.state_dict().values())
        say(f"size | linears {2 * weights} bytes in bfloat16 -> {round(bpw * weights / 8)} packed "
            f"({bpw:.3f} bits per weight with scales) | whole model {2 * params} -> {size} "
            f"(embedding, head and norms stay float32) | {path}")
    prompt = "def "
    text = sample_text(model, data.tokenizer, prompt, 200, args.seed)
    say(f"--- 200 tokens after {prompt!r}, from the saved file ---\n{text}\n---")
    say(row)

def curve(losses, points=40):
    """The training loss over the run: means of equal parts of the steps."""
    parts = torch.tensor(losses).tensor_split(min(points, len(losses)))
    return [round(part.mean().item(), 4) for part in parts]

if __name__ == "__main__":
    run(main)
