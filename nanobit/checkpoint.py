"""Checkpoints: one file of tensors and plain values, written whole or not at all.

  1. `save_checkpoint` writes under a temporary name, then renames.
  2. `read_checkpoint` verifies checksums, and loads nothing that could run code.
  3. `load_checkpoint` makes the model again. A packed layer is its spec and its tensors.
`load_weights` is for a model that is there already: a resumed run's. `pack_embedding` makes
embedding and head small before a file is written, `float_embedding` makes them floats again.
"""
import dataclasses
import os
import zipfile

import torch
import torch.nn as nn

from model import Linear, LlamaConfig, LLaMA, UsageError
from nanobit.ranks import agree, gather, placed_like, rank, whole
from quantizers import PackedEmbedding, PackedHead, QuantLinear

SAVED = []  # the checkpoints that this process wrote, for the message after Ctrl-C

def save_checkpoint(path, model, **content):
    """Write {format, config, linears, model, **content} to a temporary name, then rename it. A
    result adds method, settings, tokenizer, data and command; a training state adds settings, data,
    losses, optimizer and seconds, and is told apart by having no tokenizer. Where embedding and
    head are packed, "head" is their spec. Raises UsageError, and leaves an older file as it is,
    where a weight is not finite or there is no room."""
    linears = packed_specs(model)
    head = linears.pop("head", None)                   # not one of the blocks' linears
    content = {"format": "nanobit-1", "config": dataclasses.asdict(model.config),
               "linears": linears, "model": model.state_dict(), **content}
    if head:
        content["head"] = head

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

def packed_specs(model):
    """{name: spec} of the packed linears, a packed head among them."""
    return {n: m.spec for n, m in model.named_modules() if isinstance(m, QuantLinear)}

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

def settings_of(path):
    """The settings in a checkpoint, without reading its tensors; {} for anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content.get("settings", {}) if is_ours(content) else {}
    except Exception:           # read_checkpoint says later what is wrong
        return {}

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

    # Packed layers take the places of its linears.
    state = dict(content["model"])
    for name, spec in content["linears"].items():
        linear = QuantLinear.of(spec, parts(state, name))
        state.pop(f"{name}.zero_point", None)          # an older file's: the layer has packed it
        state |= {f"{name}.{part}": t for part, t in linear.state_dict().items()}
        model.set_submodule(name, linear)

    # So do embedding and head. Both are stored in the same way: one spec serves both.
    if "head" in content:
        model.head = PackedHead(content["head"], parts(state, "head"))
        matrix = PackedHead(content["head"], parts(state, "embed"))
        model.embed = PackedEmbedding(matrix)

    # The file's tensors become the model's own, floats as float32.
    own = model.state_dict()
    check_fit(own, state, path)
    model.load_state_dict({k: t.to(own[k].dtype) for k, t in state.items()}, assign=True)
    model.to(device)
    if model.config.tied:                              # assigning and moving have untied them
        tie(model)
    return model.eval(), content

def parts(state, name):
    """The tensors of the module with that name, by their names inside of it."""
    prefix = name + "."
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}

def tie(model):
    """Let the head have the embedding's tensors."""
    shared = ("packed", "scale") if isinstance(model.head, PackedHead) else ("weight",)
    for name in shared:
        setattr(model.head, name, getattr(model.embed, name))

def load_folder(path, device, dtype, as_stored):
    """load_checkpoint for a Hugging Face folder: the content says what a checkpoint's would."""
    from nanobit.hf_tokenizer import read_hf_tokenizer     # it imports this file
    tokenizer = read_hf_tokenizer(path)
    model = LLaMA.from_pretrained(path, dtype, as_stored)
    linears = packed_specs(model)
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

# ---- Embedding and head -------------------------------------------------------------------------
# They are half of a small model's weights or more, and nothing trains them on a grid. In 8 bits
# they cost next to no loss.

def pack_embedding(model, bits):
    """Put packed matrices of 8 or 4 bits in the places of embedding and head, one where they are
    tied -> the two weights (V, C) that were there. All ranks must call."""
    # With --fsdp, state_dict has their shares even where they are whole after a forward pass: what
    # is whole then is only lent.
    state = model.state_dict()
    weights = (whole(state["embed.weight"]), whole(state["head.weight"]))
    head = PackedHead.from_weight(weights[1], bits)
    matrix = head if model.config.tied else PackedHead.from_weight(weights[0], bits)
    model.embed = PackedEmbedding(matrix)
    model.head = head
    return weights

def float_embedding(model, embed, head):
    """Make embedding and head floats again, with the weights (V, C)."""
    V, C = embed.shape
    with torch.device("meta"):                         # shapes alone
        model.embed = nn.Embedding(V, C)
        model.head = Linear(C, V)
    model.embed.weight = nn.Parameter(embed, requires_grad=False)
    model.head.weight = nn.Parameter(head, requires_grad=False)
    if model.config.tied:
        tie(model)

def packed_embedding_weights(model):
    """How many weights of embedding and head are packed; those of tied ones count once."""
    if not isinstance(getattr(model, "head", None), PackedHead):
        return 0
    c = model.config
    return c.vocab_size * c.n_embd * (1 if c.tied else 2)

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
