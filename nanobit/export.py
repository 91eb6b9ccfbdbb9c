"""Hugging Face folders out: a model in bfloat16 that other tools load, or nothing at all.

`write_hf` gathers tensors, config and tokenizer files, all of which it checks before it writes;
`new_folder` is what makes the folder appear whole or not at all.
"""
import contextlib
import json
import os
import pathlib
import shutil

import torch

from model import UsageError
from nanobit.checkpoint import check_weights
from nanobit.hf import (HF_SIZES, LLAMA3_ROPE, first_line, hf_name, leaves_folder, need_package,
                        shown)
from nanobit.hf_tokenizer import default_hf_texts
from nanobit.tokenizer import make_tokenizer
from quantizers import QuantLinear

@torch.no_grad()
def write_hf(folder, model, spec):
    """The model in bfloat16, packed weights spelled out, as a new Hugging Face folder, or nothing.

    spec: its tokenizer, which is written where it came from such a folder.
    """
    save_file = need_package("safetensors.torch").save_file
    tokenizer = make_tokenizer(spec)
    tensors = hf_tensors(model)

    texts = {}
    if isinstance(spec, dict):
        texts = default_hf_texts(tokenizer) | spec.get("texts", {})        # older specs have none
        texts["tokenizer.json"] = spec["tokenizer.json"]
    texts["config.json"] = json.dumps(hf_config(model.config, tokenizer), indent=2)

    check_weights(tensors.items(), folder)             # above bfloat16's largest: infinite by now
    with new_folder(folder) as temporary:
        for name, text in texts.items():
            if leaves_folder(name):
                raise UsageError(f"the tokenizer's file {shown(name)} is outside of {folder}")
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})

def hf_tensors(model):
    """{the name there: the weight in bfloat16}. A packed linear gets the weight that it stands for;
    a head that is the embedding is left out."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    state = {}
    for name, tensor in model.state_dict().items():
        module = name.rsplit(".", 1)[0]
        tied_head = model.config.tied and name == "head.weight"
        if module not in packed and not tied_head:
            state[name] = tensor
    for name, linear in packed.items():
        state[f"{name}.weight"] = linear.weight()
    return {hf_name(name): tensor.bfloat16().contiguous() for name, tensor in state.items()}

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
        "eos_token_id": ends if len(ends) > 1 else ends[0], "torch_dtype": "bfloat16"}

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
    except (OSError, need_package("safetensors").SafetensorError) as e:
        raise UsageError(f"cannot write {folder}: {getattr(e, 'strerror', None) or first_line(e)}; "
                         "give a new folder where there is space") from None
    finally:
        if not done:                                   # also after Ctrl-C
            remove([*moved, temporary], parents)

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
