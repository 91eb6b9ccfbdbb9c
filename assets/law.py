"""Fit the scaling law of QuEST's paper to the dense and QuEST runs of a results.jsonl.

    python assets/law.py                           # the runs in out/results.jsonl
    python assets/law.py assets/law.jsonl          # the runs of docs/quest.md; a minute

The law (section 4.2 of arXiv 2502.05003) says that fewer bits act like fewer parameters:

    L = A / (N eff(P))^alpha + B / D^beta + E

L is the validation loss, N the parameters of the linears, D the training tokens, P the bits of
weights and activations, and eff(16) = 1. We fit A, B, E, alpha, beta and one eff for every P to the
logarithm of L, resample the runs 100 times for intervals, and say which numbers the runs do not
determine. The runs must hold bits 16, three sizes and two token counts; rows of another kind are
left out. All is float64 on the CPU.
"""
import math
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from model import UsageError
from nanobit.cli import Parser, number, run
from nanobit.ranks import progress, say
from nanobit.runs import read_rows

NAMES = ("A", "B", "E", "alpha", "beta")               # the first five of theta; then the effs
PAPER_EFF = {1: 0.02, 2: 0.16, 3: 0.43, 4: 0.70, 8: 1.02}
BOOTSTRAPS = 100

# ---- The law and its fit ----------------------------------------------------------------------

def law(theta, N, D, P):
    """Losses (n,) of theta = log A, log B, log E, log alpha, log beta, log eff of bits[1:].

    N, D floats (n,); P (n,) is an index into the bits, 0 for the dense runs.
    """
    A, B, E, alpha, beta = theta[:5].exp()
    log_eff = torch.cat((theta.new_zeros(1), theta[5:]))
    eff = log_eff.exp()[P]
    return A / (N * eff) ** alpha + B / D**beta + E

def descend(theta, N, D, P, L, steps):
    """(loss, theta) after L-BFGS from theta: the mean Huber loss (delta 1e-3) of log L, times 1e3.
    A descent that diverged has the loss infinity."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=steps, tolerance_grad=1e-10,
                                  tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        gap = law(theta, N, D, P).log() - L.log()
        value = F.huber_loss(gap, torch.zeros_like(gap), delta=1e-3) * 1e3
        value.backward()
        return value

    optimizer.step(closure)
    value = closure().item()
    if not math.isfinite(value):
        value = math.inf
    return value, theta.detach()

def first_guesses(num_effs):
    """36 starts of a fit from nothing: a grid over the law's numbers, with every eff at 1."""
    starts = []
    for a in (1, 4, 8):
        for b in (2, 5, 10):
            for e in (-2, 0):
                for slope in (0.1, 0.4):
                    five = [a, b, e, math.log(slope), math.log(slope)]
                    starts.append(torch.tensor(five + [0] * num_effs).double())
    return starts

def fit_law(N, D, P, L, starts=None):
    """theta of the smallest loss over several starts; all float64. Without `starts` the descents
    begin at `first_guesses`, and the best of them goes on for longer."""
    def best_of(starts):
        found = [descend(theta, N, D, P, L, steps=150) for theta in starts]
        return min(found, key=lambda pair: pair[0])[1]

    if starts is not None:
        return best_of(starts)
    theta = best_of(first_guesses(P.max().item()))
    return descend(theta, N, D, P, L, steps=1000)[1]

# ---- The rows and the report ------------------------------------------------------------------

def usable_rows(path):
    """(rows, bits): the file's runs that the law is about, and their bits from 16 downwards.
    Raises UsageError where they cannot carry the fit."""
    rows = []
    for r in read_rows(path):
        if r.get("method") not in ("quest", "dense") or not r.get("linear_params"):
            continue
        if r["w_bits"] == r["a_bits"] and r.get("grid", "uniform") == "uniform":
            rows.append(r)
    bits = sorted({r["w_bits"] for r in rows}, reverse=True)
    sizes = {r["linear_params"] for r in rows}
    tokens = {r["tokens"] for r in rows}
    enough = len(sizes) >= 3 and len(tokens) >= 2 and len(rows) >= 5 + len(bits)
    if not enough or bits[0] != 16:
        raise UsageError(f"{path}: {len(rows)} usable rows, bits {bits}, {len(sizes)} sizes, "
                         f"{len(tokens)} token counts; the fit needs bits 16, 3 sizes, 2 token "
                         "counts, and 5 rows more than bits")
    return rows, bits

def bootstrap(theta, N, D, P, L, seed):
    """Ends (low, high) of the middle 90 % of theta over fits to resampled runs, from theta on."""
    generator = torch.Generator().manual_seed(seed)
    kinds = len(P.unique())
    draws = []
    for _ in progress(range(BOOTSTRAPS), "bootstraps"):
        # We draw again until every precision is among the runs: without it, its eff is anything.
        i = torch.zeros(0, dtype=torch.long)
        while len(P[i].unique()) < kinds:
            i = torch.randint(len(L), (len(L),), generator=generator)
        draws.append(fit_law(N[i], D[i], P[i], L[i], [theta]))
    return torch.stack(draws).quantile(torch.tensor([0.05, 0.95]).double(), 0)

def undetermined(theta, low, high):
    """Names of the numbers whose interval spans more than a factor of four, or of an E near 0."""
    loose = []
    for i, name in enumerate(NAMES):
        wide = high[i] - low[i] > 1.4                  # of logarithms
        if wide or name == "E" and theta[i].exp() < 1e-3:
            loose.append(name)
    return loose

def report(path, seed):
    """Fit the law to the runs of a file, with intervals; print it."""
    rows, bits = usable_rows(path)
    N = torch.tensor([r["linear_params"] for r in rows]).double()
    D = torch.tensor([r["tokens"] for r in rows]).double()
    L = torch.tensor([r["val_loss"] for r in rows]).double()
    P = torch.tensor([bits.index(r["w_bits"]) for r in rows])
    theta = fit_law(N, D, P, L)
    low, high = bootstrap(theta, N, D, P, L, seed)

    gap = (law(theta, N, D, P) - L).abs()
    say(f"{len(rows)} runs, {len(N.unique())} sizes | misses by {gap.mean():.4f} nats in the mean, "
        f"{gap.max():.4f} at most\n\n| | fit | 90 % of bootstraps | paper |\n|---|---|---|---|")
    for i, name in enumerate(NAMES):
        say(f"| {name} | {theta[i].exp():.4g} | {low[i].exp():.4g} .. {high[i].exp():.4g} | |")
    for i, b in enumerate(bits[1:], len(NAMES)):
        say(f"| eff({b:g}) | {theta[i].exp():.3f} | {low[i].exp():.3f} .. {high[i].exp():.3f} | "
            f"{PAPER_EFF.get(b, '')} |")

    # At P bits a byte holds 8 / P weights, each worth eff(P) of one at 16 bits.
    worth = {16: 1.0}
    for i, b in enumerate(bits[1:], len(NAMES)):
        worth[b] = theta[i].exp().item() * 16 / b
    values = ", ".join(f"{b:g} bits {v:.2f}" for b, v in sorted(worth.items()))
    say(f"\nparameters' worth of a bit of memory, eff(P) 16 / P: {values} | "
        f"best: {max(worth, key=worth.get):g} bits (the paper: 4)")

    loose = undetermined(theta, low, high)
    if loose:
        say(f"the runs do not determine {', '.join(loose)}: a degenerate fit, not to extrapolate; "
            "eff(P) compares precisions within the range of the runs")

def parse_args(argv=None):
    p = Parser(prog="law.py", description=__doc__.splitlines()[0])
    p.add_argument("rows", nargs="?", default="out/results.jsonl",
                   help="a file of result rows (default: out/results.jsonl)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0,
                   help="of the resampled runs (default: 0)")
    return p.parse_args(argv)

def main():
    args = parse_args()
    report(args.rows, args.seed)

if __name__ == "__main__":
    run(main)
