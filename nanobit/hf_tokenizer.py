"""A Hugging Face folder's tokenizer: tokenizer.json, and which of its tokens begin and end texts.

`read_hf_tokenizer` reads a folder into a spec, plain values that a checkpoint keeps, and
`HFTokenizer` is what nanobit.tokenizer.make_tokenizer makes of the spec. The ids of the special
tokens stand in other files of the folder, here in one and there in another: `read_special_ids`.
The way out is `hf_texts`, which also says our own byte-pair encoding as a tokenizer.json.
"""
import json
import math
import pathlib

from model import UsageError
from nanobit.hf import first_line, need_package, read_hf_config, read_hf_json, shown
from nanobit.tokenizer import END, PATTERN, WORDS_CUT, Tokenizer, spans

HF_TEXTS = (  # what a folder says about its tokenizer and generation; an export copies it
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")

def read_hf_tokenizer(folder):
    """The spec of a folder's tokenizer, plain values: tokenizer.json's text, the special ids (`end`
    stands after a document, `ends` are all that end one), and the texts that an export copies."""
    # Our own, of an exported checkpoint, is what it was in the checkpoint.
    path = pathlib.Path(folder, "tokenizer.json")
    own = own_tokens(read_hf_text(path))
    if own is not None and len(own) + 1 == read_hf_config(folder).vocab_size:
        return own

    # The files. A missing tokenizer.json is reported by its name.
    texts = {}
    for pattern in HF_TEXTS:
        for file in sorted(pathlib.Path(folder).glob(pattern)):
            texts[file.relative_to(folder).as_posix()] = read_hf_text(file)

    # 0 holds the place of the special ids, which only the tokenizer can check.
    spec = {"tokenizer.json": read_hf_text(path), "end": 0, "start": 0,
            "n_vocab": read_hf_config(folder).vocab_size}

    # The model has to have an embedding for each id that a text can have.
    tokenizer = HFTokenizer(spec, path)
    highest = max(tokenizer.ids_of_text(), default=0)
    if highest >= spec["n_vocab"]:
        raise UsageError(f"{folder}: the tokenizer has an id {highest}, but config.json's "
                         f"vocab_size is {spec['n_vocab']}")

    # The special ids. Files that the folder lacks get defaults, for an export to write.
    ends = read_special_ids(folder, texts, tokenizer, "eos")
    if not ends:
        raise UsageError(f"{folder}/config.json has no eos_token_id, which stands after a document")
    starts = read_special_ids(folder, texts, tokenizer, "bos") or ends
    spec |= {"end": ends[0], "start": starts[0], "ends": ends}
    spec["texts"] = default_hf_texts(HFTokenizer(spec, path)) | texts
    return spec

def read_special_ids(folder, texts, tokenizer, kind):
    """The ids of a folder's "eos" or "bos" tokens, from the first of its files that names one."""
    # config.json is there; the others may be.
    for name in ("config.json", "generation_config.json"):
        if name != "config.json" and name not in texts:
            continue
        ids = read_hf_json(folder, name).get(f"{kind}_token_id")
        if ids is None or ids == []:
            continue

        # Only eos may be a list, as Llama 3's is. One as bos is wrapped here, and so refused below.
        if not isinstance(ids, list) or kind == "bos":
            ids = [ids]
        if not all(type(i) is int and 0 <= i < tokenizer.n_vocab for i in ids):
            raise UsageError(f"{folder}/{name}: {kind}_token_id {shown(ids)} is no token below the "
                             f"vocab_size {tokenizer.n_vocab}")
        return ids

    # The tokenizer's own settings give the token's text, by itself or in a dict.
    if "tokenizer_config.json" not in texts:
        return []
    token = read_hf_json(folder, "tokenizer_config.json").get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return []
    found = tokenizer.ids.get(token, math.inf)
    return [found] if found < tokenizer.n_vocab else []

def default_hf_texts(tokenizer):
    """What transformers has to know of a tokenizer, where its folder does not say it."""
    names = {i: token for token, i in tokenizer.ids.items()}
    generation = {"bos_token_id": tokenizer.start_token, "eos_token_id": tokenizer.ends}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": names.get(tokenizer.start_token),
                "eos_token": names.get(tokenizer.ends[0])}
    return {"generation_config.json": json.dumps(generation),
            "tokenizer_config.json": json.dumps(settings)}

def read_hf_text(path):
    """A file's text, which is an object of settings where its name says JSON."""
    if path.suffix == ".json":
        read_hf_json(path.parent, path.name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None

# ---- The way out --------------------------------------------------------------------------------

def hf_texts(spec):
    """{name: text} of the files that say a spec's tokenizer to transformers; {} for tiktoken's own
    encodings, whose patterns the package tokenizers reads otherwise."""
    if isinstance(spec, str):
        return {}
    if isinstance(spec, list):
        end = len(spec)
        spec = {"tokenizer.json": own_tokenizer_json(spec), "end": end, "start": end,
                "n_vocab": end + 1}
    texts = default_hf_texts(HFTokenizer(spec)) | spec.get("texts", {})    # older specs have none
    return texts | {"tokenizer.json": spec["tokenizer.json"]}

# PATTERN as the package reads it. Its \w lacks the two characters that join others.
OWN_PATTERN = PATTERN.replace(r"[^\W\d_]", r"(?:[^\W\d_]|[\u200c\u200d])")
OWN_PATTERN = OWN_PATTERN.replace(r"[^\w\s]", r"[^\w\s\u200c\u200d]")

def own_tokenizer_json(tokens):
    """A tokenizer.json that gives the ids of our own encoding. tokens: latin-1 strings in order of
    rank, as a checkpoint keeps what `train_bpe` found, the 256 bytes first."""
    words = {"type": "Split", "pattern": {"Regex": OWN_PATTERN}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}

    # tiktoken merges the two neighbours that make the token of the lowest rank; the package has a
    # list of pairs. It is always the same pair that makes a token: before it, only that token's own
    # bytes were merged, as they are by themselves.
    ranks = {token.encode("latin-1"): i for i, token in enumerate(tokens)}
    letters = byte_letters()
    shown_as = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in list(ranks)[256:]:
        left, right = last_pair(token, ranks)
        merges.append(f"{shown_as[left]} {shown_as[right]}")

    end = {"id": len(tokens), "content": END, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
        "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False,
                  "vocab": {shown_as[token]: i for token, i in ranks.items()},
                  "merges": merges}})

def byte_letters():
    """The printable character that stands for each of the 256 bytes in a tokenizer.json: itself,
    where it is one of latin-1's, else one from 256 on."""
    letters = []
    spare = 256
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b:
            letters.append(chr(b))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters

def last_pair(token, ranks):
    """The two parts that the last merge of a token's bytes puts together."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        made = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = made.index(min(made))                      # the first of the lowest rank
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts

def own_tokens(text):
    """The tokens of which own_tokenizer_json makes just this text; None where there are none."""
    values = {letter: chr(b) for b, letter in enumerate(byte_letters())}
    try:
        content = json.loads(text)
        if content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] != OWN_PATTERN:
            return None
        tokens = ["".join(values[letter] for letter in token) for token in content["model"]["vocab"]]
        return tokens if own_tokenizer_json(tokens) == text else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None                                    # another project's

class HFTokenizer(Tokenizer):
    """A Hugging Face folder's tokenizer."""

    def __init__(self, spec, source="the checkpoint's tokenizer"):
        library = need_package("tokenizers")
        try:
            self.inner = library.Tokenizer.from_str(spec["tokenizer.json"])
        except Exception as e:                         # the library raises nothing narrower
            raise UsageError(f"{source} is damaged, or newer than the package tokenizers "
                             f"{library.__version__}: {first_line(e)}") from None

        # A text is all of its tokens and nothing else.
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True        # "<s>" in a text is three characters

        self.ids = self.inner.get_vocab(with_added_tokens=True)            # {token: its id}
        self.n_vocab = spec["n_vocab"]
        self.start_token = spec["start"]
        self.eot_token = spec["end"]
        self.ends = spec.get("ends", [spec["end"]])    # older checkpoints know one
        self.skip = self.find_skip()

    def ids_of_text(self):
        """The ids that a text can have: not those of special tokens, which stay text."""
        added = self.inner.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        return set(self.ids.values()) - special

    def find_skip(self):
        """How many spaces a cut between two words must leave out so that the tokens of the two
        pieces are those of the whole: none where a piece is encoded as it is, one where the
        tokenizer puts a space before each. None: no such cut keeps the tokens."""
        whole, first, spaced, bare = self.encode_ordinary_batch(["some words", "some", " words",
                                                                 "words"])
        if first + spaced == whole:
            return 0
        if first + bare == whole:
            return 1
        return None

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
