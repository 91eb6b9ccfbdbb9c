"""Text in, token ids out: files, splits, the cache of tokens, and batches.

  1. `read_documents` finds the texts: a file, a folder, an address, or Python's own library.
  2. `split` holds a part of them out: `dev` to choose settings by, `val` for what is reported.
  3. `tokenize` makes the ids once; they are kept in a cache, by the text's content and settings.
  4. `batch` draws windows of the training tokens; they follow from the seed and the step alone.
`load_data` does the first three, and is where to begin reading.
"""
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import json
import os
import pathlib
import platform
import sysconfig
import tempfile
import time
import urllib.request
from typing import NamedTuple

import numpy as np
import torch

from model import UsageError
from nanobit.ranks import progress, say
from nanobit.tokenizer import END, PATTERN, make_tokenizer, train_bpe

@dataclasses.dataclass
class Data:
    """Token ids of the splits. Choose settings by `dev`; `val` is only for what is reported."""
    train: np.ndarray
    dev: np.ndarray
    val: np.ndarray
    spec: object                 # from which make_tokenizer makes the tokenizer
    digest: str                  # sha256 of all documents in order
    name: str
    text_bytes: dict             # of each split's own text, by the split's name

    def __post_init__(self):
        self.tokenizer = make_tokenizer(self.spec)

        # A tokenizer that changes texts (one with a normalizer, say) does not give back as many
        # bytes as it was given. Bits per byte are those of the text that was given.
        decoded = max(1, self.tokenizer.count_bytes(self.val))
        self.tokenizer.bytes_per_decoded = self.text_bytes["val"] / decoded

def load_data(source=None, vocab="1024", seq_len=128, spec=None, limit=None):
    """Read, split and tokenize text. The tokens are cached by content and settings.

    source: None (Python's own library), a text file, a folder (every .txt .md .py below it) or an
    http(s) address. vocab: the size of a BPE to train or a tiktoken name; spec: a checkpoint's
    tokenizer, instead. limit: so many files at most. Raises UsageError.
    """
    # The documents, and the parts that are held out. The parts of few files are copies: a large
    # text is not kept twice.
    docs, name = read_documents(source, limit)
    digest = hash_of(docs)
    parts = split(docs)
    del docs

    # The tokenizer, trained on the training part alone. The parts' sizes are in the cache's key
    # because they change with the way that `split` cuts.
    sizes = {part: sum(map(len, texts)) for part, texts in parts.items()}
    if not spec:
        spec = cached([digest, sizes, vocab, PATTERN],
                      make=lambda: {"spec": json.dumps(train_spec(parts["train"], vocab))},
                      read=lambda arrays: json.loads(str(arrays["spec"])))

    # The tokens.
    ids = cached([digest, sizes, spec, PATTERN], make=lambda: tokenize(parts, spec),
                 read=lambda arrays: {part: arrays[part] for part in parts})
    for part, tokens in ids.items():
        if len(tokens) < seq_len + 1:
            raise UsageError(f"--data {name} is too short: its {part} part has {len(tokens)} "
                             f"tokens, one window needs {seq_len + 1}; give more text or a lower "
                             "--seq-len")

    text_bytes = {part: sum(map(utf8_size, texts)) for part, texts in parts.items()}
    return Data(**ids, spec=spec, digest=digest, name=name, text_bytes=text_bytes)

def split(docs):
    """Documents -> {"train": documents, "dev": documents, "val": documents}. With 40 or more, of
    every 40 documents 38, 1 and 1. With fewer, each is cut at 18/20 and 19/20."""
    # Many files: none is in two parts.
    if len(docs) >= 40:
        return {"train": [doc for i, doc in enumerate(docs) if i % 20 != 19],
                "dev": docs[19::40],
                "val": docs[39::40]}

    # Few files: the end of each is held out.
    parts = {"train": [], "dev": [], "val": []}
    for doc in docs:
        dev_at = len(doc) * 18 // 20
        val_at = len(doc) * 19 // 20
        parts["train"].append(doc[:dev_at])
        parts["dev"].append(doc[dev_at:val_at])
        parts["val"].append(doc[val_at:])
    return parts

def train_spec(docs, vocab):
    """The tokenizer spec of --vocab: a BPE of that size for these documents, or a name as it is."""
    if not vocab.isdecimal():
        return vocab
    if int(vocab) < 257:
        raise UsageError(f"--vocab {vocab} is too small: the 256 bytes and {END} need 257")

    # Every k-th document, some 16 million characters in all, is enough for the merges.
    start = time.perf_counter()
    k = 1 + sum(map(len, docs)) // 16_000_000
    tokens = train_bpe(docs[::k], int(vocab))
    say(f"data: trained a tokenizer of {len(tokens) + 1} tokens in "
        f"{time.perf_counter() - start:.1f} s")
    return [token.decode("latin-1") for token in tokens]

def tokenize(parts, spec):
    """{part: documents} -> {part: ids}; END follows every document."""
    enc = make_tokenizer(spec)

    # A large document is encoded in pieces, cut where no token crosses.
    pieces = []
    for part, docs in parts.items():
        for doc in docs:
            pieces += [Piece(part, doc, start, stop) for start, stop in enc.spans(doc)]

    # 64 pieces at a time, which the tokenizer shares out to threads. They are copied out of their
    # documents only here, so that the text is never in memory twice.
    dtype = np.uint16 if enc.n_vocab <= 2**16 else np.uint32
    ids = {part: [np.zeros(0, dtype)] for part in parts}
    groups = [pieces[i:i + 64] for i in range(0, len(pieces), 64)]
    for group in progress(groups, "data: tokenizing"):
        encoded = enc.encode_ordinary_batch([p.doc[p.start:p.stop] for p in group])
        for piece, tokens in zip(group, encoded):
            if piece.stop == len(piece.doc):
                tokens = tokens + [enc.eot_token]
            ids[piece.part].append(np.array(tokens, dtype))
    return {part: np.concatenate(arrays) for part, arrays in ids.items()}

class Piece(NamedTuple):
    """A part of a document, and the split that it belongs to."""
    part: str
    doc: str
    start: int
    stop: int

def batch(tokens, step, batch_size, seq_len, seed, device):
    """Windows at random places: inputs and targets (B, T). They depend on (seed, step) alone, so
    that a resumed run goes on with the same data."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - seq_len, batch_size)
    windows = np.stack([tokens[i:i + seq_len + 1] for i in starts])
    ids = torch.from_numpy(windows.astype(np.int64))                       # (B, T + 1)

    # From pinned memory the copy to a GPU does not wait for the steps that still run there.
    if torch.device(device).type == "cuda":
        ids = ids.pin_memory()
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]

# ---- Where the text is --------------------------------------------------------------------------

def read_documents(source, limit=None):
    """Texts in the sorted order of their paths, and the source's name."""
    # Where the text is.
    if source is None:
        root = sysconfig.get_path("stdlib")
        name = f"Python {platform.python_version()}'s library"
    elif source.lower().startswith(("http://", "https://")):
        root = download(source)
        name = source
    else:
        root = name = source
    files = find_files(root, name, library=source is None)[:limit]

    # Read it. What is no text is left out.
    docs = []
    problems = []
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as e:
            raise UsageError(f"--data {path}: {e.strerror}") from None
        problem = not_text(content)
        if problem:
            problems.append(problem)
        else:
            docs.append(content.decode())
        del content                                    # before the next one is read

    # Say what was left out, or that nothing is left.
    if problems and not docs:
        raise UsageError(f"--data {name} is not UTF-8 text ({problems[0]}); convert it first")
    if problems:
        say(f"data: left out {len(problems)} of {len(files)} files, which are not UTF-8 text")
    if not any(docs):
        raise UsageError(f"--data {name} is empty: no text in {len(files)} .txt, .md or .py files")
    return [doc for doc in docs if doc], name

def find_files(root, name, library):
    """The paths of a source's texts. library: it is Python's own, read without its tests and the
    packages that somebody installed. Raises UsageError, with the source's name."""
    root = pathlib.Path(root)
    if not name or not os.path.exists(root):           # False also for a name that is too long
        raise UsageError(f"--data {name!r}: no such file or folder")
    if root.is_file():
        return [root]
    if not root.is_dir():                              # a pipe can be read once, not by every run
        raise UsageError(f"--data {name} is neither a file nor a folder; write the text to a file")
    out = set()
    if library:
        out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    return find_texts(root, out)

def find_texts(root, out):
    """Paths of the .txt, .md and .py files below a folder, but not below folders named in `out`."""
    def fail(error):
        raise error

    files = []
    try:
        for folder, folders, names in os.walk(root, onerror=fail):     # follows no links to folders
            folders[:] = set(folders) - out            # in place: `walk` goes into those that stay
            paths = [pathlib.Path(folder, name) for name in names]
            files += [p for p in paths if p.suffix in (".txt", ".md", ".py") and p.is_file()]
    except OSError as e:
        raise UsageError(f"--data {e.filename}: {e.strerror}; make it readable, or move it "
                         "elsewhere") from None
    return sorted(files)

def not_text(content):
    """Why the bytes are not UTF-8 text, or None where they are."""
    try:
        content.decode()
    except UnicodeDecodeError as e:
        return f"not UTF-8 at byte {e.start}"
    return "binary: it has zero bytes" if b"\0" in content else None

def download(url):
    """Fetch once into the cache, under a temporary name that is renamed when it is complete."""
    key = hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:24]
    path = cache_dir() / f"{key}.txt"
    if path.exists():
        return path

    say(f"data: downloading {url}")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=30) as r:
            content = r.read()
        problem = not_text(content)
        if not problem:                                # else the next run asks again
            temporary.write_bytes(content)
            temporary.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as e:          # also: a full disk
        temporary.unlink(missing_ok=True)
        raise UsageError(f"--data {url}: {getattr(e, 'reason', None) or e}") from None
    if problem:
        raise UsageError(f"--data {url} is not UTF-8 text ({problem}); convert it first")
    return path

# ---- The cache ----------------------------------------------------------------------------------

def utf8(text, block=2**20):
    """Yield the bytes of a text in blocks, so that a large one is not copied whole."""
    for i in range(0, len(text), block):
        yield text[i:i + block].encode()

def utf8_size(text):
    return sum(len(block) for block in utf8(text))

def hash_of(docs):
    """sha256 of the documents, a zero byte between two."""
    digest = hashlib.sha256()
    for i, doc in enumerate(docs):
        if i:
            digest.update(b"\0")
        for block in utf8(doc):
            digest.update(block)
    return digest.hexdigest()

@functools.cache
def temporary_cache():
    """The cache where the user has no home: a temporary folder of this process. It says so."""
    say("note: no home folder, so no downloads and tokens are kept; XDG_CACHE_HOME names a place")
    return tempfile.TemporaryDirectory(prefix="nanobit-")      # removed when Python ends

def cache_dir():
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        path = pathlib.Path(home or pathlib.Path.home() / ".cache", "nanobit")
    except RuntimeError:                               # a user id without HOME and without a name
        path = pathlib.Path(temporary_cache().name)
    with contextlib.suppress(OSError):                 # whoever writes there reports it
        path.mkdir(parents=True, exist_ok=True)
    return path

def cached(what, make, read):
    """The cached arrays of the key `what`, a list for JSON, or make()'s, then cached. Both
    go through `read`: a file's lazy arrays have to be read before it closes."""
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    cache = cache_dir() / f"{key}.npz"
    try:
        with np.load(cache) as arrays:
            return read(arrays)
    except Exception:           # not there yet; or damaged or foreign, which may fail in any way
        pass

    # Make them, and keep them under a temporary name until the file is complete.
    arrays = make()
    try:
        temporary = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **arrays)
        temporary.replace(cache)
    except OSError as e:
        say(f"data: not cached in {cache.parent} ({e.strerror}); XDG_CACHE_HOME moves it")
    return read(arrays)
