"""model.py's tokenizer and data against oracles: where the tokens come from and who sees them.

Tokenizer: a trainer that recounts every pair at every merge; text that comes back unchanged.
Splits: every file carries its name, so the decoded parts say which files they hold. Caching and
downloads: counted calls, a small server on this machine. Bits per byte: worked out by hand, and
from the bytes of the files. Pieces of long texts: the tokens that the libraries give to the whole.
"""
import collections
import hashlib
import http.server
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import shlex
import threading
import time
import tracemalloc
import types

import numpy as np
import pytest
import regex
import torch

import nanobit.cli
import nanobit.ranks
import model
import nanobit.checkpoint
import nanobit.data
import nanobit.tokenizer
import nanobit.train
from conftest import call, check_refused, random_base
from model import UsageError

WORDS = "def return self import class value index for in if else while the of and to".split()

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees the user's cache or proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

def text(n, seed=0):
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(n // 40))

class Uniform(torch.nn.Module):
    """512 tokens, each as likely: 9 bits a token."""
    lean = False

    def __init__(self):
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return None, torch.tensor(math.log(512))

def test_bits_per_byte_by_hand():
    enc = nanobit.tokenizer.make_tokenizer(byte_tokens())
    first, second = enc.encode_ordinary("aé\n"), enc.encode_ordinary("€")    # 1 + 2 + 1, 3 bytes
    tokens = first + [enc.eot_token] + second
    scores = nanobit.train.evaluate(Uniform(), np.array(tokens), 4, enc)
    assert scores["bits_per_byte"] == pytest.approx(7 * 9 / 6)             # "a" is not predicted

# ---- Bits per byte, for each kind of tokenizer ------------------------------------------------

def byte_level(normalizer=None, prefix=False):
    """A byte-level BPE in the form of Llama 3 and SmolLM2, as tokenizer.json's text."""
    t = pytest.importorskip("tokenizers")
    bpe = t.Tokenizer(t.models.BPE())
    bpe.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    bpe.decoder = t.decoders.ByteLevel()
    if normalizer:
        bpe.normalizer = getattr(t.normalizers, normalizer)()
    bpe.train_from_iterator([text(4000)], t.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet()))
    return bpe.to_str()

def llama2():
    """The form of Llama 2's: bytes for unknown characters; a space is put before each text and
    taken away when it is decoded."""
    t = pytest.importorskip("tokenizers")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)),
             "\u2581", *"abdefinorstuw"]
    merges = [("\u2581", "d"), ("e", "f"), ("\u2581d", "ef"), ("\u2581", "i"), ("\u2581i", "n")]
    ids = {name: i for i, name in enumerate([*names, *map("".join, merges)])}
    bpe = t.Tokenizer(t.models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True,
                                   byte_fallback=True))
    bpe.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("\u2581"),
                                             t.normalizers.Replace(" ", "\u2581")])
    bpe.decoder = t.decoders.Sequence([t.decoders.Replace("\u2581", " "), t.decoders.ByteFallback(),
                                       t.decoders.Fuse(), t.decoders.Strip(" ", 1, 0)])
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    return bpe.to_str()

TOKENIZERS = {
    "our own": lambda: byte_tokens([text(4000)], 300), "byte-level": byte_level,
    "Llama 2": llama2, "lower case": lambda: byte_level("Lowercase"),
    "decomposes": lambda: byte_level("NFD"), "adds a space": lambda: byte_level(prefix=True)}

def spec_of(name):
    spec = TOKENIZERS[name]()
    return spec if isinstance(spec, list) else {"tokenizer.json": spec, "end": 0, "start": 1,
                                                "n_vocab": 512}

@pytest.mark.parametrize("name", TOKENIZERS)
def test_bits_per_byte_are_those_of_the_text_that_was_tokenized(tmp_path, name):
    texts = [f"# Def {i}\u00e9 in " + text(200, i) + " \u65e5\n" for i in range(80)]
    (tmp_path / "docs").mkdir()
    for i, doc in enumerate(texts):
        (tmp_path / "docs" / f"{i:03}.txt").write_text(doc, encoding="utf-8")
    data = nanobit.data.load_data(str(tmp_path / "docs"), "300", 16, spec=spec_of(name))
    val = [doc.encode() for doc in (texts[39], texts[79])]
    assert data.text_bytes["val"] == len(val[0]) + len(val[1])
    assert sum(data.text_bytes.values()) == sum(len(doc.encode()) for doc in texts)
    first = int(np.flatnonzero(data.val == data.tokenizer.eot_token)[0]) + 1
    for tokens, n_bytes in ((data.val, len(val[0] + val[1])), (data.val[first:], len(val[1]))):
        bits = 9 * (len(tokens) - 1)                   # of all but the first, "#" or " "
        used = bits / nanobit.train.evaluate(Uniform(), tokens, 16, data.tokenizer)["bits_per_byte"]
        assert n_bytes - 1.1 <= used <= n_bytes + 0.1

def test_no_byte_at_all_is_no_division_by_zero():
    enc = nanobit.tokenizer.make_tokenizer(byte_tokens())
    tokens = np.array([97, enc.eot_token, enc.eot_token])
    assert math.isfinite(nanobit.train.evaluate(Uniform(), tokens, 4, enc)["bits_per_byte"])

@pytest.mark.parametrize("name", ["our own", "byte-level", "Llama 2"])
def test_a_tokenizer_alone_counts_the_bytes_of_any_documents(name):
    enc = nanobit.tokenizer.make_tokenizer(spec_of(name))
    docs = ["a\u00e9 b", " in", "\u65e5\u672c def\n", "", "x", text(300)]
    ids = [np.array([*enc.encode_ordinary(doc), enc.eot_token]) for doc in docs]
    for n in range(1, len(docs) + 1):
        assert enc.count_bytes(np.concatenate(ids[:n])) == len("".join(docs[:n]).encode())

# ---- Long texts -------------------------------------------------------------------------------

def nasty(n, seed):
    """Words, numbers, signs and white space of all kinds, in any order."""
    parts = ["a", "Def", "it's", "x'll", "12", "3456", "_", "__init__", "(", ");", "//", ".", "'",
             " ", "  ", "\t", "\n", "\n\n", "\r\n", " \n", "\u00e9", "e\u0301", "\u65e5\u672c",
             "\u3002\n", "\u00b2", "\u0939\u093f", "\U0001f600", "\u00a0", "\u2003", "\u0130",
             "Q\n"]
    return "".join(random.Random(seed).choices(parts, k=n))

def tiktoken_patterns(monkeypatch):
    """The patterns of tiktoken's encodings, without a download of their ranks."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
    return {make()["pat_str"] for make in public.ENCODING_CONSTRUCTORS.values()}

def test_a_cut_changes_no_token_of_any_pattern(monkeypatch):
    sources = nanobit.tokenizer.PATTERN, *tiktoken_patterns(monkeypatch)
    patterns = [regex.compile(p) for p in sources]
    assert len(patterns) >= 4
    for seed in range(400):
        sample = nasty(12, seed)
        for at in {m.start() for m in nanobit.tokenizer.CUT.finditer(sample)}:
            for pattern in patterns:
                cut = pattern.findall(sample[:at]) + pattern.findall(sample[at:])
                whole = [m.group() for m in pattern.finditer(sample)]
                assert [*cut] == whole, (pattern.pattern, sample, at)

@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_pieces_are_those_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(nanobit.tokenizer, "PIECE", 50)
    enc = nanobit.tokenizer.make_tokenizer(spec_of(name))
    long = text(4000) + nasty(3000, 1) + text(4000)
    encode = enc.inner.encode_ordinary if name == "our own" else (
        lambda text: enc.inner.encode(text, add_special_tokens=False).ids)
    assert len(list(enc.spans(long))) > 90
    assert enc.encode_ordinary(long) == encode(long)
    assert nanobit.data.tokenize({"all": [long, "a"]}, spec_of(name))["all"].tolist() == (
        [*encode(long), enc.eot_token, *encode("a"), enc.eot_token])

def test_a_tokenizer_whose_pieces_would_differ_gets_whole_documents(monkeypatch):
    t = pytest.importorskip("tokenizers")
    inner = t.Tokenizer.from_str(byte_level())
    inner.normalizer = t.normalizers.Replace(t.Regex("$"), "!")        # each text gets an end
    monkeypatch.setattr(nanobit.tokenizer, "PIECE", 50)
    spec = spec_of("byte-level") | {"tokenizer.json": inner.to_str()}
    enc = nanobit.tokenizer.make_tokenizer(spec)
    whole = enc.inner.encode(text(1000), add_special_tokens=False).ids
    assert enc.encode_ordinary(text(1000)) == whole

@pytest.mark.parametrize("name, run", [("our own", run) for run in (" ", "\n", "b", "=")]
                         + [("byte-level", " "), ("Llama 2", " ")])
def test_a_run_of_a_million_characters_is_tokenized(name, run):
    enc, long = nanobit.tokenizer.make_tokenizer(spec_of(name)), "x" + run * 1_200_000 + "y"
    assert enc.decode(enc.encode_ordinary(long)) == long

def test_a_text_with_a_million_spaces_can_be_trained_on(tmp_path):
    content = text(40_000) + " " * 1_200_000 + text(40_000, 1)
    (tmp_path / "a.txt").write_text(content)
    data = nanobit.data.load_data(str(tmp_path / "a.txt"), "300", 16)
    parts = [data.tokenizer.decode(p[:-1].tolist()) for p in (data.train, data.dev, data.val)]
    assert "".join(parts) == content

def test_time_to_train_a_tokenizer_hardly_depends_on_where_words_end():
    letters = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=20_000))
    def seconds(corpus):
        start = time.process_time()
        nanobit.tokenizer.train_bpe([corpus], 1024)
        return time.process_time() - start
    lines = seconds("\n".join(letters[i:i + 60] for i in range(0, len(letters), 60)))
    assert seconds(letters) < 4 * lines + 2            # by words it was a hundred times `lines`

def test_long_work_on_a_text_says_how_long_it_takes(monkeypatch, capsys):
    clock = iter(range(0, 10**9, 11))                  # 11 s pass between two looks at it
    monkeypatch.setattr(nanobit.ranks, "time",
                        types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(nanobit.tokenizer, "PIECE", 50)
    spec = [t.decode("latin-1") for t in nanobit.tokenizer.train_bpe([text(4000)], 300)]
    nanobit.data.tokenize({"all": [text(20000)]}, spec)
    out = capsys.readouterr().out
    for step in ("counting words", "training a tokenizer, merge", "tokenizing"):
        assert re.search(rf"data: {step} \d+/\d+ \| eta \d+s", out), step

def test_memory_of_one_file_is_a_few_times_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(nanobit.tokenizer, "PIECE", 2**10)  # 64 of them at a time
    lines = [" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(1000)]
    n = (tmp_path / "a.txt").write_text("\n".join(lines * 70) + "\n")
    tracemalloc.start()
    nanobit.data.load_data(str(tmp_path / "a.txt"), "300", 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n > 2_000_000 and peak < 5 * n

# ---- The tokenizer ----------------------------------------------------------------------------

def byte_tokens(corpus=(), size=257):
    return [t.decode("latin-1") for t in nanobit.tokenizer.train_bpe(corpus, size)]

ODD = ["", " ", "\n", "a", "  a  b\t\tc\r\n\r\n  ", "x" * 300, "1234567890 12.5e-3",
       "d\u00e9j\u00e0 vu \u00df \ufb01 \u0130", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9",
       "\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f", "e\u0301 \u00a0\u2003\u200b\ufeff|\x00\x7f",
       "\u202eabc", "\U0010ffff", "<|endoftext|>", "if x:\n\tpass  \n", "__init__(self, *a)"]

@pytest.mark.parametrize("sample", ODD, ids=ascii)
@pytest.mark.parametrize("size", [257, 320])
def test_tokenizer_gives_back_any_text(sample, size):
    enc = nanobit.tokenizer.make_tokenizer(byte_tokens(ODD + [text(2000)], size))
    assert enc.decode(enc.encode_ordinary(sample)) == sample
    assert enc.n_vocab == size and enc.eot_token == size - 1

LONG_WORD = "".join(random.Random(2).choices("aaabc", k=900))
CORPORA = [[text(4000)], ["aaaaaaa aaa aa aaaa bbbaaabbb"] * 3, ODD + [text(500, 1)], ["ab"],
           [LONG_WORD, LONG_WORD[:300]]]

def test_a_known_text_has_the_tokens_that_it_always_had():
    tokens = nanobit.tokenizer.train_bpe([text(20000), *ODD, LONG_WORD], 600)
    digest = hashlib.sha256(b"\xff".join(tokens)).hexdigest()
    assert digest[:16] == "09f2f8039827b5fc" # committed results depend on it

@pytest.mark.parametrize("corpus", CORPORA, ids=("words", "runs", "odd", "tiny", "long word"))
def test_bpe_merges_the_most_frequent_pair_at_every_step(corpus):
    words = collections.Counter(w for doc in corpus
                                for w in regex.findall(nanobit.tokenizer.PATTERN, doc))
    counts, words = words, {w: [bytes([b]) for b in w.encode()] for w in words}
    tokens = nanobit.tokenizer.train_bpe(corpus, 330)
    assert tokens[:256] == [bytes([i]) for i in range(256)] and len(set(tokens)) == len(tokens)
    for token in tokens[256:]:
        pairs = collections.Counter()
        for w, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[w]
        best = max(pairs.values())                     # ties may be broken either way
        pair = next(p for p, n in pairs.items() if n == best and p[0] + p[1] == token)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i:i + 2] = [token]
                i += 1
    if len(tokens) < 329:                              # it stops only when nothing is left
        assert all(len(parts) == 1 for parts in words.values())

def folder(path, n, size=400):
    path.mkdir()
    for i in range(n):
        (path / f"{i:03}.txt").write_text(f"file{i:03} " + text(size, i) + f" end{i:03}")
    return str(path)

def test_splits_share_no_file_and_lose_none(tmp_path):
    data = nanobit.data.load_data(folder(tmp_path / "docs", 80), "300", 16)
    found = {part: set(re.findall(r"file\d+", data.tokenizer.decode(getattr(data, part).tolist())))
             for part in ("train", "dev", "val")}
    assert [len(found[part]) for part in found] == [76, 2, 2]
    assert len(set.union(*found.values())) == 80
    for part, names in found.items():                  # whole files, each before one END
        ends = (getattr(data, part) == data.tokenizer.eot_token).sum()
        assert ends == len(names) and getattr(data, part)[-1] == data.tokenizer.eot_token

@pytest.mark.parametrize("files", [80, 1])
def test_the_tokenizer_learns_from_the_training_part_alone(tmp_path, files):
    """Letters that only dev and val hold, however often, stay single. Of 80 files each 20th is held
    out, of one file its last tenth."""
    (tmp_path / "docs").mkdir()
    for i in range(files):
        part = text(400, i) if files > 1 else text(18000)
        held_out = "QZ" * 900 if files == 1 or i % 20 == 19 else ""        # 1800 letters
        (tmp_path / "docs" / f"{i:03}.txt").write_text(part + held_out)
    data = nanobit.data.load_data(str(tmp_path / "docs"), "300", 16)
    assert "QZQZ" in data.tokenizer.decode(data.val.tolist())
    assert len(data.spec) > 257 and not any("QZ" in token for token in data.spec)

def test_one_file_is_split_by_position(tmp_path):
    (tmp_path / "a.txt").write_text(text(20000))
    data = nanobit.data.load_data(str(tmp_path / "a.txt"), "300", 16)
    parts = [data.tokenizer.decode(p[:-1].tolist()) for p in (data.train, data.dev, data.val)]
    assert "".join(parts) == text(20000)
    assert [len(p) / len(text(20000)) for p in parts] == pytest.approx([0.9, 0.05, 0.05], abs=1e-3)

def test_end_token_stands_between_a_few_files_too(tmp_path):
    data = nanobit.data.load_data(folder(tmp_path / "docs", 8, 4000), "300", 16)
    for part in (data.train, data.dev, data.val):      # each file has a piece in each part
        assert (part == data.tokenizer.eot_token).sum() == 8
        assert part[-1] == data.tokenizer.eot_token

def test_cached_tokens_are_the_same_and_follow_content_and_settings(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(text(20000))
    first = nanobit.data.load_data(str(path), "300", 16)
    calls, tokenize = [], nanobit.data.tokenize
    monkeypatch.setattr(nanobit.data, "tokenize", lambda *a: calls.append(a) or tokenize(*a))
    again = nanobit.data.load_data(str(path), "300", 16)
    assert not calls and again.spec == first.spec and again.digest == first.digest
    assert all((getattr(again, p) == getattr(first, p)).all() for p in ("train", "dev", "val"))
    nanobit.data.load_data(str(path), "1024", 16, spec=first.spec)  # as a checkpoint's data is read
    assert not calls
    nanobit.data.load_data(str(path), "301", 16)
    path.write_text(text(20000) + "!")
    nanobit.data.load_data(str(path), "300", 16)
    assert len(calls) == 2

def test_a_damaged_cache_is_made_again(tmp_path):
    source = folder(tmp_path / "docs", 50)
    first = nanobit.data.load_data(source, "300", 16)
    for cached in (tmp_path / "cache" / "nanobit").iterdir():
        cached.write_bytes(cached.read_bytes()[:100])
    assert (nanobit.data.load_data(source, "300", 16).train == first.train).all()

def foreign(kind):
    """Bytes of a file that is no cache of ours."""
    file = io.BytesIO()
    if kind == "one array":
        np.save(file, np.arange(3))
    if kind == "other names":
        np.savez(file, a=np.arange(3))
    if kind == "pickles":
        harm = np.array([Harm()], dtype=object)
        np.savez(file, train=harm, dev=harm, val=harm, spec=harm)
    return file.getvalue()

class Harm:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("harm"),)

@pytest.mark.parametrize("kind", ["empty", "one array", "other names", "pickles"])
def test_a_foreign_file_in_the_cache_is_replaced_and_never_unpickled(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    source = folder(tmp_path / "docs", 50)
    first = nanobit.data.load_data(source, "300", 16)
    cache = list((tmp_path / "cache" / "nanobit").iterdir())
    good = [path.read_bytes() for path in cache]
    for path in cache:
        path.write_bytes(foreign(kind))
    again = nanobit.data.load_data(source, "300", 16)
    assert (again.train == first.train).all() and again.spec == first.spec
    assert not os.path.exists("harm")
    if kind == "pickles":                              # they would have done harm
        pickle.loads(pickle.dumps(Harm()))
        assert os.path.exists("harm")
    assert [len(path.read_bytes()) for path in cache] == list(map(len, good))

def test_without_a_home_a_run_goes_on_with_one_note(tmp_path, monkeypatch, capsys):
    source = folder(tmp_path / "docs", 50)
    first = nanobit.data.load_data(source, "300", 16)
    monkeypatch.delenv("XDG_CACHE_HOME")
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    nanobit.data.temporary_cache.cache_clear()
    capsys.readouterr()
    for _ in range(2):
        assert (nanobit.data.load_data(source, "300", 16).train == first.train).all()
    assert capsys.readouterr().out.count("XDG_CACHE_HOME") == 1
    nanobit.data.temporary_cache().cleanup()
    nanobit.data.temporary_cache.cache_clear()

# ---- Names and bytes that are not UTF-8; files that are no files ------------------------------

def test_a_file_name_that_is_not_utf8_is_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        pathlib.Path(name).write_text(text(20000))
    except OSError:
        pytest.skip("this file system has no such names")
    pathlib.Path("b.txt").write_text(text(20000))
    data, same = (nanobit.data.load_data(n, "300", 16) for n in (name, "b.txt"))
    assert data.digest == same.digest and (data.train == same.train).all()
    base = model.LLaMA(model.LlamaConfig(data.tokenizer.n_vocab, 1, 16, 2, 2, 16, 16))
    nanobit.checkpoint.save_checkpoint("a.pt", base, tokenizer=data.spec, data=data.digest,
                                       method="dense", settings={"data": data.name})
    assert nanobit.checkpoint.load_checkpoint("a.pt")[1]["settings"]["data"] == name
    assert json.loads(json.dumps({"command": name}))["command"] == name

def test_a_prompt_that_is_not_utf8_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_base(tmp_path, 1)
    sample = "model.py sample base.pt --tokens 2 --device cpu --prompt "
    check_refused(call(capsys, sample + shlex.quote(os.fsdecode(b"caf\xe9"))), "--prompt",
                  "character 3")
    status, out, _ = call(capsys, sample + "'caf\u00e9'")
    assert status == 0 and out.startswith("caf\u00e9")

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_what_is_neither_a_file_nor_a_folder_is_refused(tmp_path):
    source = folder(tmp_path / "docs", 50)
    clean = nanobit.data.load_data(source, "300", 16)
    os.mkfifo(tmp_path / "docs" / "pipe.txt")          # nobody writes into it: reading would hang
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        nanobit.data.load_data(str(tmp_path / "docs" / "pipe.txt"), "300", 16)
    os.symlink("loop.txt", tmp_path / "docs" / "loop.txt")
    os.symlink(".", tmp_path / "docs" / "itself")
    (tmp_path / "docs" / "folder.txt").mkdir()
    assert nanobit.data.load_data(source, "300", 16).digest == clean.digest   # each text once
    for missing in ("loop.txt", "n" * 5000, "no.txt"):
        with pytest.raises(UsageError, match="no such file"):
            nanobit.data.load_data(str(tmp_path / "docs" / missing), "300", 16)

def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    source = folder(tmp_path / "docs", 50)
    (tmp_path / "docs" / "secret").mkdir()
    scandir = os.scandir                               # the tests may run as root, who reads all
    def refuse(path):
        if os.fspath(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="secret: Permission denied"):
        nanobit.data.load_data(source, "300", 16)

def test_line_ends_and_marks_stay_as_they_are(tmp_path):
    content = ("\ufeff" + text(20000)).replace("\n", "\r\n") + nanobit.tokenizer.END
    (tmp_path / "a.txt").write_bytes(content.encode())
    data = nanobit.data.load_data(str(tmp_path / "a.txt"), "300", 16)
    parts = [data.tokenizer.decode(p[:-1].tolist()) for p in (data.train, data.dev, data.val)]
    assert "".join(parts) == content                   # also an END that the text spells out
    assert (data.val == data.tokenizer.eot_token).sum() == 1

def test_folder_leaves_out_what_is_not_text(tmp_path, capsys):
    source = folder(tmp_path / "docs", 50)
    clean = nanobit.data.load_data(source, "300", 16)
    (tmp_path / "docs" / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    (tmp_path / "docs" / "binary.py").write_bytes(b"a\0b")
    (tmp_path / "docs" / "picture.png").write_bytes(b"text, but not by its name")
    capsys.readouterr()
    assert nanobit.data.load_data(source, "300", 16).digest == clean.digest
    assert "left out 2 of 52 files" in capsys.readouterr().out

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", 500 if self.path == "/cut-short" else 5)
        self.end_headers()
        self.wfile.write(b"\x1f\x8b\xff.." if self.path == "/packed" else b"hello")

    def log_message(self, *_):
        pass

def test_download_is_fetched_once_and_never_kept_in_part(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        server.paths = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        texts = [nanobit.data.download(f"{url}/whole").read_text() for _ in range(2)]
        assert texts == ["hello"] * 2
        assert server.paths == ["/whole"]
        for path in ("/missing", "/cut-short", "/packed"):
            with pytest.raises(UsageError, match=path):
                nanobit.data.download(url + path)
        server.shutdown()
    assert len(list((tmp_path / "cache" / "nanobit").iterdir())) == 1

def test_a_server_that_does_not_answer_is_named(monkeypatch):
    def open_late(url, timeout):
        raise TimeoutError("timed out")
    monkeypatch.setattr(nanobit.data.urllib.request, "urlopen", open_late)
    with pytest.raises(UsageError, match="http://127.0.0.1/a: timed out"):
        nanobit.data.download("http://127.0.0.1/a")

CLOCKS = {"stands still": lambda n: 7.0, "goes back": lambda n: 1e9 - 3600 * (n > 20)}

@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_that_is_no_good_ends_no_run(tmp_path, monkeypatch, capsys, clock):
    monkeypatch.chdir(tmp_path)
    random_base(tmp_path, 1)
    calls = []
    def bad_clock():
        calls.append(1)
        return CLOCKS[clock](len(calls))
    fine = time.perf_counter if clock == "goes back" else bad_clock    # this one never goes back
    bad_time = types.SimpleNamespace(time=bad_clock, perf_counter=fine, sleep=time.sleep)
    for room in (nanobit.cli, nanobit.data, nanobit.ranks, nanobit.train):
        monkeypatch.setattr(room, "time", bad_time)
    status, out, err = call(capsys, "model.py --data text.txt --vocab 300 --seq-len 16 --steps 10 "
                                    "--batch-size 1 --accumulate 1 --eval-every 5 --device cpu")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["seconds"] >= 0

def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(100)
    def draw(step, seed):
        return nanobit.data.batch(tokens, step, 6, 10, seed, "cpu")[0]
    x, y = nanobit.data.batch(tokens, 5, 6, 10, 7, "cpu")
    np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(draw(5, 7), x) and torch.equal(y, x + 1)
    assert not torch.equal(draw(6, 7), x) and not torch.equal(draw(5, 8), x)
    starts = torch.cat([draw(step, 0)[:, 0] for step in range(400)])
    assert starts.unique().tolist() == list(range(90))  # every window, the first and the last
