"""Packed affine linears in compressed-tensors' format "pack-quantized", which transformers loads.

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

compressed-tensors before 0.18 padded codes of 3, 5, 6 and 7 bits, and reads other weights here.

Shapes: O output channels, C input channels, G groups, as in quantizers.py.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from quantizers import PackedQuest, PackedVQ, QuantLinear, pack

class Grid(NamedTuple):
    """What all linears of such a folder have in common."""
    bits: int
    group_size: int              # -1: one scale per row
    symmetric: bool              # there are no zero points

    @staticmethod
    def of(linear):
        """The grid of a PackedAffine."""
        return Grid(linear.bits, linear.spec["group_size"], linear.zeros is None)

def obstacle(model):
    """What the format cannot say about a model, in words; None where it can say everything."""
    # It has no words for rounded keys and values, nor for the step of our rounded inputs.
    bits = min(model.config.a_bits, model.config.kv_bits)
    if bits < 16:
        return f"activations are quantized to {bits} bits"
    linears = model.linears()
    if not any(isinstance(linear, QuantLinear) for _, linear in linears):
        return "no linear is packed"

    # One grid is said to be that of all linears.
    first = None
    for name, linear in linears:
        if not isinstance(linear, QuantLinear):
            return f"{name} is not packed"
        if isinstance(linear, PackedQuest):
            return f"{name} has QuEST's grid, which has no code for 0"
        if isinstance(linear, PackedVQ):
            return f"{name} has codebooks"
        if linear.a_bits < 16:
            return f"the inputs of {name} are quantized to {linear.a_bits} bits"
        if linear.bits > 8:
            return f"{name} has codes of {linear.bits} bits"

        # transformers reads all linears that have zero points by the first group of settings.
        first = first or Grid.of(linear)
        if Grid.of(linear) != first:
            return f"{name} has other bits or groups than {linears[0][0]}"
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

@torch.no_grad()
def compress(model):
    """({name: tensor}, the dtype of the floats) of a model without an `obstacle`. It is taken
    apart on the way, so that no more than one layer is in memory twice."""
    # A loader makes all floats of the one dtype that config.json names, so it has to hold all.
    packed = [name for name, m in model.linears() if isinstance(m, QuantLinear)]
    floats = [*model.parameters(), *(model.get_submodule(name).scale for name in packed)]
    dtype = dtype_of(*floats)
    del floats

    tensors = {}
    for name in packed:
        for part, tensor in compressed_linear(model.get_submodule(name)).items():
            tensors[f"{name}.{part}"] = tensor
        model.set_submodule(name, nn.Identity())       # frees the layer's own tensors

    # Embedding, norms and head. A head that is the embedding comes once, under the latter's name.
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.data
        parameter.data = torch.empty(0)

    # In a float32 folder, what came in 16 bits still takes no more. But where there are zero
    # points, transformers unpacks the weights in the scales' dtype: float16 would round them.
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            own = dtype
            unpacked = name.endswith(".weight_scale") and f"{name[:-6]}_zero_point" in tensors
            if dtype == torch.float32 and not unpacked:
                own = dtype_of(tensor)
            tensors[name] = tensor.to(own).contiguous()
    return tensors, dtype

def dtype_of(*tensors):
    """The narrowest dtype that holds every element of all the floats as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(holds(dtype, t) for t in tensors):
            return dtype
    return torch.float32

def holds(dtype, tensor):
    # In parts, so that little of the tensor is in memory twice.
    parts = tensor.flatten().split(2**22)
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in parts)

def compressed_linear(linear):
    """{the part's name: the tensor} of a PackedAffine, which is of no use afterwards: its own
    bytes become the folder's."""
    packed = linear.packed
    if linear.zeros is None:
        packed ^= top_bits(linear.bits, linear.in_features)            # in place, to save memory
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
    return -(-n * bits // 32)                          # rounded up

def packed_linear(grid, C, parts):
    """The PackedAffine of a folder's tensors, whose shapes are those of `shapes`."""
    packed = to_bytes(parts["weight_packed"], C, grid.bits)
    if grid.symmetric:
        packed = packed ^ top_bits(grid.bits, C)
    scale = parts["weight_scale"]
    if holds(torch.float16, scale):
        scale = scale.half()
    tensors = {"packed": packed, "scale": scale}

    if not grid.symmetric:
        # Each group's words become a row. A row of one word would keep its stride in t(), and then
        # have no view as bytes.
        words = torch.stack(parts["weight_zero_point"].unbind(1))      # (G, words)
        tensors["zeros"] = to_bytes(words, len(packed), grid.bits)
    spec = {"kind": "affine", "bits": grid.bits, "a_bits": 16, "in_features": C,
            "group_size": grid.group_size, "signed": grid.symmetric}
    return QuantLinear.of(spec, tensors)

def to_bytes(words, n, bits):
    """int32 (R, words) -> uint8 (R, bytes), as many as n codes take."""
    return words.contiguous().view(torch.uint8)[:, :-(-n * bits // 8)].contiguous()
