"""Time of the kernels against cuBLAS and every peer that is installed, on this GPU.

    python tests/time_kernels.py --out rows.jsonl               # everything, about seven minutes
    python tests/time_kernels.py --shapes 14336x4096 --bits 4   # one shape, 4 bits beside cuBLAS
    python tests/time_kernels.py --only tinygemm gemlite        # some candidates beside cuBLAS
    python tests/time_kernels.py --sweep --out sweep.jsonl      # other tiles than the tables have

Ours and most peers multiply bfloat16 activations x (M, C) with layers of random weights (O, C), on
grids in groups of 128. A CUDA graph reads at least 200 MB of copies of the weights in turn, so that
no call finds its weights in the L2 cache. The graphs of all candidates are replayed in turns, three
times, so that they share what the GPU's clock does; a time is the median replay. The peers are
torch's own products and, where they are installed, gemlite, humming and aqlm. What torch's 8-bit
products need besides, quantizing x, is not timed.

First all of it is compiled, by up to 16 processes. Then another process measures: a kernel that
touches memory which is not there leaves its process without CUDA. If a peer does that, a new
process goes on without it; one of ours ends the benchmark. Last it prints what was asked of the
kernels and missed; tests/kernel_rows.py prints that and the tables from the rows.

--sweep times tiles that kernels.py does not choose, for 17 to 1024 tokens. A model of waves and
padding picks those that may be fast; each is held to the result of the present tile before it is
timed. It ends by itself after --minutes.
"""
import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
import triton

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import kernels
from kernel_rows import print_asked
from kernels import (LowBit, QuestTile, Tile, hadamard_quantize, lowbit_matmul, plain_matmul,
                     quest_linear, quest_matmul, quest_operand, vq_matmul)
from model import UsageError
from nanobit.cli import Parser, number, run
from nanobit.ranks import progress, say
from nanobit.runs import command_line

GROUP = 128                            # inputs that share a scale and a zero point
COPIES = 200e6                         # bytes of weights that a graph reads: four times the L2
SHAPES = ["14336x4096", "4096x4096", "4096x14336"]
COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 300, 320, 384, 448, 512, 640, 768,
          1024, 2048, 4096)                            # tokens
SWEEP = [300, 128, 64, 512, 256, 192, 384, 96, 32, 768, 1024]  # the valley first
QUERY = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"

# ---- The candidates ---------------------------------------------------------------------------
# Each is a function of O, C and bits that makes a layer of random weights: a function of x (M, C)
# that returns the call which is timed.

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

def _lowbit(O, C, bits):
    w = random_lowbit(O, C, bits)
    return lambda x: lambda: lowbit_matmul(x, w)

def _plain(O, C, bits):
    packed = torch.randint(256, (O, C * bits // 8), dtype=torch.uint8, device="cuda")
    scale = torch.rand(O, C // GROUP, device="cuda")
    zero = torch.randint(2**bits, (O, C // GROUP), device="cuda").to(torch.uint8)
    return lambda x: lambda: plain_matmul(x, packed, scale, zero, bits, GROUP)

def _cublas(O, C, bits):
    w = torch.randn(O, C, device="cuda", dtype=torch.bfloat16)
    return lambda x: lambda: F.linear(x, w)

def _tinygemm(O, C, bits):
    w = torch.randint(256, (O, C // 2), dtype=torch.uint8, device="cuda")
    w = torch.ops.aten._convert_weight_to_int4pack(w, 8)
    grid = torch.rand(C // GROUP, O, 2, device="cuda").to(torch.bfloat16)
    return lambda x: lambda: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, grid)

def _int_mm(O, C, bits):
    w = torch.randint(-128, 128, (O, C), dtype=torch.int8, device="cuda")

    def layer(x):
        tokens = max(17, len(x))                       # it takes no fewer rows
        codes = x.new_ones(tokens, C).to(torch.int8)
        return lambda: torch._int_mm(codes, w.t())
    return layer

def _scaled_mm(O, C, bits):
    w = torch.randn(O, C, device="cuda").to(torch.float8_e4m3fn)
    w_scale = torch.ones(1, O, device="cuda")

    def layer(x):
        codes = x.to(torch.float8_e4m3fn)
        x_scale = torch.ones(len(x), 1, device="cuda")
        return lambda: torch._scaled_mm(codes, w.t(), x_scale, w_scale, out_dtype=torch.bfloat16,
                                        use_fast_accum=True)
    return layer

def _gemlite(O, C, bits):
    from gemlite import DType, GemLiteLinear
    layer = GemLiteLinear(bits, GROUP, C, O, DType.BF16, DType.BF16)
    q = torch.randint(2**bits, (O, C), dtype=torch.uint8, device="cuda")
    scale, zero = torch.rand(2, O * C // GROUP, 1, device="cuda").to(torch.bfloat16)
    layer.pack(q, scale, zero, None)
    return lambda x: lambda: layer(x)

def _humming(O, C, bits):
    from humming.layer import HummingLayer
    layer = HummingLayer(shape_n=O, shape_k=C, torch_dtype=torch.bfloat16,
                         weight_config={"dtype": f"int{bits}", "group_size": GROUP}).cuda()
    layer.load_from_unquantized(torch.randn(O, C, device="cuda", dtype=torch.bfloat16))
    layer.transform()
    return lambda x: lambda: layer(x)

def random_quest(O, C, bits):
    """A weight of random codes, as quest_matmul wants it."""
    codes = torch.randint(256, (O, C * bits // 8), dtype=torch.uint8, device="cuda")
    return quest_operand(codes, torch.rand(O, 1, device="cuda"), bits, C)

def _quest(O, C, bits):
    """QuEST's layer; its time includes rotating and quantizing x."""
    w = random_quest(O, C, bits)
    return lambda x: lambda: quest_linear(x, w, bits, bits)

def _codebooks(O, C, dtype):
    """Codes (O, C / 8, 2), codebooks (2, 256, 8) of the dtype and scales (O,)."""
    codes = torch.randint(256, (O, C // 8, 2), dtype=torch.uint8, device="cuda")
    books = torch.randn(2, 256, 8, device="cuda").to(dtype)
    return codes, books, torch.rand(O, device="cuda")

def _vq(O, C, bits):
    codes, books, scales = _codebooks(O, C, torch.bfloat16)
    codes = codes.permute(2, 1, 0).contiguous()
    return lambda x: lambda: vq_matmul(x, codes, books, scales)

def _aqlm(O, C, bits):
    from aqlm.inference_kernels.triton_kernel import triton_matmul
    codes, books, scales = _codebooks(O, C, torch.float16)
    codes = codes.view(torch.int8)
    books = books.unsqueeze(2)
    scales = scales.half().view(-1, 1, 1, 1)

    def layer(x):
        x = x.half()
        return lambda: triton_matmul(x, codes, books, scales, None)
    return layer

class Candidate(NamedTuple):
    name: str
    make: Callable                     # (O, C, bits) -> a layer
    bits: tuple                        # of the weights, that it has
    most: float                        # tokens that it is measured at
    counts: tuple = COUNTS             # of tokens where --batches names none
    grouped: bool = False              # it reads a scale and a zero point a group

# Humming beyond 1,024 tokens, and what is slow to set up or to run, would not fit into a call of
# ten minutes.
SOME = (1, 16, 64, 128, 300, 512, 1024, 4096)
FOUR = (1, 16, 64, 300)
CANDIDATES = [                         # cuBLAS is first, the others are ratios to it
    Candidate("cuBLAS", _cublas, (16,), math.inf),
    Candidate("lowbit_matmul", _lowbit, (1, 2, 3, 4, 8), math.inf, grouped=True),
    Candidate("plain_matmul", _plain, (4,), 512, FOUR, grouped=True),
    Candidate("quest_linear", _quest, (4, 8), math.inf),
    Candidate("vq_matmul", _vq, (2,), 4),
    Candidate("tinygemm", _tinygemm, (4,), 512, SOME, grouped=True),
    Candidate("_int_mm", _int_mm, (8,), math.inf, SOME),
    Candidate("_scaled_mm", _scaled_mm, (8,), math.inf, SOME),
    Candidate("gemlite", _gemlite, (4, 8), 512, FOUR, grouped=True),
    Candidate("humming", _humming, (1, 2, 3, 4, 8), 1024, grouped=True),
    Candidate("aqlm", _aqlm, (2,), 4)]

OURS = ("lowbit_matmul", "quest_linear", "vq_matmul", "plain_matmul")

# ---- The time of a call -----------------------------------------------------------------------

class Fault(Exception):
    """A kernel has left this process without CUDA. args: its candidate's name and bits."""

class Graph(NamedTuple):
    """Calls that can be replayed."""
    graph: torch.cuda.CUDAGraph
    calls: list                        # they keep alive what the graph knows by its address alone
    count: int                         # of calls in a replay
    owner: tuple                       # name and bits of the candidate

def capture(calls, owner=("", 0)):
    """The Graph of 20 calls or more, in turn."""
    # The first call compiles, and chooses what there is to choose. What a layer makes at its first
    # call and keeps must not lie in this graph's memory, so each layer has one before.
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    count = max(20, len(calls))
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()

    # What fails in a graph by itself fails here.
    graph.replay()
    torch.cuda.synchronize()
    return Graph(graph, calls, count, owner)

def times_of(graphs):
    """[microseconds a call], a median for each Graph, of three rounds in which all have a turn."""
    times = [[] for _ in graphs]
    for _ in range(3):
        for graph, mine in zip(graphs, times):
            try:
                mine += replay_times(graph)
            except RuntimeError as e:
                raise Fault(*graph.owner) from e
    return [statistics.median(mine) for mine in times]

def replay_times(graph):
    """[microseconds a call] of up to seven replays."""
    # For a fiftieth of a second the clock adapts to this load, from what was before.
    start = time.time()
    while time.time() - start < 0.02:
        graph.graph.replay()
        torch.cuda.synchronize()

    # Fewer replays of a slow one
    times = []
    for _ in range(7):
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        before.record()
        graph.graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / graph.count)
        if time.time() - start > 0.15:
            break
    return times

def graph_us(calls):
    """Microseconds a call."""
    return times_of([capture(calls)])[0]

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
        help="outputs x inputs (default: three of LLaMAs; of a sweep, the first two)")
    add("--bits", nargs="+", type=int, choices=(1, 2, 3, 4, 8),
        help="of the weights (default: all; of a sweep, 4)")
    add("--batches", nargs="+", type=number(int, 1),
        help="tokens (default: 24 counts from 1 to 4096, some candidates at fewer; of a sweep, "
             "eleven from 32 to 1024)")
    add("--only", nargs="+", choices=[c.name for c in CANDIDATES],
        help="these candidates (default: every one installed)")
    add("--out", help="append the rows to this file, one JSON object each")
    add("--sweep", action="store_true", help="time other tiles of lowbit_matmul and quest_matmul")
    add("--minutes", type=number(float, 0), default=7, help="the most of a sweep (default: 7)")
    args = p.parse_args(argv)
    args.shapes = args.shapes or (SHAPES[:2] if args.sweep else SHAPES)
    args.bits = args.bits or ([4] if args.sweep else [1, 2, 3, 4, 8])
    if args.sweep:
        args.batches = args.batches or SWEEP
    return args

def jobs_of(args):
    """[(shape, tokens, candidate, bits)]: for each shape and number of tokens, those that are timed
    in turns, cuBLAS first."""
    jobs = []
    for shape in args.shapes:
        for M in args.batches or COUNTS:
            for c in CANDIDATES:
                wanted = not args.only or c.name in (*args.only, "cuBLAS")
                if not wanted or M > c.most or not args.batches and M not in c.counts:
                    continue
                jobs += [(shape, M, c, bits) for bits in c.bits if bits in (*args.bits, 16)]
    return jobs

def call_once(name, shape, bits, counts):
    """Call a product of each number of tokens, so that its kernels lie compiled on the disk."""
    candidate = next(c for c in CANDIDATES if c.name == name)
    O, C = map(int, shape.split("x"))
    try:
        layer = candidate.make(O, C, bits)
        for M in counts:
            layer(torch.randn(M, C, device="cuda", dtype=torch.bfloat16))()
            torch.cuda.synchronize()
    except Exception:
        pass                                           # `measure` says what it was

def compile_ahead(jobs):
    """Call every product of the jobs once, in a process for each core."""
    groups = {}                                        # (name, shape, bits): numbers of tokens
    for shape, M, candidate, bits in jobs:
        groups.setdefault((candidate.name, shape, bits), []).append(M)
    if len(groups) < 8:
        return                                         # the processes would take longer to start

    # Those that compile longest first. Half of a group's counts at a time: two processes share it.
    slow = ["gemlite", "humming", "lowbit_matmul"]
    order = lambda key: slow.index(key[0]) if key[0] in slow else len(slow)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count()), spawn) as pool:
        calls = [pool.submit(call_once, *key, counts) for key in sorted(groups, key=order)
                 for counts in (groups[key][::2], groups[key][1::2])]
        try:
            for call in progress(calls, "compiled"):
                call.result()
        except concurrent.futures.process.BrokenProcessPool:
            say("a process ended while it compiled: the rest compiles as it is timed")

def layers_of(shape, candidate, bits):
    """Layers of a candidate, enough of them to fill the L2 anew, and the bytes of each."""
    O, C = map(int, shape.split("x"))
    size = O * C * bits // 8
    if candidate.grouped:
        size += 4 * O * C // GROUP
    copies = max(2, math.ceil(COPIES / size))
    return [candidate.make(O, C, bits) for _ in range(copies)], size

def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:80]

def cuda_works():
    """Whether this process has a GPU still, after an error."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

def attempt(function, *args, owner, where):
    """function(*args), or None of what a peer does not have or does not fit: that ends nothing. A
    kernel of ours that fails its own checks does. Fault, where CUDA is gone after it."""
    name, bits = owner
    try:
        return function(*args)
    except (ImportError, RuntimeError, ValueError, AssertionError) as e:
        if isinstance(e, AssertionError) and name in OURS:
            raise
        if not cuda_works():
            raise Fault(name, bits) from e
        say(f"{name} W{bits} {where}: {first_line(e)}")

def measure(jobs, copy, out):
    """Time the jobs in a process apart -> their rows. A peer with a Fault is left out from there
    on."""
    spawn = multiprocessing.get_context("spawn")
    rows = []
    while jobs:
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            new, owner = pool.submit(measure_here, jobs, copy, out).result()
        rows += new
        if not owner:
            break
        name, bits = owner
        if name in (*OURS, "cuBLAS"):
            raise RuntimeError(f"{name} W{bits} has left its process without CUDA")
        say(f"another process goes on, without {name} W{bits}")
        timed = {(row["shape"], row["batch"]) for row in rows}
        jobs = [(shape, M, candidate, b) for shape, M, candidate, b in jobs
                if (shape, M) not in timed and (candidate.name, b) != owner]
    return rows

def measure_here(jobs, copy, out):
    """Time the jobs -> their rows, and None or the owner of a Fault, which ends this. Each row is
    printed, and appended to the file `out`, as it comes."""
    rows, layers = [], {}
    fields = [list(field) for _, field in itertools.groupby(jobs, key=lambda job: job[:2])]
    for field in progress(fields, "measured"):
        shape, M = field[0][:2]
        try:
            rows += measure_field(field, layers, copy, out)
        except Fault as fault:
            name, bits = fault.args
            say(f"{name} W{bits} {shape} batch {M}: {first_line(fault.__cause__)}")
            return rows, fault.args
    return rows, None

def measure_field(field, layers, copy, out):
    """The rows of one shape and number of tokens. layers: those of the shape, from field to
    field."""
    shape, M = field[0][:2]
    O, C = map(int, shape.split("x"))
    x = torch.randn(M, C, device="cuda", dtype=torch.bfloat16)
    if not any(key[0] == shape for key in layers):
        layers.clear()
    graphs = []
    sizes = []                                         # bytes of w
    for _, _, candidate, bits in field:
        owner = candidate.name, bits
        key = shape, *owner
        if key not in layers:
            layers[key] = attempt(layers_of, shape, candidate, bits, owner=owner, where=shape)
        if layers[key]:
            copies, size = layers[key]
            calls = [layer(x) for layer in copies]
            graph = attempt(capture, calls, owner, owner=owner, where=f"{shape} batch {M}")
            if graph:
                graphs.append(graph)
                sizes.append(size)

    # Every time is compared with cuBLAS.
    if not graphs or graphs[0].owner[0] != "cuBLAS":
        say(f"{shape} batch {M}: left out, because cuBLAS failed")
        return []
    rows = []
    times = times_of(graphs)
    for graph, size, us in zip(graphs, sizes, times):
        name, bits = graph.owner
        size += 2 * M * (O + C)                        # x and y
        row = dict(shape=shape, batch=M, kernel=name, bits=bits, us=round(us, 2),
                   gb_s=round(size / us / 1e3), of_copy=round(size / us / copy / 1e6, 3),
                   cublas=round(times[0] / us, 3), command=command_line())
        rows.append(row)
        say(f"{shape:>10} batch {M:4} | {name:13} W{bits:<2} | {us:7.1f} us | "
            f"{size / us / 1e3:5.0f} GB/s, {size / us / copy / 1e4:3.0f}% of copy | "
            f"{times[0] / us:5.2f} x cuBLAS")
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
        dense, _ = layers_of(shape, CANDIDATES[0], 16)
        cublas = graph_us([layer(x) for layer in dense])
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
    jobs = jobs_of(args)
    compile_ahead(jobs)
    rows = measure(jobs, copy, args.out)
    if not args.only:
        measure_rotation(copy)
    print_asked(rows)

if __name__ == "__main__":
    run(main)
