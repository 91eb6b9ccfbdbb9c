"""Packed linears in compressed-tensors' format "pack-quantized", which transformers loads: affine
ones, and QuEST's with float inputs.

Of each linear a folder has, under the linear's name there,
    weight_packed      int32 (O, words)    the codes of each row, `bits` bits each
    weight_scale       floats (O, G)
    weight_shape       int64 (2,)          O and C
    weight_zero_point  int32 (words, G)    of an asymmetric grid: per group, O of them side by side
and config.json has, once for all linears, the grid: `quantization_config`.

The bits are those of `pack`: code i of a row begins at bit i * bits. So a packed file's own bytes
go into the folder, padded to words of 32 bits, and nothing is rounded a second time. The format's
codes are unsigned, as ours are on an asymmetric grid. Its tools take 2^(bits-1) off codes and zero
points when they unpack both, which leaves the difference of the two as it was.

QuEST's levels are q + 1/2, and the format has no such zero point. But (q + 1/2) s = (2q + 1) s/2:
an odd integer, which takes one bit more than q, times half the scale. Its linears read rotated
inputs, which `transform_config` says. transformers 5.24 loads such a folder and leaves the rotation
out, without a word; compressed-tensors' own apply_transform_config puts it in.

compressed-tensors before 0.18 padded codes of 3, 5, 6 and 7 bits, and reads other weights here.

Shapes: O output channels, C input channels, G groups, as in quantizers.py.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from quantizers import PackedQuest, PackedVQ, QuantLinear, code_offset, pack, unpack

class Grid(NamedTuple):
    """What all linears of such a folder have in common."""
    bits: int
    group_size: int              # -1: one scale per row
    symmetric: bool              # there are no zero points
    rotated: bool = False        # the inputs are, in blocks of gcd(C, 128) channels

    @staticmethod
    def of(linear):
        """The grid of a PackedAffine, or that on which a PackedQuest is written."""
        if isinstance(linear, PackedQuest):
            return Grid(whole_bits(linear), -1, symmetric=True, rotated=linear.spec["rotate"])
        return Grid(linear.bits, linear.spec["group_size"], symmetric=linear.zeros is None)

def obstacle(model):
    """What the format cannot say about a model, in words; None where it can say everything."""
    problem = nothing_to_keep(model)
    if problem:
        return problem

    # One grid is said to be that of all linears.
    linears = model.linears()
    first = None
    for name, linear in linears:
        if not isinstance(linear, QuantLinear):
            return f"{name} is not packed"
        if isinstance(linear, PackedVQ):
            return f"{name} has codebooks"
        grid = Grid.of(linear)
        if grid.bits > 8:
            return f"{name} has codes of {linear.bits} bits, which take {grid.bits} here"

        # transformers reads all linears that have zero points by the first group of settings.
        first = first or grid
        if grid != first:
            return f"{name} has other bits or groups than {linears[0][0]}"
    return None

def nothing_to_keep(model):
    """What no folder of packed linears can say, whatever their codes are: rounded activations, or
    that there are none. In words; None where the codes decide."""
    problem = rounded_activations(model)
    if problem:
        return problem
    if not any(isinstance(linear, QuantLinear) for _, linear in model.linears()):
        return "no linear is packed"
    return None

def rounded_activations(model):
    """What no format can say: rounded keys and values, and the step of our rounded inputs. In
    words; None where all activations are floats."""
    bits = min(model.config.a_bits, model.config.kv_bits)
    if bits < 16:
        return f"activations are quantized to {bits} bits"
    for name, linear in model.linears():
        if isinstance(linear, QuantLinear) and linear.a_bits < 16:
            return f"the inputs of {name} are quantized to {linear.a_bits} bits"
    return None

# ---- Writing ------------------------------------------------------------------------------------

def quantization_config(grid):
    """What config.json says about the linears. All are quantized but the head."""
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric,
               "strategy": "channel"}
    if grid.group_size != -1:
        weights |= {"strategy": "group", "group_size": grid.group_size}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized",
              "quantization_status": "compressed", "ignore": ["lm_head"],
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}

    # transformers keeps symmetric layers packed until they are used. In asymmetric ones it expects
    # zero points that are not packed, and stops; with this word it unpacks all as it loads them.
    if not grid.symmetric:
        config["dequantize"] = True
    return config

def transform_config(inputs):
    """What config.json says about rotated inputs. inputs: {a linear's name there: its C}."""
    # The same linear of every block, by the last part of its name.
    targets = {}
    for name, C in inputs.items():
        targets.setdefault(math.gcd(C, 128), set()).add(f"re:.*{name.rpartition('.')[2]}$")
    return {"config_groups": {
        f"rotate_{n}": {"type": "hadamard", "head_dim": n,
                        "apply": [{"location": "input", "targets": sorted(names)}]}
        for n, names in targets.items()}}

@torch.no_grad()
def take_apart(model, parts_of):
    """Yield (name, tensor) of all that a model holds: its packed linears' parts, and the other
    weights. Nothing is left of the model, so that no more than one layer is in memory twice.

    parts_of: a packed linear -> {a part's name: its tensor}; it may use up the linear's own.
    """
    # By names: a list of the linears would keep them all.
    packed = [name for name, linear in model.linears() if isinstance(linear, QuantLinear)]
    for name in packed:
        parts = parts_of(model.get_submodule(name))
        model.set_submodule(name, nn.Identity())       # frees the layer's own tensors
        for part in list(parts):
            yield f"{name}.{part}", parts.pop(part)    # and so is the caller's alone

    # A head that is the embedding comes once, under the latter's name.
    for name, parameter in model.named_parameters():
        tensor = parameter.data
        parameter.data = torch.empty(0)
        yield name, tensor

def narrow(tensors):
    """Make the floats of {name: tensor} as narrow as they can be -> the dtype that config.json
    names. A loader makes all floats of that one, so it holds all as they are."""
    dtype = dtype_of(*(t for t in tensors.values() if t.is_floating_point()))

    # In a float32 folder, what came in 16 bits still takes no more. But where there are zero
    # points, transformers unpacks the weights in the scales' dtype: float16 would round them.
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        own = dtype
        asymmetric = (name.endswith(".weight_scale")
                      and name.removesuffix("scale") + "zero_point" in tensors)
        if dtype == torch.float32 and not asymmetric:
            own = dtype_of(tensor)
        tensors[name] = tensor.to(own).contiguous()
    return dtype

def dtype_of(*tensors):
    """The narrowest dtype that holds every element of all the floats as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(holds(dtype, t) for t in tensors):
            return dtype
    return torch.float32

def holds(dtype, tensor):
    """Does a dtype hold every element of a tensor of floats as it is?"""
    # In parts, so that little of the tensor is in memory twice.
    parts = tensor.flatten().split(2**22)
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in parts)

def compressed_linear(linear):
    """{the part's name: the tensor} of a PackedQuest, or of a PackedAffine, which is of no use
    afterwards: its own bytes become the folder's."""
    if isinstance(linear, PackedQuest):
        return quest_parts(linear)

    # A symmetric grid's codes are signed here, and unsigned there. In place, so that the weight is
    # not in memory twice: these are the linear's own bytes.
    packed = linear.packed
    if linear.zeros is None:
        packed ^= top_bits(linear.bits, linear.in_features)
    tensors = {"weight_packed": to_words(packed), "weight_scale": linear.scale,
               "weight_shape": torch.tensor([len(packed), linear.in_features])}

    if linear.zeros is not None:
        words = to_words(linear.zeros)                                 # (G, words)
        tensors["weight_zero_point"] = words.t().contiguous()
    return tensors

def top_bits(bits, n):
    """The packed row of n codes 2^(bits-1): uint8 (1, bytes). A signed code in two's complement
    and the code plus 2^(bits-1) differ in just the top bit, so that `packed ^ top_bits` turns all
    codes of a row from one into the other without unpacking them."""
    return pack(torch.full((1, n), 2 ** (bits - 1)), bits)

def whole_factor(linear):
    """What makes integers of a PackedQuest's levels: 2 where they are q + 1/2, else 1."""
    return 2 if code_offset(linear.bits, linear.spec["grid"]) else 1

def whole_bits(linear):
    """Bits of a PackedQuest's levels, times their whole_factor, as signed integers."""
    if linear.spec["grid"] == "fp4":
        return 5                                       # -12..12
    if linear.bits == 1.58:
        return 2                                       # -1..1
    return linear.bits + 1

def quest_parts(linear):
    """{the part's name: the tensor} of a PackedQuest. A sparse grid's pruned weights become 0."""
    bits = whole_bits(linear)
    factor = whole_factor(linear)
    whole = linear.levels(torch.bfloat16).mul_(factor)                 # (O, C), exact
    O, C = whole.shape

    # Some rows at a time: `pack` takes 8 bytes for each code.
    packed = torch.cat([pack(rows + 2 ** (bits - 1), bits) for rows in whole.split(256)])
    scale = linear.scale.expand(O, 1) / factor                         # LSQ has one for all rows
    return {"weight_packed": to_words(packed), "weight_scale": scale,
            "weight_shape": torch.tensor([O, C])}

def to_words(packed):
    """uint8 (R, bytes) -> int32 (R, words), the last word filled up with zeros."""
    missing = -packed.size(1) % 4
    if missing:                                        # else the bytes stay where they are
        packed = F.pad(packed, (0, missing))
    return packed.contiguous().view(torch.int32)

# ---- Reading ------------------------------------------------------------------------------------

def shapes(grid, O, C):
    """{part: (shape, dtypes)} of what a folder has of a linear with C inputs and O outputs."""
    G = 1 if grid.group_size == -1 else C // grid.group_size
    floats = (torch.float32, torch.float16, torch.bfloat16)
    parts = {"weight_packed": ((O, count_words(C, grid.bits)), (torch.int32,)),
             "weight_scale": ((O, G), floats),
             "weight_shape": ((2,), (torch.int64, torch.int32))}
    if not grid.symmetric:
        parts["weight_zero_point"] = ((count_words(O, grid.bits), G), (torch.int32,))
    return parts

def count_words(n, bits):
    """How many words of 32 bits n codes take: n * bits / 32, rounded up."""
    return -(-n * bits // 32)

def packed_linear(grid, C, parts):
    """The PackedAffine or, where the inputs are rotated, PackedQuest of a folder's tensors, whose
    shapes are those of `shapes`. None where the rotated codes are not QuEST's."""
    if grid.rotated:
        return packed_quest(grid, C, parts)
    packed = to_bytes(parts["weight_packed"], C, grid.bits)
    if grid.symmetric:
        packed = packed ^ top_bits(grid.bits, C)
    scale = parts["weight_scale"]
    if holds(torch.float16, scale):
        scale = scale.half()                           # what a PackedAffine has, where it can
    tensors = {"packed": packed, "scale": scale}

    if not grid.symmetric:
        # Each group's words become a row. A row of one word would keep its stride in t(), and then
        # have no view as bytes.
        words = torch.stack(parts["weight_zero_point"].unbind(1))      # (G, words)
        tensors["zeros"] = to_bytes(words, len(packed), grid.bits)
    spec = {"kind": "affine", "bits": grid.bits, "a_bits": 16, "in_features": C,
            "group_size": grid.group_size, "signed": grid.symmetric}
    return QuantLinear.of(spec, tensors)

def packed_quest(grid, C, parts):
    """The inverse of quest_parts, for evenly spaced levels."""
    codes = unpack(to_bytes(parts["weight_packed"], C, grid.bits), grid.bits, C)
    whole = codes.int() - 2 ** (grid.bits - 1)                         # (O, C)
    scale = parts["weight_scale"].float()

    # All are odd where the levels are q + 1/2. Else only -1, 0 and 1 are QuEST's, of 1.58 bits.
    if grid.bits > 1 and (whole % 2 == 1).all():
        bits = grid.bits - 1
        q = whole // 2                                 # rounded down: of 2q + 1, q
        scale = 2 * scale
    elif grid.bits == 2 and whole.abs().max() <= 1:
        bits = 1.58
        q = whole
    else:
        return None
    spec = {"kind": "quest", "bits": bits, "in_features": C, "a_bits": 16, "grid": "uniform",
            "signed": True, "rotate": True}
    return QuantLinear.of(spec, {"packed": pack(q, bits), "scale": scale})

def to_bytes(words, n, bits):
    """int32 (R, words) -> uint8 (R, bytes), as many as n codes take."""
    return words.contiguous().view(torch.uint8)[:, :-(-n * bits // 8)].contiguous()
