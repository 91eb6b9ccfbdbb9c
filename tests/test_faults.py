"""What goes wrong in the middle: kill -9, Ctrl-C, two runs at once, too little memory, files of
other runs. The oracle is a run that nobody disturbed, compared bit for bit, and the files' bytes.

Single faults of a checkpoint file (flipped bits, code in a pickle, a full disk) are in
test_model.py, mistakes on the command line in test_cli.py. Killed runs are real processes.
"""
import errno
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import lrqat
import model
import normtweak
import quest
from conftest import TEXT, call, check_refused

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = {"model.py": model, "quest.py": quest, "normtweak.py": normtweak, "lrqat.py": lrqat}
TRAIN = "--data text.txt --vocab 300 --out out --eval-every 1"
PRESET = model.Preset(2, 128, 2, 256, 4e-3, 12, 4, 2, 16)      # its state file has 4 MB
CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, model
torch.set_num_threads(1)
model.PRESETS["tiny"] = model.Preset(*{tuple(PRESET)!r})
model.run(model.main)
"""

@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                           # as in the child: the same sums
    monkeypatch.setitem(model.PRESETS, "tiny", PRESET)
    monkeypatch.setitem(model.PRESETS, "30M", PRESET._replace(n_layer=1))
    monkeypatch.setattr(model, "HELD", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pathlib.Path("text.txt").write_text(TEXT)
    yield
    torch.set_num_threads(threads)
    new_process()
    for child in CHILDREN:
        child.kill()

def new_process():
    """After this, model.py no longer counts the locks of earlier calls as its own."""
    held = list(model.HELD.values())
    model.HELD.clear()
    for descriptor in filter(None, held):
        os.close(descriptor)

CHILDREN = []

def start(flags):
    CHILDREN.append(subprocess.Popen([sys.executable, "-c", CHILD, *shlex.split(flags)],
                                     stdout=open("child.log", "a"), stderr=subprocess.STDOUT))
    return CHILDREN[-1]

def wait_for(condition, child, seconds=60):
    """Poll without a pause; the child must not end before."""
    limit = time.time() + seconds
    while not condition():
        assert child.poll() is None and time.time() < limit, pathlib.Path("child.log").read_text()

def kill(child):
    child.kill()
    assert child.wait() == -signal.SIGKILL

def steps_saved(path="out/base.pt.state"):
    return len(model.read_checkpoint(path)["losses"]) if os.path.exists(path) else 0

def unfinished():
    return list(pathlib.Path("out").glob("*.tmp"))

def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

# ---- kill -9 and Ctrl-C -----------------------------------------------------------------------

def test_killed_again_and_again_the_weights_end_bit_identical(capsys):
    """Killed in the first steps, then while a later checkpoint is being written (its unfinished
    file is the proof); each time --resume goes on from the last state that was complete."""
    train = f"{TRAIN} --steps 40"
    assert call(capsys, f"model.py {train.replace('--out out', '--out whole')}")[0] == 0
    child = start(train)
    wait_for(lambda: os.path.exists("out/base.pt.state"), child)
    kill(child)
    first, left = steps_saved(), set()
    assert 1 <= first < 40
    while not left:                                    # a poll may come too late: once more
        known = set(unfinished())
        child = start(f"{train} --resume")
        wait_for(lambda: steps_saved() > first + 3, child)
        wait_for(lambda: set(unfinished()) - known, child)
        kill(child)
        left, second = set(unfinished()) - known, steps_saved()
        assert first + 3 < second < 40
        first = second
    status, out, err = call(capsys, f"model.py {train} --resume")
    assert status == 0 and f"resumed out/base.pt.state at step {second}/40" in out, err
    assert not unfinished()                            # what a killed run left is gone
    for name in ("base.pt", "base.pt.state"):
        a, b = (model.read_checkpoint(f"{folder}/{name}") for folder in ("whole", "out"))
        for key in {"model", "optimizer", "losses", "tokenizer"} & set(a):
            assert equal(a[key], b[key]), (name, key)

def test_ctrl_c_saves_and_says_how_to_resume():
    child = start(f"{TRAIN} --steps 100000 --eval-every 0")
    wait_for(lambda: "step    1/" in pathlib.Path("child.log").read_text(), child)
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130
    last = pathlib.Path("child.log").read_text().splitlines()[-1]
    assert last == (f"interrupted: out/base.pt.state holds step {steps_saved()}; go on with the "
                    "same command and --resume")

class Clock:
    """Stands for a module `time` whose every clock shows `now`."""

    def __init__(self):
        self.now = 1000.0

    def __getattr__(self, name):
        return lambda *_: self.now

def test_the_state_is_saved_once_a_minute(capsys, monkeypatch):
    """Steps of 25 s, no look at the dev split: after 75, 150, 225 s and so on, and at the end."""
    clock, saved = Clock(), []
    step, save = model.train_step, model.save_checkpoint
    def slow_step(*args):
        clock.now += 25
        return step(*args)
    def note(path, *args, **content):
        saved.append(len(content["losses"]) if "losses" in content else "result")
        save(path, *args, **content)
    monkeypatch.setattr(model, "time", clock)
    monkeypatch.setattr(model, "train_step", slow_step)
    monkeypatch.setattr(model, "save_checkpoint", note)
    flags = TRAIN.replace("--eval-every 1", "--eval-every 0")
    assert call(capsys, f"model.py {flags} --steps 10")[0] == 0
    assert saved == [3, 6, 9, 10, "result"]

def test_the_seconds_of_a_resumed_run_are_those_of_all_its_steps(capsys, monkeypatch):
    """Ten steps of 25 s, Ctrl-C in the fourth and the eighth; hours between commands do not
    count."""
    clock, step, stops = Clock(), model.train_step, [3, 7]
    def slow_step(forward, optimizer, data, args, i):
        clock.now += 25
        if i in stops:
            stops.remove(i)
            os.kill(os.getpid(), signal.SIGINT)
        return step(forward, optimizer, data, args, i)
    monkeypatch.setattr(model, "time", clock)
    monkeypatch.setattr(model, "train_step", slow_step)
    train = f"model.py {TRAIN} --steps 10"
    for more, seconds in (("", 100), (" --resume", 200)):
        assert call(capsys, train + more)[0] == 130
        assert model.read_checkpoint("out/base.pt.state")["seconds"] == pytest.approx(seconds)
        clock.now += 9999
    status, out, err = call(capsys, f"{train} --resume")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["seconds"] == pytest.approx(250)

def test_a_base_interrupted_inside_another_script_goes_on_with_resume(capsys, monkeypatch):
    """normtweak.py keeps no state of its own, but the base that it trains first does."""
    flags = "--data text.txt --vocab 300 --bits 3 --calib data"
    assert call(capsys, f"normtweak.py {flags} --out whole --steps 2")[0] == 0
    step = model.train_step
    def interrupted(forward, optimizer, data, args, i):
        if i == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(forward, optimizer, data, args, i)
    monkeypatch.setattr(model, "train_step", interrupted)
    status, out, _ = call(capsys, f"normtweak.py {flags} --out out --steps 2")
    assert status == 130 and "holds step 5; go on with the same command and --resume" in out
    monkeypatch.setattr(model, "train_step", step)
    status, out, err = call(capsys, f"normtweak.py {flags} --out out --steps 2 --resume")
    assert status == 0 and "at step 5/12" in out, err
    for name in ("base.pt", "gptq-tweak-w3.pt"):
        a, b = (model.read_checkpoint(f"{folder}/{name}")["model"] for folder in ("whole", "out"))
        assert equal(a, b)
    check_refused(call(capsys, f"normtweak.py {flags} --out out --resume"), "--resume")

# ---- Two runs at once -------------------------------------------------------------------------

def test_a_second_run_into_out_is_refused_until_the_first_one_dies(capsys):
    assert call(capsys, f"model.py {TRAIN} --steps 2")[0] == 0
    new_process()
    child = start(f"{TRAIN} --steps 100000 --eval-every 0")
    wait_for(lambda: "step    1/" in pathlib.Path("child.log").read_text(), child)
    files = {p: p.read_bytes() for p in pathlib.Path("out").iterdir()}
    for command in (f"model.py {TRAIN}", f"model.py {TRAIN} --steps 2 --resume",
                    f"quest.py {TRAIN}", f"normtweak.py {TRAIN} --calib data",
                    f"lrqat.py {TRAIN} --steps 2", f"model.py {TRAIN} --out ./out/../out"):
        check_refused(call(capsys, command), "--out", "in use by another run")
    for command in ("model.py eval out/base.pt", "model.py sample out/base.pt --tokens 2",
                    f"model.py {TRAIN} --smoke", f"model.py {TRAIN} --steps 1 --out other"):
        assert call(capsys, command)[0] == 0, command
    assert files == {p: p.read_bytes() for p in pathlib.Path("out").iterdir() if p.is_file()}
    kill(child)
    status, _, err = call(capsys, f"model.py {TRAIN} --steps 2")
    assert status == 0, err

def test_one_process_may_use_out_many_times(capsys):
    """A script that trains the base first, and scripts one after the other."""
    flags = "--data text.txt --vocab 300 --out out --steps 2"
    tweak = f"normtweak.py {flags} --calib data"
    for command in (tweak, f"{tweak} --smoke", f"quest.py {flags}", f"model.py {flags}"):
        status, _, err = call(capsys, command)
        assert status == 0, err

def test_without_locks_a_run_goes_on_and_says_so(capsys, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")
    monkeypatch.setattr(model.fcntl, "flock", no_locks)
    status, out, _ = call(capsys, f"model.py {TRAIN} --steps 1")
    assert status == 0 and "start no second run into it" in out
    new_process()
    monkeypatch.setattr(model, "fcntl", None)          # Windows
    assert call(capsys, f"model.py {TRAIN} --steps 1")[0] == 0
    model.HELD.clear()

# ---- Files of other runs, damaged files -------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a finished run of model.py, and one of quest.py with the same shapes."""
    path = tmp_path_factory.mktemp("finished")
    (path / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(path)
        m.setenv("XDG_CACHE_HOME", str(path / "cache"))
        m.setitem(model.PRESETS, "tiny", PRESET)
        for script in ("model.py", "quest.py"):
            m.setattr(sys, "argv", [script, *TRAIN.split(), "--steps", "2"])
            SCRIPTS[script].main()
    return path / "out"

@pytest.fixture
def state(finished):
    shutil.copytree(finished, "out")
    return pathlib.Path("out/base.pt.state")

@pytest.mark.parametrize("command, source, name", [
    ("model.py TRAIN --steps 2 --resume --size 30M", "base.pt.state", "--size"),
    ("model.py TRAIN --steps 2 --resume", "quest-w4a4.pt.state", "--bits"),
    ("quest.py TRAIN --steps 2 --resume", "base.pt.state", "--bits"),
    ("quest.py TRAIN --steps 2 --resume --bits 2 --a-bits 4", "quest-w4a4.pt.state", "--bits"),
    ("model.py TRAIN --steps 2 --resume", "base.pt", "no training state"),
    ("model.py TRAIN --size 30M --model out/base.pt", None, "--size 30M"),
    ("lrqat.py TRAIN --steps 2 --model out/quest-w4a4.pt", None, "out/quest-w4a4.pt"),
    ("normtweak.py TRAIN --model out/quest-w4a4.pt", None, "out/quest-w4a4.pt")])
def test_a_file_of_another_preset_or_method_is_refused(state, capsys, command, source, name):
    if source:
        target = ("base.pt.state" if command.startswith("model.py") else
                  "quest-w2a4.pt.state" if "--bits 2" in command else "quest-w4a4.pt.state")
        pathlib.Path("out", target).write_bytes(pathlib.Path("out", source).read_bytes())
    before = {p: p.read_bytes() for p in pathlib.Path("out").iterdir()}
    check_refused(call(capsys, command.replace("TRAIN", TRAIN)), name)
    assert before == {p: p.read_bytes() for p in pathlib.Path("out").iterdir()}

def test_a_state_that_was_cut_anywhere_is_refused_and_kept(state, capsys):
    whole = state.read_bytes()
    for length in {0, 1, 100, len(whole) // 2, len(whole) - 1,
                   *np.random.default_rng(0).integers(0, len(whole), 10).tolist()}:
        state.write_bytes(whole[:length])
        check_refused(call(capsys, f"model.py {TRAIN} --steps 2 --resume"), "out/base.pt.state")
        assert state.read_bytes() == whole[:length]

@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can fill")
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unwritable_folder_is_refused_before_any_step(state, capsys, monkeypatch, script):
    monkeypatch.setattr(model, "train_step", None)     # calling it would fail otherwise
    model_flag = "--model out/base.pt " if script in ("normtweak.py", "lrqat.py") else ""
    flags = TRAIN.replace("--out out", "--out /proc/nanobit")
    check_refused(call(capsys, f"{script} {model_flag}{flags}"), "--out /proc/nanobit")

# ---- Too little memory ------------------------------------------------------------------------

def cuda_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nMore\nlines")

@pytest.mark.parametrize("fail", [lambda: torch.empty(2**50), lambda: np.empty(2**50), cuda_error],
                         ids=["torch on a CPU", "numpy", "a GPU"])
def test_too_little_memory_says_the_peak_the_batch_and_the_flag(capsys, monkeypatch, fail):
    monkeypatch.setattr(model, "train_step", lambda *_: fail())
    result = call(capsys, f"model.py {TRAIN} --batch-size 12 --accumulate 3")
    check_refused(result, "out of memory after a peak of ", " GiB ", "--batch-size 12",
                  "4 windows of 16 tokens at a time", "raise --accumulate 3", "lower --batch-size")
    peak = float(result[2].split("peak of ")[1].split()[0])
    assert 0.05 < peak < 200                           # of this process, in GiB
    check_refused(call(capsys, f"model.py {TRAIN} --batch-size 2 --accumulate 2"),
                  "1 windows of 16 tokens", "; lower --batch-size")

def test_too_little_memory_in_eval_names_its_flag(state, capsys, monkeypatch):
    monkeypatch.setattr(model, "evaluate", lambda *_: torch.empty(2**50))
    check_refused(call(capsys, "model.py eval out/base.pt"), "out of memory", "lower --batch-size")

def test_any_other_error_keeps_its_traceback():
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        model.run(fail)
