"""A tokenizer as llama.cpp knows them, for to_gguf.py.

llama.cpp has two that matter here, which GGUF calls by the models that brought them:
    gpt2    byte-level BPE: tokens spelled in 256 letters that stand for the bytes, and merges.
            How a text is first cut into words is not in the file but in llama.cpp, under a name.
    llama   SentencePiece's BPE: tokens with a score each; the pair with the highest is merged.
`tiktoken_vocabulary` and `hf_vocabulary` turn our tokenizers into one of the two, `add_tokenizer`
writes it, and `find_pre` finds llama.cpp's name for how words are cut.
"""
import json
from typing import NamedTuple

import regex    # it comes with tiktoken; unlike re it knows \p{L}, a letter of any script

from model import UsageError
from nanobit.hf_tokenizer import byte_letters, last_pair
from nanobit.tokenizer import BPETokenizer, make_tokenizer

# GGUF's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

class Vocabulary(NamedTuple):
    """A tokenizer as the file has it."""
    model: str                   # "gpt2" or "llama"
    tokens: dict                 # {id: its text}
    types: dict                  # {id: one of the above}, where not NORMAL
    merges: tuple | list = ()    # gpt2: "left right", the first first
    pre: str = "default"         # gpt2: llama.cpp's name for how words are cut
    exact: bool = True           # gpt2: does it cut as the tokenizer does?
    scores: dict = {}            # llama: {id: score}, where not the lowest
    starts: bool = True          # a text begins with the token that begins documents
    spaced: bool = False         # llama: and with a space
    template: str | None = None  # of chats
    unknown: int | None = None   # the id of the unknown token

def add_tokenizer(writer, spec, n_vocab):
    """Write the tokenizer of a checkpoint's spec for a model of n_vocab tokens -> [lines to tell
    people]. Raises UsageError where llama.cpp has nothing like it."""
    tokenizer = make_tokenizer(spec)
    if isinstance(tokenizer, BPETokenizer):
        v = tiktoken_vocabulary(tokenizer.inner)
    else:
        v = hf_vocabulary(tokenizer, spec)

    # Each of the model's ids gets a token. llama.cpp wants all of them different.
    ids = range(n_vocab)
    writer.add_tokenizer_model(v.model)
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list([v.tokens.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([v.types.get(i, NORMAL) if i in v.tokens else UNUSED for i in ids])
    if v.merges:
        writer.add_token_merges(v.merges)
    if v.model == "llama":
        lowest = min(v.scores.values(), default=0.0) - 1
        writer.add_token_scores([v.scores.get(i, lowest) for i in ids])
        writer.add_add_space_prefix(v.spaced)

    writer.add_bos_token_id(getattr(tokenizer, "start_token", tokenizer.eot_token))
    writer.add_eos_token_id(tokenizer.eot_token)
    if v.unknown is not None:
        writer.add_unk_token_id(v.unknown)
    writer.add_add_bos_token(v.starts)
    writer.add_add_eos_token(False)
    if v.template:
        writer.add_chat_template(v.template)
    if v.exact:
        return []
    return ["llama.cpp has no name for how this tokenizer cuts words; the file says "
            f"{v.pre!r}, the nearest, so that some texts become other tokens there"]

# ---- tiktoken's ---------------------------------------------------------------------------------

LETTERS = byte_letters()

def spelled(data):
    """Bytes in the letters that stand for them."""
    return "".join(LETTERS[byte] for byte in data)

def tiktoken_vocabulary(inner):
    """The Vocabulary of a tiktoken.Encoding."""
    # {a token's bytes: its id}. The ids are in the order in which merges have made the tokens.
    ranks = inner._mergeable_ranks
    tokens = {i: spelled(data) for data, i in ranks.items()}
    special = {i: text for text, i in inner._special_tokens.items()}

    # A merge for each token of more than one byte: the two that it was last put together from.
    merges = []
    for data in sorted(ranks, key=ranks.get):
        if len(data) > 1:
            left, right = last_pair(data, ranks)
            merges.append(f"{spelled(left)} {spelled(right)}")

    pre, exact = find_pre(lambda text: regex.findall(inner._pat_str, text))
    return Vocabulary("gpt2", tokens | special, dict.fromkeys(special, CONTROL), merges, pre, exact)

# ---- Hugging Face's -----------------------------------------------------------------------------

def hf_vocabulary(tokenizer, spec):
    """The Vocabulary of an HFTokenizer. Raises UsageError."""
    # A merge is a pair of tokens or, in older files, one string, "left right".
    settings = json.loads(spec["tokenizer.json"])
    model = settings["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]

    # What both kinds have: tokens, the types of those that no merge makes, and what begins a text.
    tokens = {i: token for token, i in tokenizer.ids.items()}
    types = {}
    for i, token in tokenizer.inner.get_added_tokens_decoder().items():
        types[i] = CONTROL if token.special else USER_DEFINED
    first = tokenizer.inner.encode("a", add_special_tokens=True).ids[:1]
    common = {"starts": first == [tokenizer.start_token], "template": chat_template(spec)}

    # Byte-level BPE.
    kind = model.get("type")
    if kind == "BPE" and "ByteLevel" in kinds(settings.get("pre_tokenizer")):
        merges = [" ".join(pair) for pair in pairs]
        cut = tokenizer.inner.pre_tokenizer
        pre, exact = find_pre(lambda text: unspelled(cut.pre_tokenize_str(text)))
        return Vocabulary("gpt2", tokens, types, merges, pre, exact, **common)

    # SentencePiece's: a byte that is in no token is one of 256 tokens of their own.
    if kind == "BPE" and model.get("byte_fallback"):
        # The rank of the first merge that makes a token is, negative, its score.
        scores = {}
        for rank, pair in enumerate(pairs):
            scores.setdefault(tokenizer.ids["".join(pair)], -float(rank))

        # Tokens write a space as U+2581. But added ones are matched before a text's spaces become
        # that.
        for i, type in types.items():
            if type == USER_DEFINED:
                tokens[i] = tokens[i].replace("\u2581", " ")

        for byte in range(256):
            token = f"<0x{byte:02X}>"
            if token not in tokenizer.ids:
                raise UsageError("--format gguf cannot hold this tokenizer: it has no token "
                                 f"{token}, and llama.cpp wants one for each byte; give --format "
                                 "dense")
            types[tokenizer.ids[token]] = BYTE
        unknown = tokenizer.ids.get(model.get("unk_token"))
        if unknown is not None:
            types[unknown] = UNKNOWN
        spaced = tokenizer.skip == 1                   # see find_skip: it puts a space before
        return Vocabulary("llama", tokens, types, scores=scores, unknown=unknown, spaced=spaced,
                          **common)

    raise UsageError(f"--format gguf cannot hold this tokenizer: it is of the type {kind}, and "
                     "llama.cpp reads byte-level BPE and SentencePiece's BPE; give --format dense")

def kinds(part):
    """The types of a part of tokenizer.json, such as its pre_tokenizer: several, where it is a
    sequence."""
    part = part or {}
    return [p["type"] for p in part.get("pretokenizers", [part]) if "type" in p]

def unspelled(pieces):
    """[(bytes in the letters that stand for them, place)] -> [their text]. Bytes that are none, as
    where a word is cut within a character, become U+FFFD."""
    bytes_of = {letter: byte for byte, letter in enumerate(LETTERS)}
    return [bytes(bytes_of.get(letter, 0) for letter in piece).decode(errors="replace")
            for piece, _ in pieces]

def chat_template(spec):
    """The template of a folder's chats: in a file of its own or in the tokenizer's settings."""
    texts = spec.get("texts", {})
    if "chat_template.jinja" in texts:
        return texts["chat_template.jinja"]
    return json.loads(texts.get("tokenizer_config.json", "{}")).get("chat_template")

# ---- How words are cut --------------------------------------------------------------------------

# llama.cpp's names, and the patterns that it applies in turn, each to the pieces that the one
# before has left (its src/llama-vocab.cpp). What no pattern matches is a piece too.
GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",)
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
CAMEL = rf"{BEFORE}{UPPER}*{LOWER}+%s|{BEFORE}{UPPER}+{LOWER}*%s"       # %s: what may follow
SIGNS = r" ?[^\s\p{L}\p{N}]+"

PRE = {
    "gpt-2": GPT2,
    "smollm": (r"\p{N}", *GPT2),
    "llama-bpe": (rf"{SHORT}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{SIGNS}[\r\n]*|{REST}",),
    "qwen2": (rf"{SHORT}|{BEFORE}\p{{L}}+|\p{{N}}|{SIGNS}[\r\n]*|{REST}",),
    "tekken": (CAMEL % ("", "") + rf"|\p{{N}}|{SIGNS}[\r\n/]*|{REST}",),
    "gpt-4o": (CAMEL % (f"{SHORT}?", f"{SHORT}?") + rf"|\p{{N}}{{1,3}}|{SIGNS}[\r\n/]*|{REST}",),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}

# Where the patterns differ: numbers, short forms, letters after signs, line ends, scripts.
SAMPLE = (
    " Hello world, it's 12345 I'VE don't they'll\n\n  def f(x_1, *args):\n\treturn x+1  # 3.14\r\n"
    "Größe été 我想在apple工作1314天～ नमस्ते กขค \U0001f999\U0001f999 <html>/a/b?c=d&e ...!!!\n/\n"
    "   \n \t camelCaseWords HTTPServer ٣٤٥ ½\n\n\n\n    if a == b: c[-1] += \"d\"\n        pass\n")

def find_pre(cut):
    """(llama.cpp's name for a way to cut a text into words, does it cut SAMPLE just the same?).
    Where none does, that with most words in common. cut: text -> [words]"""
    own = borders(cut(SAMPLE))
    shared = {}                                        # {name: how many words are the same}
    for name, patterns in PRE.items():
        theirs = borders(cut_by(patterns, SAMPLE))
        if theirs == own:
            return name, True
        shared[name] = len(own & theirs)
    return max(shared, key=shared.get), False

def cut_by(patterns, text):
    """The words of a text as llama.cpp cuts them: each pattern cuts what is left by those before
    it, into what it matches and what is between."""
    pieces = [text]
    for pattern in patterns:
        finer = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(pattern, piece):
                finer += [piece[at:match.start()], match.group()]
                at = match.end()
            finer.append(piece[at:])
        pieces = [piece for piece in finer if piece]
    return pieces

def borders(words):
    """{(start, stop)} of each of the words that make up a text."""
    found = set()
    at = 0
    for word in words:
        found.add((at, at + len(word)))
        at += len(word)
    return found
