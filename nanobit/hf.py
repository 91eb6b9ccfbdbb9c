"""Hugging Face folders in: LLaMA 1 to 3, Mistral, TinyLlama, SmolLM2.

What LLaMA in model.py computes is read, everything else is refused by its name: config.json,
safetensors (one file or shards, mapped and not copied), tokenizer.json. The oracle of the tests is
transformers: equal logits, or a refusal.
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
from nanobit.tokenizer import WORDS_CUT, Tokenizer, spans

HF_PARTS = {  # the parts of a weight's name here and there
    "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
    "head": "lm_head", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}

HF_SIZES = {"vocab_size": "vocab_size", "num_hidden_layers": "n_layer", "hidden_size": "n_embd",
            "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
            "intermediate_size": "n_hidden", "max_position_embeddings": "seq_len",
            "head_dim": "head_dim"}

HF_ONLY = {  # what LLaMA above computes; a setting that is not there means the first value
    "model_type": (None, "llama", "mistral"), "hidden_act": ("silu", "swish"),
    "attention_bias": (False,), "mlp_bias": (False,), "num_local_experts": (1,),
    "quantization_config": (None,)}

HF_ONLY_ROPE = {"rope_type": ("default", "llama3"), "partial_rotary_factor": (1,)}

HF_DEFAULTS = {  # transformers' own, where config.json does not have the name at all
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 2**17, "num_key_value_heads": 8,
                "sliding_window": 4096}}

HF_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

HF_PACKAGES = {  # the oldest version that will do, and why
    "safetensors": "0.4.2",      # reads and so can refuse float8
    "tokenizers": "0.15.1"}      # has encode_special_tokens; before, setting it changes nothing

HF_TEXTS = (  # what a folder says about its tokenizer and generation; an export copies it
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")

def hf_name(name):
    """blocks.3.attn.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    return ".".join(HF_PARTS.get(part, part) for part in name.split("."))

def need_package(name):
    """Import one of the optional packages that Hugging Face folders need. Raises UsageError where
    it is missing or too old."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UsageError("Hugging Face folders need two more packages: "
                         "pip install safetensors tokenizers") from None
    name = name.partition(".")[0]                      # of safetensors.torch
    found, oldest = sys.modules[name].__version__, HF_PACKAGES[name]
    if version_numbers(found) < version_numbers(oldest):
        raise UsageError(f"Hugging Face folders need {name} {oldest} or newer and this is {found}: "
                         "pip install --upgrade safetensors tokenizers")
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

def read_hf_config(folder):
    """config.json -> LlamaConfig. Raises UsageError for what LLaMA above does not compute."""
    def refuse(problem):
        raise UsageError(f"{folder}/config.json: {problem}")

    def check_only(settings, only):
        for name, known in only.items():
            value = settings.get(name, known[0])
            if value not in known:
                choices = " or ".join(map(str, known))
                refuse(f"{name} {shown(value)} is not supported, only {choices}")

    def check_integer(name, limit):
        value = c.get(name)
        if type(value) is not int or not 1 <= value <= limit:              # True is no number here
            problem = "missing" if value is None else shown(value)
            refuse(f"{name} is {problem}, not a positive integer up to {limit}")

    def check_float(name, value):
        if type(value) not in (int, float) or not 0 < value < math.inf:    # nor is NaN
            refuse(f"{name} is {shown(value)}, not a positive number")
        return float(value)

    # A name that is not there takes transformers' default; null mostly means the same.
    c = read_hf_json(folder, "config.json")
    check_only({k: v for k, v in c.items() if v is not None}, HF_ONLY)
    c = HF_DEFAULTS[c.get("model_type") or "llama"] | c
    c = {k: v for k, v in c.items() if v is not None}
    c = {"num_key_value_heads": c.get("num_attention_heads")} | c

    # Sizes. The limits keep products of them within 64 bits; real models are far below.
    for name in HF_SIZES:
        large = name in ("vocab_size", "max_position_embeddings")
        if name != "head_dim" or name in c:
            check_integer(name, 2**31 if large else 2**20)
    width, heads = c["hidden_size"], c["num_attention_heads"]
    if c.get("head_dim", width // heads) % 2:
        refuse(f"heads of {c.get('head_dim', width // heads)} channels: rotary positions turn "
               "pairs, so the number must be even")
    tied = c.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        refuse(f"tie_word_embeddings is {shown(tied)}, neither true nor false")

    # Rotary positions: an older and a newer name for the same settings.
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(c.get(name, {}), dict):
            refuse(f"{name} is {shown(c[name])}, not a list of names with values")
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    rope = {k: v for k, v in rope.items() if v is not None}
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": c.get("rope_theta", 1e4),
            "partial_rotary_factor": c.get("partial_rotary_factor", 1)} | rope
    check_only(rope, HF_ONLY_ROPE)
    for name, value in rope.items():
        if isinstance(value, dict):
            refuse(f"rotary settings of their own for {shown(name)} are not supported")
    llama3 = LLAMA3_ROPE if rope["rope_type"] == "llama3" else ()
    length = c.get("original_max_position_embeddings")
    if length is not None:                             # as in transformers, it stands above rope's
        rope["original_max_position_embeddings"] = length
    rope.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    if not set(llama3) <= set(rope):
        refuse(f"llama3's rope needs {', '.join(llama3)}")
    scaling = tuple(check_float(name, rope[name]) for name in llama3)
    if scaling and scaling[1] >= scaling[2]:
        refuse("llama3's rope needs a low_freq_factor below its high_freq_factor")

    # A sliding window changes nothing in sequences that fit into it: no longer ones, then.
    longest = c["max_position_embeddings"]
    if c.get("model_type") == "mistral" and "sliding_window" in c:
        check_integer("sliding_window", 2**31)
        longest = min(longest, c["sliding_window"])
    sizes = {ours: c[name] for name, ours in HF_SIZES.items() if name in c}
    return LlamaConfig(**sizes | {"seq_len": longest}, tied=tied, rope_scaling=scaling,
                       rope_theta=check_float("rope_theta", rope["rope_theta"]),
                       norm_eps=check_float("rms_norm_eps", c.get("rms_norm_eps", 1e-6)))

def open_hf_files(folder, config):
    """{a tensor's name there: a function that reads it}, of one file or else of an index's shards.
    The files are mapped into memory: a tensor takes none until it is used or copied."""
    safetensors, stored = need_package("safetensors"), {}
    single, index = "model.safetensors", "model.safetensors.index.json"
    names = [single]
    if not os.path.exists(os.path.join(folder, single)) and os.path.exists(
            os.path.join(folder, index)):
        shards = read_hf_json(folder, index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise UsageError(f"{folder}/{index} is damaged: its weight_map does not name files")
        names = sorted(set(shards.values()))

    for name in names:
        if leaves_folder(name):
            raise UsageError(f"{folder}/{index} names {shown(name)}, outside of the folder")
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

    # Before the model is built, which would take hours if a wrong config.json asked for 10^9.
    if config.n_layer > len(stored):
        raise UsageError(f"{folder}: num_hidden_layers is {config.n_layer}, and there are only "
                         f"{len(stored)} tensors")
    return stored

def hf_head_is_tied(folder, stored):
    """Is the head the embedding, as config.json says? Where both are stored with other values it is
    not, as in transformers. If it is, `stored` then has the matrix as the embedding alone."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if head not in stored:
        return True
    if embed not in stored:
        stored[embed] = stored.pop(head)
        return True
    a, b = stored[embed](), stored[head]()
    same = a.shape == b.shape and a.dim() == 2 and all(    # in parts: few float32 copies at a time
        torch.equal(x.float(), y.float()) for x, y in zip(a.split(4096), b.split(4096)))
    if same:
        del stored[head]
    else:
        say(f"note: {folder}: tie_word_embeddings is true, but lm_head.weight differs from the "
            "embedding; both are kept, as transformers does")
    return same

def read_hf_tensors(folder, model, stored):
    """Yield (name here, tensor) for every weight of the model, all of them finite. stored: see
    open_hf_files."""
    own = model.state_dict()
    names = {hf_name(n): n for n in own}
    if model.config.tied:
        del names["lm_head.weight"]
    for name in sorted(names.keys() ^ stored.keys()):
        raise UsageError(f"{folder}: " + (f"no file has the tensor {name}" if name in names else
                                          f"the tensor {shown(name)} belongs to no LLaMA"))
    for name, here in names.items():
        tensor, shape = stored[name](), tuple(own[here].shape)
        if tuple(tensor.shape) != shape or tensor.dtype not in HF_DTYPES:
            raise UsageError(f"{folder}: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                             f"config.json asks for {shape} of float32, float16 or bfloat16")
        check_weights([(name, tensor)], folder)
        yield here, tensor
        if here == "embed.weight" and model.config.tied:
            yield "head.weight", tensor

def read_folder(folder, dtype=torch.float32, as_stored=False):
    """The LLaMA of a folder, see LLaMA.from_pretrained."""
    config = read_hf_config(folder)
    stored = open_hf_files(folder, config)
    if config.tied:
        config.tied = hf_head_is_tied(folder, stored)
    with torch.device("meta"):                         # shapes alone: no memory
        model = LLaMA(config, dtype)
    state = {name: tensor if as_stored else tensor.to(torch.float32, copy=True)
             for name, tensor in read_hf_tensors(folder, model, stored)}
    model.load_state_dict(state, assign=True)
    if model.config.tied:
        model.head.weight = model.embed.weight
    return model

def read_hf_tokenizer(folder):
    """The spec of a folder's tokenizer, plain values: tokenizer.json's text, the special ids (`end`
    stands after a document, `ends` are all that end one), and the texts that an export copies."""
    path = pathlib.Path(folder, "tokenizer.json")
    texts = {}
    for pattern in HF_TEXTS:
        for file in sorted(pathlib.Path(folder).glob(pattern)):
            texts[file.relative_to(folder).as_posix()] = read_hf_text(file)
    spec = {"tokenizer.json": read_hf_text(path), "end": 0, "start": 0,
            "n_vocab": read_hf_config(folder).vocab_size}
    tokenizer = HFTokenizer(spec, path)
    highest = max(tokenizer.ids_of_text(), default=0)
    if highest >= spec["n_vocab"]:
        raise UsageError(f"{folder}: the tokenizer has an id {highest}, but config.json's "
                         f"vocab_size is {spec['n_vocab']}")

    ends = read_special_ids(folder, texts, tokenizer, "eos")
    if not ends:
        raise UsageError(f"{folder}/config.json has no eos_token_id, which stands after a document")
    starts = read_special_ids(folder, texts, tokenizer, "bos") or ends
    spec |= {"end": ends[0], "start": starts[0], "ends": ends}
    return spec | {"texts": default_hf_texts(HFTokenizer(spec, path)) | texts}

def read_special_ids(folder, texts, tokenizer, kind):
    """The ids of a folder's "eos" or "bos" tokens, from the first of its files that names one."""
    for name in ("config.json", "generation_config.json"):
        if name != "config.json" and name not in texts:
            continue
        ids = read_hf_json(folder, name).get(f"{kind}_token_id")
        if ids is None or ids == []:
            continue
        if not isinstance(ids, list) or kind == "bos":                     # Llama 3 has many ends
            ids = [ids]
        if not all(type(i) is int and 0 <= i < tokenizer.n_vocab for i in ids):
            raise UsageError(f"{folder}/{name}: {kind}_token_id {shown(ids)} is no token below the "
                             f"vocab_size {tokenizer.n_vocab}")
        return ids
    if "tokenizer_config.json" not in texts:
        return []
    token = read_hf_json(folder, "tokenizer_config.json").get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.ids.get(token, math.inf) if isinstance(token, str) else math.inf
    return [found] if found < tokenizer.n_vocab else []

def default_hf_texts(tokenizer):
    """What transformers has to know of a tokenizer, where its folder does not say it."""
    names = {i: token for token, i in tokenizer.ids.items()}
    start, ends = tokenizer.start_token, tokenizer.ends
    return {
        "generation_config.json": json.dumps({"bos_token_id": start, "eos_token_id": ends}),
        "tokenizer_config.json": json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(start),
            "eos_token": names.get(ends[0])})}

def read_hf_text(path):
    """A file's text, which is an object of settings where its name says JSON."""
    if path.suffix == ".json":
        read_hf_json(path.parent, path.name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None

class HFTokenizer(Tokenizer):
    """A Hugging Face folder's tokenizer."""

    def __init__(self, spec, source="the checkpoint's tokenizer"):
        library = need_package("tokenizers")
        try:
            self.inner = library.Tokenizer.from_str(spec["tokenizer.json"])
        except Exception as e:                         # the library raises nothing narrower
            raise UsageError(f"{source} is damaged, or newer than the package tokenizers "
                             f"{library.__version__}: {first_line(e)}") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True        # "<s>" in a text is three characters
        self.ids, self.n_vocab = self.inner.get_vocab(with_added_tokens=True), spec["n_vocab"]
        self.eot_token, self.start_token = spec["end"], spec["start"]
        self.skip = self.find_skip()
        self.ends = spec.get("ends", [spec["end"]])    # older checkpoints know one

    def ids_of_text(self):
        """The ids that a text can have: not those of special tokens, which stay text."""
        added = self.inner.get_added_tokens_decoder()
        return set(self.ids.values()) - {i for i, token in added.items() if token.special}

    def find_skip(self):
        """How many spaces a cut between two words must leave out so that the tokens of the two
        pieces are those of the whole: none where a piece is encoded as it is, one where the
        tokenizer puts a space before each. None: no such cut keeps the tokens."""
        whole, first, *seconds = self.encode_ordinary_batch(["some words", "some", " words",
                                                             "words"])
        for skip, second in enumerate(seconds):
            if first + second == whole:
                return skip

    def spans(self, text):
        if self.skip is None:                          # then a document takes what memory it takes
            return [(0, len(text))] if text else []
        return spans(text, WORDS_CUT, force=False, skip=self.skip)

    def encode_ordinary_batch(self, pieces):
        return [e.ids for e in self.inner.encode_batch(pieces, add_special_tokens=False)]

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()
