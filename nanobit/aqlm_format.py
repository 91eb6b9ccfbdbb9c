"""Linears of codebooks in the format of AQLM's own package, which transformers loads.

Of each linear a folder has, under the linear's name there,
    codes       int8 (O, J, M), int16 above 8 bits     a code in two's complement
    codebooks   floats (M, 2^B, 1, g)
    scales      floats (O, 1, 1, 1)
and config.json has M, B and g, once for all linears: `quantization_config`.

Nothing is rounded a second time. But a code takes whole bytes: the 4 bits of 2x4g4 become 8.

On a CPU the package multiplies with codebooks of 256 vectors in threads that add to the same
numbers at the same time, and some sums get lost. One thread gives the right ones:
`numba.set_num_threads(1)`.

Shapes: O output channels, J groups of g inputs in a row, M codebooks, as in quantizers.py.
"""
from typing import NamedTuple

import torch

from nanobit.compressed import nothing_to_keep
from quantizers import PackedVQ, QuantLinear, pack

class Grid(NamedTuple):
    """What all linears of such a folder have in common."""
    num_codebooks: int
    bits: int                    # of a code
    group_size: int

    @staticmethod
    def of(linear):
        """The grid of a PackedVQ."""
        M, _, g = linear.codebooks.shape
        return Grid(M, linear.bits, g)

def obstacle(model):
    """What the format cannot say about a model, in words; None where it can say everything."""
    problem = nothing_to_keep(model)
    if problem:
        return problem

    # One grid is said to be that of all linears.
    linears = model.linears()
    first = None
    for name, linear in linears:
        if not isinstance(linear, PackedVQ):
            return f"{name} has no codebooks"
        grid = Grid.of(linear)
        first = first or grid
        if grid != first:
            return f"{name} has other codebooks than {linears[0][0]}"
        if linear.codebooks.size(1) != 2**grid.bits:
            return f"{name} has codebooks of {linear.codebooks.size(1)} vectors, no power of two"
    return None

# ---- Writing ------------------------------------------------------------------------------------

def quantization_config(grid):
    """What config.json says about the linears. All are quantized but the head."""
    return {"quant_method": "aqlm", "num_codebooks": grid.num_codebooks,
            "nbits_per_codebook": grid.bits, "in_group_size": grid.group_size,
            "out_group_size": 1, "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight"]}

def linear_parts(linear):
    """{the part's name: the tensor} of a PackedVQ."""
    bits = linear.bits
    codes = linear.codes().int()                                       # (O, J, M)

    # Two's complement of `bits` bits: codes from 2^(bits-1) on become negative.
    codes -= 2**bits * (codes >= 2 ** (bits - 1)).int()
    return {"codes": codes.to(codes_dtype(bits)), "codebooks": linear.codebooks.unsqueeze(2),
            "scales": linear.scale.view(-1, 1, 1, 1)}

def codes_dtype(bits):
    """The dtype in which a folder has codes of so many bits."""
    return torch.int8 if bits <= 8 else torch.int16

# ---- Reading ------------------------------------------------------------------------------------

def shapes(grid, O, C):
    """{part: (shape, dtypes)} of what a folder has of a linear with C inputs and O outputs."""
    M, bits, g = grid
    floats = (torch.float16, torch.float32, torch.bfloat16)
    return {"codes": ((O, C // g, M), (codes_dtype(bits),)),
            "codebooks": ((M, 2**bits, 1, g), floats),
            "scales": ((O, 1, 1, 1), floats)}

def packed_linear(grid, C, parts):
    """The PackedVQ of a folder's tensors, whose shapes are those of `shapes`."""
    # `% 2^bits` makes of negative codes what they were. Some rows at a time: `pack` takes 8 bytes
    # for each code.
    codes = parts["codes"].flatten(1)                                  # (O, J * M)
    packed = torch.cat([pack(rows.int() % 2**grid.bits, grid.bits) for rows in codes.split(256)])
    spec = {"kind": "vq", "bits": grid.bits, "a_bits": 16, "signed": False, "in_features": C}
    return QuantLinear.of(spec, {"packed": packed, "scale": as_held(parts["scales"].flatten()),
                                 "codebooks": as_held(parts["codebooks"].squeeze(2))})

def as_held(t):
    """As a PackedVQ holds floats: float16 or float32, and in memory, not in the mapped file."""
    return t.float() if t.dtype == torch.bfloat16 else t.clone()
