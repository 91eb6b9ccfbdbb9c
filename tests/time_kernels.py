"""Time of the kernels against cuBLAS and every peer that is installed, on this GPU.

    python tests/time_kernels.py                                # every shape, bits and batch
    python tests/time_kernels.py --shapes 14336x4096 --bits 4   # one shape, 4 bits beside cuBLAS
    python tests/time_kernels.py --only tinygemm gemlite        # some candidates beside cuBLAS
    python tests/time_kernels.py --out rows.jsonl --plot kernels.png
    python tests/time_kernels.py --sweep --out sweep.jsonl      # other tiles than the tables have

Every candidate multiplies bfloat16 activations x (M, C) with a layer of random weights (O, C),
groups of 128. A time is the median replay of one CUDA graph that reads at least 200 MB of copies of
the weights in turn, so that no call finds its weights in the L2 cache. The floor of a time is what
a copy of as many bytes takes, or as many operations at 790 TFLOP/s, whichever is longer.
The peers are torch's own products and, where they are installed, gemlite, humming and aqlm. What
torch's 8-bit products need besides, quantizing x, is not timed.

--sweep times tiles that kernels.py does not choose, for 17 to 1024 tokens. A model of waves and
padding picks those that may be fast; each is held to the result of the present tile before it is
timed. It ends by itself after --minutes.
"""
import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import time
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
import triton

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import kernels
from kernels import (LowBit, QuestTile, Tile, hadamard_quantize, lowbit_matmul, plain_matmul,
                     quest_linear, quest_matmul, quest_operand, vq_matmul)
from model import UsageError
from nanobit.cli import Parser, number, run
from nanobit.ranks import progress, say
from nanobit.runs import command_line

GROUP = 128                            # inputs that share a scale and a zero point
COPIES = 200e6                         # bytes of weights that a graph reads: four times the L2
TFLOPS = 790                           # of dense bfloat16 products, as measured on an H100
SHAPES = ["4096x4096", "14336x4096", "4096x14336", "28672x8192"]
SWEEP = [300, 128, 64, 512, 256, 192, 384, 96, 32, 768, 1024]  # the valley first
QUERY = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"

# ---- The candidates ---------------------------------------------------------------------------
# Each is a function of x (M, C), O and bits that makes a layer of random weights and returns its
# call.

def random_lowbit(O, C, bits):
    """A LowBit of random codes, groups of 128."""

    def random_words(b):
        shape = (O // 16, C * b // 256, 128)
        return torch.randint(-2**31, 2**31, shape, dtype=torch.int32, device="cuda")

    # At 3 bits the low two bits of the codes and their third bit stand in words of their own.
    words = random_words(2 if bits == 3 else bits)
    high = random_words(1) if bits == 3 else words

    # A float32 holds a group's scale and, in its last 8 bits, the zero point.
    grid = torch.rand(C // GROUP, O, device="cuda").view(torch.int32)
    grid = grid & -256 | 2 ** (bits - 1)
    return LowBit(words, high, grid, bits, GROUP, (O, C))

def _lowbit(x, O, bits):
    w = random_lowbit(O, x.size(1), bits)
    return lambda: lowbit_matmul(x, w)

def _plain(x, O, bits):
    C = x.size(1)
    packed = torch.randint(256, (O, C * bits // 8), dtype=torch.uint8, device="cuda")
    scale = torch.rand(O, C // GROUP, device="cuda")
    zero = torch.randint(2**bits, (O, C // GROUP), device="cuda").to(torch.uint8)
    return lambda: plain_matmul(x, packed, scale, zero, bits, GROUP)

def _cublas(x, O, bits):
    w = torch.randn(O, x.size(1), device="cuda", dtype=x.dtype)
    return lambda: F.linear(x, w)

def _tinygemm(x, O, bits):
    w = torch.randint(256, (O, x.size(1) // 2), dtype=torch.uint8, device="cuda")
    w = torch.ops.aten._convert_weight_to_int4pack(w, 8)
    grid = torch.rand(x.size(1) // GROUP, O, 2, device="cuda").to(x.dtype)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, grid)

def _int_mm(x, O, bits):
    tokens = max(17, len(x))                           # it takes no fewer rows
    x = x.new_ones(tokens, x.size(1)).to(torch.int8)
    w = torch.randint(-128, 128, (O, x.size(1)), dtype=torch.int8, device="cuda")
    return lambda: torch._int_mm(x, w.t())

def _scaled_mm(x, O, bits):
    w = torch.randn(O, x.size(1), device="cuda").to(torch.float8_e4m3fn)
    x = x.to(torch.float8_e4m3fn)
    x_scale = torch.ones(len(x), 1, device="cuda")
    w_scale = torch.ones(1, O, device="cuda")
    return lambda: torch._scaled_mm(x, w.t(), x_scale, w_scale, out_dtype=torch.bfloat16,
                                    use_fast_accum=True)

def _gemlite(x, O, bits):
    from gemlite import DType, GemLiteLinear
    C = x.size(1)
    layer = GemLiteLinear(bits, GROUP, C, O, DType.BF16, DType.BF16)
    q = torch.randint(2**bits, (O, C), dtype=torch.uint8, device="cuda")
    scale, zero = torch.rand(2, O * C // GROUP, 1, device="cuda").to(x.dtype)
    layer.pack(q, scale, zero, None)
    return lambda: layer(x)

def _humming(x, O, bits):
    from humming.layer import HummingLayer
    layer = HummingLayer(shape_n=O, shape_k=x.size(1), torch_dtype=x.dtype,
                         weight_config={"dtype": f"int{bits}", "group_size": GROUP}).cuda()
    layer.load_from_unquantized(torch.randn(O, x.size(1), device="cuda", dtype=x.dtype))
    layer.transform()
    return lambda: layer(x)

def random_quest(O, C, bits):
    """A weight of random codes, as quest_matmul wants it."""
    codes = torch.randint(256, (O, C * bits // 8), dtype=torch.uint8, device="cuda")
    return quest_operand(codes, torch.rand(O, 1, device="cuda"), bits, C)

def _quest(x, O, bits):
    """QuEST's layer; its time includes rotating and quantizing x."""
    w = random_quest(O, x.size(1), bits)
    return lambda: quest_linear(x, w, bits, bits)

def _codebooks(x, O):
    """Codes (O, C / 8, 2), codebooks (2, 256, 8) in x's dtype and scales (O,)."""
    codes = torch.randint(256, (O, x.size(1) // 8, 2), dtype=torch.uint8, device="cuda")
    books = torch.randn(2, 256, 8, device="cuda").to(x.dtype)
    return codes, books, torch.rand(O, device="cuda")

def _vq(x, O, bits):
    codes, books, scales = _codebooks(x, O)
    codes = codes.permute(2, 1, 0).contiguous()
    return lambda: vq_matmul(x, codes, books, scales)

def _aqlm(x, O, bits):
    from aqlm.inference_kernels.triton_kernel import triton_matmul
    x = x.half()
    codes, books, scales = _codebooks(x, O)
    codes = codes.view(torch.int8)
    books = books.unsqueeze(2)
    scales = scales.half().view(-1, 1, 1, 1)
    return lambda: triton_matmul(x, codes, books, scales, None)

class Candidate(NamedTuple):
    name: str
    make: Callable                     # (x, O, bits) -> the call that is timed
    bits: tuple                        # of the weights, that it has
    most: float                        # tokens that it is measured at
    grouped: bool = False              # it reads a scale and a zero point a group

CANDIDATES = [                         # cuBLAS is first, the others are ratios to it
    Candidate("cuBLAS", _cublas, (16,), math.inf),
    Candidate("lowbit_matmul", _lowbit, (1, 2, 3, 4, 8), math.inf, grouped=True),
    Candidate("plain_matmul", _plain, (1, 2, 3, 4, 8), 512, grouped=True),
    Candidate("quest_linear", _quest, (4, 8), math.inf),
    Candidate("vq_matmul", _vq, (2,), 4),
    Candidate("tinygemm", _tinygemm, (4,), 512, grouped=True),
    Candidate("_int_mm", _int_mm, (8,), math.inf),
    Candidate("_scaled_mm", _scaled_mm, (8,), math.inf),
    Candidate("gemlite", _gemlite, (1, 2, 4), 512, grouped=True),
    Candidate("humming", _humming, (1, 2, 3, 4, 8), 512, grouped=True),
    Candidate("aqlm", _aqlm, (2,), 4)]

OURS = ("lowbit_matmul", "quest_linear", "vq_matmul", "plain_matmul")

# ---- The time of a call -----------------------------------------------------------------------

def graph_us(calls, replays=20):
    """Microseconds a call: the median replay of a CUDA graph of 20 calls or more, in turn."""
    # The first call compiles, and chooses what there is to choose.
    calls[0]()
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    n = max(20, len(calls))
    with torch.cuda.graph(graph):
        for i in range(n):
            calls[i % len(calls)]()

    # For a twentieth of a second the clock adapts to this load, from what was before.
    start = time.time()
    while time.time() - start < 0.05:
        graph.replay()
        torch.cuda.synchronize()

    times = []
    for _ in range(replays):
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / n)
    return sorted(times)[replays // 2]

def copy_speed():
    """TB/s that a simple kernel reads and writes: 512 MB of each."""
    blocks = torch.zeros(2, 2**27, device="cuda")
    return 2**30 / graph_us([lambda: torch.neg(blocks[0], out=blocks[1])]) / 1e6

# ---- The run ----------------------------------------------------------------------------------

def shape(text):
    """argparse type: outputs x inputs, as it is written."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} is not outputs x inputs, such as 4096x4096")
    return text

def parse_args(argv=None):
    p = Parser(prog="time_kernels.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--shapes", nargs="+", type=shape,
        help="outputs x inputs (default: four of LLaMAs; of a sweep, the first two)")
    add("--bits", nargs="+", type=int, choices=(1, 2, 3, 4, 8),
        help="of the weights (default: all; of a sweep, 4)")
    add("--batches", nargs="+", type=number(int, 1),
        help="tokens (default: 1 16 64 512 4096; of a sweep, eleven from 32 to 1024)")
    add("--only", nargs="+", choices=[c.name for c in CANDIDATES],
        help="these candidates (default: every one installed)")
    add("--out", help="append the rows to this file, one JSON object each")
    add("--plot", help="draw speed-ups over cuBLAS into this file")
    add("--sweep", action="store_true", help="time other tiles of lowbit_matmul and quest_matmul")
    add("--minutes", type=number(float, 0), default=7, help="the most of a sweep (default: 7)")
    args = p.parse_args(argv)
    args.shapes = args.shapes or (SHAPES[:2] if args.sweep else SHAPES)
    args.bits = args.bits or ([4] if args.sweep else [1, 2, 3, 4, 8])
    args.batches = args.batches or (SWEEP if args.sweep else [1, 16, 64, 512, 4096])
    return args

def jobs_of(args):
    """[(shape, tokens, candidate, bits)]. Each product stands beside its own cuBLAS, which comes
    first: the clock drifts during a run."""
    jobs = []
    for shape in args.shapes:
        for M in args.batches:
            for c in CANDIDATES:
                wanted = not args.only or c.name in (*args.only, "cuBLAS")
                if not wanted or M > c.most:
                    continue
                jobs += [(shape, M, c, bits) for bits in c.bits if bits in (*args.bits, 16)]
    return jobs

def measure(jobs, copy, out):
    """Time the jobs -> their rows; each is printed, and appended to the file `out`, as it comes."""
    rows, missing, base = [], set(), {}
    for shape, M, candidate, bits in progress(jobs, "measured"):
        name = candidate.name
        O, C = map(int, shape.split("x"))
        if name in missing:
            continue

        # Each call of the graph has weights of its own, enough of them to fill the L2 anew.
        x = torch.randn(M, C, device="cuda", dtype=torch.bfloat16)
        size = O * C * bits // 8
        if candidate.grouped:
            size += 4 * O * C // GROUP
        copies = max(2, math.ceil(COPIES / size))
        try:
            us = graph_us([candidate.make(x, O, bits) for _ in range(copies)])
        except ImportError as e:
            missing.add(name)
            say(f"{name}: not installed ({e})")
            continue
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as e:
            # A peer that does not have this shape, or does not fit, ends nothing. A kernel of ours
            # that fails its own checks does.
            if isinstance(e, AssertionError) and name in OURS:
                raise
            say(f"{name} W{bits} {shape} batch {M}: {str(e).splitlines()[0][:80]}")
            continue

        cublas = base.setdefault((shape, M), us)
        size += 2 * M * (O + C)                        # x and y
        floor = max(size / copy, 2 * M * O * C / TFLOPS) / 1e6             # microseconds
        row = dict(shape=shape, batch=M, kernel=name, bits=bits, us=round(us, 2),
                   gb_s=round(size / us / 1e3), of_copy=round(size / us / copy / 1e6, 3),
                   floor_us=round(floor, 2), cublas=round(cublas / us, 3),
                   command=command_line())
        rows.append(row)
        say(f"{shape:>10} batch {M:4} | {name:13} W{bits:<2} | {us:7.1f} us | "
            f"{size / us / 1e3:5.0f} GB/s, {size / us / copy / 1e4:3.0f}% of copy | "
            f"{cublas / us:5.2f} x cuBLAS")
        if out:
            with open(out, "a") as file:
                print(json.dumps(row), file=file)
    return rows

def measure_rotation(copy):
    """QuEST's rotation, scale, codes and trust mask in one pass, against reading and writing."""
    for T, C in ((512, 4096), (4096, 4096), (4096, 14336)):
        parts = math.ceil(1e8 / T / C)
        x = torch.randn(parts, T, C, device="cuda").bfloat16()
        us = graph_us([functools.partial(hadamard_quantize, part, 4) for part in x])
        floor = T * C * 3 / copy / 1e6                 # two bytes in, one out
        say(f"hadamard_quantize {T} x {C} | {us:.1f} us, {us / floor:.2f} x its bytes' {floor:.1f}")

# ---- Other tiles ------------------------------------------------------------------------------

KEEP = 9           # candidates for a shape, bits and number of tokens
TOKENS = ((32, 0), (64, 0), (64, 32), (128, 0), (128, 32), (128, 64), (256, 0), (256, 64))

def tiles_to_try(M, w):
    """The present Tile for M tokens of a LowBit, then those of the least predicted time."""
    O, C = w.shape
    present = kernels.choose_tile(M, w)
    found = set()
    for (BLOCK_M, EXTRA), (BLOCK_N, warps), BLOCK_K, stages, split in itertools.product(
            TOKENS, ((64, 4), (128, 4), (128, 8)), (64, 128), (3, 4), (1, 2, 4, 8)):
        BLOCK_K = math.gcd(BLOCK_K, w.group, C)
        tile = Tile(BLOCK_M, EXTRA, BLOCK_N, BLOCK_K, warps, stages, split)
        registers = tile.tokens * BLOCK_N / warps / 32     # of a thread, for its sums
        shared = stages * tile.tokens * BLOCK_K * 2
        steps = C / BLOCK_K / split
        if registers > 160 or shared > 224 * 1024 or steps % 1 or tile.tokens > 2 * M:
            continue
        found.add(tile._replace(tma=kernels.TMA and BLOCK_M > 32))
    found.discard(present)

    # Of equal ones, those with the larger tiles: less traffic. Then more loads in flight.
    def rank(tile):
        time = kernels.predicted_time(M, w, tile)
        return time, -tile.tokens * tile.BLOCK_N, -tile.BLOCK_K, -tile.stages
    return [present] + unlike(sorted(found, key=rank))

def unlike(tiles):
    """The first KEEP of them, at most two that differ in BLOCK_K and stages alone."""
    kept = []
    for tile in tiles:
        like = tile._replace(BLOCK_K=0, stages=0)
        if sum(t._replace(BLOCK_K=0, stages=0) == like for t in kept) < 2:
            kept.append(tile)
    return kept[:KEEP]

def quest_tiles_to_try(M, O, C, bits):
    """The same for quest_matmul: those that leave the fewest processors idle, large ones first."""
    present = kernels.quest_tile(M, O, bits, bits)
    found = set()
    for BLOCK_M, BLOCK_N, BLOCK_K, stages in itertools.product(
            (16, 32, 64, 128), (64, 128), (128, 256), (3, 4)):
        # A wide tile of many tokens needs 8 warps for its sums.
        warps = 8 if BLOCK_M * BLOCK_N > 64 * 64 else 4
        shared = stages * BLOCK_K * (BLOCK_M + BLOCK_N * bits // 8)
        if shared <= 224 * 1024 and BLOCK_M <= 2 * M:
            found.add(QuestTile(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages))
    found.discard(present)

    def rank(tile):
        busiest = math.ceil(kernels.count_quest_tiles(M, O, tile) / kernels.SMS)
        return busiest * tile.BLOCK_M * tile.BLOCK_N, -tile.BLOCK_K, -tile.stages
    return [present] + unlike(sorted(found, key=rank))

def lowbit_sweep(M, O, C, bits):
    """-> name, [(Tile, its calls)]: a call for each copy of the weight, which returns y."""
    copies = max(2, math.ceil(COPIES / (O * C * bits / 8)))
    weights = [random_lowbit(O, C, bits) for _ in range(copies)]
    x = torch.randn(M, C, device="cuda", dtype=torch.bfloat16)
    y = x.new_empty(M, O)

    def call(w, tile):
        kernels.multiply_tiles(x, w, tile, y)
        return y
    return "lowbit_matmul", [(tile, [functools.partial(call, w, tile) for w in weights])
                             for tile in tiles_to_try(M, weights[0])]

def quest_sweep(M, O, C, bits):
    """The same of quest_linear with as many bits of x: rotating and quantizing it is timed too."""
    copies = max(2, math.ceil(COPIES / (O * C * bits / 8)))
    weights = [random_quest(O, C, bits) for _ in range(copies)]
    x = torch.randn(M, C, device="cuda", dtype=torch.bfloat16)

    def call(w, tile):
        a = hadamard_quantize(x, bits, planes=8 // bits)
        return quest_matmul(a, w, bits, bits, x.dtype, tile)
    return "quest_linear", [(tile, [functools.partial(call, w, tile) for w in weights])
                            for tile in quest_tiles_to_try(M, O, C, bits)]

def sweep(args):
    """Time the candidates of every shape, number of tokens and bits, beside cuBLAS."""
    end = time.time() + 60 * args.minutes
    for M, shape, bits in itertools.product(args.batches, args.shapes, args.bits):
        O, C = map(int, shape.split("x"))
        x = torch.randn(M, C, device="cuda", dtype=torch.bfloat16)
        dense = [_cublas(x, O, 16) for _ in range(max(2, math.ceil(COPIES / (O * C * 2))))]
        cublas = graph_us(dense)
        del dense

        makers = [lowbit_sweep] if M > kernels.FEW and M <= kernels.FUSED else []
        makers += [quest_sweep] if bits in (4, 8) else []
        for make in makers:
            name, candidates = make(M, O, C, bits)
            expected = candidates[0][1][0]().clone()
            times = []
            for tile, calls in candidates:
                if time.time() > end:
                    say(f"{args.minutes} minutes are up at {shape}, {M} tokens")
                    return
                try:
                    # Another order of sums, or of the parts of k, moves a bfloat16 by an ulp.
                    error = (calls[0]() - expected).abs().max() / expected.abs().max()
                    us = graph_us(calls) if error < 0.01 else math.inf
                except RuntimeError as e:              # more registers or shared memory than it has
                    say(f"{name} {tile}: {str(e).splitlines()[0][:80]}")
                    continue
                if us == math.inf:
                    say(f"{name} {tile} is WRONG by {error:.1e} at {shape}, {M} tokens")
                    continue
                times.append((us, tile))
                if args.out:
                    row = dict(shape=shape, batch=M, kernel=name, bits=bits, us=round(us, 2),
                               cublas=round(cublas / us, 3), tile=tile._asdict(),
                               present=tile == candidates[0][0], command=command_line())
                    with open(args.out, "a") as file:
                        print(json.dumps(row), file=file)
            report(name, shape, M, bits, cublas, candidates[0][0], times)

def report(name, shape, M, bits, cublas, present, times):
    """The present tile and the three fastest."""
    fastest = sorted(times, key=lambda pair: pair[0])[:3]
    shown = [pair for pair in times if pair[1] == present]
    shown += [pair for pair in fastest if pair[1] != present]
    for us, tile in shown:
        mark = "present" if tile == present else ""
        fields = " ".join(str(value) for value in tile)
        say(f"{shape:>10} {M:4} tokens | {name:13} W{bits} | {us:6.1f} us | {cublas / us:4.2f} x "
            f"cuBLAS | {fields} {mark}")

def main():
    args = parse_args()
    if not torch.cuda.is_available():
        raise UsageError("time_kernels.py times Triton kernels, and there is no GPU here; run it "
                         "on one")
    clocks = subprocess.getoutput(f"nvidia-smi --format=csv,noheader {QUERY}").strip()
    copy = copy_speed()
    say(f"{torch.cuda.get_device_name()} | torch {torch.__version__} | triton {triton.__version__} "
        f"| SM, memory, highest SM clock, power limit: {clocks} | copy {copy:.2f} TB/s")
    if args.sweep:
        sweep(args)
        return
    rows = measure(jobs_of(args), copy, args.out)
    if not args.only:
        measure_rotation(copy)
    if args.plot:
        plot(rows, args.plot)

# ---- The figure -------------------------------------------------------------------------------

LINES = {          # of the figure: (kernel, bits) -> label and colour; peers are grey
    ("lowbit_matmul", 2): ("ours, 2 bits", "#1f77b4"),
    ("lowbit_matmul", 4): ("ours, 4 bits", "#17becf"),
    ("quest_linear", 4): ("ours, QuEST W4A4", "#d62728"),
    ("humming", 2): ("humming, 2 bits", "#555555"),
    ("humming", 4): ("humming, 4 bits", "#888888"),
    ("tinygemm", 4): ("tinygemm, 4 bits", "#aaaaaa"),
    ("gemlite", 4): ("gemlite, 4 bits", "#bbbbbb"),
}

def plot(rows, path):
    """Draw the speed-up over cuBLAS against the number of tokens, for ours and the peers.

    rows: what `measure` returns, or those of a file that --out wrote; of their first shape.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shape = rows[0]["shape"]
    figure, ax = plt.subplots(figsize=(8.3, 4.4))
    ends = []
    for (kernel, bits), (label, color) in LINES.items():
        line = sorted((r["batch"], r["cublas"]) for r in rows
                      if (r["shape"], r["kernel"], r["bits"]) == (shape, kernel, bits))
        if not line:
            continue
        tokens, speed = zip(*line)
        ours = kernel in ("lowbit_matmul", "quest_linear")
        ax.plot(tokens, speed, "o-", color=color, markersize=3.5, linewidth=2 if ours else 1.2)
        ends.append((speed[0], label, color))

    # Labels at the lines' first points, each at least 0.17 above the one below.
    height = -1
    for speed, label, color in sorted(ends):
        height = max(speed, height + 0.17)
        ax.annotate(label, (1, height), xytext=(-8, 0), textcoords="offset points", ha="right",
                    va="center", color=color, fontsize=9)

    ax.axhline(1, color="#777777", linewidth=1)
    ax.annotate("cuBLAS bfloat16", (4096, 1), xytext=(0, 4), textcoords="offset points",
                ha="right", color="#777777", fontsize=9)
    ax.set_xscale("log", base=2)
    tokens = sorted({r["batch"] for r in rows})
    ax.set_xticks(tokens, [str(n) for n in tokens])
    ax.minorticks_off()
    ax.set_xlim(0.9, 4600)
    ax.set_ylim(0, None)
    ax.set_yticks(range(6), [f"{n}x" for n in range(6)])
    ax.yaxis.tick_right()
    ax.set_xlabel("tokens at once")
    O, C = shape.split("x")
    ax.set_title(f"Speed-up over cuBLAS, {O} outputs x {C} inputs, one H100", fontsize=11)
    ax.spines[["top", "left"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    figure.subplots_adjust(left=0.22, right=0.95, top=0.92, bottom=0.11)
    figure.savefig(path, dpi=160, facecolor="white")

if __name__ == "__main__":
    run(main)
