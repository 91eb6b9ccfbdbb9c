"""The figures of the README and of docs/, from the numbers that assets/report.py found.

    python assets/report.py            # draws all of them, into assets/

Every figure is 830 pixels wide on a page. It says its message in its title, names its lines at an
end, and keeps grey what other kernels and plain rounding do. The background is white, so that a
figure reads the same on a dark page. Needs matplotlib.
"""
import collections
import math
import statistics
from typing import NamedTuple

# The four methods, each in one color wherever it has a line.
QUEST, LR_QAT, PV, TWEAK = "#0b6e4f", "#2f6fb5", "#c8323f", "#d98200"
LIGHT, DARK = "#b5b5b5", "#4d4d4d"

WIDTH = 8.3                            # inches; at 160 dots per inch and half of that on a page

def mean_std(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

def known(runs, field):
    """The values of a field, of the runs that have one."""
    return [run[field] for run in runs if run.get(field) is not None]

def axes_of(height, title, subtitle=""):
    """matplotlib's figure and axes, with a title above that starts at the left edge."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(WIDTH, height))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    fig.text(0.015, 1 - 0.10 / height, title, fontsize=12.5, weight="bold", va="top")
    fig.text(0.015, 1 - 0.37 / height, subtitle, fontsize=9.5, color=DARK, va="top")
    return fig, ax

def save(fig, path):
    fig.savefig(path, dpi=160, facecolor="white")
    print(f"drawn: {path}")

def apart(heights, gap):
    """Positions near the given heights, in their order, that are at least gap from each other."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places = [heights[i] for i in order]

    # Whatever stands too close moves apart by halves, until nothing does.
    for _ in range(200):
        for i in range(1, len(places)):
            short = gap - (places[i] - places[i - 1])
            if short > 0:
                places[i - 1] -= short / 2
                places[i] += short / 2
    return [place for _, place in sorted(zip(order, places))]

def label_ends(ax, ends, x, gap):
    """Write labels at x, each with a thin line to its end. ends: (x, y, label, color) on a
    logarithmic y axis; gap: how far labels keep apart, in decades."""
    places = apart([math.log10(y) for _, y, _, _ in ends], gap)
    for (end, y, label, color), place in zip(ends, places):
        ax.plot([end, x - 0.02], [y, 10 ** place], color=color, lw=0.6, alpha=0.6, clip_on=False)
        ax.annotate(label, (x, 10 ** place), color=color, fontsize=9.5, va="center",
                    annotation_clip=False)

class Line(NamedTuple):
    """How a method looks."""
    label: str
    color: str
    marker: str = "o"
    thin: bool = False                 # a baseline

    @property
    def width(self):
        return 1.0 if self.thin else 2.0

# By the names that `methods` of report.py gives; QuEST's, which says its bits, is cut short.
METHODS = {
    "RTN": Line("round to nearest", "#a2a2a2", "s", thin=True),
    "GPTQ": Line("GPTQ", "#777777", "s", thin=True),
    "full QAT": Line("full QAT (LSQ)", DARK, "s", thin=True),
    "GPTQ + tweak": Line("Norm Tweaking on GPTQ", TWEAK, "x"),
    "QuEST": Line("QuEST: activations too", QUEST, "v"),
    "LR-QAT": Line("LR-QAT", LR_QAT),
    "PV, affine grid": Line("PV-Tuning, grid", "#e2808a", "^"),
    "codebooks, PV": Line("PV-Tuning, codebooks", PV, "D"),
}
FLOOR = 0.001                          # nats; what is lower is drawn here, as an open marker

MEASURES = {
    "gap": ("nats lost", "Validation loss above the 16-bit model"),
    "kl": ("nats away", "KL divergence of the predictions from the 16-bit model's"),
}
MOST_BITS = 4                          # more are not drawn: there the methods hardly differ

def draw_methods(found, path, model, measure="gap"):
    """Draw how far each method is from the dense model against bits per weight, a line for each.

    found: what report.methods returns; model: what the subtitle says of the model; measure: "gap",
    the difference of the losses, or "kl", the divergence of the predictions.
    """
    unit, what = MEASURES[measure]

    # Points of each line: bits per weight and the mean distance.
    points = collections.defaultdict(list)
    for (bits, name, _), runs in found.items():
        name = "QuEST" if name.startswith(f"QuEST W{bits:g}A{bits:g}") else name
        gaps = known(runs, measure)
        if name in METHODS and gaps and bits <= MOST_BITS:
            points[name].append((statistics.mean(r["bpw"] for r in runs), statistics.mean(gaps)))
    at_2 = [gap for name in points for bpw, gap in points[name] if 1.9 < bpw < 2.7]

    fig, ax = axes_of(5.0, "At 2 bits the choice of method decides: "
                      f"{min(at_2):.2f} to {max(at_2):.2f} {unit}",
                      f"{what}, {model}. Lower and further left is better.")
    ends = []
    for name, line in METHODS.items():
        if name not in points:
            continue
        bpw, gaps = zip(*sorted(points[name]))
        drawn = [max(gap, FLOOR) for gap in gaps]
        ax.plot(bpw, drawn, color=line.color, lw=line.width, marker=line.marker, ms=5,
                zorder=2 if line.thin else 3)

        # An open marker: below FLOOR, where a logarithmic axis cannot show it.
        for x, gap in zip(bpw, gaps):
            if gap < FLOOR:
                ax.plot(x, FLOOR, marker=line.marker, ms=7, mfc="white", mec=line.color, zorder=4)
        ends.append((bpw[-1], drawn[-1], line.label, line.color))
    label_ends(ax, ends, 4.5, 0.155)
    equal_loss(ax, points)

    # The axes: the lowest decade and 1 bit only where something is there.
    everything = [point for line in points.values() for point in line]
    ticks = [0.001, 0.01, 0.1, 1, 10]
    labels = ["0.001\nor less", *(f"{t:g}" for t in ticks[1:])]
    if min(gap for _, gap in everything) > 0.01:
        del ticks[0], labels[0]
    ax.set_yscale("log")
    ax.set_ylim(0.8 * ticks[0], 12)
    ax.set_yticks(ticks, labels)
    least = 1 if min(bpw for bpw, _ in everything) < 1.9 else 2
    ax.set_xlim(least - 0.05, 4.42)
    ax.set_xticks(range(least, 5))
    ax.set_xlabel("bits per weight, with scales and codebooks")
    ax.set_ylabel("nats per token")
    fig.subplots_adjust(left=0.105, right=0.745, top=0.875, bottom=0.105)
    save(fig, path)

def equal_loss(ax, points):
    """Mark where codebooks after PV-Tuning lose what GPTQ does with twice their bits."""
    tuned = sorted(points["codebooks, PV"])[:1]
    gptq = [p for p in points["GPTQ"] if 1.9 < p[0] < 2.7]
    if not (tuned and gptq) or tuned[0][0] > 1.5 or abs(tuned[0][1] / gptq[0][1] - 1) > 0.1:
        return
    (x1, y), (x2, _) = tuned[0], gptq[0]
    ax.annotate("", (x1 + 0.06, y), (x2 - 0.06, y),
                arrowprops={"arrowstyle": "<->", "color": DARK, "lw": 1.0, "ls": ":"})
    text = f"dotted: PV-Tuning at {x1:.2f} bits\nloses what GPTQ loses at {x2:.2f}"
    ax.annotate(text, (1.0, 0.02), fontsize=9.5, color=DARK)

CARD = 8                               # GiB on a card of 8 GB

def draw_memory(rows, path):
    """Draw where the memory of a 7B training step goes, a bar for each method."""
    parts = {"frozen weights": QUEST, "adapters": LR_QAT, "gradients": TWEAK, "optimizer": PV,
             "activations": "#8d6cab", "temporaries": LIGHT}
    labels = {"adapters": "weights that train", "optimizer": "optimizer's moments"}
    stored = {"packed": "4-bit", "fixed": "8-bit", "bf16": "bfloat16", "fp32": "float32"}

    # Runs that keep no activations of a block, in the order of the bars.
    rows = [r for r in rows if r["method"] == "lrqat-random" and r["size"] == "7B" and r["lean"]]
    bars = {f"LR-QAT, {stored[r['phi']]} weights": r["results"]["LR-QAT"]
            for r in rows if r["results"].get("LR-QAT")}
    for row in rows:
        for arm, name in (("full QAT (LSQ)", "full QAT"), ("dense, longer", "16-bit training")):
            if row["results"].get(arm):
                bars[name] = row["results"][arm]

    least = min(found["peak"] for found in bars.values()) / 2**30
    fig, ax = axes_of(3.5, f"A 7B training step in {least:.1f} GiB fits an 8 GB card",
                      "Peak memory of one training step, 1 x 1,024 tokens, one H100")
    left = [0.0] * len(bars)
    for part, color in parts.items():
        sizes = [found[part] / 2**30 for found in bars.values()]
        label = labels.get(part, part)
        ax.barh(list(bars), sizes, left=left, color=color, height=0.68, label=label)
        left = [a + b for a, b in zip(left, sizes)]

    # The card: a label that would lie on its line stands behind it.
    ax.axvline(CARD, color="black", lw=1.0, ls="--", zorder=0)
    ax.annotate("8 GB card", (CARD, -0.62), xytext=(4, 0), textcoords="offset points", fontsize=9.5,
                va="center", annotation_clip=False)
    for (name, found), end in zip(bars.items(), left):
        x = CARD if CARD - 4 < end < CARD else end
        ax.text(x + 0.6, name, f"{found['peak'] / 2**30:.1f}", va="center", fontsize=9.5,
                weight="bold")
    ax.invert_yaxis()
    ax.set_xlim(0, 60)
    ax.set_xlabel("GiB")
    ax.grid(visible=False)
    ax.legend(frameon=False, fontsize=9.5, loc="upper right")
    fig.subplots_adjust(left=0.235, right=0.985, top=0.80, bottom=0.135)
    save(fig, path)

# Products in the figure: (kernel, bits) -> how they look.
PRODUCTS = {
    ("lowbit_matmul", 2): Line("ours, 2 bits", LR_QAT),
    ("lowbit_matmul", 4): Line("ours, 4 bits", PV),
    ("quest_linear", 4): Line("ours, QuEST W4A4", QUEST),
    ("humming", 2): Line("humming, 2 bits", "#777777", "s", thin=True),
    ("humming", 4): Line("humming, 4 bits", "#a2a2a2", "s", thin=True),
    ("tinygemm", 4): Line("tinygemm, 4 bits", DARK, "x", thin=True),
    ("gemlite", 4): Line("gemlite, 4 bits", LIGHT, "^", thin=True),
}
TOKEN_TICKS = (1, 4, 16, 64, 256, 1024, 4096)

def draw_kernels(rows, path):
    """Draw the speed-up over cuBLAS against the number of tokens, ours and the peers', of the rows'
    first shape."""
    shape = rows[0]["shape"]
    speeds = collections.defaultdict(dict)
    for row in rows:
        if row["shape"] == shape:
            speeds[row["kernel"], row["bits"]][row["batch"]] = row["cublas"]

    O, C = shape.split("x")
    two_bits = speeds["lowbit_matmul", 2]
    lost = min((tokens for tokens, speed in two_bits.items() if speed < 1), default=None)
    fig, ax = axes_of(4.6, f"2-bit weights: {two_bits[1]:.1f} times as fast as cuBLAS at one token"
                      + (f", slower first at {lost}" if lost else ""),
                      f"Speed-up over cuBLAS in bfloat16, {O} outputs x {C} inputs, one H100")
    starts = []
    for product, line in PRODUCTS.items():
        if product in speeds:
            tokens, speed = zip(*sorted(speeds[product].items()))
            ax.plot(tokens, speed, color=line.color, lw=line.width, marker=line.marker, ms=3.5,
                    zorder=2 if line.thin else 3)
            starts.append((speed[0], line))

    # Labels at the lines' first points: there the lines are farthest apart.
    places = apart([speed for speed, _ in starts], 0.19)
    for (speed, line), place in zip(starts, places):
        ax.annotate(line.label, (1, place), xytext=(-8, 0), textcoords="offset points", ha="right",
                    va="center", color=line.color, fontsize=9.5, annotation_clip=False)

    ax.axhline(1, color=DARK, lw=1.0, ls="--", zorder=0)
    ax.annotate("cuBLAS", (4096, 1), xytext=(0, 4), textcoords="offset points", ha="right",
                color=DARK, fontsize=9.5)
    ax.set_xscale("log", base=2)
    ax.set_xticks(TOKEN_TICKS, [f"{n:,}" for n in TOKEN_TICKS])
    ax.minorticks_off()
    ax.set_xlim(0.9, 4600)
    ax.set_ylim(0, None)
    ax.set_yticks(range(5), [f"{n}x" for n in range(5)])
    ax.yaxis.tick_right()
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("tokens at once")
    fig.subplots_adjust(left=0.215, right=0.955, top=0.86, bottom=0.105)
    save(fig, path)

# QuEST and its baselines: each label starts with what is different from QuEST.
BASELINES = {
    "quest": Line("QuEST", QUEST),
    "lsq": Line("LSQ: learned step", DARK, "s", thin=True),
    "trust": Line("no rotation", LR_QAT, thin=True),
    "clip": Line("no rotation, mask ends\nat the grid", "#8d6cab", thin=True),
    "ste": Line("no rotation, no mask\n(straight-through)", TWEAK, thin=True),
}

def draw_quest(table, path):
    """Draw QuEST's loss above dense and its baselines', by bit-width. table: of `summarize`."""
    points = collections.defaultdict(list)             # (bits, mean, deviation)
    for s, _, _, gaps in table:                        # s: the setting
        drawn = (s.size, s.grid) == ("tiny", "uniform") and s.w_bits == s.a_bits < 16
        if drawn and gaps and s.method in BASELINES:
            points[s.method].append((s.w_bits, *mean_std(gaps)))

    fig, ax = axes_of(4.4, "Without rotation and mask, rounding costs three times as much",
                      "Validation loss above dense, 3M parameters, 0.82M tokens; mean and "
                      "deviation of three seeds")
    places = [1, 1.58, 2, 3, 4, 8]
    ends = []
    for method, line in BASELINES.items():
        bits, gaps, stds = zip(*sorted(points[method]))
        x = [-places.index(b) for b in bits]
        ax.errorbar(x, gaps, stds, color=line.color, marker=line.marker, ms=4.5, lw=line.width,
                    elinewidth=0.8, capsize=2.5, alpha=0.95, zorder=3 if method == "quest" else 2)
        ends.append((x[0], gaps[0], line.label, line.color))
    label_ends(ax, ends, 0.25, 0.27)

    ax.set_yscale("log")
    ax.set_ylim(0.004, 1.3)
    ax.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    ax.set_xlim(-5.3, 0.12)
    ax.set_xticks([-i for i in range(6)], ["1", "1.58", "2", "3", "4", "8"])
    ax.set_xlabel("bits of weights and of activations")
    ax.set_ylabel("nats per token above dense")
    fig.subplots_adjust(left=0.09, right=0.765, top=0.855, bottom=0.115)
    save(fig, path)

CURVES = {"quest": Line("QuEST", QUEST), "lsq": Line("LSQ", DARK, thin=True),
          "ste": Line("straight-through", TWEAK, thin=True)}

def draw_curves(rows, path):
    """Draw the training loss at 2 bits above that of dense training, over tokens."""
    def mean_curve(method, bits):
        curves = [r["curve"] for r in rows if r["method"] == method and r.get("curve")
                  and r["w_bits"] == r["a_bits"] == bits]
        return [statistics.mean(part) for part in zip(*curves)]

    fig, ax = axes_of(3.8, "QuEST and LSQ come back to the dense curve, straight-through does not",
                      "Training loss above dense at the same token, 2-bit weights and activations, "
                      "30M parameters, from scratch")
    dense = mean_curve("dense", 16)
    tokens = rows[0]["tokens"] / 1e6
    x = [tokens * (i + 0.5) / len(dense) for i in range(len(dense))]
    heights = []
    for method in CURVES:
        gaps = [a - b for a, b in zip(mean_curve(method, 2), dense)]
        ax.plot(x, gaps, color=CURVES[method].color, lw=CURVES[method].width)
        heights.append(gaps[-1])

    # Labels with the last values, at the right.
    for method, y, place in zip(CURVES, heights, apart(heights, 0.06)):
        line = CURVES[method]
        ax.annotate(f"{line.label}  +{y:.2f}", (x[-1], place), xytext=(8, 0), fontsize=9.5,
                    textcoords="offset points", va="center", color=line.color,
                    annotation_clip=False)
    ax.set_xlim(0, tokens)
    ax.set_ylim(0, 0.8)
    ax.set_xlabel("training tokens (millions)")
    ax.set_ylabel("nats per token above dense")
    fig.subplots_adjust(left=0.085, right=0.78, top=0.83, bottom=0.135)
    save(fig, path)
