"""Tokenizers: a byte-pair encoding that is trained in seconds, tiktoken's, and Hugging Face's.

  1. `train_bpe` makes an encoding of a text: the most frequent pair of neighbours becomes a new
     token, again and again.
  2. A checkpoint keeps a tokenizer's spec, plain values; `make_tokenizer` makes it again.
  3. Texts of any length are encoded in pieces, cut where no token crosses: `spans`.
Hugging Face's own class is in hf_tokenizer.py.
"""
import array
import collections
import heapq
import os
import re

import numpy as np
import tiktoken

from model import UsageError
from nanobit.ranks import progress

# Words with their space, numbers of up to three digits, signs, white space: merges stay inside.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\w\s]|_)+|\s*[\r\n]+|\s+(?!\S)|\s+"

END = "<|endoftext|>"            # stands after every document

# ---- Training -----------------------------------------------------------------------------------

def train_bpe(docs, vocab_size):
    """Byte-pair encoding: merge the most frequent pair of neighbours until vocab_size - 1 tokens.

    docs: strings -> token bytes in order of rank, the 256 bytes first. END takes the last id.
    A merge costs as much as there are places of its pair, whatever the length of the words.
    """
    words = Words(count_words(docs))

    # The pairs, the most frequent on top. A pair may be in the heap several times, with old counts.
    heap = [(-n, pair) for pair, n in words.pairs.items()]
    heapq.heapify(heap)

    tokens = [bytes([i]) for i in range(256)]
    for new in progress(range(256, vocab_size - 1), "data: training a tokenizer, merge"):
        # Old counts are too high, never too low: a count rises only in `merge`, which returns the
        # pair, so that it is pushed anew. So one that is up to date on top is the highest.
        while heap and -heap[0][0] != words.pairs[heap[0][1]]:
            _, pair = heapq.heappop(heap)
            if words.pairs[pair]:
                heapq.heappush(heap, (-words.pairs[pair], pair))
        if not heap:                                   # every word is one token
            break

        # The new token, in the place of the pair everywhere.
        _, pair = heapq.heappop(heap)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for now in words.merge(pair, new):
            if words.pairs[now]:
                heapq.heappush(heap, (-words.pairs[now], now))
    return tokens

class Words:
    """All different words of a text as rows of symbols, and where each pair of neighbours stands.

    The words stand in one row, a gap (-1) before, between and after them. before[p] and after[p]
    are the neighbours of the symbol at p. A merge unlinks the second symbol of the pair and marks
    its place as a gap too. The arrays hold machine integers: lists would take several times more.
    """

    def __init__(self, counts):
        self.symbols = array.array("i", [-1])
        self.weights = array.array("q", [0])           # how often the text has the symbol's word
        for word, count in counts.items():
            codes = word.encode()
            self.symbols.extend(codes)
            self.symbols.append(-1)
            self.weights.extend([count] * len(codes) + [0])
        self.before = array.array("q", range(-1, len(self.symbols) - 1))
        self.after = array.array("q", range(1, len(self.symbols) + 1))

        # (left, right): how often it stands in the text, and where, by its left symbol. The places
        # may be out of date, but none is missing.
        self.pairs = collections.Counter()
        self.places = collections.defaultdict(lambda: array.array("q"))
        for p in range(1, len(self.symbols) - 1):
            pair = self.symbols[p], self.symbols[p + 1]
            if -1 not in pair:
                self.pairs[pair] += self.weights[p]
                self.places[pair].append(p)

    def merge(self, pair, new):
        """Put the symbol `new` in the place of the pair, from left to right -> the pairs that this
        brings. The counts of the pair and of those that it formed with its neighbours are lowered.
        """
        symbols, weights = self.symbols, self.weights
        before, after = self.before, self.after
        fresh = set()

        def replace(old, now, p):                      # the pair at p, next to a merged one
            self.pairs[old] -= weights[p]
            self.pairs[now] += weights[p]
            self.places[now].append(p)
            fresh.add(now)

        # A pair's places all come from the one merge that made its newer symbol, or from the start,
        # so they ascend.
        for p in self.places.pop(pair):
            q = after[p]
            if (symbols[p], symbols[q]) != pair:       # one of them was merged with another since
                continue
            left = before[p]
            right = after[q]
            self.pairs[pair] -= weights[p]
            symbols[p] = new
            symbols[q] = -1
            after[p] = right
            before[right] = p
            if symbols[left] != -1:
                replace((symbols[left], pair[0]), (symbols[left], new), left)
            if symbols[right] != -1:
                replace((pair[1], symbols[right]), (new, symbols[right]), p)
        return fresh

def count_words(docs):
    """{match of PATTERN: how often it stands in the documents}"""
    import regex                                       # comes with tiktoken
    pieces = [(doc, start, stop) for doc in docs for start, stop in spans(doc)]
    words = collections.Counter()
    for doc, start, stop in progress(pieces, "data: counting words"):
        words.update(regex.findall(PATTERN, doc[start:stop]))
    return words

# ---- The tokenizers -----------------------------------------------------------------------------

def make_tokenizer(spec):
    """The tokenizer of a spec: a name that tiktoken knows, a list of latin-1 strings in order of
    rank, or the dict of a Hugging Face folder."""
    if isinstance(spec, dict):
        from nanobit.hf_tokenizer import HFTokenizer   # it imports this file
        return HFTokenizer(spec)
    if isinstance(spec, list):
        ranks = {t.encode("latin-1"): i for i, t in enumerate(spec)}
        return BPETokenizer(tiktoken.Encoding("nanobit", pat_str=PATTERN, mergeable_ranks=ranks,
                                              special_tokens={END: len(ranks)}))
    try:
        return BPETokenizer(tiktoken.get_encoding(spec))
    except ValueError:
        raise UsageError(f"--vocab {spec} is neither a size nor one of tiktoken's encodings: "
                         + " ".join(tiktoken.list_encoding_names())) from None
    except OSError as e:                               # requests raises OSErrors
        raise UsageError(f"--vocab {spec}: tiktoken could not fetch it ({type(e).__name__}); "
                         "try a size such as --vocab 1024") from None

class Tokenizer:
    """What BPETokenizer and HFTokenizer share. `n_vocab` counts the ids, `eot_token` is END's."""
    bytes_per_decoded = 1.0      # bytes of text for each byte that decoding gives: see Data

    def spans(self, text):
        """(start, stop) of pieces of a text, whose tokens, one after the other, are the text's."""
        return spans(text)

    def encode_ordinary(self, text):
        """Ids of a text of any length, in which END and other special tokens are just text."""
        pieces = [text[start:stop] for start, stop in self.spans(text)]
        return [i for ids in self.encode_ordinary_batch(pieces) for i in ids]

    def count_bytes(self, ids):
        """Bytes of the text that the ids (n,) stand for; END stands for none."""
        # Each document by itself, because some tokenizers put a space before a document and
        # take it away again when they decode one.
        ids = np.asarray(ids)
        docs = np.split(ids, np.flatnonzero(ids == self.eot_token) + 1)
        decoded = (self.decode_bytes(doc[doc != self.eot_token].tolist()) for doc in docs)
        return self.bytes_per_decoded * sum(map(len, decoded))

class BPETokenizer(Tokenizer):
    """A byte-pair encoding that tiktoken runs: one of its own, or one of train_bpe."""

    def __init__(self, inner):
        self.inner = inner
        self.n_vocab = inner.n_vocab
        self.eot_token = inner.eot_token

    def encode_ordinary_batch(self, pieces):
        return self.inner.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)

    def decode(self, ids):
        return self.inner.decode(ids)

    def decode_bytes(self, ids):
        return self.inner.decode_bytes(ids)

# ---- Pieces -------------------------------------------------------------------------------------

# A text is encoded in pieces of about so many characters: a large file takes little memory, and
# tiktoken's patterns, which fail on a run of a million spaces, never see such a run whole.
PIECE = 2**14

# In PATTERN, as in the patterns of tiktoken's encodings, a token ends between a letter or digit
# and white space, and between the end of a line of text and a letter. No pattern looks behind, so
# a cut in such a place changes no token.
CUT = re.compile(r"(?<=[^\W_])(?=[ \t\r\n])|(?<=\S\n)(?=[^\W\d_])")

WORDS_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")       # for tokenizers of other projects

def spans(text, cut=CUT, force=True, skip=0):
    """Yield (start, stop) of the pieces of a text. They end where the pattern `cut` allows it.

    force: if PIECE characters offer no cut, cut anyway; tokens there may change, but normal text
    has no such run. skip: characters to leave out between two pieces.
    """
    start = 0
    while len(text) - start > 2 * PIECE:
        # The first place to cut after PIECE characters.
        limit = start + 2 * PIECE if force else len(text)
        found = cut.search(text, start + PIECE, limit)
        if not found:
            yield start, limit
            start = limit
            continue
        yield start, found.start()
        start = found.start() + skip
    if start < len(text):
        yield start, len(text)
