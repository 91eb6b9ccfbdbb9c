"""Draw assets/schematic.png: one linear layer, as each of the four methods sees it.

    python assets/schematic.py

Two things are marked. A filled box holds few bits; an empty one holds floats. A thick orange
border trains; a thin one is frozen, or only computed. Needs matplotlib.
"""
import pathlib

from figures import DARK, save

FEW_BITS, FLOATS = "#bcd6ef", "white"
TRAINS, FROZEN = "#d2691e", "#666666"
WIDTH, HEIGHT = 100, 35                # of a panel, in units of its own

def box(ax, x, y, text, few_bits=False, trains=False, width=16, height=7):
    """A value: text in a box with its center at (x, y)."""
    from matplotlib.patches import FancyBboxPatch
    ax.add_patch(FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=1.2",
        facecolor=FEW_BITS if few_bits else FLOATS, edgecolor=TRAINS if trains else FROZEN,
        linewidth=2.6 if trains else 0.9))
    ax.text(x, y - 0.2, text, ha="center", va="center", fontsize=9.5)

def step(ax, x, y, text):
    """An operation: text in a small grey circle or pill."""
    ax.text(x, y, text, ha="center", va="center", fontsize=9.5, style="italic", color="black",
            bbox={"boxstyle": "round,pad=0.25,rounding_size=0.6", "fc": "#e9e9e9", "ec": "none"})

def arrow(ax, start, end):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK, "lw": 1.1,
                                            "shrinkA": 0, "shrinkB": 0})

def panel(ax, title, text):
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(0, HEIGHT)
    ax.axis("off")
    ax.text(0, HEIGHT - 0.5, title, fontsize=12, weight="bold", va="top")
    ax.text(0, HEIGHT - 6.2, text, fontsize=9.2, color=DARK, va="top", linespacing=1.25)

# In every panel x goes along the upper line and W along the lower one. They meet in the product.
X, W, PRODUCT = 16.8, 4.6, 85

def product(ax, x_from, w_from):
    """The product of what comes along the two lines, and the output y."""
    step(ax, PRODUCT, X, "×")
    arrow(ax, (x_from, X), (PRODUCT - 3, X))
    ax.plot([w_from, PRODUCT], [W, W], color=DARK, lw=1.1)
    arrow(ax, (PRODUCT, W), (PRODUCT, X - 3.2))
    arrow(ax, (PRODUCT + 3.2, X), (PRODUCT + 8, X))
    ax.text(PRODUCT + 9.5, X, "y", fontsize=10, va="center")

def quest(ax):
    panel(ax, "QuEST", "From scratch: in every step rotate both factors (H)\n"
          "and round them. The codes of W are kept.")
    for y, name in ((X, "x"), (W, "W")):
        box(ax, 7, y, name, trains=name == "W", width=11)
        arrow(ax, (12.8, y), (19.4, y))
        step(ax, 22.5, y, "H")
        arrow(ax, (25.6, y), (33, y))
        step(ax, 40, y, "round")
        arrow(ax, (47, y), (54, y))
        box(ax, 64, y, f"codes of {name}", few_bits=True, width=20)
    product(ax, 74.3, 74.3)

def lr_qat(ax):
    panel(ax, "LR-QAT", "Freeze a trained W in few bits. Train a small product\n"
          "A·B inside the rounding. Codes and scale are kept.")
    box(ax, 7, X, "x", width=11)
    box(ax, 7, W, "W", few_bits=True, width=11)
    step(ax, 16.6, W, "+")
    box(ax, 24, W, "A", trains=True, width=7)
    box(ax, 32, W, "B", trains=True, width=7)
    arrow(ax, (35.9, W), (39.2, W))
    step(ax, 46, W, "round")
    arrow(ax, (52.8, W), (56, W))
    box(ax, 62.5, W, "codes", few_bits=True, width=12.5)
    box(ax, 75.7, W, "scale", trains=True, width=11.5)
    product(ax, 12.8, 81.8)

def pv_tuning(ax):
    panel(ax, "PV-Tuning", "Store a trained W as codes into small codebooks.\n"
          "Train the codebooks; a few codes move in each step.")
    box(ax, 7, X, "x", width=11)
    box(ax, 8.5, W, "codes", few_bits=True, trains=True, width=14)
    box(ax, 27, W, "codebooks", trains=True, width=20)
    box(ax, 45, W, "scales", trains=True, width=13)
    arrow(ax, (51.9, W), (56.2, W))
    step(ax, 67, W, "look up, add")
    product(ax, 12.8, 77.6)

def norm_tweaking(ax):
    panel(ax, "Norm Tweaking", "The codes stay. Train only the norm before them, until\n"
          "the block's output has its old means and variances.")
    box(ax, 7, X, "x", width=11)
    arrow(ax, (12.8, X), (32, X))
    box(ax, 41, X, "norm", trains=True, width=18)
    box(ax, 55.5, W, "codes of W", few_bits=True, width=20)
    box(ax, 72.5, W, "scale", width=12)
    product(ax, 50.4, 78.7)

def legend(ax):
    """What the two marks mean, below the panels."""
    ax.set_xlim(0, 2 * WIDTH)
    ax.set_ylim(0, 6)
    ax.axis("off")
    marks = (("few bits", True, False), ("floats", False, False), ("trains", False, True),
             ("few bits, and trains", True, True))
    x = 5
    for text, few_bits, trains in marks:
        box(ax, x, 3, "", few_bits, trains, width=8, height=4)
        ax.text(x + 6, 2.9, text, fontsize=9.5, va="center")
        x += 12 + 2.6 * len(text)

def main():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 2, figsize=(8.3, 4.5))
    for ax, draw in zip(axes.flat, (quest, lr_qat, pv_tuning, norm_tweaking)):
        draw(ax)
    fig.subplots_adjust(left=0.02, right=0.995, top=0.98, bottom=0.11, wspace=0.06, hspace=0.16)
    legend(fig.add_axes((0.02, 0.0, 0.975, 0.08)))
    save(fig, pathlib.Path(__file__).parent / "schematic.png")

if __name__ == "__main__":
    main()
