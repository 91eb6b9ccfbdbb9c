"""Bytes and speed of LR-QAT's training step beside full QAT's and dense training's.

    python tests/time_lrqat_memory.py                      # 7B in 4 bits on a GPU, tiny on a CPU
    python tests/time_lrqat_memory.py --size 100M --phi fixed --compile --steps 12     # speed
    python tests/time_lrqat_memory.py --size tiny --lean   # predicted against measured bytes
    python tests/time_lrqat_memory.py --base out/base.pt   # the same of a trained model's shapes

Random weights prove bytes and speed, never quality. LR-QAT takes what it needs; the others get
--limit GiB, and their weights, gradients and moments are of --dtype, as small as can be. A lean
model computes each block and the logits once more in the backward pass; `ledger` predicts the bytes
of such a step from shapes alone. The run appends its row to OUT/results.jsonl, --base appends none.
"""
import argparse
import copy
import pathlib
import sys
import time
import types

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from lrqat import (ARMS, PHI, arm_linear, arm_optimizer, check_phi, check_shapes, convert,
                   start_grid)
from model import LLaMA, PRESETS, RMSNorm, UsageError
from nanobit.checkpoint import tensor_bytes
from nanobit.cli import Parser, number, resolve, run
from nanobit.data import batch
from nanobit.ranks import say, world_size
from nanobit.runs import finish, open_model
from nanobit.train import train_step

VOCAB = 32000                          # of the random models: Llama 2's
MEASURED = ("lr-qat", "full", "longer")

def parse_args(argv=None):
    p = Parser(prog="time_lrqat_memory.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--size", choices=tuple(PRESETS), help="preset (default: 7B on a GPU, tiny on a CPU)")
    add("--base", help="dense checkpoint: its shapes, and no other arms than LR-QAT")
    add("--bits", type=number(int, 2, 8), default=4, help="of weights (default: 4)")
    add("--group-size", type=number(int, -1), default=-1, help="inputs a scale; -1: all (default)")
    add("--phi", choices=tuple(PHI), default="packed",
        help="format of the frozen weights (default: packed)")
    add("--rank", type=number(int, 1), default=32, help="of A and B (default: 32)")
    add("--lean", action=argparse.BooleanOptionalAction,
        help="compute blocks and logits again in the backward pass (default: at 7B)")
    add("--limit", type=number(float, 0.1), default=24,
        help="GiB of the GPU that full QAT and dense training get (default: 24)")
    add("--steps", type=number(int, 1), default=3, help="optimizer steps (default: 3)")
    add("--seq-len", type=number(int, 2), help="tokens a window (default: from --size)")
    add("--batch-size", type=number(int, 1), help="windows a step (default: from --size)")
    add("--accumulate", type=number(int, 1), help="micro-batches a step (default: from --size)")
    add("--tied", action="store_true", help="one matrix for embedding and head")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of activations (default: bfloat16 on cuda, else float32)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one, else cpu)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights (default: 0)")
    add("--out", default="out", help="folder of results.jsonl (default: out)")

    # What lrqat.py and `resolve` ask for besides.
    p.set_defaults(lr=1e-2, init="zero", a_bits=16, kv_bits=16, arm=None, model=None, smoke=False,
                   fsdp=False)
    args = p.parse_args(argv)
    check_phi(args)
    if args.base and args.size:
        raise UsageError(f"--base {args.base} has a size of its own; leave --size {args.size} out")
    if world_size() > 1:
        raise UsageError("time_lrqat_memory.py measures one process; start it with plain python")
    if args.size is None:
        gpu = torch.cuda.is_available() and args.device != "cpu"
        args.size = "7B" if gpu and not args.base else "tiny"
    if args.lean is None:
        args.lean = args.size == "7B" or args.base is not None
    if args.base and args.seq_len is None:
        args.seq_len = 0                               # the base's windows, not the preset's
    return resolve(args)

# ---- The prediction ---------------------------------------------------------------------------

def ledger(c, args):
    """Predicted bytes at the peak of a lean step, by component, from shapes alone (LlamaConfig c).

    activations: the blocks' inputs and the end's. temporaries: one block again and the backward
    pass of the largest linear (two float32, an int8, a mask, W_hat), or the loss of 256 tokens; and
    the 32 MiB that PyTorch gives cuBLAS to work with on an H100.
    """
    e = 2 if args.dtype == "bfloat16" else 4                               # bytes a float
    n = args.batch_size // args.accumulate * args.seq_len                  # tokens at a time
    L, d, f = c.n_layer, c.n_embd, c.n_hidden
    qo = c.head_dim * c.n_head
    kv = c.head_dim * c.n_kv_head

    # What stays: the linears' weights, their scales, A and B.
    shapes = [(qo, d), (kv, d), (kv, d), (d, qo), (f, d), (f, d), (d, f)]          # (O, C)
    weights = L * sum(O * C for O, C in shapes)
    largest = max(O * C for O, C in shapes)
    if args.group_size == -1:
        scales = L * sum(O for O, C in shapes)
    else:
        scales = L * sum(O * (C // args.group_size) for O, C in shapes)
    learn = L * args.rank * sum(O + C for O, C in shapes) + scales
    frozen = int(weights * PHI[args.phi].bytes_per_weight)
    if args.bits == 2:
        frozen += scales                               # zero points of a byte
    embeddings = (2 - c.tied) * c.vocab_size * d * e   # with the head
    norms = e * d * (2 * L + 1)

    # What lives for a part of the step.
    block = n * (8 * d + e * (2 * d + 2 * qo + 2 * kv + 4 * f) + 4 * c.n_head)
    linear = (12 if args.bits == 2 else 10) * largest + n * (e * f - 4 * d)
    loss = min(n, 256) * c.vocab_size * (8 + e)
    cublas = 2**25 if args.device.startswith("cuda") else 0
    return {"frozen weights": frozen + embeddings + norms,
            "adapters": 4 * learn, "gradients": 4 * learn, "optimizer": 8 * learn,
            "activations": n * d * (L * e + 4 + e) + 8 * (n + args.seq_len * c.head_dim),
            "temporaries": max(block + linear, loss) + cublas}

# ---- The measurement --------------------------------------------------------------------------

def measure(model, args, data, report=False):
    """Take args.steps steps -> bytes by component and tokens/s of all steps but the first.

    activations: what autograd saves in one forward pass. peak: the most bytes that the GPU's
    allocator saw; temporaries: what of it no other component explains. With `report` the model is
    made lean and the ledger printed beside it.
    """
    cuda = args.device.startswith("cuda")
    optimizer = arm_optimizer(model, args.lr)
    model.lean = model.lean or report
    held = [*model.parameters(), *model.buffers()]
    learn = [p for p in held if p.requires_grad]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        other = torch.cuda.memory_allocated() - tensor_bytes(held)

    # One forward and backward pass of a micro-batch says what is kept in between.
    kept = []
    def keep(t):
        kept.append(t)
        return t
    windows = args.batch_size // args.accumulate
    x, y = batch(data.train, 0, windows, args.seq_len, 0, args.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(x, y)[1]
    found = {"frozen weights": tensor_bytes(held) - tensor_bytes(learn),
             "adapters": tensor_bytes(learn),
             "activations": tensor_bytes(kept + held) - tensor_bytes(held)}
    kept.clear()
    loss.backward()
    found["gradients"] = tensor_bytes(p.grad for p in learn)
    optimizer.zero_grad(set_to_none=True)

    # The steps; the first one warms up and is timed only where it is the only one.
    if args.compile:
        model.compile_parts()
    start = time.perf_counter()
    for step in range(args.steps):
        train_step(model, optimizer, data, args, step)[0].item()
        if step == 0 and args.steps > 1:
            start = time.perf_counter()
    seconds = max(time.perf_counter() - start, 1e-9)   # a coarse clock may not have moved
    timed = max(1, args.steps - 1)
    speed = timed * args.batch_size * args.seq_len / seconds

    moments = (t for state in optimizer.state.values() for t in state.values())
    found["optimizer"] = tensor_bytes(moments)
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        found["temporaries"] = peak - other - sum(found.values())
        found["peak"] = peak
    if report:
        print_ledger(ledger(model.config, args), found)
    return found | {"tokens/s": speed}

def print_ledger(predicted, found):
    """A line a component: predicted bytes, measured ones, their ratio."""
    for name, size in predicted.items():
        measured = "measured on a GPU only"
        if name in found:
            measured = f"measured {found[name]:12d} | {found[name] / size:.3f}"
        say(f"{name:15} | predicted {size:12d} bytes | {measured}")

# ---- The runs ---------------------------------------------------------------------------------

def random_tokens(vocab, seed):
    return types.SimpleNamespace(train=np.random.default_rng(seed).integers(0, vocab, 100_000))

def random_model(key, c, args):
    """A model of random weights, made on the device, each linear at once in its final format. key:
    of lrqat's ARMS."""
    arm = ARMS[key]
    with torch.device("meta"):                         # shapes alone: no memory
        model = LLaMA(copy.copy(c), getattr(torch, args.dtype))
    check_shapes(model, args)
    model.lean = args.lean
    model.requires_grad_(False).train()

    def make(name, linear):
        w = torch.randn(linear.weight.shape, device=args.device, dtype=model.dtype) / 50
        grid = None
        if arm.quantized:
            grid = start_grid(w, args.bits, args.group_size, search=False)
        return arm_linear(linear, w, grid, arm, args)

    model.replace_linears(make)
    for m in model.modules():
        if m is model.head or isinstance(m, (nn.Embedding, RMSNorm)):
            m.to_empty(device=args.device).to(model.dtype)
            nn.init.normal_(m.weight, mean=float(m.weight.dim() == 1), std=0.02)
    if c.tied:
        model.head.weight = model.embed.weight
    return model

def limit_memory(args):
    """From here on this process gets --limit GiB of its GPU."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(args.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.limit * 2**30 / total))

def peaks():
    """The GPU's peaks since the last `measure` began, for the line of an arm."""
    allocated = torch.cuda.max_memory_allocated() / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30
    return f" | peak {allocated:.2f} GiB allocated, {reserved:.2f} GiB reserved"

def random_run(args):
    """Bytes and speed of LR-QAT, of full QAT and of dense training, on random weights; the row."""
    start = time.perf_counter()
    cuda = args.device.startswith("cuda")
    c = PRESETS[args.size].config(VOCAB, args.seq_len, args.tied)
    if args.size == "7B" and not cuda:
        raise UsageError("--size 7B needs a GPU; on a CPU it would take about "
                         f"{sum(ledger(c, args).values()) / 2**30:.1f} GiB and hours; try tiny")
    data = random_tokens(VOCAB, args.seed)
    say(f"{args.size} of random weights: bytes and speed, never quality | W{args.bits} phi "
        f"{args.phi} rank {args.rank} | {args.batch_size // args.accumulate} x {args.seq_len} "
        "tokens at a time")
    results = {}
    for key in MEASURED:
        label = ARMS[key].label
        model = None                                   # free the last one
        results[label] = None                          # where this one does not fit
        if cuda and key != "lr-qat":
            limit_memory(args)
        try:
            model = random_model(key, c, args)
            report = model.lean and key == "lr-qat"
            results[label] = measure(model, args, data, report)
            line = f"{results[label]['tokens/s']:.0f} tokens/s"
        except torch.OutOfMemoryError:
            if key == "lr-qat":
                raise
            line = f"out of memory: does not fit in {args.limit:g} GiB"
        say(f"{label} | {line}{peaks() if cuda else ''}")
    finish(args, "lrqat-random", nn.Module(), dict.fromkeys(("loss", "ppl", "bits_per_byte")),
           {"tokens": args.steps * args.batch_size * args.seq_len,
            "seconds": time.perf_counter() - start},
           w_bits=args.bits, bpw=None, params=None, bytes_dense=None, phi=args.phi, rank=args.rank,
           size=args.size, lean=args.lean, results=results)

def base_run(args):
    """The ledger of LR-QAT on a trained model, predicted and measured. Its tokens are random: they
    change no byte."""
    base, _ = open_model(args, args.base)
    check_shapes(base, args)
    data = random_tokens(base.config.vocab_size, args.seed)
    grids = {n: start_grid(m.weight, args.bits, args.group_size) for n, m in base.linears()}
    model = convert(base, ARMS["lr-qat"], args, grids)
    model.lean = args.lean
    found = measure(model, args, data, report=args.lean)
    say(f"LR-QAT of {args.base} | {found['tokens/s']:.0f} tokens/s")

def main():
    args = parse_args()
    if args.base:
        base_run(args)
    else:
        random_run(args)

if __name__ == "__main__":
    run(main)
