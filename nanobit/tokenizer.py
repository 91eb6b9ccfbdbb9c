"""Tokenizers: a byte-pair encoding that is trained in seconds, tiktoken's, and Hugging Face's.

A checkpoint keeps a tokenizer's spec, plain values from which `make_tokenizer` makes it again.
Texts of any length are encoded in pieces, cut where no token crosses.
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

    force: end anywhere where it does not for PIECE characters in a row. That is no normal text,
    and the tokens at such an end may be others. skip: characters to leave out between two pieces.
    """
    start = 0
    while len(text) - start > 2 * PIECE:
        limit = start + 2 * PIECE if force else len(text)
        found = cut.search(text, start + PIECE, limit)
        stop = found.start() if found else limit
        yield start, stop
        start = stop + skip if found else stop
    if start < len(text):
        yield start, len(text)

def count_words(docs):
    """{match of PATTERN: how often it stands in the documents}"""
    import regex                                       # comes with tiktoken
    words = collections.Counter()
    pieces = [(doc, start, stop) for doc in docs for start, stop in spans(doc)]
    for doc, start, stop in progress(pieces, "data: counting words"):
        words.update(regex.findall(PATTERN, doc[start:stop]))
    return words

def train_bpe(docs, vocab_size):
    """Byte-pair encoding: merge the most frequent pair of neighbours until vocab_size - 1 tokens.

    docs: strings -> token bytes in order of rank, the 256 bytes first. END takes the last id.
    A merge costs as much as there are places of its pair, whatever the length of the words.
    """
    # All different words stand in one row of symbols, a gap (-1) before, between and after them.
    # before[p] and after[p] are the neighbours of the symbol at p; a merge unlinks the second
    # symbol of the pair and marks its place as a gap too.
    symbols, weights = array.array("i", [-1]), array.array("q", [0])
    for word, count in count_words(docs).items():
        letters = word.encode()
        symbols.extend(letters)
        symbols.append(-1)
        weights.extend([count] * len(letters) + [0])   # how often the text has the word
    before = array.array("q", range(-1, len(symbols) - 1))
    after = array.array("q", range(1, len(symbols) + 1))

    pairs = collections.Counter()                      # (left, right): how often in the text
    places = collections.defaultdict(lambda: array.array("q"))     # and where, by the left one
    for p in range(1, len(symbols) - 1):
        pair = symbols[p], symbols[p + 1]
        if -1 not in pair:
            pairs[pair] += weights[p]
            places[pair].append(p)                     # may be out of date, never incomplete

    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    for new in progress(range(256, vocab_size - 1), "data: training a tokenizer, merge"):
        # Old counts are too high, never too low: one that is up to date on top is the highest.
        while heap and -heap[0][0] != pairs[heap[0][1]]:
            _, pair = heapq.heappop(heap)
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
        if not heap:
            break
        _, pair = heapq.heappop(heap)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])

        # Merge from left to right. Each merge takes its own pair and those with both neighbours
        # from the counts, and brings two.
        fresh = set()
        for p in places.pop(pair):
            q = after[p]
            if (symbols[p], symbols[q]) != pair:       # one of them was merged with another since
                continue
            left, right = before[p], after[q]
            pairs[pair] -= weights[p]
            symbols[p], symbols[q] = new, -1
            after[p], before[right] = right, p
            if symbols[left] != -1:
                now = symbols[left], new
                pairs[symbols[left], pair[0]] -= weights[p]
                pairs[now] += weights[p]
                places[now].append(left)
                fresh.add(now)
            if symbols[right] != -1:
                now = new, symbols[right]
                pairs[pair[1], symbols[right]] -= weights[p]
                pairs[now] += weights[p]
                places[now].append(p)
                fresh.add(now)
        for now in fresh:
            if pairs[now]:
                heapq.heappush(heap, (-pairs[now], now))
    return tokens

class Tokenizer:
    """What BPETokenizer and hf.HFTokenizer share. `n_vocab` counts their ids, `eot_token` is END's.
    """
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
        self.inner, self.n_vocab, self.eot_token = inner, inner.n_vocab, inner.eot_token

    def encode_ordinary_batch(self, pieces):
        return self.inner.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)

    def decode(self, ids):
        return self.inner.decode(ids)

    def decode_bytes(self, ids):
        return self.inner.decode_bytes(ids)

def make_tokenizer(spec):
    """The tokenizer of a spec: a name that tiktoken knows, a list of latin-1 strings in order of
    rank, or the dict of a Hugging Face folder."""
    if isinstance(spec, dict):
        from nanobit.hf import HFTokenizer             # it imports this file
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
