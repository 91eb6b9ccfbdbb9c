"""Hugging Face folders out: a model in bfloat16 that other tools load, or nothing at all."""
import contextlib
import json
import os
import pathlib
import shutil

import torch

from model import UsageError
from nanobit.checkpoint import check_weights
from nanobit.hf import (HF_SIZES, LLAMA3_ROPE, default_hf_texts, first_line, hf_name, leaves_folder,
                        need_package, shown)
from nanobit.tokenizer import make_tokenizer
from quantizers import QuantLinear

@torch.no_grad()
def write_hf(folder, model, spec):
    """The model in bfloat16, packed weights spelled out, as a new Hugging Face folder, or nothing.

    spec: its tokenizer, which is written where it came from such a folder.
    """
    save_file, c = need_package("safetensors.torch").save_file, model.config
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    state = {n: t for n, t in model.state_dict().items() if n.rsplit(".", 1)[0] not in packed}
    state |= {f"{n}.weight": m.weight() for n, m in packed.items()}
    tensors = {hf_name(n): t.bfloat16().contiguous() for n, t in state.items()
               if not (c.tied and n == "head.weight")}
    kind = "mistral" if c.n_embd % c.n_head else "llama"       # there, heads divide the width
    rope = {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, c.rope_scaling))}
    tokenizer = make_tokenizer(spec)
    start = getattr(tokenizer, "start_token", tokenizer.eot_token)
    ends = getattr(tokenizer, "ends", [tokenizer.eot_token])
    end = ends if len(ends) > 1 else ends[0]
    config = {theirs: getattr(c, ours) for theirs, ours in HF_SIZES.items()} | {
        "model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"], "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied, "rope_theta": c.rope_theta,
        "rope_scaling": rope if c.rope_scaling else None, "sliding_window": None,
        "bos_token_id": start, "eos_token_id": end, "torch_dtype": "bfloat16"}
    texts = {}
    if isinstance(spec, dict):                         # older checkpoints have no texts
        texts = default_hf_texts(tokenizer) | spec.get("texts", {})
        texts["tokenizer.json"] = spec["tokenizer.json"]
    texts["config.json"] = json.dumps(config, indent=2)
    check_weights(tensors.items(), folder)             # bfloat16 ends a little below float32
    with new_folder(folder) as temporary:
        for name, text in texts.items():
            if leaves_folder(name):
                raise UsageError(f"the tokenizer's file {shown(name)} is outside of {folder}")
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})

@contextlib.contextmanager
def new_folder(folder):
    """Yield a temporary folder. What the block writes there becomes `folder`, a new or an empty
    one; where it fails, nothing is left. Raises UsageError."""
    target = pathlib.Path(os.path.realpath(folder))
    there = target.is_dir()
    if os.path.lexists(target) and not (there and not os.listdir(target)):
        raise UsageError(f"cannot write {folder}: it is there and no empty folder; give a new one")
    parents = [p for p in target.parents if not p.exists()]
    temporary = pathlib.Path(target, f".{os.getpid()}.tmp") if there else pathlib.Path(
        f"{target}.{os.getpid()}.tmp")
    moved, done = [], False
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
            for part in moved:
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in parents:
                with contextlib.suppress(OSError):     # by now something else is in it
                    parent.rmdir()
