"""A small LLaMA with its data, training recipe, evaluation, checkpoints and text generation.

    python model.py                            # pre-train the dense base model into out/base.pt
    python model.py --smoke                    # every line of it in a few seconds
    python model.py eval out/base.pt           # loss on the whole validation split
    python model.py sample out/base.pt --prompt "def main("
    python model.py sample --size 7B --bits 2  # tokens/s of random weights, no text
    python model.py export out/rtn-w4.pt DIR   # any checkpoint as a Hugging Face folder
    torchrun --standalone --nproc_per_node=8 model.py --size 100M      # the same run on 8 GPUs

The idea:
  1. Text becomes tokens by a byte-pair encoding that is trained in seconds on the text itself.
  2. A LLaMA (RMSNorm, rotary positions, grouped-query attention, SwiGLU) predicts the next token.
  3. Every method starts here: quest.py trains such a model with low-bit linears, the others take
     out/base.pt, or a Hugging Face folder, and compress it.

Papers: Llama 2 (arXiv 2307.09288); the training recipe and the presets are QuEST's (2502.05003).
Not here: dropout, biases.

Shapes: B sequences, T tokens each, C = n_embd, nh = n_head, nkv = n_kv_head, hs = head size.
"""
import argparse
import array
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import heapq
import http.client
import importlib
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
    import resource
except ImportError:                                    # Windows: no lock on --out, no peak memory
    fcntl = resource = None

from quantizers import TRITON, QuantLinear, bits_per_weight, fake_quant_tokens, full_float32

class UsageError(ValueError):
    """A mistake of the user's. The message is one line: the value, the limit and the fix."""

def say(text):
    if rank() == 0:
        put(sys.stdout, text + "\n")

def put(stream, text):
    """Write the text and flush. No run ends because its output cannot be written: what a stream
    cannot take any more, a closed pipe or a log on a full disk, is dropped from then on."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as e:
        # What is still in the buffer goes to the null device, or Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(e, BrokenPipeError) and stream is not sys.stderr:
            put(sys.stderr, f"note: the output cannot be written ({e.strerror}); the run goes on\n")

def show_every_letter():
    """What a terminal or a log cannot show becomes an escape such as \\u03a9, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):             # None where there is no terminal
            stream.reconfigure(errors="backslashreplace")

def progress(items, label):
    """Yield the items; every 10 s say how far it is and how long it will take."""
    start = last = time.perf_counter()
    for i, item in enumerate(items, 1):
        yield item
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            say(f"{label} {i}/{len(items)} | eta {(last - start) / i * (len(items) - i):.0f}s")

# ---- Many GPUs: torchrun starts one process for each, a rank ----------------------------------
# All ranks run the whole script and stay equal; rank 0 alone prints and writes. They share the
# windows of a training step, and with --fsdp also the weights.

def rank():
    return int(os.environ.get("RANK", 0))

def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))

def take_gpu(args):
    """From here on "cuda" means the GPU of this process's number. Raises UsageError."""
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if "size" not in args:
        raise UsageError("torchrun is for training; start this command with plain python")
    if args.device.startswith("cuda:"):
        raise UsageError(f"--device {args.device}: torchrun gives each process a GPU of its own; "
                         "leave --device out")
    if args.device == "cuda":
        if local >= gpus:
            raise UsageError(f"torchrun's {os.environ['LOCAL_WORLD_SIZE']} processes here are more "
                             f"than the {gpus} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(local)

def join_ranks(args):
    """Meet the other processes. Raises UsageError where they cannot share the work."""
    if args.fsdp and world_size() == 1:
        raise UsageError("--fsdp shares the weights among processes and there is only one; start "
                         "more by torchrun --standalone --nproc_per_node=2")
    if args.batch_size % world_size():
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of torchrun's "
                         f"{world_size()} processes")
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        patience = datetime.timedelta(hours=4)         # while rank 0 tokenizes
        dist.init_process_group(backend, timeout=patience)

def agree(*flags):
    """Each flag, on wherever it is on for one rank. No rank returns before all have called."""
    if world_size() == 1:
        return flags
    found = torch.tensor([0, *map(bool, flags)])
    dist.all_reduce(found, dist.ReduceOp.MAX)          # over the CPUs: no GPU waits
    return found.tolist()[1:]

@contextlib.contextmanager
def first_rank_first():
    """The first rank of each machine runs the block before the others, which find its files."""
    late = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if late:
        agree()
    yield
    if not late:
        agree()

def from_rank_0(tensors):
    """Overwrite the tensors with rank 0's, on all ranks."""
    for t in tensors if world_size() > 1 else ():
        dist.broadcast(t.detach(), 0)

def distribute(model, args):
    """What trains the model on all ranks: it averages their gradients, but of the parameters that
    the model calls `private`, which get theirs elsewhere. --fsdp: the model itself, of whose
    weights each rank keeps a share; a block's are whole only while it computes."""
    if world_size() == 1:
        return model
    if not args.fsdp:
        from_rank_0((*model.parameters(), *model.buffers()))
        if args.compile:                               # each block whole, as on one GPU
            torch._dynamo.config.optimize_ddp = False
        ddp, private = nn.parallel.DistributedDataParallel, getattr(model, "private", [])
        ddp._set_params_and_buffers_to_ignore_for_model(
            model, [*private, *(name for name, _ in model.named_buffers())])
        return ddp(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(torch.device(args.device).type, (world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    return model

def whole(t):
    """The tensor, no longer sharded if it was; all ranks must call."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t

def gather(x):
    """x with every sharded tensor in it whole, in rank 0's main memory, and None elsewhere."""
    if isinstance(x, dict):
        return {k: gather(v) for k, v in x.items()}
    if not hasattr(x, "full_tensor"):
        return x
    x = whole(x)                                       # one at a time on the GPU
    return None if rank() else x.cpu()

def placed_like(t, p):
    """The whole tensor t as p is: on its device and, if p is, sharded."""
    if not hasattr(p, "placements"):
        return t
    return dist.tensor.distribute_tensor(t.to(p.device), p.device_mesh, p.placements)

# ---- The model --------------------------------------------------------------------------------

@dataclasses.dataclass
class LlamaConfig:
    vocab_size: int = 1024
    n_layer: int = 3
    n_embd: int = 256
    n_head: int = 4
    n_kv_head: int = 4
    n_hidden: int = 768          # width inside the SwiGLU
    seq_len: int = 128           # longest window it is trained on
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()     # Llama 3.1's factor, low and high frequency factor, first length
    head_dim: int = 0            # of one head; 0: n_embd / n_head
    norm_eps: float = 1e-5
    tied: bool = False           # the head shares the embedding's weights
    a_bits: int = 16             # of the linears' inputs, and of rotated queries and keys
    kv_bits: int = 16            # of the keys and values as the linears return them

    def __post_init__(self):
        if self.n_head % self.n_kv_head or not self.head_dim and self.n_embd % self.n_head:
            raise UsageError(f"width {self.n_embd}, heads {self.n_head} and key/value heads "
                             f"{self.n_kv_head} must divide one another")
        self.head_dim = self.head_dim or self.n_embd // self.n_head

class Preset(collections.namedtuple("Preset", "n_layer n_embd n_head n_hidden  lr steps "
                                    "batch_size accumulate seq_len")):
    def config(self, vocab_size, seq_len=None, tied=False):
        return LlamaConfig(vocab_size, self.n_layer, self.n_embd, self.n_head, self.n_head,
                           self.n_hidden, seq_len or self.seq_len, tied=tied)

PRESETS = {  # 30M to 800M: QuEST's shapes, peak learning rates and steps of 512 x 512 tokens
    "tiny": Preset(3, 256, 4, 768, 2e-3, 400, 16, 1, 128),
    "0.5M": Preset(4, 96, 3, 288, 4e-3, 1033, 64, 1, 256),       # to 3.4M: for the scaling law,
    "0.9M": Preset(4, 128, 2, 384, 4e-3, 1702, 64, 1, 256),      # 25 tokens a parameter at the
    "1.9M": Preset(4, 192, 3, 576, 4e-3, 1765, 128, 1, 256),     # default vocabulary
    "3.4M": Preset(4, 256, 4, 768, 4e-3, 3001, 128, 1, 256),
    "30M": Preset(6, 640, 5, 1792, 1.2e-3, 11444, 512, 8, 512),
    "50M": Preset(7, 768, 6, 2048, 1.2e-3, 19073, 512, 8, 512),
    "100M": Preset(8, 1024, 8, 2816, 6e-4, 38146, 512, 16, 512),
    "200M": Preset(10, 1280, 10, 3584, 3e-4, 76293, 512, 16, 512),
    "430M": Preset(13, 1664, 13, 4608, 1.5e-4, 164031, 512, 32, 512),
    "800M": Preset(16, 2048, 16, 5632, 7.5e-5, 305175, 512, 32, 512),
    "7B": Preset(32, 4096, 32, 11008, 3e-5, 1000, 8, 8, 1024),  # Llama 2 7B
}
SMOKE = {"steps": 12, "batch_size": 4, "accumulate": 2, "seq_len": 64}

class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        h = x.float()                                                      # statistics in float32
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)

class Linear(nn.Linear):
    """No bias. The float32 master weight is cast to the dtype of its input: bfloat16 compute."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def apply_linears(x, *linears):
    """[linear(x) for each]. A class with `fused` does once what they share (QuEST: x's codes)."""
    fused = getattr(type(linears[0]), "fused", None)
    return fused(x, linears) if fused else [linear(x) for linear in linears]

class Joined(nn.Module):
    """Linears that share their input as one, in the place of the first. See for_decoding."""

    def __init__(self, linears):
        super().__init__()
        self.sizes, first = [n_out(m) for m in linears], linears[0]
        if isinstance(first, QuantLinear):
            self.linear = QuantLinear(first.spec, {
                name: torch.cat([getattr(m, name) for m in linears])
                for name, t in first.named_buffers()})
        else:
            self.linear = first
            first.weight = nn.Parameter(torch.cat([m.weight for m in linears]), False)

    @staticmethod
    def fused(x, linears):
        return linears[0].linear(x).split(linears[0].sizes, -1)

def n_out(linear):
    return len(linear.packed if isinstance(linear, QuantLinear) else linear.weight)

def joined(*linears):
    """(Joined, None ...), or the linears themselves where one cannot hold them all."""
    kinds = {type(m) for m in linears}
    if kinds == {Linear}:
        return Joined(linears), *[None] * (len(linears) - 1)
    if kinds != {QuantLinear}:
        return linears

    # Packed linears are joined row under row. That needs one way to read all rows, and tensors
    # that have a row for each output: a codebook, or one scale for a whole tensor, has none.
    alike = all(m.spec == linears[0].spec for m in linears)
    row_by_row = all(len(t) == n_out(m) for m in linears for t in m.buffers())
    if not alike or not row_by_row:
        return linears
    return Joined(linears), *[None] * (len(linears) - 1)

def rope_tables(seq_len, head_size, theta, device, scaling=()):
    """cos and sin, float32 (T, hs), in Hugging Face's half-split order: hs/2 frequencies, twice.

    scaling (Llama 3.1): frequencies that turn less than `low` times in the first training length
    are divided by `factor`, those that turn more than `high` times stay; between, a mixture."""
    freq = theta ** -(torch.arange(0, head_size, 2, device=device).float() / head_size)
    if scaling:
        factor, low, high, length = scaling
        stay = ((length * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # (hs/2,)
        freq = freq * (stay + (1 - stay) / factor)
    angle = torch.outer(torch.arange(seq_len, device=device).float(), freq).repeat(1, 2)
    return angle.cos(), angle.sin()

def apply_rope(x, cos, sin):
    """Rotate the pairs (i, i + hs/2) of x (B, heads, T, hs) by their position's angle."""
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)

def quantized(x, bits):
    """Activations, a token (of a head) at a time; 16 bits: not quantized."""
    return fake_quant_tokens(x, bits, symmetric=False)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_size, self.config = c.head_dim, c
        self.wq = Linear(c.n_embd, c.n_head * self.head_size)
        self.wk = Linear(c.n_embd, c.n_kv_head * self.head_size)
        self.wv = Linear(c.n_embd, c.n_kv_head * self.head_size)
        self.wo = Linear(c.n_head * self.head_size, c.n_embd)

    def forward(self, x, cos, sin, cache=None):
        (B, T, _), a_bits, kv_bits = x.shape, self.config.a_bits, self.config.kv_bits
        q, k, v = apply_linears(quantized(x, a_bits), self.wq, self.wk, self.wv)
        q, k, v = (y.view(B, T, -1, self.head_size).transpose(1, 2)        # (B, nh or nkv, T, hs)
                   for y in (q, quantized(k, kv_bits), quantized(v, kv_bits)))
        q, k = (quantized(apply_rope(y, cos, sin), a_bits) for y in (q, k))
        if cache:
            y = cache.attend(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               enable_gqa=q.size(1) != k.size(1))
        y = quantized(y, a_bits).transpose(1, 2)                           # (B, T, nh, hs)
        return self.wo(y.reshape(B, T, -1))                                # (B, T, C)

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w_gate = Linear(c.n_embd, c.n_hidden)
        self.w_up = Linear(c.n_embd, c.n_hidden)
        self.w_down = Linear(c.n_hidden, c.n_embd)
        self.config = c

    def forward(self, x):
        a_bits = self.config.a_bits
        gate, up = apply_linears(quantized(x, a_bits), self.w_gate, self.w_up)
        return self.w_down(quantized(F.silu(gate) * up, a_bits))           # (B, T, C)

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.n_embd, c.norm_eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.n_embd, c.norm_eps), MLP(c)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))

def rerun(f, *inputs):
    """f(*inputs), keeping the inputs alone for the backward pass, which computes f again."""
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)

class LLaMA(nn.Module):
    """Decoder-only transformer. `dtype` is that of the activations; the weights stay float32.
    lean = True saves memory: the backward pass computes each block, and the logits, once more."""
    lean = False

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        c, self.config, self.dtype = config, config, dtype
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.head = Linear(c.n_embd, c.vocab_size)
        if c.tied:
            self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:                           # 2L residual branches add up: shrink each
                residual = name.endswith(("wo.weight", "w_down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if residual else 0.02)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, as_stored=False):
        """The model of a Hugging Face folder. Its weights become float32 ones; as_stored: they keep
        their dtype and stay in the mapped files until they are used. Raises UsageError."""
        config = read_hf_config(folder)
        stored = open_hf_files(folder, config)
        config.tied = config.tied and hf_head_is_tied(folder, stored)
        with torch.device("meta"):                     # shapes alone: no memory
            model = cls(config, dtype)
        state = {name: tensor if as_stored else tensor.to(torch.float32, copy=True)
                 for name, tensor in read_hf_tensors(folder, model, stored)}
        model.load_state_dict(state, assign=True)
        if model.config.tied:
            model.head.weight = model.embed.weight
        return model

    def forward(self, idx, targets=None):
        """Ids (B, T) -> logits (B, T, vocab) and the mean loss in nats (None without targets)."""
        cos, sin = self.rope(idx)                                          # (T, hs)
        x = self.embed(idx).to(self.dtype)                                 # (B, T, C)
        for block in self.blocks:
            x = rerun(block, x, cos, sin) if self.lean else block(x, cos, sin)
        return self.predict(x, targets)

    def rope(self, idx):
        c = self.config
        return rope_tables(idx.size(1), c.head_dim, c.rope_theta, idx.device, c.rope_scaling)

    def predict(self, x, targets=None):
        x = self.norm(x)
        if self.lean and targets is not None:          # never all logits in float32
            loss = lambda x, y: F.cross_entropy(self.head(x).float(), y, reduction="sum")
            n = 256 if torch.is_grad_enabled() else max(256, 2**26 // self.config.vocab_size)
            parts = zip(x.flatten(0, 1).split(n), targets.flatten().split(n))
            return None, sum(rerun(loss, *part) for part in parts) / targets.numel()
        logits = self.head(x)                                              # (B, T, vocab)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_parts(self):
        """torch.compile of one block, which serves all blocks, and of the head with the loss."""
        for block in self.blocks:
            block.compile()
        self.predict = torch.compile(self.predict)

    def linears(self):
        """(name, module) of the linears inside the blocks: all that any method quantizes."""
        return [(n, m) for n, m in self.named_modules()
                if n.startswith("blocks.") and n.rsplit(".", 1)[-1].startswith("w")]

    def replace_linears(self, make):
        """Put make(name, linear) in the place of every linear of the blocks."""
        for name, linear in self.linears():
            self.set_submodule(name, make(name, linear))
        return self

    def for_decoding(self):
        """For generation alone, which waits for memory: the weights in the activations' dtype, and
        linears that share an input joined, so that a step has fewer kernels."""
        for p in self.parameters():
            if p.dim() == 2:
                p.requires_grad_(False).data = p.data.to(self.dtype)
        for block in self.blocks:
            a, m = block.attn, block.mlp
            a.wq, a.wk, a.wv = joined(a.wq, a.wk, a.wv)
            m.w_gate, m.w_up = joined(m.w_gate, m.w_up)
        return self

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None, cached=True):
        """Append n sampled tokens to idx (B, T); temperature 0 takes the most likely one.

        cached: keys and values are kept up to seq_len tokens. Beyond, the window slides, all of
        its positions change, and each token costs a pass over the whole window.
        """
        longest = self.config.seq_len
        choose = Chooser(self, len(idx), temperature, top_k, generator)
        ahead = max(0, min(n, longest + 1 - idx.size(1))) if cached else 0 # contexts that fit
        for token in decode(self, idx, ahead, choose) if ahead else ():
            idx = torch.cat((idx, token), dim=1)
        for _ in range(n - ahead):
            choose.draw()
            token = choose(self(idx[:, -longest:])[0][:, -1])
            idx = torch.cat((idx, token), dim=1)
        return idx

@torch.no_grad()
def block_hessians(model, data, args):
    """Yield, block by block, [(name, linear, sum of x x^T over its inputs x (C, C))].

    The inputs come from 64 windows of the training text. What was put into a linear's place before
    the next block is asked for feeds that block: each is quantized on what those before it give.
    """
    idx, hessians = batch(data.train, 0, 64, args.seq_len, args.seed, args.device)[0], {}
    def collect(m, inputs):
        x = inputs[0].flatten(0, -2).float()                               # (n, C)
        with full_float32():                           # TF32 would round x to 11 bits
            hessians[m] = hessians.get(m, 0) + x.t() @ x
    for i in range(model.config.n_layer):
        linears = [(n, m) for n, m in model.linears() if n.startswith(f"blocks.{i}.")]
        hooks = [m.register_forward_pre_hook(collect) for _, m in linears]
        hessians.clear()
        for part in idx.split(16):
            model(part)
        for hook in hooks:
            hook.remove()
        yield [(name, m, hessians[m]) for name, m in linears]

# ---- Generation, a token at a time ------------------------------------------------------------

class Chooser:
    """logits (B, vocab) -> token ids (B, 1), by `draw`'s random numbers."""

    def __init__(self, model, batch, temperature, top_k, generator):
        device, vocab = model.embed.weight.device, model.config.vocab_size
        self.temperature, self.top_k, self.generator = temperature, top_k, generator
        self.noise = torch.ones(batch, vocab, device=device)

    def draw(self):
        if self.temperature >= 1e-6:
            self.noise.exponential_(generator=self.generator)

    def __call__(self, logits):
        if self.temperature < 1e-6:
            return logits.argmax(-1, keepdim=True)
        noise, ids = self.noise, None
        if self.top_k and self.top_k < logits.size(-1):        # exactly so many, ties or not
            logits, ids = logits.topk(self.top_k, sorted=False)
            noise = noise.gather(1, ids)
        # The largest of p / noise, torch.multinomial's choice, but without p, and it never waits.
        best = (logits.float() / self.temperature - noise.log()).argmax(-1, keepdim=True)
        return best if ids is None else ids.gather(1, best)

class Cache:
    """A layer's keys and values, (B, nkv, S, hs) each, for S tokens at most."""

    def __init__(self, model, batch, length):
        c = model.config
        shape = 2, batch, c.n_kv_head, length, c.head_dim
        self.keys, self.values = torch.zeros(shape, dtype=model.dtype,
                                             device=model.embed.weight.device)
        self.tickets = torch.zeros(batch * c.n_head, dtype=torch.int32, device=self.keys.device)

    def attend(self, q, k, v):
        """Store k and v (B, nkv, T, hs) at the positions `at` (T,); q (B, nh, T, hs), each of which
        sees the positions that `mask` (T, S) allows -> the same shape."""
        self.keys[:, :, self.at], self.values[:, :, self.at] = k, v
        groups = q.size(1) // k.size(1)                # query heads that share a key head
        y = F.scaled_dot_product_attention(q.reshape(len(q), k.size(1), -1, q.size(-1)), self.keys,
                                           self.values, self.mask.repeat(groups, 1))
        return y.reshape(q.shape)                      # a GPU's y has another memory order

@torch.no_grad()
def decode(model, idx, n, choose):
    """Yield the n tokens (B, 1) after idx (B, T), in one tensor that changes: T + n - 1 tokens have
    to fit in the window. On a GPU every step but the first two is one CUDA graph."""
    (B, T), c, S, device = idx.shape, model.config, idx.size(1) + n - 1, idx.device
    cache, graph = [Cache(model, B, S) for _ in model.blocks], None
    tables = rope_tables(S, c.head_dim, c.rope_theta, device, c.rope_scaling)      # (S, hs) each
    slots, at = torch.arange(S, device=device), torch.arange(T, device=device)
    def forward(idx, fast):
        x = model.embed(idx).to(model.dtype)
        cos, sin = tables if fast else (table[at] for table in tables)
        mask = None if fast else slots <= at.unsqueeze(1)
        for layer in cache:
            layer.at, layer.mask = at, mask
        if fast:
            return fast_step(model, x, cos, sin, cache)
        for block, layer in zip(model.blocks, cache):
            x = block(x, cos, sin, layer)                                          # (B, T, C)
        return model.predict(x[:, -1:])[0][:, -1]                                  # (B, vocab)
    def step():
        token.copy_(choose(forward(token, has_kernels(model))))
        at.add_(1)
    choose.draw()
    token = choose(forward(idx, False))                # which packs the weights for the kernels
    at = at[-1:] + 1                                   # where the next step's token goes
    for _ in range(n - 1):
        yield token
        choose.draw()
        if graph:
            graph.replay()
            continue
        step()
        if idx.is_cuda and capturable(model):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):              # records the next step, does not run it
                step()
    yield token

def capturable(model):
    """Does no layer copy from the CPU or wait for the GPU? Of the packed ones, kernels.py's do not.
    Asked after a first step, which chooses the kernels."""
    return all(m.fast and m.fast[1] is not None for m in model.modules()
               if isinstance(m, QuantLinear))

def has_kernels(model):
    """May fast_step compute a step?"""
    c = model.config
    joint = (m for block in model.blocks for m in (block.attn.wq, block.mlp.w_gate))
    return (model.embed.weight.is_cuda and TRITON and model.dtype != torch.float32
            and c.a_bits == c.kv_bits == 16 and c.head_dim in (32, 64, 128, 256)
            and all(isinstance(m, Joined) for m in joint))

def fast_step(model, x, cos, sin, cache):
    """What the blocks and the head compute for one token x (B, 1, C), in 8 kernels a block."""
    from kernels import add_norm, matvec, overlapping, rope_attention, silu_mul
    x, delta = x.squeeze(1), None                                                  # (B, C)
    def times(linear, x):
        one = isinstance(linear, Linear) and len(x) == 1
        return matvec(x, linear.weight) if one else linear(x)
    with overlapping():
        for block, layer in zip(model.blocks, cache):
            attn, mlp = block.attn, block.mlp
            x, h = add_norm(x, delta, block.attn_norm)
            y = rope_attention(times(attn.wq.linear, h), cos, sin, layer)          # (B, nh * hs)
            x, h = add_norm(x, times(attn.wo, y), block.mlp_norm)
            delta = times(mlp.w_down, silu_mul(times(mlp.w_gate.linear, h)))
        return times(model.head, add_norm(x, delta, model.norm)[1])                # (B, vocab)

# ---- Tokenizer --------------------------------------------------------------------------------
# Words with their space, numbers of up to three digits, signs, white space: merges stay inside.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\w\s]|_)+|\s*[\r\n]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"            # stands after every document

# A text is encoded in pieces of about so many characters: a large file takes little memory, and
# tiktoken's patterns, which fail on a run of a million spaces, never see such a run whole.
PIECE = 2**14
# In PATTERN, as in the patterns of tiktoken's encodings, a token ends between a letter or digit
# and white space, and between the end of a line of text and a letter. No pattern looks behind, so
# a cut in such a place changes no token.
CUT = re.compile(r"(?<=[^\W_])(?=[ \t\r\n])|(?<=\S\n)(?=[^\W\d_])")
WORDS_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")       # for tokenizers of other projects

def spans(text, cut=CUT, force=True, skip=0):
    """Yield (start, stop) of the pieces of a text. They end where the pattern `cut` allows it.

    force: end anywhere where it does not for PIECE characters in a row. That is no normal text,
    and the tokens at such an end may be others. skip: characters to leave out between two pieces.
    """
    start = 0
    while len(text) - start > 2 * PIECE:
        limit = start + 2 * PIECE if force else len(text)
        found = cut.search(text, start + PIECE, limit)
        stop = found.start() if found else limit
        yield start, stop
        start = stop + skip if found else stop
    if start < len(text):
        yield start, len(text)

def count_words(docs):
    """{match of PATTERN: how often it stands in the documents}"""
    import regex                                       # comes with tiktoken
    words = collections.Counter()
    pieces = [(doc, start, stop) for doc in docs for start, stop in spans(doc)]
    for doc, start, stop in progress(pieces, "data: counting words"):
        words.update(regex.findall(PATTERN, doc[start:stop]))
    return words

def train_bpe(docs, vocab_size):
    """Byte-pair encoding: merge the most frequent pair of neighbours until vocab_size - 1 tokens.

    docs: strings -> token bytes in order of rank, the 256 bytes first. END takes the last id.
    A merge costs as much as there are places of its pair, whatever the length of the words.
    """
    # All different words stand in one row of symbols, a gap (-1) before, between and after them.
    # before[p] and after[p] are the neighbours of the symbol at p; a merge unlinks the second
    # symbol of the pair and marks its place as a gap too.
    symbols, weights = array.array("i", [-1]), array.array("q", [0])
    for word, count in count_words(docs).items():
        letters = word.encode()
        symbols.extend(letters)
        symbols.append(-1)
        weights.extend([count] * len(letters) + [0])   # how often the text has the word
    before = array.array("q", range(-1, len(symbols) - 1))
    after = array.array("q", range(1, len(symbols) + 1))

    pairs = collections.Counter()                      # (left, right): how often in the text
    places = collections.defaultdict(lambda: array.array("q"))     # and where, by the left one
    for p in range(1, len(symbols) - 1):
        pair = symbols[p], symbols[p + 1]
        if -1 not in pair:
            pairs[pair] += weights[p]
            places[pair].append(p)                     # may be out of date, never incomplete

    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    for new in progress(range(256, vocab_size - 1), "data: training a tokenizer, merge"):
        # Old counts are too high, never too low: one that is up to date on top is the highest.
        while heap and -heap[0][0] != pairs[heap[0][1]]:
            _, pair = heapq.heappop(heap)
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
        if not heap:
            break
        _, pair = heapq.heappop(heap)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])

        # Merge from left to right. Each merge takes two pairs from the counts and brings two.
        fresh = set()
        for p in places.pop(pair):
            q = after[p]
            if (symbols[p], symbols[q]) != pair:       # one of them was merged with another since
                continue
            left, right = before[p], after[q]
            pairs[pair] -= weights[p]
            symbols[p], symbols[q] = new, -1
            after[p], before[right] = right, p
            if symbols[left] != -1:
                now = symbols[left], new
                pairs[symbols[left], pair[0]] -= weights[p]
                pairs[now] += weights[p]
                places[now].append(left)
                fresh.add(now)
            if symbols[right] != -1:
                now = new, symbols[right]
                pairs[pair[1], symbols[right]] -= weights[p]
                pairs[now] += weights[p]
                places[now].append(p)
                fresh.add(now)
        for now in fresh:
            if pairs[now]:
                heapq.heappush(heap, (-pairs[now], now))
    return tokens

class Tokenizer:
    """What the tokenizers below share. `n_vocab` counts their ids and `eot_token` is END's."""
    bytes_per_decoded = 1.0      # bytes of text for each byte that decoding gives: see Data

    def spans(self, text):
        """(start, stop) of pieces of a text, whose tokens, one after the other, are the text's."""
        return spans(text)

    def encode_ordinary(self, text):
        """Ids of a text of any length, in which END and other special tokens are just text."""
        pieces = [text[start:stop] for start, stop in self.spans(text)]
        return [i for ids in self.encode_ordinary_batch(pieces) for i in ids]

    def count_bytes(self, ids):
        """Bytes of the text that the ids (n,) stand for; END stands for none."""
        # Each document by itself, because some tokenizers put a space before a document and
        # take it away again when they decode one.
        ids = np.asarray(ids)
        docs = np.split(ids, np.flatnonzero(ids == self.eot_token) + 1)
        decoded = (self.decode_bytes(doc[doc != self.eot_token].tolist()) for doc in docs)
        return self.bytes_per_decoded * sum(map(len, decoded))

class BPETokenizer(Tokenizer):
    """An encoding of tiktoken."""

    def __init__(self, inner):
        self.inner, self.n_vocab, self.eot_token = inner, inner.n_vocab, inner.eot_token

    def encode_ordinary_batch(self, pieces):
        return self.inner.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)

    def decode(self, ids):
        return self.inner.decode(ids)

    def decode_bytes(self, ids):
        return self.inner.decode_bytes(ids)

def make_tokenizer(spec):
    """The tokenizer of a spec: a name that tiktoken knows, a list of latin-1 strings in order of
    rank, or the dict of a Hugging Face folder."""
    if isinstance(spec, dict):
        return HFTokenizer(spec)
    if isinstance(spec, list):
        ranks = {t.encode("latin-1"): i for i, t in enumerate(spec)}
        return BPETokenizer(tiktoken.Encoding("nanobit", pat_str=PATTERN, mergeable_ranks=ranks,
                                              special_tokens={END: len(ranks)}))
    try:
        return BPETokenizer(tiktoken.get_encoding(spec))
    except ValueError:
        raise UsageError(f"--vocab {spec} is neither a size nor one of tiktoken's encodings: "
                         + " ".join(tiktoken.list_encoding_names())) from None
    except OSError as e:                               # requests raises OSErrors
        raise UsageError(f"--vocab {spec}: tiktoken could not fetch it ({type(e).__name__}); "
                         "try a size such as --vocab 1024") from None

# ---- Data -------------------------------------------------------------------------------------

@dataclasses.dataclass
class Data:
    """Token ids of the splits. Choose settings by `dev`; `val` is only for what is reported."""
    train: np.ndarray
    dev: np.ndarray
    val: np.ndarray
    spec: object                 # makes the tokenizer, see make_tokenizer
    digest: str                  # sha256 of all documents in order
    name: str
    text_bytes: dict             # of each split's own text, by the split's name

    def __post_init__(self):
        self.tokenizer = make_tokenizer(self.spec)
        # A tokenizer that changes texts (one with a normalizer, say) does not give back as many
        # bytes as it was given. Bits per byte are those of the text that was given.
        decoded = max(1, self.tokenizer.count_bytes(self.val))
        self.tokenizer.bytes_per_decoded = self.text_bytes["val"] / decoded

def load_data(source=None, vocab="1024", seq_len=128, spec=None, limit=None):
    """Read, split and tokenize text. The tokens are cached by content and settings.

    source: None (Python's own library), a text file, a folder (every .txt .md .py below it) or an
    http(s) address. vocab: the size of a BPE to train or a tiktoken name; spec: a checkpoint's
    tokenizer, instead. limit: so many files at most. Raises UsageError.
    """
    docs, name = read_documents(source, limit)
    digest = hash_of(docs)
    parts = split(docs)
    del docs                                           # of few files, the parts are copies
    sizes = {part: sum(map(len, texts)) for part, texts in parts.items()}
    spec = spec or cached([digest, sizes, vocab, PATTERN],
                          lambda: {"spec": json.dumps(train_spec(parts["train"], vocab))},
                          lambda f: json.loads(str(f["spec"])))
    arrays = cached([digest, sizes, spec, PATTERN], lambda: tokenize(parts, spec),
                    lambda f: {part: f[part] for part in parts})
    for part, ids in arrays.items():
        if len(ids) < seq_len + 1:
            raise UsageError(f"--data {name} is too short: its {part} part has {len(ids)} tokens, "
                             f"one window needs {seq_len + 1}; give more text or a lower --seq-len")
    text_bytes = {part: sum(len(block) for text in texts for block in utf8(text))
                  for part, texts in parts.items()}
    return Data(**arrays, spec=spec, digest=digest, name=name, text_bytes=text_bytes)

def split(docs):
    """Documents -> {"train": documents, "dev": documents, "val": documents}: 18, 1 and 1 of 20."""
    if len(docs) >= 40:                                # by file: none is in two parts
        return {"train": [d for i, d in enumerate(docs) if i % 20 != 19],
                "dev": docs[19::40], "val": docs[39::40]}
    cuts = [(d, len(d) * 18 // 20, len(d) * 19 // 20) for d in docs]
    return {"train": [d[:a] for d, a, b in cuts],      # few files: the end of each is held out
            "dev": [d[a:b] for d, a, b in cuts], "val": [d[b:] for d, a, b in cuts]}

def utf8(text, block=2**20):
    """Yield the bytes of a text in blocks, so that a large one is not copied whole."""
    for i in range(0, len(text), block):
        yield text[i:i + block].encode()

def hash_of(docs):
    """sha256 of the documents, a zero byte between two."""
    digest = hashlib.sha256()
    for i, doc in enumerate(docs):
        if i:
            digest.update(b"\0")
        for block in utf8(doc):
            digest.update(block)
    return digest.hexdigest()

@functools.cache
def temporary_cache():
    """The cache of this process alone, where the user has no home: for downloads. It says so."""
    say("note: no home folder, so no downloads and tokens are kept; XDG_CACHE_HOME names a place")
    return tempfile.TemporaryDirectory(prefix="nanobit-")      # removed when Python ends

def cache_dir():
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        path = pathlib.Path(home or pathlib.Path.home() / ".cache", "nanobit")
    except RuntimeError:                               # a user id without HOME and without a name
        path = pathlib.Path(temporary_cache().name)
    with contextlib.suppress(OSError):                 # whoever writes there reports it
        path.mkdir(parents=True, exist_ok=True)
    return path

def cached(what, make, read):
    """read(arrays by name) of the cache's file for `what`, a list for JSON; else of make()."""
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    cache = cache_dir() / f"{key}.npz"
    try:
        with np.load(cache) as f:
            return read(f)
    except Exception:           # not there yet; or damaged or foreign, which may fail in any way
        arrays = make()
    try:
        temporary = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **arrays)
        temporary.replace(cache)
    except OSError as e:
        say(f"data: not cached in {cache.parent} ({e.strerror}); XDG_CACHE_HOME moves it")
    return read(arrays)

def train_spec(docs, vocab):
    """The tokenizer spec of --vocab: a BPE of that size for these documents, or a name as it is."""
    if not vocab.isdecimal():
        return vocab
    if int(vocab) < 257:
        raise UsageError(f"--vocab {vocab} is too small: the 256 bytes and {END} need 257")
    start = time.perf_counter()
    tokens = train_bpe(docs[::1 + sum(map(len, docs)) // 16_000_000], int(vocab))
    say(f"data: trained a tokenizer of {len(tokens) + 1} tokens in "
        f"{time.perf_counter() - start:.1f} s")
    return [t.decode("latin-1") for t in tokens]

def tokenize(parts, spec):
    """{part: documents} -> {part: ids}; END follows every document."""
    enc = make_tokenizer(spec)
    dtype = np.uint16 if enc.n_vocab <= 2**16 else np.uint32
    ids = {part: [np.zeros(0, dtype)] for part in parts}
    pieces = [(part, doc, start, stop) for part, docs in parts.items() for doc in docs
              for start, stop in enc.spans(doc)]
    batches = [pieces[i:i + 64] for i in range(0, len(pieces), 64)]
    for group in progress(batches, "data: tokenizing"):
        encoded = enc.encode_ordinary_batch([doc[start:stop] for _, doc, start, stop in group])
        for (part, doc, _, stop), piece in zip(group, encoded):
            end = [enc.eot_token] if stop == len(doc) else []
            ids[part].append(np.array(piece + end, dtype))
    return {part: np.concatenate(a) for part, a in ids.items()}

def find_texts(root, out):
    """Paths of the .txt, .md and .py files below a folder, but not below folders named in `out`."""
    def fail(error):
        raise error

    files = []
    try:
        for folder, folders, names in os.walk(root, onerror=fail):     # follows no links to folders
            folders[:] = set(folders) - out
            paths = [pathlib.Path(folder, name) for name in names]
            files += [p for p in paths if p.suffix in (".txt", ".md", ".py") and p.is_file()]
    except OSError as e:
        raise UsageError(f"--data {e.filename}: {e.strerror}; make it readable, or move it "
                         "elsewhere") from None
    return sorted(files)

def not_text(content):
    """Why the bytes are not UTF-8 text, or None where they are."""
    try:
        content.decode()
    except UnicodeDecodeError as e:
        return f"not UTF-8 at byte {e.start}"
    return "binary: it has zero bytes" if b"\0" in content else None

def read_documents(source, limit=None):
    """Texts in the sorted order of their paths, and the source's name."""
    # Where the text is.
    if source is None:
        root, name = sysconfig.get_path("stdlib"), f"Python {platform.python_version()}'s library"
    else:
        web = source.lower().startswith(("http://", "https://"))
        root, name = download(source) if web else source, source
    root = pathlib.Path(root)
    if not name or not os.path.exists(root):           # False also for a name that is too long
        raise UsageError(f"--data {name!r}: no such file or folder")
    if root.is_dir():
        out = set() if source else {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        files = find_texts(root, out)[:limit]
    elif root.is_file():
        files = [root]
    else:                                              # a pipe can be read once, not by every run
        raise UsageError(f"--data {name} is neither a file nor a folder; write the text to a file")

    # Read it.
    docs, problems = [], []
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as e:
            raise UsageError(f"--data {path}: {e.strerror}") from None
        problem = not_text(content)
        if problem:
            problems.append(problem)
        else:
            docs.append(content.decode())
        del content                                    # before the next one is read

    # Complain about what is no text.
    if problems and not docs:
        raise UsageError(f"--data {name} is not UTF-8 text ({problems[0]}); convert it first")
    if problems:
        say(f"data: left out {len(problems)} of {len(files)} files, which are not UTF-8 text")
    if not any(docs):
        raise UsageError(f"--data {name} is empty: no text in {len(files)} .txt, .md or .py files")
    return [d for d in docs if d], name

def download(url):
    """Fetch once into the cache, under a temporary name that is renamed when it is complete."""
    path = cache_dir() / (hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:24]
                          + ".txt")
    if not path.exists():
        say(f"data: downloading {url}")
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with urllib.request.urlopen(url, timeout=30) as r:
                content = r.read()
            problem = not_text(content)
            if not problem:                            # else the next run asks again
                temporary.write_bytes(content)
                temporary.replace(path)
        except (OSError, ValueError, http.client.HTTPException) as e:      # also: a full disk
            temporary.unlink(missing_ok=True)
            raise UsageError(f"--data {url}: {getattr(e, 'reason', None) or e}") from None
        if problem:
            raise UsageError(f"--data {url} is not UTF-8 text ({problem}); convert it first")
    return path

def batch(tokens, step, batch_size, seq_len, seed, device):
    """Windows at random places: inputs and targets (B, T). They depend on (seed, step) alone, so
    that a resumed run goes on with the same data."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - seq_len, batch_size)
    x = torch.from_numpy(np.stack([tokens[i:i + seq_len + 1] for i in starts]).astype(np.int64))
    if torch.device(device).type == "cuda":            # then the copy does not wait for the GPU
        x = x.pin_memory()
    x = x.to(device, non_blocking=True)
    return x[:, :-1], x[:, 1:]

@torch.no_grad()
@torch.compiler.set_stance("force_eager")              # no compiling for these shapes
def evaluate(model, tokens, seq_len, tokenizer=None, batch_size=None):
    """Mean loss over non-overlapping windows; every token but the first is scored once.

    tokens: ids (n,) -> {"loss": nats per token, "ppl": its exponential} and, with a tokenizer,
    "bits_per_byte" of the text that was tokenized, the only one to compare across tokenizers.
    batch_size: windows at a time, by default 2^13 tokens, for which packed weights unpack once; on
    a GPU, which would wait for the CPU, what takes some 1 GB.
    """
    device, n = next(model.parameters()).device, len(tokens) - 1
    together = 2**26 // model.config.n_hidden if device.type == "cuda" else 2**13  # tokens
    batch_size = batch_size or max(1, together // seq_len)
    lean, model.lean = getattr(model, "lean", False), True                 # few logits at a time
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    full, total = n // seq_len, 0.0
    windows = [(i * seq_len, min(batch_size, full - i), seq_len)
               for i in range(0, full, batch_size)]
    if n % seq_len:
        windows.append((full * seq_len, 1, n % seq_len))                   # the short last one
    for i, b, t in progress(windows, "evaluating"):
        x, y = (ids[j:j + b * t].view(b, t).to(device) for j in (i, i + 1))
        total += model(x, y)[1].item() * (b * t)
    loss, model.lean = total / n, lean
    scores = {"loss": loss, "ppl": math.exp(min(loss, 700))}
    if tokenizer:                                      # the first token is context, not scored
        n_bytes = tokenizer.count_bytes(tokens) - tokenizer.count_bytes(tokens[:1])
        scores["bits_per_byte"] = total / math.log(2) / max(1, n_bytes)
    return scores

# ---- Checkpoints: tensors and plain values only -----------------------------------------------

def check_weights(tensors, path):
    """Raise UsageError for the first of the pairs (name, tensor) that has a NaN or an infinity."""
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        # In parts: a mapped tensor is read without ever being whole in memory.
        if not all(part.isfinite().all() for part in tensor.detach().flatten().split(2**24)):
            raise UsageError(f"{path}: the weight {name} is not finite (it has a NaN or an "
                             "infinity); fetch or train it again")

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

SAVED = []  # the checkpoints that this process wrote, for the message after Ctrl-C

def save_checkpoint(path, model, **content):
    """Write {format, config, linears, model, **content} to a temporary name, then rename it. Raises
    UsageError, and leaves an older file as it is, where a weight is not finite or there is no
    room."""
    linears = {n: m.spec for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    content = {"format": "nanobit-1", "config": dataclasses.asdict(model.config),
               "linears": linears, "model": model.state_dict(), **content}
    content = gather(content)
    if rank():
        return agree()                                 # the file is there when all go on
    check_weights(content["model"].items(), path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        SAVED.append(path)
    except (OSError, RuntimeError) as e:               # torch turns a short write into the latter
        e = e if isinstance(e, OSError) else e.__context__ or e
        raise UsageError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; "
                         "free space or choose another --out") from None
    finally:
        if os.path.exists(temporary):                  # also after Ctrl-C
            os.remove(temporary)
    agree()

def read_checkpoint(path):
    """The content that save_checkpoint wrote. Raises UsageError for anything else."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: " + ("a folder, not a checkpoint" if os.path.isdir(path)
                                        else "no such checkpoint"))
    try:
        with zipfile.ZipFile(path) as z:               # torch.load itself verifies no checksum
            damaged = z.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # a damaged or foreign file may fail in any way: refused in all
        raise UsageError(f"{path} is damaged or not a checkpoint ({type(e).__name__})") from None
    if damaged:
        raise UsageError(f"{path} is damaged: the checksum of {damaged} is wrong")
    fields = {f.name for f in dataclasses.fields(LlamaConfig)}
    if not isinstance(content, dict) or content.get("format") != "nanobit-1" or not (
            {"config", "linears", "model"} <= set(content) and set(content["config"]) <= fields):
        raise UsageError(f"{path} was not written by this version of this project")
    return content

def load_checkpoint(path, device="cpu", dtype=torch.float32, as_stored=False):
    """(model, content) of a checkpoint, dense or packed, or of a Hugging Face folder, whose weights
    may stay `as_stored`, see from_pretrained. Raises UsageError."""
    if os.path.isdir(path):
        content = {"linears": {}, "method": "dense", "settings": {"smoke": False}, "data": None,
                   "tokenizer": read_hf_tokenizer(path)}
        return LLaMA.from_pretrained(path, dtype, as_stored).to(device).eval(), content
    content = read_checkpoint(path)
    if "tokenizer" not in content:
        raise UsageError(f"{path} is a training state for --resume; use the .pt file beside it")
    model, state = LLaMA(LlamaConfig(**content["config"]), dtype), content["model"]
    for name, spec in content["linears"].items():
        model.set_submodule(name, QuantLinear(spec, {
            k.rsplit(".", 1)[1]: v for k, v in state.items() if k.startswith(name + ".")}))
    load_weights(model, state, path)
    return model.to(device).eval(), content

def load_weights(model, state, path):
    """load_state_dict, naming in one line the first tensor that does not fit or is not finite."""
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        here, there = (tuple(s[name].shape) if name in s else "missing" for s in (own, state))
        if here != there:
            raise UsageError(f"{path} does not fit: {name} is {there} there and {here} here; "
                             "use the --size and the method that wrote it")
    check_weights(state.items(), path)
    model.load_state_dict({name: placed_like(t, own[name]) for name, t in state.items()})

# ---- Hugging Face folders: LLaMA 1 to 3, Mistral, TinyLlama, SmolLM2 --------------------------

HF_PARTS = {  # the parts of a weight's name here and there
    "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
    "head": "lm_head", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
HF_SIZES = {"vocab_size": "vocab_size", "num_hidden_layers": "n_layer", "hidden_size": "n_embd",
            "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
            "intermediate_size": "n_hidden", "max_position_embeddings": "seq_len",
            "head_dim": "head_dim"}
HF_ONLY = {  # what LLaMA above computes; a setting that is not there means the first value
    "model_type": (None, "llama", "mistral"), "hidden_act": ("silu", "swish"),
    "attention_bias": (False,), "mlp_bias": (False,), "num_local_experts": (1,),
    "quantization_config": (None,)}
HF_ONLY_ROPE = {"rope_type": ("default", "llama3"), "partial_rotary_factor": (1,)}
HF_DEFAULTS = {  # transformers' own, where config.json does not have the name at all
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 2**17, "num_key_value_heads": 8,
                "sliding_window": 4096}}
HF_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
HF_PACKAGES = {  # the oldest version that will do, and why
    "safetensors": "0.4.2",      # reads and so can refuse float8
    "tokenizers": "0.15.1"}      # has encode_special_tokens; before, setting it changes nothing
HF_TEXTS = (  # what a folder says about its tokenizer and generation; an export copies it
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")

def hf_name(name):
    """blocks.3.attn.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    return ".".join(HF_PARTS.get(part, part) for part in name.split("."))

def need_package(name):
    """Import one of the optional packages that Hugging Face folders need. Raises UsageError where
    it is missing or too old."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UsageError("Hugging Face folders need two more packages: "
                         "pip install safetensors tokenizers") from None
    name = name.partition(".")[0]                      # of safetensors.torch
    found, oldest = sys.modules[name].__version__, HF_PACKAGES[name]
    if version_numbers(found) < version_numbers(oldest):
        raise UsageError(f"Hugging Face folders need {name} {oldest} or newer and this is {found}: "
                         "pip install --upgrade safetensors tokenizers")
    return module

def version_numbers(text):
    """0.15.1rc1 -> [0, 15, 1]"""
    return [int(n) for n in re.findall(r"\d+", text)[:3]]

def shown(x):
    """A value of somebody's JSON file, short and on one line, for a message."""
    text = x if isinstance(x, str) and x.isprintable() else json.dumps(x)
    return text if len(text) <= 60 else text[:60] + "..."

def first_line(e):
    """The first line of an exception's message."""
    return (str(e).splitlines() or [type(e).__name__])[0]

def leaves_folder(name):
    """Is a file of this name, which somebody's file gives, outside of the folder it speaks of?"""
    path = pathlib.PurePath(name)
    return path.is_absolute() or ".." in path.parts

def read_hf_json(folder, name):
    path = pathlib.Path(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
    except OSError as e:
        raise UsageError(f"{folder} is not a Hugging Face folder: {name}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:          # the latter: a million brackets
        raise UsageError(f"{path} is damaged: {first_line(e)}") from None
    return content

def read_hf_config(folder):
    """config.json -> LlamaConfig. Raises UsageError for what LLaMA above does not compute."""
    def refuse(problem):
        raise UsageError(f"{folder}/config.json: {problem}")

    def check_only(settings, only):
        for name, known in only.items():
            value = settings.get(name, known[0])
            if value not in known:
                choices = " or ".join(map(str, known))
                refuse(f"{name} {shown(value)} is not supported, only {choices}")

    def check_integer(name, limit):
        value = c.get(name)
        if type(value) is not int or not 1 <= value <= limit:              # True is no number here
            problem = "missing" if value is None else shown(value)
            refuse(f"{name} is {problem}, not a positive integer up to {limit}")

    def check_float(name, value):
        if type(value) not in (int, float) or not 0 < value < math.inf:    # nor is NaN
            refuse(f"{name} is {shown(value)}, not a positive number")
        return float(value)

    # A name that is not there takes transformers' default; null mostly means the same.
    c = read_hf_json(folder, "config.json")
    check_only({k: v for k, v in c.items() if v is not None}, HF_ONLY)
    c = HF_DEFAULTS[c.get("model_type") or "llama"] | c
    c = {k: v for k, v in c.items() if v is not None}
    c = {"num_key_value_heads": c.get("num_attention_heads")} | c

    # Sizes. The limits keep products of them within 64 bits; real models are far below.
    for name in HF_SIZES:
        large = name in ("vocab_size", "max_position_embeddings")
        if name != "head_dim" or name in c:
            check_integer(name, 2**31 if large else 2**20)
    width, heads = c["hidden_size"], c["num_attention_heads"]
    if c.get("head_dim", width // heads) % 2:
        refuse(f"heads of {c.get('head_dim', width // heads)} channels: rotary positions turn "
               "pairs, so the number must be even")
    tied = c.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        refuse(f"tie_word_embeddings is {shown(tied)}, neither true nor false")

    # Rotary positions: an older and a newer name for the same settings.
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(c.get(name, {}), dict):
            refuse(f"{name} is {shown(c[name])}, not a list of names with values")
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    rope = {k: v for k, v in rope.items() if v is not None}
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": c.get("rope_theta", 1e4),
            "partial_rotary_factor": c.get("partial_rotary_factor", 1)} | rope
    check_only(rope, HF_ONLY_ROPE)
    for name, value in rope.items():
        if isinstance(value, dict):
            refuse(f"rotary settings of their own for {shown(name)} are not supported")
    llama3 = LLAMA3_ROPE if rope["rope_type"] == "llama3" else ()
    length = c.get("original_max_position_embeddings")
    if length is not None:                             # as in transformers, it stands above rope's
        rope["original_max_position_embeddings"] = length
    rope.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    if not set(llama3) <= set(rope):
        refuse(f"llama3's rope needs {', '.join(llama3)}")
    scaling = tuple(check_float(name, rope[name]) for name in llama3)
    if scaling and scaling[1] >= scaling[2]:
        refuse("llama3's rope needs a low_freq_factor below its high_freq_factor")

    # A sliding window changes nothing in sequences that fit into it: no longer ones, then.
    longest = c["max_position_embeddings"]
    if c.get("model_type") == "mistral" and "sliding_window" in c:
        check_integer("sliding_window", 2**31)
        longest = min(longest, c["sliding_window"])
    sizes = {ours: c[name] for name, ours in HF_SIZES.items() if name in c}
    return LlamaConfig(**sizes | {"seq_len": longest}, tied=tied, rope_scaling=scaling,
                       rope_theta=check_float("rope_theta", rope["rope_theta"]),
                       norm_eps=check_float("rms_norm_eps", c.get("rms_norm_eps", 1e-6)))

def open_hf_files(folder, config):
    """{a tensor's name there: a function that reads it}, of one file or else of an index's shards.
    The files are mapped into memory: a tensor takes none until it is used or copied."""
    safetensors, stored = need_package("safetensors"), {}
    single, index = "model.safetensors", "model.safetensors.index.json"
    names = [single]
    if not os.path.exists(os.path.join(folder, single)) and os.path.exists(
            os.path.join(folder, index)):
        shards = read_hf_json(folder, index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise UsageError(f"{folder}/{index} is damaged: its weight_map does not name files")
        names = sorted(set(shards.values()))

    for name in names:
        if leaves_folder(name):
            raise UsageError(f"{folder}/{index} names {shown(name)}, outside of the folder")
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UsageError(f"{folder} is no complete Hugging Face folder: there is no "
                             f"{shown(name)}")
        try:
            f = safetensors.safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError) as e:
            raise UsageError(f"{path} is damaged: {first_line(e)}") from None
        for tensor in f.keys():
            if not tensor.endswith("rotary_emb.inv_freq"):                 # computed anew
                stored[tensor] = functools.partial(f.get_tensor, tensor)

    # Before the model is built, which would take hours if a wrong config.json asked for 10^9.
    if config.n_layer > len(stored):
        raise UsageError(f"{folder}: num_hidden_layers is {config.n_layer}, and there are only "
                         f"{len(stored)} tensors")
    return stored

def hf_head_is_tied(folder, stored):
    """Is the head the embedding, as config.json says? Where both are stored with other values it is
    not, as in transformers. If it is, `stored` then has the matrix as the embedding alone."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if head not in stored:
        return True
    if embed not in stored:
        stored[embed] = stored.pop(head)
        return True
    a, b = stored[embed](), stored[head]()
    same = a.shape == b.shape and a.dim() == 2 and all(    # in parts: few float32 copies at a time
        torch.equal(x.float(), y.float()) for x, y in zip(a.split(4096), b.split(4096)))
    if same:
        del stored[head]
    else:
        say(f"note: {folder}: tie_word_embeddings is true, but lm_head.weight differs from the "
            "embedding; both are kept, as transformers does")
    return same

def read_hf_tensors(folder, model, stored):
    """Yield (name here, tensor) for every weight of the model, all of them finite. stored: see
    open_hf_files."""
    own = model.state_dict()
    names = {hf_name(n): n for n in own}
    if model.config.tied:
        del names["lm_head.weight"]
    for name in sorted(names.keys() ^ stored.keys()):
        raise UsageError(f"{folder}: " + (f"no file has the tensor {name}" if name in names else
                                          f"the tensor {shown(name)} belongs to no LLaMA"))
    for name, here in names.items():
        tensor, shape = stored[name](), tuple(own[here].shape)
        if tuple(tensor.shape) != shape or tensor.dtype not in HF_DTYPES:
            raise UsageError(f"{folder}: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                             f"config.json asks for {shape} of float32, float16 or bfloat16")
        check_weights([(name, tensor)], folder)
        yield here, tensor
        if here == "embed.weight" and model.config.tied:
            yield "head.weight", tensor

def read_hf_tokenizer(folder):
    """The spec of a folder's tokenizer, plain values: tokenizer.json's text, the special ids (`end`
    stands after a document, `ends` are all that end one), and the texts that an export copies."""
    path = pathlib.Path(folder, "tokenizer.json")
    texts = {}
    for pattern in HF_TEXTS:
        for file in sorted(pathlib.Path(folder).glob(pattern)):
            texts[file.relative_to(folder).as_posix()] = read_hf_text(file)
    spec = {"tokenizer.json": read_hf_text(path), "end": 0, "start": 0,
            "n_vocab": read_hf_config(folder).vocab_size}
    tokenizer = HFTokenizer(spec, path)
    highest = max(tokenizer.ids_of_text(), default=0)
    if highest >= spec["n_vocab"]:
        raise UsageError(f"{folder}: the tokenizer has an id {highest}, but config.json's "
                         f"vocab_size is {spec['n_vocab']}")

    ends = read_special_ids(folder, texts, tokenizer, "eos")
    if not ends:
        raise UsageError(f"{folder}/config.json has no eos_token_id, which stands after a document")
    starts = read_special_ids(folder, texts, tokenizer, "bos") or ends
    spec |= {"end": ends[0], "start": starts[0], "ends": ends}
    return spec | {"texts": default_hf_texts(HFTokenizer(spec, path)) | texts}

def read_special_ids(folder, texts, tokenizer, kind):
    """The ids of a folder's "eos" or "bos" tokens, from the first of its files that names one."""
    for name in ("config.json", "generation_config.json"):
        if name != "config.json" and name not in texts:
            continue
        ids = read_hf_json(folder, name).get(f"{kind}_token_id")
        if ids is None or ids == []:
            continue
        if not isinstance(ids, list) or kind == "bos":                     # Llama 3 has many ends
            ids = [ids]
        if not all(type(i) is int and 0 <= i < tokenizer.n_vocab for i in ids):
            raise UsageError(f"{folder}/{name}: {kind}_token_id {shown(ids)} is no token below the "
                             f"vocab_size {tokenizer.n_vocab}")
        return ids
    if "tokenizer_config.json" not in texts:
        return []
    token = read_hf_json(folder, "tokenizer_config.json").get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.ids.get(token, math.inf) if isinstance(token, str) else math.inf
    return [found] if found < tokenizer.n_vocab else []

def default_hf_texts(tokenizer):
    """What transformers has to know of a tokenizer, where its folder does not say it."""
    names = {i: token for token, i in tokenizer.ids.items()}
    start, ends = tokenizer.start_token, tokenizer.ends
    return {
        "generation_config.json": json.dumps({"bos_token_id": start, "eos_token_id": ends}),
        "tokenizer_config.json": json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(start),
            "eos_token": names.get(ends[0])})}

def read_hf_text(path):
    """A file's text, which is an object of settings where its name says JSON."""
    if path.suffix == ".json":
        read_hf_json(path.parent, path.name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None

class HFTokenizer(Tokenizer):
    """A Hugging Face folder's tokenizer."""

    def __init__(self, spec, source="the checkpoint's tokenizer"):
        library = need_package("tokenizers")
        try:
            self.inner = library.Tokenizer.from_str(spec["tokenizer.json"])
        except Exception as e:                         # the library raises nothing narrower
            raise UsageError(f"{source} is damaged, or newer than the package tokenizers "
                             f"{library.__version__}: {first_line(e)}") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True        # "<s>" in a text is three characters
        self.ids, self.n_vocab = self.inner.get_vocab(with_added_tokens=True), spec["n_vocab"]
        self.eot_token, self.start_token = spec["end"], spec["start"]
        self.skip = self.find_skip()
        self.ends = spec.get("ends", [spec["end"]])    # older checkpoints know one

    def ids_of_text(self):
        """The ids that a text can have: not those of special tokens, which stay text."""
        added = self.inner.get_added_tokens_decoder()
        return set(self.ids.values()) - {i for i, token in added.items() if token.special}

    def find_skip(self):
        """How many spaces a cut between two words must leave out so that the tokens of the two
        pieces are those of the whole: none where a piece is encoded as it is, one where the
        tokenizer puts a space before each. None: no such cut keeps the tokens."""
        whole, first, *seconds = self.encode_ordinary_batch(["some words", "some", " words",
                                                             "words"])
        for skip, second in enumerate(seconds):
            if first + second == whole:
                return skip

    def spans(self, text):
        if self.skip is None:                          # then a document takes what memory it takes
            return [(0, len(text))] if text else []
        return spans(text, WORDS_CUT, force=False, skip=self.skip)

    def encode_ordinary_batch(self, pieces):
        return [e.ids for e in self.inner.encode_batch(pieces, add_special_tokens=False)]

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

@torch.no_grad()
def write_hf(folder, model, spec):
    """The model in bfloat16, packed weights spelled out, as a new Hugging Face folder, or nothing.

    spec: its tokenizer, which is written where it came from such a folder.
    """
    save_file, c = need_package("safetensors.torch").save_file, model.config
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    state = {n: t for n, t in model.state_dict().items() if n.rsplit(".", 1)[0] not in packed}
    state |= {f"{n}.weight": m.weight() for n, m in packed.items()}
    tensors = {hf_name(n): t.bfloat16().contiguous() for n, t in state.items()
               if not (c.tied and n == "head.weight")}
    kind = "mistral" if c.n_embd % c.n_head else "llama"       # there, heads divide the width
    rope = {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, c.rope_scaling))}
    tokenizer = make_tokenizer(spec)
    start = getattr(tokenizer, "start_token", tokenizer.eot_token)
    ends = getattr(tokenizer, "ends", [tokenizer.eot_token])
    end = ends if len(ends) > 1 else ends[0]
    config = {theirs: getattr(c, ours) for theirs, ours in HF_SIZES.items()} | {
        "model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"], "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied, "rope_theta": c.rope_theta,
        "rope_scaling": rope if c.rope_scaling else None, "sliding_window": None,
        "bos_token_id": start, "eos_token_id": end, "torch_dtype": "bfloat16"}
    texts = {}
    if isinstance(spec, dict):                         # older checkpoints have no texts
        texts = default_hf_texts(tokenizer) | spec.get("texts", {})
        texts["tokenizer.json"] = spec["tokenizer.json"]
    texts["config.json"] = json.dumps(config, indent=2)
    check_weights(tensors.items(), folder)             # bfloat16 ends a little below float32
    with new_folder(folder) as temporary:
        for name, text in texts.items():
            if leaves_folder(name):
                raise UsageError(f"the tokenizer's file {shown(name)} is outside of {folder}")
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})

@contextlib.contextmanager
def new_folder(folder):
    """Yield a temporary folder. What the block writes there becomes `folder`, a new or an empty
    one; where it fails, nothing is left. Raises UsageError."""
    target = pathlib.Path(os.path.realpath(folder))
    there = target.is_dir()
    if os.path.lexists(target) and not (there and not os.listdir(target)):
        raise UsageError(f"cannot write {folder}: it is there and no empty folder; give a new one")
    parents = [p for p in target.parents if not p.exists()]
    temporary = pathlib.Path(target, f".{os.getpid()}.tmp") if there else pathlib.Path(
        f"{target}.{os.getpid()}.tmp")
    moved, done = [], False
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if not there:
            os.replace(temporary, target)
        else:
            # An empty folder stays what it is, which may be a mount or somebody's current one, and
            # is filled. config.json comes last: without it no loader takes the folder.
            for part in sorted(temporary.iterdir(), key=lambda p: p.name == "config.json"):
                os.replace(part, target / part.name)
                moved.append(target / part.name)
            temporary.rmdir()
        done = True
    except (OSError, need_package("safetensors").SafetensorError) as e:
        raise UsageError(f"cannot write {folder}: {getattr(e, 'strerror', None) or first_line(e)}; "
                         "give a new folder where there is space") from None
    finally:
        if not done:                                   # also after Ctrl-C
            for part in moved:
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in parents:
                with contextlib.suppress(OSError):     # by now something else is in it
                    parent.rmdir()

# ---- Training: one recipe for the dense model and for QuEST -----------------------------------

def kl_loss(teacher, student):
    """KL(teacher || student) of logits (..., vocab), mean over tokens. The gradient of equal
    logits is exactly zero, so that Adam does not blow noise up."""
    log_p = teacher - teacher.logsumexp(-1, keepdim=True)
    return (student.logsumexp(-1) + (log_p.exp() * (log_p - student)).sum(-1)).mean()

def learning_rate(step, steps, peak):
    """Cosine up from peak/100 over the first tenth of the steps, then cosine down to peak/10."""
    warm = max(1, round(0.1 * steps))
    if step < warm:
        low, t = peak / 100, 1 - step / warm
    else:
        low, t = peak / 10, (step - warm) / max(1, steps - 1 - warm)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * t))

def make_optimizer(model, lr):
    """AdamW; weight decay for what the blocks' linears own (with LSQ, as in the QuEST authors'
    runs, also its steps), not for embedding, head and norms."""
    decay = {id(p) for _, m in model.linears() for p in m.parameters()}
    groups = [{"params": [p for p in model.parameters() if (id(p) in decay) == d],
               "weight_decay": 0.1 * d} for d in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

STOP = []  # not empty once Ctrl-C was pressed

@contextlib.contextmanager
def finish_step_on_ctrl_c():
    STOP.clear()
    handler = signal.signal(signal.SIGINT, lambda *_: STOP.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)

@finish_step_on_ctrl_c()
def train(model, data, args, path, status=lambda: "", optimizer=None):
    """Train in place up to args.steps. The state goes to `path` every minute, at each look at the
    dev split, on Ctrl-C and at the end; --resume goes on from it, on a CPU bit for bit.

    status() gives the method's own number for the progress line. Returns {"seconds", "tokens",
    "losses": one float a step}. A loss that is not finite raises UsageError and saves nothing.
    A method's own optimizer may have a `schedule`, and groups with a "peak" rate, not args.lr.
    """
    net = distribute(model, args)
    optimizer, losses, before = optimizer or make_optimizer(model, args.lr), [], 0.0
    if args.resume:
        losses, before = resume(model, optimizer, args, data, path)
    if args.compile:
        model.compile_parts()
    # perf_counter, unlike time.time, has fine steps everywhere and is never set back.
    start = last_line = last_save = time.perf_counter()
    pending, line_step, saved = [], len(losses), len(losses)   # pending: still on the device
    for done in range(len(losses) + 1, args.steps + 1):
        loss, gnorm = train_step(net, optimizer, data, args, done - 1)
        pending.append(loss + 0 * gnorm)               # NaN if the gradient is not finite
        look = args.eval_every and done % args.eval_every == 0
        save = look or STOP or done == args.steps or time.perf_counter() - last_save > 60
        save, line = agree(save, save or done == 1 or time.perf_counter() - last_line > 10)
        if line:
            losses += check_finite(torch.stack(pending).tolist(), len(losses), saved, path)
            ms = (time.perf_counter() - last_line) / (done - line_step) * 1e3
            pending, ms = [], max(ms, 1e-6)            # a coarse clock may not have moved
            speed, eta = args.batch_size * args.seq_len / ms, (args.steps - done) * ms / 1e3
            say(f"step {done:>4}/{args.steps} | loss {losses[-1]:.4f} | "
                f"lr {optimizer.param_groups[0]['lr']:.1e} | gnorm {gnorm:.2f} |{status()} "
                f"{ms:.0f} ms | {speed:.1f}k tok/s | eta {eta:.0f}s")
            last_line, line_step = time.perf_counter(), done
        if look:
            part = data.dev[: 64 * args.seq_len + 1]
            dev = evaluate(model, part, args.seq_len)["loss"]
            say(f"step {done:>4}/{args.steps} | dev loss {dev:.4f} nats/token "
                f"on {len(part) - 1} tokens")
        if save:
            seconds = before + time.perf_counter() - start
            save_checkpoint(path, model, settings=settings(args), data=data.digest, losses=losses,
                            optimizer=optimizer.state_dict(), seconds=seconds)
            saved, last_line, last_save = done, time.perf_counter(), time.perf_counter()
        if save and agree(STOP)[0]:
            say(f"interrupted: {path} holds step {done}; go on with the same command and --resume")
            raise SystemExit(130)
    return {"seconds": before + time.perf_counter() - start, "losses": losses,
            "tokens": args.steps * args.batch_size * args.seq_len}

def train_arm(model, data, args, path, status, optimizer):
    """train, for one of the runs that a command compares: --resume begins those not yet begun."""
    own = copy.copy(args)
    own.resume = args.resume and os.path.exists(path)
    return train(model, data, own, path, status, optimizer)

def train_step(model, optimizer, data, args, step):
    """One optimizer step over args.batch_size windows -> its loss and its gradient's norm."""
    schedule = getattr(optimizer, "schedule", learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = schedule(step, args.steps, group.get("peak", args.lr))
    x, y = (ids.chunk(world_size())[rank()] for ids in batch(
        data.train, step, args.batch_size, args.seq_len, args.seed, args.device))
    size, total = args.batch_size // args.accumulate, 0.0
    for i in range(0, len(x), size):
        more = i + size < len(x) and hasattr(model, "no_sync")             # ranks sum only once
        with model.no_sync() if more else contextlib.nullcontext():
            xs, ys = x[i:i + size], y[i:i + size]
            loss = model(xs, ys)[1] * (len(xs) / len(x))
            loss.backward()
        total = total + loss.detach()
    gnorm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size(), whole(gnorm)

def check_finite(losses, first, saved, path):
    for i, loss in enumerate(losses, first + 1):
        if not math.isfinite(loss):
            kept = f"{path} holds step {saved}" if saved else "nothing was saved before"
            raise UsageError(f"the loss or its gradient is not finite at step {i}; {kept}; "
                             "try a lower --lr")
    return losses

def resume(model, optimizer, args, data, path):
    """Load model and optimizer from `path` -> (losses so far, seconds so far)."""
    content = read_checkpoint(path)
    if "optimizer" not in content:
        raise UsageError(f"{path} holds no training state to resume")
    if content["data"] != data.digest:                 # the text itself, wherever it lies now
        raise UsageError(f"--data {data.name} is not the text that {path} was trained on")
    free = {"eval_every", "compile", "fsdp", "data"}
    if os.path.isdir(args.model or ""):
        free.add("size")                               # here it is the folder's name
    old, new = content["settings"], settings(args)
    for name in old | new:                             # another method's settings have other names
        if name not in free and not same_setting(name, old.get(name), new.get(name)):
            raise UsageError(f"--{name.replace('_', '-')} is {new.get(name)} here and "
                             f"{old.get(name)} in {path}; give the same settings, or leave "
                             "--resume out")
    load_weights(model, content["model"], path)
    learn = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in content["optimizer"]["state"].items():
        state.update({k: placed_like(t, learn[i]) for k, t in state.items()
                      if torch.is_tensor(t) and t.dim()})
    optimizer.load_state_dict(content["optimizer"])
    say(f"resumed {path} at step {len(content['losses'])}/{args.steps}")
    return content["losses"], content["seconds"]

def same_setting(name, a, b):
    """Are the values equal? Two paths are where they lead to one file, however they are spelled."""
    if name in ("model", "teacher") and a and b:
        return os.path.realpath(a) == os.path.realpath(b)
    return a == b

# ---- Command line, shared by all scripts ------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):                          # one line, without argparse's usage
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

def add_flags(p, data=True, trains=True, fsdp=False):
    """The flags that mean the same in every script. Where the default is None, resolve sets it."""
    add, own = p.add_argument, "(default: the script's own, or from --size)"
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="of weights, data order and sampling (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of activations; weights stay float32 (default: bfloat16 on cuda, else float32)")
    if data:
        add("--data", help="text file, folder of .txt .md .py, or http(s) address "
                           "(default: the sources of Python's library)")
        add("--seq-len", type=number(int, 2),
            help="tokens a window (default: from --size, or what the model was trained with)")
        add("--batch-size", type=number(int, 1), help=f"windows a step {own}")
    if not trains:
        return p.set_defaults(vocab="1024", smoke=False)
    add("--model", help="dense checkpoint or Hugging Face folder (default: OUT/base.pt; for "
                        "model.py and quest.py random weights)")
    add("--size", choices=tuple(PRESETS), default="tiny", help="preset (default: tiny)")
    add("--tied", action="store_true", help="one matrix for embedding and head")
    add("--vocab", default="1024", help="size of a BPE, or a tiktoken name (default: 1024)")
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
    p.set_defaults(fsdp=False)
    if fsdp:
        add("--fsdp", action="store_true",
            help="each of torchrun's processes keeps a share of weights, gradients and moments")

RUNNING = []  # the settings of the command that runs, for the message on too little memory

def resolve(args):
    """Fill in defaults, check what argparse cannot, choose device and dtype, seed torch."""
    RUNNING[:] = [args]
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
    cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    if "size" not in args:
        return args
    if args.smoke:                                     # never in the place of a real result
        args.out = os.path.join(args.out, "smoke")
    preset = PRESETS[args.size]._asdict() | (SMOKE if args.smoke else {})
    for name in ("steps", "batch_size", "accumulate", "seq_len", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, preset[name])
    if args.batch_size % args.accumulate:
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of "
                         f"--accumulate {args.accumulate}")
    folder = pathlib.Path(args.out).absolute()
    while not folder.exists():                         # made later, by the first checkpoint
        folder = folder.parent
    if not args.out or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--out {args.out or repr('')}: {folder} is not a writable folder")
    if args.compile:
        try_compiling(args.device)
    join_ranks(args)
    return args

def try_compiling(device):
    """Compile one addition, so that what --compile lacks is known before the run starts: a C++
    compiler on a CPU, a C compiler or Triton on a GPU, a cache that can be written. UsageError."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as e:               # torch's own compiling errors are the former
        reason = next(filter(None, map(str.strip, str(e).splitlines())), type(e).__name__)
        raise UsageError(f"--compile does not work here: {reason[:200]}; install a C++ compiler "
                         "such as g++, or leave --compile out") from None

def settings(args):
    """What a checkpoint keeps of the command line: plain values."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "out")}

def load_training_data(args, content=None):
    """The Data of --data and --vocab, or, unless --data is given, of a checkpoint's content."""
    old, spec = content.get("settings", {}) if content else {}, content and content["tokenizer"]
    if not content and os.path.isdir(args.model or ""):
        spec = read_hf_tokenizer(args.model)
    smoke = args.smoke or (old.get("smoke") and args.data is None)
    with first_rank_first():
        data = load_data(old.get("data") if args.data is None else args.data, args.vocab,
                         args.seq_len, spec=spec, limit=30 if smoke else None)
    if content and content.get("data") not in (None, data.digest):
        say(f"note: {data.name} is not the text that this checkpoint was trained on")
    return data

def save_result(path, model, args, data, method):
    """A checkpoint with all that `model.py eval` and `sample` need."""
    save_checkpoint(path, model, method=method, settings=settings(args), tokenizer=data.spec,
                    data=data.digest)

def open_model(args, path, as_stored=False, dense=True):
    """load_checkpoint on the command's device; --seq-len defaults to the window of its training.
    Raises UsageError where the linears are packed and dense ones are needed."""
    model, content = load_checkpoint(path, args.device, getattr(torch, args.dtype), as_stored)
    if dense and content["linears"]:
        raise UsageError(f"{path} is packed already; give the dense checkpoint as --model, or to "
                         "normtweak.py as --teacher of a packed --model")
    longest = model.config.seq_len
    if os.path.isdir(path) and (args.seq_len or 0) > longest:
        raise UsageError(f"--seq-len {args.seq_len} is above the {longest} tokens of {path}")
    args.seq_len = args.seq_len or min(longest, 2048)  # the usual window of published perplexities
    return model, content

def load_base(args, as_stored=False):
    """(model, data) of a dense --model, else of OUT/base.pt, which is trained first if missing.
    as_stored: see LLaMA.from_pretrained."""
    path = args.model or os.path.join(args.out, "base.pt")
    if not args.model and not os.path.exists(path):
        say(f"there is no {path} yet: training it first, as `python model.py` does")
        flags = {n: getattr(args, n) for n in ("data", "vocab", "size", "device", "dtype")}
        flags["out"] = os.path.dirname(args.out) if args.smoke else args.out
        begun = args.resume and os.path.exists(path + ".state")
        pretrain([f"--{n}={v}" for n, v in flags.items() if v] + ["--smoke"] * args.smoke
                 + ["--resume"] * begun)
        RUNNING[:] = [args]
    model, content = open_model(args, path, as_stored)
    data = load_training_data(args, content)
    # The result keeps where its text came from, so that `model.py eval` reads the same.
    for name in ("data", "smoke"):
        setattr(args, name, getattr(args, name) or content["settings"].get(name))
    return model, data

def new_model(args, data):
    """The LLaMA of --size with random weights, or --model, on the device and in training mode."""
    config = PRESETS[args.size].config(data.tokenizer.n_vocab, args.seq_len, args.tied)
    if not args.model:
        model = LLaMA(config, getattr(torch, args.dtype))
        return model if args.fsdp else model.to(args.device)               # else see distribute
    model, content = open_model(args, args.model)
    if os.path.isdir(args.model):                      # its own shape and tokenizer
        args.size = os.path.basename(os.path.abspath(args.model))
        return model.train()
    if content["tokenizer"] != data.spec:
        raise UsageError(f"--model {args.model} has another tokenizer than this --data and --vocab")
    if dataclasses.replace(model.config, seq_len=args.seq_len) != config:
        raise UsageError(f"--model {args.model} has another shape than --size {args.size}"
                         f"{' --tied' * args.tied}; give the flags that made it")
    return model.train()

def keep_model(args, *paths):
    """Raise UsageError where the run would write one of the paths over the --model that it reads.
    With --resume the weights come from the training state, not from there."""
    for path in paths:
        same = args.model and os.path.realpath(path) == os.path.realpath(args.model)
        if same and not args.resume:
            raise UsageError(f"--model {args.model} is the file that this run writes; give another "
                             "--out")

@contextlib.contextmanager
def definite_hessian(name, tokens, fix):
    """GPTQ inside: a Hessian that is not positive definite becomes a UsageError with the fix."""
    try:
        yield
    except torch.linalg.LinAlgError:
        raise UsageError(f"{name}: the Hessian of {tokens} calibration tokens is not positive "
                         f"definite; {fix}") from None

def check_groups(model, g):
    """Raise UsageError for a --group-size that does not divide a linear's inputs; -1: a row."""
    for name, linear in model.linears():
        C = linear.in_features
        if g == 0 or C % abs(g):
            raise UsageError(f"--group-size {g} does not divide the {C} input channels of {name}; "
                             f"try {math.gcd(C, 128)}, or -1 (one scale per row)")

def header(title, args, model, data):
    """The first lines of every script: what runs, on what, with which settings. Locks --out."""
    if rank() == 0 and (os.path.isdir(args.out) or not args.resume):       # else resume() complains
        hold(args.out)
    linear = sum(p.numel() for _, m in model.linears() for p in m.parameters())
    together = f" in each of {world_size()} processes" if world_size() > 1 else ""
    say(f"{title} | {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M params, "
        f"{linear / 1e6:.2f}M in the blocks' linears | {args.device} {args.dtype}, "
        f"{torch.get_num_threads()} threads{together} | torch {torch.__version__} | "
        f"seed {args.seed}")
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
    try:
        if fcntl:                                      # of the folder itself: no file is left over
            fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(HELD.pop(folder))
        raise UsageError(f"--out {folder} is in use by another run; wait for it, or choose "
                         "another --out") from None
    except OSError as e:                               # some network file systems
        return say(f"note: {folder} cannot be locked ({e.strerror}); start no second run into it")
    for left in pathlib.Path(folder).glob("*.pt*.[0-9]*.tmp"):
        left.unlink()                                  # a run was killed while it wrote this

def tensor_bytes(tensors):
    """Bytes of the storages behind the tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors}.values())

def finish(args, method, model, scores, result, **more):
    """`record` the run's row, then print it: the last line of a run."""
    say(record(args, method, model, scores, result, **more))

def record(args, method, model, scores, result, **more):
    """Append the run's row of results to results.jsonl -> the row, one line of JSON. What a script
    prints about a result comes after this: then a failing print loses nothing. Raises UsageError
    where a number of it is not finite."""
    check_numbers({"val_loss": scores["loss"], "bits_per_byte": scores["bits_per_byte"], **more})
    bpw, weights = bits_per_weight(model)              # of the packed linears, if there are any
    params = sum(p.numel() for p in model.parameters()) + weights
    packed = tensor_bytes(model.state_dict().values()) if weights else None
    row = {"method": method, "w_bits": 16, "a_bits": 16, "bpw": bpw or 16.0, "group_size": -1,
           "val_loss": scores["loss"], "val_ppl": scores["ppl"],
           "bits_per_byte": scores["bits_per_byte"], "base_val_loss": None,
           "bytes_dense": 2 * params, "bytes_packed": packed, "params": params,
           "tokens": result["tokens"], "seconds": result["seconds"], "device": args.device,
           "peak_bytes": peak_bytes(),
           "seed": args.seed, **more, "command": command_line()}
    line = json.dumps(rounded(row))
    path = os.path.join(args.out, "results.jsonl")
    if rank() == 0:
        try:
            os.makedirs(args.out, exist_ok=True)       # it may be new, or gone since the start
            append_line(path, line)
        except OSError as e:
            raise UsageError(f"cannot write {path}: {e.strerror}; the row: {line}") from None
    return line

def append_line(path, line):
    """Add a line to a file. A last line without an end, which a killed run left, gets it first."""
    torn = os.path.isfile(path) and pathlib.Path(path).read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a") as f:
        f.write("\n" * torn + line + "\n")

def read_rows(path):
    """The rows of a results.jsonl. A line that holds none, such as one that a run was killed in, is
    left out by its number on stderr. Raises UsageError where there are only such lines."""
    rows, torn = [], []
    try:
        lines = pathlib.Path(path).read_bytes().splitlines()
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}; give a results.jsonl") from None
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line.strip() or "null")
        except ValueError:
            row = "torn"
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            torn.append(str(i))
    if torn and not rows:
        raise UsageError(f"{path} holds no result rows")
    if torn:
        put(sys.stderr, f"note: left out of {path}: line {', '.join(torn)}, not a row\n")
    return rows

def command_line():
    """The command that runs, as a shell reads it."""
    start, local = ["python"], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size() > local:
        start = ["torchrun", f"--nnodes={world_size() // local}", f"--nproc_per_node={local}"]
    elif world_size() > 1:
        start = ["torchrun", "--standalone", f"--nproc_per_node={local}"]
    return shlex.join([*start, *sys.argv])

def peak_bytes():
    """The most bytes on the GPU since the last call; None where there is none."""
    if not torch.cuda.is_initialized():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak

def arm_row(scores, bpw, seconds, **more):
    """What a row of results keeps of each arm that the run compared."""
    return {"val_loss": scores["loss"], "bits_per_byte": scores["bits_per_byte"], "bpw": bpw,
            "seconds": seconds, "peak_bytes": peak_bytes(), **more}

def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return round(x, 6) if isinstance(x, float) else x

def show(scores):
    return (f"val loss {scores['loss']:.4f} nats/token | ppl {scores['ppl']:.2f} | "
            f"{scores['bits_per_byte']:.3f} bits/byte")

def run(main):
    """Call main(); what the user can mend becomes one line on stderr and exit status 2."""
    show_every_letter()
    SAVED.clear()
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
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
        if not (isinstance(e, (MemoryError, torch.OutOfMemoryError))
                or "out of memory" in str(e) or "allocate memory" in str(e)):
            raise
        complain(f"error: {out_of_memory()}")
    else:
        return
    finally:
        put(sys.stdout, "")                            # argparse's --help waits in the buffer
    raise SystemExit(2)

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
    state = SAVED[-1].endswith(".state")
    return f"interrupted: {SAVED[-1]} is saved" + (
        "; go on with the same command and --resume" if state else "")

def out_of_memory():
    """What was used at the peak, by how large a batch, and the flag to change."""
    a, peak = vars(RUNNING[0]) if RUNNING else {}, ""
    if torch.cuda.is_initialized():
        peak = f" after a peak of {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    elif resource:                                     # in KiB; in bytes on a Mac
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = f" after a peak of {peak / 2 ** (30 if sys.platform == 'darwin' else 20):.1f} GiB"
    batch, parts = a.get("batch_size"), a.get("accumulate") or 1
    if batch:
        peak += (f" with --batch-size {batch}, {batch // parts} windows of {a['seq_len']} tokens "
                 "at a time")
    fix = f"raise --accumulate {parts} (same result) or " if batch and parts < batch else ""
    return f"out of memory{peak}; {fix}lower --batch-size or --seq-len"

def pretrain(argv):
    p = Parser(prog="model.py", description="Pre-train the dense base model into OUT/base.pt.",
               epilog="also: model.py eval CKPT, model.py sample CKPT, model.py export CKPT DIR "
                      "(--help for each)")
    add_flags(p, fsdp=True)
    args = resolve(p.parse_args(argv))
    data = load_training_data(args)
    model = new_model(args, data)
    path = os.path.join(args.out, "base.pt")
    keep_model(args, path)
    header("dense", args, model, data)
    result = train(model, data, args, path + ".state")
    save_result(path, model, args, data, "dense")
    scores = evaluate(model.eval(), data.val, args.seq_len, data.tokenizer)
    say(f"{show(scores)} | {len(data.val) - 1} tokens | saved {path}")
    finish(args, "dense", model, scores, result)

def eval_checkpoint(argv):
    p = Parser(prog="model.py eval", description="Loss of a checkpoint on the validation split.")
    p.add_argument("checkpoint", help="a .pt file, dense or packed, or a Hugging Face folder")
    add_flags(p, trains=False)
    args = resolve(p.parse_args(argv))
    model, content = open_model(args, args.checkpoint, dense=False)
    data = load_training_data(args, content)
    scores = evaluate(model, data.val, args.seq_len, data.tokenizer, args.batch_size)
    check_numbers({"val_loss": scores["loss"]})
    bpw, weights = bits_per_weight(model)
    say(f"{content['method']} | " + (f"{bpw:.3f} bits per weight | " if weights else "")
        + f"{show(scores)} | {len(data.val) - 1} tokens | loss {scores['loss']:.6f}")

def sample_text(model, tokenizer, prompt, n, seed, temperature=0.8, top_k=50):
    """The prompt and n generated tokens, as text; the same for the same seed."""
    try:
        prompt.encode()
    except UnicodeEncodeError as e:                    # bytes that the shell could not decode
        raise UsageError(f"--prompt {ascii(prompt)} is not UTF-8 text at character {e.start}; "
                         "give it in UTF-8") from None
    device = next(model.parameters()).device
    start = getattr(tokenizer, "start_token", tokenizer.eot_token)
    ids = torch.tensor([[start] + tokenizer.encode_ordinary(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return tokenizer.decode(model.generate(ids, n, temperature, top_k, generator)[0, 1:].tolist())

def random_model(args):
    """A model of random weights in the form that generation reads, made on the device."""
    p, dtype, bits = PRESETS[args.size], getattr(torch, args.dtype), args.bits
    with torch.device("meta"):                         # shapes alone: no memory
        model = LLaMA(p.config(32000, max(p.seq_len, args.tokens + 64)), dtype)
    def random(*shape):
        return torch.randn(shape, device=args.device, dtype=dtype).mul_(0.02)
    def packed(O, C):
        codes = torch.randint(256, (O, C * bits // 8), device=args.device, dtype=torch.uint8)
        scale = torch.full((O, C // 128), 0.05 / 2**bits, device=args.device)
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
        spec = dict(kind="affine", bits=bits, a_bits=16, in_features=C, group_size=128,
                    signed=False)
        return QuantLinear(spec, {"packed": codes, "scale": scale, "zero_point": zero})
    for m in model.modules():
        if isinstance(m, RMSNorm):
            m.weight = nn.Parameter(torch.ones(m.weight.shape, device=args.device))
        elif hasattr(m, "weight") and (bits == 16 or m in (model.embed, model.head)):
            m.weight = nn.Parameter(random(*m.weight.shape), False)
    if bits < 16:
        model.replace_linears(lambda name, linear: packed(*linear.weight.shape))
    return model.eval().for_decoding()

def copy_speed(device):
    """Bytes a second that a copy in the device's memory reads and writes; the best of some."""
    cuda, best = device.startswith("cuda"), 0.0
    a, b = (torch.ones(2 ** (29 if cuda else 26), dtype=torch.uint8, device=device) for _ in "ab")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(4):
            a.copy_(b)
        if cuda:
            torch.cuda.synchronize()
        best = max(best, 8 * a.numel() / (time.perf_counter() - start))
    return best

@torch.no_grad()
def decode_speed(model, args):
    """Time the steps of one sequence and say how near they come to the time that reading takes."""
    device, c, prompt, first, marks = args.device, model.config, 8, 8, []
    idx = torch.randint(c.vocab_size, (1, prompt), device=device)
    choose = Chooser(model, 1, args.temperature, args.top_k, torch.Generator(device).manual_seed(0))
    for i, _ in enumerate(decode(model, idx, first + args.tokens + 1, choose)):
        if i in (first, first + args.tokens):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
    ms, copy = (marks[1] - marks[0]) / args.tokens * 1e3, copy_speed(device)
    size = model.dtype.itemsize * 2 * c.n_layer * c.n_kv_head * c.head_dim * (
        prompt + first + args.tokens // 2)             # keys and values, in the middle
    for m in model.modules():                          # and all weights but the embedding
        if isinstance(m, (Linear, QuantLinear, RMSNorm)):
            fast = getattr(m, "fast", None) and m.fast[1]
            size += tensor_bytes(fast[:3] if fast else m.state_dict().values())
    floor = size / copy * 1e3
    say(f"{args.size}, random weights, {args.bits} bits, {args.dtype} | {args.tokens} tokens, one "
        f"sequence | {1e3 / ms:.1f} tokens/s, {ms:.3f} ms each | {size / 1e9:.3f} GB a token, "
        f"{size / ms / 1e6:.0f} GB/s | floor {floor:.3f} ms, at a copy's {copy / 1e9:.0f} GB/s: "
        f"{100 * floor / ms:.0f}% of that speed")

def sample_checkpoint(argv):
    p = Parser(prog="model.py sample", description="Text from a checkpoint, dense or packed.")
    p.add_argument("checkpoint", nargs="?", help="a .pt file, dense or packed, or a Hugging Face "
                   "folder (default: none, random weights; then only the speed is printed)")
    p.add_argument("--prompt", default="", help="text to go on from (default: a new document)")
    p.add_argument("--tokens", type=number(int, 1), default=200, help="how many (default: 200)")
    p.add_argument("--temperature", type=number(float, 0, 100), default=0.8,
                   help="0 takes the most likely token (default: 0.8)")
    p.add_argument("--top-k", type=number(int, 1), default=50,
                   help="choose among so many tokens (default: 50)")
    p.add_argument("--size", dest="shape", choices=tuple(PRESETS),
                   help="without a checkpoint: preset of the random weights")
    p.add_argument("--bits", type=int, choices=(1, 2, 4, 8, 16), default=16,
                   help="without a checkpoint: of the random weights, groups of 128 (default: 16)")
    add_flags(p, data=False, trains=False)
    args = resolve(p.parse_args(argv))
    if bool(args.checkpoint) == bool(args.shape):
        raise UsageError("sample needs a checkpoint, or else --size for random weights, not both")
    if not args.checkpoint:
        args.size = args.shape
        return decode_speed(random_model(args), args)
    model, content = load_checkpoint(args.checkpoint, args.device, getattr(torch, args.dtype))
    say(sample_text(model.for_decoding(), make_tokenizer(content["tokenizer"]), args.prompt,
                    args.tokens, args.seed, args.temperature, args.top_k))

def export_checkpoint(argv):
    p = Parser(prog="model.py export", description="Write a checkpoint as a Hugging Face folder.")
    p.add_argument("checkpoint", help="a .pt file, dense or packed")
    p.add_argument("folder", help="to write, new or empty; packed weights become bfloat16")
    args = p.parse_args(argv)
    model, content = load_checkpoint(args.checkpoint)
    spec, bits = content["tokenizer"], {m.spec["a_bits"] for m in model.modules()
                                        if isinstance(m, QuantLinear)}
    bits = min(bits | {model.config.a_bits, model.config.kv_bits})
    write_hf(args.folder, model, spec)
    if bits < 16:
        say(f"note: {args.checkpoint} also quantizes activations (to {bits} bits), which such a "
            "folder cannot say: there they stay floats, and the logits differ")
    if not isinstance(spec, dict):
        say("note: no tokenizer.json: this checkpoint's tokenizer is not a Hugging Face one")
    say(f"wrote {args.folder}: {model.config.n_layer} blocks in bfloat16")

def main():
    commands = {"eval": eval_checkpoint, "sample": sample_checkpoint, "export": export_checkpoint}
    command = commands.get(sys.argv[1]) if len(sys.argv) > 1 else None
    command(sys.argv[2:]) if command else pretrain(sys.argv[1:])

if __name__ == "__main__":
    run(main)
