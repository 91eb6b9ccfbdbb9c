"""Models out, for other tools: a Hugging Face folder or a GGUF file, whole or not at all.

`write_hf` gathers tensors, config, tokenizer files and a model card, all of which it checks before
it writes. The linears go in `compressed`, as the packed codes that they are, or `dense`, all
weights spelled out in bfloat16. `write_gguf` has llama.cpp's file written by to_gguf.py.
`new_folder` and `new_file` make what they write appear whole or not at all. FORMATS lists all.
"""
import contextlib
import functools
import json
import os
import pathlib
import shutil
import sys
from typing import Callable, NamedTuple

import torch

from model import UsageError
from nanobit.checkpoint import check_weights
from nanobit import compressed as pack_quantized
from nanobit import to_gguf
from nanobit.compressed import Grid, compress, quantization_config
from nanobit.hf import (HF_SIZES, LLAMA3_ROPE, first_line, hf_name, leaves_folder, need_package,
                        shown)
from nanobit.hf_tokenizer import default_hf_texts
from nanobit.tokenizer import make_tokenizer
from quantizers import QuantLinear, bits_per_weight

class Weights(NamedTuple):
    """What a folder holds of a model, as `dense` and `compressed` return it."""
    tensors: dict                # {the name there: the tensor}
    settings: dict               # what config.json says about them
    text: str                    # what people are told about them

@torch.no_grad()
def write_hf(folder, model, content, convert):
    """The model as a new Hugging Face folder, or nothing -> its Weights.

    content: what load_checkpoint returned beside the model. A tokenizer that came from such a
    folder is written. convert: `dense` or `compressed`, which takes the model apart.
    """
    # The tokenizer's files, where it has any.
    save_file = need_package("safetensors.torch").save_file
    spec = content["tokenizer"]
    tokenizer = make_tokenizer(spec)
    texts = {}
    if isinstance(spec, dict):
        texts = default_hf_texts(tokenizer) | spec.get("texts", {})        # older specs have none
        texts["tokenizer.json"] = spec["tokenizer.json"]

    # The weights. They are counted first, as they may not outlive the conversion.
    packed = bits_per_weight(model)[1]
    params = packed + sum(p.numel() for p in model.parameters())
    weights = convert(model)
    config = hf_config(model.config, tokenizer) | weights.settings
    texts["config.json"] = json.dumps(config, indent=2)
    texts["README.md"] = model_card(folder, content, params, packed, weights.text,
                                    how_to_load(folder, content, weights))

    # A weight above bfloat16's largest number is infinite by now.
    check_weights(weights.tensors.items(), folder)
    with new_folder(folder) as temporary:
        for name, text in texts.items():
            if leaves_folder(name):
                raise UsageError(f"the tokenizer's file {shown(name)} is outside of {folder}")
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        save_file(weights.tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    return weights

def dense(model):
    """All weights in bfloat16. A packed linear gets the weight that it stands for; a head that is
    the embedding is left out."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    state = {}
    for name, tensor in model.state_dict().items():
        module = name.rsplit(".", 1)[0]
        tied_head = model.config.tied and name == "head.weight"
        if module not in packed and not tied_head:
            state[name] = tensor
    for name, linear in packed.items():
        state[f"{name}.weight"] = linear.weight()
    tensors = {hf_name(name): tensor.bfloat16().contiguous() for name, tensor in state.items()}
    return Weights(tensors, {"torch_dtype": "bfloat16"}, "all weights in bfloat16")

def compressed(model):
    """The packed linears' own codes, see nanobit/compressed.py. The model is taken apart."""
    grid = Grid.of(model.blocks[0].attn.wq)
    count = bits_per_weight(model)[1]
    state, dtype = compress(model)
    tensors = {hf_name(n): tensor for n, tensor in state.items()}
    name = str(dtype).removeprefix("torch.")
    settings = {"torch_dtype": name, "quantization_config": quantization_config(grid)}

    # In words, for people. All that the linears have is counted.
    stored = 8 * sum(t.nbytes for name, t in tensors.items() if ".weight_" in name)
    zeros = "symmetric" if grid.symmetric else "with zero points"
    groups = "rows" if grid.group_size == -1 else f"groups of {grid.group_size}"
    text = (f"linears in {grid.bits} bits, {zeros}, {groups}, {stored / count:.3f} bits per "
            f"weight; the rest in {name}")
    return Weights(tensors, settings, text)

def hf_config(c, tokenizer):
    """config.json's settings for a LlamaConfig."""
    # In a folder of the kind "llama" the heads divide the width; a "mistral" may have others.
    kind = "mistral" if c.n_embd % c.n_head else "llama"
    scaling = None
    if c.rope_scaling:
        scaling = {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, c.rope_scaling))}

    # Tokenizers of this project have one special token, which begins and ends a document.
    start = getattr(tokenizer, "start_token", tokenizer.eot_token)
    ends = getattr(tokenizer, "ends", [tokenizer.eot_token])

    sizes = {theirs: getattr(c, ours) for theirs, ours in HF_SIZES.items()}
    return sizes | {
        "model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"], "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied, "rope_theta": c.rope_theta,
        "rope_scaling": scaling, "sliding_window": None, "bos_token_id": start,
        "eos_token_id": ends if len(ends) > 1 else ends[0]}

def write_gguf(target, model, content):
    """The model as GGUF, a new file where target ends in .gguf, or else model.gguf in a new folder
    -> its Weights. content: what load_checkpoint returned beside the model."""
    name = base_name(target).removesuffix(".gguf")
    if str(target).endswith(".gguf"):
        with new_file(target) as path:
            lines = to_gguf.write(path, name, model, content)
        return Weights({}, {}, "\n".join(lines))

    with new_folder(target) as folder:
        lines = to_gguf.write(folder / "model.gguf", name, model, content)
        packed = bits_per_weight(model)[1]
        params = packed + sum(p.numel() for p in model.parameters())
        loads = ["```", f"llama-cli -m {name}/model.gguf", "```"]
        text = model_card(target, content, params, packed, lines[0], loads)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return Weights({}, {}, "\n".join(lines))

def base_name(path):
    return os.path.basename(os.path.abspath(path))

def model_card(folder, content, params, packed, stored, loads):
    """README.md of a folder: what the model is, what made it, how to load it. packed: how many of
    the params were quantized. stored: how the weights are. loads: lines on how to load them."""
    # What is known. Older checkpoints have no command, some have no settings.
    settings = content.get("settings", {})
    base = settings.get("model")
    if base is None and "size" in settings:
        base = f"nanobit's own of --size {settings['size']}"
    facts = {"base": base, "method": content.get("method"),
             "parameters": f"{params:,}, of which {packed:,} were quantized",
             "stored": stored, "made by": content.get("command")}

    lines = ["---", "library_name: transformers", "---", f"# {base_name(folder)}", "",
             "A LLaMA, written by nanobit.", ""]
    for fact, value in facts.items():
        if value is not None:
            lines.append(f"- {fact}: {value}")
    text = "\n".join([*lines, "", *loads]) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()           # file names may be no text

def how_to_load(folder, content, weights):
    """The lines of a model card that say how to load a Hugging Face folder."""
    name = base_name(folder)
    packages = "'transformers>=5'"
    if "quantization_config" in weights.settings:
        packages += " 'compressed-tensors>=0.18'"
    classes = ["AutoModelForCausalLM"]
    loads = [f"model = AutoModelForCausalLM.from_pretrained({name!r})"]
    if isinstance(content["tokenizer"], dict):
        classes.append("AutoTokenizer")
        loads.append(f"tokenizer = AutoTokenizer.from_pretrained({name!r})")
    lines = ["```", f"pip install {packages}", "```", "", "```python",
              f"from transformers import {', '.join(classes)}", *loads, "```"]
    if weights.settings["torch_dtype"] == "float32":
        lines += ["", "Scales are float32, as trained. `dtype=torch.bfloat16` rounds them by up to "
                      "0.4 %."]
    return lines

# ---- Whole or not at all ------------------------------------------------------------------------

@contextlib.contextmanager
def new_folder(folder):
    """Yield a temporary folder. What the block writes there becomes `folder`, a new or an empty
    one; where it fails, nothing is left. Raises UsageError."""
    target = pathlib.Path(os.path.realpath(folder))
    there = target.is_dir()
    empty = there and not os.listdir(target)
    if os.path.lexists(target) and not empty:
        raise UsageError(f"cannot write {folder}: it is there and no empty folder; give a new one")
    parents = [p for p in target.parents if not p.exists()]    # to be made, or else removed again

    # Inside of an empty folder, or beside a new one: on the same disk, so that it can be renamed.
    if there:
        temporary = target / f".{os.getpid()}.tmp"
    else:
        temporary = pathlib.Path(f"{target}.{os.getpid()}.tmp")

    moved = []
    done = False
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if not there:
            os.replace(temporary, target)
        else:
            # An empty folder stays what it is, which may be a mount or somebody's current one, and
            # is filled. config.json comes last: without it no loader takes the folder.
            for part in sorted(temporary.iterdir(), key=lambda p: p.name == "config.json"):
                os.replace(part, target / part.name)
                moved.append(target / part.name)
            temporary.rmdir()
        done = True
    except write_errors() as e:
        raise cannot_write(folder, e) from None
    finally:
        if not done:                                   # also after Ctrl-C
            remove([*moved, temporary], parents)

@contextlib.contextmanager
def new_file(path):
    """The same for one file: yield a temporary path, what the block writes there becomes `path`."""
    target = pathlib.Path(os.path.realpath(path))
    if os.path.lexists(target):
        raise UsageError(f"cannot write {path}: it is there; give a new name")
    parents = [p for p in target.parents if not p.exists()]
    temporary = pathlib.Path(f"{target}.{os.getpid()}.tmp")
    done = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
        done = True
    except write_errors() as e:
        raise cannot_write(path, e) from None
    finally:
        if not done:                                   # also after Ctrl-C
            remove([temporary], parents)

def write_errors():
    """What a disk raises that is full or cannot be written: also safetensors' own error."""
    library = sys.modules.get("safetensors")
    return (OSError, library.SafetensorError) if library else (OSError,)

def cannot_write(path, e):
    reason = getattr(e, "strerror", None) or first_line(e)
    return UsageError(f"cannot write {path}: {reason}; give a new place where there is room")

def remove(paths, parents):
    """Take away files and folders that may not be there, and the parents made for them."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    for parent in parents:
        with contextlib.suppress(OSError):             # by now something else is in it
            parent.rmdir()

# ---- The formats --------------------------------------------------------------------------------

class Format(NamedTuple):
    """One of export's formats."""
    write: Callable              # (where, model, what load_checkpoint returned) -> Weights
    obstacle: Callable           # (model) -> what it cannot hold of it, in words, or None
    holds: str                   # what it can hold, in words

FORMATS = {
    "compressed": Format(functools.partial(write_hf, convert=compressed), pack_quantized.obstacle,
                         "affine codes of 1 to 8 bits with float activations (of normtweak.py, "
                         "lrqat.py, pvtune.py --scheme affine)"),
    "gguf": Format(write_gguf, to_gguf.obstacle,
                   "integers of up to 8 bits in rows or groups of a multiple of 32 inputs, with "
                   "float activations"),
    "dense": Format(functools.partial(write_hf, convert=dense), lambda model: None, "everything"),
}
