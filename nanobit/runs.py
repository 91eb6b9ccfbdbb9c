"""A run from its first to its last line: the model and the data it begins with, and its row.

In the order in which a script calls them:
  1. `load_base` or `new_model` give it a model, and its text.
  2. `suit_groups` and `keep_model` refuse flags that would not work, before anything is computed.
  3. `header` says what runs, and locks the folder --out.
  4. `through_the_file` saves a packed model and scores what the file holds; `score` another one.
  5. `finish` adds the row of results to OUT/results.jsonl, then prints it.
"""
import contextlib
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys

import torch

try:
    import fcntl
except ImportError:                                    # Windows: no lock on --out
    fcntl = None

from model import LLaMA, PRESETS, UsageError
from nanobit.checkpoint import (float_embedding, load_checkpoint, pack_embedding,
                                packed_embedding_weights, read_checkpoint, save_checkpoint,
                                tensor_bytes)
from nanobit.compare import compare
from nanobit.data import load_data
from nanobit.defaults import group_of, window
from nanobit.hf import read_hf_config
from nanobit.hf_tokenizer import read_hf_tokenizer
from nanobit.ranks import first_rank_first, put, rank, say, world_size
from nanobit.train import dev_loss, evaluate, settings
from quantizers import QuantLinear, bits_per_weight, group_width

# ---- The model and the data ---------------------------------------------------------------------

def load_base(args, as_stored=False):
    """(model, data) of a dense --model, else of OUT/base.pt, which is trained first if missing.
    as_stored: see LLaMA.from_pretrained."""
    path = args.model or os.path.join(args.out, "base.pt")
    if not args.model and not os.path.exists(path):
        train_base(args, path)
    model, content = open_model(args, path, as_stored)
    return model, load_training_data(args, content)

def train_base(args, path):
    """Run `python model.py` with those of the flags that it shares with this script."""
    from nanobit.cli import RUNNING, pretrain          # it imports this file
    say(f"there is no {path} yet: training it first, as `python model.py` does")
    argv = []
    for name in ("data", "vocab", "size", "device", "dtype"):
        value = getattr(args, name)
        if value:
            argv.append(f"--{name}={value}")
    if args.tied:
        argv.append("--tied")
    if args.smoke:
        argv += [f"--out={os.path.dirname(args.out)}", "--smoke"]          # which appends /smoke
    else:
        argv.append(f"--out={args.out}")
    if args.resume and os.path.exists(path + ".state"):
        argv.append("--resume")
    pretrain(argv)
    RUNNING[:] = [args]                                # pretrain's resolve put its own there

def open_model(args, path, as_stored=False, dense=True):
    """load_checkpoint on the command's device. args.seq_len becomes `window` of the model where it
    is None (model.py eval) or 0 (a script's default, which `resolve` leaves). Raises UsageError
    where the linears are packed and dense ones are needed."""
    model, content = load_checkpoint(path, args.device, getattr(torch, args.dtype), as_stored)
    if dense and content["linears"]:
        raise UsageError(f"{path} is packed already; give the dense checkpoint as --model, or to "
                         "normtweak.py as --teacher of a packed --model")
    longest = model.config.seq_len
    if os.path.isdir(path) and (args.seq_len or 0) > longest:
        raise UsageError(f"--seq-len {args.seq_len} is above the {longest} tokens of {path}")
    if not args.seq_len:
        args.seq_len = window(longest)
    return model, content

def new_model(args, data):
    """The LLaMA of --size with random weights, or --model, on the device and in training mode."""
    if args.model:
        model, _ = open_model(args, args.model)
        args.size = args.size or os.path.basename(os.path.abspath(args.model))
        return model.train()
    config = PRESETS[args.size].config(data.tokenizer.n_vocab, args.seq_len, args.tied)
    model = LLaMA(config, getattr(torch, args.dtype))
    if args.fsdp:                                      # `distribute` places each rank's share
        return model
    return model.to(args.device)

def load_training_data(args, content=None):
    """The text of --data, or else the checkpoint's, with the tokenizer of the checkpoint or the
    folder --model if there is one, else --vocab's. content: the checkpoint's, where it has been
    read."""
    old = {}
    spec = None
    if content is None and args.model and not os.path.isdir(args.model):
        content = read_checkpoint(args.model)
        args.seq_len = args.seq_len or window(content["config"]["seq_len"])
    if content:
        old = content.get("settings", {})
        spec = content["tokenizer"]
    elif os.path.isdir(args.model or ""):
        spec = read_hf_tokenizer(args.model)
        args.seq_len = args.seq_len or window(read_hf_config(args.model).seq_len)
    if "model" in args and args.model:
        own_flags(args, old)
    source = old.get("data") if args.data is None else args.data

    # --smoke reads few files, and so does what goes on from its result.
    smoke = args.smoke or (old.get("smoke") and args.data is None)
    limit = 30 if smoke else None
    with first_rank_first():                           # the others find its tokens in the cache
        data = load_data(source, args.vocab, args.seq_len, spec, limit)
    if content and content.get("data") not in (None, data.digest):
        say(f"note: {data.name} is not the text that this checkpoint was trained on")

    # The result keeps where its text came from, so that `model.py eval` reads the same.
    args.data = source
    args.smoke = bool(smoke)
    return data

def own_flags(args, own):
    """Let the flags of a new model be what --model has, by its settings. Raises UsageError for one
    that was given and is another."""
    for name in ("size", "vocab", "tied"):
        given = getattr(args, name)
        if given and given != own.get(name):
            raise UsageError(f"--{name} {given} is not what --model {args.model} has; leave "
                             f"--{name} out")
        setattr(args, name, own.get(name, given))      # of a folder nothing is known

# ---- What is refused before anything is computed ------------------------------------------------

def keep_model(args, *paths):
    """Raise UsageError where the run would write one of the paths over the --model that it reads.
    Allowed with --resume, which reads the weights from the state."""
    for path in paths:
        same = args.model and os.path.realpath(path) == os.path.realpath(args.model)
        if same and not args.resume:
            raise UsageError(f"--model {args.model} is the file that this run writes; give another "
                             "--out")

def suit_groups(args, model):
    """Set --group-size where it is None, that is, not given. Raise UsageError for one that does not
    divide a linear's inputs; -1: a row."""
    if args.group_size is None:
        args.group_size = group_of(model)
    for name, linear in model.linears():
        C = linear.in_features
        if group_width(C, args.group_size) is None:
            raise UsageError(f"--group-size {args.group_size} does not divide the {C} input "
                             f"channels of {name}; try {math.gcd(C, 128)}, or -1 (one scale per "
                             "row)")

@contextlib.contextmanager
def definite_hessian(name, tokens, fix):
    """GPTQ inside: a Hessian that is not positive definite becomes a UsageError with the fix."""
    try:
        yield
    except torch.linalg.LinAlgError:
        raise UsageError(f"{name}: the Hessian of {tokens} calibration tokens is not positive "
                         f"definite; {fix}") from None

# ---- The first lines ----------------------------------------------------------------------------

def header(title, args, model, data):
    """The first lines of every script: what runs, on what, with which settings. Locks --out."""
    # With --resume and no folder, make none: `resume` then says what is missing.
    if rank() == 0 and (os.path.isdir(args.out) or not args.resume):
        hold(args.out)

    params = sum(p.numel() for p in model.parameters())
    linear = sum(p.numel() for _, m in model.linears() for p in m.parameters())
    threads = f"{torch.get_num_threads()} threads"
    if world_size() > 1:
        threads += f" in each of {world_size()} processes"
    say(f"{title} | {params / 1e6:.2f}M params, {linear / 1e6:.2f}M in the blocks' linears | "
        f"{args.device} {args.dtype}, {threads} | torch {torch.__version__} | seed {args.seed}")
    say("settings: " + " ".join(f"{k}={v}" for k, v in settings(args).items()))
    say(f"data: {data.name} | {len(data.train)} train, {len(data.dev)} dev, {len(data.val)} val "
        f"tokens | sha256 {data.digest[:12]}")

HELD = {}  # folders that this process has locked: their descriptors

def hold(folder):
    """Lock the folder until this process ends, by whatever. A second run into it is refused."""
    folder = os.path.realpath(folder)
    if folder in HELD:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        HELD[folder] = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as e:
        raise UsageError(f"--out {folder} cannot be written: {e.strerror}") from None

    # The lock is on the folder itself, so that no file of a lock is left over.
    try:
        if fcntl:
            fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(HELD.pop(folder))
        raise UsageError(f"--out {folder} is in use by another run; wait for it, or choose "
                         "another --out") from None
    except OSError as e:                               # some network file systems
        say(f"note: {folder} cannot be locked ({e.strerror}); start no second run into it")
        return

    # What a run was writing when it was killed: nobody else writes here now. Without fcntl, and so
    # without a lock, somebody may.
    if not fcntl:
        return
    for left in pathlib.Path(folder).glob("*.pt*.[0-9]*.tmp"):
        left.unlink()

# ---- The result: a file, its scores, its row ----------------------------------------------------

def through_the_file(path, model, args, data, method, base=None, base_outputs=None, tell=True):
    """Save a result, load it again and `score` that -> (model, scores). What is reported of a
    packed model is thereby what its file holds. Embedding and head get --embed-bits here; tell:
    print what that costs."""
    linears = any(isinstance(m, QuantLinear) for _, m in model.linears())
    packs = linears and args.embed_bits < 16 and not packed_embedding_weights(model)
    if packs:
        floats = pack_embedding(model, args.embed_bits)
    save_result(path, model, args, data, method)
    model, _ = load_checkpoint(path, args.device, model.dtype)
    scores = score(model, data, args, base, base_outputs)

    # What that cost: the loss of the same model with embedding and head as they were.
    if packs and tell:
        packed = (model.embed, model.head)
        float_embedding(model, *floats)
        before = dev_loss(model, data, args.seq_len)
        model.embed, model.head = packed
        say(f"embedding and head | {args.embed_bits} bits, one scale per row | dev loss "
            f"{before:.4f} -> {scores['dev_loss']:.4f}")
    return model, scores

def save_result(path, model, args, data, method):
    """A checkpoint with all that `model.py eval` and `sample` need."""
    save_checkpoint(path, model, method=method, settings=settings(args), tokenizer=data.spec,
                    data=data.digest, command=command_line())

def score(model, data, args, base=None, base_outputs=None):
    """Losses on the whole validation split, which is only reported, and "dev_loss", by which
    settings are chosen. With a dense base also how far the model is from it.

    base_outputs: a list, for runs with several arms. The call that scores the base itself fills it,
    and those that compare with the base need not compute the base's blocks again.
    """
    if base:
        scores = compare(base, model, data.val, args.seq_len, data.tokenizer,
                         base_outputs=base_outputs)
    else:
        scores = evaluate(model, data.val, args.seq_len, data.tokenizer, keep=base_outputs)
    return scores | {"dev_loss": dev_loss(model, data, args.seq_len)}

def show(scores):
    return (f"val loss {scores['loss']:.4f} nats/token | ppl {scores['ppl']:.2f} | "
            f"{scores['bits_per_byte']:.3f} bits/byte")

def finish(args, method, model, scores, result, **more):
    """`record` the run's row, then print it: the last line of a run."""
    say(record(args, method, model, scores, result, **more))

def record(args, method, model, scores, result, **more):
    """Append the run's row of results to results.jsonl -> the row, one line of JSON. Raises
    UsageError where a number of it is not finite. result: {"tokens", "seconds"}, as `train`
    returns."""
    check_numbers({"val_loss": scores["loss"], "bits_per_byte": scores["bits_per_byte"], **more})

    # Bits per packed weight and how many are packed: 0 and 0 of a dense model. Of a packed one
    # "bytes_packed" is the whole, not the linears alone, as "bytes_dense" is.
    bpw, weights = bits_per_weight(model)
    params = sum(p.numel() for p in model.parameters())
    params += weights + packed_embedding_weights(model)
    packed = tensor_bytes(model.state_dict().values()) if weights else None

    # `more` is the method's own: it replaces the bits, the group size and the base's loss.
    row = {"method": method, "w_bits": 16, "a_bits": 16, "bpw": bpw or 16.0, "group_size": -1,
           "val_loss": scores["loss"], "val_ppl": scores["ppl"], "dev_loss": scores.get("dev_loss"),
           "bits_per_byte": scores["bits_per_byte"], "base_val_loss": None, **distance(scores),
           "bytes_dense": 2 * params, "bytes_packed": packed, "params": params,
           "tokens": result["tokens"], "seconds": result["seconds"], "device": args.device,
           "peak_bytes": peak_bytes(),                 # of what followed the last arm_row, if any
           "seed": args.seed, **more, "command": command_line(), "commit": commit()}
    line = json.dumps(rounded(row))

    # Where it cannot be written, the row is in the message: nothing is lost.
    path = os.path.join(args.out, "results.jsonl")
    if rank() == 0:
        try:
            os.makedirs(args.out, exist_ok=True)       # it may be new, or gone since the start
            append_line(path, line)
        except OSError as e:
            raise UsageError(f"cannot write {path}: {e.strerror}; the row: {line}") from None
    return line

def arm_row(scores, bpw, seconds, **more):
    """What a row of results keeps of each arm that the run compared."""
    return {"val_loss": scores["loss"], "dev_loss": scores["dev_loss"],
            "bits_per_byte": scores["bits_per_byte"], **distance(scores), "bpw": bpw,
            "seconds": seconds, "peak_bytes": peak_bytes(), **more}

def distance(scores):
    """What a row keeps of the comparison with the dense base: nats per token and percent. None
    where `score` had no base, as for the base itself."""
    return {"kl": scores.get("kl"), "same_top": scores.get("same_top")}

def show_distance(row):
    """The same as two columns of a table, 6 and 8 wide."""
    if row["kl"] is None:
        return "     - |        -"
    return f"{row['kl']:6.4f} | {row['same_top']:7.2f}%"

def check_numbers(x, name="the result"):
    """Raise UsageError for the first number in the nested x that is a NaN or an infinity."""
    if isinstance(x, dict):
        for key, value in x.items():
            check_numbers(value, f"{name}'s {key}")
    elif isinstance(x, (list, tuple)):
        for value in x:
            check_numbers(value, name)
    elif isinstance(x, float) and not math.isfinite(x):
        raise UsageError(f"{name} is not finite ({x}); no row of results was written; the weights "
                         "are too large for the model's arithmetic, or the rate was too high")

def append_line(path, line):
    """Add a line to a file. A last line without an end, which a killed run left, gets it first."""
    torn = os.path.isfile(path) and pathlib.Path(path).read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a") as f:
        if torn:
            f.write("\n")
        f.write(line + "\n")

def rounded(x):
    """Every float in the nested x, to six places."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return round(x, 6) if isinstance(x, float) else x

def commit():
    """The commit of this checkout, with a + where files have changed since; None without git."""
    def git(*command):
        root = pathlib.Path(__file__).parent.parent
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        name = git("rev-parse", "--short=12", "HEAD")
        return name + "+" if changed else name
    except (OSError, subprocess.CalledProcessError):
        return None

def command_line():
    """The command that runs, as a shell reads it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size() > local:
        start = ["torchrun", f"--nnodes={world_size() // local}", f"--nproc_per_node={local}"]
    elif world_size() > 1:
        start = ["torchrun", "--standalone", f"--nproc_per_node={local}"]
    else:
        start = ["python"]
    return shlex.join([*start, *sys.argv])

def peak_bytes():
    """The most bytes on the GPU since the last call; None where there is none."""
    if not torch.cuda.is_initialized():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak

# ---- Rows of results, read ----------------------------------------------------------------------

def read_rows(path):
    """The rows of a results.jsonl. A line that holds none, such as one that a run was killed in, is
    left out by its number on stderr. Raises UsageError where there are only such lines."""
    try:
        lines = pathlib.Path(path).read_bytes().splitlines()
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}; give a results.jsonl") from None

    rows = []
    torn = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn.append(str(number))

    if torn and not rows:
        raise UsageError(f"{path} holds no result rows")
    if torn:
        put(sys.stderr, f"note: left out of {path}: line {', '.join(torn)}, not a row\n")
    return rows
