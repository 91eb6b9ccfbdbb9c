"""Checkpoints: one file of tensors and plain values, written whole or not at all.

`save_checkpoint` writes under a temporary name and renames; `read_checkpoint` verifies checksums
and loads nothing that could run code. A packed layer is its spec and its tensors.
"""
import dataclasses
import os
import zipfile

import torch

from model import LlamaConfig, LLaMA, UsageError
from nanobit.ranks import agree, gather, placed_like, rank
from quantizers import QuantLinear

def check_weights(tensors, path):
    """Raise UsageError for the first of the pairs (name, tensor) that has a NaN or an infinity."""
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        # In parts: a mapped tensor is read without ever being whole in memory.
        if not all(part.isfinite().all() for part in tensor.detach().flatten().split(2**24)):
            raise UsageError(f"{path}: the weight {name} is not finite (it has a NaN or an "
                             "infinity); fetch or train it again")

def tensor_bytes(tensors):
    """Bytes of the storages behind the tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors}.values())

SAVED = []  # the checkpoints that this process wrote, for the message after Ctrl-C

def save_checkpoint(path, model, **content):
    """Write {format, config, linears, model, **content} to a temporary name, then rename it. Raises
    UsageError, and leaves an older file as it is, where a weight is not finite or there is no
    room."""
    linears = {n: m.spec for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    content = {"format": "nanobit-1", "config": dataclasses.asdict(model.config),
               "linears": linears, "model": model.state_dict(), **content}
    content = gather(content)
    if rank():
        return agree()                                 # the file is there when all go on
    check_weights(content["model"].items(), path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        SAVED.append(path)
    except (OSError, RuntimeError) as e:               # torch turns a short write into the latter
        e = e if isinstance(e, OSError) else e.__context__ or e
        raise UsageError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; "
                         "free space or choose another --out") from None
    finally:
        if os.path.exists(temporary):                  # also after Ctrl-C
            os.remove(temporary)
    agree()

def read_checkpoint(path):
    """The content that save_checkpoint wrote. Raises UsageError for anything else."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: " + ("a folder, not a checkpoint" if os.path.isdir(path)
                                        else "no such checkpoint"))
    try:
        with zipfile.ZipFile(path) as z:               # torch.load itself verifies no checksum
            damaged = z.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # a damaged or foreign file may fail in any way: refused in all
        raise UsageError(f"{path} is damaged or not a checkpoint ({type(e).__name__})") from None
    if damaged:
        raise UsageError(f"{path} is damaged: the checksum of {damaged} is wrong")
    fields = {f.name for f in dataclasses.fields(LlamaConfig)}
    if not isinstance(content, dict) or content.get("format") != "nanobit-1" or not (
            {"config", "linears", "model"} <= set(content) and set(content["config"]) <= fields):
        raise UsageError(f"{path} was not written by this version of this project")
    return content

def load_checkpoint(path, device="cpu", dtype=torch.float32, as_stored=False):
    """(model, content) of a checkpoint, dense or packed, or of a Hugging Face folder, whose weights
    may stay `as_stored`, see from_pretrained. Raises UsageError."""
    if os.path.isdir(path):
        from nanobit.hf import read_hf_tokenizer       # it imports this file
        content = {"linears": {}, "method": "dense", "settings": {"smoke": False}, "data": None,
                   "tokenizer": read_hf_tokenizer(path)}
        return LLaMA.from_pretrained(path, dtype, as_stored).to(device).eval(), content
    content = read_checkpoint(path)
    if "tokenizer" not in content:
        raise UsageError(f"{path} is a training state for --resume; use the .pt file beside it")
    with torch.device("meta"):                         # shapes alone: no memory, no random numbers
        model = LLaMA(LlamaConfig(**content["config"]), dtype)
    state = content["model"]
    for name, spec in content["linears"].items():
        model.set_submodule(name, QuantLinear.of(spec, {
            k.rsplit(".", 1)[1]: v for k, v in state.items() if k.startswith(name + ".")}))

    # The file's tensors become the model's own, floats as float32.
    own = model.state_dict()
    check_fit(own, state, path)
    model.load_state_dict({k: t.to(own[k].dtype) for k, t in state.items()}, assign=True)
    if model.config.tied:
        model.head.weight = model.embed.weight
    return model.to(device).eval(), content

def load_weights(model, state, path):
    """Overwrite the weights of a model that may be sharded."""
    own = model.state_dict()
    check_fit(own, state, path)
    model.load_state_dict({name: placed_like(t, own[name]) for name, t in state.items()})

def check_fit(own, state, path):
    """Raise UsageError for the first tensor of a file that does not fit or is not finite."""
    for name in sorted(own.keys() | state.keys()):
        here, there = (tuple(s[name].shape) if name in s else "missing" for s in (own, state))
        if here != there:
            raise UsageError(f"{path} does not fit: {name} is {there} there and {here} here; "
                             "use the --size and the method that wrote it")
    check_weights(state.items(), path)
