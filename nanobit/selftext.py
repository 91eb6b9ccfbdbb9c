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

GREEDY = 4                    # tokens after the first that are the most likely ones
TOP_K = 50                    # the rest are sampled from so many most likely ones
CPU_MEMORY = 2**31            # bytes for the windows that are written at once, on a CPU

def own_text(model, starts, length, end, generator):
    """The model's own text after each of the first tokens (N, 1) -> ids (N, length).

    From the cache where the same model, whatever file it came from, has written it before, from
    the same first tokens and random numbers, on the same kind of device.
    """
    settings = [starts.tolist(), length, end, digest([generator.get_state()]), starts.device.type,
                str(model.dtype), GREEDY, TOP_K]

    def make():
        ids = write_text(model, starts, length, end, generator)
        return {"ids": ids.cpu().numpy()}

    def read(arrays):
        """The ids. What is no such text raises, and is then written again."""
        ids = arrays["ids"]
        vocab = model.config.vocab_size
        if ids.shape != (len(starts), length) or ids.min() < 0 or ids.max() >= vocab:
            raise ValueError("not the ids of these windows")
        return torch.from_numpy(ids.astype(np.int64)).to(starts.device)

    return cached(["own text", content_of(model), settings], make, read)

def content_of(model):
    """sha256 of the model's shape and of all its weights."""
    weights = digest(model.state_dict(keep_vars=True).values())
    return f"{model.config} {weights}"

def digest(tensors):
    """sha256 of tensors, their dtypes and shapes; of one that is shared, such as a tied head, once.
    One at a time is copied to the CPU."""
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
    # Parts of about equal size: a step takes almost the same time for one window as for many,
    # since it reads every weight.
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

    Chooser takes the token with the largest p / noise, and calls draw before each. With
    exponential noise that is a sample by p. The noise starts as all ones: while it is not
    drawn, the token is the most likely one.
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
