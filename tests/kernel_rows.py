"""What the rows of time_kernels.py say: the tables of docs/kernels.md, and what was asked.

    python tests/kernel_rows.py                        # of assets/kernels.jsonl
    python tests/kernel_rows.py rows.jsonl             # of a run of your own

Needs no GPU.
"""
import collections
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nanobit.cli import run
from nanobit.runs import read_rows

SHOWN = (1, 16, 64, 128, 300, 512, 1024, 4096)         # tokens that have a line in the tables
WEIGHTS = {        # columns: (kernel, bits) -> its head
    **{("lowbit_matmul", bits): f"W{bits}" for bits in (1, 2, 3, 4, 8)},
    **{("humming", bits): f"humming W{bits}" for bits in (1, 2, 3, 4, 8)},
    ("gemlite", 4): "gemlite W4",
    ("gemlite", 8): "gemlite W8",
    ("tinygemm", 4): "tinygemm W4",
}
OTHERS = {
    ("quest_linear", 4): "`quest_linear` W4A4",
    ("quest_linear", 8): "`quest_linear` W8A8",
    ("_int_mm", 8): "`_int_mm`, x given in int8",
    ("_scaled_mm", 8): "`_scaled_mm`, x given in fp8",
    ("vq_matmul", 2): "`vq_matmul` 2 × 256 × 8",
    ("plain_matmul", 4): "plain kernel W4",
}
FASTER_OF_TWO = 1.05           # asked of lowbit_matmul: at most so many times the faster of two
MORE_TOKENS = 1.03             # and of every product: so many times what more tokens take
QUEST = 1.1                    # and of W4A4 at 4096 x 4096: its speed-up over cuBLAS, at least
QUEST_TOKENS = (64, 128, 300, 512)

def by_product(rows):
    """{(shape, tokens): {(kernel, bits): row}}; of a product timed twice the last row counts."""
    found = collections.defaultdict(dict)
    for row in rows:
        found[row["shape"], row["batch"]][row["kernel"], row["bits"]] = row
    return found

def print_head(*names):
    """The first two lines of a table, after an empty one."""
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")

def print_line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")

def print_speedups(rows, columns):
    """Speed-ups over cuBLAS: a line a shape and number of tokens, a column for each of `columns`
    that was timed."""
    found = by_product(rows)
    timed = {key for products in found.values() for key in products}
    columns = {key: name for key, name in columns.items() if key in timed}
    print_head("outputs × inputs", "tokens", "cuBLAS", *columns.values())
    for (shape, M), products in found.items():
        if M in SHOWN and ("cuBLAS", 16) in products:
            cells = (f"{products[key]['cublas']:.2f}" if key in products else "–"
                     for key in columns)
            print_line(shape.replace("x", " × "), M, f"{products['cuBLAS', 16]['us']:.1f} us",
                       *cells)

# ---- What was asked, and whether it is so -------------------------------------------------------

def over_the_faster(rows):
    """{(shape, bits): {tokens: time of lowbit_matmul over that of the faster of cuBLAS and humming
    of as many bits}}, up to 1,024 tokens."""
    ratios = collections.defaultdict(dict)
    for (shape, M), products in by_product(rows).items():
        for (kernel, bits), row in products.items():
            if kernel == "lowbit_matmul" and M <= 1024:
                peers = (products.get(key) for key in (("cuBLAS", 16), ("humming", bits)))
                fastest = min(peer["us"] for peer in peers if peer)
                ratios[shape, bits][M] = row["us"] / fastest
    return ratios

def slower_at_fewer(rows):
    """[(shape, kernel, bits, tokens, more tokens, time over that of more tokens)] of our products
    that take MORE_TOKENS times what some larger number of tokens takes."""
    times = collections.defaultdict(dict)
    for (shape, M), products in by_product(rows).items():
        for (kernel, bits), row in products.items():
            if kernel in ("lowbit_matmul", "quest_linear"):
                times[shape, kernel, bits][M] = row["us"]
    found = []
    for key, us in times.items():
        for M in sorted(us):
            more = [other for other in us if other > M]
            if more:
                best = min(more, key=us.get)
                if us[M] > MORE_TOKENS * us[best]:
                    found.append((*key, M, best, us[M] / us[best]))
    return found

def print_asked(rows):
    print(f"\nlowbit_matmul up to 1,024 tokens, over the faster of humming and cuBLAS; asked: at "
          f"most {FASTER_OF_TWO}")
    print_head("outputs × inputs", "bits", "as asked at", "missed at (tokens: ratio)")
    for (shape, bits), ratios in over_the_faster(rows).items():
        missed = [f"{M}: {ratio:.2f}" for M, ratio in sorted(ratios.items())
                  if ratio > FASTER_OF_TWO]
        print_line(shape.replace("x", " × "), bits,
                   f"{len(ratios) - len(missed)} of {len(ratios)}", ", ".join(missed) or "–")

    print(f"\nSlower at fewer tokens than at more, by over {MORE_TOKENS - 1:.0%}; asked: never")
    print_head("outputs × inputs", "product", "bits", "tokens", "more tokens", "ratio")
    for shape, kernel, bits, M, more, ratio in slower_at_fewer(rows):
        print_line(shape.replace("x", " × "), kernel, bits, M, more, f"{ratio:.2f}")
    if not slower_at_fewer(rows):
        print_line("none", *5 * [""])

    found = by_product(rows)
    speeds = {M: found["4096x4096", M]["quest_linear", 4]["cublas"] for M in QUEST_TOKENS
              if ("quest_linear", 4) in found.get(("4096x4096", M), {})}
    print(f"\nquest_linear W4A4, 4096 × 4096, speed-up over cuBLAS; asked: at least {QUEST}")
    print_head(*(f"{M} tokens" for M in speeds))
    print_line(*(f"{speed:.2f}" for speed in speeds.values()))

def main():
    rows = read_rows(sys.argv[1] if sys.argv[1:] else ROOT / "assets" / "kernels.jsonl")
    print_speedups(rows, WEIGHTS)
    print_speedups(rows, OTHERS)
    print_asked(rows)

if __name__ == "__main__":
    run(main)
