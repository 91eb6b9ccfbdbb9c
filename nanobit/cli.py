"""The command line: the commands of model.py, the flags of all scripts, and errors in one line.

  1. `main` chooses the command; `pretrain` and those after it each read as the story of a run.
  2. `add_flags` gives a script the flags that mean the same in all of them.
  3. `resolve` fills in defaults, checks what argparse cannot, and chooses device and dtype.
  4. `run` calls a script's main(), and turns what the user can mend into one line on stderr.
"""
import argparse
import math
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist

try:
    import resource
except ImportError:                                    # Windows: no peak memory
    resource = None

from model import PRESETS, UsageError
from nanobit.card import result_row
from nanobit.checkpoint import (SAVED, float_embedding, load_checkpoint,
                                packed_embedding_weights, settings_of)
from nanobit.compare import check_same_tokens, compare, show_comparison
from nanobit.compressed import rounded_activations
from nanobit.export import FORMATS, choose_format
from nanobit.generate import prepare, sample_text
from nanobit.ranks import join_ranks, put, rank, say, show_every_letter, take_gpu, world_size
from nanobit.runs import (check_numbers, header, keep_model, load_training_data, new_model,
                          open_model, record, save_result, score, show)
from nanobit.tokenizer import make_tokenizer
from nanobit.train import evaluate, train
from quantizers import bits_per_weight

# ---- The commands of model.py -------------------------------------------------------------------

def main():
    commands = {"eval": eval_checkpoint, "sample": sample_checkpoint, "export": export_checkpoint}
    words = sys.argv[1:]
    if words and words[0] in commands:
        command = commands[words[0]]
        command(words[1:])
    else:
        pretrain(words)

def pretrain(argv):
    p = Parser(prog="model.py", description="Pre-train the dense base model into OUT/base.pt.",
               epilog="also: model.py eval CKPT, model.py sample CKPT, model.py export CKPT DIR "
                      "(--help for each)")
    add_flags(p, packs=False, fsdp=True)
    args = resolve(p.parse_args(argv))
    data = load_training_data(args)
    model = new_model(args, data)
    path = os.path.join(args.out, "base.pt")
    keep_model(args, path)
    header("dense", args, model, data)

    # Train and save.
    result = train(model, data, args, path + ".state")
    save_result(path, model, args, data, "dense")

    # Report. The row is written before anything is printed.
    scores = score(model.eval(), data, args)
    row = record(args, "dense", model, scores, result, size=args.size)
    say(f"{show(scores)} | {len(data.val) - 1} tokens | saved {path}")
    say(row)

def eval_checkpoint(argv):
    p = Parser(prog="model.py eval", description="Loss of a checkpoint on the validation split.")
    p.add_argument("checkpoint", help="a .pt file, dense or packed, or a Hugging Face folder")
    p.add_argument("--against", metavar="BASE", help="compare with this one, such as the dense "
                   "model that the checkpoint was made from: a .pt file or a Hugging Face folder; "
                   "twice the time")
    add_flags(p, trains=False)
    args = resolve(p.parse_args(argv))
    model, content = open_model(args, args.checkpoint, dense=False)
    base = open_against(args, model, content) if args.against else None
    data = load_training_data(args, content)

    if base:
        scores = compare(base, model, data.val, args.seq_len, data.tokenizer, args.batch_size)
        check_numbers({"kl": scores["kl"]}, args.against)
    else:
        scores = evaluate(model, data.val, args.seq_len, data.tokenizer, args.batch_size)
    check_numbers({"val_loss": scores["loss"]})

    bpw, weights = bits_per_weight(model)              # of the packed linears, if there are any
    size = f"{bpw:.3f} bits per weight | " if weights else ""
    say(f"{content['method']} | {size}{show(scores)} | {len(data.val) - 1} tokens | "
        f"loss {scores['loss']:.6f}")
    if base:
        say(show_comparison(scores, args.against))

def open_against(args, model, content):
    """The model of --against. Raises UsageError where it does not predict the same tokens."""
    base, base_content = open_model(args, args.against, dense=False)
    fix = f"they cannot be compared; give the model that {args.checkpoint} was made from"
    check_same_tokens(model, content["tokenizer"], args.checkpoint, base,
                      base_content["tokenizer"], f"--against {args.against}", fix)
    return base

def sample_checkpoint(argv):
    p = Parser(prog="model.py sample", description="Text from a checkpoint, dense or packed.")
    p.add_argument("checkpoint", help="a .pt file, dense or packed, or a Hugging Face folder")
    p.add_argument("--prompt", default="", help="text to go on from (default: a new document)")
    p.add_argument("--tokens", type=number(int, 1), default=200, help="how many (default: 200)")
    p.add_argument("--temperature", type=number(float, 0, 100), default=0.8,
                   help="0 takes the most likely token (default: 0.8)")
    p.add_argument("--top-k", type=number(int, 1), default=50,
                   help="choose among so many tokens (default: 50)")
    p.add_argument("--compile", action="store_true", help="torch.compile a step: faster on a "
                   "GPU, after a start of 20 to 40 s for 7B")
    add_flags(p, data=False, trains=False)
    args = resolve(p.parse_args(argv))
    model, content = load_checkpoint(args.checkpoint, args.device, getattr(torch, args.dtype))
    if args.compile:
        try_compiling(args.device)
    model = prepare(model, args.compile)
    tokenizer = make_tokenizer(content["tokenizer"])
    text = sample_text(model, tokenizer, args.prompt, args.tokens, args.seed, args.temperature,
                       args.top_k, args.compile)
    say(text)

def export_checkpoint(argv):
    p = Parser(prog="model.py export", description="Write a checkpoint for other tools: "
               "a Hugging Face folder, or llama.cpp's GGUF.")
    p.add_argument("checkpoint", help="a .pt file, dense or packed, or a Hugging Face folder")
    p.add_argument("folder", help="to write, new or empty; with --format gguf a name that ends in "
                   ".gguf is a new file's")
    p.add_argument("--format", choices=tuple(FORMATS),
                   help="compressed: affine linears and QuEST's as they are, for "
                        "compressed-tensors; aqlm: codebooks as they are; gguf: integers as they "
                        "are, for llama.cpp; dense: all weights in bfloat16 (default: the packed "
                        "one of the others that fits, else dense)")
    args = p.parse_args(argv)
    model, content = load_checkpoint(args.checkpoint)
    content.pop("model", None)                         # or it would hold what is taken apart
    if os.path.isdir(args.checkpoint):
        content["settings"]["model"] = args.checkpoint
    content["row"] = result_row(args.checkpoint, content)
    chosen, problem = choose_format(model, args.format, args.checkpoint)
    form = FORMATS[chosen]

    # What this format or no folder can hold.
    if packed_embedding_weights(model) and not form.packs_embedding:
        say("note: embedding and head, packed in the file, are floats in the folder: "
            f"--format {chosen} has no codes for them")
        float_embedding(model, model.embed.weight(), model.head.weight())
    rounded = rounded_activations(model)
    if rounded:
        say(f"note: {rounded}, which no format can say: in {args.folder} all activations are "
            f"floats, and its logits differ from those of {args.checkpoint}")
    if isinstance(content["tokenizer"], str) and chosen != "gguf":
        say(f"note: no tokenizer.json: {args.checkpoint} has tiktoken's {content['tokenizer']}, "
            "which tiktoken alone encodes as it was trained")

    # Write it, and say which format it is.
    weights = form.write(args.folder, model, content, form.convert)
    why = f", because {problem}" if chosen == "dense" and content["linears"] and problem else ""
    say(f"wrote {args.folder} (--format {chosen}{why}): {model.config.n_layer} blocks, "
        f"{weights.text}")
    for note in weights.notes:
        say(f"note: {note}")

# ---- Flags --------------------------------------------------------------------------------------

def add_flags(p, data=True, trains=True, packs=True, fsdp=False):
    """The flags that mean the same in every script. Where the default is None, resolve sets it."""
    add = p.add_argument
    own = "(default: from --size, or from the dense model that is given)"

    # Of every command: where it computes, and from which seed.
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="of weights, data order and sampling (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of activations; weights stay float32 (default: bfloat16 on cuda, else float32)")

    # Of those that read text.
    if data:
        add("--data", help="text file, folder of .txt .md .py, or http(s) address "
                           "(default: the sources of Python's library)")
        add("--seq-len", type=number(int, 2),
            help="tokens a window (default: from --size, or the model's own, at most 512)")
        add("--batch-size", type=number(int, 1), help=f"windows a step {own}")

    # Without the rest, load_training_data still reads these two. That `size` is absent tells
    # `resolve` that nothing is trained.
    if not trains:
        p.set_defaults(vocab="1024", smoke=False)
        return

    # Of those that make a model.
    add("--model", help="dense checkpoint or Hugging Face folder (default: OUT/base.pt; for "
                        "model.py and quest.py random weights)")
    add("--size", choices=tuple(PRESETS), help="preset (default: tiny)")
    add("--tied", action="store_true", help="one matrix for embedding and head")
    add("--vocab", help="size of a BPE, or a tiktoken name (default: 1024)")
    add("--steps", type=number(int, 1), help=f"optimizer steps {own}")
    add("--lr", type=number(float, 1e-9, 10), help=f"peak learning rate {own}")
    add("--accumulate", type=number(int, 1), help="micro-batches a step (default: from --size)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--eval-every", type=number(int, 0), default=100,
        help="steps between looks at the dev split; 0: never (default: %(default)s)")
    add("--out", default="out", help="folder of checkpoints and results.jsonl (default: out)")
    add("--resume", action="store_true", help="go on from the state saved in --out")
    add("--smoke", action="store_true",
        help="a few steps on little text into OUT/smoke, to see that all works")

    # Of those that write a packed file.
    if packs:
        add("--embed-bits", type=int, choices=(4, 8, 16), default=8,
            help="of embedding and head in the packed file, one scale a row; 16: floats, as they "
                 "were trained (default: 8)")

    # Of model.py and quest.py alone.
    p.set_defaults(fsdp=False)
    if fsdp:
        add("--fsdp", action="store_true",
            help="each of torchrun's processes keeps a share of weights, gradients and moments")

class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UsageError: one line, without the usage before it."""

    def error(self, message):
        raise UsageError(message)

def number(kind, low, high=math.inf):
    """argparse type: an int or a float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            limit = f"from {low} to {high}" if high < math.inf else f">= {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {kind.__name__} {limit}")
        return value
    return parse

# ---- Flags, resolved ----------------------------------------------------------------------------

SMOKE = {"steps": 12, "batch_size": 4, "accumulate": 2, "seq_len": 64}

RUNNING = []  # the settings of the command that runs, for the message on too little memory

def resolve(args):
    """Fill in defaults, check what argparse cannot, choose device and dtype, seed torch."""
    RUNNING[:] = [args]

    # The device and the dtype. "high" lets a GPU multiply float32 matrices in TF32.
    take_device(args)
    cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    if "size" not in args:                             # a command that does not train
        return args

    # A --model has a size and a vocabulary of its own, see own_flags.
    size = args.size or "tiny"
    if args.model:
        size = settings_of(args.model).get("size", size)
    else:
        args.size = size
        if "vocab" in args:
            args.vocab = args.vocab or "1024"

    # What is not given comes from the preset, or with --smoke from its few small numbers. A smoke
    # run's results never take the place of real ones.
    preset = PRESETS.get(size, PRESETS["tiny"])._asdict()
    if args.smoke:
        args.out = os.path.join(args.out, "smoke")
        preset |= SMOKE
    elif args.model:
        preset["seq_len"] = 0                          # that of the model, once it is read
    for name in ("steps", "batch_size", "accumulate", "seq_len", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, preset[name])
    if args.smoke and not args.batch_size:
        args.batch_size = SMOKE["batch_size"]
    if args.batch_size % args.accumulate:
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of "
                         f"--accumulate {args.accumulate}")

    # What would fail late fails now.
    check_out(args.out)
    if args.compile:
        try_compiling(args.device)
    join_ranks(args)
    return args

def take_device(args):
    """Choose --device where it is not given, and see that it is there. Raises UsageError."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world_size() > 1:
        take_gpu(args)
    try:
        if torch.device(args.device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("neither cpu, cuda nor mps")
        torch.zeros(1, device=args.device)
        if args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)         # on which Triton starts its kernels
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device {args.device} is not available here "
                         f"({str(e).splitlines()[0][:80]}); try --device cpu") from None

def check_out(out):
    """Can the folder be written, or be made by the first checkpoint? Raises UsageError."""
    folder = pathlib.Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    if not out or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out or repr('')}: {folder} is not a writable folder")

def try_compiling(device):
    """Compile one addition, so that what --compile lacks is known before the run starts: a C++
    compiler on a CPU, a C compiler or Triton on a GPU, a cache that can be written. UsageError."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as e:               # torch's own compiling errors are the former
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        reason = lines[0] if lines else type(e).__name__
        raise UsageError(f"--compile does not work here: {reason[:200]}; install a C++ compiler "
                         "such as g++, or leave --compile out") from None

# ---- Errors in one line -------------------------------------------------------------------------

def run(main):
    """Call main(); what the user can mend becomes one line on stderr and exit status 2."""
    show_every_letter()
    SAVED.clear()
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except UsageError as e:
        complain(f"error: {e}")
    except KeyboardInterrupt:
        complain(interrupted())
        raise SystemExit(130) from None
    except BrokenPipeError:                            # `| head` has read enough
        return
    except OSError as e:                               # a file, a disk or the network, by its name
        if e.errno is None:
            raise
        complain(f"error: {e}")
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        complain(f"error: {out_of_memory()}")
    finally:
        put(sys.stdout, "")                            # argparse's --help waits in the buffer
    raise SystemExit(2)

def is_out_of_memory(e):
    """Some of torch's errors for it are of no class of their own."""
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "out of memory" in str(e) or "allocate memory" in str(e)

def complain(text):
    """Print to stderr. The ranks mostly fail alike: rank 0 speaks, and torchrun then ends the
    others, unless one has a trouble of its own."""
    if rank():
        time.sleep(5)
    put(sys.stderr, text + "\n")

def interrupted():
    """What Ctrl-C leaves, outside of the training loop, which says it itself."""
    if not SAVED:
        return "interrupted"
    text = f"interrupted: {SAVED[-1]} is saved"
    if SAVED[-1].endswith(".state"):
        text += "; go on with the same command and --resume"
    return text

def out_of_memory():
    """What was used at the peak, by how large a batch, and the flag to change."""
    # The peak, of the GPU where one is used.
    peak = ""
    if torch.cuda.is_initialized():
        peak = f" after a peak of {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    elif resource:
        unit = 2**30 if sys.platform == "darwin" else 2**20        # in bytes on a Mac, else in KiB
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = f" after a peak of {used / unit:.1f} GiB"

    # The batch, of a command that has one. As long as it can be taken in more parts, the same
    # training fits into less memory.
    settings = vars(RUNNING[0]) if RUNNING else {}
    batch = settings.get("batch_size")
    parts = settings.get("accumulate") or 1
    size = fix = ""
    if batch:
        size = (f" with --batch-size {batch}, {batch // parts} windows of {settings['seq_len']} "
                "tokens at a time")
        if parts < batch:
            fix = f"raise --accumulate {parts} (same result) or "
    return f"out of memory{peak}{size}; {fix}lower --batch-size or --seq-len"
