"""Hugging Face folders in: LLaMA 1 to 3, Mistral, TinyLlama, SmolLM2.

What LLaMA in model.py computes is read, everything else is refused by its name. `read_folder` is
the whole of it:
  1. `read_hf_config` turns config.json into a LlamaConfig, or refuses it.
  2. `open_hf_files` maps the safetensors, one file or shards, into memory without copying them.
  3. `read_packed_linears` takes the linears of a folder that is quantized (hf_packed.py).
  4. `read_hf_tensors` checks each weight's name, shape and numbers, and gives it our name.
The tokenizer is in hf_tokenizer.py, the way out in export.py.
"""
import functools
import importlib
import json
import math
import os
import pathlib
import re
import sys

import torch

from model import LlamaConfig, LLaMA, UsageError
from nanobit.checkpoint import check_weights
from nanobit.ranks import say

# ---- A model ------------------------------------------------------------------------------------

def read_folder(folder, dtype=torch.float32, as_stored=False):
    """The LLaMA of a folder, see LLaMA.from_pretrained."""
    from nanobit.hf_packed import read_packed_linears      # it imports this file
    config = read_hf_config(folder)
    stored = open_hf_files(folder, config)
    if config.tied:
        config.tied = hf_head_is_tied(folder, stored)

    # A model of shapes alone, which takes no memory; the tensors become its weights one by one.
    with torch.device("meta"):
        model = LLaMA(config, dtype)
    read_packed_linears(folder, model, stored)
    state = dict(model.named_buffers())                # of packed linears, which are whole
    for name, tensor in read_hf_tensors(folder, model, stored):
        state[name] = tensor if as_stored else tensor.to(torch.float32, copy=True)
    model.load_state_dict(state, assign=True)
    if model.config.tied:                              # assigning has untied them
        model.head.weight = model.embed.weight
    return model

HF_PARTS = {  # the parts of a weight's name here and there
    "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
    "head": "lm_head", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}

def hf_name(name):
    """blocks.3.attn.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    return ".".join(HF_PARTS.get(part, part) for part in name.split("."))

# ---- config.json --------------------------------------------------------------------------------

HF_SIZES = {  # the names of a model's sizes there and here
    "vocab_size": "vocab_size", "num_hidden_layers": "n_layer", "hidden_size": "n_embd",
    "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
    "intermediate_size": "n_hidden", "max_position_embeddings": "seq_len", "head_dim": "head_dim"}

HF_ONLY = {  # what LLaMA computes; a setting that is not there means the first value
    "model_type": (None, "llama", "mistral"), "hidden_act": ("silu", "swish"),
    "attention_bias": (False,), "mlp_bias": (False,), "num_local_experts": (1,)}

HF_ONLY_ROPE = {"rope_type": ("default", "llama3"), "partial_rotary_factor": (1,)}

HF_DEFAULTS = {  # transformers' own, where config.json does not have the name at all
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 2**17, "num_key_value_heads": 8,
                "sliding_window": 4096}}

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

def read_hf_config(folder):
    """config.json -> LlamaConfig. Raises UsageError for what LLaMA does not compute."""
    file = f"{folder}/config.json"
    c = read_hf_json(folder, "config.json")
    check_only(file, without_nulls(c), HF_ONLY)

    # A missing name takes transformers' default. An explicit null does not: a sliding_window of
    # null means no window.
    c = HF_DEFAULTS[c.get("model_type") or "llama"] | c
    c = without_nulls(c)
    c.setdefault("num_key_value_heads", c.get("num_attention_heads"))

    # Sizes. The limits keep products of them within 64 bits; real models are far below.
    for name in HF_SIZES:
        large = name in ("vocab_size", "max_position_embeddings")
        if name != "head_dim" or name in c:
            check_integer(file, c, name, 2**31 if large else 2**20)
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    if head_dim % 2:
        refuse(file, f"heads of {head_dim} channels: rotary positions turn pairs, so the number "
                     "must be even")
    tied = c.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        refuse(file, f"tie_word_embeddings is {shown(tied)}, neither true nor false")

    theta, scaling = read_hf_rope(file, c)
    norm_eps = check_float(file, "rms_norm_eps", c.get("rms_norm_eps", 1e-6))

    # A sliding window changes nothing in sequences that fit into it. Longer ones are not read.
    longest = c["max_position_embeddings"]
    if c.get("model_type") == "mistral" and "sliding_window" in c:
        check_integer(file, c, "sliding_window", 2**31)
        longest = min(longest, c["sliding_window"])
    sizes = {ours: c[name] for name, ours in HF_SIZES.items() if name in c}
    sizes["seq_len"] = longest
    return LlamaConfig(**sizes, tied=tied, rope_scaling=scaling, rope_theta=theta,
                       norm_eps=norm_eps)

def read_hf_rope(file, c):
    """(theta, scaling) of the rotary positions, as model.rope_tables takes them."""
    # rope_parameters is the newer name of rope_scaling; inside, rope_type is that of type.
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(c.get(name, {}), dict):
            refuse(file, f"{name} is {shown(c[name])}, not a list of names with values")
    given = without_nulls(c.get("rope_scaling") or c.get("rope_parameters") or {})
    rope = {"rope_type": given.get("type", "default"),
            "rope_theta": c.get("rope_theta", 1e4),
            "partial_rotary_factor": c.get("partial_rotary_factor", 1)} | given

    # Newer configs may hold one set of settings for each kind of layer.
    check_only(file, rope, HF_ONLY_ROPE)
    for name, value in rope.items():
        if isinstance(value, dict):
            refuse(file, f"rotary settings of their own for {shown(name)} are not supported")
    theta = check_float(file, "rope_theta", rope["rope_theta"])
    if rope["rope_type"] == "default":
        return theta, ()

    # Llama 3.1's scaling. As in transformers, an original_max_position_embeddings of the whole
    # config overrides rope's own; without either, max_position_embeddings is used.
    length = c.get("original_max_position_embeddings")
    if length is not None:
        rope["original_max_position_embeddings"] = length
    rope.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    if not set(LLAMA3_ROPE) <= set(rope):
        refuse(file, f"llama3's rope needs {', '.join(LLAMA3_ROPE)}")
    factor, low, high, length = [check_float(file, name, rope[name]) for name in LLAMA3_ROPE]
    if low >= high:
        refuse(file, "llama3's rope needs a low_freq_factor below its high_freq_factor")
    return theta, (factor, low, high, length)

def without_nulls(settings):
    return {name: value for name, value in settings.items() if value is not None}

def refuse(file, problem):
    raise UsageError(f"{file}: {problem}")

def check_only(file, settings, only):
    """Refuse a setting with another value than those that `only` lists for its name."""
    for name, known in only.items():
        value = settings.get(name, known[0])
        if value not in known:
            choices = " or ".join(map(str, known))
            refuse(file, f"{name} {shown(value)} is not supported, only {choices}")

def check_integer(file, settings, name, limit):
    value = settings.get(name)
    if type(value) is not int or not 1 <= value <= limit:                  # True is no number here
        problem = "missing" if value is None else shown(value)
        refuse(file, f"{name} is {problem}, not a positive integer up to {limit}")

def check_float(file, name, value):
    if type(value) not in (int, float) or not 0 < value < math.inf:        # nor is NaN
        refuse(file, f"{name} is {shown(value)}, not a positive number")
    return float(value)

# ---- The weights --------------------------------------------------------------------------------

HF_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

def open_hf_files(folder, config):
    """{a tensor's name there: a function that reads it}, of one file or else of an index's shards.
    The files are mapped into memory: a tensor takes none until it is used or copied."""
    safetensors = need_package("safetensors")
    stored = {}
    for name in hf_file_names(folder):
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

    # Before the model is built, which takes long if a wrong config.json asks for a million layers.
    if config.n_layer > len(stored):
        raise UsageError(f"{folder}: num_hidden_layers is {config.n_layer}, and there are only "
                         f"{len(stored)} tensors")
    return stored

def hf_file_names(folder):
    """The names of its safetensors: model.safetensors, or else the shards that an index lists."""
    single = "model.safetensors"
    index = "model.safetensors.index.json"
    if os.path.exists(os.path.join(folder, single)):
        return [single]
    if not os.path.exists(os.path.join(folder, index)):
        return [single]                                # which is then reported as missing
    shards = read_hf_json(folder, index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise UsageError(f"{folder}/{index} is damaged: its weight_map does not name files")
    names = sorted(set(shards.values()))
    for name in names:
        if leaves_folder(name):
            raise UsageError(f"{folder}/{index} names {shown(name)}, outside of the folder")
    return names

def read_hf_tensors(folder, model, stored):
    """Yield (name here, tensor) for every weight of the model, all of them finite. stored: see
    open_hf_files."""
    # Each of the model's weights has to be there, and nothing else.
    own = dict(model.named_parameters(remove_duplicate=False))
    names = {hf_name(n): n for n in own}
    if model.config.tied:
        del names["lm_head.weight"]
    for name in sorted(names.keys() ^ stored.keys()):
        if name in names:
            raise UsageError(f"{folder}: no file has the tensor {name}")
        raise UsageError(f"{folder}: the tensor {shown(name)} belongs to no LLaMA")

    for name, here in names.items():
        tensor = stored[name]()
        shape = tuple(own[here].shape)
        if tuple(tensor.shape) != shape or tensor.dtype not in HF_DTYPES:
            raise UsageError(f"{folder}: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                             f"config.json asks for {shape} of float32, float16 or bfloat16")
        check_weights([(name, tensor)], folder)
        yield here, tensor
        if here == "embed.weight" and model.config.tied:
            yield "head.weight", tensor

def hf_head_is_tied(folder, stored):
    """Is the head the embedding, as config.json says? Where both are stored with other values it is
    not, as in transformers. If it is, `stored` then has the matrix as the embedding alone."""
    embed = "model.embed_tokens.weight"
    head = "lm_head.weight"
    if head not in stored:
        return True
    if embed not in stored:
        stored[embed] = stored.pop(head)
        return True

    # Both are there. They are compared in parts: few float32 copies at a time.
    a = stored[embed]()
    b = stored[head]()
    same = a.shape == b.shape and a.dim() == 2 and all(
        torch.equal(x.float(), y.float()) for x, y in zip(a.split(4096), b.split(4096)))
    if same:
        del stored[head]
    else:
        say(f"note: {folder}: tie_word_embeddings is true, but lm_head.weight differs from the "
            "embedding; both are kept, as transformers does")
    return same

# ---- Packages, files and messages, also for the tokenizer and the way out -----------------------

HF_PACKAGES = {  # the oldest version that will do, and why
    "safetensors": "0.4.2",      # reads and so can refuse float8
    "tokenizers": "0.15.1"}      # has encode_special_tokens; before, setting it changes nothing

def need_package(name):
    """Import one of the optional packages that Hugging Face folders need. Raises UsageError where
    it is missing or too old."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UsageError("Hugging Face folders need two more packages: "
                         "pip install safetensors tokenizers") from None
    package = name.partition(".")[0]                   # of safetensors.torch
    found = sys.modules[package].__version__
    oldest = HF_PACKAGES[package]
    if version_numbers(found) < version_numbers(oldest):
        raise UsageError(f"Hugging Face folders need {package} {oldest} or newer and this is "
                         f"{found}: pip install --upgrade safetensors tokenizers")
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
    """The settings of one of a folder's JSON files. Raises UsageError."""
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
