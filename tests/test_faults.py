"""What goes wrong in the middle: kill -9, Ctrl-C, two runs at once, too little memory, files of
other runs. The oracle is a run that nobody disturbed, compared bit for bit, and the files' bytes.

Single faults of a checkpoint file (flipped bits, code in a pickle, a full disk) are in
test_model.py, mistakes on the command line in test_cli.py. Killed runs are real processes.
"""
import errno
import importlib
import io
import json
import os
import pathlib
import re
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
import nanobit.checkpoint
import nanobit.cli
import nanobit.runs
import nanobit.train
import normtweak
import quest
from conftest import TEXT, call, check_refused, random_base
import quantizers
from quantizers import QuantLinear

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = {"model.py": nanobit.cli, "quest.py": quest, "normtweak.py": normtweak, "lrqat.py": lrqat}
TRAIN = "--data text.txt --vocab 300 --out out --eval-every 1"
PRESET = model.Preset(2, 128, 2, 256, 4e-3, 12, 4, 2, 16)      # its state file has 4 MB
CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, model, nanobit.cli
torch.set_num_threads(1)
model.PRESETS["tiny"] = model.Preset(*{tuple(PRESET)!r})
nanobit.cli.run(nanobit.cli.main)
"""

@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                           # as in the child: the same sums
    monkeypatch.setitem(model.PRESETS, "tiny", PRESET)
    monkeypatch.setitem(model.PRESETS, "30M", PRESET._replace(n_layer=1))
    monkeypatch.setattr(nanobit.runs, "HELD", {})
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
    held = list(nanobit.runs.HELD.values())
    nanobit.runs.HELD.clear()
    for descriptor in filter(None, held):
        os.close(descriptor)

CHILDREN = []

def start(flags):
    CHILDREN.append(subprocess.Popen([sys.executable, "-c", CHILD, *shlex.split(flags)],
                                     stdout=open("child.log", "a"), stderr=subprocess.STDOUT))
    return CHILDREN[-1]

def wait_for(condition, child, seconds=60):
    """Look every few milliseconds, so that the child has a processor; it must not end before."""
    limit = time.monotonic() + seconds
    while not condition():
        alive = child.poll() is None and time.monotonic() < limit
        assert alive, pathlib.Path("child.log").read_text()
        time.sleep(0.002)

def kill(child):
    child.kill()
    assert child.wait() == -signal.SIGKILL

def steps_saved(path="out/base.pt.state"):
    return len(nanobit.checkpoint.read_checkpoint(path)["losses"]) if os.path.exists(path) else 0

def unfinished():
    return list(pathlib.Path("out").glob("*.tmp"))

def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

# ---- kill -9 and Ctrl-C -----------------------------------------------------------------------

@pytest.mark.slow
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
        a, b = (nanobit.checkpoint.read_checkpoint(f"{folder}/{name}")
                for folder in ("whole", "out"))
        for key in {"model", "optimizer", "losses", "tokenizer"} & set(a):
            assert equal(a[key], b[key]), (name, key)

@pytest.mark.slow
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
    step, save = nanobit.train.train_step, nanobit.checkpoint.save_checkpoint
    def slow_step(*args):
        clock.now += 25
        return step(*args)
    def note(path, *args, **content):
        saved.append(len(content["losses"]) if "losses" in content else "result")
        save(path, *args, **content)
    monkeypatch.setattr(nanobit.train, "time", clock)
    monkeypatch.setattr(nanobit.train, "train_step", slow_step)
    for room in (nanobit.train, nanobit.runs):
        monkeypatch.setattr(room, "save_checkpoint", note)
    flags = TRAIN.replace("--eval-every 1", "--eval-every 0")
    assert call(capsys, f"model.py {flags} --steps 10")[0] == 0
    assert saved == [3, 6, 9, 10, "result"]

def test_the_seconds_of_a_resumed_run_are_those_of_all_its_steps(capsys, monkeypatch):
    """Ten steps of 25 s, Ctrl-C in the fourth and the eighth; hours between commands do not
    count."""
    clock, step, stops = Clock(), nanobit.train.train_step, [3, 7]
    def slow_step(forward, optimizer, data, args, i):
        clock.now += 25
        if i in stops:
            stops.remove(i)
            os.kill(os.getpid(), signal.SIGINT)
        return step(forward, optimizer, data, args, i)
    monkeypatch.setattr(nanobit.train, "time", clock)
    monkeypatch.setattr(nanobit.train, "train_step", slow_step)
    train = f"model.py {TRAIN} --steps 10"
    for more, seconds in (("", 100), (" --resume", 200)):
        assert call(capsys, train + more)[0] == 130
        state = nanobit.checkpoint.read_checkpoint("out/base.pt.state")
        assert state["seconds"] == pytest.approx(seconds)
        clock.now += 9999
    status, out, err = call(capsys, f"{train} --resume")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["seconds"] == pytest.approx(250)

@pytest.mark.slow
def test_a_base_interrupted_inside_another_script_goes_on_with_resume(capsys, monkeypatch):
    """normtweak.py keeps no state of its own, but the base that it trains first does."""
    flags = "--data text.txt --vocab 300 --bits 3 --calib data"
    assert call(capsys, f"normtweak.py {flags} --out whole --steps 2")[0] == 0
    step = nanobit.train.train_step
    def interrupted(forward, optimizer, data, args, i):
        if i == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(forward, optimizer, data, args, i)
    monkeypatch.setattr(nanobit.train, "train_step", interrupted)
    status, out, _ = call(capsys, f"normtweak.py {flags} --out out --steps 2")
    assert status == 130 and "holds step 5; go on with the same command and --resume" in out
    monkeypatch.setattr(nanobit.train, "train_step", step)
    status, out, err = call(capsys, f"normtweak.py {flags} --out out --steps 2 --resume")
    assert status == 0 and "at step 5/12" in out, err
    for name in ("base.pt", "gptq-tweak-w3.pt"):
        a, b = (nanobit.checkpoint.read_checkpoint(f"{folder}/{name}")["model"]
                for folder in ("whole", "out"))
        assert equal(a, b)
    check_refused(call(capsys, f"normtweak.py {flags} --out out --resume"), "--resume")

# ---- Two runs at once -------------------------------------------------------------------------

@pytest.mark.slow
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

@pytest.mark.slow
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
    monkeypatch.setattr(nanobit.runs.fcntl, "flock", no_locks)
    status, out, _ = call(capsys, f"model.py {TRAIN} --steps 1")
    assert status == 0 and "start no second run into it" in out
    new_process()
    monkeypatch.setattr(nanobit.runs, "fcntl", None)          # Windows
    assert call(capsys, f"model.py {TRAIN} --steps 1")[0] == 0
    nanobit.runs.HELD.clear()

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
    monkeypatch.setattr(nanobit.train, "train_step", None)     # calling it would fail otherwise
    model_flag = "--model out/base.pt " if script in ("normtweak.py", "lrqat.py") else ""
    flags = TRAIN.replace("--out out", "--out /proc/nanobit")
    check_refused(call(capsys, f"{script} {model_flag}{flags}"), "--out /proc/nanobit")

# ---- Finite weights whose arithmetic is not ---------------------------------------------------

def test_eval_refuses_a_loss_that_is_no_number(capsys, tmp_path):
    random_base(tmp_path, 1)
    m, content = nanobit.checkpoint.load_checkpoint("base.pt")
    m.head.weight.data.fill_(3e38)                     # every logit is infinite
    kept = {k: v for k, v in content.items()
            if k not in ("format", "config", "linears", "model")}
    nanobit.checkpoint.save_checkpoint("large.pt", m, **kept)
    check_refused(call(capsys, "model.py eval large.pt --data text.txt"), "val_loss", "not finite")

# ---- Too little memory ------------------------------------------------------------------------

def cuda_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nMore\nlines")

@pytest.mark.parametrize("fail", [lambda: torch.empty(2**50), lambda: np.empty(2**50), cuda_error],
                         ids=["torch on a CPU", "numpy", "a GPU"])
def test_too_little_memory_says_the_peak_the_batch_and_the_flag(capsys, monkeypatch, fail):
    monkeypatch.setattr(nanobit.train, "train_step", lambda *_: fail())
    result = call(capsys, f"model.py {TRAIN} --batch-size 12 --accumulate 3")
    check_refused(result, "out of memory after a peak of ", " GiB ", "--batch-size 12",
                  "4 windows of 16 tokens at a time", "raise --accumulate 3", "lower --batch-size")
    peak = float(result[2].split("peak of ")[1].split()[0])
    assert 0.05 < peak < 200                           # of this process, in GiB
    check_refused(call(capsys, f"model.py {TRAIN} --batch-size 2 --accumulate 2"),
                  "1 windows of 16 tokens", "; lower --batch-size")

def test_too_little_memory_in_eval_names_its_flag(state, capsys, monkeypatch):
    monkeypatch.setattr(nanobit.cli, "evaluate", lambda *_: torch.empty(2**50))
    check_refused(call(capsys, "model.py eval out/base.pt"), "out of memory", "lower --batch-size")

def test_any_other_error_keeps_its_traceback():
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        nanobit.cli.run(fail)

@pytest.mark.parametrize("errno_, one_line", [(errno.ENOSPC, True), (None, False)])
def test_an_error_of_the_system_is_one_line_but_no_other_is(capsys, errno_, one_line):
    def fail():
        raise OSError(errno_, "No space left on device", "a/file") if errno_ else OSError("a bug")
    with pytest.raises(SystemExit if one_line else OSError) as raised:
        nanobit.cli.run(fail)
    if one_line:
        check_refused((raised.value.code, *capsys.readouterr()), "No space left", "a/file")

# ---- Output that cannot be written, and what of a result is kept then --------------------------

SHORT = f"{TRAIN} --steps 2 --eval-every 0"

def run_into(monkeypatch, stream, command):
    """Run a command line in this process with this stdout; it may end in no exception."""
    with monkeypatch.context() as m:
        m.setattr(sys, "argv", shlex.split(command))
        m.setattr(sys, "stdout", stream)
        nanobit.cli.run(SCRIPTS[sys.argv[0]].main)

def rows(path="out/results.jsonl"):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]

@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_that_stdout_cannot_hold_become_escapes(monkeypatch, encoding):
    """A text of such letters, so that the sample has some, in a file with an undecodable name."""
    name, raw = os.fsdecode(b"caf\xe9.txt"), io.BytesIO()
    pathlib.Path(name).write_text("\u03a9\u65e5 \U0001f600 x = 1\n" * 800, encoding="utf-8")
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    run_into(monkeypatch, stream, f"quest.py {SHORT} --data {name}")
    printed = raw.getvalue().decode(encoding)
    assert "caf\\udce9.txt" in printed and "\\u" in printed.split("--- 200 tokens")[1]
    assert rows() == [json.loads(printed.splitlines()[-1])]

def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")

def test_a_reader_that_goes_away_ends_no_run_and_loses_no_row(capsys, monkeypatch):
    with closed_pipe() as stream:
        run_into(monkeypatch, stream, f"quest.py {SHORT}")
    assert len(rows()) == 1 and os.path.exists("out/quest-w4a4.pt")
    assert capsys.readouterr().err == ""

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_log_on_a_full_disk_ends_no_run_and_is_named_once(capsys, monkeypatch):
    with open("/dev/full", "w") as stream:
        run_into(monkeypatch, stream, f"model.py {SHORT}")
    err = capsys.readouterr().err
    assert len(rows()) == 1 and err.count("\n") == 1 and "No space left on device" in err

@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 100_000])
def test_python_itself_says_nothing_about_a_closed_pipe(length):
    """What waits in the buffer at the end, as --help does, is written by Python's shutdown."""
    read, write = os.pipe()
    os.close(read)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nanobit.cli\n"
    code += f"nanobit.cli.run(lambda: print('x' * {length}))"
    child = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE,
                           env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
    os.close(write)
    assert (child.returncode, child.stderr) == (0, b"")

def test_the_row_is_kept_when_what_is_printed_about_it_fails(capsys, monkeypatch):
    monkeypatch.setattr(quest, "sample_text", lambda *_: torch.empty(2**50))
    check_refused(call(capsys, f"quest.py {SHORT}"), "out of memory")
    assert rows()[0]["method"] == "quest"

def test_a_row_after_a_torn_one_stands_on_a_line_of_its_own(capsys, monkeypatch):
    for _ in range(2):
        assert call(capsys, f"quest.py --bits 16 {SHORT}")[0] == 0
    good = pathlib.Path("out/results.jsonl").read_text()
    pathlib.Path("out/results.jsonl").write_text(good + good[:100])
    assert call(capsys, f"quest.py --bits 16 {SHORT} --seed 1")[0] == 0
    lines = pathlib.Path("out/results.jsonl").read_text().splitlines()
    assert "\n".join(lines[:2]) + "\n" == good and lines[2] == good[:100]
    assert len(lines) == 4 and json.loads(lines[3])["seed"] == 1
    monkeypatch.syspath_prepend(ROOT / "assets")
    status, out, err = call(capsys, "law.py")
    assert status == 2 and "3 usable rows" in err and "line 3, not a row" in err

def test_the_row_is_written_where_the_folder_is_gone(capsys, monkeypatch):
    evaluate = nanobit.train.evaluate
    def and_remove(*args, **how):
        shutil.rmtree("out")
        return evaluate(*args, **how)
    monkeypatch.setattr(nanobit.runs, "evaluate", and_remove)
    assert call(capsys, f"model.py {SHORT}")[0] == 0
    assert len(rows()) == 1 and os.listdir("out") == ["results.jsonl"]

def test_a_run_of_random_weights_writes_its_row_into_a_new_folder(capsys):
    flags = "--size tiny --steps 1 --batch-size 1 --accumulate 1 --seq-len 8 --out a/new"
    status, out, err = call(capsys, f"time_lrqat_memory.py {flags}")
    assert status == 0, err
    assert rows("a/new/results.jsonl") == [json.loads(out.splitlines()[-1])]

@pytest.mark.parametrize("link", ["a link to nothing", "a link to a folder"])
def test_out_may_be_a_link(capsys, link):
    if link == "a link to a folder":
        os.mkdir("target")
    os.symlink("target", "out")
    status, _, err = call(capsys, f"model.py {SHORT}")
    assert status == 0, err
    assert len(rows("target/results.jsonl")) == 1 and os.path.islink("out")

def test_ctrl_c_after_the_training_names_the_file_that_is_there(capsys, monkeypatch):
    def interrupt(*_, **how):
        raise KeyboardInterrupt
    monkeypatch.setattr(nanobit.runs, "evaluate", interrupt)
    status, _, err = call(capsys, f"model.py {SHORT}")
    assert status == 130 and err.count("\n") == 1 and "out/base.pt is saved" in err
    monkeypatch.setattr(quest, "evaluate", interrupt)
    status, _, err = call(capsys, f"quest.py {SHORT}")
    assert status == 130 and "out/quest-w4a4.pt.state is saved" in err and "--resume" in err
    assert os.path.exists("out/quest-w4a4.pt.state") and not os.path.exists("out/quest-w4a4.pt")

# ---- What a row records -----------------------------------------------------------------------

def test_the_recorded_command_is_what_a_shell_would_run(capsys, monkeypatch):
    name = "my 'own' $HOME\nnew line.txt"
    shutil.copy("text.txt", name)
    assert call(capsys, shlex.join(["model.py", *SHORT.split(), "--data", name]))[0] == 0
    assert shlex.split(rows()[0]["command"]) == ["python", *sys.argv] and name in sys.argv

@pytest.mark.parametrize("world, local, start", [
    (1, 1, "python"), (2, 2, "torchrun --standalone --nproc_per_node=2"),
    (16, 8, "torchrun --nnodes=2 --nproc_per_node=8")])
def test_the_recorded_command_starts_as_many_processes(monkeypatch, world, local, start):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(sys, "argv", ["quest.py", "--bits", "4"])
    assert nanobit.runs.command_line() == f"{start} quest.py --bits 4"

def test_a_resumed_path_may_be_spelled_otherwise(capsys):
    assert call(capsys, f"model.py {SHORT} --out base")[0] == 0
    assert call(capsys, f"model.py {SHORT} --model base/base.pt")[0] == 0
    os.symlink("base", "link")
    here = os.getcwd()
    for model_, data in (("./base/../base/base.pt", "./text.txt"), ("link/base.pt", "text.txt"),
                         (f"{here}/base/base.pt", f"{here}/text.txt")):
        command = f"model.py {SHORT} --model {model_} --data {data} --out ./out --resume"
        status, _, err = call(capsys, command)
        assert status == 0, err
    shutil.copytree("base", "other")
    check_refused(call(capsys, f"model.py {SHORT} --model other/base.pt --resume"), "--model")
    pathlib.Path("other.txt").write_text(TEXT + "x")
    check_refused(call(capsys, f"model.py {SHORT} --model base/base.pt --data other.txt --resume"),
                  "--data other.txt")

@pytest.mark.parametrize("command, model_", [
    ("model.py", "out/base.pt"), ("quest.py --bits 16", "out/quest-w16a16.pt"),
    ("normtweak.py --teacher out/base.pt --calib data", "out/packed-tweak-w2.pt")])
def test_a_model_is_never_overwritten_by_what_is_made_of_it(capsys, command, model_):
    assert call(capsys, f"model.py {SHORT}")[0] == 0
    if command.startswith("normtweak"):
        assert call(capsys, f"normtweak.py {SHORT} --host rtn --calib data")[0] == 0
        shutil.copy("out/rtn-w2.pt", model_)
    elif command.startswith("quest"):
        assert call(capsys, f"{command} {SHORT}")[0] == 0
    before = pathlib.Path(model_).read_bytes()
    spelled = os.path.join(os.getcwd(), model_)
    check_refused(call(capsys, f"{command} {SHORT} --model {spelled}"), "--model", "--out")
    assert pathlib.Path(model_).read_bytes() == before

# ---- Integers of the live forward pass, of the file -------------------------------------------

COMPARED = {"quest": "quest.py --bits 3", "lsq": "quest.py --quantizer lsq",
            "fp4": "quest.py --grid fp4", "sparse": "quest.py --grid sparse --bits 2",
            "quest, 8 bits": "quest.py --bits 8", "lrqat": "lrqat.py --bits 3 --arm lr-qat",
            "zero points": "lrqat.py --bits 2 --arm full", "codebooks": "pvtune.py --variant pv",
            "grid": "pvtune.py --variant pv --scheme affine --code-lr 0.3"}

@pytest.mark.slow
@pytest.mark.parametrize("what", COMPARED)
def test_a_row_counts_the_codes_that_the_file_has_otherwise_than_training(
        capsys, monkeypatch, finished, what):
    """The file is made to differ by the lowest bit of each layer's first byte: one code each."""
    def flip_and_save(path, net, *rest):
        for m in net.modules():
            if isinstance(m, QuantLinear):
                m.packed[0, 0] ^= 1
        save_result(path, net, *rest)
    save_result = nanobit.runs.save_result
    shutil.copytree(finished, "out")
    for flipped in (False, True):
        if flipped:
            monkeypatch.setattr(nanobit.runs, "save_result", flip_and_save)
        status, out, err = call(capsys, f"{COMPARED[what]} {SHORT} --embed-bits 16")
        assert status == 0, err
        row = json.loads(out.splitlines()[-1])
        assert row["integers_differ"] == (14 if flipped else 0)            # 2 blocks of 7 linears
        assert (1e-6 <= abs(row["packed_minus_live"])) if flipped else (
            abs(row["packed_minus_live"]) < 1e-3)

def test_the_count_looks_at_the_forward_pass_and_not_at_what_is_merged(
        capsys, monkeypatch, finished):
    """Merging forgets the zero points here: then file and merge agree, and both are wrong."""
    def forgetful(self):
        v = lrqat.to_grid(self.weight, self.scale, None)
        return v.round().clamp(*lrqat.code_range(self.bits))
    monkeypatch.setattr(lrqat.FullQATLinear, "rounded", forgetful)
    shutil.copytree(finished, "out")
    status, out, err = call(capsys, f"lrqat.py --bits 2 --arm full {SHORT}")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["integers_differ"] > 1000

# ---- What the user can mend, in one line ------------------------------------------------------

@pytest.mark.parametrize("script", ["lrqat", "pvtune"])
def test_a_hessian_that_is_not_positive_definite_is_one_line(
        capsys, monkeypatch, finished, script):
    shutil.copytree(finished, "out")
    module, negative = importlib.import_module(script), lambda *args: (
        [(name, m, -h) for name, m, h in block] for block in quantizers.block_hessians(*args))
    monkeypatch.setattr(module, "block_hessians", negative)
    flags = "--scheme affine --variant p" if script == "pvtune" else ""
    result = call(capsys, f"{script}.py {SHORT} {flags}")
    check_refused(result, "blocks.0.attn.wq", "1024 calibration tokens", "positive definite",
                  "--data")

@pytest.mark.slow
def test_compiling_is_tried_before_the_run_starts(tmp_path):
    """On a machine without a compiler, in a process of its own: torch remembers compilers."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nanobit.cli as c\nc.run(c.main)"
    child = subprocess.run([sys.executable, "-c", code, *SHORT.split(), "--compile"],
                           capture_output=True, text=True, env=os.environ | {
                               "PATH": str(tmp_path / "bin"), "CXX": "no-such-compiler",
                               "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")})
    check_refused((child.returncode, child.stdout, child.stderr), "--compile", "compiler")
    assert child.stdout == "" and not os.path.exists("out")

def test_one_bit_without_a_zero_point_is_refused(capsys):
    check_refused(call(capsys, "normtweak.py --bits 1 --symmetric"), "--symmetric", "--bits 2")

def test_the_sparse_grid_refuses_a_width_that_eight_does_not_divide(capsys, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "tiny", PRESET._replace(n_hidden=172))
    monkeypatch.setattr(nanobit.train, "train_step", None)     # calling it would fail otherwise
    check_refused(call(capsys, f"quest.py {SHORT} --grid sparse"), "sparse", "172", "w_down")
    assert not os.path.exists("out")

# ---- Short and single runs --------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_no_schedule_makes_a_run_learn_nothing(steps):
    for schedule in (lrqat.linear_schedule, nanobit.train.learning_rate):
        rates = [schedule(step, steps, 1.0) for step in range(steps)]
        assert max(rates) > 0 and min(rates) >= 0 and max(rates) <= 1
    assert lrqat.linear_schedule(0, 1, 3.0) == 3.0

def test_an_arm_alone_claims_no_recovery(capsys, finished):
    """Without dense training of the same length, more training would count as recovery."""
    shutil.copytree(finished, "out")
    for flags, shares in (("--arm scales", 0), ("", 8)):
        command = f"lrqat.py {SHORT} --bits 3 --rank 4 --teacher none {flags}"
        status, out, err = call(capsys, command)
        assert status == 0, err
        table = out.split("| recovered |")[1].split("merged")[0].splitlines()[1:]
        assert len(re.findall(r"-?\d\.\d% \|", "\n".join(table))) == shares
