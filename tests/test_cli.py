"""The command lines of model.py and quest.py: what users mistype, and the main jobs.

A mistake must end in status 2 and one line on stderr that names the flag or the file, with no file
changed. A main job's packed file must score what the run printed, and write the text it printed.
All scripts run in this process.
"""
import errno
import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import nanobit.cli
import model
import nanobit.checkpoint
import nanobit.data
import nanobit.generate
import nanobit.tokenizer
import nanobit.train
import quest
from conftest import TEXT, call, check_refused
from quantizers import QuantLinear

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = {"model.py": nanobit.cli, "quest.py": quest}
TRAIN = "--data text.txt --vocab 300 --out out"
KEYS = """method w_bits a_bits bpw group_size val_loss val_ppl bits_per_byte base_val_loss
          bytes_dense bytes_packed params tokens seconds device seed command""".split()

@pytest.fixture(scope="module", autouse=True)
def small_and_offline(tmp_path_factory):
    """A preset that trains in a second; no network; a cache of our own."""
    with pytest.MonkeyPatch.context() as m:
        m.setitem(model.PRESETS, "tiny", model.Preset(1, 64, 2, 128, 4e-3, 8, 4, 2, 16))
        m.setattr(sys, "argv", [])
        m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        m.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        m.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
        m.setenv("no_proxy", "127.0.0.1")
        yield

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, good checkpoints and everything that a user may give by mistake."""
    path = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as m, open(path / "printed", "w") as printed:
        m.chdir(path)
        m.setattr(sys, "stdout", printed)
        pathlib.Path("text.txt").write_text(TEXT)
        for script in SCRIPTS:
            m.setattr(sys, "argv", [script, *TRAIN.split()])
            SCRIPTS[script].main()
        good = pathlib.Path("out/base.pt").read_bytes()
        bad = {"empty.txt": b"", "short.txt": b"def f(x):\n", "latin.txt": b"caf\xe9 " * 99,
               "binary.txt": b"GIF89a\0\1\2" * 99, "empty.pt": b"", "text.pt": b"not a model\n",
               "cut.pt": good[:len(good) // 2], "flipped.pt": bytearray(good)}
        bad["flipped.pt"][len(good) // 2] ^= 4
        for name, content in bad.items():
            pathlib.Path(name).write_bytes(content)
        for name in ("nothing", "pictures", "damaged"):
            pathlib.Path(name).mkdir()
            (pathlib.Path(name) / "results.jsonl").touch()
        pathlib.Path("pictures/a.png").write_bytes(b"\x89PNG")
        shutil.copy("cut.pt", "damaged/quest-w4a4.pt.state")
        torch.save({"state_dict": {"w": torch.zeros(3)}}, "foreign.pt")
        torch.save([1, 2, 3], "list.pt")
        content = nanobit.checkpoint.read_checkpoint("out/base.pt")
        content["model"]["head.weight"] = torch.zeros(7, 64)
        torch.save(content, "shape.pt")
        yield path

@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"

def snapshot(path):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}

# ---- Mistakes: flags after TRAIN, or a whole command; what the message must name ---------------

TRAINING = [
    ("--steps 0", "--steps"), ("--steps 1.5", "--steps"), ("--lr 0", "--lr"), ("--lr nan", "--lr"),
    ("--lr 11", "--lr"), ("--batch-size 0", "--batch-size"), ("--batch-size x", "--batch-size"),
    ("--accumulate 0", "--accumulate"), ("--batch-size 6 --accumulate 4", "--accumulate 4"),
    ("--seq-len 1", "--seq-len"), ("--seq-len 99999", "--seq-len"), ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"), ("--eval-every -1", "--eval-every"),
    ("--size 31M", "--size"), ("--dtype float16", "--dtype"), ("--stepz 3", "--stepz"),
    ("stray", "stray"), ("--data", "--data"),
    ("--device nonsense", "--device nonsense"), ("--device meta", "--device meta"),
    ("--data nowhere.txt", "nowhere.txt"), ("--data empty.txt", "empty.txt"),
    ("--data nothing", "nothing"), ("--data pictures", "pictures"), ("--data ''", "--data"),
    ("--data binary.txt", "binary.txt"), ("--data latin.txt", "latin.txt"),
    ("--data http://127.0.0.1:9/", "http://127.0.0.1:9/"),
    ("--data 'http://127.0.0.1:9/a b'", "--data"), ("--data ftp://127.0.0.1/", "--data"),
    ("--vocab 256", "--vocab 256"), ("--vocab -3", "--vocab -3"), ("--vocab=--3", "--vocab"),
    ("--vocab no-such-encoding", "no-such-encoding"), ("--vocab gpt2", "--vocab gpt2"),
    ("--out text.txt", "--out text.txt"), ("--out text.txt/below", "--out text.txt/below"),
    ("--out ''", "--out"), ("--out nothing --resume", "nothing/base.pt.state"),
    ("--resume --lr 0.5", "--lr"), ("--resume --data short.txt --vocab 400", "--data short.txt"),
    ("--resume --tied", "--tied"), ("--model nowhere.pt", "nowhere.pt"),
    ("--model cut.pt", "cut.pt"), ("--model shape.pt", "head.weight"),
    ("--model out/quest-w4a4.pt", "out/quest-w4a4.pt"),
    ("--model out/base.pt --vocab 301", "--vocab"), ("--model out/base.pt --size 30M", "--size")]

QUEST = [
    ("--bits 0", "--bits"), ("--bits 5.5", "--bits"), ("--bits 9", "--bits"),
    ("--bits abc", "--bits"), ("--bits nan", "--bits"), ("--a-bits 0", "--a-bits"),
    ("--a-bits 1.5", "--a-bits"), ("--bits 16 --a-bits 4", "--a-bits"),
    ("--bits 16 --quantizer ste", "--quantizer"),
    ("--grid fp4 --bits 2", "--bits 2"), ("--grid fp4 --a-bits 8", "--a-bits 8"),
    ("--grid nf4", "--grid"), ("--grid sparse --bits 1.58", "--grid sparse"),
    ("--quantizer lsq --bits 1.58", "--quantizer lsq"),
    ("--quantizer lsq --grid fp4", "--quantizer lsq"), ("--quantizer gptq", "--quantizer"),
    ("--quantizer lsq --fsdp", "--quantizer lsq"),
    ("--out damaged --resume", "damaged/quest-w4a4.pt.state")]

CHECKPOINTS = [
    ("model.py eval", "checkpoint"), ("model.py eval nowhere.pt", "nowhere.pt"),
    ("model.py eval nothing", "nothing"), ("model.py eval empty.pt", "empty.pt"),
    ("model.py eval text.pt", "text.pt"), ("model.py eval cut.pt", "cut.pt"),
    ("model.py eval flipped.pt", "flipped.pt"), ("model.py eval foreign.pt", "foreign.pt"),
    ("model.py eval list.pt", "list.pt"), ("model.py eval shape.pt", "head.weight"),
    ("model.py eval out/base.pt.state", "base.pt.state"),
    ("model.py eval out/base.pt --data nowhere.txt", "nowhere.txt"),
    ("model.py eval out/base.pt --batch-size 0", "--batch-size"),
    ("model.py eval out/base.pt --steps 3", "--steps"),
    ("model.py sample flipped.pt", "flipped.pt"), ("model.py sample shape.pt", "head.weight"),
    ("model.py sample out/base.pt --tokens 0", "--tokens"),
    ("model.py sample out/base.pt --top-k 0", "--top-k"),
    ("model.py sample out/base.pt --temperature -1", "--temperature"),
    ("model.py sample out/base.pt --temperature inf", "--temperature"),
    ("model.py sample out/base.pt --seed 99999999999999999999", "--seed")]

MISTAKES = ([(f"model.py {TRAIN} {row}", name) for row, name in TRAINING]
            + [(f"quest.py {TRAIN} {row}", name) for row, name in QUEST] + CHECKPOINTS)

@pytest.mark.parametrize("command, name", MISTAKES, ids=[c.replace(TRAIN, "") for c, _ in MISTAKES])
def test_a_mistake_is_one_line_and_changes_nothing(work, capsys, command, name):
    before = snapshot(work)
    check_refused(call(capsys, command), name)
    assert snapshot(work) == before

@pytest.mark.parametrize("row, name", [
    ("--data nowhere.txt", "nowhere.txt"), ("--data short.txt", "short.txt"),
    ("--vocab 100", "--vocab"), ("--model nowhere.pt", "nowhere.pt"), ("--resume", "state")])
def test_a_mistake_leaves_no_new_folder(work, capsys, row, name):
    before = snapshot(work)
    check_refused(call(capsys, f"quest.py {TRAIN} --out new {row}"), name)
    assert snapshot(work) == before

def test_too_short_a_text_says_how_many_tokens_it_has_and_needs(work, capsys):
    for seq_len in (16, 50):
        result = call(capsys, f"model.py {TRAIN} --data short.txt --seq-len {seq_len} --vocab 257")
        check_refused(result, "--data short.txt is too short")
        assert re.search(rf"\b1?\d tokens.* {seq_len + 1};", result[2])    # of ten bytes

@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(work, capsys):
    check_refused(call(capsys, f"quest.py {TRAIN} --device cuda"), "--device cuda")
    check_refused(call(capsys, "model.py sample out/base.pt --device cuda"), "--device cuda")

@pytest.mark.parametrize("command", ["model.py", "model.py eval", "model.py sample", "quest.py"])
def test_help_is_there_for_every_command(capsys, command):
    status, out, err = call(capsys, f"{command} --help")
    assert status == 0 and f"usage: {command}" in out and "--seed" in out and err == ""

# ---- Trouble on the way -----------------------------------------------------------------------

@pytest.mark.parametrize("script, what", [("model.py", "weight"), ("quest.py", "gradient")])
def test_nan_stops_the_run_names_the_step_and_keeps_the_last_state(
        work, capsys, monkeypatch, script, what):
    step = nanobit.train.train_step
    def poisoned(forward, optimizer, data, args, i):
        if what == "weight" and i == 5:
            forward.head.weight.data[0, 0] = torch.nan
        loss, gnorm = step(forward, optimizer, data, args, i)
        return loss, gnorm * (torch.inf if what == "gradient" and i == 5 else 1)
    monkeypatch.setattr(nanobit.train, "train_step", poisoned)
    shutil.rmtree("out")
    result = call(capsys, f"{script} {TRAIN} --eval-every 4")
    check_refused(result, "step 6")
    left = [p for p in work.joinpath("out").iterdir() if p.name != "results.jsonl"]
    assert len(left) == 1 and str(left[0].name) in result[2]
    assert len(nanobit.checkpoint.read_checkpoint(str(left[0]))["losses"]) == 4

@pytest.mark.parametrize("full", ["base.pt.state", "base.pt", "results.jsonl"])
def test_a_full_disk_is_one_line_and_keeps_old_files(work, capsys, monkeypatch, full):
    save, out = torch.save, work / "out"
    def save_or_fail(content, f):
        if full == ("base.pt.state" if "optimizer" in content else "base.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, f)
    monkeypatch.setattr(torch, "save", save_or_fail)
    if full == "results.jsonl":                        # every write to /dev/full fails like that
        (out / full).unlink()
        (out / full).symlink_to("/dev/full")
    before = {p: p.read_bytes() for p in (out / "base.pt.state", out / "base.pt")}
    check_refused(call(capsys, f"model.py {TRAIN} --lr 1e-3"), "No space left on device")
    assert {p.name for p in before if p.read_bytes() == before[p]} == {
        "base.pt.state": {"base.pt.state", "base.pt"}, "base.pt": {"base.pt"}}.get(full, set())
    assert not list(out.glob("*.tmp"))

# ---- Main jobs --------------------------------------------------------------------------------

# 40,960 weights in 576 rows a block: 576 * 32 / 40960 = 0.45 bits of scale for every weight
JOBS = [("--bits 4", 4.45), ("--bits 1 --embed-bits 4 --tied", 1.45),
        ("--bits 3 --embed-bits 16", 3.45), ("--bits 1.58", 1.625 + 0.45),
        pytest.param("--bits 2 --grid sparse", 2 / 2 + 1 / 2 + 0.45, marks=pytest.mark.slow),
        pytest.param("--grid fp4", 4.45, marks=pytest.mark.slow),
        ("--a-bits 16", 4.45), ("--bits 3 --quantizer lsq", 3 + 7 * 2 * 32 / 40960),
        ("--bits 16", 16.0)]

@pytest.mark.parametrize("flags, bpw", JOBS)
def test_main_job_packs_what_it_trained(work, capsys, flags, bpw):
    rows = pathlib.Path("out/results.jsonl").read_text()
    status, out, err = call(capsys, f"quest.py {TRAIN} {flags} --seed 3")
    assert status == 0 and err == ""
    last = out.splitlines()[-1]
    row, args = json.loads(last), quest.parse_args(f"{TRAIN} {flags}".split())
    assert pathlib.Path("out/results.jsonl").read_text() == rows + last + "\n"
    assert set(KEYS) <= row.keys() and row["command"] == f"python quest.py {TRAIN} {flags} --seed 3"
    assert (row["w_bits"], row["a_bits"], row["seed"]) == (args.bits, args.a_bits, 3)
    assert row["bpw"] == pytest.approx(bpw, abs=1e-6)
    assert row["tokens"] == args.steps * args.batch_size * args.seq_len
    assert row["linear_params"] == 40960               # the scaling law's N: no embedding, no head
    tables = 1 if args.tied else 2                     # embedding and head
    assert row["params"] == 40960 + tables * 300 * 64 + 3 * 64             # those, and the norms
    assert row["val_ppl"] == pytest.approx(np.exp(row["val_loss"]), rel=1e-4)
    val = nanobit.data.load_data("text.txt", "300", 16).val
    held_out = TEXT[len(TEXT) * 19 // 20:].encode()
    bits = row["val_loss"] * (len(val) - 1) / np.log(2)
    # the first of its tokens, a few bytes, is never a target
    assert bits / len(held_out) <= row["bits_per_byte"] + 1e-4
    assert row["bits_per_byte"] <= bits / (len(held_out) - 8) + 1e-4
    if args.bits < 16:
        # Embedding and head have a float16 scale for each row; the norms are float32.
        rows = {4: 64 / 2 + 2, 8: 64 + 2, 16: 4 * 64}[args.embed_bits]
        other = tables * 300 * rows + 4 * 3 * 64
        assert row["bytes_packed"] == pytest.approx(other + bpw * 40960 / 8, abs=0.01)
        assert row["bytes_dense"] == 2 * row["params"]
    checkpoint = max(work.joinpath("out").glob("quest-*.pt" if args.quantizer == "quest" else
                     f"{args.quantizer}-*.pt"), key=os.path.getmtime)
    assert out.count("step ") >= 2 and re.search(r"eta \d+s", out)

    # The file's loss is the trained model's, but for what embedding and head cost.
    differs, why = re.search(r"^packed .* differs by ([^\s,]+)(.*)$", out, re.M).groups()
    packs = args.bits < 16 and args.embed_bits < 16
    assert why == f", by the embedding and head in {args.embed_bits} bits" * packs
    most = {4: 0.1, 8: 0.005, 16: 1e-4}[args.embed_bits if packs else 16]
    assert float(differs) < most
    assert ("embedding and head | " in out) == packs
    trained = float(re.search(r"^trained .* val loss (\d+\.\d+) ", out, re.M)[1])
    assert trained == pytest.approx(row["val_loss"], abs=most + 1e-4)      # four decimals
    ratio = float(re.search(r"after (\S+) training tokens per parameter of the linears", out)[1])
    assert ratio == pytest.approx(row["tokens"] / 40960, rel=0.006)        # three digits

    status, scored, err = call(capsys, f"model.py eval {checkpoint}")
    assert status == 0 and err == ""
    loss = float(re.search(r"loss (\d+\.\d{6})", scored)[1])
    assert loss == pytest.approx(row["val_loss"], abs=1e-4)

def test_lsqs_first_steps_come_from_training_text(work, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(quest, "lsq_calibrate", lambda m, x: seen.extend(x.tolist()))
    assert call(capsys, f"quest.py {TRAIN} --quantizer lsq --steps 1")[0] == 0
    ids = nanobit.data.load_data("text.txt", "300", 16).train.tolist()
    text = "," + ",".join(map(str, ids)) + ","
    assert len(seen) == 4                              # windows of 16 tokens
    for window in seen:
        assert "," + ",".join(map(str, window)) + "," in text

def test_a_smoke_runs_checkpoint_is_evaluated_on_the_few_files_that_it_read(work, capsys):
    """30 of 90, so that its validation split is another one than the whole folder's."""
    (work / "docs").mkdir()
    for i in range(90):
        (work / "docs" / f"{i:02}.txt").write_text(TEXT[99 * i:99 * i + 3000])
    train = "model.py --smoke --data docs --vocab 300 --seq-len 16 --out few"
    row = json.loads(call(capsys, train)[1].splitlines()[-1])
    status, out, _ = call(capsys, "model.py eval few/smoke/base.pt")
    assert status == 0 and "is not the text" not in out
    loss = float(re.search(r"loss (\d+\.\d{6})", out)[1])
    assert loss == pytest.approx(row["val_loss"], abs=1e-4)

def test_a_sample_repeats_the_text_that_the_run_printed(work, capsys):
    sample = "model.py sample out/quest-w4a4.pt --prompt 'def '"
    status, text, err = call(capsys, sample)
    assert status == 0 and err == "" and text.startswith("def ")
    # That run sampled before linears were joined, which sum in another order: the same numbers
    # come only from the same computation. That both are one function is in test_decode.py.
    m, content = nanobit.checkpoint.load_checkpoint("out/quest-w4a4.pt")
    enc = nanobit.tokenizer.make_tokenizer(content["tokenizer"])
    assert nanobit.generate.sample_text(m, enc, "def ", 200, 0) in (work / "printed").read_text()
    m = nanobit.generate.prepare(m)
    assert text == nanobit.generate.sample_text(m, enc, "def ", 200, 0) + "\n"
    assert call(capsys, f"{sample} --seed 1")[1] != text

def test_dense_pretraining_then_quest_from_its_checkpoint(work, capsys):
    status, out, _ = call(capsys, f"model.py {TRAIN} --seed 4")
    base = json.loads(out.splitlines()[-1])
    assert status == 0 and base["method"] == "dense" and set(KEYS) <= base.keys()
    status, out, _ = call(capsys, f"quest.py {TRAIN} --model out/base.pt --steps 1 --lr 1e-9")
    row = json.loads(out.splitlines()[-1])
    assert status == 0 and row["base_val_loss"] == pytest.approx(base["val_loss"], abs=1e-4)
    m, _ = nanobit.checkpoint.load_checkpoint("out/base.pt")        # the base, rounded
    m.replace_linears(lambda _, w: QuantLinear.quest(w.weight.detach(), 4, 4))
    loss = nanobit.train.evaluate(m, nanobit.data.load_data("text.txt", "300", 16).val, 16)["loss"]
    assert row["val_loss"] == pytest.approx(loss, abs=1e-3)
    assert abs(row["val_loss"] - base["val_loss"]) > 2e-3

def test_a_resumed_run_ends_in_the_same_file_and_row(work, capsys):
    whole = nanobit.checkpoint.read_checkpoint("out/quest-w4a4.pt")
    status, out, _ = call(capsys, f"quest.py {TRAIN} --resume")
    again = nanobit.checkpoint.read_checkpoint("out/quest-w4a4.pt")
    assert status == 0 and "resumed" in out
    assert all(torch.equal(whole["model"][n], again["model"][n]) for n in whole["model"])
    first, second = map(json.loads, pathlib.Path("out/results.jsonl").read_text().splitlines()[-2:])
    assert first["val_loss"] == second["val_loss"] and first["tokens"] == second["tokens"]

def test_a_rows_curve_is_the_means_of_equal_parts_of_the_steps():
    assert quest.curve([float(i) for i in range(80)]) == [2 * i + 0.5 for i in range(40)]
    assert quest.curve([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    losses = np.arange(103.0)
    uneven = [part.mean() for part in np.array_split(losses, 40)]
    assert quest.curve(losses.tolist()) == pytest.approx(uneven, abs=1e-4)

def test_pythons_own_tests_and_installed_packages_are_no_default_data(tmp_path, monkeypatch):
    """A given folder of the same names is read whole."""
    kept = ["a.py", "json/decoder.py", "idlelib/run.py", "unittest/case.py"]
    out = ["test/test_os.py", "json/tests/test_all.py", "idlelib/idle_test/mock.py",
           "site-packages/numpy/core.py", "dist-packages/apt.py"]
    for name in kept + out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(nanobit.data.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(nanobit.data.read_documents(None)[0]) == sorted(kept)
    assert sorted(nanobit.data.read_documents(str(tmp_path))[0]) == sorted(kept + out)

def test_a_checkpoint_brings_its_text_its_tokenizer_and_its_size(work, capsys):
    """As in the scripts that start from OUT/base.pt, no flag has to be repeated."""
    status, _, err = call(capsys, "quest.py --bits 4 --model out/base.pt --steps 1 --out new")
    assert status == 0, err
    read = nanobit.checkpoint.read_checkpoint
    base, new = read("out/base.pt"), read("new/quest-w4a4.pt")
    assert new["tokenizer"] == base["tokenizer"] and new["data"] == base["data"]
    for name in ("data", "size", "vocab", "tied"):
        assert new["settings"][name] == base["settings"][name]

def test_a_checkpoints_size_gives_the_settings_of_the_dense_control(tmp_path):
    """Steps and rates of 30M parameters do not suit 3M, and the other way round."""
    small = model.LLaMA(model.PRESETS["tiny"].config(300))
    for size in ("tiny", "30M"):
        path = str(tmp_path / f"{size}.pt")
        nanobit.checkpoint.save_checkpoint(path, small, settings={"size": size})
        args = quest.parse_args(["--bits", "16", "--model", path, "--device", "cpu"])
        assert (args.steps, args.lr) == (model.PRESETS[size].steps, model.PRESETS[size].lr)

# ---- Smoke runs ------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["model", "quest", "lrqat", "pvtune", "normtweak"])
def test_every_script_has_a_smoke_run_that_ends_with_its_row(work, capsys, script):
    status, out, err = call(capsys, f"{script}.py --smoke --data text.txt --vocab 300 --out new")
    assert status == 0, err
    row = json.loads(out.splitlines()[-1])
    assert set(KEYS) <= set(row) and row["val_loss"] > 0 and row["dev_loss"] > 0
    lines = pathlib.Path("new/smoke/results.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == row

def test_a_base_that_is_trained_first_is_as_the_script_is_told(work, capsys):
    status, _, err = call(capsys, "normtweak.py --smoke --tied --size 0.5M --host rtn "
                                  "--data text.txt --vocab 300 --out tied")
    assert status == 0, err
    config = nanobit.checkpoint.read_checkpoint("tied/smoke/base.pt")["config"]
    assert (config["tied"], config["n_embd"], config["vocab_size"]) == (True, 96, 300)

def test_smoke_runs_write_nothing_but_out_smoke(work, capsys):
    before = {p: p.read_bytes() for p in pathlib.Path("out").iterdir() if p.is_file()}
    status, out, err = call(capsys, f"quest.py --smoke {TRAIN}")
    assert status == 0 and err == ""
    assert before == {p: p.read_bytes() for p in pathlib.Path("out").iterdir() if p.is_file()}
    assert pathlib.Path("out/smoke/quest-w4a4.pt").exists()
