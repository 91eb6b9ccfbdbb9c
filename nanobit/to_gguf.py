"""A model as one file of llama.cpp's format, GGUF, its blocks made of the trained integers.

The usual way to such a file rounds dense weights anew, and loses what a quantizer has learned. Here
    weight = q * scale,   q an integer
of a packed linear becomes the same product in a block, which holds integers and a float16 scale:
    TQ2_0   256 inputs   -1 .. 1        2.06 bits per weight
    Q4_0     32 inputs   -8 .. 7        4.5
    Q8_0     32 inputs   -128 .. 127    8.5
    Q4_1     32 inputs   0 .. 15, and a float16 minimum m: weight = u * scale + m     5
A layer gets the first of TQ2_0, Q4_0 and Q8_0 that holds its q, a code less its zero point (QuEST's
levels: compressed.py's whole_factor). But codes u of up to 4 bits whose zero points take q out of
Q4_0 become Q4_1, with m = -zero_point * scale rounded to float16: Q8_0 would take almost twice the
space. A group of more inputs than a block repeats its scale in each of its blocks. Packed
embeddings and heads, of 8 or 4 bits with one scale per row, become Q8_0 or Q4_0 in the same way.

  1. `obstacle` says what does not fit.
  2. `plan` chooses the kind of each tensor, which the head of the file has to say.
  3. `write` writes metadata, tokenizer (gguf_tokenizer.py) and tensors, one at a time.

Shapes: O output channels, C input channels, G groups, as in quantizers.py; B blocks of a row.
"""
import importlib
import math
import os
from typing import NamedTuple

import numpy as np
import torch

from model import UsageError, rope_tables
from nanobit.compressed import holds, rounded_activations, whole_factor
from nanobit.gguf_tokenizer import add_tokenizer
from nanobit.ranks import Progress
from quantizers import PackedAffine, PackedHead, PackedQuest, PackedVQ, QuantLinear

class Kind(NamedTuple):
    """One of GGUF's kinds of blocks, or of floats."""
    width: int                   # inputs in a block
    nbytes: int                  # of a block
    low: int = 0                 # the smallest and the largest integer that it holds
    high: int = 0

KINDS = {"TQ2_0": Kind(256, 66, -1, 1), "Q4_0": Kind(32, 18, -8, 7), "Q4_1": Kind(32, 20, 0, 15),
         "Q8_0": Kind(32, 34, -128, 127), "F32": Kind(1, 4), "F16": Kind(1, 2), "BF16": Kind(1, 2)}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

HALF_MAX = torch.finfo(torch.float16).max              # 65504

# ---- What fits ----------------------------------------------------------------------------------

def obstacle(model):
    """What the format cannot hold of a model, in words; None where it holds everything."""
    rounded = rounded_activations(model)
    if rounded:
        return rounded
    for name, linear in model.linears():
        problem = misfit(linear) if isinstance(linear, QuantLinear) else None
        if problem:
            return f"{name} {problem}"
    return None

def misfit(linear):
    """Why no block holds a packed linear, in words after its name; None where one does."""
    if isinstance(linear, PackedVQ):
        return "has codebooks"
    if isinstance(linear, PackedQuest) and linear.spec["rotate"]:
        return "has QuEST's rotation of its inputs, which llama.cpp does not do"
    C = linear.in_features
    width = group_inputs(linear)
    if width % 32:
        what = f"{C} inputs per row" if width == C else f"groups of {width} inputs"
        return f"has {what}, no multiple of a block's 32"

    # The scales are float16 there, and so are Q4_1's minima, zero_point times as large.
    largest = float(scales(linear).abs().max())
    end = f"too large for float16, which ends at {HALF_MAX:.0f}"
    if largest > HALF_MAX:
        return f"has a scale of {largest:.3g}, {end}"
    if may_be_q4_1(linear):
        zero_point = int(linear.zero_point.max())
        if largest * zero_point > HALF_MAX:
            return (f"has scales up to {largest:.3g} and zero points up to {zero_point}, whose "
                    f"product is {end}")

    # Only wide codes can leave the range of Q8_0: a zero point is itself a code.
    if linear.bits >= 8:
        low, high = extremes(integers(linear))
        if low < -128 or high > 127:
            return f"has integers {low} .. {high}, and Q8_0 holds -128 .. 127"
    return None

def group_inputs(linear):
    """How many inputs of a packed linear share one scale."""
    return linear.in_features // linear.scale.size(1)

def integers(linear):
    """int16 or int32 (O, C). Times `scales` they are a packed linear's weight."""
    dtype = torch.int16 if linear.bits <= 8 else torch.int32
    if isinstance(linear, PackedQuest):
        q = linear.levels(torch.float32) * whole_factor(linear)
        return q.to(dtype)
    q = linear.codes().to(dtype)
    if linear.zero_point is not None:
        zero_point = linear.zero_point.to(dtype)
        q -= zero_point.repeat_interleave(group_inputs(linear), dim=1)
    return q

def scales(linear):
    """float32 (O, G) of a packed linear's `integers`."""
    if isinstance(linear, PackedQuest):
        scale = linear.scale.float() / whole_factor(linear)
        return scale.expand(len(linear.packed), 1)
    return linear.scale.float()

def extremes(q):
    """The smallest and the largest of a tensor of integers."""
    return int(q.min()), int(q.max())

# ---- The plan -----------------------------------------------------------------------------------

class Stored(NamedTuple):
    """How one tensor is stored."""
    name: str                    # there
    source: object               # a packed linear, or a tensor of floats
    kind: str                    # of KINDS
    shape: tuple
    heads: int                   # above 0: the rows are those of so many heads, to be reordered

    def nbytes(self):
        kind = KINDS[self.kind]
        return math.prod(self.shape) // kind.width * kind.nbytes

def plan(model, found, todo):
    """[Stored] of a model without an `obstacle`. found: its `sources`; todo: a Progress of them."""
    c = model.config
    stored = []
    for name, source in found:
        # Which rows are to be reordered, see rotary_order.
        heads = 0
        if name.endswith("attn.wq.weight"):
            heads = c.n_head
        elif name.endswith("attn.wk.weight"):
            heads = c.n_kv_head

        # The smallest kind that holds it.
        if isinstance(source, QuantLinear):
            kind = choose(source)
            shape = (len(source.packed), source.in_features)
        else:
            # llama.cpp wants norms in float32.
            kind = float_kind(source) if source.dim() == 2 else "F32"
            shape = tuple(source.shape)
        stored.append(Stored(gguf_name(name), source, kind, shape, heads))
        todo.add(1)
    return stored

def float_kind(tensor):
    """The narrowest floats that hold a tensor as it is. float16 first: llama.cpp rounds the inputs
    of a product to the weight's kind, and bfloat16 has three bits less."""
    if holds(torch.float16, tensor):
        return "F16"
    return "BF16" if holds(torch.bfloat16, tensor) else "F32"

def sources(model):
    """[(our name, a packed linear or a tensor)] of all that the file holds. A head that is the
    embedding comes once, under the latter's name."""
    found = [(f"{name}.weight", m) for name, m in model.linears() if isinstance(m, QuantLinear)]
    found += [(name, p.data) for name, p in model.named_parameters()]
    found += packed_embedding(model)
    if model.config.rope_scaling:
        found.append(("rope_freqs.weight", rope_divisors(model.config)))
    return found

def packed_embedding(model):
    """`sources` of a packed embedding and head; [] where they are floats."""
    if not isinstance(model.head, PackedHead):
        return []
    embed = PackedHead(model.head.spec, dict(model.embed.named_buffers()))
    matrices = {"embed.weight": embed}
    if not model.config.tied:
        matrices["head.weight"] = model.head

    # Nothing is refused for them: one that blocks do not hold exactly becomes floats.
    found = []
    for name, matrix in matrices.items():
        exact = matrix.in_features % 32 == 0 and matrix.scale.dtype == torch.float16
        found.append((name, matrix if exact else matrix.weight()))
    return found

GGUF_PARTS = {  # the parts of a weight's name here and there
    "embed": "token_embd", "blocks": "blk", "norm": "output_norm", "head": "output",
    "mlp_norm": "ffn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
    "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down"}

def gguf_name(name):
    """blocks.3.attn.wq.weight -> blk.3.attn_q.weight"""
    parts = [part for part in name.split(".") if part not in ("attn", "mlp")]
    return ".".join(GGUF_PARTS.get(part, part) for part in parts)

def rope_divisors(c):
    """What Llama 3.1's scaling divides each of the rotary frequencies by, (hs/2,)."""
    def frequencies(scaling):
        # In the second row of the tables, at position 1, the angles are the frequencies themselves.
        # The cosine of a small one is nearly 1, so that the angle comes from sine and cosine.
        cos, sin = rope_tables(2, c.head_dim, c.rope_theta, "cpu", scaling)        # (2, hs)
        return torch.atan2(sin[1], cos[1])[:c.head_dim // 2]                       # (hs/2,)

    return frequencies(()) / frequencies(c.rope_scaling)

def choose(linear):
    """The name of the smallest blocks that hold a packed linear's integers."""
    low, high = extremes(integers(linear))
    width = group_inputs(linear)
    for name in ("TQ2_0", "Q4_0", "Q4_1", "Q8_0"):
        kind = KINDS[name]
        inside = kind.low <= low and high <= kind.high
        if name == "Q4_1":
            inside = may_be_q4_1(linear)
        if inside and width % kind.width == 0:
            return name
    raise AssertionError("obstacle() has let through what does not fit")

def may_be_q4_1(linear):
    """Has a packed linear unsigned codes that Q4_1 holds?"""
    return (isinstance(linear, PackedAffine) and linear.zero_point is not None
            and linear.bits <= 4)

# ---- Blocks -------------------------------------------------------------------------------------

def stored_bytes(stored):
    """The bytes of a tensor as the file has them, uint8 (O, bytes per row) or (bytes,)."""
    if isinstance(stored.source, QuantLinear):
        rows = blocks(stored.source, stored.kind)
    else:
        floats = stored.source.to(FLOATS[stored.kind])
        rows = floats.contiguous().view(torch.uint8)
    return rotary_order(rows, stored.heads) if stored.heads else rows

def blocks(linear, kind):
    """A packed linear's blocks of a kind, uint8 (O, B * bytes of a block)."""
    q = integers(linear)
    O = len(q)
    width = KINDS[kind].width

    # d, llama.cpp's name for the scale of each block, in two bytes.
    repeats = group_inputs(linear) // width
    d = scales(linear).half().repeat_interleave(repeats, dim=1).unsqueeze(-1)       # (O, B, 1)
    parts = [d.view(torch.uint8)]

    if kind == "Q8_0":
        parts.append(q.to(torch.int8).view(torch.uint8).view(O, -1, width))
    elif kind == "Q4_0":
        parts.append(nibbles((q + 8).view(O, -1, width)))
    elif kind == "Q4_1":
        m = minima(linear).repeat_interleave(repeats, dim=1).unsqueeze(-1)
        parts.append(m.view(torch.uint8))
        parts.append(nibbles(linear.codes().view(O, -1, width)))
    else:
        # TQ2_0: 128 integers in 32 bytes. The first 32 of them are the lowest bits of each byte.
        u = (q + 1).to(torch.uint8).view(O, -1, 2, 4, 32)
        body = u[..., 0, :] | (u[..., 1, :] << 2) | (u[..., 2, :] << 4) | (u[..., 3, :] << 6)
        parts.insert(0, body.flatten(2))                                   # before the scale
    return torch.cat(parts, dim=-1).flatten(1)

def nibbles(u):
    """Integers 0..15 (O, B, 32) -> uint8 (O, B, 16): byte k holds the k-th, and above it the
    (k + 16)-th."""
    u = u.to(torch.uint8)
    return u[..., :16] | (u[..., 16:] << 4)

def minima(linear):
    """Q4_1's m for each group, float16 (O, G). Of the scale that the file has, so that the code
    zero_point stands for 0.0 but for the rounding of m itself."""
    return (-linear.zero_point.float() * scales(linear).half().float()).half()

def rotary_order(rows, heads):
    """The rows (O, n) of wq or wk as llama.cpp turns them. Rotary positions turn pairs of channels
    of a head: here the i-th of the first half with the i-th of the second, there neighbours."""
    O, n = rows.shape
    return rows.view(heads, 2, -1, n).transpose(1, 2).reshape(O, n)

# ---- The file -----------------------------------------------------------------------------------

def write(path, name, model, content):
    """Write a model without an `obstacle` to a path -> (how the weights are stored, in words,
    [what else to know]).

    name: of the model, for people. content: what load_checkpoint returned beside the model.
    """
    # The tokenizer comes first, as it may be refused.
    gguf = need_gguf()
    writer = gguf.GGUFWriter(path, "llama")
    notes = add_tokenizer(writer, content["tokenizer"], model.config.vocab_size)

    # Each tensor is gone through twice, to plan it and to write it: a step of one progress each.
    found = sources(model)
    todo = Progress(2 * len(found), "gguf: tensors read and then written,")
    tensors = plan(model, found, todo)

    # The head of the file: metadata, and of each tensor its name, shape, kind and place. The dtype
    # stands for "a shape of numbers, not of bytes", and the kind says what they are.
    add_model(writer, name, model.config, tensors)
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes(),
                               gguf.GGMLQuantizationType[t.kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()

    # The tensors, each made when its turn comes, at multiples of so many bytes. With f.write, since
    # numpy's tofile, which the writer uses, does not say why it fails on a full disk.
    with open(path, "ab") as f:
        for t in tensors:
            f.write(bytes(-f.tell() % writer.data_alignment))
            f.write(stored_bytes(t).numpy())
            todo.add(1)
        f.write(bytes(-f.tell() % writer.data_alignment))
        f.flush()
        os.fsync(f.fileno())                           # on the disk before it gets its name

    # What to tell people.
    notes = roundings(tensors) + notes
    if model.config.rope_scaling:
        notes.append("transformers reads GGUF without rope_freqs, Llama 3.1's scaling of positions")
    return in_words(tensors), notes

def need_gguf():
    """The package gguf. Raises UsageError where it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UsageError("--format gguf needs one more package: pip install gguf") from None

def add_model(writer, name, c, tensors):
    """The metadata of a LlamaConfig."""
    gguf = need_gguf()
    main = main_kind(tensors)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if main == "F32" else f"MOSTLY_{main}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.seq_len)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)

def main_kind(tensors):
    """The kind of most of the blocks' weights."""
    sizes = {}
    for t in tensors:
        if t.name.startswith("blk.") and len(t.shape) == 2:
            sizes[t.kind] = sizes.get(t.kind, 0) + t.nbytes()
    return max(sizes, key=sizes.get)

def in_words(tensors):
    """How the weights are stored, for people."""
    linears = [t for t in tensors
               if isinstance(t.source, QuantLinear) and not isinstance(t.source, PackedHead)]
    if not linears:
        return f"all weights as {kinds_of(tensors)}"
    weights = sum(math.prod(t.shape) for t in linears)
    bits = 8 * sum(t.nbytes() for t in linears) / weights
    text = f"linears as {kinds_of(linears)}, {bits:.3f} bits per weight, of the trained integers"

    # The embedding's kind comes first. A head that is the embedding has no tensor of its own.
    tables = [t for t in tensors if t.name in ("token_embd.weight", "output.weight")]
    text += f"; embedding and head as {' and '.join(dict.fromkeys(t.kind for t in tables))}"
    rest = [t for t in tensors if t not in linears and t not in tables]
    return f"{text}; the rest as {kinds_of(rest)}"

def kinds_of(tensors):
    return " and ".join(sorted({t.kind for t in tensors}))

def roundings(tensors):
    """[a line for each thing that the file holds rounded]"""
    # How far float16 moves a scale, as a part of the scale, and a minimum, in steps. Of all the
    # largest.
    scale_change = minimum_change = 0.0
    for t in tensors:
        if not isinstance(t.source, QuantLinear):
            continue
        scale = scales(t.source)                                           # (O, G)
        d = scale.half().float()
        change = ((d - scale) / scale).nan_to_num(0).abs().max()           # 0 / 0 is no change
        scale_change = max(scale_change, float(change))

        if t.kind == "Q4_1":
            m = -t.source.zero_point.float() * d                           # (O, G)
            change = ((minima(t.source).float() - m).abs() / d).nan_to_num(0).max()
            minimum_change = max(minimum_change, float(change))

    lines = []
    if scale_change:
        lines.append("GGUF's scales are float16, and some of these are not: they change by "
                     f"up to {100 * scale_change:.2g} %")
    if minimum_change:
        lines.append("Q4_1's minima are float16: they are off by up to "
                     f"{100 * minimum_change:.2g} % of a step")
    return lines
