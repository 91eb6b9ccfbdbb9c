"""LR-QAT: quantization-aware training of a pre-trained LLaMA through low-rank adapters.

    python lrqat.py --bits 2                    # every arm on the tiny base; one table; 3 minutes
    python lrqat.py --bits 2 --smoke            # every line of it in a few seconds
    python lrqat.py --bits 2 --arm full         # one arm alone, packed: here full QAT
    python model.py eval out/lrqat-w2.pt        # the merged, packed result
    torchrun --standalone --nproc_per_node=2 lrqat.py --bits 2      # the same arms on 2 GPUs

tests/time_lrqat_memory.py measures bytes and speed, at 7B on one GPU.

The idea:
  1. Quantization-aware training pays for a gradient and two moments of every weight. Freeze the
     weight instead, in units of its grid's step and in 0.5 to 4 bytes: phi(W0 / s0).
  2. Train a rank-r product A B inside of the rounding, and the scale s outside of it:
     W_hat = s (clip(round(phi(W0 / s0) + alpha/r A B)) - z). What A B learned is in the codes, so
     that afterwards A and B go, and inference pays nothing.
  3. Autograd would keep three dense tensors for each weight. Our function keeps x, the frozen
     codes, A, B and s, which exist anyway, and builds the weight again in the backward pass.

Paper: LR-QAT, Bondarenko et al. 2024 (arXiv 2406.06385); code: Qualcomm-AI-research/LR-QAT.
Ours differs: s, A, B and the sum Z are float32 (bfloat16 scales do not move at the paper's rate of
1e-5); s0 is the range search of `rtn`, norm 2.4 (the paper tries 2 to 5), which begins at one step
= 2 max|w| / (2^bits - 1) and ends at 0.21 of that (theirs: from max|w| / (2^(bits-1) - 1) down to a
hundredth); 2 bits have a real asymmetric grid with a zero point z; "packed" is two codes a byte;
the SVD start divides each row of A by its own scale (the official one is off where a layer is
square); alpha and the rates suit a hundred steps. --a-bits also quantizes the norms' outputs, where
the released code and its flags disagree. On a GPU, A B runs in TF32. Under --compile the compiler
decides what is kept. Not here: training a checkpoint whose dense form does not fit.
Printed: learn, parameters that learn. recovered, the share of the loss between RTN and dense
training of the same length that an arm wins back; with --arm there is no such training to compare
with, and no share. flipped, integers that A B moved to other codes.
Shapes: W (O, C) weights, A (O, r), B (r, C), G = C / g groups of inputs, s and z (O, G).
"""
import copy
import math
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UsageError
from nanobit.cli import add_flags, number, Parser, resolve, run
from nanobit.data import batch
from nanobit.ranks import say
from nanobit.runs import (arm_row, check_groups, definite_hessian, finish, header, keep_model,
                          load_base, score, show, through_the_file)
from nanobit.train import train_arm
from quantizers import (EPS, QuantLinear, bits_per_weight, block_hessians, dequantize, gptq, rtn,
                        unpack)

ALPHA = 32.0                         # the paper: 1, for 10,000 steps
RATES = {"A": 1.0, "B": 1.0, "scale": 0.03, "weight": 0.03}         # peak rates over --lr
PHI = {"fp32": (4, 8), "bf16": (2, 8), "fixed": (1, 7), "packed": (0.5, 4)}  # bytes, most bits
ARMS = ("dense", "dense, longer", "RTN", "GPTQ", "scales only (PEQA)", "full QAT (LSQ)",
        "LR-QAT, s frozen", "LR-QAT")
ALONE = {"scales": ARMS[4], "full": ARMS[5], "frozen": ARMS[6], "lr-qat": ARMS[7]}     # --arm

def parse_args(argv=None):
    p = Parser(prog="lrqat.py", description="Low-rank quantization-aware training (LR-QAT).")
    add = p.add_argument
    add("--bits", type=number(int, 2, 8), default=2, help="of weights; 2: asymmetric (default: 2)")
    add("--group-size", type=number(int, -1), default=-1, help="inputs a scale; -1: all (default)")
    add("--arm", choices=tuple(ALONE), help="train this arm only, and pack it (default: train all, "
        "pack lr-qat)")
    add("--phi", choices=tuple(PHI), default="fixed", help="format of the frozen weights; fixed: "
        "int8 with --bits integer bits; packed: integers, two a byte (default: fixed)")
    add("--rank", type=number(int, 1), default=32, help="of A and B (default: 32)")
    add("--init", choices=("zero", "svd"), default="zero", help="start of A B: zero, or the "
        "rounding error's SVD (default: zero)")
    add("--a-bits", type=number(int, 2, 16), default=16, help="of activations, a grid a token; "
        "16: not quantized (default: 16)")
    add("--kv-bits", type=number(int, 2, 16), help="of keys and values (default: --a-bits)")
    add_flags(p)
    p.set_defaults(lr=1e-2, seq_len=0)                 # the rate of A and B; the base's windows
    args = p.parse_args(argv)
    args.kv_bits, args.steps = args.kv_bits or args.a_bits, args.steps or (6 if args.smoke else 80)
    check_phi(args)
    return resolve(args)

def check_phi(args):
    """Raise UsageError for more bits than the format of the frozen weights holds."""
    most = PHI[args.phi][1]
    if args.bits > most:
        raise UsageError(f"--phi {args.phi} holds at most {most} bits, not --bits {args.bits}; try "
                         "--phi bf16")

def check_shapes(model, args):
    """Raise UsageError for a rank, a group or a phi that some linear of the model cannot have."""
    check_groups(model, args.group_size)
    for name, linear in model.linears():
        O, C = linear.weight.shape
        for wrong, message in (
                (args.rank > min(O, C), f"--rank {args.rank} is above a side of {name}, {O} x {C}; "
                 f"try --rank {min(O, C, 32)}"),
                (args.phi == "packed" and C % 2, "--phi packed needs an even number of columns, "
                 f"{name} has {C}; try --phi fixed")):
            if wrong:
                raise UsageError(message)

# ---- The method -------------------------------------------------------------------------------

def limits(bits):
    """The smallest and the largest code, signed."""
    return -2 ** (bits - 1), 2 ** (bits - 1) - 1

def start_range(w, bits, group_size, search=True):
    """rtn's range of w (O, C): scale (O, G), and zero_point int8 (O, G) at 2 bits, else None."""
    _, scale, zero_point = rtn(w.float(), bits, group_size, symmetric=bits > 2, mse=search)
    return scale, None if bits > 2 else (zero_point + limits(bits)[0]).to(torch.int8)

def to_grid(w, scale, zero_point):
    """w / scale + zero_point: weights (O, C) in steps of the grid, not rounded."""
    v = w.view(*scale.shape, -1) / scale.unsqueeze(-1)                             # (O, G, g)
    return (v if zero_point is None else v + zero_point.unsqueeze(-1)).flatten(1)

def downcast(v, bits, phi):
    """phi: v (O, C) in steps of the grid -> what is stored. Floats stay unclipped. Ties go to even.

    fixed: int8, `bits` integer bits with the sign and 8 - bits fraction bits. packed: integers,
    column 2j in the low half of a byte and 2j + 1 in the high half, each plus 8.
    """
    if phi in ("fp32", "bf16"):
        return v.to(torch.float32 if phi == "fp32" else torch.bfloat16)
    v = v.clamp(*limits(bits))                         # first: 8.2 * 16 would wrap around in int8
    if phi == "fixed":
        return (v * 2 ** (8 - bits)).round().to(torch.int8)
    q = (v.round() + 8).to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4                                             # (O, C/2)

def latent(codes, A, B, bits, phi):
    """Z = up(codes) + alpha/r A B (O, C) in A's float32; A None: up(codes)."""
    if phi == "packed":
        codes = (torch.stack((codes & 15, codes >> 4), -1).to(torch.int8) - 8).flatten(1)
    step = 2.0 ** (bits - 8) if phi == "fixed" else 1.0
    if A is None:
        return codes.float() * step
    return (A @ B).mul_(ALPHA / A.size(1)).add_(codes, alpha=step)                 # in place

def integers(codes, A, B, bits, phi):
    """clip(round(Z)), the signed integers as floats (O, C). Training and merging both call this."""
    return latent(codes, A, B, bits, phi).round_().clamp_(*limits(bits))

class LRQATFunction(torch.autograd.Function):
    """y = x W_hat^T: (..., C) -> (..., O). With D = dL/dW_hat = g^T x and M = [round(Z) in range]:

        dL/dZ = s D M     dL/dA = alpha/r dL/dZ B^T     dL/dB = alpha/r A^T dL/dZ
        dL/ds = the row's or group's sum of D (Q - z), the true derivative: s is outside alone.
                LSQ, where it is inside too, subtracts M W/s from Q.
    s and M are elementwise, so the dense D must exist, unlike in LoRA; but for one linear only.
    """

    @staticmethod
    def forward(ctx, x, codes, A, B, scale, zero_point, bits, phi, group_size):
        ctx.save_for_backward(x, codes, A, B, scale, zero_point)
        ctx.how = bits, phi, group_size
        q = integers(codes, A, B, bits, phi)
        return F.linear(x, dequantize(q, scale, zero_point, group_size).to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        (x, codes, A, B, scale, zero_point), (bits, phi, group_size) = ctx.saved_tensors, ctx.how
        z = latent(codes, A, B, bits, phi).round_()
        q = z.clamp(*limits(bits))
        q, inside, gA, gB = q.to(torch.int8), q == z, None, None                   # (O, C)
        del z
        gx = g @ dequantize(q, scale, zero_point, group_size).to(g.dtype)
        D = (g.flatten(0, -2).t() @ x.flatten(0, -2)).to(scale.dtype)              # (O, C)
        gs = (D * q).view(*scale.shape, -1).sum(-1)                                # (O, G)
        if zero_point is not None:
            gs -= zero_point * D.view(*scale.shape, -1).sum(-1)
        if A is not None:                              # D becomes alpha/r dL/dZ
            factor = (scale * (ALPHA / A.size(1))).unsqueeze(-1)
            D.mul_(inside).view(*scale.shape, -1).mul_(factor)
            gA, gB = D @ B.t(), A.t() @ D
        return gx, None, gA, gB, gs, None, None, None, None

class LRQATLinear(nn.Module):
    """A linear whose weight is frozen `codes`; A, B and `scale` learn, at rank 0 only `scale`."""

    @torch.no_grad()
    def __init__(self, w, scale, zero_point, bits, group_size, rank, phi, svd=False):
        super().__init__()
        w, self.how, self.A, self.B = w.float(), (bits, phi, group_size), None, None
        v = to_grid(w, scale, zero_point)
        if rank:                                       # one zero factor: A B = 0, and yet A learns
            A = w.new_zeros(w.size(0), rank)
            B = w.new_empty(rank, w.size(1)).uniform_(-1, 1) * w.size(1) ** -0.5
            if svd:                                    # phi holds the rest: Z starts at W0 / s0 too
                A, B = svd_start(v, scale, rank, bits)
                v = v - ALPHA / rank * A @ B
            self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale = nn.Parameter(scale.clone())
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("codes", downcast(v, bits, phi))

    def forward(self, x):
        return LRQATFunction.apply(x, self.codes, self.A, self.B, self.scale.clamp(min=EPS),
                                   self.zero_point, *self.how)

    def rounded(self):
        """The integers (O, C) of the forward pass."""
        return integers(self.codes, self.A, self.B, *self.how[:2])

    @torch.no_grad()
    def merge(self):
        """(q, scale, zero_point) as `rtn` returns them: q int8, or uint8 with a zero_point."""
        q, scale = self.rounded(), self.scale.clamp(min=EPS)
        if self.zero_point is None:
            return q.to(torch.int8), scale, None
        low = limits(self.how[0])[0]                   # codes from 0 on
        return (q - low).to(torch.uint8), scale, (self.zero_point - low).to(torch.uint8)

def svd_start(v, scale, rank, bits):
    """A, B with alpha/r A B the best rank-r copy of W - W_hat, whose row i is s_i (v - round(v));
    then row i of A is over s_i. s_i: a row's mean scale. (The paper's T = 1, before phi.)"""
    row = scale.mean(1, keepdim=True)                                              # (O, 1)
    error = row * (v - v.round().clamp(*limits(bits)))                             # (O, C)
    U, S, V = torch.linalg.svd(error, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root * (rank / ALPHA) / row, root.unsqueeze(1) * V[:rank]

class FullQATLinear(LRQATLinear):
    """The main baseline, LSQ (1902.08153): W and s learn, and s is inside of the rounding too."""

    def __init__(self, w, *grid):
        super().__init__(w, *grid, rank=0, phi="fp32")
        self.weight, self.codes = nn.Parameter(w.clone()), None

    def rounded(self):
        v = to_grid(self.weight, self.scale.clamp(min=EPS), self.zero_point)
        return v.round().clamp(*limits(self.how[0]))

    def forward(self, x):
        (bits, _, group_size), scale = self.how, self.scale.clamp(min=EPS)
        v = to_grid(self.weight, scale, self.zero_point)                           # (O, C)
        q = (v + (v.round() - v).detach()).clamp(*limits(bits))
        return F.linear(x, dequantize(q, scale, self.zero_point, group_size).to(x.dtype))

def linear_schedule(step, steps, peak):
    """Up from 0 over the first tenth of the steps, then down to 0 (the paper's). A run of a single
    step has no way up and takes it at the peak: at rate 0 it would learn nothing."""
    warm = min(max(1, round(0.1 * steps)), steps - 1)
    return peak * (step / warm if step < warm else (steps - step) / (steps - warm))

def arm_optimizer(model, lr):
    """AdamW over what learns, each kind at its own peak rate; weight decay for W alone."""
    learn = [(n.rsplit(".", 1)[1], p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for kind, p in learn if kind == k], "peak": rate * lr,
               "weight_decay": 0.1 * (k == "weight")} for k, rate in RATES.items()]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)
    optimizer.schedule = linear_schedule
    return optimizer

# ---- The arms of the comparison: the same linears may learn in each, all else is frozen --------

def convert(model, arm, args, ranges):
    """Turn the linears into those of the arm, one at a time. ranges: {name: what start_range
    gave}."""
    model.requires_grad_(False).train()
    if not arm.startswith("dense"):
        model.config.a_bits, model.config.kv_bits = args.a_bits, args.kv_bits

    def make(name, linear):
        w = linear.weight.detach()
        linear.weight = None                           # the source is freed before the next one
        return arm_linear(linear, w, ranges[name], arm, args)

    return model.replace_linears(make)

def arm_linear(linear, w, grid, arm, args):
    """The arm's layer of weights w (O, C). The dense arms and GPTQ put w back into `linear`; the
    others have a layer of their own, which starts on the grid: a (scale, zero_point)."""
    if arm in ("dense", "dense, longer", "GPTQ"):
        linear.weight = nn.Parameter(w, requires_grad=arm == "dense, longer")
        return linear
    how = *grid, args.bits, args.group_size
    if arm == "full QAT (LSQ)":
        return FullQATLinear(w, *how)
    rank, phi = 0, "fp32"
    if arm.startswith("LR-QAT"):
        rank, phi = args.rank, args.phi
    layer = LRQATLinear(w, *how, rank, phi, svd=rank and args.init == "svd")
    layer.scale.requires_grad_(arm not in ("RTN", "LR-QAT, s frozen"))
    return layer

@torch.no_grad()
def gptq_model(model, data, args):
    """GPTQ block by block, each on what the blocks before it, already quantized, feed it."""
    idx, _ = batch(data.train, 0, 64, args.seq_len, args.seed, args.device)
    for block in block_hessians(model, idx):
        for name, m, h in block:
            with definite_hessian(name, 64 * args.seq_len,
                                  "try another --data, or a longer --seq-len"):
                codes = gptq(m.weight, h, args.bits, args.group_size, symmetric=args.bits > 2)
            model.set_submodule(name, QuantLinear.affine(*codes, args.bits, args.group_size))
    return model

@torch.no_grad()
def flipped(model):
    """The share of integers that A B moved away from those of phi alone; None without A and B."""
    moved = [m.rounded() != integers(m.codes, None, None, *m.how[:2])
             for m in model.modules() if getattr(m, "A", None) is not None]
    total = sum(m.numel() for m in moved)
    return sum(m.sum().item() for m in moved) / total if moved else None

def status(model):
    """LR-QAT's own number for the progress line."""
    share = flipped(model)
    return "" if share is None else f" flipped {100 * share:.2f}% |"

def compare(args):
    """Train and evaluate every arm on the same tokens; print the table; pack the last arm."""
    base, data = load_base(args)
    check_shapes(base, args)
    name = f"lrqat-w{args.bits}" + (f"a{args.a_bits}" if args.a_bits < 16 else "")
    name += f"-{args.arm}" if args.arm else ""
    keep_model(args, os.path.join(args.out, name + ".pt"))
    header(f"{name} | phi {args.phi}, rank {args.rank}", args, base, data)
    ranges = {n: start_range(m.weight, args.bits, args.group_size) for n, m in base.linears()}
    rows, path = {}, os.path.join(args.out, name)
    for arm in ("dense", "RTN", ALONE[args.arm]) if args.arm else ARMS:
        torch.manual_seed(args.seed)
        start, result = time.perf_counter(), {"seconds": 0.0}
        model = convert(copy.deepcopy(base), arm, args, ranges)
        model = gptq_model(model, data, args) if arm == "GPTQ" else model
        seconds = time.perf_counter() - start
        learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if learn:
            say(f"--- {arm}: {learn} parameters learn")
            result = train_arm(model, data, args, f"{path}-arm{ARMS.index(arm)}.state",
                               lambda: status(model), arm_optimizer(model, args.lr))
        scores = score(model.eval(), data, args)
        bpw = 16.0 if arm.startswith("dense") else None                    # of all others: below
        rows[arm] = arm_row(scores, bpw, seconds + result["seconds"], learn=learn)
        if arm.startswith("LR-QAT"):
            rows[arm]["flipped"] = flipped(model)
        say(f"{arm} | {show(scores)}")
    say(f"\n{len(data.val) - 1:>7} val tokens     |   learn | val loss | recovered | seconds")
    worst, best = rows["RTN"]["val_loss"], rows.get("dense, longer", {}).get("val_loss", math.nan)
    for arm, row in rows.items():                      # recovered: of what RTN lost
        share = 100 * (worst - row["val_loss"]) / (worst - best or math.nan)
        recovered = f"{share:8.1f}%" if math.isfinite(share) else "        -"
        say(f"{arm:22} | {row['learn']:7d} | {row['val_loss']:8.4f} | {recovered} | "
            f"{row['seconds']:7.1f}")
    pack_result(args, model, data, path + ".pt", rows, result)

@torch.no_grad()
def integers_in_use(layer, dtype):
    """The signed integers (O, C) that a layer multiplies with, from its answers to unit vectors."""
    units = torch.eye(layer.rounded().size(1), dtype=dtype, device=layer.scale.device)
    w_hat = layer(units).t().float()                                               # (O, C)
    return to_grid(w_hat, layer.scale.clamp(min=EPS), layer.zero_point).round()

def pack_result(args, model, data, path, rows, result):
    """Merge the last arm, pack, save, load; compare integers and loss with its training forward."""
    live = list(rows.values())[-1]["val_loss"]
    trained = {n: integers_in_use(m, model.dtype) for n, m in model.linears()}
    model.replace_linears(lambda _, m: QuantLinear.affine(*m.merge(), args.bits, args.group_size))
    model, scores = through_the_file(path, model, args, data, "lrqat")
    differ = 0
    for n, m in model.linears():
        q = unpack(m.packed, args.bits, m.spec["in_features"], m.spec["signed"])
        q = q.float() if m.spec["signed"] else q.float() + limits(args.bits)[0]
        differ += (q != trained[n]).sum().item()
    bpw, weights = bits_per_weight(model)
    say(f"\nmerged | {show(scores)} | {differ} of {weights} integers differ, loss by "
        f"{abs(scores['loss'] - live):.1e} | {bpw:.3f} bits per weight | {path}")
    finish(args, "lrqat", model, scores, result, w_bits=args.bits, a_bits=args.a_bits,
           kv_bits=args.kv_bits, group_size=args.group_size, arm=args.arm or "lr-qat",
           phi=args.phi, rank=args.rank, init=args.init, lr=args.lr,
           base_val_loss=rows["dense"]["val_loss"], integers_differ=differ,
           packed_minus_live=scores["loss"] - live,
           arms={arm: row | {"bpw": row["bpw"] or bpw} for arm, row in rows.items()})

def main():
    args = parse_args()
    compare(args)

if __name__ == "__main__":
    run(main)
