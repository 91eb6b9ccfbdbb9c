"""What the scripts do between the formulas: of which split, of which model and at which rate a
number in a row of results is. Each script runs once, on a base that trains in a second."""
import contextlib
import importlib
import io
import json
import pathlib
import sys
from types import SimpleNamespace

import pytest
import torch

import model
import nanobit.cli
import normtweak
from conftest import TEXT
from nanobit.checkpoint import load_checkpoint
from nanobit.data import load_data
from nanobit.train import dev_loss, evaluate

BASE = "--model out/base.pt"
RUNS = {  # folder: command, its packed file
    "rounded": (f"normtweak.py {BASE} --bits 2 --host rtn --steps 8", "rtn-tweak-w2.pt"),
    "kept": (f"normtweak.py {BASE} --bits 2 --host rtn --steps 8 --keep-all", "rtn-tweak-w2.pt"),
    "tuned": (f"pvtune.py {BASE} --bits 2 --scheme affine --steps 3", "pvtune-affine-w2.pt"),
    "trained": (f"lrqat.py {BASE} --bits 2 --steps 3", "lrqat-w2.pt"),
    "taught": (f"lrqat.py {BASE} --bits 2 --steps 3 --arm lr-qat "
               "--teacher longer/base.pt --embed-bits 16",
               "lrqat-w2-lr-qat.pt"),
    "quest": (f"quest.py {BASE} --bits 4 --steps 3", "quest-w4a4.pt"),
    "fp4": (f"quest.py {BASE} --bits 4 --grid fp4 --steps 1", "quest-w4a4-fp4.pt"),
}
SEQ_LEN = 16

def run(command):
    """One script in this process -> what it printed."""
    sys.argv = command.split()
    name = sys.argv[0].removesuffix(".py")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        nanobit.cli.run(importlib.import_module("nanobit.cli" if name == "model" else name).main)
    return printed.getvalue()

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All of RUNS: their rows and files, the base and its text."""
    with pytest.MonkeyPatch.context() as m:
        m.setitem(model.PRESETS, "tiny", model.Preset(2, 64, 2, 128, 4e-3, 30, 8, 1, SEQ_LEN))
        m.setattr(sys, "argv", [])
        m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        m.chdir(tmp_path_factory.mktemp("drivers"))
        pathlib.Path("text.txt").write_text(TEXT)
        run("model.py --data text.txt --vocab 300 --out out")
        run("model.py --data text.txt --vocab 300 --steps 60 --out longer")
        rows = {}
        for folder, (command, _) in RUNS.items():
            run(f"{command} --out {folder}")
            rows[folder] = json.loads(pathlib.Path(folder, "results.jsonl").read_text())
        base, content = load_checkpoint("out/base.pt")
        data = load_data("text.txt", "300", SEQ_LEN, content["tokenizer"])
        yield SimpleNamespace(rows=rows, base=base, data=data, folder=pathlib.Path.cwd())

def losses(m, data):
    """(val, dev), on the whole of both splits."""
    val = evaluate(m, data.val, SEQ_LEN, data.tokenizer)["loss"]
    return val, dev_loss(m, data, SEQ_LEN)

@pytest.mark.parametrize("folder", RUNS)
def test_a_rows_losses_are_those_of_its_file_on_val_and_on_dev(done, folder):
    packed, _ = load_checkpoint(done.folder / folder / RUNS[folder][1])
    val, dev = losses(packed, done.data)
    assert abs(val - dev) > 1e-3                       # else the splits could be exchanged
    row = done.rows[folder]
    assert row["val_loss"] == pytest.approx(val, abs=2e-5)
    assert row["dev_loss"] == pytest.approx(dev, abs=2e-5)

@pytest.mark.parametrize("folder", RUNS)
def test_the_bases_loss_in_a_row_is_the_dense_models_on_val(done, folder):
    val, dev = losses(done.base, done.data)
    row = done.rows[folder]
    assert row["base_val_loss"] == pytest.approx(val, abs=2e-5)
    if "arms" in row:
        assert row["arms"]["dense"]["val_loss"] == pytest.approx(val, abs=2e-5)
        assert row["arms"]["dense"]["dev_loss"] == pytest.approx(dev, abs=2e-5)

@pytest.mark.parametrize("folder, rate", [
    ("rounded", 5e-3), ("tuned", 6e-3), ("trained", 1e-2), ("quest", 5e-4)])
def test_each_script_trains_a_small_model_at_its_own_default_rate(done, folder, rate):
    assert done.rows[folder]["lr"] == rate

def test_the_arm_without_a_tweak_has_none(done):
    """RTN's row is that of a base whose linears are rounded, and of which nothing else changes."""
    rounded, _ = load_checkpoint(done.folder / "rounded" / "rtn-w2.pt")
    for name, norm in done.base.named_parameters():
        if "norm" in name:
            assert torch.equal(rounded.get_parameter(name), norm)
    val, _ = losses(rounded, done.data)
    assert done.rows["rounded"]["arms"]["rtn"]["val_loss"] == pytest.approx(val, abs=2e-5)
    assert done.rows["rounded"]["arms"]["rtn"] != done.rows["rounded"]["arms"]["rtn-tweak"]

def test_round_to_nearest_is_one_recipe_in_all_scripts(done):
    """A row's scale of 2 bits: grids from the same search. What differs is a scale's 16 bits."""
    found = [done.rows["rounded"]["arms"]["rtn"], done.rows["trained"]["arms"]["RTN"]]
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], abs=2e-3)

def test_the_divergence_is_from_the_base_whoever_teaches(done):
    arms = [done.rows[folder]["arms"]["RTN"] for folder in ("trained", "taught")]
    assert arms[0]["kl"] == arms[1]["kl"] > 0

def test_a_row_says_whether_every_tweak_stayed(done):
    assert [done.rows[folder]["keep_all"] for folder in ("rounded", "kept")] == [False, True]
    assert done.rows["kept"]["kept"] == done.rows["kept"]["blocks"] == 2

def test_an_arm_of_lr_qat_says_what_it_flipped_and_its_time_holds_the_training(done):
    arm = done.rows["taught"]["arms"]["LR-QAT"]
    assert 0 < arm["flipped"] < 1
    assert arm["seconds"] > done.rows["taught"]["seconds"] > 0
    assert abs(done.rows["taught"]["packed_minus_live"]) < 1e-6

def test_every_variant_of_pv_has_a_state_of_its_own(done):
    states = sorted(path.name for path in (done.folder / "tuned").glob("*.state"))
    assert states == [f"pvtune-affine-w2-{variant}.state" for variant in ("p", "pv", "ste")]

def test_the_curve_of_a_row_has_every_step_of_a_short_run(done):
    assert len(done.rows["quest"]["curve"]) == 3

def test_a_tweak_is_judged_by_the_dense_model_from_its_own_block_on(done, monkeypatch):
    """The judge reads a block's outputs by the dense blocks after it; what it wants are the dense
    model's predictions."""
    judged, read = [], []
    divergence, by_head = normtweak.divergence_after, normtweak.read_by_head
    monkeypatch.setattr(normtweak, "divergence_after",
                        lambda m, i, *rest: judged.append((m, i)) or divergence(m, i, *rest))
    monkeypatch.setattr(normtweak, "read_by_head",
                        lambda m, i, *rest: read.append((m, i)) or by_head(m, i, *rest))
    args = normtweak.parse_args("--bits 2 --host rtn --steps 8 --group-size -1 --batch-size 2 "
                                "--seq-len 16 --device cpu".split())
    ids = torch.tensor(done.data.train[:8 * 16].astype(int)).view(8, 16)
    student = normtweak.sharing_copy(done.base)
    normtweak.compress(student, done.base, ids, args, "rtn", tweak=True)
    assert all(m is done.base for m, _ in judged + read)
    assert sorted({i for _, i in judged}) == [0, 1] and read[0][1] == 0
