"""What counting alone reaches: n-gram models of bytes, the baseline under every loss a trained model reports.

Orders 1 to 6 are fitted on the whole training part and measured on the held-out part, in bits per byte, so
that a language model with any tokenizer can be put beside them. Each order mixes what it counted with the
order below by Witten and Bell's weights (interpolated; method C of Witten & Bell 1991, as in Chen & Goodman
1999, §2.4), down to the uniform distribution over 257 symbols: the bytes and the end of a document, which
costs bits but is no byte, as a language model's end token does. Not taken: modified Kneser-Ney, a few percent
better on words, which asks for three discounts an order; and dictionaries, which at 12 million positions need
gigabytes. Contexts are 64-bit keys of nine bits a symbol, sorted. Nothing is seen across the start of a
document: what lies before it counts as ends.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt64
from numpy import ndarray

from counterflow.config.run import Data
from counterflow.data.corpus import open_corpus

END = 256
SYMBOLS = 257
BITS = np.uint64(9)
"""Of a symbol in a key; seven symbols fit in 64."""
Keys = UInt64[ndarray, "N"]


@dataclass(frozen=True)
class Level:
    """What one order counted: grams (context, then symbol) and contexts, sorted."""

    grams: UInt64[ndarray, "G"]
    counts: Int64[ndarray, "G"]
    contexts: UInt64[ndarray, "C"]
    totals: Int64[ndarray, "C"]
    followers: Int64[ndarray, "C"]
    """Different symbols seen after the context."""


def symbols(documents: Iterable[bytes]) -> Keys:
    """All documents as symbols, each followed by END."""
    end = np.full(1, END, np.uint64)
    pieces = [part for text in documents for part in (np.frombuffer(text, np.uint8), end)]
    return np.concatenate(pieces, dtype=np.uint64, casting="unsafe") if pieces else np.empty(0, np.uint64)


def histories(stream: Keys, length: int) -> list[Keys]:
    """The symbol 1, 2, ... `length` places back; END from the start of the document on."""
    before: list[Keys] = []
    for back in range(1, length + 1):
        shifted = np.full(len(stream), END, np.uint64)
        shifted[back:] = stream[:-back]
        before.append(np.where(before[-1] == END, np.uint64(END), shifted) if before else shifted)
    return before


def keys(stream: Keys, order: int) -> Keys:
    """Each position's gram: the order − 1 symbols before it, the oldest in the highest bits, then its own."""
    key = np.zeros(len(stream), np.uint64)
    for symbol in [*reversed(histories(stream, order - 1)), stream]:
        key = (key << BITS) | symbol
    return key


def count(stream: Keys, order: int) -> Level:
    """The counts of one order."""
    grams, counts = np.unique(keys(stream, order), return_counts=True)
    contexts, first = np.unique(grams >> BITS, return_index=True)
    totals = np.add.reduceat(counts, first)
    return Level(grams, counts, contexts, totals, np.diff(np.append(first, len(grams))))


def look_up(table: UInt64[ndarray, "G"], values: Int64[ndarray, "G"], wanted: Keys) -> Int64[ndarray, "N"]:
    """The value at each wanted key, 0 where the table has none."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[place] == wanted, values[place], 0)


class NGram:
    """Interpolated Witten-Bell models of every order from 1 on, fitted together."""

    def __init__(self, documents: Iterable[bytes], order: int = 6) -> None:
        stream = symbols(documents)
        self.levels = [count(stream, n) for n in range(1, order + 1)]

    def probabilities(self, grams: Keys) -> list[Float64[ndarray, "N"]]:
        """p(last symbol | those before it) under each order, of grams keyed at the highest order.

        p_n = (c(h, w) + T(h) p_{n-1}) / (c(h) + T(h)), where T(h) counts the different symbols seen after h.
        """
        below, found = np.full(len(grams), 1 / SYMBOLS), []
        for n, level in enumerate(self.levels, 1):
            wanted = grams & np.uint64((1 << (int(BITS) * n)) - 1)
            context = wanted >> BITS
            seen = look_up(level.grams, level.counts, wanted)
            total = look_up(level.contexts, level.totals, context)
            kinds = look_up(level.contexts, level.followers, context)
            mixed = (seen + kinds * below) / np.maximum(total + kinds, 1)
            below = np.where(total > 0, mixed, below)
            found.append(below)
        return found

    def bits_per_byte(self, documents: Iterable[bytes]) -> list[float]:
        """−log2 p of all symbols, ends included, over the bytes; one number an order."""
        stream = symbols(documents)
        num_bytes = int((stream != END).sum())
        found = self.probabilities(keys(stream, len(self.levels)))
        return [float(-np.log2(p).sum()) / num_bytes for p in found]


def measure(data: Data, order: int = 6) -> dict[str, Any]:
    """The baseline of a run's text: bits per byte of each order, and what it was measured on."""
    cache, start = Path(expanduser(data.cache_dir)), time.perf_counter()
    corpora = [open_corpus(source, data.held_out, cache) for source in data.sources]
    train = [document.text.encode() for corpus in corpora for document in corpus.train()]
    held_out = [document.text.encode() for corpus in corpora for document in corpus.held_out()]
    bits = NGram(train, order).bits_per_byte(held_out)
    return {
        "corpora": {corpus.source.path: corpus.survey.hash for corpus in corpora},
        "held_out": data.held_out,
        "train_documents": len(train),
        "train_bytes": sum(map(len, train)),
        "held_out_documents": len(held_out),
        "held_out_bytes": sum(map(len, held_out)),
        "bits_per_byte": {str(n): value for n, value in enumerate(bits, 1)},
        "seconds": time.perf_counter() - start,
    }
