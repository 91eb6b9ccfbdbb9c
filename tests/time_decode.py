"""Tokens a second of one sequence, by random weights, against the time that reading them takes.

    python tests/time_decode.py                            # 7B: 16, 4, 2 bits, plain and compiled
    python tests/time_decode.py --size tiny --bits 4       # anywhere

Random weights tell the speed and nothing else. A step reads every weight once, and the keys and
values of the tokens before it; the floor is what a copy of as many bytes takes.
"""
import argparse
import json
import pathlib
import sys
import time

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from model import PRESETS, Linear, LLaMA, RMSNorm
from nanobit.checkpoint import tensor_bytes
from nanobit.generate import Chooser, decode, prepare
from quantizers import QuantLinear

def random_weights(size, bits, tokens, device, dtype):
    """A model of random weights in the form that generation reads, made on the device."""
    preset = PRESETS[size]
    with torch.device("meta"):                         # shapes alone: no memory
        model = LLaMA(preset.config(32000, max(preset.seq_len, tokens + 64)), dtype)

    def packed(O, C):
        codes = torch.randint(256, (O, C * bits // 8), device=device, dtype=torch.uint8)
        scale = torch.full((O, C // 128), 0.05 / 2**bits, device=device, dtype=torch.float16)
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
        spec = dict(kind="affine", bits=bits, a_bits=16, in_features=C, group_size=128,
                    signed=False)
        return QuantLinear.of(spec, {"packed": codes, "scale": scale, "zero_point": zero})

    for m in model.modules():
        if isinstance(m, RMSNorm):
            m.weight = nn.Parameter(torch.ones(m.weight.shape, device=device))
        elif hasattr(m, "weight") and (bits == 16 or m in (model.embed, model.head)):
            w = torch.randn(m.weight.shape, device=device, dtype=dtype).mul_(0.02)
            m.weight = nn.Parameter(w, requires_grad=False)
    if bits < 16:
        model.replace_linears(lambda name, linear: packed(*linear.weight.shape))
    return model.eval()

def copy_speed(device):
    """Bytes a second that a copy in the device's memory reads and writes; the best of some."""
    cuda, best = device.startswith("cuda"), 0.0
    size = 2**29 if cuda else 2**26
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.ones(size, dtype=torch.uint8, device=device)
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(4):
            a.copy_(b)
        if cuda:
            torch.cuda.synchronize()
        best = max(best, 8 * size / (time.perf_counter() - start))
    return best

def bytes_of_a_step(model, tokens):
    """What a step reads: all weights but the embedding, and the keys and values of `tokens`."""
    c = model.config
    size = model.dtype.itemsize * 2 * c.n_layer * c.n_kv_head * c.head_dim * tokens
    for m in model.modules():
        if isinstance(m, (Linear, QuantLinear, RMSNorm)):
            fast = getattr(m, "fast", None) and m.fast.operand
            size += tensor_bytes(fast[:3] if fast else m.state_dict().values())
    return size

@torch.no_grad()
def measure(model, tokens, device, compile=False, prompt=8, first=8):
    """Seconds for a step of one sequence, in the mean of `tokens` steps after the first ones."""
    idx = torch.randint(model.config.vocab_size, (1, prompt), device=device)
    choose = Chooser(model, 1, 0.8, 50, torch.Generator(device).manual_seed(0))
    marks = []
    for i, _ in enumerate(decode(model, idx, first + tokens + 1, choose, compile)):
        if i in (first, first + tokens):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
    return (marks[1] - marks[0]) / tokens

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    p.add_argument("--size", choices=tuple(PRESETS), default="7B" if cuda else "tiny")
    p.add_argument("--bits", type=int, nargs="+", choices=(1, 2, 4, 8, 16), default=[16, 4, 2])
    p.add_argument("--tokens", type=int, default=200)
    p.add_argument("--forms", nargs="+", choices=("plain", "compile"), default=["plain", "compile"])
    p.add_argument("--out", help="append the rows to this file, one JSON object each")
    args = p.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    copy = copy_speed(device)
    for bits in args.bits:
        for form in args.forms:
            torch._dynamo.reset()
            model = random_weights(args.size, bits, args.tokens, device, dtype)
            prepare(model, form == "compile")
            start = time.perf_counter()
            seconds = measure(model, args.tokens, device, form == "compile")
            start = time.perf_counter() - start - args.tokens * seconds
            size = bytes_of_a_step(model, 16 + args.tokens // 2)
            row = dict(size=args.size, bits=bits, form=form,
                       tokens_per_second=round(1 / seconds, 1), gb=round(size / 1e9, 3),
                       of_copy=round(size / copy / seconds, 3),
                       start_seconds=round(start, 1), copy_gb_s=round(copy / 1e9),
                       torch=torch.__version__)
            print(f"{args.size}, {bits:2} bits, {form:7} | {1 / seconds:6.1f} tokens/s, "
                  f"{1e3 * seconds:.3f} ms each | {size / 1e9:.3f} GB a token | "
                  f"{100 * size / copy / seconds:.0f}% of a copy's {copy / 1e9:.0f} GB/s | "
                  f"start {start:.1f} s", flush=True)
            if args.out:
                with open(args.out, "a") as f:
                    f.write(json.dumps(row) + "\n")
            del model

if __name__ == "__main__":
    main()
