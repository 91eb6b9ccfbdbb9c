"""assets/law.py: the scaling law's fit, against rows made by a known law, and its command line."""
import json
import math
import pathlib
import re
import sys

import pytest
import torch

from conftest import call, check_refused
from model import UsageError

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "assets"))
import law

def law_rows(noise=0.0, bits=(16, 4, 2)):
    """Rows of the paper's law, written out: A 8, B 80, E 0.5, alpha 0.12, beta 0.3."""
    generator, rows, eff = torch.Generator().manual_seed(0), [], {16: 1.0, 4: 0.7, 2: 0.15}
    for n in (1e6, 2e6, 4e6, 8e6):
        for ratio in (25, 50, 100):
            for b in bits:
                loss = 8 / (n * eff[b]) ** 0.12 + 80 / (n * ratio) ** 0.3 + 0.5
                loss *= math.exp(noise * torch.randn(1, generator=generator).item())
                rows.append({"method": "quest" if b < 16 else "dense", "w_bits": b, "a_bits": b,
                             "linear_params": n, "tokens": n * ratio, "val_loss": loss})
    return rows

def fit_command(rows, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(law, "BOOTSTRAPS", 3)
    monkeypatch.setattr(sys, "argv", ["law.py", str(path)])
    law.main()

@pytest.mark.slow
def test_fit_recovers_effective_parameters_of_a_known_law(tmp_path, monkeypatch, capsys):
    fit_command(law_rows(noise=1e-4), tmp_path, monkeypatch)
    out = capsys.readouterr().out
    eff = {b: float(v) for b, v in re.findall(r"eff\((\d)\) \| ([\d.]+)", out)}
    assert abs(eff["4"] - 0.7) < 0.03 and abs(eff["2"] - 0.15) < 0.03
    assert "best: 4 bits" in out

@pytest.mark.slow
def test_fit_calls_a_law_degenerate_that_the_runs_do_not_determine(tmp_path, monkeypatch, capsys):
    fit_command(law_rows(noise=0.02), tmp_path, monkeypatch)
    assert "degenerate" in capsys.readouterr().out

@pytest.mark.parametrize("eff, worth, best", [((0.7, 0.15), (2.8, 1.2), 4),
    ((0.4, 0.1), (1.6, 0.8), 4), ((0.2, 0.05), (0.8, 0.4), 16), ((0.5, 0.3), (2.0, 2.4), 2)])
def test_the_best_bits_are_those_whose_bit_of_memory_is_worth_most(eff, worth, best, tmp_path,
                                                                   monkeypatch, capsys):
    """eff(P) 16 / P, by hand, of a fit that is given."""
    theta = torch.tensor([8.0, 80.0, 0.5, 0.12, 0.3, *eff]).double().log()
    monkeypatch.setattr(law, "fit_law", lambda *_: theta)
    fit_command(law_rows(), tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert f"best: {best} bits" in out
    for bits, value in zip((4, 2), worth):
        assert f"{bits} bits {value:.2f}" in out

def test_the_fit_takes_equal_bits_of_both_operands_on_the_uniform_grid(tmp_path, monkeypatch):
    """Rows of another kind are left out, however far off their losses are."""
    seen = []
    def fit_law(N, D, P, L, starts=None):
        seen.append(torch.stack((N, D, P, L), 1))
        return torch.zeros(7).double()
    monkeypatch.setattr(law, "fit_law", fit_law)
    good = law_rows()
    other = [{"a_bits": 16}, {"grid": "fp4"}, {"method": "lsq"}, {"method": "gptq"},
             {"linear_params": None}]
    bad = [row | change | {"val_loss": 99.0} for row in good if row["w_bits"] == 4
           for change in other]
    fit_command(bad + good, tmp_path, monkeypatch)
    want = [(r["linear_params"], r["tokens"], (16, 4, 2).index(r["w_bits"]), r["val_loss"])
            for r in good]
    assert torch.equal(seen[0], torch.tensor(want).double())

@pytest.mark.parametrize("rows", [[], law_rows(bits=(4, 2))[:9], law_rows()[:3]])
def test_fit_refuses_rows_that_cannot_carry_it(rows, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="usable rows"):
        fit_command(rows, tmp_path, monkeypatch)

def test_out_of_the_box_the_rows_are_those_of_out(tmp_path, monkeypatch, capsys):
    """`python assets/law.py`, in any folder, where the scripts there wrote out/results.jsonl."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in law_rows()[:3]))
    monkeypatch.chdir(tmp_path)
    check_refused(call(capsys, "law.py"), "out/results.jsonl: 3 usable rows", "3 sizes")

@pytest.mark.parametrize("content, flags, words", [
    (None, "none.jsonl", ["none.jsonl", "No such file"]),
    ("", "rows.jsonl", ["rows.jsonl", "0 usable rows"]),
    ('{"method": "dense", "w_b', "rows.jsonl", ["rows.jsonl", "no result rows"]),
    ("", "rows.jsonl --seed -1", ["--seed", "-1"]), ("", "rows.jsonl more", ["more"])])
def test_what_cannot_be_fitted_is_one_line(content, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    check_refused(call(capsys, f"law.py {flags}"), *words)

def test_a_torn_row_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    """The others are fitted: the file that a killed run left is no reason to stop."""
    seen = []
    def fit_law(N, D, P, L, starts=None):
        seen.append(L)
        return torch.zeros(7).double()
    monkeypatch.setattr(law, "fit_law", fit_law)
    lines = [json.dumps(row) for row in law_rows()]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]))
    status, out, err = call(capsys, f"law.py {path}")
    assert status == 0 and "35 runs, 4 sizes" in out and len(seen[0]) == 35
    assert err.count("\n") == 1 and "line 2, not a row" in err
