"""Text in, token ids out: files, splits, the cache of tokens, and batches.

  1. `read_documents` finds the texts: a file, a folder, an address, or Python's own library.
  2. `split` holds a part of them out: `dev` to choose settings by, `val` for what is reported.
  3. Tokens are made once and kept in a cache, by the content of the text and the settings.
  4. `batch` draws windows of the training tokens; they follow from the seed and the step alone.
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
    spec: object                 # makes the tokenizer, see make_tokenizer
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
    docs, name = read_documents(source, limit)
    digest = hash_of(docs)
    parts = split(docs)
    del docs                                           # of few files, the parts are copies
    sizes = {part: sum(map(len, texts)) for part, texts in parts.items()}
    spec = spec or cached([digest, sizes, vocab, PATTERN],
                          lambda: {"spec": json.dumps(train_spec(parts["train"], vocab))},
                          lambda f: json.loads(str(f["spec"])))
    arrays = cached([digest, sizes, spec, PATTERN], lambda: tokenize(parts, spec),
                    lambda f: {part: f[part] for part in parts})
    for part, ids in arrays.items():
        if len(ids) < seq_len + 1:
            raise UsageError(f"--data {name} is too short: its {part} part has {len(ids)} tokens, "
                             f"one window needs {seq_len + 1}; give more text or a lower --seq-len")
    text_bytes = {part: sum(len(block) for text in texts for block in utf8(text))
                  for part, texts in parts.items()}
    return Data(**arrays, spec=spec, digest=digest, name=name, text_bytes=text_bytes)

def split(docs):
    """Documents -> {"train": documents, "dev": documents, "val": documents}. By file, 38, 1 and 1
    of 40; of fewer than 40 documents, 18, 1 and 1 twentieths of each."""
    if len(docs) >= 40:                                # by file: none is in two parts
        return {"train": [d for i, d in enumerate(docs) if i % 20 != 19],
                "dev": docs[19::40], "val": docs[39::40]}
    cuts = [(d, len(d) * 18 // 20, len(d) * 19 // 20) for d in docs]
    return {"train": [d[:a] for d, a, b in cuts],      # few files: the end of each is held out
            "dev": [d[a:b] for d, a, b in cuts], "val": [d[b:] for d, a, b in cuts]}

def utf8(text, block=2**20):
    """Yield the bytes of a text in blocks, so that a large one is not copied whole."""
    for i in range(0, len(text), block):
        yield text[i:i + block].encode()

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
    """The cache of this process alone, where the user has no home: for downloads. It says so."""
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
    """read(arrays by name) of the cache's file for `what`, a list for JSON; else of make()."""
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    cache = cache_dir() / f"{key}.npz"
    try:
        with np.load(cache) as f:
            return read(f)
    except Exception:           # not there yet; or damaged or foreign, which may fail in any way
        pass
    arrays = make()
    try:
        temporary = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **arrays)
        temporary.replace(cache)
    except OSError as e:
        say(f"data: not cached in {cache.parent} ({e.strerror}); XDG_CACHE_HOME moves it")
    return read(arrays)

def train_spec(docs, vocab):
    """The tokenizer spec of --vocab: a BPE of that size for these documents, or a name as it is."""
    if not vocab.isdecimal():
        return vocab
    if int(vocab) < 257:
        raise UsageError(f"--vocab {vocab} is too small: the 256 bytes and {END} need 257")
    start = time.perf_counter()
    # Every k-th document, some 16 million characters in all, is enough for the merges.
    tokens = train_bpe(docs[::1 + sum(map(len, docs)) // 16_000_000], int(vocab))
    say(f"data: trained a tokenizer of {len(tokens) + 1} tokens in "
        f"{time.perf_counter() - start:.1f} s")
    return [t.decode("latin-1") for t in tokens]

def tokenize(parts, spec):
    """{part: documents} -> {part: ids}; END follows every document."""
    enc = make_tokenizer(spec)
    dtype = np.uint16 if enc.n_vocab <= 2**16 else np.uint32
    ids = {part: [np.zeros(0, dtype)] for part in parts}
    pieces = [(part, doc, start, stop) for part, docs in parts.items() for doc in docs
              for start, stop in enc.spans(doc)]
    batches = [pieces[i:i + 64] for i in range(0, len(pieces), 64)]
    for group in progress(batches, "data: tokenizing"):
        encoded = enc.encode_ordinary_batch([doc[start:stop] for _, doc, start, stop in group])
        for (part, doc, _, stop), piece in zip(group, encoded):
            end = [enc.eot_token] if stop == len(doc) else []
            ids[part].append(np.array(piece + end, dtype))
    return {part: np.concatenate(a) for part, a in ids.items()}

def find_texts(root, out):
    """Paths of the .txt, .md and .py files below a folder, but not below folders named in `out`."""
    def fail(error):
        raise error

    files = []
    try:
        for folder, folders, names in os.walk(root, onerror=fail):     # follows no links to folders
            folders[:] = set(folders) - out
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

def read_documents(source, limit=None):
    """Texts in the sorted order of their paths, and the source's name."""
    # Where the text is.
    if source is None:
        root, name = sysconfig.get_path("stdlib"), f"Python {platform.python_version()}'s library"
    else:
        web = source.lower().startswith(("http://", "https://"))
        root, name = download(source) if web else source, source
    root = pathlib.Path(root)
    if not name or not os.path.exists(root):           # False also for a name that is too long
        raise UsageError(f"--data {name!r}: no such file or folder")
    if root.is_dir():
        out = set() if source else {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        files = find_texts(root, out)[:limit]
    elif root.is_file():
        files = [root]
    else:                                              # a pipe can be read once, not by every run
        raise UsageError(f"--data {name} is neither a file nor a folder; write the text to a file")

    # Read it.
    docs, problems = [], []
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

    # Complain about what is no text.
    if problems and not docs:
        raise UsageError(f"--data {name} is not UTF-8 text ({problems[0]}); convert it first")
    if problems:
        say(f"data: left out {len(problems)} of {len(files)} files, which are not UTF-8 text")
    if not any(docs):
        raise UsageError(f"--data {name} is empty: no text in {len(files)} .txt, .md or .py files")
    return [d for d in docs if d], name

def download(url):
    """Fetch once into the cache, under a temporary name that is renamed when it is complete."""
    path = cache_dir() / (hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:24]
                          + ".txt")
    if not path.exists():
        say(f"data: downloading {url}")
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with urllib.request.urlopen(url, timeout=30) as r:
                content = r.read()
            problem = not_text(content)
            if not problem:                            # else the next run asks again
                temporary.write_bytes(content)
                temporary.replace(path)
        except (OSError, ValueError, http.client.HTTPException) as e:      # also: a full disk
            temporary.unlink(missing_ok=True)
            raise UsageError(f"--data {url}: {getattr(e, 'reason', None) or e}") from None
        if problem:
            raise UsageError(f"--data {url} is not UTF-8 text ({problem}); convert it first")
    return path

def batch(tokens, step, batch_size, seq_len, seed, device):
    """Windows at random places: inputs and targets (B, T). They depend on (seed, step) alone, so
    that a resumed run goes on with the same data."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - seq_len, batch_size)
    x = torch.from_numpy(np.stack([tokens[i:i + seq_len + 1] for i in starts]).astype(np.int64))
    if torch.device(device).type == "cuda":            # then the copy does not wait for the GPU
        x = x.pin_memory()
    x = x.to(device, non_blocking=True)
    return x[:, :-1], x[:, 1:]
