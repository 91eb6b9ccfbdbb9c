"""assets/report.py: means, deviations and differences against numpy's, and the README's tables
against what it prints from the committed rows."""
import importlib.util
import io
import json
import pathlib
import re
import sys

import numpy as np
import pytest

import nanobit.cli

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("report", ROOT / "assets" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

def row(method, seed, loss, **more):
    return {"method": method, "seed": seed, "val_loss": loss, "val_ppl": loss and np.exp(loss),
            "bits_per_byte": loss and loss / 2, "bpw": 2.1, "w_bits": 2, "a_bits": 2,
            "group_size": -1, "grid": "uniform", "size": "tiny", "tokens": 1000, "seconds": 5.0,
            "peak_bytes": 2**30, "params": 77, **more}

def test_seeds_become_mean_deviation_and_paired_difference():
    dense, quest = [3.0, 3.1, 3.3], [3.2, 3.25, 3.6]
    rows = [row("dense", s, x, w_bits=16, a_bits=16) for s, x in enumerate(dense)]
    rows += [row("quest", s, x) for s, x in enumerate(quest)] + [row("quest", 0, 3.2)]  # again
    (_, _, loss, _), (_, runs, quest_loss, gap) = report.summarize(rows)
    assert loss == pytest.approx((np.mean(dense), np.std(dense, ddof=1)))
    assert len(runs) == 3
    assert quest_loss == pytest.approx((np.mean(quest), np.std(quest, ddof=1)))
    paired = np.subtract(quest, dense)
    assert gap == pytest.approx((paired.mean(), paired.std(ddof=1)))

def test_arms_of_a_run_become_lines_beside_runs_from_scratch(capsys):
    arm = lambda loss, bpw: {"val_loss": loss, "bits_per_byte": loss / 2, "bpw": bpw,
                             "seconds": 1.0, "peak_bytes": 2**31}
    rows = [row("dense", 0, 3.0, w_bits=16, a_bits=16, bpw=16.0), row("quest", 0, 3.5)]
    for seed, loss in enumerate((3.1, 3.3)):
        rows.append(row("lrqat", seed, loss, base_val_loss=3.0, arms={
            "dense, longer": arm(2.9, 16.0), "GPTQ": arm(9.0, 2.1), "LR-QAT": arm(loss, 2.25)}))
    rows.append(row("pvtune", 0, 3.2, scheme="affine", base_val_loss=3.0, arms={
        "as fitted": arm(9.0, 2.1), "PV": arm(3.2, 2.3)}))
    found = report.methods(rows)
    assert set(found) == {(16, "dense"), (16, "dense, trained on"), (2, "LR-QAT"),
                          (2, "PV, affine grid"), (2, "QuEST W2A2, from scratch")}
    report.print_methods(found)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[2].startswith("| 16 | dense, trained on | 16.00 | 2 | 2.9000 ± 0.0000 | -0.1000")
    assert lines[4] == ("| 2 | LR-QAT | 2.25 | 2 | 3.2000 ± 0.1414 | +0.2000 ± 0.1414 | 1.6000 "
                        "| 1 | 2.0 |")
    assert "| 2 | QuEST W2A2, from scratch | 2.10 | 1 | 3.5000 | +0.5000 | 1.7500 |" in lines[-1]

def test_a_file_of_the_users_own_runs_is_enough(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row("quest", 0, 3.5), row("ste", 0, 4))))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    report.main()
    out = capsys.readouterr().out
    assert "| quest | uniform | 2 | 2 | 2.10 | 0.00M | 1 | 3.500 ± 0.000 |" in out
    assert out.count("\n|") == 3
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit) as stopped:
        nanobit.cli.run(report.main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "No such file" in err and err.count("\n") == 1

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
    assert out.count("\n|") == 3 and "| quest |" in out and "| ste |" in out
    assert err.count("\n") == 1 and "line 2, 3, 4, 5," in err

def test_a_narrow_terminal_shows_the_table(tmp_path, monkeypatch):
    path, raw = tmp_path / "results.jsonl", io.BytesIO()
    path.write_text(json.dumps(row("quest", 0, 3.5)))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    nanobit.cli.run(report.main)
    assert b"3.500 \\xb1 0.000" in raw.getvalue()

def test_the_readmes_tables_of_results_are_what_the_committed_rows_give(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)       # no figures: they are large
    report.main()
    printed = {re.sub(r"\s+", " ", line) for line in capsys.readouterr().out.splitlines()}
    readme = (ROOT / "README.md").read_text()
    checked = re.findall(r"<!-- assets/report.py -->\n\n((?:\|.*\n)+)", readme)
    assert len(checked) >= 2
    for table in checked:
        for line in table.splitlines()[2:]:
            assert re.sub(r"\s+", " ", line) in printed, line
