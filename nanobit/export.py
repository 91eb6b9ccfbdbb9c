"""Models out, for other tools: Hugging Face folders and GGUF files, whole or not at all.

`choose_format` says in which of FORMATS the linears go: as the packed codes that they are, or all
weights spelled out in bfloat16. `write_hf` gathers tensors, config, tokenizer files and a model
card, all of which it checks before it writes; `write_gguf` has to_gguf.py write llama.cpp's file.
`new_folder` and `new_file` make what is written appear whole or not at all.
"""
import contextlib
import json
import os
import pathlib
import shutil
import sys
from typing import Callable, NamedTuple

import torch

from model import UsageError
from nanobit import aqlm_format, compressed, to_gguf
from nanobit.card import facts, model_card
from nanobit.checkpoint import check_weights
from nanobit.hf import (HF_SIZES, LLAMA3_ROPE, first_line, hf_name, leaves_folder, need_package,
                        shown)
from nanobit.hf_tokenizer import hf_texts
from nanobit.tokenizer import make_tokenizer
from quantizers import PackedVQ, bits_per_weight

class Weights(NamedTuple):
    """What a folder holds of a model, as the conversions of FORMATS return it."""
    tensors: dict                # {the name there: the tensor}
    settings: dict               # what config.json says about them
    text: str                    # what people are told about them
    packages: tuple = ()         # that load it, beside transformers
    before: tuple = ()           # lines of Python that loading it takes ahead of the usual ones
    after: tuple = ()            # the same behind them; {name!r} in these is the folder
    notes: tuple = ()            # what to know about them, a line each
    file: str = ""               # the GGUF file that has them; else they are tensors in safetensors

@torch.no_grad()
def write_hf(folder, model, content, convert):
    """The model as a new Hugging Face folder, or nothing -> its Weights.

    content: what load_checkpoint returned beside the model, and as "row" what its run measured.
    convert: model -> Weights, of one of FORMATS. It may take the model apart.
    """
    # The tokenizer's files, where it has any.
    save_file = need_package("safetensors.torch").save_file
    tokenizer = make_tokenizer(content["tokenizer"])
    texts = hf_texts(content["tokenizer"])

    # The weights. What the card says of them comes first: they may not outlive the conversion.
    known = facts(model, content)
    weights = convert(model)

    # The texts about them: the settings of the model and of its linears, and the card.
    config = hf_config(model.config, tokenizer) | weights.settings
    texts["config.json"] = json.dumps(config, indent=2)
    texts["README.md"] = model_card(folder, known, weights, "tokenizer.json" in texts)

    # A weight above bfloat16's largest number is infinite by now.
    check_weights(weights.tensors.items(), folder)

    # All is there: write it.
    with new_folder(folder) as temporary:
        for name, text in texts.items():
            if leaves_folder(name):
                raise UsageError(f"the checkpoint is damaged: its tokenizer has a file "
                                 f"{shown(name)}, outside of {folder}")
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        save_file(weights.tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    return weights

@torch.no_grad()
def write_gguf(target, model, content, convert):
    """The model as GGUF -> its Weights: a new file where target ends in .gguf, or else model.gguf
    in a new folder with a card. convert: to_gguf.write; the others are those of write_hf."""
    name = os.path.basename(os.path.abspath(target)).removesuffix(".gguf")
    if str(target).endswith(".gguf"):
        with new_file(target) as path:
            text, notes = convert(path, name, model, content)
            return Weights({}, {}, text, notes=tuple(notes))

    with new_folder(target) as folder:
        text, notes = convert(folder / "model.gguf", name, model, content)
        weights = Weights({}, {}, text, packages=("gguf>=0.19", "accelerate"),
                          notes=tuple(notes), file="model.gguf")
        card = model_card(target, facts(model, content), weights, has_tokenizer=False)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return weights

# ---- Formats ------------------------------------------------------------------------------------

def dense_weights(model):
    """All weights in bfloat16. A packed linear gets the weight that it stands for; a head that is
    the embedding is left out. The model is taken apart."""
    tensors = {}
    for name, tensor in compressed.take_apart(model, lambda m: {"weight": m.weight()}):
        tensors[hf_name(name)] = tensor.bfloat16().contiguous()
    return Weights(tensors, {"torch_dtype": "bfloat16"}, "all weights in bfloat16")

def compressed_weights(model):
    """The packed linears' own codes, see nanobit/compressed.py. The model is taken apart."""
    grid = compressed.Grid.of(model.blocks[0].attn.wq)               # all linears have this one
    inputs = {hf_name(name): linear.in_features for name, linear in model.linears()}
    config = compressed.quantization_config(grid)

    # In words.
    zeros = "symmetric" if grid.symmetric else "with zero points"
    groups = "rows" if grid.group_size == -1 else f"groups of {grid.group_size}"
    text = f"linears in {grid.bits} bits, {zeros}, {groups}"

    # QuEST's linears read rotated inputs, which takes settings, and lines of Python, of their own.
    after = ()
    notes = ()
    if grid.rotated:
        config["transform_config"] = compressed.transform_config(inputs)
        text += ", of rotated inputs"
        after = ROTATE
        notes = ("the linears read rotated inputs, which transformers leaves out without a word: "
                 "after from_pretrained call compressed_tensors' apply_transform_config, as the "
                 "folder's README.md shows (vLLM does so itself, by its documentation)",)
    weights = packed_weights(model, compressed.compressed_linear, config, text)
    return weights._replace(packages=("compressed-tensors>=0.18",), after=after, notes=notes)

# The config is read a second time, as the loaded model's own does not keep these settings.
ROTATE = (
    "", "# Without these lines the linears read inputs that are not rotated: nonsense.",
    "from transformers import AutoConfig",
    "from compressed_tensors.transform import TransformConfig, apply_transform_config",
    "config = AutoConfig.from_pretrained({name!r}).quantization_config",
    'rotations = TransformConfig.model_validate(config["transform_config"])',
    "apply_transform_config(model, rotations)")

def aqlm_weights(model):
    """Codebooks and their codes, see nanobit/aqlm_format.py. The model is taken apart."""
    grid = aqlm_format.Grid.of(model.blocks[0].attn.wq)              # all linears have this one
    M, bits, g = grid
    text = f"linears in {M} codebooks of {bits} bits for {g} weights"
    stored = 8 * aqlm_format.codes_dtype(bits).itemsize
    if stored > bits:
        text += f", a code in {stored} bits"
    config = aqlm_format.quantization_config(grid)
    weights = packed_weights(model, aqlm_format.linear_parts, config, text)
    before = ONE_THREAD if bits == 8 else ()
    return weights._replace(packages=("aqlm[cpu]",), before=before)

ONE_THREAD = (
    "import numba", "numba.set_num_threads(1)  # on a CPU aqlm 1.1.7 loses sums with more", "")

def packed_weights(model, parts_of, config, text):
    """The Weights of a model whose linears are all packed, which is taken apart.

    parts_of: a packed linear -> {a part's name: its tensor}. config: what config.json says about
    the linears. text: what people are told about them, before their size.
    """
    # What only the whole model can tell: its linears' weights, and the names of the rest.
    _, count = bits_per_weight(model)
    floats = {hf_name(name) for name, _ in model.named_parameters()}

    tensors = {}
    for name, tensor in compressed.take_apart(model, parts_of):
        tensors[hf_name(name)] = tensor
    dtype = str(compressed.narrow(tensors)).removeprefix("torch.")

    # All that the linears have is counted: what is no embedding, head or norm.
    stored = 8 * sum(t.nbytes for name, t in tensors.items() if name not in floats)
    text += f", {stored / count:.3f} bits per weight; the rest in {dtype}"
    return Weights(tensors, {"torch_dtype": dtype, "quantization_config": config}, text)

class Format(NamedTuple):
    """One way to write the linears."""
    convert: Callable            # what `write` calls: model -> Weights, or to_gguf.write
    obstacle: Callable           # model -> what it cannot hold of it, in words, or None
    holds: str                   # what it can hold, in words
    write: Callable = write_hf   # (where, model, content, convert) -> Weights
    packs_embedding: bool = False          # embedding and head may be packed, too

FORMATS = {
    "compressed": Format(compressed_weights, compressed.obstacle,
                         "affine codes of 1 to 8 bits (of normtweak.py, lrqat.py, pvtune.py "
                         "--scheme affine) and QuEST's of 1 to 7, with float activations"),
    "aqlm": Format(aqlm_weights, aqlm_format.obstacle, "codebooks (of pvtune.py)"),
    "gguf": Format(to_gguf.write, to_gguf.obstacle,
                   "integers of up to 8 bits in rows or groups of a multiple of 32 inputs, with "
                   "float activations", write_gguf, packs_embedding=True),
    "dense": Format(dense_weights, lambda model: None, "every model"),
}

def choose_format(model, wanted, path):
    """(the name of a Format, why the folder cannot have the model's own codes, or None). wanted: a
    name, or None for the one that fits. Raises UsageError where the wanted one cannot hold the
    model of the path."""
    # The folder that has the codes as they are, or if there is an obstacle the one for every model.
    kinds = {type(linear) for _, linear in model.linears()}
    usual = "aqlm" if PackedVQ in kinds else "compressed"
    problem = FORMATS[usual].obstacle(model)
    fits = "dense" if problem else usual
    if wanted is None:
        return fits, problem

    obstacle = FORMATS[wanted].obstacle(model)
    if obstacle:
        raise UsageError(f"--format {wanted} cannot hold {path}: {obstacle}; it holds "
                         f"{FORMATS[wanted].holds}; give --format {fits}")
    return wanted, problem

# ---- config.json --------------------------------------------------------------------------------

def hf_config(c, tokenizer):
    """config.json's settings for a LlamaConfig."""
    # In a folder of the kind "llama" the number of heads divides the width. A "mistral", which
    # computes the same, may have heads of another size.
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
    parents = [p for p in target.parents if not p.exists()]    # made below, removed if it fails

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
    """new_folder for a file: what the block writes to the temporary path becomes `path`, which is
    new; where it fails, nothing is left. Raises UsageError."""
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
    """The exceptions that say that a disk is full or cannot be written. safetensors raises its own;
    where nothing has imported that package, as for a GGUF file, it cannot have raised any."""
    library = sys.modules.get("safetensors")
    return (OSError, library.SafetensorError) if library else (OSError,)

def cannot_write(path, e):
    """The UsageError for one of write_errors()."""
    reason = getattr(e, "strerror", None) or first_line(e)
    return UsageError(f"cannot write {path}: {reason}; give a new place where there is space")

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
