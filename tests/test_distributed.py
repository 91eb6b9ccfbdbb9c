"""Two processes on one machine against one, for model.py, quest.py, lrqat.py and pvtune.py.

torchrun starts one script that runs all of them, one after the other, over gloo on the CPU; each
process notes what it saw. The oracle is the same command as a single process: same losses, same
results. Also there: Ctrl-C, a loss that is not finite, who prints, writes and tokenizes.
"""
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed

import lrqat
import model
import nanobit.checkpoint
import nanobit.cli
import nanobit.data
import nanobit.ranks
import nanobit.train
import pvtune
import quest
import time_lrqat_memory
from model import UsageError

pytestmark = pytest.mark.slow                          # two processes, a dozen runs each
ROOT = pathlib.Path(__file__).parent.parent
SMALL = ["--data", "text.txt", "--vocab", "300", "--seq-len", "16", "--batch-size", "8", "--device",
         "cpu", "--accumulate", "4"]
JOBS = {  # folder: script, flags. A larger --lr makes QuEST's codes flip by the order of sums
    "dense": ("model", ["--steps", "5"]),
    "dense-fsdp": ("model", ["--steps", "5", "--fsdp"]),
    "tied-fsdp": ("model", ["--steps", "3", "--fsdp", "--tied"]),
    "quest": ("quest", ["--bits", "4", "--steps", "4", "--lr", "2e-4"]),
    "quest-fsdp": ("quest", ["--bits", "4", "--steps", "4", "--lr", "2e-4", "--fsdp"]),
    "taught": ("quest", ["--bits", "4", "--steps", "4", "--model", "dense/base.pt"]),
    "taught-fsdp": ("quest", ["--bits", "4", "--steps", "4", "--model", "dense/base.pt", "--fsdp"]),
    "lrqat": ("lrqat", ["--bits", "2", "--steps", "3", "--rank", "4", "--model", "dense/base.pt",
                        "--eval-every", "2"]),
    "pvtune": ("pvtune", ["--bits", "2", "--variant", "pv", "--steps", "4", "--code-lr", "1",
                          "--tau", "0.05", "--model", "dense/base.pt"]),
}
TINY = model.Preset(2, 64, 4, 128, 2e-3, 400, 16, 1, 128)                  # smaller still
CHILD = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, model
import test_distributed
torch.set_num_threads(1)
test_distributed.child()
"""

def command(script, flags, out):
    """Run a script's main in this process, as from the command line."""
    sys.argv = [f"{script}.py", *SMALL, *flags, "--out", out]
    {"model": nanobit.cli, "quest": quest, "lrqat": lrqat, "pvtune": pvtune}[script].main()

def child():
    """All that one rank does; what it saw goes to rank<r>.json."""
    model.PRESETS["tiny"] = TINY
    rank, seen = nanobit.ranks.rank(), {"tokenized": 0}
    tokenize, step = nanobit.data.tokenize, nanobit.train.train_step
    def counted(*args):
        seen["tokenized"] += 1
        return tokenize(*args)
    def interrupted(net, optimizer, data, args, i):
        if i == 1 and rank == 1:                       # one rank hears of it
            STOP.append(True)
        return step(net, optimizer, data, args, i)
    def poisoned(net, optimizer, data, args, i):
        loss, gnorm = step(net, optimizer, data, args, i)
        return loss * math.nan if i == 1 else loss, gnorm
    def noted(optimizer):
        pv_step(optimizer)
        seen["codes"].append([hashlib.sha256(form.codes.numpy().tobytes()).hexdigest()
                              for form, _ in optimizer.stacks])
        seen["changed"] = optimizer.changed()
    seen["codes"], pv_step, pvtune.PVOptimizer.step = [], pvtune.PVOptimizer.step, noted
    nanobit.data.tokenize, STOP = counted, nanobit.train.STOP
    for name, (script, flags) in JOBS.items():
        command(script, flags, name)
    for name, first in (("stop", ["--fsdp"]), ("stop-fsdp", [])):          # stop as one, resume
        nanobit.train.train_step = interrupted                 # as the other
        try:
            command("model", ["--steps", "5", *first], name)
        except SystemExit as e:
            seen[name] = e.code
        nanobit.train.train_step = step
        held = nanobit.checkpoint.read_checkpoint(f"{name}/base.pt.state")
        seen[f"{name}-held"] = len(held["losses"])
        fsdp = [] if first else ["--fsdp"]
        command("model", ["--steps", "5", "--resume", *fsdp], name)
    nanobit.train.train_step = poisoned
    try:
        command("model", ["--steps", "5"], "nan")
    except UsageError as e:
        seen["nan"] = str(e)
    pathlib.Path(f"rank{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of both runs: a/ with two processes, b/ with one."""
    home = tmp_path_factory.mktemp("ranks")
    text = "".join(f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}.\n" for i in range(1500))
    for name in "ab":
        (home / name).mkdir()
        (home / name / "text.txt").write_text(text)
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"))
    (home / "child.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "../child.py"], cwd=home / "a", env=os.environ | {"XDG_CACHE_HOME": str(home / "cache")},
        capture_output=True, text=True)
    (home / "out").write_text(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(home / "cache"))
        m.chdir(home / "b")
        m.setattr(sys, "argv", [])
        m.setitem(model.PRESETS, "tiny", TINY)
        for name, (script, flags) in JOBS.items():
            if not name.endswith("-fsdp") or name == "tied-fsdp":
                command(script, [f for f in flags if f != "--fsdp"], name)
    return home

def notes(folder):
    return [json.loads((folder / "a" / f"rank{r}.json").read_text()) for r in range(2)]

def rows(folder, name):
    return [json.loads(line) for line in (folder / name / "results.jsonl").open()]

@pytest.mark.parametrize("job, file", [
    ("dense", "base.pt"), ("dense-fsdp", "base.pt"), ("tied-fsdp", "base.pt"),
    ("quest", "quest-w4a4.pt"), ("quest-fsdp", "quest-w4a4.pt"), ("taught", "quest-w4a4.pt"),
    ("taught-fsdp", "quest-w4a4.pt"), ("stop", "base.pt"), ("stop-fsdp", "base.pt")])
def test_two_processes_train_as_one_does(folder, job, file):
    """Also after Ctrl-C in one of them, and a --resume that adds or drops --fsdp."""
    alone = job if job == "tied-fsdp" else job.removesuffix("-fsdp")
    alone = "dense" if alone == "stop" else alone
    two, one = (nanobit.checkpoint.read_checkpoint(folder / home / name / f"{file}.state")
                for home, name in (("a", job), ("b", alone)))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4) and len(one["losses"]) >= 3
    if not job.startswith("taught"):                   # a near random base has little to teach
        assert one["losses"][0] - one["losses"][-1] > 0.01                 # it learns
    for name, w in one["model"].items():               # whole weights, whoever wrote them
        assert torch.allclose(two["model"][name], w, atol=1e-3), name
    got, want = rows(folder / "a", job), rows(folder / "b", alone)
    assert len(got) == 1 and got[0]["val_loss"] == pytest.approx(want[0]["val_loss"], abs=1e-4)
    loaded = nanobit.checkpoint.load_checkpoint(folder / "a" / job / file)[0].state_dict()
    packed = nanobit.checkpoint.load_checkpoint(folder / "b" / alone / file)[0].state_dict()
    assert {n: w.shape for n, w in loaded.items()} == {n: w.shape for n, w in packed.items()}

def test_every_arm_of_lrqat_is_the_same_with_two_processes(folder):
    (two,), (one,) = rows(folder / "a", "lrqat"), rows(folder / "b", "lrqat")
    two, one = ({arm: row["val_loss"] for arm, row in r["arms"].items()} for r in (two, one))
    assert two == pytest.approx(one, abs=1e-4)
    assert len(set(one.values())) == len(lrqat.ARMS) - 1                   # no "dense, longer"

def test_codes_are_the_same_on_every_rank_after_every_pv_step(folder):
    one, two = notes(folder)
    assert one["codes"] == two["codes"] and len(one["codes"]) == 4 and one["changed"] > 100
    states = [folder / home / "pvtune" / "pvtune-2x4g4-pv.state" for home in "ab"]
    two, one = map(nanobit.checkpoint.read_checkpoint, states)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)

def test_ctrl_c_in_one_process_and_a_bad_loss_stop_both(folder):
    for seen in notes(folder):
        assert [seen[name] for name in ("stop", "stop-held", "stop-fsdp", "stop-fsdp-held")] == [
            130, 2, 130, 2]
        assert "not finite at step 2" in seen["nan"]

def test_one_process_prints_writes_and_tokenizes(folder):
    # lrqat.py takes the base's tokenizer: other settings, so once more
    assert [seen["tokenized"] for seen in notes(folder)] == [1, 0]
    out, runs = (folder / "out").read_text(), len(JOBS) + 5
    for once_a_run in ("settings: ", "data: text.txt | ", "in each of 2 processes | torch "):
        assert out.count(once_a_run) == runs, once_a_run
    assert not list(folder.rglob("*.tmp"))

def test_what_processes_cannot_share_is_one_error(monkeypatch):
    def error(*flags, script=nanobit.cli.pretrain):
        with pytest.raises(UsageError) as e:
            script([*flags, "--device", "cpu"])
        assert "\n" not in str(e.value)
        return str(e.value)
    assert "--fsdp" in error("--fsdp") and "torchrun" in error("--fsdp")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--batch-size 16 is not a multiple of torchrun's 3 processes" in error()
    assert "torchrun" in error("base.pt", script=nanobit.cli.eval_checkpoint)
    assert "--quantizer lsq" in error("--quantizer", "lsq", "--fsdp", script=quest.parse_args)
    assert "plain python" in error(script=time_lrqat_memory.parse_args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for device, wrong in (("cuda", "more than the 1 GPUs"), ("cuda:0", "--device cuda:0")):
        with pytest.raises(UsageError, match=wrong):
            nanobit.cli.pretrain(["--device", device])
