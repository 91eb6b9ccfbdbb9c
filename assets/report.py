"""The tables and the figures of the README and of docs/ from result rows.

    python assets/report.py                        # the committed rows: tables and figures
    python assets/report.py out/results.jsonl      # the rows of your own runs

Every script appends one JSON line a run to OUT/results.jsonl. Here the runs that differ by nothing
but the seed become one line: mean and standard deviation over seeds, and the paired difference to
the dense runs of the same seeds, size and tokens. Runs that compare several arms on one base hold
them under "arms": with the runs from scratch of the same size they become one table of methods,
and a short one, with a column for each number of bits.
results.jsonl: a base of 30M and the small models; smollm2.jsonl: a pretrained model; text30m.jsonl:
a base of 30M on the text of that. normtweak.jsonl, lrqat.jsonl and pvtune.jsonl hold such runs on
the tiny base, also those that searched for rates on the dev split; lrqat.jsonl also what
`tests/time_lrqat_memory.py` wrote. law.jsonl: the runs of the scaling law, which assets/law.py
fits; kernels.jsonl: what `tests/time_kernels.py --out` wrote, whose tables tests/kernel_rows.py
prints. Two fields of committed rows were written by hand: hardware and note. The figures, which
assets/figures.py draws, need matplotlib.
"""
import collections
import pathlib
import statistics
import sys
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]
import figures
from figures import known, mean_std
from model import UsageError
from nanobit.cli import run                            # as the scripts end and write
from nanobit.runs import read_rows
from kernel_rows import OTHERS, WEIGHTS, print_asked, print_head, print_line, print_speedups

# ---- Cells --------------------------------------------------------------------------------------

def mean_of(rows, field):
    return statistics.mean(row[field] for row in rows)

def with_std(values, sign="", digits=4):
    """Mean and deviation as a table's cell; a single value has no deviation. sign: "+" for
    differences."""
    mean, std = mean_std(values)
    mean = round(mean, digits) + 0                     # + 0: no minus before 0
    cell = f"{mean:{sign}.{digits}f}"
    return cell + f" ± {std:.{digits}f}" if len(values) > 1 else cell

def split(rows, *names):
    """{values of the named fields: the rows that have these}. A field that a row lacks is None."""
    parts = collections.defaultdict(list)
    for row in rows:
        parts[tuple(row.get(name) for name in names)].append(row)
    return parts

# ---- Runs from scratch --------------------------------------------------------------------------

class Setting(NamedTuple):
    """What identifies a run apart from its seed."""
    size: str
    tokens: int
    method: str
    grid: str
    w_bits: float
    a_bits: float
    group_size: int
    lr: float

class Line(NamedTuple):
    """A line of the table of runs from scratch."""
    setting: Setting
    runs: list                   # a row for each seed
    losses: list                 # their validation losses
    gaps: list                   # those less the dense run's of the same seed, size and tokens, or
                                 # less the dense model's that the run began with

def size_of(row):
    return row.get("size") or "tiny"

def dense_losses(rows):
    """{what a run from scratch shares with its dense control: the control's loss}."""
    return {control_of(row): row["val_loss"] for row in rows if row["method"] == "dense"}

def control_of(row):
    return size_of(row), row["tokens"], row["seed"]

def gap_of(row, dense):
    """The loss of a run of quest.py less that of the dense model that it began with, or else of its
    dense control, of dense_losses; None where there is neither."""
    base = row.get("base_val_loss")
    if base is None:
        base = dense.get(control_of(row))
    return None if base is None else row["val_loss"] - base

def setting_of(row):
    method = row["method"]
    if row.get("base_val_loss") is not None:
        method += ", from the dense model"
    return Setting(size_of(row), row["tokens"], method, row.get("grid") or "uniform",
                   row["w_bits"], row["a_bits"], row["group_size"], row.get("lr"))

def summarize(rows):
    """Rows -> a Line for each setting, in the order of the table."""
    groups = collections.defaultdict(dict)
    for row in rows:
        groups[setting_of(row)][row["seed"]] = row     # a repeated seed: the last run counts

    dense = dense_losses(rows)
    table = []
    for setting, by_seed in groups.items():
        runs = list(by_seed.values())
        losses = [row["val_loss"] for row in runs]
        gaps = [gap_of(row, dense) for row in runs]
        table.append(Line(setting, runs, losses, [gap for gap in gaps if gap is not None]))

    # A size and its tokens together, then many bits before few, then the lowest loss first.
    def place(line):
        s = line.setting
        return s.size, s.tokens, -s.w_bits, -s.a_bits, statistics.mean(line.losses)
    return sorted(table, key=place)

def print_table(table):
    print_head("method", "grid", "W bits", "A bits", "bits/weight", "tokens", "seeds", "val loss",
               "minus dense", "ppl", "bits/byte", "seconds")
    for setting, runs, losses, gaps in table:
        # Runs at several rates have lines of their own, which say the rate.
        method = setting.method
        if any(line.setting[:-1] == setting[:-1] and line.setting != setting for line in table):
            method += f", lr {setting.lr}"
        minus = ""
        if gaps and setting.method != "dense":
            minus = with_std(gaps, "+", digits=3)
        print_line(method, setting.grid, setting.w_bits, setting.a_bits,
                   f"{mean_of(runs, 'bpw'):.2f}", f"{setting.tokens / 1e6:.2f}M", len(runs),
                   with_std(losses, digits=3), minus, f"{mean_of(runs, 'val_ppl'):.2f}",
                   f"{mean_of(runs, 'bits_per_byte'):.3f}", f"{mean_of(runs, 'seconds'):.0f}")

# ---- Methods on one base ------------------------------------------------------------------------

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

# Settings of a run by which a method may have several lines: of the grid and its calibration, and
# of what trains. A row may lack some.
ROUNDING = ("a_bits", "kv_bits", "grid", "group_size", "scheme", "symmetric", "act_order", "calib")
TRAINING = ("tokens", "lr", "teacher", "loss", "solver", "keep_all", "phi", "init", "rank", "tau")
UNTRAINED = ("RTN", "GPTQ", "codebooks, as fitted")

class Method(NamedTuple):
    """What identifies a line of the table of methods."""
    bits: float
    name: str
    settings: tuple = ()         # of (field, value)

def methods(rows):
    """{Method: one dict a seed}, of runs on one base and runs from scratch of its size."""
    dense = dense_losses(rows)
    found = collections.defaultdict(dict)
    for row in rows:
        seed = row["seed"]

        # A run of several arms. Codes of 1.5 bits, say, stand with those of 2.
        if "arms" in row:
            for arm, scores in row["arms"].items():
                name = name_of_arm(row, arm)
                if name:
                    bits = 16 if scores["bpw"] == 16 else round(row["w_bits"])
                    gap = scores["val_loss"] - row["base_val_loss"]
                    key = Method(bits, name, settings_of(row, name))
                    found[key][seed] = scores | {"gap": gap}
            continue

        # A run of quest.py: from scratch, or from the dense model that the row has the loss of.
        name = SCRATCH.get(row["method"], row["method"])
        if row["method"] != "dense":
            scratch = row.get("base_val_loss") is None
            start = "from scratch" if scratch else "from the dense model"
            name += f" W{row['w_bits']}A{row['a_bits']}, {start}"
        key = Method(row["w_bits"], name, settings_of(row, name))
        found[key][seed] = row | {"gap": gap_of(row, dense)}
    return {method: list(runs.values()) for method, runs in found.items()}

def settings_of(row, name):
    """What a method's line depends on besides its seed, as (field, value)."""
    fields = ROUNDING if name in UNTRAINED else ROUNDING + TRAINING
    if name.startswith("dense"):
        fields = TRAINING if name == "dense, longer" else ()
    return tuple((field, row.get(field)) for field in fields)

def label_of(method, found):
    """A method's name, and where it has several lines, in what they differ."""
    others = [m for m in found if (m.bits, m.name) == (method.bits, method.name)]
    differ = [f"{field} {value}" for field, value in method.settings
              if any(dict(m.settings)[field] != value for m in others)]
    return ", ".join([method.name, *differ])

def name_of_arm(row, arm):
    """What the table of methods calls an arm of a row; None where it does not show it."""
    script = row["method"]
    if script == "pvtune" and row["scheme"] == "affine":
        script = "pvtune-affine"
    return ARMS.get((script, arm))

def print_methods(found):
    """Print a line for each of the methods. Where a row has the distance from the dense model, so
    has the table: KL divergence in nats per token, and how often both have the same top token."""
    has_distance = any(known(runs, "kl") for runs in found.values())
    distance = ("KL", "same top") if has_distance else ()
    print_head("bits", "method", "bits/weight", "seeds", "val loss", "minus dense", *distance,
               "bits/byte", "seconds", "peak GiB")

    def place(method):
        return -method.bits, mean_of(found[method], "val_loss")

    for method in sorted(found, key=place):
        # The dense model's distance from itself says nothing.
        runs = found[method]
        gaps = known(runs, "gap") if method.name != "dense" else []
        far = ()
        if has_distance:
            kl = known(runs, "kl")
            same = known(runs, "same_top")
            far = (f"{statistics.mean(kl):.4f}" if kl else "",
                   f"{statistics.mean(same):.1f} %" if same else "")
        peak = max(known(runs, "peak_bytes"), default=0) / 2**30
        print_line(method.bits, label_of(method, found), f"{mean_of(runs, 'bpw'):.2f}", len(runs),
                   with_std([run["val_loss"] for run in runs]),
                   with_std(gaps, "+") if gaps else "", *far,
                   f"{mean_of(runs, 'bits_per_byte'):.4f}", f"{mean_of(runs, 'seconds'):.0f}",
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
    brackets the KL divergence from the dense model where the rows have one. Of a method with
    several settings that of the rows' last new one."""
    widths = sorted({method.bits for method in found if method.bits < 16}, reverse=True)
    heads = []
    for bits in widths:
        plural = "s" if bits > 1 else ""
        kl = " (KL)" if any(known(runs, "kl") for runs in found.values()) else ""
        heads.append(f"{bits:g} bit{plural}{kl}")
    print_head("method", "what trains", *heads)

    by_name = {(method.bits, method.name): runs for method, runs in found.items()}
    for label, trains, name in SHORT:
        cells = [short_cell(by_name.get((bits, name.format(bits)), [])) for bits in widths]
        if any(cells):
            print_line(label, trains, *(cell or "–" for cell in cells))

def short_cell(runs):
    gaps = known(runs, "gap")
    if not gaps:
        return ""
    cell = with_std([statistics.mean(gaps)], digits=3)
    kls = known(runs, "kl")
    return f"{cell} ({statistics.mean(kls):.3f})" if kls else cell

# ---- The scaling law, and each script's own comparisons -----------------------------------------

def print_law(rows):
    """Losses of the scaling law's runs: a line a size and token count, a column a precision."""
    losses = {}
    for row in rows:
        losses[row["linear_params"], row["tokens"], row["w_bits"]] = row["val_loss"]
    widths = sorted({bits for _, _, bits in losses}, reverse=True)

    names = ["dense" if bits == 16 else f"W{bits}A{bits}" for bits in widths]
    print_head("parameters in linears", "training tokens", *names)
    for N, D in sorted({(N, D) for N, D, _ in losses}):
        cells = [f"{losses[N, D, b]:.4f}" if (N, D, b) in losses else "" for b in widths]
        print_line(f"{N / 1e6:.2f}M", f"{D / 1e6:.1f}M", *cells)

class Tweak(NamedTuple):
    """What identifies a line of the table of tweaks."""
    w_bits: int
    a_bits: int
    host: str
    grid: str
    calibration: str
    solver: str
    loss: str
    lr: float
    kept: str

def print_tweaks(rows):
    """Print what normtweak.py's rows say: a host's loss without and with the tweak, and the
    difference, paired by run. Runs on other bases or tokens, or of other hosts, have a table of
    their own."""
    for setup in split(rows, "base_val_loss", "tokens", "group_size", "act_order").values():
        # Both losses of each host, by the run's settings and its seed.
        without = collections.defaultdict(dict)
        tweaked = collections.defaultdict(dict)
        for row in setup:
            # Rows without the field were measured before there was a choice: all tweaks stayed.
            kept = "all" if row.get("keep_all", True) else "by held-out windows"
            grid = "symmetric" if row["symmetric"] else "asymmetric"
            for host in ("rtn", "gptq", "packed"):
                if host + "-tweak" in row["arms"]:
                    key = Tweak(row["w_bits"], row["a_bits"], host, grid, row["calib"],
                                row["solver"], row["loss"], row["lr"], kept)
                    without[key][row["seed"]] = row["arms"][host]["val_loss"]
                    tweaked[key][row["seed"]] = row["arms"][host + "-tweak"]["val_loss"]

        print_head("W bits", "A bits", "host", "grid", "calibration", "solver", "loss", "lr",
                   "kept", "seeds", "without", "with", "difference")
        for key in sorted(without):
            before = list(without[key].values())       # in the order of the seeds' runs, both
            after = list(tweaked[key].values())
            print_line(*key, len(before), f"{statistics.mean(before):.4f}",
                       f"{statistics.mean(after):.4f}",
                       with_std([b - a for a, b in zip(before, after)], "+"))

def print_lrqat(rows):
    """Print what lrqat.py's rows say: its arms, and the variants of LR-QAT. Runs on other bases or
    tokens, by another loss, or with other groups or activations, have tables of their own."""
    runs = []
    for row in rows:
        if row["method"] == "lrqat":
            runs.append(row | {"taught": row.get("teacher", "none") != "none"})
    for setup in split(runs, "base_val_loss", "tokens", "group_size", "a_bits", "kv_bits",
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
        if (row["phi"], row["init"], row["rank"]) != ("fixed", "zero", 32):
            continue                                   # a variant: see print_variants
        for arm, found in row["arms"].items():
            bits = 16 if arm.startswith("dense") else row["w_bits"]
            rate = "" if arm in ("dense", "RTN", "GPTQ") else row["lr"]
            runs[bits, arm, rate][row["seed"]] = found
    if not runs:
        return

    # Of each arm the rate that is best on dev, and there the mean loss on val.
    best = {}
    for (bits, arm, rate), seeds in runs.items():
        dev = mean_of(seeds.values(), "dev_loss")
        if (bits, arm) not in best or dev < best[bits, arm][0]:
            best[bits, arm] = dev, rate, list(seeds.values())
    loss = {key: mean_of(seeds, "val_loss") for key, (_, _, seeds) in best.items()}

    control = (16, "dense, longer")
    if control not in loss and rows[0]["taught"]:
        control = (16, "dense")

    print_head("bits", "arm", "rate", "seeds", "val loss", "recovered", "flipped")
    for bits, arm in sorted(best):
        _, rate, seeds = best[bits, arm]
        recovered = flipped = ""
        if bits < 16 and control in loss:
            rtn = loss[bits, "RTN"]
            recovered = f"{100 * (rtn - loss[bits, arm]) / (rtn - loss[control]):.0f} %"
        if "flipped" in seeds[0]:
            flipped = f"{100 * mean_of(seeds, 'flipped'):.1f} %"
        print_line(bits, arm, rate, len(seeds), with_std([r["val_loss"] for r in seeds]),
                   recovered, flipped)

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
        losses = [list(runs.get((how, bits), {}).values()) for bits in widths]
        print_line(*how, *(with_std(seeds) if seeds else "" for seeds in losses))

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

class PVArm(NamedTuple):
    """What identifies a line of the table of PV-Tuning; rates are "" where an arm has none."""
    arm: str
    lr: object = ""
    code_lr: object = ""
    rank: str = ""

def print_pv(rows):
    """Print what pvtune.py's rows say of every arm and, paired by seed, what it wins over P only at
    the rate that the dev split chooses. Settings that fewer seeds tried than others were a search
    for rates, and are left out. Rows with different notes, on other bases or tokens, or of other
    schemes have tables of their own."""
    for (note, *_), setup in split(rows, "note", "base_val_loss", "tokens", "scheme", "w_bits",
                                   "group_size", "tau").items():
        runs = runs_of_pv(setup)

        # The rate of P only that is best on dev.
        p_only = {}
        p_rates = [key for key in runs if key.arm == "P only"]
        if p_rates:
            p_only = runs[min(p_rates, key=lambda key: mean_of(runs[key].values(), "dev_loss"))]

        if note:
            print(f"\n{note}")
        print_head("scheme", "arm", "lr", "code lr", "ranking", "bits/weight", "seeds", "dev loss",
                   "val loss", "minus P only", "codes changed", "budget used")
        for key in sorted(runs, key=lambda key: mean_of(runs[key].values(), "val_loss")):
            seeds = runs[key]
            found = list(seeds.values())
            minus = changed = budget = ""
            if "changed" in found[0]:
                changed = f"{100 * mean_of(found, 'changed'):.2f} %"
                budget = f"{100 * mean_of(found, 'budget'):.2f} %"
                won = []
                for seed in seeds:
                    if seed in p_only:
                        won.append(seeds[seed]["val_loss"] - p_only[seed]["val_loss"])
                minus = with_std(won, "+") if won else ""
            print_line(setup[0]["scheme"], *key, f"{found[0]['bpw']:.2f}", len(found),
                       with_std([r["dev_loss"] for r in found]),
                       with_std([r["val_loss"] for r in found]), minus, changed, budget)

def runs_of_pv(rows):
    """{PVArm: {seed: what a row says of it}}, of the settings that most seeds tried."""
    runs = collections.defaultdict(dict)
    for row in rows:
        for arm, found in row["arms"].items():
            key = PVArm(arm, row["lr"], row["code_lr"], row["rank"])
            if arm in ("dense", "RTN", "as fitted"):
                key = PVArm(arm)
            elif arm == "P only":
                key = PVArm(arm, row["lr"])
            runs[key][row["seed"]] = found

    most = max(len(seeds) for key, seeds in runs.items() if key.lr)
    return {key: seeds for key, seeds in runs.items() if not key.lr or len(seeds) == most}

# ---- All of it ----------------------------------------------------------------------------------

def read_scored(path):
    """The rows of a file that have a loss; others hold bytes and speed alone. Raises UsageError for
    rows that are too old for the tables of methods."""
    rows = [row for row in read_rows(path) if row.get("val_loss") is not None]
    if not all("params" in row for row in rows):
        raise UsageError(f"{path} has rows without the number of parameters; give the "
                         "results.jsonl of today's runs")
    return rows

def print_tables(rows):
    """Print the table of runs from scratch, and two tables of methods for each base -> (that table,
    {a base's parameters: its methods})."""
    bases = {row["params"] for row in rows if "arms" in row}
    table = summarize([row for row in rows if row["params"] not in bases])
    if table:
        print_table(table)

    found = {}
    for params in sorted(bases):
        found[params] = methods([row for row in rows if row["params"] == params])
        print_methods(found[params])
        print_short(found[params])
    return table, found

def main():
    # The rows of the user's own runs, all together.
    if sys.argv[1:]:
        rows = []
        for path in sys.argv[1:]:
            rows += read_scored(path)
        print_tables(rows)
        return

    # The committed rows. Each file's have a text of their own, and one base for all methods.
    rows = read_scored(HERE / "results.jsonl")
    table, found = print_tables(rows)
    [(big, on_30m)] = found.items()
    _, found = print_tables(read_scored(HERE / "smollm2.jsonl"))
    [on_smollm2] = found.values()
    print_tables(read_scored(HERE / "text30m.jsonl"))

    lrqat = read_rows(HERE / "lrqat.jsonl")
    kernels = read_rows(HERE / "kernels.jsonl")
    print_law(read_rows(HERE / "law.jsonl"))
    print_tweaks(read_rows(HERE / "normtweak.jsonl"))
    print_lrqat(lrqat)
    print_memory(lrqat)
    print_pv(read_rows(HERE / "pvtune.jsonl"))
    print_speedups(kernels, WEIGHTS)
    print_speedups(kernels, OTHERS)
    print_asked(kernels)

    try:
        figures.draw_methods(on_30m, HERE / "methods.png", "30M parameters, one text")
        figures.draw_methods(on_smollm2, HERE / "smollm2.png", "SmolLM2-135M", "kl")
        scratch = [row for row in rows if row["params"] == big and "arms" not in row]
        figures.draw_curves(scratch, HERE / "curves.png")
        figures.draw_quest(table, HERE / "quest.png")
        figures.draw_kernels(kernels, HERE / "kernels.png")
        figures.draw_memory(lrqat, HERE / "memory.png")
    except ModuleNotFoundError as e:
        print(f"{e.name} is not installed (pip install -e '.[plot]'): no figures drawn")

if __name__ == "__main__":
    run(main)
