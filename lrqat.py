"""LR-QAT: quantization-aware training of a pre-trained LLaMA through low-rank adapters.

    python lrqat.py --bits 2              # every arm on the tiny base; one table; 2 minutes
    python lrqat.py --bits 2 --smoke      # every line of it in a few seconds
    python lrqat.py --bits 2 --arm full   # one arm alone, packed: here full QAT
    python lrqat.py --bits 2 --teacher none    # learn from the text, not from the dense base
    python model.py eval out/lrqat-w2.pt  # the merged, packed result
    torchrun --standalone --nproc_per_node=2 lrqat.py --bits 2  # the same arms on 2 GPUs

tests/time_lrqat_memory.py measures bytes and speed, at 7B on one GPU.

The idea:
  1. Quantization-aware training stores a gradient and two moments for every weight. Freeze
     the weight instead, measured in steps of its grid and stored in 0.5 to 4 bytes:
     Phi = phi(W0 / s0).
  2. Train a product A B of low rank inside of the rounding, and the scale s outside of it:
     W_hat = s (clip(round(Phi + alpha/r A B)) - z). What A and B learned is in the integers
     Q. After training A and B are dropped, so inference costs nothing extra.
  3. Autograd would keep four dense tensors for each weight. Our function keeps x, the
     frozen codes, A, B and s, which exist anyway, and builds the weight again in the
     backward pass.

The symbols:
  W0       the pre-trained weight (O, C), frozen
  s0, z    scale and zero point (O, G) of the grid that rounds W0 best, frozen; only the
           2-bit grid has a zero point
  phi      the format in which W0 / s0 (at 2 bits W0 / s0 + z) is stored; see PHI
  Phi      W0 in steps of its grid, after phi (O, C); `codes` is Phi as it is stored. With
           --init svd the first alpha/r A B is taken off before phi
  A, B     the adapters (O, r) and (r, C), which learn; r is the rank
  Z        the latent weight in steps of the grid, Phi + alpha/r A B
  Q        its integers, clip(round(Z)), from qmin to qmax
  s        width of a step, (O, G): it starts at s0 and learns
  x, y     inputs (..., C), outputs (..., O); G = C / g groups of g inputs share a scale

The printed words:
  learn      parameters that learn
  recovered  the share of the loss between RTN and the control that an arm wins back. The
             control is the dense base where it is its own teacher, from which it has nothing
             to learn; otherwise "dense, longer", the base trained as long by the same loss.
             With --arm that is not trained, and no share is printed
  flipped    the share of the integers Q that A B changed

Paper: LR-QAT, Bondarenko et al. 2024 (arXiv 2406.06385).
Code: github.com/Qualcomm-AI-research/LR-QAT.
Not here: training a checkpoint whose dense form does not fit.

Where ours differs from the paper or its official code: by default the loss is the KL
divergence from the dense base, not the text's; alpha and the rates suit a hundred steps; s0
comes from the range search of `rtn`, with other candidates and one norm; 2 bits have a zero
point (the released code leaves it out of phi); "packed" is two codes a byte (the released
code stores integers in whole bytes); s, A, B and Z are float32, not bfloat16; on a GPU, A B
runs in TF32; under --compile the compiler decides what is kept; the SVD start divides each
row of A by its own scale; --a-bits also quantizes the norms' outputs.
"""
import copy
import math
import os
import time
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UsageError
from nanobit.cli import add_flags, number, Parser, resolve, run
from nanobit.data import batch
from nanobit.defaults import UNSET, suit, weight_rate
from nanobit.distill import WithTeacher, add_teacher, open_teacher
from nanobit.ranks import say
from nanobit.runs import (arm_row, definite_hessian, finish, header, keep_model, load_base, score,
                          show, show_distance, suit_groups, through_the_file)
from nanobit.train import train_arm
from quantizers import (EPS, QuantLinear, bits_per_weight, block_hessians, dequantize, gptq,
                        half_if_held, rtn)

# alpha: A B counts alpha/r times. AdamW moves each entry of A and B by about the rate per
# step, however small its gradient is. So alpha sets how far A B can travel in a run, and to
# reach the next integer takes up to half a step of the grid. Ours differs: the paper's 1 is
# for 10,000 steps of training, this one for a hundred.
ALPHA = 32.0

# ---- The method for one layer, by autograd -------------------------------------------

def code_range(bits):
    """qmin, qmax: the smallest and the largest integer of the signed grid."""
    return -2 ** (bits - 1), 2 ** (bits - 1) - 1

def spread(per_group, C):
    """(O, G) -> (O, C): repeat what each group has for all of its inputs."""
    return per_group.repeat_interleave(C // per_group.size(1), dim=1)

def round_straight_through(v):
    """round(v), ties to even, with the gradient of v: as if nothing had been rounded."""
    return v + (v.round() - v).detach()

class PlainLRQAT(nn.Module):
    """y = x W_hat^T with W_hat = s (clip(round(Phi + alpha/r A B)) - z).

    LRQATLinear, below, computes the same in less memory; a test holds it to this one.
    """

    def __init__(self, W0, s0, z, bits, rank):
        """W0 (O, C) is the pre-trained weight; s0 and z (O, G) are its grid, as `start_grid`
        finds it. Above 2 bits, where that has no z, z is zeros. phi is "fixed"."""
        super().__init__()
        O, C = W0.shape
        self.bits = bits
        self.z = z

        # Freeze W0 in steps of its grid, as fixed-point numbers of 8 bits: `bits` of them
        # stand before the binary point, with the sign, and the others after it. s0 is
        # divided out for good. If the s that learns stood here too, as it does in LSQ, Phi
        # would change at every step, and all of W0 would have to be kept.
        qmin, qmax = code_range(bits)
        v = W0 / spread(s0, C) + spread(z, C)
        fraction = 2 ** (8 - bits)
        self.Phi = (v.clamp(qmin, qmax) * fraction).round() / fraction        # (O, C)

        # (LoRA has the two names the other way round: here A is the factor of the outputs.)
        # A starts at zero, so that A B is zero and training starts from the rounded model.
        # B does not: A's gradient is a product with B, and B's is one with A. If both were
        # zero, neither would ever move.
        self.A = nn.Parameter(torch.zeros(O, rank))
        self.B = nn.Parameter(torch.empty(rank, C).uniform_(-1, 1) * C ** -0.5)
        self.s = nn.Parameter(s0.clone())

    def forward(self, x):
        O, C = self.Phi.shape
        rank = self.A.size(1)
        qmin, qmax = code_range(self.bits)

        # Round the latent weight and clip it. Where round(Z) is outside of the range, clamp
        # gives no gradient: there a small change of Z changes nothing.
        Z = self.Phi + ALPHA / rank * (self.A @ self.B)               # (O, C)
        Q = round_straight_through(Z).clamp(qmin, qmax)

        # Only here does s appear: what it learns stretches the grid and moves no code.
        W_hat = spread(self.s, C) * (Q - spread(self.z, C))
        return x @ W_hat.t()                                          # (..., O)

# ---- The grid ------------------------------------------------------------------------

class Grid(NamedTuple):
    """Where a linear's weights may lie: scale (Q - zero_point), for Q from qmin to qmax."""
    scale: torch.Tensor          # (O, G) float32
    zero_point: torch.Tensor     # (O, G) int8; None where it is zero
    bits: int
    group_size: int              # inputs that share a scale; -1: all of a row

def is_symmetric(bits):
    """True if the grid has no zero point.

    At 2 bits the codes are -2, -1, 0 and 1: two levels for negative weights and one for
    positive ones. A zero point lets each row or group choose on which side it needs the
    second level, which is worth the 2 bits that it costs. In wider grids one level more or
    less on a side matters little.
    """
    return bits > 2

@torch.no_grad()
def start_grid(w, bits, group_size, search=True):
    """The Grid on which rtn puts w (O, C). search: for the range of the least error, as in
    every table; without it, the min-max range.

    Ours differs: the search takes the least |error|^2.4 (the paper tries norms from 2 to 5).
    With R the whole range, 2 max|w| in a symmetric grid, a step is from R / (2^bits - 1) down
    to 0.21 of that. (Theirs goes from max|w| / (2^(bits-1) - 1) down to a hundredth of that.)
    """
    _, scale, zero_point = rtn(w.float(), bits, group_size, symmetric=is_symmetric(bits),
                               mse=search)
    if is_symmetric(bits):
        return Grid(scale, None, bits, group_size)

    # rtn's codes begin at 0, ours at qmin.
    qmin, _ = code_range(bits)
    return Grid(scale, (zero_point + qmin).to(torch.int8), bits, group_size)

def to_grid(w, scale, zero_point):
    """w / scale + zero_point: weights (O, C) in steps of the grid, not rounded."""
    O, G = scale.shape
    v = w.view(O, G, -1) / scale.unsqueeze(-1)                        # (O, G, g)
    if zero_point is not None:
        v = v + zero_point.unsqueeze(-1)
    return v.flatten(1)

# ---- The same layer, kept small: a frozen weight in 0.5 to 4 bytes -------------------

class Storage(NamedTuple):
    """A format phi of the frozen weight."""
    bytes_per_weight: float
    max_bits: int                # the most --bits that it can hold

PHI = {
    # Floats as they are, not even clipped.
    "fp32": Storage(bytes_per_weight=4, max_bits=8),
    "bf16": Storage(bytes_per_weight=2, max_bits=8),
    # Fixed point: an int8 with `bits` bits before the binary point and 8 - bits after it. At
    # 2 bits that is -2 to 1 in steps of 1/64. The fraction keeps where between two integers
    # a weight lies. One near n + 1/2 goes to the next integer under a small A B; one at n
    # needs half a step. Of a plain integer that is all weights: A B does nothing at all until
    # it reaches half a step. 8 bits would leave no fraction.
    "fixed": Storage(bytes_per_weight=1, max_bits=7),
    # Plain integers, two a byte. Ours differs: the paper counts these bytes, and the
    # released code keeps such integers in an int8 each.
    "packed": Storage(bytes_per_weight=0.5, max_bits=4),
}

def downcast(v, bits, phi):
    """v (O, C) in steps of the grid -> codes: Phi as it is stored. Ties go to even."""
    if phi == "fp32":
        return v.float()
    if phi == "bf16":
        return v.bfloat16()

    # Clip to the grid's range, as the paper does: what lies beyond it is lost. It has to come
    # first. At 4 bits 8.2 would be stored as 8.2 * 16 = 131, which wraps around in an int8.
    qmin, qmax = code_range(bits)
    v = v.clamp(qmin, qmax)
    if phi == "fixed":
        return (v * 2 ** (8 - bits)).round().to(torch.int8)
    return pack_nibbles(v.round())                                    # (O, C/2)

def pack_nibbles(q):
    """Integers from -8 to 7 (O, C) -> uint8 (O, C/2). A byte holds column 2j in its low half
    and column 2j + 1 in its high half, each plus 8."""
    q = (q + 8).to(torch.uint8)
    low, high = q[:, ::2], q[:, 1::2]
    return low | (high << 4)

def unpack_nibbles(packed):
    """The inverse of pack_nibbles: uint8 (O, C/2) -> int8 (O, C)."""
    low, high = packed & 15, packed >> 4
    q = torch.stack((low, high), dim=-1).to(torch.int8) - 8           # (O, C/2, 2)
    return q.flatten(1)

def stored_units(codes, bits, phi):
    """codes -> (units, lsb): Phi (O, C) is units * lsb, not yet multiplied."""
    if phi == "packed":
        return unpack_nibbles(codes), 1.0
    if phi == "fixed":
        return codes, 2.0 ** (bits - 8)
    return codes, 1.0

def upcast(codes, bits, phi):
    """Phi (O, C): the float32 numbers that the codes stand for."""
    units, lsb = stored_units(codes, bits, phi)
    return units.float() * lsb

def latent(codes, A, B, bits, phi):
    """Z = Phi + alpha/r A B (O, C). Without adapters (A is None) Z is Phi.

    Ours differs: A, B and Z are float32. In bfloat16, which the paper's runs use, numbers
    between 4 and 8 are 1/32 apart, and a small A B would be lost. On a GPU A B runs in TF32.
    """
    if A is None:
        return upcast(codes, bits, phi)

    # One dense float tensor instead of three: A B is scaled in place, and Phi is never
    # made, since the addition also multiplies the stored units by their lsb.
    units, lsb = stored_units(codes, bits, phi)
    alpha_over_r = ALPHA / A.size(1)
    return (A @ B).mul_(alpha_over_r).add_(units, alpha=lsb)

def integers(codes, A, B, bits, phi):
    """Q = clip(round(Z)) as floats (O, C). Training and merging both call this, so that the
    merged integers are those of training."""
    qmin, qmax = code_range(bits)
    return latent(codes, A, B, bits, phi).round_().clamp_(qmin, qmax)

# ---- The same layer, kept small: no dense tensor waits for the backward pass ---------
# In PlainLRQAT autograd keeps four dense tensors for each weight: round(Z) for the gradient
# of clip, Q - z for that of s, s spread over its groups for that of Q, and W_hat for that of
# x. All four follow from the codes, A, B, s and z, which exist anyway. So LRQATFunction keeps
# these and x, and computes Z once more in the backward pass: that costs a product of rank r
# and a few passes over the weight. (Ours differs: --compile traces forward and backward pass
# into one graph, and the compiler chooses anew what is kept.)

class LRQATFunction(torch.autograd.Function):
    """y = x W_hat^T: (..., C) -> (..., O). With gy = dL/dy, D = dL/dW_hat = gy^T x and
    M = [round(Z) in range]:

        dL/dx = gy W_hat
        dL/dZ = s D M     dL/dA = alpha/r dL/dZ B^T     dL/dB = alpha/r A^T dL/dZ
        dL/ds = the row's or group's sum of D (Q - z), the true derivative: s is outside
                only. In LSQ, where it is inside too, it is that of D (Q - z - M W/s).

    LoRA computes dL/dA as gy^T (x B^T), without a dense tensor. Here s and M, which are
    elementwise, stand between the two products: D must exist, for one linear at a time.
    """

    @staticmethod
    def forward(ctx, x, codes, A, B, scale, zero_point, bits, phi, group_size):
        ctx.save_for_backward(x, codes, A, B, scale, zero_point)
        ctx.bits = bits
        ctx.phi = phi
        ctx.group_size = group_size
        Q = integers(codes, A, B, bits, phi)                          # (O, C)
        w_hat = dequantize(Q, scale, zero_point, group_size).to(x.dtype)
        return F.linear(x, w_hat)

    @staticmethod
    def backward(ctx, gy):                                            # gy (..., O)
        x, codes, A, B, scale, zero_point = ctx.saved_tensors
        O, G = scale.shape
        qmin, qmax = code_range(ctx.bits)

        # Build the integers again, and M. Q becomes int8, a quarter of the bytes, and the
        # floats go: Q and M are still alive when D and D Q, the largest tensors of the
        # whole step, are made.
        rounded = latent(codes, A, B, ctx.bits, ctx.phi).round_()     # (O, C)
        Q = rounded.clamp(qmin, qmax)
        M = Q == rounded
        Q = Q.to(torch.int8)
        del rounded

        # dL/dx = gy W_hat, and the one dense gradient D. The product is in x's dtype; the
        # sums below are float32.
        w_hat = dequantize(Q, scale, zero_point, ctx.group_size).to(gy.dtype)
        gx = gy @ w_hat                                               # (..., C)
        del w_hat
        D = gy.flatten(0, -2).t() @ x.flatten(0, -2)                  # (O, C)
        D = D.to(scale.dtype)

        # dL/ds = sum of D (Q - z) = sum of D Q - z sum of D
        gs = (D * Q).view(O, G, -1).sum(-1)                           # (O, G)
        if zero_point is not None:
            gs -= zero_point * D.view(O, G, -1).sum(-1)

        gA = None
        gB = None
        if A is not None:
            # alpha/r dL/dZ = alpha/r s D M, in D's own memory
            dZ = D.mul_(M)
            alpha_over_r = ALPHA / A.size(1)
            dZ.view(O, G, -1).mul_((scale * alpha_over_r).unsqueeze(-1))
            gA = dZ @ B.t()                                           # (O, r)
            gB = A.t() @ dZ                                           # (r, C)
        return gx, None, gA, gB, gs, None, None, None, None

class GridLinear(nn.Module):
    """A linear of weights on a grid, of which the scale learns. A subclass gives `rounded()`,
    the integers Q (O, C) of its forward pass."""

    def __init__(self, scale, zero_point, bits, group_size):
        super().__init__()
        self.bits = bits
        self.group_size = group_size

        # Ours differs: the scale is float32, whatever the model is. At the paper's rate of
        # 1e-5 a scale in bfloat16 would never move.
        self.scale = nn.Parameter(scale.detach().clone())
        self.register_buffer("zero_point", zero_point)

    @property
    def positive_scale(self):
        """The scale as it is used: training may bring it to zero or below."""
        return self.scale.clamp(min=EPS)

    @torch.no_grad()
    def round_scale(self):
        """Make the scale what a packed file keeps of it: float16, unless that is too coarse. This
        is done at the end of training, so that losses are those of the file's linears. LR-QAT's
        integers do not depend on the scale. Full QAT's do, and are read after this."""
        scale = self.positive_scale
        self.scale.copy_(half_if_held(scale, scale))

    @torch.no_grad()
    def merge(self):
        """(q, scale, zero_point) as `rtn` returns them: q int8, or uint8 with a zero_point.
        What A and B learned is in q."""
        Q = self.rounded()
        if self.zero_point is None:
            return Q.to(torch.int8), self.positive_scale, None

        # With a zero point the packed codes begin at 0.
        qmin, _ = code_range(self.bits)
        q = (Q - qmin).to(torch.uint8)
        return q, self.positive_scale, (self.zero_point - qmin).to(torch.uint8)

class LRQATLinear(GridLinear):
    """A linear whose weight is frozen as `codes`. A, B and `scale` learn. At rank 0 there are
    no A and B: only `scale` learns."""

    @torch.no_grad()
    def __init__(self, w, scale, zero_point, bits, group_size, rank, phi, svd=False):
        super().__init__(scale, zero_point, bits, group_size)
        self.phi = phi
        self.A = None
        self.B = None
        v = to_grid(w.float(), scale, zero_point)                     # (O, C)

        # As in PlainLRQAT. With the SVD start A B holds a low-rank copy of the rounding error,
        # and Phi what is left of v. So Z begins at v again, up to what phi rounds or clips. If
        # phi keeps fractions, the first Q is nearly that of the zero start: the SVD gives A and
        # B other directions, not a better first model.
        if rank:
            O, C = v.shape
            A = v.new_zeros(O, rank)
            B = v.new_empty(rank, C).uniform_(-1, 1) * C ** -0.5
            if svd:
                A, B = svd_start(v, scale, rank, bits)
                v = v - ALPHA / rank * A @ B
            self.A = nn.Parameter(A)
            self.B = nn.Parameter(B)
        self.register_buffer("codes", downcast(v, bits, phi))

    def forward(self, x):
        return LRQATFunction.apply(x, self.codes, self.A, self.B, self.positive_scale,
                                   self.zero_point, self.bits, self.phi, self.group_size)

    def rounded(self):
        """The integers Q (O, C) of the forward pass."""
        return integers(self.codes, self.A, self.B, self.bits, self.phi)

# ---- The rates -----------------------------------------------------------------------

# Peak rate divided by --lr, for each kind of parameter. Ours differs: they suit a hundred
# steps. (The paper's are 1, 1 and 0.01 times 1e-3, and 0.05 for the weights of full QAT, whose
# rate here is nanobit.defaults.weight_rate.)
RATES = {"A": 1.0, "B": 1.0, "scale": 0.03}

def linear_schedule(step, steps, peak):
    """Up from 0 over the first tenth of the steps, then down to 0 (the paper's). A run of a
    single step has no warm-up and uses the peak: at rate 0 it would learn nothing."""
    warm = max(1, round(0.1 * steps))
    warm = min(warm, steps - 1)
    if step < warm:
        return peak * (step / warm)
    return peak * ((steps - step) / (steps - warm))

def arm_optimizer(model, lr):
    """AdamW over what learns, each kind at its own peak rate; weight decay for W alone."""
    learn = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for kind in (*RATES, "weight"):
        params = [p for name, p in learn if name.endswith("." + kind)]
        if params and kind == "weight":
            peak = weight_rate(lr, [p.detach() for p in params])
            groups.append({"params": params, "peak": peak, "weight_decay": 0.1})
        elif params:
            groups.append({"params": params, "peak": RATES[kind] * lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    optimizer.schedule = linear_schedule               # nanobit.train asks for it
    return optimizer

# ---- Another start of A B, and the baseline that learns every weight -----------------

def svd_start(v, scale, rank, bits):
    """A (O, r) and B (r, C) whose product copies what rounding v (O, C) takes away, as far as
    rank r allows. The caller subtracts alpha/r A B from v before phi.

        E = s (v - clip(round(v)))      what is lost of W0; s is the mean scale of a row
        E ~ U sigma V^T                 its r largest singular values and their vectors
        A = r/alpha U sqrt(sigma) / s   B = sqrt(sigma) V^T

    Then s alpha/r A B is the best copy of E of rank r. It is taken once, before phi, as in
    the paper. Ours differs: row i of A is divided by s_i, the scale of that row. The official
    code does that only where O and C differ.
    """
    qmin, qmax = code_range(bits)
    s = scale.mean(1, keepdim=True)                                   # (O, 1)
    E = s * (v - v.round().clamp(qmin, qmax))                         # (O, C)

    U, sigma, Vt = torch.linalg.svd(E, full_matrices=False)
    root = sigma[:rank].sqrt()
    A = U[:, :rank] * root * (rank / ALPHA) / s
    B = root.unsqueeze(1) * Vt[:rank]
    return A, B

class FullQATLinear(GridLinear):
    """The main baseline, LSQ (1902.08153): all of W learns, and s is inside of the rounding
    too: W_hat = s (clip(round(W/s + z)) - z), by autograd."""

    def __init__(self, w, scale, zero_point, bits, group_size):
        super().__init__(scale, zero_point, bits, group_size)
        self.weight = nn.Parameter(w.clone())

    def forward(self, x):
        qmin, qmax = code_range(self.bits)
        scale = self.positive_scale
        v = to_grid(self.weight, scale, self.zero_point)              # (O, C)
        Q = round_straight_through(v).clamp(qmin, qmax)
        w_hat = dequantize(Q, scale, self.zero_point, self.group_size)
        return F.linear(x, w_hat.to(x.dtype))

    def rounded(self):
        """The integers Q (O, C) of the forward pass."""
        qmin, qmax = code_range(self.bits)
        v = to_grid(self.weight, self.positive_scale, self.zero_point)
        return v.round().clamp(qmin, qmax)

# ---- The arms of the comparison ------------------------------------------------------

def keep_dense(linear, w, grid, args):
    linear.weight = nn.Parameter(w)
    return linear

def round_weight(linear, w, grid, args):
    """LR-QAT without adapters: the integers of the weight stay. --phi does not apply."""
    return LRQATLinear(w, *grid, rank=0, phi="fp32")

def add_adapters(linear, w, grid, args):
    return LRQATLinear(w, *grid, rank=args.rank, phi=args.phi, svd=args.init == "svd")

def full_qat(linear, w, grid, args):
    return FullQATLinear(w, *grid)

class Arm(NamedTuple):
    """A line of the table: a way to round the model, or to train it on the same tokens."""
    label: str                   # in the table and the row of results
    make: Callable               # (linear, w (O, C), grid, args) -> the layer
    learns: tuple                # the names of the layer's parameters that learn
    quantized: bool = True       # on a grid, and with it the activations

# In the order of the table; the last one is saved. The order also numbers the arms' states.
ARMS = {
    "dense": Arm("dense", keep_dense, learns=(), quantized=False),
    "longer": Arm("dense, longer", keep_dense, learns=("weight",), quantized=False),
    "rtn": Arm("RTN", round_weight, learns=()),
    "gptq": Arm("GPTQ", keep_dense, learns=()),        # gptq_model rounds it, block by block
    "scales": Arm("scales only (PEQA)", round_weight, learns=("scale",)),
    "full": Arm("full QAT (LSQ)", full_qat, learns=("weight", "scale")),
    # What does it bring that s learns?
    "frozen": Arm("LR-QAT, s frozen", add_adapters, learns=("A", "B")),
    "lr-qat": Arm("LR-QAT", add_adapters, learns=("A", "B", "scale")),
}
ALONE = ("scales", "full", "frozen", "lr-qat")         # the values of --arm

def convert(model, arm, args, grids):
    """Turn the model's linears into the Arm's. grids: the Grid of each, by name. In every arm
    only these linears may learn: embedding, norms and head are frozen."""
    model.requires_grad_(False).train()

    if arm.quantized:
        # The model rounds its own activations, one grid a token. Ours differs: that
        # includes the norms' outputs.
        model.config.a_bits = args.a_bits
        model.config.kv_bits = args.kv_bits

    # One at a time: the dense weight is freed before the next linear's turn.
    def make(name, linear):
        w = linear.weight.detach()
        linear.weight = None
        return arm_linear(linear, w, grids[name], arm, args)

    return model.replace_linears(make)

def arm_linear(linear, w, grid, arm, args):
    """The Arm's layer of weights w (O, C), which takes the place of `linear`."""
    layer = arm.make(linear, w, grid, args)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in arm.learns)
    return layer

@torch.no_grad()
def gptq_model(model, data, args):
    """GPTQ block by block, each on the inputs that the blocks before it, already quantized,
    give it."""
    windows = 64
    idx, _ = batch(data.train, 0, windows, args.seq_len, args.seed, args.device)
    for block in block_hessians(model, idx):
        for name, m, h in block:
            with definite_hessian(name, windows * args.seq_len,
                                  "try another --data, or a longer --seq-len"):
                q, scale, zero_point = gptq(m.weight, h, args.bits, args.group_size,
                                            symmetric=is_symmetric(args.bits))
            layer = QuantLinear.affine(q, scale, zero_point, args.bits, args.group_size)
            model.set_submodule(name, layer)
    return model

# ---- What the run looks at -----------------------------------------------------------

@torch.no_grad()
def flipped(model):
    """The share of integers that A B changed from those of Phi alone; None without A and B.
    With the SVD start it is above zero before training."""
    moved = 0
    total = 0
    for m in model.modules():
        if isinstance(m, LRQATLinear) and m.A is not None:
            untouched = integers(m.codes, None, None, m.bits, m.phi)
            moved += (m.rounded() != untouched).sum().item()
            total += untouched.numel()
    return moved / total if total else None

def status(model):
    """LR-QAT's own number for the progress line."""
    share = flipped(model)
    return "" if share is None else f" flipped {100 * share:.2f}% |"

@torch.no_grad()
def integers_in_use(layer, dtype):
    """The integers Q (O, C) that a layer multiplies with, from its answers to unit vectors.
    What is merged is compared with these, and not with what `rounded` claims. bfloat16 rounds
    a weight by 1/512 of its own size at most: half a step for one that is 256 steps from zero,
    and less for all that the grids hold. So round() finds Q again."""
    C = layer.rounded().size(1)
    units = torch.eye(C, dtype=dtype, device=layer.scale.device)
    w_hat = layer(units).t().float()                                  # (O, C)
    return to_grid(w_hat, layer.positive_scale, layer.zero_point).round()

def signed_integers(packed):
    """The integers Q (O, C) of a packed layer, whose codes begin at 0 if it has a zero point."""
    q = packed.codes().float()
    if packed.zero_point is None:
        return q
    qmin, _ = code_range(packed.bits)
    return q + qmin

# ---- The run -------------------------------------------------------------------------

def main():
    args = parse_args()
    name = run_name(args)
    path = os.path.join(args.out, name)

    # The trained base and its text.
    base, data = load_base(args)
    check_shapes(base, args)
    suit(args, base, "lrqat", args.bits)
    keep_model(args, path + ".pt")
    base_path = args.model or os.path.join(args.out, "base.pt")
    teacher = open_teacher(args, base, base_path, data)
    control = "dense" if teacher is base else "longer"
    header(f"{name} | phi {args.phi}, rank {args.rank}", args, base, data)

    # One grid for each linear, on which every arm that rounds starts; GPTQ finds its own.
    grids = {}
    for layer_name, linear in base.linears():
        grids[layer_name] = start_grid(linear.weight, args.bits, args.group_size)

    # Every arm starts from the base and sees the same tokens.
    rows = {}
    for key in arms_to_run(args, control):
        model, rows[key], result = run_arm(key, base, teacher, data, grids, args, path)
    print_table(rows, control, len(data.val) - 1)

    # The last arm is packed, and what its file holds is reported.
    pack_result(args, model, base, data, path + ".pt", rows, rows[key]["val_loss"], result)

def run_name(args):
    """The name of the packed file without extension, for one lrqat-w2a8-full."""
    name = f"lrqat-w{args.bits}"
    if args.a_bits < 16:
        name += f"a{args.a_bits}"
    if args.arm:
        name += f"-{args.arm}"
    return name

def arms_to_run(args, control):
    """The keys of the arms; with --arm that one, and the two that need no training. Where the
    base as it is serves as the control, it is not trained any longer."""
    if args.arm:
        return ["dense", "rtn", args.arm]
    return [key for key in ARMS if key != "longer" or control == "longer"]

def run_arm(key, base, teacher, data, grids, args, path):
    """Convert a copy of the base into an arm, train and score it -> (model, its row, what
    `train` returned). teacher: None to learn from the text."""
    arm = ARMS[key]

    # The seed is set again, so that an arm gives the same result alone as in the table.
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    model = convert(copy.deepcopy(base), arm, args, grids)
    if key == "gptq":
        model = gptq_model(model, data, args)
    seconds = time.perf_counter() - start

    # Train what learns. --resume finds the state of an arm by its place in the table.
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = None
    if learn:
        say(f"--- {arm.label}: {learn} parameters learn")
        state = f"{path}-arm{list(ARMS).index(key)}.state"
        learner = WithTeacher(model, teacher) if teacher else model
        result = train_arm(learner, data, args, state, lambda: status(model),
                           arm_optimizer(model, args.lr))
        seconds += result["seconds"]
    for m in model.modules():
        if isinstance(m, GridLinear):
            m.round_scale()

    # Score it as it was trained, with the scales that a file has. The bits per weight of a
    # grid are known when one is packed.
    scores = score(model.eval(), data, args, None if key == "dense" else base)
    row = arm_row(scores, None if arm.quantized else 16.0, seconds, learn=learn)
    if "A" in arm.learns:
        row["flipped"] = flipped(model)
    say(f"{arm.label} | {show(scores)}")
    return model, row, result

def recovered(row, rows, control):
    """Percent of the loss between RTN and the control, the dense model trained as long, that
    the row's arm wins back; NaN where the control was not trained, or nothing is lost."""
    if control not in rows:
        return math.nan
    worst = rows["rtn"]["val_loss"]
    lost = worst - rows[control]["val_loss"]
    if lost == 0:
        return math.nan
    return 100 * (worst - row["val_loss"]) / lost

def print_table(rows, control, tokens):
    say(f"\n{tokens:>7} val tokens     |   learn | val loss |     KL | same top | recovered | "
        "seconds")
    for key, row in rows.items():
        percent = recovered(row, rows, control)
        share = f"{percent:8.1f}%" if math.isfinite(percent) else "        -"
        say(f"{ARMS[key].label:22} | {row['learn']:7d} | {row['val_loss']:8.4f} | "
            f"{show_distance(row)} | {share} | {row['seconds']:7.1f}")

def pack_result(args, model, base, data, path, rows, live, result):
    """Merge the last arm, pack, save and load it; compare what was loaded with the model as it
    was trained, whose loss is `live`; print the row of results."""
    # Read the trained integers off the forward pass while it still exists, then merge.
    trained = {name: integers_in_use(m, model.dtype) for name, m in model.linears()}

    def merge(name, layer):
        q, scale, zero_point = layer.merge()
        return QuantLinear.affine(q, scale, zero_point, args.bits, args.group_size)

    model.replace_linears(merge)
    model, scores = through_the_file(path, model, args, data, "lrqat", base)

    # Do the file's integers equal those of training?
    differ = 0
    for name, packed in model.linears():
        differ += (signed_integers(packed) != trained[name]).sum().item()
    bpw, weights = bits_per_weight(model)
    say(f"\nmerged | {show(scores)} | {differ} of {weights} integers differ, loss by "
        f"{abs(scores['loss'] - live):.1e} | {bpw:.3f} bits per weight | {path}")

    # Every arm on a grid has as many codes, scales and zero points as this one.
    for row in rows.values():
        if row["bpw"] is None:
            row["bpw"] = bpw
    finish(args, "lrqat", model, scores, result, w_bits=args.bits, a_bits=args.a_bits,
           kv_bits=args.kv_bits, group_size=args.group_size, arm=args.arm or "lr-qat",
           phi=args.phi, rank=args.rank, init=args.init, lr=args.lr, teacher=args.teacher,
           base_val_loss=rows["dense"]["val_loss"], integers_differ=differ,
           packed_minus_live=scores["loss"] - live,
           arms={ARMS[key].label: row for key, row in rows.items()})

# ---- Flags ---------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(prog="lrqat.py",
               description="Low-rank quantization-aware training (LR-QAT).")
    add = p.add_argument
    add("--bits", type=number(int, 2, 8), default=2,
        help="of weights; 2: asymmetric (default: 2)")
    add("--group-size", type=number(int, -1), help="inputs that share a scale; -1: all of a row "
        "(default: -1; for a model of 10M weights and more 128, or what divides its inputs)")
    add("--arm", choices=ALONE,
        help="train this arm only, and pack it (default: train all, pack lr-qat)")
    add("--phi", choices=tuple(PHI), default="fixed",
        help="format of the frozen weights; fixed: int8 with --bits integer bits; packed: "
        "integers, two a byte (default: fixed)")
    add("--rank", type=number(int, 1), default=32, help="of A and B (default: 32)")
    add("--init", choices=("zero", "svd"), default="zero",
        help="start of A B: zero, or the rounding error's SVD (default: zero)")
    add("--a-bits", type=number(int, 2, 16), default=16,
        help="of activations, a grid a token; 16: not quantized (default: 16)")
    add("--kv-bits", type=number(int, 2, 16), help="of keys and values (default: --a-bits)")
    add_teacher(p, "the dense base itself")
    add_flags(p)

    # --lr is the rate of A and B. What is not given follows from the base: see `suit`.
    p.set_defaults(**UNSET)
    args = p.parse_args(argv)

    # Defaults that depend on other flags.
    if args.kv_bits is None:
        args.kv_bits = args.a_bits
    if args.smoke and not args.steps:
        args.steps = 6
    check_phi(args)
    return resolve(args)

def has_adapters(args):
    """Does one of the arms that run have A and B, and with them --rank and --phi?"""
    return args.arm is None or "A" in ARMS[args.arm].learns

def check_phi(args):
    """Raise UsageError for more bits than the format of the frozen weights holds."""
    most = PHI[args.phi].max_bits
    if has_adapters(args) and args.bits > most:
        raise UsageError(f"--phi {args.phi} holds at most {most} bits, not --bits {args.bits}; "
                         "try --phi bf16")

def check_shapes(model, args):
    """Raise UsageError for a rank, group or phi that some linear of the model cannot have."""
    suit_groups(args, model)
    if not has_adapters(args):
        return
    for name, linear in model.linears():
        O, C = linear.weight.shape
        if args.rank > min(O, C):
            raise UsageError(f"--rank {args.rank} is above a side of {name}, {O} x {C}; "
                             f"try --rank {min(O, C, 32)}")
        if args.phi == "packed" and C % 2:
            raise UsageError("--phi packed needs an even number of columns, "
                             f"{name} has {C}; try --phi fixed")

if __name__ == "__main__":
    run(main)
