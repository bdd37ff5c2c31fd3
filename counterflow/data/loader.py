"""Samples by their global index: everything a run asks of its text.

A sample is sequence_length + 1 tokens, inputs and targets in one. The loader takes (index, count) and knows
no ranks, no batches and no position: pipes, micro-batches and data ranks take slices of the same numbering.
Not taken: an iterator with a state to save, which is what makes other loaders hard to resume. Reading is a
few memory copies, so there are no worker processes either.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor

from counterflow.config.run import Data
from counterflow.data.cache import key_of
from counterflow.data.corpus import Corpus, open_corpus
from counterflow.data.pack import Mixture, bijection, permutation
from counterflow.data.shards import PARTS, Made, Shards, is_tokenised, made_from, open_shards, tokenise
from counterflow.data.tokenizer import Tokenizer, open_tokenizer
from counterflow.errors import DataError


class Packed:
    """The samples of one source: documents in an epoch's order end to end, cut into windows. [§4.1 packing]

    Windows share one token with the next, so that each token but an epoch's first is predicted once; the
    ragged rest of an epoch (less than a sample, another one each time) is left out.
    """

    def __init__(self, shards: Shards, length: int, *keys: int) -> None:
        self.shards, self.length, self.keys = shards, length, keys
        self.num_samples = (shards.num_tokens - 1) // length
        """Of one epoch."""
        self._orders: dict[int, tuple[ndarray, ndarray]] = {}

    def read(self, numbers: Int64[ndarray, "N"], out: Int64[ndarray, "N S1"]) -> None:
        """Fill the rows of `out` with the source's samples `numbers`, counted on over all epochs."""
        epochs, turns = np.divmod(numbers, self.num_samples)
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            windows = bijection(turns[rows].astype(np.uint64), self.num_samples, *self.keys, epoch, 1)
            for row, window in zip(rows, windows.tolist()):
                self._window(epoch, window, out[row])

    def _window(self, epoch: int, window: int, out: Int64[ndarray, "S1"]) -> None:
        order, starts = self._order(epoch)
        position, filled = window * self.length, 0
        place = int(np.searchsorted(starts, position, "right")) - 1
        while filled < len(out):
            within = position + filled - int(starts[place])
            take = min(int(starts[place + 1] - starts[place]) - within, len(out) - filled)
            start = int(self.shards.offsets[order[place]]) + within
            self.shards.copy(start, out[filled : filled + take])
            filled, place = filled + take, place + 1

    def _order(self, epoch: int) -> tuple[ndarray, ndarray]:
        """The epoch's documents, and where each starts in its stream; the two latest epochs are kept."""
        if epoch not in self._orders:
            lengths = np.diff(self.shards.offsets)
            order = permutation(len(lengths), *self.keys, epoch, 0)
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = order, np.concatenate([[0], np.cumsum(lengths[order])])
        return self._orders[epoch]


@dataclass(frozen=True)
class Text:
    """What a run's tokens are made from: its sources, read through, and its tokenizer."""

    corpora: tuple[Corpus, ...]
    tokenizer: Tokenizer
    made: tuple[Made, ...]
    """The training parts of all sources, then the held-out ones."""


def open_text(data: Data, vocab_size: int, quiet: bool = False) -> Text:
    """A run's sources and tokenizer; the first use reads all of the text and learns the tokenizer."""
    cache = Path(expanduser(data.cache_dir))
    corpora = tuple(open_corpus(source, data.held_out, cache) for source in data.sources)
    tokenizer = open_tokenizer(data.tokenizer, vocab_size, corpora, cache, quiet)
    made = (made_from(corpus, part, tokenizer, data.fim_rate) for part in PARTS for corpus in corpora)
    return Text(corpora, tokenizer, tuple(made))


def tokenise_share(data: Data, vocab_size: int, share: tuple[int, int], quiet: bool = False) -> bool:
    """One process's share, (index, count), of a run's text to tokens, which are kept; whether all shares are there.

    `Samples` makes what is left and puts them together.
    """
    text, cache = open_text(data, vocab_size, quiet), Path(expanduser(data.cache_dir))
    for made in text.made:
        tokenise(made, cache, share, quiet)
    return all(is_tokenised(made, cache) for made in text.made)


class Samples:
    """The text of a run as samples. A pure function of (data, vocab_size, seed) and the index asked for.

    The first use learns the tokenizer and tokenises; later ones open what is kept in data.cache_dir.
    Fails: DataError for text, tokenizer or cache that cannot be used.
    """

    def __init__(self, data: Data, vocab_size: int, seed: int, quiet: bool = False) -> None:
        self.data, cache = data, Path(expanduser(data.cache_dir))
        weights = [source.weight for source in data.sources]
        self._mixture = Mixture(weights, seed)
        text = open_text(data, vocab_size, quiet)
        self._corpora, self.tokenizer = text.corpora, text.tokenizer
        opened = [open_shards(made, cache, quiet) for made in text.made]
        train, self._held_out = opened[: len(text.corpora)], opened[len(text.corpora) :]
        length = data.sequence_length
        self._packed = [Packed(shards, length, seed, number) for number, shards in enumerate(train)]
        self.train_tokens = sum(shards.num_tokens for shards in train)
        """Tokens of the training part, one epoch of every source, document ends and FIM signs included."""
        self.train_bytes = sum(shards.text_bytes for shards in train)
        """Bytes of its text."""
        held_tokens = sum(shards.num_tokens for shards in self._held_out)
        self.bytes_per_token = sum(shards.text_bytes for shards in self._held_out) / held_tokens
        """Held-out text over held-out tokens, ends of documents counted as tokens."""
        self.num_held_out = (held_tokens - 1) // length
        """Held-out samples; what is left, less than one sample, is not measured."""
        keys = [corpus.key for corpus in self._corpora]
        self.fingerprint = key_of(keys, self.tokenizer.hash, data.fim_rate)
        """Of texts, split, tokenizer and FIM: equal fingerprints and seeds give equal samples."""
        self._require_samples(held_tokens)

    def train(self, index: int, count: int) -> Int64[Tensor, "N S1"]:
        """Training samples index to index + count - 1 of an endless sequence."""
        out = np.empty((count, self.data.sequence_length + 1), np.int64)
        sources, numbers = self._mixture.locate(index, count)
        for source, packed in enumerate(self._packed):
            rows = np.flatnonzero(sources == source)
            taken = np.empty((len(rows), out.shape[1]), np.int64)
            packed.read(numbers[rows], taken)
            out[rows] = taken
        return torch.from_numpy(out)

    def held_out(self, index: int, count: int) -> Int64[Tensor, "N S1"]:
        """Held-out samples index to index + count - 1, of num_held_out; in order, none predicted twice."""
        assert index + count <= self.num_held_out, f"held-out samples end at {self.num_held_out}"
        length = self.data.sequence_length
        stream = np.empty(count * length + 1, np.int64)
        start, filled = index * length, 0
        for shards in self._held_out:
            take = max(0, min(shards.num_tokens - start, len(stream) - filled))
            if take:
                shards.copy(start, stream[filled : filled + take])
            filled, start = filled + take, max(0, start - shards.num_tokens)
        windows = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
        return torch.from_numpy(windows.copy())

    def train_text(self) -> Iterator[bytes]:
        """The documents trained on, as they are in the files."""
        return (document.text.encode() for corpus in self._corpora for document in corpus.train())

    def held_out_text(self) -> Iterator[bytes]:
        """The documents held out."""
        return (document.text.encode() for corpus in self._corpora for document in corpus.held_out())

    def _require_samples(self, held_tokens: int) -> None:
        length = self.data.sequence_length
        for source, packed in zip(self.data.sources, self._packed):
            if not packed.num_samples:
                raise DataError(
                    f"source '{source.path}' has {packed.shards.num_tokens} tokens to train on; one sample "
                    f"needs data.sequence_length + 1 = {length + 1}. Give more text, or lower "
                    "data.sequence_length."
                )
        if not self.num_held_out:
            raise DataError(
                f"the held-out part has {held_tokens} tokens; one sample needs data.sequence_length + 1 = "
                f"{length + 1}. Raise data.held_out (now {self.data.held_out:g}), give more text, or lower "
                "data.sequence_length."
            )
