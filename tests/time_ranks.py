"""Tokens per second of training steps at the 100M preset, on as many GPUs as torchrun gives.

    python tests/time_ranks.py
    torchrun --standalone --nproc_per_node=2 tests/time_ranks.py            # or with --fsdp

Compiled, bfloat16, random tokens of a vocabulary of 32000; the median of six steps.
"""
import os
import statistics
import sys
import time
import types

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from nanobit.cli import Parser, add_flags, resolve, run
from nanobit.ranks import agree, distribute, say, world_size
from nanobit.runs import new_model
from nanobit.train import make_optimizer, train_step

def main():
    p = Parser()
    add_flags(p, fsdp=True)
    p.set_defaults(size="100M", steps=8, vocab="32000")
    args = resolve(p.parse_args())
    data = types.SimpleNamespace(train=np.random.default_rng(0).integers(0, 32000, 2_000_000))
    data.tokenizer = types.SimpleNamespace(n_vocab=32000)
    model = new_model(args, data)
    distribute(model, args)
    optimizer = make_optimizer(model, 6e-4)
    times, losses = [], []
    if args.device == "cuda":
        model.compile_parts()
    for step in range(args.steps):
        agree()
        start = time.time()
        losses.append(train_step(model, optimizer, data, args, step)[0].item())
        times.append(time.time() - start)
    seconds = statistics.median(times[2:])
    say(f"{world_size()} processes{' with --fsdp' * args.fsdp} on {args.device}, torch "
          f"{torch.__version__} | {1e3 * seconds:.1f} ms a step of {args.batch_size} x "
          f"{args.seq_len} tokens | {args.batch_size * args.seq_len / seconds / 1e3:.1f}k tokens/s "
          f"| last loss {losses[-1]:.5f}")

if __name__ == "__main__":
    run(main)
