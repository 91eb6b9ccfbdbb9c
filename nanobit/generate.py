"""Text from a model, a token at a time, with a cache of keys and values.

`LLaMA.generate` is the plain loop: every token costs a pass over the whole window. Here a pass
over the prompt leaves the keys and values of its tokens in a cache, and then
  1. a step computes one token's own queries, keys and values, and attends to the cache,
  2. `Chooser` draws the next token,
  3. on a GPU both are recorded once as a CUDA graph, whose replay costs the CPU nothing.

Read `sample_text`, `generate` and `decode`, the loop, then `Cache` and `Chooser`, its two parts.

Shapes: B sequences, T tokens of the prompt, S tokens in the cache; others as in model.py.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, UsageError, rope_tables
from quantizers import QuantLinear

# ---- Many tokens --------------------------------------------------------------------------------

def sample_text(model, tokenizer, prompt, n, seed, temperature=0.8, top_k=50, compile=False):
    """The prompt and n generated tokens, as text; the same for the same seed. Raises UsageError."""
    try:
        prompt.encode()
    except UnicodeEncodeError as e:                    # bytes that the shell could not decode
        raise UsageError(f"--prompt {ascii(prompt)} is not UTF-8 text at character {e.start}; "
                         "give it in UTF-8") from None

    # A text begins with the token that begins a document: that of a folder's tokenizer, or else
    # the one that ends the document before.
    start = getattr(tokenizer, "start_token", tokenizer.eot_token)
    device = next(model.parameters()).device
    ids = torch.tensor([[start] + tokenizer.encode_ordinary(prompt)], device=device)

    generator = torch.Generator(device).manual_seed(seed)
    ids = generate(model, ids, n, temperature, top_k, generator, compile)          # (1, T + n)
    return tokenizer.decode(ids[0, 1:].tolist())

@torch.no_grad()
def generate(model, idx, n, temperature=1.0, top_k=None, generator=None, compile=False):
    """Append n sampled tokens to idx (B, T), as LLaMA.generate does, with a cache. One difference:
    top_k keeps exactly so many, where the plain loop also keeps those equal to the last of them.

    Keys and values are kept up to seq_len tokens. Beyond, the window slides, all of its positions
    change, and each token costs a pass over the whole window.
    """
    longest = model.config.seq_len
    choose = Chooser(model, len(idx), temperature, top_k, generator)

    # The tokens whose contexts fit in the window.
    fit = max(0, min(n, longest + 1 - idx.size(1)))
    if fit:
        for token in decode(model, idx, fit, choose, compile):
            idx = torch.cat((idx, token), dim=1)                                   # (B, T + 1)

    # The others.
    for _ in range(n - fit):
        choose.draw()
        token = choose(model(idx[:, -longest:])[0][:, -1])
        idx = torch.cat((idx, token), dim=1)
    return idx

@torch.no_grad()
def decode(model, idx, n, choose, compile=False):
    """Yield the n tokens (B, 1) after idx (B, T). It is the same tensor each time: copy it before
    the next. T + n - 1 tokens have to fit in the window. On a GPU all but the first two tokens come
    from replays of one CUDA graph.

    compile: torch.compile the step, all blocks at once, so that the small operations between the
    products become few. It takes 20 to 40 s at the second token of a 7B model.
    """
    B, T = idx.shape
    device = idx.device
    forward = cached_forward(model, B, T + n - 1, device)

    # A product with one token waits for its weight: the compiler's own, tuned kernels read it
    # faster than a library's.
    forward_one = forward
    if compile:
        options = {"coordinate_descent_tuning": True} if idx.is_cuda else None
        forward_one = torch.compile(forward, dynamic=False, options=options)

    # The prompt, all of its tokens at once.
    choose.draw()
    token = choose(forward(idx, torch.arange(T, device=device)))           # (B, 1)

    # A step reads and overwrites `token` and its position `at` in place: a graph that was recorded
    # finds them where they were.
    at = torch.full((1,), T, device=device)

    def step():
        token.copy_(choose(forward_one(token, at)))
        at.add_(1)

    # Then token by token. The first step runs as it is, which chooses kernels and compiles. It is
    # then recorded, which does not run it, and every later step is a replay.
    graph = None
    for _ in range(n - 1):
        yield token
        choose.draw()                                  # random numbers cannot be in the record
        if graph:
            graph.replay()
            continue
        step()
        if idx.is_cuda and capturable(model):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
    yield token

def cached_forward(model, B, length, device):
    """The model with a cache for `length` tokens: a function of ids and their positions."""
    # A cache for each layer, and the angles of all its positions. A length that 64 does not divide
    # would make attention copy the mask to pad it.
    c = model.config
    S = math.ceil(length / 64) * 64
    caches = [Cache(model, B, S) for _ in model.blocks]
    cos, sin = rope_tables(S, c.head_dim, c.rope_theta, device, c.rope_scaling)    # (S, hs) each
    slots = torch.arange(S, device=device)

    def forward(idx, at):
        """Ids (B, t) at positions `at` (t,) -> logits of the last one, (B, vocab)."""
        # Minus infinity where a position of the cache lies ahead of the token.
        ahead = slots > at.unsqueeze(1)                                            # (t, S)
        mask = torch.zeros(ahead.shape, dtype=model.dtype, device=device)
        mask = mask.masked_fill(ahead, -torch.inf)

        # The model's own blocks, each with its cache.
        cos_at = cos[at]                                                           # (t, hs)
        sin_at = sin[at]                                                           # (t, hs)
        x = model.embed(idx).to(model.dtype)                                       # (B, t, C)
        for block, cache in zip(model.blocks, caches):
            cache.at = at
            cache.mask = mask
            x = block(x, cos_at, sin_at, cache)
        logits, _ = model.predict(x[:, -1:])                                       # (B, 1, vocab)
        return logits[:, -1]

    return forward

def capturable(model):
    """Does no layer copy from the CPU or wait for the GPU? A packed one does not where it has a
    kernel. Its first step tells: `fast` is then kernels.py's Kept, of no operand without one."""
    return all(m.fast and m.fast.operand is not None for m in model.modules()
               if isinstance(m, QuantLinear))

# ---- One token ----------------------------------------------------------------------------------

class Cache:
    """A layer's keys and values, (B, nkv, S, hs) each, for S tokens at most.

    A pass is over t tokens, T for the prompt, then 1. Before it, `at` (t,) holds their positions,
    and `mask` (t, S) is added to their scores: 0 at the positions that each of them sees, else
    minus infinity."""

    def __init__(self, model, batch, length):
        c = model.config
        self.keys = torch.zeros(batch, c.n_kv_head, length, c.head_dim, dtype=model.dtype,
                                device=model.norm.weight.device)
        self.values = torch.zeros_like(self.keys)

        # The same for all layers; the `forward` of cached_forward sets them.
        self.at = None
        self.mask = None

    def attend(self, q, k, v):
        """Store k and v (B, nkv, t, hs); q (B, nh, t, hs) -> attention over the cache, like q."""
        self.keys[:, :, self.at] = k
        self.values[:, :, self.at] = v

        # Query heads that share a key head become more queries of that head.
        shared = q.size(1) // k.size(1)
        queries = q.reshape(len(q), k.size(1), -1, q.size(-1))         # (B, nkv, shared * t, hs)
        mask = self.mask.repeat(shared, 1)                             # (shared * t, S)
        y = F.scaled_dot_product_attention(queries, self.keys, self.values, mask)
        return y.reshape(q.shape)                      # no view: a GPU's y has another memory order

class Chooser:
    """logits (B, vocab) -> token ids (B, 1), by the random numbers that `draw` drew.

    Drawing is a call of its own, so that it can stand outside of a recorded step. At temperature 0
    the most likely token is taken and nothing is drawn. Below 1e-6 counts as 0: far below it,
    logits / temperature would overflow."""

    def __init__(self, model, batch, temperature, top_k, generator):
        self.temperature = temperature
        self.top_k = top_k
        self.generator = generator
        self.noise = torch.ones(batch, model.config.vocab_size, device=model.norm.weight.device)

    def draw(self):
        if self.temperature >= 1e-6:
            self.noise.exponential_(generator=self.generator)

    def __call__(self, logits):
        if self.temperature < 1e-6:
            return logits.argmax(-1, keepdim=True)

        # The largest of p / noise is torch.multinomial's choice. Its logarithm needs no p, since
        # the sum that p is divided by is the same for all; and nothing here waits for the GPU.
        if not self.top_k or self.top_k >= logits.size(-1):
            return self.largest(logits, self.noise)

        # Among the top_k alone: exactly so many, also of equal logits.
        logits, ids = logits.topk(self.top_k, sorted=False)                        # (B, top_k)
        noise = self.noise.gather(1, ids)
        return ids.gather(1, self.largest(logits, noise))

    def largest(self, logits, noise):
        """Where log(p / noise) is largest, (B, 1)."""
        return (logits.float() / self.temperature - noise.log()).argmax(-1, keepdim=True)

# ---- The model in the form that generation reads ------------------------------------------------

def prepare(model, compile=False):
    """The model for generation alone. A step of one token reads every weight once and computes next
    to nothing; it takes at least the time that a copy of the weights takes. So they get the
    activations' dtype, and linears that share an input are joined, for fewer kernels.

    compile: for compiled steps, where the compiler joins float linears better than this does.
    """
    # `Linear` would otherwise cast its float32 weight anew for each token.
    for p in model.parameters():
        if p.dim() == 2:
            p.requires_grad_(False)
            p.data = p.data.to(model.dtype)

    for block in model.blocks:
        attn = block.attn
        mlp = block.mlp
        if compile and isinstance(attn.wq, Linear):
            continue
        attn.wq, attn.wk, attn.wv = joined(attn.wq, attn.wk, attn.wv)
        mlp.w_gate, mlp.w_up = joined(mlp.w_gate, mlp.w_up)
    return model

class Joined(nn.Module):
    """Linears that share their input as one, in the place of the first."""

    def __init__(self, linears):
        super().__init__()
        first = linears[0]
        self.sizes = [n_out(m) for m in linears]
        if isinstance(first, QuantLinear):
            rows = {}                                  # of each tensor: codes, scales, zero points
            parts = [m.rows() for m in linears]
            for name in parts[0]:
                rows[name] = torch.cat([part[name] for part in parts])
            self.linear = QuantLinear.of(first.spec, rows)
        else:
            weight = torch.cat([m.weight for m in linears])                # (sum of outputs, C)
            first.weight = nn.Parameter(weight, requires_grad=False)
            self.linear = first

    @staticmethod
    def fused(x, linears):
        """What model.apply_linears asks for: the outputs of all, from the one that holds them."""
        return linears[0].linear(x).split(linears[0].sizes, -1)

def n_out(linear):
    """Its outputs. A packed one has a row of codes for each."""
    rows = linear.packed if isinstance(linear, QuantLinear) else linear.weight
    return len(rows)

def joined(*linears):
    """(Joined, None ...), or the linears themselves where one cannot hold them all."""
    if not can_join(linears):
        return linears
    nothing = [None] * (len(linears) - 1)              # the first one's place holds them all
    return Joined(linears), *nothing

def can_join(linears):
    if all(type(m) is Linear for m in linears):
        return True
    if not all(isinstance(m, QuantLinear) for m in linears):
        return False

    # Packed linears are joined row under row. That needs one way to read all rows, and tensors
    # that have a row for each output: a codebook, or one scale for a whole tensor, has none.
    alike = all(m.spec == linears[0].spec for m in linears)
    row_by_row = all(len(t) == n_out(m) for m in linears for t in m.rows().values())
    return alike and row_by_row
