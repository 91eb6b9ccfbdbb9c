"""The tables and the figures of the README and of docs/ from result rows.

    python assets/report.py                        # the committed rows: tables and figures
    python assets/report.py out/results.jsonl      # the rows of your own runs

Every script appends one JSON line a run to OUT/results.jsonl. Here the runs that differ by nothing
but the seed become one line: mean and standard deviation over seeds, and the paired difference to
the dense runs of the same seeds, size and tokens. Runs that compare several arms on one base hold
them under "arms": with the runs from scratch of the same size they become one table of methods,
and a short one, with a column for each number of bits.
normtweak.jsonl, lrqat.jsonl and pvtune.jsonl hold such runs on the tiny base, also those that
searched for rates on the dev split; lrqat.jsonl also what `tests/time_lrqat_memory.py` wrote.
law.jsonl: the runs of the scaling law, which assets/law.py fits; kernels.jsonl: what
`tests/time_kernels.py --out` wrote, whose tables tests/kernel_rows.py prints. Two fields of
committed rows were written by hand: hardware and note. The figures, which assets/figures.py draws,
need matplotlib.
"""
import collections
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]
import figures
from nanobit.cli import run                            # as the scripts end and write
from nanobit.runs import read_rows
from kernel_rows import (OTHERS, WEIGHTS, plot, print_asked, print_head, print_line,
                         print_speedups)

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
        ("lrqat", "dense, longer"): "dense, longer",
        ("pvtune", "as fitted"): "codebooks, as fitted", ("pvtune", "P only"): "codebooks, P only",
        ("pvtune", "STE"): "codebooks, STE", ("pvtune", "PV"): "codebooks, PV",
        ("pvtune-affine", "P only"): "P only, affine grid",
        ("pvtune-affine", "STE"): "STE, affine grid", ("pvtune-affine", "PV"): "PV, affine grid"}
SCRATCH = {"dense": "dense", "quest": "QuEST", "lsq": "LSQ", "ste": "straight-through",
           "clip": "clipped gradient", "trust": "QuEST without Hadamard"}

def methods(rows):
    """{(bits, method): one dict a seed}, of runs on one base and runs from scratch of its size."""
    dense = {r["seed"]: r["val_loss"] for r in rows if r["method"] == "dense"}
    found = collections.defaultdict(dict)
    for r in rows:
        if "arms" not in r:
            base = r.get("base_val_loss")              # of the --model that it began with
            name = SCRATCH.get(r["method"], r["method"])
            if r["method"] != "dense":
                start = "from scratch" if base is None else "from the dense model"
                name += f" W{r['w_bits']}A{r['a_bits']}, {start}"
            keep = {k: r[k] for k in ("val_loss", "bits_per_byte", "bpw", "seconds", "peak_bytes")}
            keep |= {k: r.get(k) for k in ("kl", "same_top")}
            control = dense.get(r["seed"]) if base is None else base
            gap = None if control is None else r["val_loss"] - control
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
    """Print a line for each of the methods. Where a row has the distance from the dense model, so
    has the table: KL divergence in nats per token, and how often both have the same top token."""
    has_distance = any(r.get("kl") is not None for runs in found.values() for r in runs)
    distance = ("KL", "same top") if has_distance else ()
    print_head("bits", "method", "bits/weight", "seeds", "val loss", "minus dense", *distance,
               "bits/byte", "seconds", "peak GiB")
    order = lambda item: (-item[0][0], statistics.mean(r["val_loss"] for r in item[1]))
    for (bits, name), runs in sorted(found.items(), key=order):
        # The dense model's distance from itself says nothing.
        gaps = [r["gap"] for r in runs if r["gap"] is not None] if name != "dense" else []
        far = ()
        if has_distance:
            kl, same = ([r[k] for r in runs if r.get(k) is not None] for k in ("kl", "same_top"))
            far = (f"{statistics.mean(kl):.4f}" if kl else "",
                   f"{statistics.mean(same):.1f} %" if same else "")
        average = {k: statistics.mean(r[k] for r in runs)
                   for k in ("bpw", "bits_per_byte", "seconds")}
        peak = max(r["peak_bytes"] or 0 for r in runs) / 2**30
        print_line(bits, name, f"{average['bpw']:.2f}", len(runs),
                   with_std([r["val_loss"] for r in runs]), with_std(gaps, "+") if gaps else "",
                   *far, f"{average['bits_per_byte']:.4f}", f"{average['seconds']:.0f}",
                   f"{peak:.1f}" if peak else "")

# The short table: a line's label, what trains in it, and its name among the methods. QuEST's name
# has bits of its own in every column.
SHORT = (("round to nearest (RTN)", "nothing", "RTN"),
         ("GPTQ", "nothing", "GPTQ"),
         ("GPTQ + Norm Tweaking", "norms", "GPTQ + tweak"),
         ("LR-QAT", "low-rank adapters, scales", "LR-QAT"),
         ("full QAT (LSQ)", "all weights of the linears, scales", "full QAT"),
         ("PV-Tuning, plain grid", "codes, scales, norms, embedding, head", "PV, affine grid"),
         ("PV-Tuning, codebooks", "codes, codebooks, scales, norms, embedding, head",
          "codebooks, PV"),
         ("QuEST: activations too", "everything", "QuEST W{0}A{0}, from the dense model"),
         ("QuEST, from scratch: activations too", "everything", "QuEST W{0}A{0}, from scratch"))

def print_short(found):
    """Print methods as lines and bits as columns: the loss above dense in nats per token, and in
    brackets the KL divergence from the dense model where the rows have one."""
    widths = sorted({bits for bits, _ in found if bits < 16}, reverse=True)
    kl = " (KL)" if any(r.get("kl") is not None for runs in found.values() for r in runs) else ""
    print_head("method", "what trains", *(f"{bits:g} bit{'s' * (bits > 1)}{kl}" for bits in widths))
    for label, trains, name in SHORT:
        cells = [short_cell(found.get((bits, name.format(bits)), [])) for bits in widths]
        if any(cells):
            print_line(label, trains, *(cell or "–" for cell in cells))

def short_cell(runs):
    gaps = [r["gap"] for r in runs if r["gap"] is not None]
    if not gaps:
        return ""
    cell = f"{round(statistics.mean(gaps), 3) + 0:.3f}"                # + 0: no minus before 0
    kls = [r["kl"] for r in runs if r.get("kl") is not None]
    return f"{cell} ({statistics.mean(kls):.3f})" if kls else cell

def print_law(rows):
    """Losses of the scaling law's runs: a line a size and token count, a column a precision."""
    cells = {(r["linear_params"], r["tokens"], r["w_bits"]): r["val_loss"] for r in rows}
    bits = sorted({key[2] for key in cells}, reverse=True)
    names = ["dense" if b == 16 else f"W{b}A{b}" for b in bits]
    print_head("parameters in linears", "training tokens", *names)
    for N, D in sorted({key[:2] for key in cells}):
        losses = (f"{cells[N, D, b]:.4f}" if (N, D, b) in cells else "" for b in bits)
        print(f"| {N / 1e6:.2f}M | {D / 1e6:.1f}M | " + " | ".join(losses) + " |")

def split(rows, *names):
    """{values of the named fields: the rows that have these}. A field that a row lacks is None."""
    parts = collections.defaultdict(list)
    for row in rows:
        parts[tuple(row.get(name) for name in names)].append(row)
    return parts

def with_std(values, sign=""):
    """Mean and deviation as a table's cell; a single value has no deviation. sign: "+" for
    differences."""
    mean, std = mean_std(values)
    mean = round(mean, 4) + 0                          # + 0: no minus before 0
    return f"{mean:{sign}.4f}" + (f" ± {std:.4f}" if len(values) > 1 else "")

def print_tweaks(rows):
    """Print what normtweak.py's rows say: a host's loss without and with the tweak, and the
    difference, paired by run. Runs on other bases or tokens, or of other hosts, have a table of
    their own."""
    for setup in split(rows, "base_val_loss", "tokens", "group_size", "act_order").values():
        # Both losses of each host, by the run's settings and its seed.
        pairs = collections.defaultdict(dict)
        for row in setup:
            grid = "symmetric" if row["symmetric"] else "asymmetric"
            # Rows without the field were measured before there was a choice: all tweaks stayed.
            keep_all = row.get("keep_all", True)
            kept = "all" if keep_all else "by held-out windows"
            tweak = row["calib"], row["solver"], row["loss"], row["lr"], kept
            for host in ("rtn", "gptq", "packed"):
                if host + "-tweak" in row["arms"]:
                    key = row["w_bits"], row["a_bits"], host, grid, *tweak
                    losses = [row["arms"][arm]["val_loss"] for arm in (host, host + "-tweak")]
                    pairs[key][row["seed"]] = losses

        print_head("W bits", "A bits", "host", "grid", "calibration", "solver", "loss", "lr",
                   "kept", "seeds", "without", "with", "difference")
        for key, seeds in sorted(pairs.items(), key=lambda item: item[0]):
            without, tweaked = (statistics.mean(losses) for losses in zip(*seeds.values()))
            print_line(*key, len(seeds), f"{without:.4f}", f"{tweaked:.4f}",
                       with_std([b - a for a, b in seeds.values()], "+"))

def print_lrqat(rows):
    """Print what lrqat.py's rows say: its arms, and the variants of LR-QAT. Runs on other bases or
    tokens, by another loss, or with other groups or activations, have tables of their own."""
    rows = [row | {"taught": row.get("teacher", "none") != "none"} for row in rows
            if row["method"] == "lrqat"]
    for setup in split(rows, "base_val_loss", "tokens", "group_size", "a_bits", "kv_bits",
                       "taught").values():
        print_arms(setup)
        print_variants(setup)

def print_arms(rows):
    """Print every arm of lrqat.py at the rate with the least mean loss on the dev split.
    Recovered: the share of the loss between RTN and the dense model, trained as long by the same
    loss. A base that is its own teacher stays what it is, and no row has it trained longer."""
    # What the rows say of an arm, by bits, arm, rate and seed. Dense arms have no bits, and what
    # does not train has no rate.
    runs = collections.defaultdict(dict)
    for row in rows:
        if (row["phi"], row["init"], row["rank"]) == ("fixed", "zero", 32):
            for arm, found in row["arms"].items():
                bits = 16 if arm.startswith("dense") else row["w_bits"]
                rate = "" if arm in ("dense", "RTN", "GPTQ") else row["lr"]
                runs[bits, arm, rate][row["seed"]] = found
    if not runs:
        return

    best = {}
    for (bits, arm, rate), seeds in runs.items():
        dev = statistics.mean(r["dev_loss"] for r in seeds.values())
        if (bits, arm) not in best or dev < best[bits, arm][0]:
            best[bits, arm] = dev, rate, list(seeds.values())
    losses = {key: [r["val_loss"] for r in seeds] for key, (_, _, seeds) in best.items()}

    control = (16, "dense, longer")
    if control not in losses and rows[0]["taught"]:
        control = (16, "dense")

    print_head("bits", "arm", "rate", "seeds", "val loss", "recovered", "flipped")
    for (bits, arm), (_, rate, seeds) in sorted(best.items(), key=lambda item: item[0]):
        recovered = flipped = ""
        if bits < 16 and control in losses:
            rtn, dense, loss = (statistics.mean(losses[key]) for key in (
                (bits, "RTN"), control, (bits, arm)))
            recovered = f"{100 * (rtn - loss) / (rtn - dense):.0f} %"
        if "flipped" in seeds[0]:
            flipped = f"{100 * statistics.mean(r['flipped'] for r in seeds):.1f} %"
        print_line(bits, arm, rate, len(seeds), with_std(losses[bits, arm]), recovered, flipped)

def print_variants(rows):
    """Print LR-QAT's loss by phi, start and rank, a column for each bit-width, at its default rate
    of 0.01."""
    runs = collections.defaultdict(dict)               # (phi, start, rank), bits: {seed: loss}
    for row in rows:
        if row["lr"] == 0.01 and "LR-QAT" in row["arms"]:
            how = row["phi"], row["init"], row["rank"]
            runs[how, row["w_bits"]][row["seed"]] = row["arms"]["LR-QAT"]["val_loss"]
    if not runs:
        return
    widths = sorted({bits for _, bits in runs})
    print_head("phi", "start", "rank", *(f"{bits} bits" for bits in widths))
    for how in sorted({how for how, _ in runs}):
        print_line(*how, *(with_std(list(runs[how, bits].values())) if (how, bits) in runs else ""
                           for bits in widths))

def print_memory(rows):
    """Print the peaks and the speed that tests/time_lrqat_memory.py measured, a line for each arm
    of a run. A peak is known on a GPU only."""
    print_head("size", "W bits", "phi", "blocks again", "arm", "peak GiB", "tokens/s")
    for row in rows:
        if row["method"] != "lrqat-random":
            continue
        run = row["size"], row["w_bits"], row["phi"], "yes" if row["lean"] else "no"
        for arm, found in row["results"].items():
            if found is None:
                print_line(*run, arm, "does not fit", "")
            else:
                peak = f"{found['peak'] / 2**30:.2f}" if "peak" in found else ""
                print_line(*run, arm, peak, f"{found['tokens/s']:.0f}")

def print_pv(rows):
    """Print what pvtune.py's rows say of every arm and, paired by seed, what it wins over P only at
    the rate that the dev split chooses. Settings that fewer seeds tried than others were a search
    for rates, and are left out. Rows with different notes, on other bases or tokens, or of other
    schemes have tables of their own."""
    for (note, *_), setup in split(rows, "note", "base_val_loss", "tokens", "scheme", "w_bits",
                                   "group_size", "tau").items():
        # What the rows say of an arm, by arm, rates and seed. P only has no rate of codes.
        runs = collections.defaultdict(dict)
        for row in setup:
            for arm, found in row["arms"].items():
                how = row["lr"], row["code_lr"], row["rank"]
                if arm in ("dense", "RTN", "as fitted"):
                    how = "", "", ""
                elif arm == "P only":
                    how = row["lr"], "", ""
                runs[arm, *how][row["seed"]] = found
        most = max(len(seeds) for (_, lr, *_), seeds in runs.items() if lr)
        runs = {key: seeds for key, seeds in runs.items() if not key[1] or len(seeds) == most}

        p_only = min((seeds for (arm, *_), seeds in runs.items() if arm == "P only"), default={},
                     key=lambda seeds: statistics.mean(r["dev_loss"] for r in seeds.values()))
        if note:
            print(f"\n{note}")
        print_head("scheme", "arm", "lr", "code lr", "ranking", "bits/weight", "seeds", "dev loss",
                   "val loss", "minus P only", "codes changed", "budget used")
        order = lambda item: statistics.mean(r["val_loss"] for r in item[1].values())
        for (arm, *how), seeds in sorted(runs.items(), key=order):
            dev, loss = ([r[k] for r in seeds.values()] for k in ("dev_loss", "val_loss"))
            minus = changed = budget = ""
            found = next(iter(seeds.values()))
            if "changed" in found:
                changed, budget = (f"{100 * statistics.mean(r[k] for r in seeds.values()):.2f} %"
                                   for k in ("changed", "budget"))
                won = [seeds[s]["val_loss"] - p_only[s]["val_loss"] for s in seeds if s in p_only]
                minus = with_std(won, "+") if won else ""
            print_line(setup[0]["scheme"], arm, *how, f"{found['bpw']:.2f}", len(seeds),
                       with_std(dev), with_std(loss), minus, changed, budget)

def main():
    # Which rows: the given files', or the committed ones' of all methods side by side.
    small, smollm2 = HERE / "results.jsonl", HERE / "smollm2.jsonl"
    rows = []
    for path in sys.argv[1:] or [path for path in (small, smollm2) if path.exists()]:
        rows += read_rows(path)
    rows = [r for r in rows if r.get("val_loss") is not None]      # else bytes and speed alone
    bases = {r["params"] for r in rows if "arms" in r}
    table = summarize([r for r in rows if r["params"] not in bases])
    if table:
        print_table(table)
    for params in sorted(bases):
        found = methods([r for r in rows if r["params"] == params])
        print_methods(found)
        print_short(found)
    if sys.argv[1:]:
        return
    law, kernels, pv, lr = (read_rows(HERE / f"{name}.jsonl")
                            for name in ("law", "kernels", "pvtune", "lrqat"))
    print_law(law)
    print_tweaks(read_rows(HERE / "normtweak.jsonl"))
    print_lrqat(lr)
    print_memory(lr)
    print_pv(pv)
    print_speedups(kernels, WEIGHTS)
    print_speedups(kernels, OTHERS)
    print_asked(kernels)
    big = [r for r in read_rows(small) if r["params"] in bases]
    try:
        figures.draw_methods(methods(big), HERE / "methods.png", "30M parameters, one text")
        if smollm2.exists():
            found = methods(read_rows(smollm2))
            figures.draw_methods(found, HERE / "smollm2.png", "SmolLM2-135M", "kl")
        figures.draw_curves([r for r in big if "arms" not in r], HERE / "curves.png")
        figures.draw_quest(table, HERE / "quest.png")
        plot(kernels, HERE / "kernels.png")
        figures.draw_memory(lr, HERE / "memory.png")
    except ModuleNotFoundError as e:
        print(f"{e.name} is not installed (pip install -e '.[plot]'): not all figures drawn")

if __name__ == "__main__":
    run(main)
