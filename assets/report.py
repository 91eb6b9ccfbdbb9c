"""The tables and the figures of the README from result rows.

    python assets/report.py                        # the committed rows: tables and figures
    python assets/report.py out/results.jsonl      # the rows of your own runs

Every script appends one JSON line a run to OUT/results.jsonl. Here the runs that differ by nothing
but the seed become one line: mean and standard deviation over seeds, and the paired difference to
the dense runs of the same seeds, size and tokens. normtweak.jsonl holds one line for each quantized
model, without and with the tweak; its table pairs them by calibration seed. lrqat.jsonl: one line
an arm, rate and seed, the arm's rate chosen by the mean loss on the dev split. pvtune.jsonl: one
line an arm, also those of the search for rates on the dev split. law.jsonl: the runs of the scaling
law, which assets/law.py fits; kernels.jsonl: what `tests/time_kernels.py --out` wrote. Runs that
compare several arms on one base hold them under "arms": with the runs from scratch of the same size
they become one table of methods. The figures need matplotlib.
"""
import collections
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
from nanobit.cli import run                            # as the scripts end and write
from nanobit.runs import read_rows
COLORS = {"quest": "#0b6e4f", "trust": "#3a86c8", "clip": "#8d6cab", "lsq": "#d1495b",
          "ste": "#e69f00"}

def setting(row):
    """What identifies a run apart from its seed."""
    return (row.get("size", "tiny"), row["tokens"], row["method"], row.get("grid") or "uniform",
            row["w_bits"], row["a_bits"], row["group_size"])

def mean_std(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

def summarize(rows):
    """[(setting, rows, mean and std of val_loss, the same of its difference to dense or None)]."""
    groups = collections.defaultdict(dict)
    for row in rows:
        groups[setting(row)][row["seed"]] = row        # a repeated seed: the last run counts
    dense = {(key[:2], seed): row["val_loss"] for key, runs in groups.items()
             if key[2] == "dense" for seed, row in runs.items()}
    table = []
    for key, runs in groups.items():
        paired = [row["val_loss"] - dense[key[:2], seed] for seed, row in runs.items()
                  if (key[:2], seed) in dense]
        table.append((key, list(runs.values()), mean_std([r["val_loss"] for r in runs.values()]),
                      mean_std(paired) if paired else None))
    return sorted(table, key=lambda line: (line[0][:2], -line[0][4], -line[0][5], line[2][0]))

def print_table(table):
    print("| method | grid | W bits | A bits | bits/weight | tokens | seeds | val loss | "
          "minus dense | ppl | bits/byte | seconds |")
    print("|---" * 12 + "|")
    for (size, tokens, method, grid, w, a, group), runs, loss, gap in table:
        average = {k: statistics.mean(r[k] for r in runs)
                   for k in ("bpw", "val_ppl", "bits_per_byte", "seconds")}
        minus = "" if gap is None or method == "dense" else f"{gap[0]:+.3f} ± {gap[1]:.3f}"
        print(f"| {method} | {grid} | {w} | {a} | {average['bpw']:.2f} | {tokens / 1e6:.2f}M | "
              f"{len(runs)} | {loss[0]:.3f} ± {loss[1]:.3f} | {minus} | "
              f"{average['val_ppl']:.2f} | {average['bits_per_byte']:.3f} | "
              f"{average['seconds']:.0f} |")

# (script, arm) as the table of methods names them; other arms have tables of their own.
ARMS = {("normtweak", "rtn"): "RTN", ("normtweak", "rtn-tweak"): "RTN + tweak",
        ("normtweak", "gptq"): "GPTQ", ("normtweak", "gptq-tweak"): "GPTQ + tweak",
        ("lrqat", "LR-QAT"): "LR-QAT", ("lrqat", "full QAT (LSQ)"): "full QAT",
        ("lrqat", "dense, longer"): "dense, trained on",
        ("pvtune", "as fitted"): "codebooks, as fitted", ("pvtune", "P only"): "codebooks, P only",
        ("pvtune", "STE"): "codebooks, STE", ("pvtune", "PV"): "codebooks, PV",
        ("pvtune-affine", "PV"): "PV, affine grid"}
SCRATCH = {"dense": "dense", "quest": "QuEST", "lsq": "LSQ", "ste": "straight-through",
           "clip": "clipped gradient", "trust": "QuEST without Hadamard"}

def methods(rows):
    """{(bits, method): one dict a seed}, of runs on one base and runs from scratch of its size."""
    dense = {r["seed"]: r["val_loss"] for r in rows if r["method"] == "dense"}
    found = collections.defaultdict(dict)
    for r in rows:
        if "arms" not in r:
            name = SCRATCH[r["method"]]
            if r["method"] != "dense":
                name += f" W{r['w_bits']}A{r['a_bits']}, from scratch"
            keep = {k: r[k] for k in ("val_loss", "bits_per_byte", "bpw", "seconds", "peak_bytes")}
            gap = r["val_loss"] - dense[r["seed"]] if r["seed"] in dense else None
            found[r["w_bits"], name][r["seed"]] = keep | {"gap": gap}
            continue
        affine = r["method"] == "pvtune" and r["scheme"] == "affine"
        for arm, row in r["arms"].items():
            name = ARMS.get((r["method"] + "-affine" * affine, arm))
            if name:
                bits = 16 if row["bpw"] == 16 else round(r["w_bits"])
                gap = row["val_loss"] - r["base_val_loss"]
                found[bits, name][r["seed"]] = row | {"gap": gap}
    return {key: list(runs.values()) for key, runs in found.items()}

def print_methods(found):
    print("\n| bits | method | bits/weight | seeds | val loss | minus dense | bits/byte | "
          "seconds | peak GiB |\n" + "|---" * 9 + "|")
    order = lambda item: (-item[0][0], statistics.mean(r["val_loss"] for r in item[1]))
    for (bits, name), runs in sorted(found.items(), key=order):
        loss, std = mean_std([r["val_loss"] for r in runs])
        gaps = [r["gap"] for r in runs if r["gap"] is not None] if name != "dense" else []
        average = {k: statistics.mean(r[k] for r in runs)
                   for k in ("bpw", "bits_per_byte", "seconds")}
        peak = max(r["peak_bytes"] or 0 for r in runs) / 2**30
        print(f"| {bits} | {name} | {average['bpw']:.2f} | {len(runs)} | {loss:.4f}"
              + (f" ± {std:.4f}" if len(runs) > 1 else "") + " | "
              + ("{:+.4f} ± {:.4f}".format(*mean_std(gaps)) if len(gaps) > 1 else
                 f"{gaps[0]:+.4f}" if gaps else "")
              + f" | {average['bits_per_byte']:.4f} | {average['seconds']:.0f} | "
              + (f"{peak:.1f} |" if peak else "|"))

def print_law(rows):
    """Losses of the scaling law's runs: a line a size and token count, a column a precision."""
    cells = {(r["linear_params"], r["tokens"], r["w_bits"]): r["val_loss"] for r in rows}
    bits = sorted({key[2] for key in cells}, reverse=True)
    names = ["dense" if b == 16 else f"W{b}A{b}" for b in bits]
    print(f"\n| parameters in linears | training tokens | {' | '.join(names)} |\n"
          + "|---" * (len(bits) + 2) + "|")
    for N, D in sorted({key[:2] for key in cells}):
        losses = (f"{cells[N, D, b]:.4f}" if (N, D, b) in cells else "" for b in bits)
        print(f"| {N / 1e6:.2f}M | {D / 1e6:.1f}M | " + " | ".join(losses) + " |")

def print_tweaks(rows):
    """Loss without and with the tweak, and the difference, paired by calibration seed."""
    same = ("w_bits", "a_bits", "host", "symmetric", "calib", "windows")   # of the plain model
    plain = {(*(r[k] for k in same), r["seed"]): r["val_loss"] for r in rows if not r["tweak"]}
    pairs = collections.defaultdict(list)
    for r in rows:
        host = tuple(r[k] for k in same)
        before = plain.get((*host, r["seed"]), plain.get((*host, 0)))      # RTN has one seed
        if r["tweak"] and before is not None:
            pairs[(*host, r["solver"], r["loss"], r["lr"])].append((before, r["val_loss"]))
    print("\n| W bits | A bits | host | grid | calibration | solver | loss | lr | seeds | "
          "without | with | difference |")
    print("|---" * 12 + "|")
    for (w, a, host, symmetric, calib, _, *how), values in sorted(pairs.items(), key=str):
        without, tweaked = (statistics.mean(v) for v in zip(*values))
        mean, std = mean_std([b - a for a, b in values])
        how = [w, a, host, "symmetric" if symmetric else "asymmetric", calib, *how, len(values)]
        print("| " + " | ".join(map(str, how)) +
              f" | {without:.4f} | {tweaked:.4f} | {mean:+.4f} ± {std:.4f} |")

def print_lrqat(rows):
    """Every arm at its own best rate on dev; the variants of LR-QAT at one rate; memory of 7B."""
    runs = collections.defaultdict(list)
    for r in rows:
        if r["part"] == "grid":
            how = r["phi"], r["init"], r["rank"]
            runs[r["bits"] * (not r["arm"].startswith("dense")), r["arm"], how, r["lr"]].append(r)
    mean = lambda key, field: mean_std([r[field] for r in runs[key]])
    best = {}                                          # (bits, arm): the key of its best rate
    for key in runs:
        if key[2] == ("fixed", "zero", 32):
            best[key[:2]] = min(best.get(key[:2], key), key, key=lambda k: mean(k, "dev_loss")[0])
    print("\n| bits | arm | rate | seeds | val loss | recovered | flipped |\n" + "|---" * 7 + "|")
    goal = mean(best[0, "dense, longer"], "val_loss")[0]
    for (bits, arm), key in sorted(best.items()):
        loss, seeds, moved = mean(key, "val_loss"), runs[key], runs[key][0]["flipped"] is not None
        rtn = mean(best[bits or 2, "RTN"], "val_loss")[0]
        share = f"{100 * (rtn - loss[0]) / (rtn - goal):.0f} %" if bits else ""
        flipped = f"{mean(key, 'flipped')[0]:.1f} %" if moved else ""
        rate = key[3] if len(seeds) > 1 else ""
        print(f"| {bits or 16} | {arm} | {rate} | {len(seeds)} | {loss[0]:.4f} ± {loss[1]:.4f} | "
              f"{share} | {flipped} |")
    print("\n| phi | start | rank | 2 bits | 3 bits | 4 bits |\n" + "|---" * 6 + "|")
    for how in dict.fromkeys(key[2] for key in runs if key[1] == "LR-QAT"):
        losses = [mean((bits, "LR-QAT", how, 0.01), "val_loss") for bits in (2, 3, 4)]
        print(f"| {' | '.join(map(str, how))} | " +
              " | ".join(f"{m:.4f} ± {d:.4f}" for m, d in losses) + " |")
    print("\n| 7B, 1 x 1024 tokens | phi | blocks again | peak GiB | tokens/s |")
    print("|---" * 5 + "|")
    for r in (r for r in rows if r["part"] == "memory"):
        peak = f"{r['peak'] / 2**30:.2f}" if r["fits"] else "more than 79"
        print(f"| {r['arm']} | {r['phi'] if r['arm'] == 'LR-QAT' else ''} | "
              f"{'yes' if r['lean'] else 'no'} | {peak} | {r.get('tokens/s', 0):.0f} |")

def print_pv(rows, seeds=3):
    """PV-Tuning's arms with `seeds` seeds or more and, paired by seed, what they win over P only.
    Rows of different runs start from different fits and are never averaged."""
    groups, p_only = collections.defaultdict(dict), {}
    for r in rows:
        names = ["run", "scheme", "start", "arm", "lr"] + ["code_lr", "rank"] * (r["arm"] != "p")
        key = tuple(r.get(name, "") for name in names)
        groups[key + ("",) * (7 - len(key))][r["seed"]] = r
    groups = {k: list(runs.values()) for k, runs in groups.items()
              if len(runs) >= seeds or k[3] in ("dense", "RTN", "as fitted")}
    tuned = collections.Counter(key[:3] for key in groups if key[4] != "")
    for key, runs in groups.items():
        if key[3] == "p":
            p_only[key[:3]] = {r["seed"]: r["val_loss"] for r in runs}
    print("\n| run | scheme | start | arm | lr | code lr | ranking | bits/weight | seeds | "
          "dev loss | val loss | minus P only | codes changed | budget used |")
    print("|---" * 14 + "|")
    order = lambda g: (*g[0][:3], statistics.mean(r["val_loss"] for r in g[1]))
    for key, runs in sorted(groups.items(), key=order):
        if tuned[key[:3]] < 2:                         # a run that was only a search
            continue
        dev, val = (mean_std([r[k] for r in runs]) for k in ("dev_loss", "val_loss"))
        cells = [*key, f"{runs[0]['bpw']:.2f}", len(runs),
                 *(f"{m:.4f} ± {s:.4f}" if len(runs) > 1 else f"{m:.4f}" for m, s in (dev, val))]
        if key[5] != "" and key[:3] in p_only:
            p = p_only[key[:3]]
            less = mean_std([r["val_loss"] - p[r["seed"]] for r in runs if r["seed"] in p])
            cells += [f"{less[0]:+.4f} ± {less[1]:.4f}",
                      *(f"{100 * statistics.mean(r[k] for r in runs):.2f} %"
                        for k in ("changed", "budget"))]
        print("| " + " | ".join(map(str, cells + [""] * (14 - len(cells)))) + " |")

def axes_of(width, height, columns=1):
    """matplotlib's figure and axes at the width of a README."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, columns, figsize=(width, height), dpi=160, squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    return fig, axes[0]

def save(fig, path):
    fig.tight_layout()
    fig.savefig(path)
    print(f"drawn: {path}")

def draw_methods(found, path):
    """Loss above dense against bits a weight, a line a method; logarithmic above 0.01."""
    styles = {"RTN": ("#999999", "s"), "GPTQ": ("#555555", "s"), "GPTQ + tweak": ("#000000", "x"),
              "QuEST": ("#0b6e4f", "v"), "codebooks, as fitted": ("#f2a6b0", "D"),
              "LR-QAT": ("#3a86c8", "o"), "full QAT": ("#8d6cab", "o"),
              "PV, affine grid": ("#e69f00", "^"), "codebooks, PV": ("#d1495b", "D")}
    lines = collections.defaultdict(list)
    for (bits, name), runs in found.items():
        name = "QuEST" if name == f"QuEST W{bits}A{bits}, from scratch" else name
        if name in styles:
            bpw = statistics.mean(r["bpw"] for r in runs)
            lines[name].append((bpw, *mean_std([r["gap"] for r in runs])))
    fig, (ax,) = axes_of(7.2, 5.0)
    for name, (color, marker) in styles.items():
        if lines[name]:
            x, y, std = zip(*sorted(lines[name]))
            label = "QuEST: activations too, from scratch" if name == "QuEST" else name
            ax.errorbar(x, y, std, label=label, color=color, marker=marker, ms=5, lw=1.3,
                        capsize=2.5)
    ax.axhline(0, color="black", lw=0.8, ls=":")
    ax.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    ticks = [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_yticks([], minor=True)
    ax.set_ylim(-0.002, 12)
    ax.set_xlabel("bits a weight, with scales and codebooks")
    ax.set_ylabel("validation loss above the dense model (nats/token)")
    ax.legend(frameon=False, fontsize=8)
    save(fig, path)

def draw_curves(rows, path):
    """Training loss over tokens at 2 bits: dense, QuEST, LSQ, straight-through."""
    fig, (ax,) = axes_of(7.2, 3.8)
    names = {"dense": "dense, 16 bits", "quest": "QuEST, 2 bits", "lsq": "LSQ, 2 bits",
             "ste": "straight-through, 2 bits"}
    for method, name in names.items():
        runs = [r["curve"] for r in rows if r["method"] == method and r.get("curve")
                and r["w_bits"] == r["a_bits"] and r["w_bits"] in (2, 16)]
        if runs:
            mean = [statistics.mean(part) for part in zip(*runs)]
            tokens = rows[0]["tokens"] / 1e6
            ax.plot([tokens * (i + 0.5) / len(mean) for i in range(len(mean))], mean, label=name,
                    color=COLORS.get(method, "black"), lw=1.6 if method == "quest" else 1.1)
    ax.set_ylim(None, ax.get_ylim()[0] + 0.3 * (ax.get_ylim()[1] - ax.get_ylim()[0]))
    ax.set_xlabel("training tokens (millions)")
    ax.set_ylabel("training loss (nats/token)")
    ax.legend(frameon=False)
    save(fig, path)

def draw_quest(table, path):
    """Loss over dense for QuEST and its baselines by bit-width."""
    lines = collections.defaultdict(list)
    for (size, tokens, method, grid, w, a, group), runs, loss, gap in table:
        if size == "tiny" and grid == "uniform" and w == a and w < 16 and gap and method in COLORS:
            lines[method].append((w, *gap))
    fig, (ax,) = axes_of(7.2, 4.2)
    names = {"quest": "QuEST", "trust": "QuEST without Hadamard", "clip": "clipped gradient",
             "lsq": "LSQ, learned step", "ste": "straight-through"}
    for i, (method, name) in enumerate(names.items()):
        if lines[method]:
            bits, gaps, stds = zip(*sorted(lines[method]))
            places = [[1, 1.58, 2, 3, 4, 8].index(b) + 0.07 * (i - 2) for b in bits]
            ax.errorbar(places, gaps, stds, label=name, color=COLORS[method], marker="o", ms=4,
                        lw=1.4 if method == "quest" else 1.0, capsize=2.5)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks(range(6), ["1", "1.58", "2", "3", "4", "8"])
    ax.set_xlabel("bits of weights and activations")
    ax.set_ylabel("validation loss above the dense model (nats/token)")
    ax.grid(axis="x", visible=False)
    ax.legend(frameon=False)
    save(fig, path)

def draw_memory(rows, path):
    """Where the memory of a 7B training step goes, by component, blocks computed again."""
    parts = {"frozen weights": "#0b6e4f", "adapters": "#3a86c8", "gradients": "#e69f00",
             "optimizer": "#d1495b", "activations": "#8d6cab", "temporaries": "#999999"}
    rows = [r for r in rows if r["part"] == "memory" and r["lean"]]
    names = [f"{r['arm']}, phi {r['phi']}" if r["arm"] == "LR-QAT" else
             "dense training" if r["arm"].startswith("dense") else r["arm"] for r in rows]
    fig, (ax,) = axes_of(7.2, 3.0)
    left = [0.0] * len(rows)
    for part, color in parts.items():
        sizes = [r[part] / 2**30 for r in rows]
        ax.barh(names, sizes, left=left, color=color, height=0.7,
                label="weights that train" if part == "adapters" else part)
        left = [a + b for a, b in zip(left, sizes)]
    for name, end, row in zip(names, left, rows):
        ax.text(end + 0.5, name, f"{row['peak'] / 2**30:.1f}", va="center", fontsize=8)
    ax.axvline(8, color="black", lw=0.8, ls=":")
    ax.invert_yaxis()
    ax.set_xlim(0, 60)
    ax.set_xlabel("GiB at the peak of a step, 1 x 1024 tokens; dotted: a card of 8 GB")
    ax.grid(visible=False)
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    save(fig, path)

def main():
    rows = []
    for path in sys.argv[1:] or [HERE / "results.jsonl"]:
        rows += read_rows(path)
    rows = [r for r in rows if r.get("val_loss") is not None]      # else bytes and speed alone
    bases = {r["params"] for r in rows if "arms" in r}
    table = summarize([r for r in rows if r["params"] not in bases])
    if table:
        print_table(table)
    for params in sorted(bases):
        print_methods(methods([r for r in rows if r["params"] == params]))
    if sys.argv[1:]:
        return
    law, kernels, pv, lr = (read_rows(HERE / f"{name}.jsonl")
                            for name in ("law", "kernels", "pvtune", "lrqat"))
    print_law(law)
    print_tweaks(read_rows(HERE / "normtweak.jsonl"))
    print_lrqat(lr)
    print_pv(pv)
    big = [r for r in rows if r["params"] in bases]
    try:
        from time_kernels import plot                  # as `tests/time_kernels.py --plot` draws it
        draw_methods(methods(big), HERE / "methods.png")
        draw_curves([r for r in big if "arms" not in r], HERE / "curves.png")
        draw_quest(table, HERE / "quest.png")
        plot(kernels, HERE / "kernels.png")
        draw_memory(lr, HERE / "memory.png")
    except ModuleNotFoundError as e:
        print(f"{e.name} is not installed (pip install -e '.[plot]'): not all figures drawn")

if __name__ == "__main__":
    run(main)
