"""Text that a model writes itself, to calibrate by: kept in the cache, written in large batches.

  1. `own_text` takes it from the cache, by the model's content and the settings, or has it written.
  2. `write_text` writes it: some windows at once, one time left for the whole.
  3. `Writer` chooses the tokens: a few greedy ones, then samples.
LLM-QAT's recipe (arXiv 2305.17888). The loop over tokens is nanobit/generate.py's `decode`.

Shapes: N windows of T tokens.
"""
import hashlib
import math

import numpy as np
import torch

from nanobit.data import cached
from nanobit.generate import Chooser, decode
from nanobit.ranks import Progress

GREEDY = 4                    # so many tokens after the first are the most likely ones
TOP_K = 50                    # each later token is sampled from the 50 most likely ones
CPU_MEMORY = 2**31            # bytes for the windows written at once, where there is no CUDA GPU

def own_text(model, starts, length, end, generator):
    """The model's own text after each first token (N, 1) -> ids (N, length), with the first tokens.

    end: the id of END, which is never written. The text comes from the cache where a model of the
    same weights, from whatever file, has written it, from the same first tokens and state of the
    generator, on the same kind of device. How many windows fit at once also decides which random
    numbers each gets: on a GPU what is written first can depend on its free memory.
    """
    # All that the text depends on, besides the weights.
    settings = [starts.tolist(), length, end, digest([generator.get_state()]), starts.device.type,
                str(model.dtype), GREEDY, TOP_K]

    def make():
        ids = write_text(model, starts, length, end, generator)
        return {"ids": ids.cpu().numpy()}

    def read(arrays):
        """The ids. Raises where the file holds something else; `cached` then calls make."""
        ids = arrays["ids"]
        vocab = model.config.vocab_size
        if ids.shape != (len(starts), length) or ids.min() < 0 or ids.max() >= vocab:
            raise ValueError("not the ids of these windows")
        return torch.from_numpy(ids.astype(np.int64)).to(starts.device)

    return cached(["own text", content_of(model), settings], make, read)

def content_of(model):
    """The model's shape as text, and the sha256 of all its weights."""
    # keep_vars gives the parameters themselves, by which `digest` knows a head that is tied.
    weights = digest(model.state_dict(keep_vars=True).values())
    return f"{model.config} {weights}"

def digest(tensors):
    """The sha256 of the values, dtypes and shapes of tensors. One that comes twice, such as a tied
    head, counts once. They are copied to the CPU one at a time."""
    found = hashlib.sha256()
    seen = set()
    for t in tensors:
        if id(t) in seen:
            continue
        seen.add(id(t))
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        flat = t.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()

# ---- Writing ------------------------------------------------------------------------------------

def write_text(model, starts, length, end, generator):
    """As own_text, without the cache."""
    # As few parts as memory allows: a step reads every weight, so it takes almost the same time
    # for one window as for many.
    n_parts = math.ceil(len(starts) / windows_at_once(model, length))
    parts = starts.chunk(n_parts)

    # One count of steps over all parts, so that the time that is left is that of the whole.
    todo = Progress(len(parts) * (length - 1), "calibration: step")
    texts = []
    for ids in parts:
        writer = Writer(model, len(ids), end, generator)
        text = [ids]                                                       # (n, 1) each
        for token in decode(model, ids, length - 1, writer):
            # decode yields one tensor, over which it writes the next token: copy each.
            text.append(token.clone())
            todo.add(1)
        texts.append(torch.cat(text, dim=1))                               # (n, T)
    return torch.cat(texts)                                                # (N, T)

def windows_at_once(model, length):
    """The most windows that are written at once: on a GPU half of its free memory is for them, on a
    CPU CPU_MEMORY."""
    # Of each window the keys and values of all its tokens, and some four numbers for each token of
    # the vocabulary: logits, their copy in float32, and the noise by which Chooser draws.
    c = model.config
    keys = c.n_layer * c.n_kv_head * c.head_dim * length
    each = 2 * keys * model.dtype.itemsize + 4 * c.vocab_size * 4

    memory = CPU_MEMORY
    device = model.norm.weight.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        memory = free // 2
    return max(1, memory // each)

class Writer(Chooser):
    """The GREEDY likeliest tokens, then samples. END is never chosen, so that all windows
    have full length.

    Chooser takes the token with the largest p / noise, which with exponential noise is a sample
    from p. decode calls draw before each choice. The noise starts as ones, and while draw leaves it
    so, the largest p / noise is the largest p: the greedy token.
    """

    def __init__(self, model, batch, end, generator):
        super().__init__(model, batch, 1.0, TOP_K, generator)
        self.end = end
        self.written = 0

    def draw(self):
        self.written += 1
        if self.written > GREEDY:
            super().draw()

    def __call__(self, logits):
        logits = logits.float().clone()                                    # (n, vocab)
        logits[:, self.end] = -torch.inf
        return super().__call__(logits)
