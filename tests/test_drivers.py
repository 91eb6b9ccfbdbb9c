"""What the scripts do between the formulas: of which split, of which model and at which rate a
number in a row of results is. Each script runs once, on a base that trains in a second."""
import contextlib
import io
import json
import pathlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import model
import nanobit.runs
import normtweak
import quest
from conftest import TEXT, start
from nanobit.checkpoint import load_checkpoint
from nanobit.data import load_data
from nanobit.train import dev_loss, evaluate
from quantizers import QuantLinear

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
    "codebooks": (f"pvtune.py {BASE} --scheme 1x4g4 --variant p --steps 1", "pvtune-1x4g4.pt"),
    "again": ("normtweak.py --model rounded/rtn-w2.pt --teacher out/base.pt --steps 8",
              "packed-tweak-w2.pt"),
    "fp4": (f"quest.py {BASE} --bits 4 --grid fp4 --steps 1", "quest-w4a4-fp4.pt"),
}
SEQ_LEN = 16

def run(command):
    """One script in this process -> what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        start(command)
    return printed.getvalue()

def row_in(folder):
    """The row of the one run that wrote there."""
    return json.loads(pathlib.Path(folder, "results.jsonl").read_text())

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
        rows, printed = {}, {}
        for folder, (command, _) in RUNS.items():
            printed[folder] = run(f"{command} --out {folder}")
            rows[folder] = row_in(folder)
        base, content = load_checkpoint("out/base.pt")
        data = load_data("text.txt", "300", SEQ_LEN, content["tokenizer"])
        yield SimpleNamespace(rows=rows, printed=printed, base=base, data=data,
                              dense=row_in("out"), folder=pathlib.Path.cwd())

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

def test_the_row_of_a_base_has_its_losses_on_val_and_on_dev(done):
    val, dev = losses(done.base, done.data)
    assert done.dense["val_loss"] == pytest.approx(val, abs=2e-5)
    assert done.dense["dev_loss"] == pytest.approx(dev, abs=2e-5)

@pytest.mark.parametrize("folder, rate", [
    ("rounded", 5e-3), ("tuned", 6e-3), ("codebooks", 1.2e-2), ("trained", 1e-2),
    ("quest", 5e-4)])
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

def test_the_calibration_text_is_written_by_the_dense_model(done, monkeypatch, tmp_path):
    """Also where the codes exist already, and the dense model is their teacher."""
    monkeypatch.chdir(done.folder)
    writers, own_text = [], normtweak.own_text
    monkeypatch.setattr(normtweak, "own_text",
                        lambda m, *rest: writers.append(m) or own_text(m, *rest))
    run(f"{RUNS['again'][0]} --out {tmp_path}")
    assert len(writers) == 1
    assert not any(isinstance(m, QuantLinear) for _, m in writers[0].linears())

def test_a_rows_losses_are_of_what_the_file_holds(done, monkeypatch, tmp_path):
    """Not of the model in memory: here the packed file is read back without its last norm."""
    monkeypatch.chdir(done.folder)

    def spoiled(path, *rest):
        m, content = load_checkpoint(path, *rest)
        if content["linears"]:
            m.norm.weight.data.zero_()
        return m, content
    monkeypatch.setattr(nanobit.runs, "load_checkpoint", spoiled)
    run(f"quest.py {BASE} --bits 4 --steps 1 --out {tmp_path}")
    row = row_in(tmp_path)
    assert row["packed_minus_live"] > 0.1

def test_a_row_of_lr_qat_has_the_settings_of_its_command(done, monkeypatch, tmp_path):
    monkeypatch.chdir(done.folder)
    run(f"lrqat.py {BASE} --bits 2 --arm lr-qat --rank 3 --phi packed --init svd --lr 0.02 "
        f"--steps 1 --out {tmp_path}")
    row = row_in(tmp_path)
    assert [row[name] for name in ("rank", "phi", "init", "lr")] == [3, "packed", "svd", 0.02]

def test_recovered_is_a_share_of_the_loss_between_the_fit_and_the_dense_model(done):
    loss = {name: arm["val_loss"] for name, arm in done.rows["tuned"]["arms"].items()}
    line = next(line for line in done.printed["tuned"].splitlines()
                if re.match(r"PV +\|", line) and line.count("|") > 3)
    share = 100 * (loss["as fitted"] - loss["PV"]) / (loss["as fitted"] - loss["dense"])
    assert f"{share:.1f}%" in line.replace(" ", "")

def test_each_block_has_its_own_rate_times_the_size_of_its_norms(done):
    args = normtweak.parse_args(["--device", "cpu"])
    for i, block in enumerate(done.base.blocks):
        sizes = [block.attn_norm.weight.abs().mean().item(),
                 block.mlp_norm.weight.abs().mean().item()]
        rate = 5e-3 * (1 + i / 2)                      # the paper's: it grows to twice --lr
        tweaks = normtweak.possible_tweaks(block, block, None, args, i, 2)
        for tweak, factor in zip(tweaks, normtweak.RATES, strict=True):
            assert tweak.keywords["rates"] == pytest.approx([factor * rate * s for s in sizes])

def test_quest_says_while_it_trains_how_much_is_trusted(done):
    assert "trust w " in done.printed["quest"]

def test_another_text_than_the_checkpoints_is_said(done, monkeypatch):
    monkeypatch.chdir(done.folder)
    pathlib.Path("other.txt").write_text(TEXT.replace("return", "yield"))
    note = "is not the text that this checkpoint was trained on"
    assert note in run("model.py eval out/base.pt --data other.txt")
    assert note not in run("model.py eval out/base.pt --data text.txt")

def test_a_sample_is_drawn_as_its_flags_say(done, monkeypatch):
    """The most likely token at temperature 0 or of one; by the seed otherwise."""
    monkeypatch.chdir(done.folder)
    command = "model.py sample out/base.pt --tokens 30 "
    likely = run(command + "--temperature 0")
    assert run(command + "--temperature 0 --seed 1") == likely
    assert run(command + "--top-k 1 --seed 2") == likely
    hot = run(command + "--temperature 9 --seed 1")
    assert hot != run(command + "--temperature 9 --seed 2") and hot != likely

def test_integers_that_differ_from_trainings_are_counted(done, monkeypatch, tmp_path):
    monkeypatch.chdir(done.folder)
    levels = quest.levels_in_use
    monkeypatch.setattr(quest, "levels_in_use",
                        lambda learner, x: [level + 1 for level in levels(learner, x)])
    run(f"quest.py {BASE} --bits 4 --steps 1 --out {tmp_path}")
    row = row_in(tmp_path)
    assert row["integers_differ"] == sum(m.weight.numel() for _, m in done.base.linears())
    assert done.rows["quest"]["integers_differ"] == 0

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
