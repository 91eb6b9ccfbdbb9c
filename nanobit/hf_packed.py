"""Hugging Face folders in whose linears are quantized: compressed-tensors' and AQLM's.

What the two rooms of a format describe is read, everything else is refused by its name:
  1. `read_grid` turns config.json's quantization_config into the one grid of all linears.
  2. `read_packed_linears` checks each linear's tensors, and packs them as a checkpoint does.
"""
from model import UsageError
from nanobit import aqlm_format, compressed
from nanobit.checkpoint import check_weights
from nanobit.hf import (check_integer, check_only, hf_name, read_hf_json, refuse, shown,
                        without_nulls)
from quantizers import group_width

def read_packed_linears(folder, model, stored):
    """Put packed linears into the model's blocks, where the folder has them.

    stored: {a tensor's name there: a function that reads it}, see open_hf_files. The packed
    linears' tensors are taken out of it.
    """
    # Which of the two formats it is: `form` is the room that describes it.
    inputs = {hf_name(name): linear.in_features for name, linear in model.linears()}
    grid = read_grid(folder, inputs)
    if grid is None:
        return
    form = compressed
    hint = "; compressed-tensors before 0.18 wrote others"
    if isinstance(grid, aqlm_format.Grid):
        form = aqlm_format
        hint = ""

    # Each linear of the blocks: does config.json's grid fit its weight, O x C?
    for name, linear in model.linears():
        prefix = hf_name(name)
        if f"{prefix}.weight" in stored:               # this one is not quantized
            continue
        O, C = linear.weight.shape
        if group_width(C, grid.group_size) is None:
            raise UsageError(f"{folder}: group_size {grid.group_size} does not divide the {C} "
                             f"input channels of {prefix}")

        # Its tensors, each checked.
        parts = {}
        for part, (shape, dtypes) in form.shapes(grid, O, C).items():
            full = f"{prefix}.{part}"
            if full not in stored:
                raise UsageError(f"{folder}: no file has the tensor {full}")
            tensor = stored.pop(full)()
            if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                raise UsageError(f"{folder}: {full} is {tuple(tensor.shape)} {tensor.dtype}, "
                                 f"config.json asks for {shape} of {dtypes[0]}{hint}")
            check_weights([(full, tensor)], folder)
            parts[part] = tensor
        if "weight_shape" in parts and parts["weight_shape"].tolist() != [O, C]:
            raise UsageError(f"{folder}: {prefix}.weight_shape is "
                             f"{parts['weight_shape'].tolist()}, config.json asks for {[O, C]}")

        packed = form.packed_linear(grid, C, parts)
        if packed is None:
            raise UsageError(f"{folder}: {prefix} has rotated inputs and codes other than those of "
                             "evenly spaced QuEST levels, which alone are read; give the .pt file "
                             "that it was exported from, or export that with --format dense")
        model.set_submodule(name, packed)

# ---- config.json --------------------------------------------------------------------------------

def read_grid(folder, inputs):
    """The grid of the packed linears that config.json speaks of; None: no weight is quantized.
    inputs: {a linear's name there: its C}."""
    config = read_hf_json(folder, "config.json").get("quantization_config")
    if config is None:
        return None
    file = f"{folder}/config.json: quantization_config"
    if not isinstance(config, dict):
        refuse(file, f"it is {shown(config)}, not a list of names with values")
    config = without_nulls(config)
    check_only(file, config, {"quant_method": ("compressed-tensors", "aqlm")})
    if config.get("quant_method") == "aqlm":
        return read_codebooks(file, config)
    return read_affine_grid(file, config, inputs)

def read_codebooks(file, config):
    """The aqlm_format.Grid of the settings. The limits are far above what anybody uses."""
    check_only(file, config, {"out_group_size": (1,)})
    check_integer(file, config, "num_codebooks", 2**10)
    check_integer(file, config, "nbits_per_codebook", 16)
    check_integer(file, config, "in_group_size", 2**20)
    return aqlm_format.Grid(config["num_codebooks"], config["nbits_per_codebook"],
                            config["in_group_size"])

def read_affine_grid(file, config, inputs):
    """The compressed.Grid of the settings. One that is missing has the first value of ONLY_..."""
    # One group of settings for all linears, of a kind that nanobit/compressed.py describes.
    check_only(file, config, ONLY_QUANTIZED)
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        refuse(file, "its config_groups are not one group for all linears")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        refuse(file, "its config_groups have no settings of weights")
    check_only(file, without_nulls(group), ONLY_GROUP)
    check_only(file, without_nulls(weights), ONLY_WEIGHTS)

    check_integer(file, weights, "num_bits", 8)
    group_size = -1
    if weights.get("strategy") != "channel":
        check_integer(file, weights, "group_size", 2**20)
        group_size = weights["group_size"]
    symmetric = weights.get("symmetric") is not False

    # Rotated inputs: QuEST's, as an export writes them.
    rotated = config.get("transform_config", {}) != {}
    if rotated:
        own = compressed.transform_config(inputs)
        if config["transform_config"] != own or group_size != -1 or not symmetric:
            refuse(file, f"the transform_config {shown(config['transform_config'])} is not read, "
                         "only that of `model.py export` with symmetric rows")
    return compressed.Grid(weights["num_bits"], group_size, symmetric, rotated)

# What is read, for check_only; a setting that is not there means the first value.
ONLY_QUANTIZED = {"format": ("pack-quantized",), "kv_cache_scheme": (None,),
                  "sparsity_config": ({},)}
ONLY_GROUP = {"format": ("pack-quantized",), "input_activations": (None,),
              "output_activations": (None,)}
ONLY_WEIGHTS = {"type": ("int",), "dynamic": (False,), "strategy": ("group", "channel"),
                "symmetric": (True, False)}
