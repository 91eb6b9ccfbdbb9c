"""Checkpoints: one file of tensors and plain values, written whole or not at all.

  1. `save_checkpoint` writes under a temporary name, then renames.
  2. `read_checkpoint` verifies checksums, and loads nothing that could run code.
  3. `load_checkpoint` makes the model again. A packed layer is its spec and its tensors.
`load_weights` is for a model that is there already: a resumed run's.
"""
import dataclasses
import os
import zipfile

import torch

from model import LlamaConfig, LLaMA, UsageError
from nanobit.ranks import agree, gather, placed_like, rank
from quantizers import QuantLinear

SAVED = []  # the checkpoints that this process wrote, for the message after Ctrl-C

def save_checkpoint(path, model, **content):
    """Write {format, config, linears, model, **content} to a temporary name, then rename it. A
    result adds method, settings, tokenizer, data and command; a training state adds settings, data,
    losses, optimizer and seconds, and is told apart by having no tokenizer. Raises UsageError, and
    leaves an older file as it is, where a weight is not finite or there is no room."""
    linears = {n: m.spec for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    content = {"format": "nanobit-1", "config": dataclasses.asdict(model.config),
               "linears": linears, "model": model.state_dict(), **content}

    # All ranks bring their shares of the weights, and rank 0 writes. The others go on when it has;
    # if it fails, torchrun ends them as they wait.
    content = gather(content)
    if rank():
        agree()
        return
    check_weights(content["model"].items(), path)
    write_whole(path, content)
    SAVED.append(path)
    agree()

def write_whole(path, content):
    """torch.save, so that whenever the process ends the path holds the old file or the new one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())                       # on the disk before it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        # torch turns a short write into a RuntimeError; what the system said is its context.
        if not isinstance(e, OSError):
            e = e.__context__ or e
        raise UsageError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; "
                         "free space or choose another --out") from None
    finally:
        if os.path.exists(temporary):                  # also after Ctrl-C
            os.remove(temporary)

def read_checkpoint(path):
    """The content that save_checkpoint wrote. Raises UsageError for anything else."""
    if os.path.isdir(path):
        raise UsageError(f"{path}: a folder, not a checkpoint")
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such checkpoint")

    # The file is a zip archive with checksums, which torch.load itself does not verify.
    try:
        with zipfile.ZipFile(path) as z:
            damaged = z.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # a damaged or foreign file may fail in any way: refused in all
        raise UsageError(f"{path} is damaged or not a checkpoint ({type(e).__name__})") from None
    if damaged:
        raise UsageError(f"{path} is damaged: the checksum of {damaged} is wrong")
    if not is_ours(content):
        raise UsageError(f"{path} was not written by this version of this project")
    return content

def is_ours(content):
    """Has a file's content what save_checkpoint writes, and no config field that we do not know?"""
    if not isinstance(content, dict) or content.get("format") != "nanobit-1":
        return False
    if not {"config", "linears", "model"} <= set(content):
        return False
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    return set(content["config"]) <= fields

def load_checkpoint(path, device="cpu", dtype=torch.float32, as_stored=False):
    """(model, content) of a checkpoint, dense or packed, or of a Hugging Face folder, whose weights
    may stay `as_stored`, see LLaMA.from_pretrained. Raises UsageError."""
    if os.path.isdir(path):
        return load_folder(path, device, dtype, as_stored)
    content = read_checkpoint(path)
    if "tokenizer" not in content:
        raise UsageError(f"{path} is a training state for --resume; use the .pt file beside it")

    # A model of shapes alone, which takes no memory and no random numbers.
    with torch.device("meta"):
        model = LLaMA(LlamaConfig(**content["config"]), dtype)

    # Packed layers take the places of its linears. An older file's tensors are not all what such a
    # layer makes of them, so the layer's own take their places too.
    state = dict(content["model"])
    for name, spec in content["linears"].items():
        prefix = name + "."
        names = [k for k in state if k.startswith(prefix)]
        linear = QuantLinear.of(spec, {k.removeprefix(prefix): state.pop(k) for k in names})
        state |= {prefix + k: t for k, t in linear.state_dict().items()}
        model.set_submodule(name, linear)

    # The file's tensors become the model's own, floats as float32.
    own = model.state_dict()
    check_fit(own, state, path)
    model.load_state_dict({k: t.to(own[k].dtype) for k, t in state.items()}, assign=True)
    if model.config.tied:                              # assigning has untied them
        model.head.weight = model.embed.weight
    return model.to(device).eval(), content

def load_folder(path, device, dtype, as_stored):
    """load_checkpoint for a Hugging Face folder: the content says what a checkpoint's would."""
    from nanobit.hf_tokenizer import read_hf_tokenizer     # it imports this file
    tokenizer = read_hf_tokenizer(path)
    model = LLaMA.from_pretrained(path, dtype, as_stored)
    linears = {n: m.spec for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    kinds = {spec["kind"] for spec in linears.values()}
    method = ("aqlm" if "vq" in kinds else "compressed-tensors") if kinds else "dense"
    content = {"linears": linears, "method": method,
               "settings": {"smoke": False}, "data": None, "tokenizer": tokenizer}
    return model.to(device).eval(), content

def load_weights(model, state, path):
    """Overwrite the weights of a model that may be sharded."""
    own = model.state_dict()
    check_fit(own, state, path)
    model.load_state_dict({name: placed_like(t, own[name]) for name, t in state.items()})

# ---- Checks -------------------------------------------------------------------------------------

def check_fit(own, state, path):
    """Raise UsageError for the first tensor of a file that does not fit or is not finite."""
    for name in sorted(own.keys() | state.keys()):
        here = tuple(own[name].shape) if name in own else "missing"
        there = tuple(state[name].shape) if name in state else "missing"
        if here != there:
            raise UsageError(f"{path} does not fit: {name} is {there} there and {here} here; "
                             "use the --size and the method that wrote it")
    check_weights(state.items(), path)

def check_weights(tensors, path):
    """Raise UsageError for the first of the pairs (name, tensor) that has a NaN or an infinity."""
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        # In parts: a mapped tensor is read without ever being whole in memory.
        parts = tensor.detach().flatten().split(2**24)
        if not all(part.isfinite().all() for part in parts):
            raise UsageError(f"{path}: the weight {name} is not finite (it has a NaN or an "
                             "infinity); fetch or train it again")

def tensor_bytes(tensors):
    """Bytes of the storages behind the tensors, each once."""
    storages = [t.untyped_storage() for t in tensors]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values())
