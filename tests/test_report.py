"""assets/report.py: means, deviations and differences against numpy's, the pages' tables against
what it prints from the committed rows, and these rows against what the scripts write today."""
import io
import json
import pathlib
import re
import shlex
import sys
import types

import numpy as np
import pytest
import torch

import kernel_rows
import lrqat
import model
import nanobit.cli
import nanobit.defaults
import normtweak
import pvtune
import quest
import time_lrqat_memory
from conftest import load_report, random_base
from nanobit.runs import read_rows

ROOT = pathlib.Path(__file__).parents[1]
report = load_report()

def row(method, seed, loss, **more):
    return {"method": method, "seed": seed, "val_loss": loss, "val_ppl": loss and np.exp(loss),
            "bits_per_byte": loss and loss / 2, "bpw": 2.1, "w_bits": 2, "a_bits": 2,
            "group_size": -1, "grid": "uniform", "size": "tiny", "tokens": 1000, "seconds": 5.0,
            "peak_bytes": 2**30, "params": 77, **more}

def test_seeds_become_mean_deviation_and_paired_difference():
    dense, quest = [3.0, 3.1, 3.3], [3.2, 3.25, 3.6]
    rows = [row("dense", s, x, w_bits=16, a_bits=16) for s, x in enumerate(dense)]
    rows += [row("quest", s, x) for s, x in enumerate(quest)] + [row("quest", 0, 3.2)]  # again
    of_dense, of_quest = report.summarize(rows)
    assert of_dense.losses == dense and of_dense.gaps == [0, 0, 0]
    assert len(of_quest.runs) == 3 and of_quest.losses == quest
    paired = np.subtract(quest, dense)
    assert of_quest.gaps == pytest.approx(paired)
    assert report.mean_std(quest) == pytest.approx((np.mean(quest), np.std(quest, ddof=1)))
    cell = f"{paired.mean():+.3f} ± {paired.std(ddof=1):.3f}"
    assert report.with_std(of_quest.gaps, "+", digits=3) == cell

def test_another_rate_and_another_start_are_other_lines(capsys):
    rows = [row("dense", 0, 3.0, w_bits=16, a_bits=16), row("quest", 0, 3.5, lr=0.1),
            row("quest", 0, 3.4, lr=0.2), row("quest", 0, 3.3, lr=0.1, base_val_loss=3.2)]
    report.print_table(report.summarize(rows))
    lines = capsys.readouterr().out.strip().splitlines()[3:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| quest, from the dense model", "| quest, lr 0.2", "| quest, lr 0.1"]
    assert [line.split(" | ")[8] for line in lines] == ["+0.100", "+0.400", "+0.500"]

def test_arms_of_a_run_become_lines_beside_runs_from_scratch(capsys):
    arm = lambda loss, bpw: {"val_loss": loss, "bits_per_byte": loss / 2, "bpw": bpw,
                             "seconds": 1.0, "peak_bytes": 2**31}
    rows = [row("dense", 0, 3.0, w_bits=16, a_bits=16, bpw=16.0), row("quest", 0, 3.5)]
    for seed, loss in enumerate((3.1, 3.3)):
        rows.append(row("lrqat", seed, loss, base_val_loss=3.0, arms={
            "dense, longer": arm(2.9, 16.0), "GPTQ": arm(9.0, 2.1), "LR-QAT": arm(loss, 2.25)}))
    rows.append(row("pvtune", 0, 3.2, scheme="affine", base_val_loss=3.0, arms={
        "as fitted": arm(9.0, 2.1), "PV": arm(3.2, 2.3)}))
    rows.append(row("quest", 0, 3.4, base_val_loss=3.3))
    found = report.methods(rows)
    names = {(method.bits, method.name): runs for method, runs in found.items()}
    assert set(names) == {(16, "dense"), (16, "dense, longer"), (2, "LR-QAT"),
                          (2, "PV, affine grid"), (2, "QuEST W2A2, from scratch"),
                          (2, "QuEST W2A2, from the dense model")}
    (taught,) = names[2, "QuEST W2A2, from the dense model"]
    assert taught["gap"] == pytest.approx(0.1)
    report.print_methods(found)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[2].startswith("| 16 | dense, longer | 16.00 | 2 | 2.9000 ± 0.0000 | -0.1000")
    assert lines[4] == ("| 2 | LR-QAT | 2.25 | 2 | 3.2000 ± 0.1414 | +0.2000 ± 0.1414 | 1.6000 "
                        "| 1 | 2.0 |")
    assert "| 2 | QuEST W2A2, from scratch | 2.10 | 1 | 3.5000 | +0.5000 | 1.7500 |" in lines[-1]

def test_runs_with_other_settings_are_other_lines_and_not_other_seeds(capsys):
    """Groups of 64 after rows without groups, at the same bits, with the same seed and with
    another; the short table shows what was run last."""
    rows = []
    for seed, group_size, loss in ((0, -1, 3.4), (1, -1, 3.6), (0, 64, 3.2)):
        arm = {"val_loss": loss, "bits_per_byte": 1.0, "bpw": 2.1 if group_size < 0 else 2.5,
               "seconds": 1.0, "peak_bytes": 0}
        rows.append(row("normtweak", seed, loss, base_val_loss=3.0, group_size=group_size,
                        arms={"gptq": arm}))
    found = report.methods(rows)
    report.print_methods(found)
    lines = capsys.readouterr().out.strip().splitlines()[2:]
    assert [line.split(" | ")[:5] for line in lines] == [
        ["| 2", "GPTQ, group_size 64", "2.50", "1", "3.2000"],
        ["| 2", "GPTQ, group_size -1", "2.10", "2", "3.5000 ± 0.1414"]]
    report.print_short(found)
    assert "| GPTQ | nothing | 0.200 |" in capsys.readouterr().out

    # What is not trained does not depend on the rate, what is does; dense runs of other lengths are
    # no control.
    arm = {"val_loss": 3.1, "bits_per_byte": 1.0, "bpw": 2.1, "seconds": 1.0, "peak_bytes": 0}
    both = {"gptq": arm, "gptq-tweak": arm}
    rows = [row("normtweak", 0, 3.1, base_val_loss=3.0, lr=lr, arms=both) for lr in (0.1, 0.2)]
    rows += [row("dense", 0, 2.5, tokens=9, bpw=16.0, w_bits=16), row("quest", 0, 3.5)]
    found = report.methods(rows)
    labels = [report.label_of(method, found) for method in found]
    assert labels[:3] == ["GPTQ", "GPTQ + tweak, lr 0.1", "GPTQ + tweak, lr 0.2"]
    quest_runs, = (runs for method, runs in found.items() if method.name.startswith("QuEST"))
    assert quest_runs[0]["gap"] is None

def test_the_short_table_has_bits_as_columns_and_kl_in_brackets(capsys):
    M = report.Method
    found = {M(16, "dense"): [{"gap": None}], M(4, "GPTQ"): [{"gap": 0.0}, {"gap": -0.0006}],
             M(2, "GPTQ"): [{"gap": 0.25}],
             M(2, "QuEST W2A2, from the dense model"): [{"gap": 1.0}]}
    report.print_short(found)
    assert capsys.readouterr().out.strip().splitlines() == [
        "| method | what trains | 4 bits | 2 bits |", "|---|---|---|---|",
        "| GPTQ | nothing | 0.000 | 0.250 |",
        "| QuEST: activations too | everything | – | 1.000 |"]
    report.print_short({M(1, "RTN"): [{"gap": 0.1, "kl": 0.2}, {"gap": 0.2, "kl": 0.4}]})
    assert capsys.readouterr().out.strip().splitlines()[0::2] == [
        "| method | what trains | 1 bit (KL) |",
        "| round to nearest (RTN) | nothing | 0.150 (0.300) |"]

def test_a_file_of_the_users_own_runs_is_enough(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row("quest", 0, 3.5), row("ste", 0, 4))))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    report.main()
    out = capsys.readouterr().out
    assert "| quest | uniform | 2 | 2 | 2.10 | 0.00M | 1 | 3.500 |" in out
    assert out.count("\n|") == 4
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit) as stopped:
        nanobit.cli.run(report.main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "No such file" in err and err.count("\n") == 1

def test_rows_without_parameters_are_refused_and_without_a_peak_are_not(
        tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    arm = {"val_loss": 3.1, "bits_per_byte": 1.0, "bpw": 2.1, "seconds": 1.0}
    old = row("normtweak", 0, 3.1, base_val_loss=3.0, arms={"gptq": arm})
    path.write_text(json.dumps(old))
    nanobit.cli.run(report.main)
    assert "| 2 | GPTQ | 2.10 | 1 | 3.1000 |" in capsys.readouterr().out
    del old["params"]
    path.write_text(json.dumps(old))
    with pytest.raises(SystemExit) as stopped:
        nanobit.cli.run(report.main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "without the number of parameters" in err

def test_torn_rows_and_rows_without_a_loss_are_left_out(tmp_path, monkeypatch, capsys):
    """A killed run's half row, one that a next run was glued to, bytes of a broken disk; and a row
    of bytes and speed alone, as tests/time_lrqat_memory.py writes it."""
    path, good = tmp_path / "results.jsonl", json.dumps(row("quest", 0, 3.5))
    speed = json.dumps(row("lrqat-random", 0, None) | {"params": None})
    torn = (good[:50], good[:50] + good, "\xff\xfe", "[1]")
    path.write_text("\n".join((good, *torn, speed, json.dumps(row("ste", 0, 4.0)))), "latin-1")
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    nanobit.cli.run(report.main)
    out, err = capsys.readouterr()
    assert out.count("\n|") == 4 and "| quest |" in out and "| ste |" in out
    assert err.count("\n") == 1 and "line 2, 3, 4, 5," in err

def test_a_narrow_terminal_shows_the_table(tmp_path, monkeypatch):
    path, raw = tmp_path / "results.jsonl", io.BytesIO()
    path.write_text("".join(json.dumps(row("quest", seed, 3.5)) + "\n" for seed in (0, 1)))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    nanobit.cli.run(report.main)
    assert b"3.500 \\xb1 0.000" in raw.getvalue()

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

def test_tables_of_results_are_what_the_committed_rows_give(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)       # no figures: they are large
    report.main()

    # The lines below a table's head; a page may have them in an order of its own.
    def lines_of(text):
        tables = re.findall(r"\|.*\n\|[- |]+\n((?:\|.*\n)+)", text)
        return [sorted(re.sub(r"\s+", " ", line) for line in t.splitlines()) for t in tables]

    printed = lines_of(capsys.readouterr().out)
    mark = "<!-- assets/report.py -->"
    for page in PAGES:
        text = page.read_text()
        checked = lines_of("".join(re.findall(rf"{mark}\n\n((?:\|.*\n)+\n)", text)))
        assert len(checked) == text.count(mark), page
        for table in checked:
            assert table in printed, (page, table)
    marked = {page.name for page in PAGES if mark in page.read_text()}
    assert marked >= {"README.md", "results.md", "quest.md", "lrqat.md"}

# ---- The committed rows -------------------------------------------------------------------------

ASSETS = ROOT / "assets"
FILES = {path.stem: read_rows(path) for path in ASSETS.glob("*.jsonl")}
KERNELS = FILES.pop("kernels")
SCRIPTS = {"quest.py": quest, "lrqat.py": lrqat, "pvtune.py": pvtune, "normtweak.py": normtweak,
           "tests/time_lrqat_memory.py": time_lrqat_memory}
BY_HAND = {"hardware", "note"}

def script_of(row):
    """Which script wrote a row; the methods without a script of their own are quest.py's."""
    if row["method"] == "lrqat-random":
        return "tests/time_lrqat_memory.py"
    return f"{row['method']}.py" if f"{row['method']}.py" in SCRIPTS else "quest.py"

@pytest.fixture(scope="module")
def todays(tmp_path_factory):
    """{script: the row that it writes today}, on a base of one block with random weights."""
    folder, rows = tmp_path_factory.mktemp("today"), {}
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setenv("XDG_CACHE_HOME", str(folder))
        m.setitem(model.PRESETS, "tiny", model.Preset(1, 32, 4, 48, 1e-3, 2, 2, 1, 32))
        random_base(folder, 1)
        of_base = "--model base.pt --data text.txt"
        for script, flags in (("quest.py", "--data text.txt --vocab 300"), ("lrqat.py", of_base),
                              ("pvtune.py", of_base), ("normtweak.py", of_base),
                              ("tests/time_lrqat_memory.py", "")):
            steps = 8 if script == "normtweak.py" else 2
            m.setattr(sys, "argv", [script, *f"{flags} --steps {steps} --device cpu".split()])
            SCRIPTS[script].main()
            rows[script] = read_rows("out/results.jsonl")[-1]
    return rows

@pytest.mark.parametrize("name", FILES)
def test_every_committed_row_has_fields_that_todays_scripts_write(todays, name):
    for row in FILES[name]:
        today = todays[script_of(row)]
        assert set(row) <= set(today) | BY_HAND, set(row) - set(today)
        for arm, found in row.get("arms", {}).items():
            written = set().union(*today["arms"].values())
            assert "val_loss" in found and set(found) <= written, (arm, set(found) - written)

@pytest.mark.parametrize("name", FILES)
def test_every_committed_row_has_a_command_of_today_with_the_rows_settings(
        name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nanobit.cli, "try_compiling", lambda device: None)
    for row in FILES[name]:
        python, script, *argv = shlex.split(row["command"])
        assert (python, script) == ("python", script_of(row))
        args = SCRIPTS[script].parse_args(argv)

        # Names that a row and the flags share; of the width, the method and the arm see below.
        for field in set(row) & set(vars(args)) - {"arm", "device", "variant"}:
            want = getattr(args, field)
            if field == "size" and args.model:         # that of the model
                continue
            if field == "lr" and not want:             # not given: by the rule for its model
                rule = nanobit.defaults.RULES[row["method"]]
                want = rule.rate(args.bits, is_large=row["params"] >= nanobit.defaults.LARGE)
            if field == "code_lr" and want is None:    # not given: from the fit
                assert 0 < row[field] < 0.1, row["command"]
                continue
            if field == "group_size" and want is None:     # not given: a row, for a small model
                assert (row.get("params") or 0) < nanobit.defaults.LARGE
                want = -1
            if field == "teacher" and want is None:    # not given: the base itself
                want = args.model or "none"
            assert row[field] == want, (field, row["command"])
        width = args.bits
        if row["method"] == "pvtune" and args.scheme != "affine":
            M, B, g = pvtune.parse_scheme(args.scheme)
            width = M * B / g
        assert row["w_bits"] == width, row["command"]
        if script == "quest.py":
            assert row["method"] == ("dense" if args.bits == 16 else args.quantizer)
        if script == "pvtune.py" and args.variant:
            label = pvtune.VARIANTS[args.variant].label
            assert row["variant"] == args.variant and label in row["arms"]
        if script == "lrqat.py":
            alone = lrqat.ARMS[args.arm or "lr-qat"].label
            labels = {arm.label for arm in lrqat.ARMS.values()}
            assert list(row["arms"])[-1] == alone and set(row["arms"]) <= labels

def test_every_committed_row_of_a_kernel_is_one_of_todays_benchmark(monkeypatch):
    pytest.importorskip("triton", "3.5")
    import time_kernels
    # What is timed needs a GPU; the fields of the rows do not depend on it.
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: randn(*shape, dtype=dtype))
    monkeypatch.setattr(time_kernels, "capture",
                        lambda calls, owner: time_kernels.Graph(None, calls, 20, owner))
    monkeypatch.setattr(time_kernels, "times_of", lambda graphs: [1.0] * len(graphs))
    monkeypatch.setattr(time_kernels, "COPIES", 1)
    cublas, ours = (types.SimpleNamespace(name=name, grouped=False,
                                          make=lambda O, C, bits: lambda x: None)
                    for name in ("cuBLAS", "ours"))
    jobs = [("8x8", 1, cublas, 16), ("8x8", 1, ours, 4), ("8x8", 2, ours, 4)]
    (_, today), fault = time_kernels.measure_here(jobs, 1.0, None)     # two tokens: no cuBLAS
    assert fault is None and (today["kernel"], today["batch"]) == ("ours", 1)
    for row in KERNELS:
        assert set(today) <= set(row) <= set(today) | BY_HAND
        python, script, *argv = shlex.split(row["command"])
        assert (python, script) == ("python", "tests/time_kernels.py")
        jobs = time_kernels.jobs_of(time_kernels.parse_args(argv))
        assert (row["shape"], row["batch"], row["kernel"], row["bits"]) in [
            (shape, M, candidate.name, bits) for shape, M, candidate, bits in jobs], row

@pytest.mark.parametrize("script,name,show", [
    ("lrqat.py", "lrqat", report.print_lrqat), ("pvtune.py", "pvtune", report.print_pv),
    ("normtweak.py", "normtweak", report.print_tweaks),
    ("tests/time_lrqat_memory.py", "lrqat", report.print_memory)])
def test_a_fresh_row_is_printed_beside_the_committed_ones_and_changes_none(
        todays, capsys, script, name, show):
    show(FILES[name])
    before = capsys.readouterr().out
    show(FILES[name] + [todays[script]])
    after = capsys.readouterr().out
    assert after.startswith(before)
    added, fresh = after[len(before):], todays[script]
    if script == "tests/time_lrqat_memory.py":
        for arm, found in fresh["results"].items():
            assert f"| tiny | 4 | packed | no | {arm} |  | {found['tokens/s']:.0f} |" in added
        return
    shown = set(fresh["arms"]) - ({"dense"} if name == "normtweak" else set())
    assert len(shown) >= 4
    for arm in shown:
        assert f"| {fresh['arms'][arm]['val_loss']:.4f} |" in added, arm

def test_differences_are_paired_by_seed_and_rates_are_chosen_on_dev(capsys):
    """Three printers on rows whose means and deviations numpy gives."""
    loss = lambda val, dev=0.0, **more: {"val_loss": val, "dev_loss": dev, "bpw": 2.0, **more}
    shared = {"w_bits": 2, "base_val_loss": 3.0, "tokens": 1, "group_size": -1}
    plain, tweaked = np.array([3.2, 3.4, 3.3]), np.array([3.1, 3.2, 3.3])
    report.print_tweaks([shared | {
        "a_bits": 16, "act_order": False, "symmetric": False, "calib": "self", "solver": "adam",
        "loss": "paper", "lr": 0.1, "seed": seed,
        "arms": {"dense": loss(3.0), "gptq": loss(plain[seed]), "gptq-tweak": loss(tweaked[seed])}}
        for seed in range(3)])
    change = tweaked - plain
    assert (f"| 3 | 3.3000 | 3.2000 | {change.mean():+.4f} ± {change.std(ddof=1):.4f} |"
            in capsys.readouterr().out)

    # Rate 0.2 is better on dev, rate 0.1 on the split that is only reported.
    rows = [shared | {
        "method": "lrqat", "a_bits": 16, "kv_bits": 16, "phi": "fixed", "init": "zero", "rank": 32,
        "lr": lr, "seed": seed, "arms": {
            "dense": loss(3.0), "dense, longer": loss(2.0), "RTN": loss(4.0),
            "LR-QAT": loss(3.0 + lr + seed / 10, dev=-lr, flipped=0.25)}}
        for lr in (0.1, 0.2) for seed in (0, 1)]
    report.print_lrqat(rows)
    out = capsys.readouterr().out
    assert "| 2 | LR-QAT | 0.2 | 2 | 3.2500 ± 0.0707 | 38 % | 25.0 % |" in out
    assert "| 2 | RTN |  | 2 | 4.0000 ± 0.0000 | 0 % |  |" in out

    # By KL to the base the control is the base; the rows by the text keep their own table.
    arms = {arm: found for arm, found in rows[-1]["arms"].items() if arm != "dense, longer"}
    report.print_lrqat([*rows, rows[-1] | {"teacher": "out/base.pt", "arms": arms}])
    text, taught = capsys.readouterr().out.split("| bits | arm |")[1:]
    assert "| 2 | LR-QAT | 0.2 | 2 | 3.2500 ± 0.0707 | 38 % | 25.0 % |" in text
    assert "| 2 | LR-QAT | 0.2 | 1 | 3.3000 | 70 % | 25.0 % |" in taught
    assert "| 16 | dense |  | 1 | 3.0000 |  |  |" in taught

    # A rate that one seed alone tried is left out, and so are pairs across notes.
    pv = [(0, 0.1, 3.2), (1, 0.1, 3.5), (0, 0.5, 2.0)]
    p_only = {0: 3.3, 1: 3.4}
    report.print_pv([shared | {
        "scheme": "affine", "tau": 0.1, "lr": 0.1, "code_lr": code_lr, "rank": "residual",
        "seed": seed, "note": note, "arms": {
            "dense": loss(3.0), "P only": loss(p_only[seed] + shift),
            "PV": loss(val, changed=0.5, budget=0.125)}}
        for note, shift in (("one", 0.0), ("two", 1.0)) for seed, code_lr, val in pv])
    one, two = capsys.readouterr().out.split("\ntwo\n")
    line = "| affine | PV | 0.1 | 0.1 | residual | 2.00 | 2 | 0.0000 ± 0.0000 | 3.3500 ± 0.2121 |"
    assert f"{line} +0.0000 ± 0.1414 | 50.00 % | 12.50 % |" in one
    assert f"{line} -1.0000 ± 0.1414 | 50.00 % | 12.50 % |" in two
    assert "2.0000 |" not in one + two

def test_a_kernel_of_ours_that_fails_its_checks_ends_the_benchmark_and_a_peer_does_not(
        monkeypatch, capsys):
    pytest.importorskip("triton", "3.5")
    import time_kernels
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: randn(*shape, dtype=dtype))
    monkeypatch.setattr(time_kernels, "COPIES", 1)
    monkeypatch.setattr(time_kernels, "cuda_works", lambda: True)

    def fail(O, C, bits):
        raise AssertionError("not this shape")

    peer = types.SimpleNamespace(name="gemlite", grouped=False, make=fail)
    assert time_kernels.measure_here([("8x8", 1, peer, 4)], 1.0, None) == ([], None)
    assert "gemlite W4 8x8: not this shape" in capsys.readouterr().out
    ours = types.SimpleNamespace(name="vq_matmul", grouped=False, make=fail)
    with pytest.raises(AssertionError, match="not this shape"):
        time_kernels.measure_here([("8x8", 1, ours, 4)], 1.0, None)

def test_tables_of_docs_kernels_are_printed_from_the_committed_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_rows.py"])
    kernel_rows.main()
    page = (ROOT / "docs" / "kernels.md").read_text()
    shown = page.split("<!-- what python tests/kernel_rows.py prints -->\n")[1]
    assert shown.split("\n<!-- to here -->")[0] == capsys.readouterr().out

def test_what_was_asked_of_kernels_is_held_against_rows(capsys):
    """Rows whose ratios are plain: humming is the faster peer at 64 tokens, cuBLAS at 128."""
    def timed(M, kernel, bits, us):
        return dict(shape="4096x4096", batch=M, kernel=kernel, bits=bits, us=us, cublas=20 / us)

    rows = [timed(64, "cuBLAS", 16, 20.0),
            timed(64, "humming", 4, 10.0), timed(64, "humming", 2, 1.0),
            timed(64, "lowbit_matmul", 4, 12.0), timed(64, "quest_linear", 4, 16.0),
            timed(128, "cuBLAS", 16, 20.0), timed(128, "humming", 4, 25.0),
            timed(128, "lowbit_matmul", 4, 11.0), timed(128, "quest_linear", 4, 16.4)]
    assert kernel_rows.over_the_faster(rows) == {("4096x4096", 4): {64: 1.2, 128: 0.55}}
    assert kernel_rows.slower_at_fewer(rows) == [
        ("4096x4096", "lowbit_matmul", 4, 64, 128, 12 / 11)]
    kernel_rows.print_asked(rows)
    out = capsys.readouterr().out
    assert "| 4096 × 4096 | 4 | 1 of 2 | 64: 1.20 |" in out and "| 1.25 | 1.22 |" in out

    kernel_rows.print_speedups(rows, kernel_rows.WEIGHTS)
    out = capsys.readouterr().out
    assert "| W4 | humming W2 | humming W4 |" in out and "tinygemm" not in out
    assert "| 4096 × 4096 | 128 | 20.0 us | 1.82 | – | 0.80 |" in out
