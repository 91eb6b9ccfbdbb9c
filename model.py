"""The small LLaMA that every method trains or compresses, whole, and the door to its commands.

    python model.py                            # pre-train the dense base model into out/base.pt
    python model.py --smoke                    # every line of that in a few seconds
    python model.py eval out/base.pt           # loss on the whole validation split
    python model.py sample out/base.pt --prompt "def main("
    python model.py export out/rtn-w4.pt DIR   # any checkpoint as a Hugging Face folder
    torchrun --standalone --nproc_per_node=8 model.py --size 100M      # the same run on 8 GPUs

The model:
  1. Tokens become vectors. Each block adds two things to them: what attention gathers from the
     token itself and earlier ones, and what a small network, the SwiGLU, makes of each alone.
  2. Both read the vectors through an RMSNorm. Positions enter as rotations of queries and keys.
  3. A last norm and a linear, the head, give a score for each token that may come next.
The weights that every method quantizes are those of a block's seven linears: wq, wk, wv, wo,
w_gate, w_up, w_down. Norms stay floats, and so do embedding and head until a file is packed.

Read `LLaMA.forward` first, then `Block`, `Attention` and `MLP`, then the parts that they use.
Training, data, checkpoints and the commands are in nanobit/. Not here: dropout, biases.

Paper: Llama 2 (arXiv 2307.09288); shapes and rates from 30M to 800M are QuEST's (2502.05003).
Shapes: B sequences, T tokens each, C = n_embd, nh = n_head, nkv = n_kv_head, hs = head size.
"""
import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from quantizers import fake_quant_tokens

class UsageError(ValueError):
    """A mistake of the user's. The message is one line: the value, the limit and the fix."""

# ---- Shapes -----------------------------------------------------------------------------------

@dataclasses.dataclass
class LlamaConfig:
    vocab_size: int = 1024
    n_layer: int = 3
    n_embd: int = 256
    n_head: int = 4
    n_kv_head: int = 4           # fewer than n_head: query heads share key and value heads
    n_hidden: int = 768          # width inside the SwiGLU
    seq_len: int = 128           # longest window it is trained on
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()     # Llama 3.1's four numbers, see rope_tables; empty: no scaling
    head_dim: int = 0            # of one head; 0: n_embd / n_head
    norm_eps: float = 1e-5
    tied: bool = False           # the head shares the embedding's weights
    a_bits: int = 16             # of linears' inputs, of queries and keys after rotation (LR-QAT)
    kv_bits: int = 16            # of the keys and values as the linears return them (LR-QAT)

    def __post_init__(self):
        heads_fit = self.n_head % self.n_kv_head == 0
        width_fits = self.head_dim > 0 or self.n_embd % self.n_head == 0
        if not (heads_fit and width_fits):
            raise UsageError(f"width {self.n_embd} must be a multiple of the {self.n_head} heads, "
                             f"and these of the {self.n_kv_head} key/value heads")
        self.head_dim = self.head_dim or self.n_embd // self.n_head

class Preset(NamedTuple):
    """A shape with the recipe that trains it: peak rate, steps, and windows per step."""
    n_layer: int
    n_embd: int
    n_head: int
    n_hidden: int
    lr: float
    steps: int
    batch_size: int
    accumulate: int              # a batch goes through the model in so many parts
    seq_len: int

    def config(self, vocab_size, seq_len=None, tied=False):
        return LlamaConfig(vocab_size, self.n_layer, self.n_embd, self.n_head, self.n_head,
                           self.n_hidden, seq_len or self.seq_len, tied=tied)

# 0.5M to 3.4M in the blocks' linears: for the scaling law, 25 tokens per parameter of the whole.
# 30M to 800M: QuEST's shapes, peak learning rates and steps of 512 x 512 tokens.
PRESETS = {
    "tiny": Preset(3, 256, 4, 768, 2e-3, 400, 16, 1, 128),
    "0.5M": Preset(4, 96, 3, 288, 4e-3, 1033, 64, 1, 256),
    "0.9M": Preset(4, 128, 2, 384, 4e-3, 1702, 64, 1, 256),
    "1.9M": Preset(4, 192, 3, 576, 4e-3, 1765, 128, 1, 256),
    "3.4M": Preset(4, 256, 4, 768, 4e-3, 3001, 128, 1, 256),
    "30M": Preset(6, 640, 5, 1792, 1.2e-3, 11444, 512, 8, 512),
    "50M": Preset(7, 768, 6, 2048, 1.2e-3, 19073, 512, 8, 512),
    "100M": Preset(8, 1024, 8, 2816, 6e-4, 38146, 512, 16, 512),
    "200M": Preset(10, 1280, 10, 3584, 3e-4, 76293, 512, 16, 512),
    "430M": Preset(13, 1664, 13, 4608, 1.5e-4, 164031, 512, 32, 512),
    "800M": Preset(16, 2048, 16, 5632, 7.5e-5, 305175, 512, 32, 512),
    "7B": Preset(32, 4096, 32, 11008, 3e-5, 1000, 8, 8, 1024),  # Llama 2 7B
}

# ---- Parts ------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x divided by its root mean square, times a learned weight for each channel."""

    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        h = x.float()                          # bfloat16 would lose digits in the mean
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)

class Linear(nn.Linear):
    """No bias. The weight stays float32, for the optimizer; the product is in the input's dtype."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def apply_linears(x, *linears):
    """[linear(x) for each]. A class that replaces Linear may define fused(x, linears) -> outputs,
    which does shared work once: QuestLinear's rounds x once, Joined's multiplies once."""
    fused = getattr(type(linears[0]), "fused", None)
    if fused:
        return fused(x, linears)
    return [linear(x) for linear in linears]

def rope_tables(seq_len, head_size, theta, device, scaling=()):
    """cos and sin, float32 (T, hs), in Hugging Face's half-split order: hs/2 frequencies, twice.

    scaling: () or Llama 3.1's (factor, low, high, length), with which a model trained on windows
    of `length` reads longer ones. A frequency that turns less than `low` times in `length` is
    divided by `factor`, one that turns more than `high` times stays; between, a mixture.
    """
    # Radians per position: 1 for the first pair of channels, down to almost 1 / theta.
    freq = theta ** -(torch.arange(0, head_size, 2, device=device).float() / head_size)
    if scaling:
        factor, low, high, length = scaling
        turns = length * freq / (2 * math.pi)
        stay = ((turns - low) / (high - low)).clamp(0, 1)                          # (hs/2,)
        freq = freq * (stay + (1 - stay) / factor)

    # The angle of each position and frequency; both channels of a pair turn by the same one.
    angle = torch.outer(torch.arange(seq_len, device=device).float(), freq)        # (T, hs/2)
    angle = angle.repeat(1, 2)                                                     # (T, hs)
    return angle.cos(), angle.sin()

def apply_rope(x, cos, sin):
    """Rotate the pairs (i, i + hs/2) of x (B, heads, T, hs) by their position's angle."""
    a, b = x.float().chunk(2, dim=-1)                                      # (B, heads, T, hs/2)
    turned = torch.cat((-b, a), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)

def quantized(x, bits):
    """x, each vector along its last axis rounded on a grid of its own; at 16 bits, which every
    model has but LR-QAT's, x itself."""
    return fake_quant_tokens(x, bits, symmetric=False)

# ---- A block ----------------------------------------------------------------------------------

class Attention(nn.Module):
    """Each token takes a weighted mean of what it and the tokens before it offer."""

    def __init__(self, c):
        super().__init__()
        self.head_size = c.head_dim
        self.config = c
        self.wq = Linear(c.n_embd, c.n_head * self.head_size)
        self.wk = Linear(c.n_embd, c.n_kv_head * self.head_size)
        self.wv = Linear(c.n_embd, c.n_kv_head * self.head_size)
        self.wo = Linear(c.n_head * self.head_size, c.n_embd)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        a_bits, kv_bits = self.config.a_bits, self.config.kv_bits

        # Queries, keys and values of every head. `quantized` has one grid per token here, over all
        # heads; after `view`, below, it has one per head.
        q, k, v = apply_linears(quantized(x, a_bits), self.wq, self.wk, self.wv)
        k, v = quantized(k, kv_bits), quantized(v, kv_bits)
        q = q.view(B, T, -1, self.head_size).transpose(1, 2)               # (B, nh, T, hs)
        k = k.view(B, T, -1, self.head_size).transpose(1, 2)               # (B, nkv, T, hs)
        v = v.view(B, T, -1, self.head_size).transpose(1, 2)               # (B, nkv, T, hs)

        # Positions turn queries and keys. A product of the two then knows only their distance.
        q = quantized(apply_rope(q, cos, sin), a_bits)
        k = quantized(apply_rope(k, cos, sin), a_bits)

        # Each query weighs the values by its products with the keys, up to its own position. In
        # generation the earlier tokens' keys and values come from a cache (nanobit/generate.py).
        if cache is not None:
            y = cache.attend(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               enable_gqa=q.size(1) != k.size(1))

        # All heads side by side again, mixed by the last linear.
        y = quantized(y, a_bits).transpose(1, 2)                           # (B, T, nh, hs)
        return self.wo(y.reshape(B, T, -1))                                # (B, T, C)

class MLP(nn.Module):
    """SwiGLU: w_down(silu(w_gate x) * w_up x), a gate for each of the H = n_hidden units."""

    def __init__(self, c):
        super().__init__()
        self.w_gate = Linear(c.n_embd, c.n_hidden)
        self.w_up = Linear(c.n_embd, c.n_hidden)
        self.w_down = Linear(c.n_hidden, c.n_embd)
        self.config = c

    def forward(self, x):
        a_bits = self.config.a_bits
        gate, up = apply_linears(quantized(x, a_bits), self.w_gate, self.w_up)     # (B, T, H)
        return self.w_down(quantized(F.silu(gate) * up, a_bits))           # (B, T, C)

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))

# ---- The model --------------------------------------------------------------------------------

def rerun(f, *inputs):
    """f(*inputs). Only the inputs are kept for the backward pass, which computes f once more. No f
    here draws random numbers, so that the generator's state need not be kept."""
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)

class LLaMA(nn.Module):
    """Decoder-only transformer. `dtype` is that of the activations; the weights stay float32."""
    lean = False                 # True saves memory: backward computes blocks and logits once more

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        c = config
        self.config = config
        self.dtype = dtype
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.head = Linear(c.n_embd, c.vocab_size)
        if c.tied:
            self.head.weight = self.embed.weight

        # Noise. Outputs of wo and w_down add up to 2L summands, so theirs is smaller by sqrt(2L).
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02
                if name.endswith(("wo.weight", "w_down.weight")):
                    std = std / math.sqrt(2 * c.n_layer)
                nn.init.normal_(p, std=std)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, as_stored=False):
        """The model of a Hugging Face folder. Its weights become float32, or with as_stored keep
        their dtype and stay in the mapped files until they are used. Raises UsageError."""
        from nanobit.hf import read_folder
        return read_folder(folder, dtype, as_stored)

    def forward(self, idx, targets=None):
        """Ids and targets (B, T) -> (logits (B, T, vocab), mean loss in nats). The loss is None
        without targets; the logits are None with lean and targets, since they are never whole."""
        return self.predict(self.trunk(idx), targets)

    def trunk(self, idx):
        """Ids (B, T) -> the last block's output (B, T, C), from which `predict` goes on."""
        cos, sin = self.rope(idx)                                          # (T, hs) each
        x = self.embed(idx).to(self.dtype)                                 # (B, T, C)
        for block in self.blocks:
            x = rerun(block, x, cos, sin) if self.lean else block(x, cos, sin)
        return x

    def rope(self, idx):
        """cos and sin (T, hs) for the positions of ids (B, T)."""
        c = self.config
        return rope_tables(idx.size(1), c.head_dim, c.rope_theta, idx.device, c.rope_scaling)

    def predict(self, x, targets=None):
        """The last block's output (B, T, C) -> logits and loss, as forward returns them."""
        x = self.norm(x)
        if self.lean and targets is not None:
            return None, self.loss_in_parts(x, targets)
        logits = self.head(x)                                              # (B, T, vocab)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss_in_parts(self, x, targets):
        """The mean loss without ever holding all logits: those of n tokens at a time."""
        n = self.tokens_at_once()

        def loss(x, y):
            return F.cross_entropy(self.head(x).float(), y, reduction="sum")

        total = 0
        for x_part, y_part in zip(x.flatten(0, 1).split(n), targets.flatten().split(n)):
            total = total + rerun(loss, x_part, y_part)
        return total / targets.numel()

    def tokens_at_once(self):
        """Tokens whose logits are held: with gradients 256, else as many as make 2^26 logits."""
        return 256 if torch.is_grad_enabled() else max(256, 2**26 // self.config.vocab_size)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None):
        """Append n sampled tokens to idx (B, T); temperature 0 takes the most likely one. The
        plain loop, a pass over the whole window for each; nanobit/generate.py has a cache."""
        for _ in range(n):
            logits = self(idx[:, -self.config.seq_len:])[0][:, -1].float()         # (B, vocab)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)                            # (B, 1)
            else:
                logits = logits / temperature
                if top_k:                      # only the k largest, and their equals, can be drawn
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)                                   # (B, T + 1)
        return idx

    def linears(self):
        """(name, module) of the linears inside the blocks: all that any method quantizes. They are
        found by their names, w..., since a method's own class may stand there."""
        return [(name, m) for name, m in self.named_modules()
                if name.startswith("blocks.") and name.rsplit(".", 1)[-1].startswith("w")]

    def replace_linears(self, make):
        """Put make(name, linear) in the place of every linear of the blocks."""
        for name, linear in self.linears():
            self.set_submodule(name, make(name, linear))
        return self

    def compile_parts(self):
        """torch.compile each block, so that all share the first one's code, and predict."""
        for block in self.blocks:
            block.compile()
        self.predict = torch.compile(self.predict)

if __name__ == "__main__":
    # nanobit.cli imports this file again, as `model`; nothing of this copy is used.
    from nanobit.cli import main, run
    run(main)
