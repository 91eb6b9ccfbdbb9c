"""model.py's tokenizer and data against oracles: where the tokens come from and who sees them.

Tokenizer: a trainer that recounts every pair at every merge; text that comes back unchanged.
Splits: every file carries its name, so the decoded parts say which files they hold. Caching and
downloads: counted calls, a small server on this machine. Bits per byte: worked out by hand.
"""
import collections
import http.server
import math
import random
import re
import threading

import numpy as np
import pytest
import regex
import torch

import model
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

    def __init__(self):
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return None, torch.tensor(math.log(512))

def test_bits_per_byte_by_hand():
    enc = model.make_tokenizer(byte_tokens())
    tokens = enc.encode("aé\n") + [enc.eot_token] + enc.encode("€")        # 1 + 2 + 1, END, 3
    scores = model.evaluate(Uniform(), np.array(tokens), 4, enc)
    assert scores["bits_per_byte"] == pytest.approx(7 * 9 / 6)             # "a" is not predicted

def byte_tokens(corpus=(), size=257):
    return [t.decode("latin-1") for t in model.train_bpe(corpus, size)]

ODD = ["", " ", "\n", "a", "  a  b\t\tc\r\n\r\n  ", "x" * 300, "1234567890 12.5e-3",
       "d\u00e9j\u00e0 vu \u00df \ufb01 \u0130", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9",
       "\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f", "e\u0301 \u00a0\u2003\u200b\ufeff|\x00\x7f",
       "\u202eabc", "\U0010ffff", "<|endoftext|>", "if x:\n\tpass  \n", "__init__(self, *a)"]

@pytest.mark.parametrize("sample", ODD, ids=ascii)
@pytest.mark.parametrize("size", [257, 320])
def test_tokenizer_gives_back_any_text(sample, size):
    enc = model.make_tokenizer(byte_tokens(ODD + [text(2000)], size))
    assert enc.decode(enc.encode_ordinary(sample)) == sample
    assert enc.n_vocab == size and enc.eot_token == size - 1

CORPORA = [[text(4000)], ["aaaaaaa aaa aa aaaa bbbaaabbb"] * 3, ODD + [text(500, 1)], ["ab"]]

@pytest.mark.parametrize("corpus", CORPORA, ids=("words", "runs", "odd", "tiny"))
def test_bpe_merges_the_most_frequent_pair_at_every_step(corpus):
    words = collections.Counter(w for doc in corpus for w in regex.findall(model.PATTERN, doc))
    counts, words = words, {w: [bytes([b]) for b in w.encode()] for w in words}
    tokens = model.train_bpe(corpus, 330)
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
    data = model.load_data(folder(tmp_path / "docs", 80), "300", 16)
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
    data = model.load_data(str(tmp_path / "docs"), "300", 16)
    assert "QZQZ" in data.tokenizer.decode(data.val.tolist())
    assert len(data.spec) > 257 and not any("QZ" in token for token in data.spec)

def test_one_file_is_split_by_position(tmp_path):
    (tmp_path / "a.txt").write_text(text(20000))
    data = model.load_data(str(tmp_path / "a.txt"), "300", 16)
    parts = [data.tokenizer.decode(p[:-1].tolist()) for p in (data.train, data.dev, data.val)]
    assert "".join(parts) == text(20000)
    assert [len(p) / len(text(20000)) for p in parts] == pytest.approx([0.9, 0.05, 0.05], abs=1e-3)

def test_end_token_stands_between_a_few_files_too(tmp_path):
    data = model.load_data(folder(tmp_path / "docs", 8, 4000), "300", 16)
    ends = sum((p == data.tokenizer.eot_token).sum() for p in (data.train, data.dev, data.val))
    assert ends >= 8

def test_cached_tokens_are_the_same_and_follow_content_and_settings(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(text(20000))
    first = model.load_data(str(path), "300", 16)
    calls, tokenize = [], model.tokenize
    monkeypatch.setattr(model, "tokenize", lambda *a: calls.append(a) or tokenize(*a))
    again = model.load_data(str(path), "300", 16)
    assert not calls and again.spec == first.spec and again.digest == first.digest
    assert all((getattr(again, p) == getattr(first, p)).all() for p in ("train", "dev", "val"))
    model.load_data(str(path), "1024", 16, spec=first.spec)        # as a checkpoint's data is read
    assert not calls
    model.load_data(str(path), "301", 16)
    path.write_text(text(20000) + "!")
    model.load_data(str(path), "300", 16)
    assert len(calls) == 2

def test_a_damaged_cache_is_made_again(tmp_path):
    source = folder(tmp_path / "docs", 50)
    first = model.load_data(source, "300", 16)
    for cached in (tmp_path / "cache" / "nanobit").iterdir():
        cached.write_bytes(cached.read_bytes()[:100])
    assert (model.load_data(source, "300", 16).train == first.train).all()

def test_folder_leaves_out_what_is_not_text(tmp_path, capsys):
    source = folder(tmp_path / "docs", 50)
    clean = model.load_data(source, "300", 16)
    (tmp_path / "docs" / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    (tmp_path / "docs" / "binary.py").write_bytes(b"a\0b")
    (tmp_path / "docs" / "picture.png").write_bytes(b"text, but not by its name")
    capsys.readouterr()
    assert model.load_data(source, "300", 16).digest == clean.digest
    assert "left out 2 of 52 files" in capsys.readouterr().out

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", 5 if self.path == "/whole" else 500)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_):
        pass

def test_download_is_fetched_once_and_never_kept_in_part(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        server.paths = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert [model.download(f"{url}/whole").read_text() for _ in range(2)] == ["hello"] * 2
        assert server.paths == ["/whole"]
        for path in ("/missing", "/cut-short"):
            with pytest.raises(UsageError, match=path):
                model.download(url + path)
        server.shutdown()
    assert len(list((tmp_path / "cache" / "nanobit").iterdir())) == 1

def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(100)
    def draw(step, seed):
        return model.batch(tokens, step, 6, 10, seed, "cpu")[0]
    x, y = model.batch(tokens, 5, 6, 10, 7, "cpu")
    np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(draw(5, 7), x) and torch.equal(y, x + 1)
    assert not torch.equal(draw(6, 7), x) and not torch.equal(draw(5, 8), x)
    starts = torch.cat([draw(step, 0)[:, 0] for step in range(400)])
    assert starts.unique().tolist() == list(range(90))  # every window, the first and the last
