"""PV-Tuning: fine-tune the codes of a compressed LLaMA together with all that is continuous.

    python pvtune.py --bits 2                   # every arm on the tiny base; one table; 2 minutes
    python pvtune.py --bits 2 --smoke           # every line of it in a few seconds
    python pvtune.py --bits 2 --scheme affine --group-size 64      # a plain grid, from GPTQ
    python pvtune.py --demo                     # the exact theory, in 6 and 10 coordinates
    torchrun --standalone --nproc_per_node=2 pvtune.py --bits 2    # the same arms on 2 GPUs
    python model.py eval out/pvtune-2x4g4.pt    # the packed result

The idea:
  1. Each group of g weights is stored as M codes, which point into tables of values that many
     groups share. First fit both to the dense model: additive codebooks by k-means and by a
     search that knows the inputs (AQLM), or a grid by GPTQ.
  2. One batch gives the gradient G of the loss, the KL divergence from the dense model, with
     respect to the dense weight W. The P half keeps the codes. It turns G into gradients of
     codebooks and scales, and takes an Adam step on them and on norms, embedding and head.
     (Each tensor's step is as long as the rate times the tensor: LAMB's rule.)
  3. The V half keeps the values. It takes such a step on a virtual dense weight R, and lets a
     share tau of the groups move to a code near R. Few may move at a time, because many at once
     overshoot, as --demo shows. R itself is kept as the buffer, from which the next step starts:
     what the codes did not follow remains, as R - W.

The symbols:
  W          dense weight (O, C) that codes and values stand for
  g          weights in a group; 1 for a grid, where --group-size counts the inputs of one scale
  J, n       groups in a row (J = C / g), groups in W (n = O J)
  codes      (O, J, M): M of each group, one into each codebook
  values     codebooks (M, K, g), each of K = 2^B vectors (a code has B bits), and scales (O,).
             One vector from each codebook is taken; these are summed, and multiplied by the
             scale of the row
  G          gradient (O, C) of the loss with respect to W
  R, buffer  virtual dense weight (O, C), and what is kept of it for the next step
  forget     the paper's delta: 0 keeps R as the buffer, 1 resets it to W
  tau        share of the groups that may change in a step
  trust      length of the change of W after which no further code moves in a step, over |W|

Printed in a line: codes, the groups whose code changed in this step / how many may; trust, the
largest share of its trust region that a linear used (above 100 % where the last change crossed
its border). In the table: recovered, how much of the fit's loss increase the arm removes;
changed, changes over all groups; budget, changes over those that were allowed. Below it: what
the V half adds to P only.

Paper: PV-Tuning, Malinovskii et al. 2024 (arXiv 2405.14852); of the fit, AQLM (2401.06118).
Code: github.com/Vahe1994/AQLM.
Not here: AQLM's tuning of a whole block between the fits of its layers; with codebooks, scales
finer than one per row.

Where ours differs from the official code (each again at its line):
  - --rank improvement ranks groups by the error that a change removes. The official ranking, by
    residual, is the default.
  - Stochastic rounding also works with two codebooks.
  - The search also works with three and more codebooks and a beam above 1.
  - The code rate follows from the fit and the steps (default_code_lr); theirs is 3e-3 or 1e-2.
  - The learning rates fall to 0, gradients are clipped, all draws follow from --seed and the step.
  - The fit is shorter, and takes the linears of several blocks at a time. The default of --trust
    is 0.2.
  - Plain grids can be tuned too.
"""
import copy
import math
import os
import re
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UsageError
from nanobit.cli import add_flags, number, Parser, resolve, run
from nanobit.data import batch
from nanobit.defaults import UNSET, suit
from nanobit.distill import WithTeacher
from nanobit.ranks import from_rank_0, Progress, say, world_size
from nanobit.runs import (arm_row, definite_hessian, finish, header, keep_model, load_base, score,
                          show, show_distance, suit_groups, through_the_file)
from nanobit.train import train_arm
from quantizers import (EPS, QuantLinear, affine_codes, bits_per_weight, block_hessians, dequantize,
                        full_float32, gptq, output_error, rtn, unpack, vq_dequantize, vq_fit,
                        vq_search, vq_sum)

EPS_ADAM = 1e-6                  # added after the root, as in the authors' code
CODE_BETAS = (0.0, 0.95)         # of the step of R

# ---- The method: one step for one layer -------------------------------------------------------
# pv_step is the method. It asks two things of a representation: the weight that codes and values
# stand for, and the codes near a weight. For additive codebooks these are vq_dequantize and
# nearest_codes, which comes first. A run calls none of the three functions here: PVOptimizer below
# does the same for stacks of layers, and tests hold it to them. Read this section first.

def nearest_codes(R, codes, codebooks, scales, generator=None):
    """New codes (O, J, M) near R (O, C), where the search starts from the old ones.

    Each codebook in turn, in random order, takes the vector that is best given the others'
    current ones. The error never grows.
    """
    O, J, M = codes.shape
    x = (R / scales.unsqueeze(1)).view(O, J, -1)                       # (O, J, g)
    codes = codes.clone()
    for m in torch.randperm(M, generator=generator).tolist():
        others = sum(codebooks[k][codes[:, :, k]] for k in range(M) if k != m)
        target = (x - others).unsqueeze(2)                             # (O, J, 1, g)
        error = (target - codebooks[m]).square().sum(3)                # (O, J, K)
        codes[:, :, m] = error.argmin(2)
    return codes

def lamb(p, grad, state, lr, betas):
    """What LAMB adds to a tensor p with its gradient: Adam's direction, lr times as long as p."""
    b1, b2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * grad
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * grad.square()
    direction = m / (v.sqrt() + EPS_ADAM)
    step = -lr * p.norm() * direction / direction.norm()

    # Adam corrects the moments for having started at zero. Here that comes after the length is
    # set, as in the authors' code, and so it shortens or lengthens the first steps.
    return step * math.sqrt(1 - b2**t) / (1 - b1**t)

def pv_step(G, codes, values, buffer, states, dequantize, nearest, lr, code_lr, tau, forget=0,
            trust=math.inf):
    """One PV step for a layer of weight W = dequantize(codes, *values), given G = dloss/dW.

    values: the codebooks and scales, which change in place. buffer (O, C): before the first
    step, W. states: a dict for each of the values, then one for the buffer. Returns the new
    codes and the new buffer.
    """
    # P half: the codes stay, and the values take a step. The chain rule takes G on to them: a
    # codeword's gradient is the sum over all groups that use it, times their scales.
    gradients = torch.autograd.grad(dequantize(codes, *values), values, G)
    with torch.no_grad():
        for i, p in enumerate(values):
            p += lamb(p, gradients[i], states[i], lr, (0.9, 0.95))
        W = dequantize(codes, *values)

    # V half: the values stay, and codes may move. R is where the same gradient would take
    # the weight if it were free to go anywhere. G was taken before the P half, which moved W
    # but not the buffer. So R - W is this step, plus what earlier steps left, minus what this
    # P half changed.
    R = buffer + lamb(buffer, G, states[-1], code_lr, CODE_BETAS)

    # Why may only few codes move? A step is safe up to 1 / the loss's curvature along the
    # coordinates that change. Along all of them the curvature is so large that a safe step
    # moves no code; a longer one moves many, and the loss jumps. Along a few it is small, and a
    # safe step can reach another code. So only the tau n groups farthest from R may move. (The
    # paper's theory, which --demo computes, scales the step by that curvature. Here, as in the
    # authors' code, code_lr sets its length, and tau only says how many groups may follow it.)
    n = codes.size(0) * codes.size(1)
    residual = (R - W).view(n, -1).square().sum(1)                     # (n,)
    chosen = residual.topk(math.ceil(tau * n)).indices                 # the farthest first

    # They go to their nearest codes, in this order, until W has left its trust region.
    best = nearest(R, codes, *values)                                  # (O, J, M)
    change = (dequantize(best, *values) - W).view(n, -1).square().sum(1).detach()
    limit = (trust * W.norm()) ** 2
    spent = 0.0                                                        # |change of W|^2 so far
    codes = codes.clone()
    for j in chosen.tolist():
        if spent < limit:
            codes.view(n, -1)[j] = best.view(n, -1)[j]
            spent = spent + change[j]

    # With forget = 0 the buffer is R. What the codes did not follow remains as R - W and adds
    # up over the steps: a code moves after many small pushes in one direction.
    W = dequantize(codes, *values).detach()
    return codes, (1 - forget) * R + forget * W

class Variant(NamedTuple):
    """An arm: what its V half does."""
    label: str
    forget: float        # 0: R is the buffer; 1: there is no buffer, R starts from W
    share: float         # of the groups that may change; None: --tau; 0: there is no V half
    rounding: float = 0  # temperature of stochastic rounding; 0: always to the nearest

VARIANTS = {
    # Only codebooks, scales and the rest are tuned.
    "p": Variant("P only", forget=1, share=0),
    # Every code may move, and nothing is remembered: small steps change no code at all.
    "naive": Variant("naive PV", forget=1, share=1),
    # Now and then a code moves to the runner-up: small steps count in the mean.
    "stochastic": Variant("stochastic rounding", forget=1, share=1, rounding=0.5),
    # The straight-through estimator: every code may move, and everything is remembered.
    "ste": Variant("STE", forget=0, share=1),
    # The paper's subspace step.
    "subspace": Variant("subspace PV", forget=1, share=None),
    # The same with a buffer, as in the published recipes.
    "pv": Variant("PV", forget=0, share=None),
}

# ---- The same for L layers of one shape at once -----------------------------------------------
# A step on one small layer is many small operations, and a GPU would spend its time on
# starting them. So layers of one shape are stacked, every tensor with their number L in
# front. A LLaMA of any depth has four shapes at most, and each operation of a step runs
# four times, not once for each of, say, 42 layers (7 in each of 6 blocks). Their codes and
# values are a `form`: Codebooks here or Grid below, which has
#   codes                    (L, n, M): the groups of a layer are counted row by row
#   group_size               g, the weights of a group
#   dequantize()             the weights (L, O, C), differentiable in the stack's parameters
#   nearest(target, where, keep, generator)
#                            codes near given vectors, for chosen groups, and their vectors
#   stack(forms), pack()     many stacks -> one; one stack -> a packed layer of each of the L

class Codebooks(nn.Module):
    """Additive codebooks: codes (L, O, J, M), codebooks (L, M, K, g), scales (L, O)."""
    # Hypotheses that vq_search keeps; as published. Ours may be above 1 for three and more
    # codebooks, too: the official search is then worse than with 1.
    beam = 1

    def __init__(self, codes, codebooks, scales):
        super().__init__()
        self.shape = codes.shape                                       # (L, O, J, M)
        self.group_size = codebooks.size(3)
        self.register_buffer("codes", codes.flatten(1, 2).int())       # (L, n, M)
        self.codebooks = nn.Parameter(codebooks.clone())
        self.scales = nn.Parameter(scales.clone())

    @classmethod
    def stack(cls, forms):
        codes = torch.cat([form.codes.view(form.shape) for form in forms])
        codebooks = torch.cat([form.codebooks for form in forms])
        scales = torch.cat([form.scales for form in forms])
        return cls(codes, codebooks, scales)

    def dequantize(self):
        return vq_dequantize(self.codes.view(self.shape), self.codebooks, self.scales)

    def nearest(self, target, where, keep=1, generator=None):
        """The best codes near target (L, k, g) for the groups with the indices where (L, k).

        Returns codes (L, k, found, M) and the vectors that they stand for, (L, k, found, g).
        """
        # The codebooks hold vectors before scaling: divide the targets by the scales of
        # their rows.
        row = where // self.shape[2]                                   # (L, k): J groups a row
        s = self.scales.gather(1, row).unsqueeze(2)                    # (L, k, 1)
        start = gather_groups(self.codes, where)                       # (L, k, M)

        # It finds codes (L, k, found, M), the best first, and then the runner-up.
        codes = vq_search(target / not_zero(s), start, self.codebooks, self.beam, generator, keep)

        L, k, found, _ = codes.shape                                   # found <= keep
        sums = vq_sum(codes.flatten(1, 2), self.codebooks).view(L, k, found, -1)
        return codes, sums * s.unsqueeze(3)

    def pack(self):
        codes = self.codes.view(self.shape)
        return [QuantLinear.vq(codes[i], self.codebooks[i], self.scales[i])
                for i in range(len(codes))]

def stack(forms):
    """forms: of one class and one shape."""
    return type(forms[0]).stack(forms)

def not_zero(scale):
    """scale, or EPS where |scale| < EPS, so that it can be a divisor. What has a scale of 0
    stands for zeros, whatever its codes are."""
    return torch.where(scale.abs() < EPS, EPS, scale)

# ---- The V half of a stack --------------------------------------------------------------------

def gather_groups(x, where):
    """The chosen groups of x (L, n, ...): indices where (L, k) -> (L, k, ...)."""
    return x.gather(1, where.unsqueeze(2).expand(-1, -1, x.size(2)))

def scatter_groups(x, where, values):
    """Write values (L, k, ...) into the chosen groups of x (L, n, ...), in place."""
    x.scatter_(1, where.unsqueeze(2).expand(-1, -1, x.size(2)), values)

def squared(x):
    """Squared lengths of the vectors along the last dimension."""
    return x.square().sum(-1)

@torch.no_grad()
def move_codes(form, reference, fraction, rank="residual", trust=None, left=None, generator=None,
               rounding=0.0):
    """Let a share of the groups of each layer move to codes near reference (L, O, C).

    fraction: of the n groups, rounded up, so that a small layer may always change one.
    rank, left (L, n): see choose_groups.
    trust: the radius of the trust region, relative to the norm of the weight.
    rounding: the temperature of stochastic rounding.

    Changes form.codes. Returns the new weights (L, O, C), the counts of changed groups (L,) and
    the used shares of the trust region (L,). All are tensors: nothing here waits for a GPU.
    """
    w = form.dequantize()
    L, n, M = form.codes.shape
    vectors = w.view(L, n, form.group_size)    # a view: writing to it changes w
    target = reference.reshape(L, n, form.group_size)

    # 1. Which groups may move? If all may and there is no trust region, their order does not
    # matter, and none is ranked.
    count = math.ceil(fraction * n)
    if count == n and trust is None:
        chosen = every_group(form)
    else:
        chosen = choose_groups(form, vectors, target, count, rank, left, generator)

    # 2. Where to? Only the chosen groups are searched: a small share saves time too.
    goal = gather_groups(target, chosen)                               # (L, count, g)
    old_vectors = gather_groups(vectors, chosen)
    old_codes = gather_groups(form.codes, chosen)                      # (L, count, M)
    new_codes, new_vectors, error = search_groups(form, chosen, goal, rounding, generator)
    if left is not None:
        # What the nearest codes leave, even where the trust region then refuses the move.
        left.scatter_(1, chosen, error)

    # 3. How far? Once the trust region is left nothing moves: so far away the gradient says little.
    used = w.new_zeros(L)
    if trust is not None:
        radius = trust * w.flatten(1).norm(dim=1, keepdim=True)        # (L, 1)
        inside = inside_trust(old_vectors, new_vectors, radius).unsqueeze(2)
        new_codes = torch.where(inside, new_codes, old_codes)
        new_vectors = torch.where(inside, new_vectors, old_vectors)
        used = (squared(new_vectors - old_vectors).sum(1) / radius[:, 0].square()).sqrt()

    scatter_groups(form.codes, chosen, new_codes.int())
    scatter_groups(vectors, chosen, new_vectors)
    changed = (new_codes != old_codes).any(2).sum(1)                   # (L,)
    return w, changed, used

def every_group(form):
    """The indices of all groups of each layer, (L, n)."""
    L, n, _ = form.codes.shape
    return torch.arange(n, device=form.codes.device).expand(L, n)

def choose_groups(form, vectors, target, count, rank, left, generator):
    """The indices of the `count` groups of each layer that may move, (L, count).

    They have the largest squared error of vectors against target, both (L, n, g) and in the unit
    of the weights, so that rows with large scales come first.
    """
    score = squared(target - vectors)                                  # (L, n)

    # Ours: --rank improvement. A large error may be one that no code can mend, and then
    # its group takes a place in the ranking for ever. So rank by the error that goes
    # away: subtract what the nearest code would leave. That takes a search of all groups.
    # Where the reference changes little from step to step, `left` is given instead: what
    # the last search of a group left. It is 0 at first, so that a group which was never
    # searched ranks by its full error.
    if rank == "improvement":
        if left is None:
            _, best = form.nearest(target, every_group(form), generator=generator)
            left = squared(target - best[:, :, 0])
        score = score - left
    return score.topk(count).indices                                   # the largest first

def search_groups(form, chosen, target, rounding, generator):
    """New codes (L, k, M) near target (L, k, g) for the chosen groups (L, k), their vectors, and
    the squared error (L, k) of the nearest."""
    candidates = 2 if rounding else 1
    codes, vectors = form.nearest(target, chosen, candidates, generator)
    errors = squared(vectors - target.unsqueeze(2))                    # (L, k, candidates)
    new_codes = codes[:, :, 0]
    new_vectors = vectors[:, :, 0]

    # Stochastic rounding: some take the runner-up. Ours works with two codebooks; theirs raises.
    if rounding:
        second = take_second(errors, rounding, generator).unsqueeze(2)
        new_codes = torch.where(second, codes[:, :, 1], new_codes)
        new_vectors = torch.where(second, vectors[:, :, 1], new_vectors)
    return new_codes, new_vectors, errors[..., 0]

def take_second(errors, temperature, generator):
    """True (L, k) where stochastic rounding takes the runner-up.

    The nearest stays with p = e1^(-1/T) / (e1^(-1/T) + e2^(-1/T)), of the two distances e1 and
    e2. errors (L, k, 2) are their squares, hence the half. Of two exact matches (0 / 0) the first
    stays.
    """
    ratio = errors[..., 0] / errors[..., 1]
    p = 1 / (1 + ratio.pow(0.5 / temperature))
    u = torch.rand(p.shape, generator=generator, dtype=errors.dtype).to(p.device)
    return u >= p.nan_to_num(1.0)

def inside_trust(before, after, radius):
    """True (L, k) for the changes that are kept: in order, until together they are as long as
    the radius (L, 1). The one that crosses it is kept: a layer can always change one group."""
    length = squared(after - before)                                   # (L, k)
    spent = length.cumsum(1) - length                  # by the changes that come first
    return spent < radius.square()

def v_step(reference, codes, codebooks, scales, fraction, **how):
    """move_codes for one layer, as tests call it: new codes (O, J, M) near reference (O, C)."""
    form = Codebooks(codes[None], codebooks[None], scales[None])
    move_codes(form, reference[None], fraction, **how)
    return form.codes.view(codes.shape).to(codes.dtype)

# ---- The optimizer ----------------------------------------------------------------------------

def lamb_step(p, grad, state, lr, betas):
    """`lamb` for L tensors p (L, ...) at once, each with a length of its own. In place where it
    can be: the moments and the step are each as large as the weights."""
    b1, b2 = betas
    if "t" not in state:
        state["t"] = 0
        state["v"] = torch.zeros_like(grad)
        if b1:
            state["m"] = torch.zeros_like(grad)
    state["t"] += 1
    t = state["t"]

    # Adam's direction. With b1 = 0, as for R, the first moment is the gradient: it is not kept.
    v = state["v"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
    m = state["m"].lerp_(grad, 1 - b1) if b1 else grad
    step = m / v.sqrt().add_(EPS_ADAM)

    # Its length. With the correction of the moments the first step is 0.22 lr |p| long for betas
    # of (0, 0.95), and 2.2 lr |p| for (0.9, 0.95).
    p_norm = p.flatten(1).norm(dim=1)                                  # (L,)
    norm = step.flatten(1).norm(dim=1).clamp(min=1e-30)
    factor = p_norm / norm * (-lr * math.sqrt(1 - b2**t) / (1 - b1**t))
    ones = [1] * (p.dim() - 1)
    return step.mul_(factor.view(-1, *ones))

class Stack(NamedTuple):
    """Layers of one shape, as the optimizer sees them."""
    form: nn.Module              # their codes and values
    weights: list                # L dense weights (O, C), which the student multiplies with

class PVOptimizer(torch.optim.Optimizer):
    """The step of `pv_step` for all layers of a model, and LAMB's for norms, embedding and head.

    The backward pass leaves the gradient G in the dense weights, and both halves use it. What a
    stack needs from step to step is in the state of its first weight: the moment v and the buffer
    (L, O, C), `left` of choose_groups (L, n) and the changes so far, all float32, and t, the steps
    of R.
    """

    def __init__(self, model, args, variant):
        self.stacks = []
        for form, layers in zip(model.forms, model.layers):
            self.stacks.append(Stack(form, [layer.weight for layer in layers]))

        # Three groups of parameters. The dense weights are Parameters only to receive G; their
        # learning rate is used for R. Before each step train_step sets each group's "lr" to
        # schedule(step, steps, peak).
        forms = [p for form, _ in self.stacks for p in form.parameters()]
        dense = [w for _, weights in self.stacks for w in weights]
        known = {id(p) for p in forms + dense}
        rest = [p for p in model.parameters() if id(p) not in known]
        super().__init__([
            {"params": rest, "peak": args.lr, "betas": (0.9, 0.95)},
            {"params": forms, "peak": args.lr, "betas": (0.9, 0.95)},
            {"params": dense, "peak": args.code_lr, "betas": CODE_BETAS},
        ], {})

        # What the V half does. The trust region is for the arms with a share tau. The others
        # have none, as in the paper: they are what the limits on changes are compared with.
        # fraction 0: there is no V half.
        self.variant = VARIANTS[variant]
        limited = self.variant.share is None
        self.fraction = args.tau if limited else self.variant.share
        self.trust = args.trust if limited else None
        self.rank = args.rank
        self.seed = args.seed
        self.generator = torch.Generator()

    @staticmethod
    def schedule(step, steps, peak):
        """Ours: the rate falls in a line, to peak / steps in the last step. The official rates are
        constant."""
        return peak * (1 - step / steps)

    @torch.no_grad()
    def step(self):
        # Ours: all draws follow from the seed and t, which counts V halves, so that --resume draws
        # the same. With P only t stays 0, and nothing is drawn. A CPU's generator takes the low
        # 32 bits of its seed, so seed and t are mixed into them.
        t = self.state[self.stacks[0].weights[0]].get("t", 0)
        mixed = np.random.SeedSequence([self.seed, t]).generate_state(1)
        self.generator.manual_seed(int(mixed[0]))

        # Ours: train_step has already clipped the dense and the remaining gradients together to
        # a norm of 1.
        gradients = [torch.stack([w.grad for w in weights]) for _, weights in self.stacks]
        self.p_half(gradients)
        self.v_half(gradients)

    def p_half(self, gradients):
        """Step the values, norms, embedding and head. gradients: G (L, O, C) of each stack."""
        rest, forms, _ = self.param_groups

        # Take G on to the values. Their .grad is None here: train_step clears it after each step,
        # and the student's own backward pass does not reach the forms.
        for (form, _), G in zip(self.stacks, gradients):
            with torch.enable_grad():
                form.dequantize().backward(G)

        # Each parameter of a stack holds L tensors. Any other is one tensor.
        for p in forms["params"]:
            p += lamb_step(p, p.grad, self.state[p], forms["lr"], forms["betas"])
        for p in rest["params"]:
            one = lamb_step(p[None], p.grad[None], self.state[p], rest["lr"], rest["betas"])
            p += one[0]

    def v_half(self, gradients):
        """Move codes. Then the dense weights are again what codes and values stand for."""
        self.moved = []          # (changed groups, used shares of trust), (L,) each
        for (form, weights), G in zip(self.stacks, gradients):
            if self.fraction:
                self.moved.append(self.move_stack(form, weights, G))
            else:
                self.write(weights, form.dequantize())

    def move_stack(self, form, weights, G):
        """The V half of one stack -> changed groups, used shares of the trust region (L,)."""
        dense = self.param_groups[2]
        state = self.state[weights[0]]

        # R starts where the last step left it, or without a buffer at the weights, which are
        # still those that G was taken at: the P half has changed the form alone.
        start = state["buffer"] if "buffer" in state else torch.stack(weights)
        R = start + lamb_step(start, G, state, dense["lr"], dense["betas"])

        # A buffer that forgets nothing moves little in a step. So the ranking by improvement
        # need not search all groups anew: it keeps what the last search of each has left.
        limited = self.variant.share is None
        if self.rank == "improvement" and limited and not self.variant.forget:
            if "left" not in state:
                state["left"] = G.new_zeros(form.codes.shape[:2])

        W, changed, used = move_codes(form, R, self.fraction, self.rank, self.trust,
                                      state.get("left"), generator=self.generator,
                                      rounding=self.variant.rounding)

        # The ranks may differ in their last digits, and so in a nearest code: so all take
        # rank 0's codes.
        if world_size() > 1:
            from_rank_0([form.codes])
            W = form.dequantize()

        # What the next step and the report need.
        state["changed"] = state.get("changed", 0.0) + changed.sum().float()
        if self.variant.forget < 1:
            state["buffer"] = R.lerp_(W, self.variant.forget)          # in place: R is large
        self.write(weights, W)
        return changed, used

    def write(self, weights, W):
        """Give W (L, O, C) to the L weights that the student multiplies with."""
        for weight, w in zip(weights, W):
            weight.copy_(w)

    def allowed(self):
        """Groups that may change in a step, and all groups."""
        allowed, groups = 0, 0
        for form, _ in self.stacks:
            L, n, _ = form.codes.shape
            allowed += L * math.ceil(self.fraction * n)
            groups += L * n
        return allowed, groups

    def status(self):
        """For the progress line: the last step's changes against what it may change."""
        if not self.fraction:
            return ""
        changed = torch.cat([changed for changed, _ in self.moved]).sum()
        used = torch.cat([used for _, used in self.moved]).max()
        return f" codes {changed:.0f}/{self.allowed()[0]} | trust {100 * used:.0f}% |"

    def changed(self):
        """Changed groups of all steps so far."""
        return sum(float(self.state[weights[0]].get("changed", 0)) for _, weights in self.stacks)

# ---- The code rate: how far a run can take R --------------------------------------------------

# So many times half_gap, the way to the border, is what R may travel in a whole run. By dev loss
# of SmolLM2-135M, on grids with groups of 64, after 120 steps: with 2 bits, PV minus P only was
# -0.002 at 0.3 and 1, -0.013 at 2, and +0.077 at 6; with 3 bits it was within 0.001 of zero up to
# 2.
TRAVEL = 2

def default_code_lr(forms, steps):
    """The code_lr with which codes can change in a run of `steps` steps from these forms, where R
    is kept from step to step. (Without a buffer R starts from W in each step, and codes change only
    at rates many times larger.)

    The buffer starts at the codes' own values, so R is half a step away from the border at which
    a weight takes the next code. An optimizer step moves all of R by its rate times |R|: in units
    of W's root mean square, a weight moves by about the rate. The rate falls to 0 over the run,
    and so a weight whose gradient never changes sign travels

        code_lr * reach(steps),  in 120 steps 0.42 * steps * code_lr.

    The way to the border, half_gap, is about 0.55 for a grid of 2 bits and half of it for each
    bit more. Where the travel is shorter than this way, few codes change, whatever tau allows.
    Gradients do change sign, so a weight needs more: the travel here is TRAVEL times the way. The
    weights whose gradients always point the same way are then at the border after about a third of
    the steps, and the others come later or never.
    """
    way = torch.cat([half_gap(form).flatten() for form in forms]).median().item()
    return float(f"{TRAVEL * way / reach(steps):.2g}")

def reach(steps):
    """The sum of a run's code rates where the first one is 1, with LAMB's short first steps."""
    _, b2 = CODE_BETAS
    total = 0.0
    for t in range(steps):
        total += PVOptimizer.schedule(t, steps, 1.0) * math.sqrt(1 - b2 ** (t + 1))
    return total

@torch.no_grad()
def half_gap(form):
    """Half the distance from a group's vector to another near it, in units of the length of a group
    whose weights all have the root mean square of the layer: (L, k), for k <= 4096 groups of each
    layer."""
    W = form.dequantize()
    L, n, _ = form.codes.shape
    every = torch.arange(0, n, max(1, n // 4096), device=W.device)[:4096]
    where = every.expand(L, -1)                                        # (L, k)
    here = gather_groups(W.view(L, n, form.group_size), where)         # (L, k, g)

    # The nearest codes of a vector that has codes are its own: found[:, :, 0] is the vector. The
    # runner-up differs in one code, that of the codebook which the search visits last.
    _, found = form.nearest(here, where, 2, torch.Generator().manual_seed(0))
    distance = (found[:, :, 1] - here).norm(dim=2)                     # (L, k)
    unit = W.square().mean((1, 2)).mul(form.group_size).sqrt()         # (L,)
    return distance / 2 / unit.clamp(min=EPS).unsqueeze(1)

# ---- The student: dense weights for the gradient, codes for the result ------------------------

class PVLinear(nn.Module):
    """y = x W^T with W = form.dequantize()[0], which the optimizer keeps up to date."""

    def __init__(self, form):
        super().__init__()
        self.form = form         # a stack of this layer alone, until Distilled takes it away
        self.weight = nn.Parameter(form.dequantize()[0].detach())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

class Distilled(WithTeacher):
    """A student that learns from its teacher, as PVOptimizer needs it: it takes the forms out of
    the student's linears and stacks those of one shape. forms[i] stands for the linears layers[i],
    in their order."""

    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        by_shape = {}
        for _, layer in student.linears():
            by_shape.setdefault(layer.weight.shape, []).append(layer)
        self.layers = list(by_shape.values())
        self.forms = nn.ModuleList(stack([layer.form for layer in layers])
                                   for layers in self.layers)
        for _, layer in student.linears():
            layer.form = None

    def pack(self):
        """A copy of the student with packed linears."""
        packed = {}
        for form, layers in zip(self.forms, self.layers):
            for layer, linear in zip(layers, form.pack()):
                packed[layer] = linear
        by_name = {name: packed[layer] for name, layer in self.student.linears()}
        return copy.deepcopy(self.student).replace_linears(lambda name, _: by_name[name])

# ---- The fit: the codes to start from ---------------------------------------------------------

class Scheme(NamedTuple):
    """MxBgG: 2x8g4 are M = 2 codebooks of 2^B = 2^8 vectors of g = 4 weights."""
    num_codebooks: int
    bits: int                    # of a code
    group_size: int

def parse_scheme(text):
    """"2x8g8" -> Scheme(2, 8, 8)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)g([1-9]\d*)", text)
    if not match:
        raise UsageError(f"--scheme {text} is neither affine nor MxBgG such as 2x4g4")
    M, B, g = map(int, match.groups())
    if B > 16:
        raise UsageError(f"--scheme {text}: 2^{B} codes do not fit in 16 bits; try {M}x16g{g}")
    return Scheme(M, B, g)

WINDOWS = 64                     # of --seq-len tokens, to fit on
TOGETHER = 2**24                 # weights of the linears whose codebooks are fitted together

@full_float32()
@torch.no_grad()
def fit(model, data, args):
    """Compress the linears in place. Their inputs have passed through the blocks before, which are
    compressed already, unless they are fitted together with this one."""
    idx, _ = batch(data.train, 0, WINDOWS, args.seq_len, args.seed, args.device)

    # Grids are fitted block by block. Ours: codebooks are fitted for several blocks at a time,
    # since a search is thousands of small steps, each of which then serves more linears. These
    # blocks see inputs that have passed through the dense ones among them.
    together = 1
    if args.scheme != "affine":
        weights = sum(m.weight.numel() for _, m in model.linears())
        together = max(1, TOGETHER * model.config.n_layer // weights)

    todo = Progress(len(model.linears()), "fitting linear")
    for linears in block_hessians(model, idx, together):
        # hessian (C, C) is E[x x^T] over the linear's inputs x. It gives the squared error of the
        # outputs that a change of the weight causes.
        by_shape = {}
        for name, linear, hessian in linears:
            by_shape.setdefault(linear.weight.shape, []).append((name, linear.weight, hessian))
        lost = {}                                      # name -> share of the output that is lost
        for same in by_shape.values():
            forms = fit_grids(same, args) if args.scheme == "affine" else fit_codebooks(same, args)
            for (name, weight, hessian), form in zip(same, forms):
                lost[name] = output_error(weight, form.dequantize()[0], hessian)
                model.set_submodule(name, PVLinear(form))
            todo.add(len(same))
        show_losses(lost, model, args)
    return model

def show_losses(lost, model, args):
    """A line for each block of {name: share of its output's energy that the fit lost}."""
    # `lost` is in the order of the shapes; the model's is wanted.
    blocks = {}
    for name in [name for name, _ in model.linears() if name in lost]:
        number = int(name.split(".")[1]) + 1
        text = f"{name.rsplit('.', 1)[1]} {100 * lost[name]:.1f}"
        blocks.setdefault(number, []).append(text)
    for number, losses in blocks.items():
        say(f"block {number}/{model.config.n_layer} | {args.scheme} | % of output lost "
            + " | ".join(losses))

def fit_codebooks(linears, args):
    """Codebooks by AQLM: [(name, weight (O, C), hessian (C, C))] of one shape -> a form of each.

    All draws follow from the seed, and are the same for all of these linears: so none of them
    depends on which others are fitted with it.
    """
    # Ours: up to 4 times 19 Adam steps at a rate of 1 % of the tensor's root mean square, and a
    # search after every 19. Theirs: up to 100 times 100 steps at a rate of 1e-4.
    steps = 5 if args.smoke else 19
    generator = torch.Generator().manual_seed(args.seed)
    weights = torch.stack([weight for _, weight, _ in linears])
    hessians = torch.stack([hessian for _, _, hessian in linears])
    with torch.enable_grad():
        fitted = vq_fit(weights, hessians, *parse_scheme(args.scheme), steps=steps,
                        generator=generator)
    codes, codebooks, scales = [x.split(1) for x in fitted]            # stacks of one
    return [Codebooks(*parts) for parts in zip(codes, codebooks, scales)]

def fit_grids(linears, args):
    """Grids by GPTQ, one linear at a time; arguments and result are those of fit_codebooks."""
    fix = "try another --data, or a longer --seq-len"
    forms = []
    for name, weight, hessian in linears:
        with definite_hessian(name, WINDOWS * args.seq_len, fix):
            q, scale, zero_point = gptq(weight, hessian, args.bits, args.group_size)
        forms.append(Grid(q[None], scale[None], zero_point[None], args.bits))
    return forms

# ---- Plain grids ------------------------------------------------------------------------------
# Ours: the official code tunes codebooks alone. A grid's scales learn; its zero points stay.

class Grid(nn.Module):
    """The affine grid of `rtn` and `gptq`: the weight is (q - zero_point) * scale.

    q (L, O, C) and zero_point (L, O, S) are integers, scale is (L, O, S), with S scales in a row.
    A group is one weight, and its code is q.
    """
    group_size = 1

    def __init__(self, q, scale, zero_point, bits):
        super().__init__()
        self.shape = q.shape                                           # (L, O, C)
        self.bits = bits
        self.inputs_per_scale = q.size(2) // scale.size(2)
        self.register_buffer("codes", q.flatten(1).unsqueeze(2).int())     # (L, n, 1), n = O C
        self.register_buffer("zero_point", zero_point)
        self.scale = nn.Parameter(scale.clone())

    @classmethod
    def stack(cls, forms):
        q = torch.cat([form.codes.view(form.shape) for form in forms])
        scale = torch.cat([form.scale for form in forms])
        zero_point = torch.cat([form.zero_point for form in forms])
        return cls(q, scale, zero_point, forms[0].bits)

    def dequantize(self):
        # `dequantize` is of one layer. L stacked ones count as a tall one of L O rows.
        q = self.codes.view(self.shape).flatten(0, 1)                  # (L O, C)
        scale, zero_point = self.scale.flatten(0, 1), self.zero_point.flatten(0, 1)
        return dequantize(q, scale, zero_point, self.inputs_per_scale).view(self.shape)

    def nearest(self, target, where, keep=1, generator=None):
        """As Codebooks.nearest, for targets of one weight each; nothing is drawn."""
        # Weights and scales are both counted row by row.
        at = where // self.inputs_per_scale                            # (L, k)
        s = self.scale.flatten(1).gather(1, at).unsqueeze(2)           # (L, k, 1)
        z = self.zero_point.flatten(1).gather(1, at).unsqueeze(2)
        divisor = not_zero(s)

        # The best code: round target / divisor, add z, clamp to 0..qmax.
        first = affine_codes(target, divisor, z, self.bits)

        # The runner-up: the neighbour on the target's side; at either end, the only neighbour.
        qmax = 2**self.bits - 1
        above = target / divisor + z > first
        up = (above & (first < qmax)) | (first == 0)
        second = first + torch.where(up, 1, -1)

        codes = torch.cat((first, second), 2)[:, :, :keep].unsqueeze(3)    # (L, k, keep, 1)
        return codes, (codes - z.unsqueeze(3)) * s.unsqueeze(3)

    def pack(self):
        q = self.codes.view(self.shape)
        return [QuantLinear.affine(q[i], self.scale[i], self.zero_point[i], self.bits,
                                   self.inputs_per_scale) for i in range(len(q))]

# ---- The exact theory (sections 3 and 4 of the paper), for phi(x) = x'Ax / 2 - b'x ------------
# V(x): the few distinct values of a vector x (the codebook). P(x): which of its entries are
# tied (the codes). Each half is named for what it keeps: P keeps P(x), and V keeps V(x). phi never
# grows with any P and V below; STE has no such guarantee.

def exact_p(A, b, x):
    """The best vector that keeps x's ties: with E its one-hot codes, (E'AE) v = E'b."""
    values, codes = x.unique(return_inverse=True)
    E = F.one_hot(codes, len(values)).to(x)                            # (d, c)
    return E @ torch.linalg.solve(E.t() @ A @ E, E.t() @ b)

def exact_v(A, b, y):
    """The best vector of y's values, among all c^d."""
    values = y.unique()
    x = torch.cartesian_prod(*[values for _ in y])                     # (c^d, d)
    phi = ((x @ A) * x).sum(1) / 2 - x @ b
    return x[phi.argmin()]

def linear_v(A, b, y, values, tau):
    """The V half on a bound of phi: round y - grad / smooth to the nearest of `values`, for at
    most tau coordinates.

    grad is phi's gradient at y, and smooth the paper's L: phi's smoothness along the chosen
    coordinates alone. For every step h along them
        phi(y + h) <= phi(y) + grad'h + smooth |h|^2 / 2,
    and the rounding is the minimum of this bound: so phi cannot grow. tau = d, the length of y,
    is the naive step, with the smoothness along all coordinates.
    """
    grad = A @ y - b

    # Choose the largest |grad|, those coordinates first that have a value on their downhill side.
    column = y.unsqueeze(1)
    lower = (values < column).any(1)
    higher = (values > column).any(1)
    movable = torch.where(grad > 0, lower, higher) & (grad != 0)
    order = torch.where(movable, grad.abs(), -1.0).argsort(descending=True, stable=True)
    chosen = order[:tau]

    # Round their steps, with the others as they are.
    smooth = torch.linalg.eigvalsh(A[chosen][:, chosen])[-1]
    goal = y[chosen] - grad[chosen] / smooth
    x = y.clone()
    x[chosen] = values[(goal.unsqueeze(1) - values).abs().argmin(1)]
    return x

def ste_iterates(A, b, x, values, lr, steps):
    """The straight-through estimator: shadow weights collect the gradients at their rounded
    values. Yields the rounded values."""
    shadow = x.clone()
    for _ in range(steps):
        yield x
        shadow = shadow - lr * (A @ x - b)
        x = values[(shadow.unsqueeze(1) - values).abs().argmin(1)]

def values_along(move, x, phi, steps):
    """phi at the start x and after each move: x, move(x), move(move(x)), ..."""
    values = []
    for _ in range(steps):
        values.append(phi(x))
        x = move(x)
    return values

def demo(seed):
    """Print the example that separates the methods, and curves of exact and linear PV."""
    demo_of_ten_coordinates()

    say("\nphi - min phi after each P and V: mean of 50 coupled quadratics of 6 numbers, c values")
    generator = torch.Generator().manual_seed(seed)
    for c in range(1, 7):
        curves = torch.tensor([pv_curves(c, generator) for _ in range(50)]).mean(0).tolist()
        for name, values in zip(("exact", "linear", "subspace"), curves):
            say(f"c = {c}, {name:8} | {format_values(values)}")

def demo_of_ten_coordinates():
    """All ten gradients are equal: no coordinate moves, or all do, unless only tau may."""
    A = torch.ones(10, 10).double()
    b = torch.full((10,), 4.0).double()
    x = torch.zeros(10).double()
    values = torch.tensor([0.0, 1.0]).double()

    def phi(x):
        return (x.sum() - 4).item() ** 2 / 2

    # The smoothness L is 10 along all coordinates, and tau along tau of them.
    say("phi(x) = (x_1 + ... + x_10 - 4)^2 / 2, x_i in {0, 1}, from x = 0; phi after each step")
    taus = {"naive, step 1/L": 10, "subspace, tau 1": 1, "subspace, tau 2": 2, "subspace, tau 3": 3}
    for label, tau in taus.items():
        def move(x):
            return linear_v(A, b, x, values, tau)
        say(f"{label} | {format_values(values_along(move, x, phi, 10))}")

    for lr in (0.02, 0.05, 0.1):
        found = [phi(x) for x in ste_iterates(A, b, x, values, lr, 200)]
        say(f"STE, lr {lr:<7} | {format_values(found[:10])} ... lowest of 200 steps {min(found)}")

def pv_curves(c, generator, d=6):
    """phi - min phi of exact, linear and subspace (tau 1) PV from the same random start."""
    draw = dict(generator=generator, dtype=torch.float64)
    root = torch.randn(d, d, **draw)
    b = torch.randn(d, **draw)
    values = torch.randn(c, **draw)

    # The 3 couples every pair: the smoothness along all is then far above that along one.
    A = root @ root.t() / d + torch.eye(d).double() / 10 + 3

    # Each of the c values occurs at least once.
    others = torch.randint(c, (d - c,), generator=generator)
    start = values[torch.cat((torch.arange(c), others))]
    lowest = torch.linalg.solve(A, b)

    def phi(x):
        return ((x - lowest) @ A @ (x - lowest) / 2).item()

    def exact(x):
        return exact_v(A, b, exact_p(A, b, x))

    def linear(x):
        y = exact_p(A, b, x)
        return linear_v(A, b, y, y.unique(), d)

    def subspace(x):
        y = exact_p(A, b, x)
        return linear_v(A, b, y, y.unique(), 1)

    return [values_along(move, start, phi, 8) for move in (exact, linear, subspace)]

def format_values(values):
    return " ".join(f"{x:7.3f}" for x in values)

# ---- The run ----------------------------------------------------------------------------------

def main():
    args = parse_args()
    if args.demo:
        demo(args.seed)
        return

    # The dense model, which is also the teacher of every arm.
    base, data = load_base(args)
    check_shapes(base, args)
    suit(args, base, "pvtune", width(args))
    name = f"pvtune-{args.scheme}"
    if args.scheme == "affine":
        name += f"-w{args.bits}"
    path = os.path.join(args.out, f"{name}.pt")
    keep_model(args, path)                             # refuses to write over --model
    header(f"pvtune | {args.scheme}", args, base, data)
    base.requires_grad_(False)

    # Fit codes and values to it.
    start = time.perf_counter()
    fitted = fit(copy.deepcopy(base), data, args).requires_grad_(True)
    fit_seconds = time.perf_counter() - start

    # Its bits and, where none is given, the code rate. Of a copy, because Distilled takes the
    # forms away.
    trial = Distilled(copy.deepcopy(fitted), base)
    bpw, _ = bits_per_weight(trial.pack())
    if args.code_lr is None:
        args.code_lr = default_code_lr(trial.forms, args.steps)
        say(f"--code-lr {args.code_lr:g} from half a step to the next code and {args.steps} steps")
    del trial

    # What the arms are compared with.
    rows = {}
    rows["dense"] = score_arm("dense", base, 16.0, 0.0, data, args, None)
    start = time.perf_counter()
    rounded = nearest_rtn(base, bpw)
    rtn_bpw, _ = bits_per_weight(rounded)
    rtn_seconds = time.perf_counter() - start
    rows["RTN"] = score_arm("RTN", rounded, rtn_bpw, rtn_seconds, data, args, base)
    rows["as fitted"] = score_arm("as fitted", fitted, bpw, fit_seconds, data, args, base)

    # Every arm tunes a copy of the fit, on the same tokens.
    variants = [args.variant] if args.variant else ["p", "ste", "pv"]
    for variant in variants:
        label = VARIANTS[variant].label
        say(f"--- {label}")
        state_path = os.path.join(args.out, f"{name}-{variant}.state")
        model, optimizer, result = tune(fitted, base, data, args, variant, state_path)
        seconds = result["seconds"]
        rows[label] = score_arm(label, model.student, bpw, seconds, data, args, base)
        if optimizer.fraction:
            rows[label] |= share_of_changes(optimizer, args.steps)
            if "P only" in rows:
                rows[label]["minus_p"] = rows[label]["val_loss"] - rows["P only"]["val_loss"]
    print_table(rows, len(data.val) - 1)

    # The last arm is the result of the run.
    report(args, data, model, base, variant, result, rows, bpw, path)

def nearest_rtn(model, bpw):
    """Round to nearest, at the bits and the group size that come closest to bpw."""
    sizes = [linear.weight.shape for _, linear in model.linears()]
    weights = sum(O * C for O, C in sizes)
    closest = math.inf
    for bits in range(1, 9):
        for g in (-1, 256, 128, 64, 32):
            if any(C % g for _, C in sizes):
                continue
            groups = sum(O * (C // g if g > 0 else 1) for O, C in sizes)
            # Each group stores a scale of 16 bits and a zero point, which is one of the codes.
            stored = bits + (16 + bits) * groups / weights
            if abs(stored - bpw) < closest:
                closest = abs(stored - bpw)
                best_bits, best_g = bits, g

    def rounded(_, linear):
        q, scale, zero_point = rtn(linear.weight.detach(), best_bits, best_g)
        return QuantLinear.affine(q, scale, zero_point, best_bits, best_g)
    return copy.deepcopy(model).replace_linears(rounded)

def tune(fitted, teacher, data, args, variant, path):
    """PV-tune a copy of the fitted student -> (Distilled, optimizer, train's result)."""
    model = Distilled(copy.deepcopy(fitted), teacher)
    optimizer = PVOptimizer(model, args, variant)
    result = train_arm(model, data, args, path, optimizer.status, optimizer)
    return model, optimizer, result

def score_arm(label, model, bpw, seconds, data, args, base):
    """Evaluate an arm and compare it with the base, if one is given; print its losses, and return
    its row of the table."""
    scores = score(model, data, args, base)
    row = arm_row(scores, bpw, seconds)
    say(f"{label} | {show(scores)}")
    return row

def share_of_changes(optimizer, steps):
    """Changes of groups over all groups, and over those that were allowed in all steps."""
    changed = optimizer.changed()
    allowed, groups = optimizer.allowed()
    return {"changed": changed / groups, "budget": changed / allowed / steps}

def print_table(rows, tokens):
    dense = rows["dense"]["val_loss"]
    fitted = rows["as fitted"]["val_loss"]
    lost = (fitted - dense) or math.nan                # nothing lost: nan % recovered
    say(f"\n{tokens:>7} val tokens     | val loss |     KL | same top | recovered |   bpw | "
        "changed |  budget | seconds")
    for label, row in rows.items():
        recovered = (fitted - row["val_loss"]) / lost
        codes = "      - |       -"
        if "changed" in row:
            codes = f"{100 * row['changed']:6.2f}% | {100 * row['budget']:6.2f}%"
        say(f"{label:22} | {row['val_loss']:8.4f} | {show_distance(row)} | "
            f"{100 * recovered:8.1f}% | {row['bpw']:5.2f} | {codes} | {row['seconds']:7.1f}")

    # What the V half adds to the P half, which does most of the work in every arm.
    own = [f"{label} {row['minus_p']:+.4f}" for label, row in rows.items() if "minus_p" in row]
    if own:
        say(f"the V half's own part, val loss minus that of P only: {', '.join(own)} nats/token")
    say("")

def width(args):
    """Bits of the codes, without scales and codebooks, for a weight."""
    if args.scheme == "affine":
        return args.bits
    M, B, g = parse_scheme(args.scheme)
    return M * B / g

def report(args, data, model, base, variant, result, rows, bpw, path):
    """Pack the last arm, save, load and evaluate what was loaded; print the result row."""
    packed, scores = through_the_file(path, model.pack(), args, data, "pvtune", base)

    # Does the file hold what was tuned? Its codebooks and scales are float16.
    differ = groups_that_differ(model, packed)
    live_loss = rows[VARIANTS[variant].label]["val_loss"]
    minus = scores["loss"] - live_loss
    say(f"packed | {show(scores)} | {differ} groups have other codes than the live weights | loss "
        f"differs from live by {abs(minus):.1e} | {bpw:.3f} bits per weight | {path}")

    finish(args, "pvtune", packed, scores, result, w_bits=width(args), group_size=args.group_size,
           scheme=args.scheme, variant=variant, rank=args.rank, tau=args.tau, lr=args.lr,
           code_lr=args.code_lr, base_val_loss=rows["dense"]["val_loss"], arms=rows,
           integers_differ=differ, packed_minus_live=minus)

@torch.no_grad()
def groups_that_differ(model, packed):
    """In how many groups the live student's dense weights differ from what the file's codes give
    with the live codebooks and scales (those of the file are rounded to float16). Comparing
    weights, not codes, also finds dense weights that are stale.
    """
    stored = dict(packed.linears())
    names = {layer: name for name, layer in model.student.linears()}
    count = 0
    for form, layers in zip(model.forms, model.layers):
        L, n, M = form.codes.shape
        own = form.codes
        codes = []
        for layer in layers:
            # packed has a row for each output; the last argument is the codes in a row.
            m = stored[names[layer]]
            codes.append(unpack(m.packed, m.spec["bits"], M * n // len(m.packed)))

        # What the live form gives with these codes in the place of its own.
        form.codes = torch.stack(codes).view(L, n, M).to(own)
        w_hat = form.dequantize()                                      # (L, O, C)
        form.codes = own

        live = torch.stack([layer.weight for layer in layers])
        wrong = (w_hat - live).abs() > 1e-4 * live.abs().amax((1, 2), keepdim=True)
        count += wrong.view(L, n, form.group_size).any(2).sum().item()
    return count

# ---- Flags ------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(prog="pvtune.py", description="Fine-tune codes and codebooks (PV-Tuning).")
    p.add_argument("--bits", type=number(int, 1, 8),
                   help="a weight, 1 to 8; a --scheme MxBgG has its own (default: 2)")
    p.add_argument("--scheme", help="MxBgG: M codebooks of 2^B vectors of G weights; or affine, a "
                   "grid of --bits (default: BITSx4g4)")
    p.add_argument("--group-size", type=number(int, -1),
                   help="affine: inputs that share a scale; -1: all of a row (default: -1; for a "
                   "model of 10M weights and more 128, or what divides its inputs)")
    p.add_argument("--variant", choices=tuple(VARIANTS),
                   help="only this arm (default: p, ste and pv)")
    p.add_argument("--rank", choices=("residual", "improvement"), default="residual",
                   help="the groups that may change: largest error, or largest error that goes "
                   "away (default: residual)")
    p.add_argument("--tau", type=float, default=0.01,
                   help="share of the groups that may change (def.: 0.01)")
    p.add_argument("--trust", type=number(float, 1e-9), default=0.2,   # ours; theirs: 0.01 or none
                   help="largest change of a weight by new codes, relative to its norm, in one "
                   "step (default: 0.2)")
    p.add_argument("--code-lr", type=number(float, 1e-9, 10),
                   help="of the virtual dense weight, relative to its norm (default: from the fit "
                   "and --steps, see default_code_lr)")
    p.add_argument("--demo", action="store_true",
                   help="only show the exact theory on tiny problems")
    add_flags(p)
    p.set_defaults(**UNSET, eval_every=0)              # what follows from the model; no looks
    args = p.parse_args(argv)

    # A code of 4 bits for 4 weights costs one bit per weight, so M = bits. check_args still sees by
    # None whether --bits was given.
    bits = args.bits or 2
    args.scheme = args.scheme or f"{bits}x4g4"
    check_args(args)
    args.bits = bits
    if args.scheme != "affine":
        args.group_size = parse_scheme(args.scheme).group_size
    if args.smoke and not args.steps:
        args.steps = 6
    return resolve(args)

def check_args(args):
    """Raise UsageError for values that are out of range and flags that do not go together."""
    if not 0 < args.tau <= 1:
        raise UsageError(f"--tau {args.tau} is outside (0, 1]; try 0.01")
    if args.scheme != "affine":
        g = parse_scheme(args.scheme).group_size
        if args.group_size is not None:
            raise UsageError(f"--group-size {args.group_size} is for --scheme affine; --scheme "
                             f"{args.scheme} has groups of {g} already")
        if args.bits not in (None, width(args)):
            raise UsageError(f"--bits {args.bits} is not what --scheme {args.scheme} has, "
                             f"{width(args):g} bits per weight; leave one of the two out")

def check_shapes(model, args):
    """Raise UsageError for a group or a codebook that some linear of the model cannot have."""
    if args.scheme == "affine":
        suit_groups(args, model)
        return
    _, B, g = parse_scheme(args.scheme)
    K = 2**B
    for name, linear in model.linears():
        O, C = linear.weight.shape
        if C % g:
            raise UsageError(f"--scheme {args.scheme}: groups of {g} do not divide {name}'s {C} "
                             f"input channels; try {math.gcd(C, 64)}")
        if K > O * C // g / 4:
            raise UsageError(f"--scheme {args.scheme}: {K} vectors are above a quarter of {name}'s "
                             f"{O * C // g} groups; try fewer bits a code or smaller groups")

if __name__ == "__main__":
    run(main)
