"""The tables and the figures of the README from result rows.

    python assets/report.py                        # the committed rows: tables and figures
    python assets/report.py out/results.jsonl      # the rows of your own runs

Every script appends one JSON line a run to OUT/results.jsonl. Here the runs that differ by nothing
but the seed become one line: mean and standard deviation over seeds, and the paired difference to
the dense runs of the same seeds, size and tokens. normtweak.jsonl holds one line for each quantized
model, without and with the tweak; its table pairs them by calibration seed. lrqat.jsonl: one line
an arm, rate and seed, the arm's rate chosen by the mean loss on the dev split. pvtune.jsonl: one
line an arm, also those of the search for rates on the dev split. The figures need matplotlib.
"""
import collections
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
COLORS = {"quest": "#0b6e4f", "trust": "#3a86c8", "clip": "#8d6cab", "lsq": "#d1495b",
          "ste": "#e69f00"}

def read_rows(paths):
    lines = (line for path in paths for line in pathlib.Path(path).read_text().splitlines())
    return [json.loads(line) for line in lines if line.strip()]

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

def print_tweaks(rows):
    """Loss without and with the tweak, and the difference, paired by calibration seed."""
    same = ("w_bits", "a_bits", "host", "symmetric", "calib", "windows")   # of the plain model
    plain = {(*(r[k] for k in same), r["seed"]): r["val_loss"] for r in rows if not r["tweak"]}
    pairs = collections.defaultdict(list)
    for r in rows:
        host = tuple(r[k] for k in same)
        before = plain.get((*host, r["seed"]), plain.get((*host, 0)))      # RTN has one seed
        if r["tweak"] and before is not None:
            pairs[(*host, r["solver"], r["loss"], r["lr"], r["passes"])].append(
                (before, r["val_loss"]))
    print("\n| W bits | A bits | host | grid | calibration | solver | loss | lr | passes | seeds | "
          "without | with | difference |")
    print("|---" * 13 + "|")
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

def draw_quest(table, path):
    """Loss over dense for QuEST and its baselines by bit-width."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = collections.defaultdict(list)
    for (size, tokens, method, grid, w, a, group), runs, loss, gap in table:
        if size == "tiny" and grid == "uniform" and w == a and w < 16 and gap and method in COLORS:
            lines[method].append((w, *gap))
    fig, ax = plt.subplots(figsize=(7.2, 4.2), dpi=160)
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
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path)
    print(f"drawn: {path}")

def draw_memory(rows, path):
    """Where the memory of a 7B training step goes, by component, blocks computed again."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    parts = {"frozen weights": "#0b6e4f", "adapters": "#3a86c8", "gradients": "#e69f00",
             "optimizer": "#d1495b", "activations": "#8d6cab", "temporaries": "#999999"}
    rows = [r for r in rows if r["part"] == "memory" and r["lean"]]
    names = [f"{r['arm']}, phi {r['phi']}" if r["arm"] == "LR-QAT" else
             "dense training" if r["arm"].startswith("dense") else r["arm"] for r in rows]
    fig, ax = plt.subplots(figsize=(7.2, 3.0), dpi=160)
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
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    fig.tight_layout()
    fig.savefig(path)
    print(f"drawn: {path}")

def main():
    paths = sys.argv[1:] or [HERE / "results.jsonl"]
    missing = [p for p in paths if not pathlib.Path(p).exists()]
    if missing:
        print(f"error: no such file: {missing[0]}; give a results.jsonl", file=sys.stderr)
        raise SystemExit(2)
    table = summarize(read_rows(paths))
    print_table(table)
    if not sys.argv[1:]:
        print_tweaks(read_rows([HERE / "normtweak.jsonl"]))
        print_lrqat(read_rows([HERE / "lrqat.jsonl"]))
        print_pv(read_rows([HERE / "pvtune.jsonl"]))
        try:
            draw_quest(table, HERE / "quest.png")
            draw_memory(read_rows([HERE / "lrqat.jsonl"]), HERE / "memory.png")
        except ModuleNotFoundError:
            print("matplotlib is not installed (pip install -e '.[plot]'): no figures drawn")

if __name__ == "__main__":
    main()
