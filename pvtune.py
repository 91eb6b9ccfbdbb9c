"""PV-Tuning: fine-tune the codes of a compressed LLaMA together with all that is continuous.

    python pvtune.py --bits 2                   # every arm on the tiny base; one table; 3 minutes
    python pvtune.py --bits 2 --smoke           # every line of it in a few seconds
    python pvtune.py --bits 2 --scheme affine --group-size 64      # a plain grid, from GPTQ
    python pvtune.py --demo                     # the exact theory, on problems of 6 and 10 numbers
    torchrun --standalone --nproc_per_node=2 pvtune.py --bits 2    # the same arms on 2 GPUs
    python model.py eval out/pvtune-2x4g4.pt    # the packed result

The idea:
  1. A weight is a code into a few values. First fit both to the dense model: additive codebooks by
     k-means and a search that knows the inputs (AQLM), or a grid by GPTQ.
  2. One batch gives the gradient G of the dense weight W. The P half turns G into gradients of
     codebooks and scales, and takes an Adam step on them and on norms, embedding and head.
  3. The V half takes an Adam step on a virtual dense weight R. A share tau of the groups may move
     to the code nearest to R: few at a time, because many at once overshoot, as --demo shows. R
     remembers what did not yet become a change of code (a straight-through buffer).

Paper: PV-Tuning, Malinovskii et al. 2024 (arXiv 2405.14852); code: Vahe1994/AQLM (2401.06118).
Ours differs: plain grids too, whose scales learn while their integer zero points stay; with --rank
improvement groups are ranked by the error that a change removes (the official ranking, by residual,
is the default); --trust is 0.2 (theirs 0.01, or none); the fit takes up to 4 x 19 Adam steps at 1 %
of a tensor's size, each 19 with a search after them (theirs up to 100 x 100 steps at 1e-4); the
rates fall to 0 and were chosen on the dev split; gradients are clipped to norm 1 as everywhere
here; all draws follow from --seed and the step. Their search is wrong for three and more codebooks
with a beam above 1, and their stochastic rounding raises for two; ours is tested for both. Not
here: AQLM's tuning of a whole block between the layers' fits, scales of groups.
Printed: codes, groups whose code changed in this step / how many may; trust, the largest share of
its trust region that a weight used. In the table: recovered, the share of what the fit lost that an
arm wins back; changed, changes over all groups; budget, changes over those that were allowed.
Shapes: W (O, C) weights, J = C / g groups a row; n groups in all, M codes each, K = 2^B codewords.
"""
import copy
import math
import os
import re
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UsageError
from nanobit.cli import add_flags, number, Parser, resolve, run
from nanobit.data import batch
from nanobit.ranks import from_rank_0, say, world_size
from nanobit.runs import (arm_row, check_groups, definite_hessian, finish, header, keep_model,
                          load_base, score, show, through_the_file)
from nanobit.train import kl_loss, train_arm
from quantizers import (EPS, QuantLinear, affine_codes, bits_per_weight, block_hessians, dequantize,
                        full_float32, gptq, output_error, rtn, unpack, vq_dequantize, vq_fit,
                        vq_search, vq_sum)

# The V half: delta, the share of R's memory that is lost in a step; the share of the groups that
# may change (None: --tau); the temperature of stochastic rounding. p has none.
VARIANTS = {"p": None, "naive": (1, 1, 0), "stochastic": (1, 1, 0.5), "ste": (0, 1, 0),
            "subspace": (1, None, 0), "pv": (0, None, 0)}
NAMES = {"p": "P only", "naive": "naive PV", "stochastic": "stochastic rounding", "ste": "STE",
         "subspace": "subspace PV", "pv": "PV"}

def parse_args(argv=None):
    p = Parser(prog="pvtune.py", description="Fine-tune codes and codebooks (PV-Tuning).")
    add = p.add_argument
    add("--bits", type=number(int, 1, 8), default=2, help="a weight, 1 to 8 (default: 2)")
    add("--scheme", help="MxBgG: M codebooks of 2^B vectors of G weights; or affine, a grid of "
        "--bits (default: BITSx4g4)")
    add("--group-size", type=number(int, -1), help="affine: inputs a scale; -1: all (default: -1)")
    add("--variant", choices=tuple(VARIANTS), help="only this arm (default: p, ste and pv)")
    add("--rank", choices=("residual", "improvement"), default="residual", help="the groups that "
        "may change: largest error, or largest error that goes away (default: residual)")
    add("--tau", type=float, default=0.01, help="share of the groups that may change (def.: 0.01)")
    add("--trust", type=number(float, 1e-9), default=0.2, help="largest change of a weight by new "
        "codes, relative to its norm, in one step (default: 0.2)")
    add("--code-lr", type=number(float, 1e-9, 10), default=0.1, help="of the virtual dense "
        "weight, relative to its norm (default: 0.1)")
    add("--demo", action="store_true", help="only show the exact theory on tiny problems")
    add_flags(p)
    p.set_defaults(lr=6e-3, seq_len=0, eval_every=0)
    args = p.parse_args(argv)
    if not 0 < args.tau <= 1:
        raise UsageError(f"--tau {args.tau} is outside (0, 1]; try 0.01")
    args.scheme = args.scheme or f"{args.bits}x4g4"
    if args.scheme == "affine":
        args.group_size = -1 if args.group_size is None else args.group_size
    else:
        *_, g = parse_scheme(args.scheme)
        if args.group_size is not None:
            raise UsageError(f"--group-size {args.group_size} is for --scheme affine; --scheme "
                             f"{args.scheme} has groups of {g} already")
        args.group_size = g
    args.steps = args.steps or (6 if args.smoke else 70)
    return resolve(args)

def parse_scheme(text):
    """"2x8g8" -> (2, 8, 8): M codebooks, B bits a code, g weights a group."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)g([1-9]\d*)", text)
    if not match:
        raise UsageError(f"--scheme {text} is neither affine nor MxBgG such as 2x4g4")
    M, B, g = map(int, match.groups())
    if B > 16:
        raise UsageError(f"--scheme {text}: 2^{B} codes do not fit in 16 bits; try {M}x16g{g}")
    return M, B, g

def check_shapes(model, args):
    """Raise UsageError for a group or a codebook that some linear of the model cannot have."""
    if args.scheme == "affine":
        return check_groups(model, args.group_size)
    _, B, g = parse_scheme(args.scheme)
    for name, linear in model.linears():
        (O, C), K = linear.weight.shape, 2**B
        if C % g:
            raise UsageError(f"--scheme {args.scheme}: groups of {g} do not divide {name}'s {C} "
                             f"input channels; try {math.gcd(C, 64)}")
        if K > O * C // g / 4:
            raise UsageError(f"--scheme {args.scheme}: {K} vectors are above a quarter of {name}'s "
                             f"{O * C // g} groups; try fewer bits a code or smaller groups")

# ---- The exact theory (sections 3 and 4 of the paper), for phi(x) = x'Ax / 2 - b'x ------------
# A vector x with few distinct values V(x) (the codebook), and the ties P(x) among its entries
# (the codes). phi never grows, whatever the halves are.

def exact_p(A, b, x):
    """The best vector that keeps x's ties: with E its one-hot codes, (E'AE) v = E'b."""
    values, codes = x.unique(return_inverse=True)
    E = F.one_hot(codes, len(values)).to(x)                                        # (d, c)
    return E @ torch.linalg.solve(E.t() @ A @ E, E.t() @ b)

def exact_v(A, b, y):
    """The best vector of y's values, among all c^d."""
    x = torch.cartesian_prod(*[y.unique()] * len(y))                               # (c^d, d)
    return x[(((x @ A) * x).sum(1) / 2 - x @ b).argmin()]

def linear_v(A, b, y, values, tau):
    """Round y - g / L to the nearest of `values`, in the tau coordinates with the largest |g| among
    those that have a value to go to; L is phi's smoothness on these alone. tau = d: the naive step.
    """
    g = A @ y - b
    ahead = (values * g.sign().unsqueeze(1) < (y * g.sign()).unsqueeze(1)).any(1)  # downhill
    order = torch.where(ahead, g.abs(), -1.0).argsort(descending=True, stable=True)
    S = order[:tau]
    L = torch.linalg.eigvalsh(A[S][:, S])[-1]
    x = y.clone()
    x[S] = values[((y[S] - g[S] / L).unsqueeze(1) - values).abs().argmin(1)]
    return x

def ste(A, b, x, values, lr, steps):
    """Shadow weights collect the gradients at their rounded values; yields those."""
    shadow = x.clone()
    for _ in range(steps):
        yield x
        shadow = shadow - lr * (A @ x - b)
        x = values[(shadow.unsqueeze(1) - values).abs().argmin(1)]

def values_along(move, x, phi, steps):
    """phi along x, move(x), move(move(x)), ..."""
    values = []
    for _ in range(steps):
        values.append(phi(x))
        x = move(x)
    return values

def ten(v):
    return " ".join(f"{x:7.3f}" for x in v[:10])

def demo(seed):
    """Print the example that separates the methods, and curves of exact and linear PV."""
    A, b, x = torch.ones(10, 10).double(), torch.full((10,), 4.0).double(), torch.zeros(10).double()
    phi, values = lambda x: (x.sum() - 4).item() ** 2 / 2, torch.tensor([0.0, 1.0]).double()
    say("phi(x) = (x_1 + ... + x_10 - 4)^2 / 2, x_i in {0, 1}, from x = 0; phi after each step")
    for tau in (10, 1, 2, 3):
        name = f"subspace, tau {tau}" if tau < 10 else "naive, step 1/L"
        found = values_along(lambda x: linear_v(A, b, x, values, tau), x, phi, 10)
        say(f"{name:15} | {ten(found)}")
    for lr in (0.02, 0.05, 0.1):
        found = [phi(x) for x in ste(A, b, x, values, lr, 200)]
        say(f"STE, lr {lr:<7} | {ten(found)} ... lowest of 200 steps {min(found)}")
    say("\nphi - min phi after each P and V: mean of 50 coupled quadratics of 6 numbers, c values")
    generator = torch.Generator().manual_seed(seed)
    for c in range(1, 7):
        curves = torch.tensor([pv_curves(c, generator) for _ in range(50)]).mean(0).tolist()
        for name, values in zip(("exact", "linear", "subspace"), curves):
            say(f"c = {c}, {name:8} | {ten(values)}")

def pv_curves(c, generator, d=6):
    """phi - min phi of exact, linear and subspace (tau 1) PV from the same random start."""
    draw = dict(generator=generator, dtype=torch.float64)
    root, b, values = torch.randn(d, d, **draw), torch.randn(d, **draw), torch.randn(c, **draw)
    A = root @ root.t() / d + torch.eye(d).double() / 10 + 3           # every pair is coupled
    x = values[torch.cat((torch.arange(c), torch.randint(c, (d - c,), generator=generator)))]
    best = torch.linalg.solve(A, b)
    phi = lambda x: ((x - best) @ A @ (x - best) / 2).item()
    halves = (exact_v, *(lambda A, b, y, tau=tau: linear_v(A, b, y, y.unique(), tau)
                         for tau in (d, 1)))
    return [values_along(lambda x: v(A, b, exact_p(A, b, x)), x, phi, 8) for v in halves]

# ---- Two representations of L linears of one shape. The method asks of one: what it stands for,
# and `nearest`, the codes near targets (L, k, g) for the groups `where` (L, k) -> (L, k, keep, M),
# with their values (L, k, keep, g). The groups of a linear are counted row by row.

def not_zero(scale):
    """scale, or EPS where training took it nearer to 0 than that: then it can divide."""
    return torch.where(scale.abs() < EPS, EPS, scale)

class Codebooks(nn.Module):
    """Additive codebooks: codes (L, O, J, M), codebooks (L, M, K, g), scales (L, O)."""
    more = ()

    def __init__(self, codes, codebooks, scales):
        super().__init__()
        self.shape, self.group = codes.shape, codebooks.size(3)
        self.register_buffer("codes", codes.flatten(1, 2).int())
        self.codebooks, self.scales = nn.Parameter(codebooks.clone()), nn.Parameter(scales.clone())

    def parts(self):
        return self.codes.view(self.shape), self.codebooks, self.scales

    def dequantize(self):
        return vq_dequantize(*self.parts())                                        # (L, O, C)

    def nearest(self, target, where, keep=1, **how):
        s = self.scales.gather(1, where // self.shape[2]).unsqueeze(2)             # (L, k, 1)
        codes = vq_search(target / not_zero(s), take(self.codes, where), self.codebooks, keep=keep,
                          **how)
        values = vq_sum(codes.flatten(1, 2), self.codebooks).view(*codes.shape[:3], -1)
        return codes, values * s.unsqueeze(3)

    def pack(self):
        return [QuantLinear.vq(*parts) for parts in zip(*self.parts())]

class Grid(nn.Module):
    """The affine grid of `rtn` and `gptq`: a group is one weight, its code the integer (L, O, C).
    The scales (L, O, G) learn; the zero points are integers and stay."""
    group = 1

    def __init__(self, q, scale, zero_point, bits):
        super().__init__()
        self.shape, self.more, self.size = q.shape, (bits,), q.size(2) // scale.size(2)
        self.register_buffer("codes", q.flatten(1).unsqueeze(2).int())
        self.register_buffer("zero_point", zero_point)
        self.scale = nn.Parameter(scale.clone())

    def parts(self):
        return self.codes.view(self.shape), self.scale, self.zero_point

    def dequantize(self):
        return dequantize(*(x.flatten(0, 1) for x in self.parts()), self.size).view(self.shape)

    def nearest(self, target, where, keep=1, **_):
        s, z = (x.flatten(1).gather(1, where // self.size).unsqueeze(2) for x in self.parts()[1:])
        bits, = self.more
        divisor = not_zero(s)
        first = affine_codes(target, divisor, z, bits)                             # (L, k, 1)
        up = (target / divisor + z > first) & (first < 2**bits - 1) | (first == 0)
        codes = torch.cat((first, first + torch.where(up, 1, -1)), 2)[..., :keep].unsqueeze(3)
        return codes, (codes - z.unsqueeze(3)) * s.unsqueeze(3)

    def pack(self):
        return [QuantLinear.affine(*parts, *self.more, self.size) for parts in zip(*self.parts())]

def stack(forms):
    """One form of them all; they have one shape."""
    return type(forms[0])(*map(torch.cat, zip(*(f.parts() for f in forms))), *forms[0].more)

# ---- The V half -------------------------------------------------------------------------------

BEAM = 1                                               # hypotheses of the code search

def take(x, where):
    """x (L, n, ...) at where (L, k) -> (L, k, ...)."""
    return x.gather(1, where.unsqueeze(2).expand(-1, -1, x.size(2)))

@torch.no_grad()
def v_step(reference, codes, codebooks, scales, fraction, **how):
    """New codes (O, J, M) for the dense weight `reference` (O, C); how: as for move_codes."""
    form = Codebooks(codes[None], codebooks[None], scales[None])
    move_codes(form, reference[None], fraction, **how)
    return form.codes.view(codes.shape).to(codes.dtype)

@torch.no_grad()
def move_codes(form, reference, fraction, rank="residual", trust=None, left=None, beam=BEAM,
               generator=None, rounding=0.0):
    """Move ceil(fraction * n) of each linear's n groups at most to codes nearer to reference.

    reference (L, O, C). Groups are ranked by their squared error in the weights' own unit. rank
    "improvement" subtracts what the best code would leave; where `left` (L, n) is given, what it
    left when the group was last searched (0 at first), which is kept there: then only the chosen
    groups are searched. rounding T takes the runner-up now and then. trust: the changes that
    come first, up to the one that brings the norm of all to trust * |W|. Returns W (L, O, C), the
    numbers of changed groups (L,) and the shares of trust used (L,): nothing waits for a GPU.
    """
    w, draw = form.dequantize(), dict(generator=generator, dtype=reference.dtype)
    (L, n, M), g, search = form.codes.shape, form.group, dict(beam=beam, generator=generator)
    value, target = w.view(L, n, g), reference.reshape(L, n, g)
    error, used = (target - value).square().sum(2), w.new_zeros(L)                 # (L, n)
    count, chosen = math.ceil(fraction * n), torch.arange(n, device=w.device).expand(L, n)
    if count < n or trust is not None:
        if rank == "improvement" and left is None:
            best = form.nearest(target, chosen, **search)[1][:, :, 0]
            error = error - (target - best).square().sum(2)
        elif rank == "improvement":
            error = error - left
        chosen = error.topk(count).indices                                         # (L, count)
    before, old, target = (take(x, chosen) for x in (value, form.codes, target))
    codes, values = form.nearest(target, chosen, 1 + bool(rounding), **search)
    errors = (values - target.unsqueeze(2)).square().sum(-1)               # (L, count, keep)
    second = torch.zeros(L, count, dtype=torch.bool, device=w.device)
    if left is not None:
        left.scatter_(1, chosen, errors[..., 0])
    if rounding:                                       # p = e1^(-1/T) / (e1^(-1/T) + e2^(-1/T))
        p = 1 / (1 + (errors[..., 0] / errors[..., 1]).pow(0.5 / rounding))
        second = torch.rand(L, count, **draw).to(w.device) >= p.nan_to_num(1.0)
    codes, values = (torch.where(second.unsqueeze(2), x[:, :, -1], x[:, :, 0])
                     for x in (codes, values))
    if trust is not None:
        step = (values - before).square().sum(2)
        limit = (trust * w.flatten(1).norm(dim=1, keepdim=True)).square()          # (L, 1)
        keep = (step.cumsum(1) - step < limit).unsqueeze(2)        # all before it stay inside
        codes, values = torch.where(keep, codes, old), torch.where(keep, values, before)
        used = ((values - before).square().sum((1, 2)) / limit[:, 0]).sqrt()
    form.codes.scatter_(1, chosen.unsqueeze(2).expand(-1, -1, M), codes.int())
    value.scatter_(1, chosen.unsqueeze(2).expand(-1, -1, g), values)
    return w, (codes != old).any(2).sum(1), used

# ---- The optimizer ----------------------------------------------------------------------------

EPS_ADAM = 1e-6                                        # after the root, as in the authors' code

def lamb_step(p, g, state, lr, betas):
    """What LAMB adds to each of L tensors p (L, ...) with gradients g: Adam's direction, made lr
    times as long as the tensor. Adam's correction of the moments' bias comes after, which for betas
    (0, 0.95) makes the first step 0.22 times as long, and for (0.9, 0.95) 2.2 times."""
    (b1, b2), t = betas, state.get("t", 0) + 1
    v = state.setdefault("v", torch.zeros_like(g)).mul_(b2).addcmul_(g, g, value=1 - b2)
    m = state.setdefault("m", torch.zeros_like(g)).lerp_(g, 1 - b1) if b1 else g
    state["t"], step = t, m / v.sqrt().add_(EPS_ADAM)
    p_norm, norm = (x.flatten(1).norm(dim=1) for x in (p, step))                   # (L,)
    size = p_norm / norm.clamp(min=1e-30) * (-lr * math.sqrt(1 - b2**t) / (1 - b1**t))
    return step.mul_(size.view(-1, *[1] * (p.dim() - 1)))

class PVOptimizer(torch.optim.Optimizer):
    """All variants in one. The students' dense weights receive the gradient G, and a step uses it
    for both halves. Each stack of linears has its state, all float32 and (L, O, C) or (L, n), under
    its first weight: Adam's v, the buffer R, `left` of move_codes, the number of changes so far."""

    def __init__(self, model, args, variant):
        self.stacks = [(form, [layer.weight for layer in layers])
                       for form, layers in zip(model.forms, model.layers)]
        groups = {"forms": [p for form, _ in self.stacks for p in form.parameters()],
                  "dense": [w for _, weights in self.stacks for w in weights]}
        known = {id(p) for params in groups.values() for p in params}
        groups["rest"] = [p for p in model.parameters() if id(p) not in known]
        super().__init__([{"params": groups[name], "peak": lr, "betas": (b1, 0.95)} for name, lr, b1
                          in (("rest", args.lr, 0.9), ("forms", args.lr, 0.9),
                              ("dense", args.code_lr, 0.0))], {})
        self.how, self.rank, self.trust = VARIANTS[variant], args.rank, args.trust
        self.fraction = self.how and (self.how[1] or args.tau)
        self.seed, self.generator = args.seed, torch.Generator()
        self.schedule = lambda step, steps, peak: peak * (1 - step / steps)

    @torch.no_grad()
    def step(self):
        (rest, forms, dense), t = self.param_groups, self.state[self.stacks[0][1][0]].get("t", 0)
        # A CPU's generator takes the low 32 bits of its seed: they have to know seed and step.
        mixed = np.random.SeedSequence([self.seed, t]).generate_state(1)
        self.generator.manual_seed(int(mixed[0]))
        grads = [torch.stack([w.grad for w in weights]) for _, weights in self.stacks]
        for (form, _), G in zip(self.stacks, grads):   # G -> gradients of what W is made of
            with torch.enable_grad():
                torch.autograd.backward(form.dequantize(), G)
        for p in rest["params"]:
            p += lamb_step(p[None], p.grad[None], self.state[p], rest["lr"], rest["betas"])[0]
        for p in forms["params"]:
            p += lamb_step(p, p.grad, self.state[p], forms["lr"], forms["betas"])
        self.moved = [self.move(form, weights, G, dense)
                      for (form, weights), G in zip(self.stacks, grads)]

    def move(self, form, weights, G, group):
        """The V half for a stack -> changed groups and used shares of the trust region, (L,)."""
        new, moved, state = None, (G.new_zeros(1), G.new_zeros(1)), self.state[weights[0]]
        if self.how:
            delta, fraction, rounding = self.how
            start = state["buffer"] if "buffer" in state else torch.stack(weights)
            R = start + lamb_step(start, G, state, group["lr"], group["betas"])
            if self.rank == "improvement" and not (delta or fraction):     # else R is always new
                state.setdefault("left", G.new_zeros(form.codes.shape[:2]))
            new, *moved = move_codes(form, R, self.fraction, self.rank,
                                     None if fraction else self.trust, state.get("left"),
                                     generator=self.generator, rounding=rounding)
            if world_size() > 1:                       # else rounding would part the ranks' codes
                from_rank_0([form.codes])
                new = form.dequantize()
            state["changed"] = state.get("changed", 0.0) + moved[0].sum().float()
            if delta < 1:
                state["buffer"] = R.lerp_(new, delta)
        for w, x in zip(weights, form.dequantize() if new is None else new):
            w.copy_(x)
        return moved

    def allowed(self):
        """Groups that may change in a step, and all groups."""
        sizes = [form.codes.shape[:2] for form, _ in self.stacks]
        return (sum(L * math.ceil((self.fraction or 0) * n) for L, n in sizes),
                sum(L * n for L, n in sizes))

    def status(self):
        """For the progress line: the last step's changes against what it may change."""
        if not self.how:
            return ""
        changed, trust = (torch.cat(m) for m in zip(*self.moved))
        return f" codes {changed.sum():.0f}/{self.allowed()[0]} | trust {100 * trust.max():.0f}% |"

    def changed(self):
        """Changed codes of all steps so far."""
        return sum(float(self.state[weights[0]].get("changed", 0)) for _, weights in self.stacks)

# ---- The student: dense weights for the gradient, codes for the result ------------------------

class PVLinear(nn.Module):
    """y = x W^T with W = form.dequantize()[0], which the optimizer keeps up to date."""

    def __init__(self, form):
        super().__init__()
        self.form, self.weight = form, nn.Parameter(form.dequantize()[0].detach())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

class Distilled(nn.Module):
    """The student with the teacher's loss while gradients are on, with its own text's otherwise.
    Takes the forms of linears of one shape out of the student and stacks them."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher, stacks = student, [teacher], {}    # a list: not ours to save
        self.config, self.compile_parts = student.config, student.compile_parts
        for _, layer in student.linears():
            stacks.setdefault(layer.weight.shape, []).append(layer)
        self.layers = list(stacks.values())
        self.forms = nn.ModuleList(stack([m.form for m in layers]) for layers in self.layers)
        for _, layer in student.linears():
            layer.form = None

    @property
    def lean(self):
        """Few logits at a time, as `evaluate` asks for: the student's own setting."""
        return self.student.lean

    @lean.setter
    def lean(self, value):
        self.student.lean = value

    def forward(self, idx, targets):
        if not torch.is_grad_enabled():
            return self.student(idx, targets)
        with torch.no_grad():
            goal = self.teacher[0](idx)[0].float()                                 # (B, T, vocab)
        logits = self.student(idx)[0]
        return logits, kl_loss(goal, logits.float())

    def pack(self):
        """A copy of the student with packed linears."""
        packed = {layer: linear for form, layers in zip(self.forms, self.layers)
                  for layer, linear in zip(layers, form.pack())}
        names = {name: packed[layer] for name, layer in self.student.linears()}
        return copy.deepcopy(self.student).replace_linears(lambda name, _: names[name])

# ---- The fit ----------------------------------------------------------------------------------

@full_float32()
@torch.no_grad()
def fit(model, data, args):
    """Compress the linears in place, block by block, each on what the blocks before feed it."""
    generator = torch.Generator().manual_seed(args.seed)
    idx, _ = batch(data.train, 0, 64, args.seq_len, args.seed, args.device)
    for i, block in enumerate(block_hessians(model, idx), 1):
        lost = []
        for name, m, h in block:
            if args.scheme == "affine":
                with definite_hessian(name, 64 * args.seq_len,
                                      "try another --data, or a longer --seq-len"):
                    parts = gptq(m.weight, h, args.bits, args.group_size)
                form = Grid(*(x[None] for x in parts), args.bits)
            else:
                with torch.enable_grad():
                    parts = vq_fit(m.weight, h, *parse_scheme(args.scheme),
                                   steps=5 if args.smoke else 19, generator=generator)
                form = Codebooks(*(x[None] for x in parts))
            lost.append(output_error(m.weight, form.dequantize()[0], h))
            model.set_submodule(name, PVLinear(form))
        say(f"block {i}/{model.config.n_layer} | {args.scheme} | % of output lost "
            + " | ".join(f"{n.rsplit('.', 1)[1]} {100 * e:.1f}" for (n, *_), e in zip(block, lost)))
    return model

def nearest_rtn(model, bpw):
    """Round to nearest, at the bits and the group size that come closest to bpw."""
    sizes = [linear.weight.shape for _, linear in model.linears()]
    def bits_at(bits, g):                              # a scale has 32 bits, a zero point 8
        return bits + 40 * sum(O * (C // g if g > 0 else 1) for O, C in sizes) / sum(
            O * C for O, C in sizes)
    bits, g = min(((bits, g) for bits in range(1, 9) for g in (-1, 256, 128, 64, 32)
                   if all(C % g == 0 for _, C in sizes)), key=lambda how: abs(bits_at(*how) - bpw))
    return copy.deepcopy(model).replace_linears(
        lambda _, m: QuantLinear.affine(*rtn(m.weight.detach(), bits, g), bits, g))

# ---- The run ----------------------------------------------------------------------------------

def tune(fitted, teacher, data, args, variant, path):
    """One arm: PV-tune a copy of the fitted student -> (Distilled, optimizer, train's result)."""
    model = Distilled(copy.deepcopy(fitted), teacher)
    optimizer = PVOptimizer(model, args, variant)
    return model, optimizer, train_arm(model, data, args, path, optimizer.status, optimizer)

def compare(args):
    """Fit, tune and evaluate the arms on the same tokens; print the table; pack the last arm."""
    base, data = load_base(args)
    check_shapes(base, args)
    name = f"pvtune-{args.scheme}" + (f"-w{args.bits}" if args.scheme == "affine" else "")
    keep_model(args, os.path.join(args.out, name + ".pt"))
    header(f"pvtune | {args.scheme}", args, base, data)
    start, base = time.perf_counter(), base.requires_grad_(False)
    fitted = fit(copy.deepcopy(base), data, args).requires_grad_(True)
    seconds, rows = time.perf_counter() - start, {}
    bpw = bits_per_weight(Distilled(copy.deepcopy(fitted), base).pack())[0]
    def add(arm, model, bits, optimizer=None, seconds=0.0):
        scores = score(model, data, args)
        rows[arm] = arm_row(scores, bits, seconds)
        if optimizer and optimizer.how:
            changed, (allowed, groups) = optimizer.changed(), optimizer.allowed()
            rows[arm] |= {"changed": changed / groups, "budget": changed / allowed / args.steps}
        say(f"{arm} | {show(scores)}")
        return scores
    add("dense", base, 16.0)
    start, rtn_model = time.perf_counter(), nearest_rtn(base, bpw)
    add("RTN", rtn_model, bits_per_weight(rtn_model)[0], seconds=time.perf_counter() - start)
    add("as fitted", fitted, bpw, seconds=seconds)
    for variant in [args.variant] if args.variant else ["p", "ste", "pv"]:
        say(f"--- {NAMES[variant]}")
        path = os.path.join(args.out, f"{name}-{variant}.state")
        model, optimizer, result = tune(fitted, base, data, args, variant, path)
        live = add(NAMES[variant], model, bpw, optimizer, result["seconds"])
    print_table(rows, len(data.val) - 1)
    bits = args.bits
    if args.scheme != "affine":                        # of the codes alone
        M, B, g = parse_scheme(args.scheme)
        bits = M * B / g
    path = os.path.join(args.out, name + ".pt")
    packed, scores = through_the_file(path, model.pack(), args, data, "pvtune")
    differ, minus = groups_that_differ(model, packed), scores["loss"] - live["loss"]
    say(f"packed | {show(scores)} | {differ} groups have other codes than the live weights | loss "
        f"differs from live by {abs(minus):.1e} | {bpw:.3f} bits per weight | {path}")
    finish(args, "pvtune", packed, scores, result, w_bits=bits, group_size=args.group_size,
           scheme=args.scheme, variant=variant, rank=args.rank, tau=args.tau, lr=args.lr,
           code_lr=args.code_lr, base_val_loss=rows["dense"]["val_loss"], arms=rows,
           integers_differ=differ, packed_minus_live=minus)

@torch.no_grad()
def groups_that_differ(model, packed):
    """How many groups of the dense weights that the live student multiplies with are not what the
    file's codes stand for. Codebooks and scales are the live ones: those of the file are float16.
    """
    stored, count = dict(packed.linears()), 0
    names = {layer: name for name, layer in model.student.linears()}
    for form, layers in zip(model.forms, model.layers):
        L, n, M = form.codes.shape
        own, codes = form.codes, []
        for layer in layers:
            m = stored[names[layer]]
            codes.append(unpack(m.packed, m.spec["bits"], M * n // len(m.packed)))

        # What the live form gives with these codes in the place of its own.
        form.codes = torch.stack(codes).view(L, n, M).to(own)
        w_hat, form.codes = form.dequantize(), own                                 # (L, O, C)

        live = torch.stack([layer.weight for layer in layers])
        wrong = (w_hat - live).abs() > 1e-4 * live.abs().amax((1, 2), keepdim=True)
        count += wrong.view(L, n, form.group).any(2).sum().item()
    return count

def print_table(rows, tokens):
    dense, fitted = rows["dense"]["val_loss"], rows["as fitted"]["val_loss"]
    say(f"\n{tokens:>7} val tokens     | val loss | recovered |   bpw | changed | budget | seconds")
    for arm, row in rows.items():
        share = (fitted - row["val_loss"]) / (fitted - dense or math.nan)
        codes = (f"{100 * row['changed']:6.1f}% | {100 * row['budget']:5.1f}%"
                 if "changed" in row else "      - |      -")
        say(f"{arm:22} | {row['val_loss']:8.4f} | {100 * share:8.1f}% | {row['bpw']:5.2f} | "
            f"{codes} | {row['seconds']:7.1f}")
    say("")

def main():
    args = parse_args()
    if args.demo:
        demo(args.seed)
    else:
        compare(args)

if __name__ == "__main__":
    run(main)
