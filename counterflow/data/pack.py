"""Documents to samples: fill-in-the-middle, packing, mixing; all of it arithmetic on (seed, global sample
index).

Whether a document is rewritten prefix, suffix, middle, and where it is cut, is read off its own hash, once,
when it is tokenised. Not taken: drawing it anew each epoch, which would give every epoch another length, and
make the place of sample n depend on all samples before it. As it is, a source has a fixed number of samples
an epoch; an epoch is a permutation of documents laid end to end, cut into windows, and the windows are
visited in scattered order. So the saved position of a run is one integer, and whoever asks for samples 5 to 8
gets the same ones, however asked.

No mask keeps the documents of a sample apart, as in the report's pre-training.

The hash `scatter` is ours rather than numpy's generators, whose streams may change from release to release.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64
from numpy import ndarray

from counterflow.errors import DataError

BLOCK = 1024
"""Samples of a block of the mixture; weights are honoured to one part in this many."""
FEISTEL_ROUNDS = 4
Words = UInt64[ndarray, "N"]


@dataclass(frozen=True)
class Cut:
    """A document in three pieces, `prefix + middle + suffix`."""

    prefix: str
    middle: str
    suffix: str


def fim_cut(text: str, digest: bytes, rate: float) -> Cut | None:
    """The hole of a document that its hash chooses for FIM, or None; cuts fall between characters. [§4.1 FIM]

    A chosen document becomes `begin prefix hole suffix end middle eos`, before it is packed.
    """
    chosen, first, second = (int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in (1, 2, 3))
    if chosen >= rate * 2**64:
        return None
    start, stop = sorted(number * (len(text) + 1) >> 64 for number in (first, second))
    return Cut(text[:start], text[start:stop], text[stop:])


def scatter(values: Words, *keys: int) -> Words:
    """A keyed hash of 64-bit numbers: splitmix64's finaliser, once for each key and once for the value."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _finalise(state + np.asarray([key % 2**64], np.uint64))
    return _finalise(values ^ state)


def _finalise(z: Words) -> Words:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(size: int, *keys: int) -> Int64[ndarray, "N"]:
    """All numbers below size in a keyed order."""
    return np.argsort(scatter(np.arange(size, dtype=np.uint64), *keys), kind="stable")


def bijection(values: Words, size: int, *keys: int) -> Words:
    """Where a keyed permutation of the numbers below size sends each value, without holding it.

    A Feistel network permutes the next even power of two; what falls outside goes round again.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out, todo = values.copy(), np.ones(len(values), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (scatter(right, *keys, turn) & mask)
        out[todo] = (left << half) | right
        todo = out >= np.uint64(size)
    return out


class Mixture:
    """Which source the global sample i comes from, and as its how-many-th, by blocks with fixed quotas."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.quotas, self.seed = quotas(weights), seed

    def locate(self, index: int, count: int) -> tuple[Int64[ndarray, "N"], Int64[ndarray, "N"]]:
        """For samples index to index + count - 1: the source, and how many of its samples come before."""
        blocks = range(index // BLOCK, (index + count - 1) // BLOCK + 1)
        sources, numbers = zip(*(self._block(block) for block in blocks))
        inside = slice(index - blocks[0] * BLOCK, index - blocks[0] * BLOCK + count)
        return np.concatenate(sources)[inside], np.concatenate(numbers)[inside]

    def _block(self, block: int) -> tuple[ndarray, ndarray]:
        """Source of each sample of a block, and its number among that source's samples."""
        owners = np.repeat(np.arange(len(self.quotas)), self.quotas)
        ranks = np.arange(BLOCK) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        order = permutation(BLOCK, self.seed, block)
        return owners[order], (block * self.quotas[owners] + ranks)[order]


def quotas(weights: Sequence[float]) -> Int64[ndarray, "N"]:
    """Samples of each source in a block, by largest remainder. Fails: DataError where a weight gives none."""
    shares = np.asarray(weights, np.float64) / sum(weights) * BLOCK
    found = np.floor(shares).astype(np.int64)
    found[np.argsort(found - shares, kind="stable")[: BLOCK - found.sum()]] += 1
    if not found.all():
        small = int(np.argmin(found))
        raise DataError(
            f"source {small} has weight {weights[small]:g} of {sum(weights):g} in all; samples are mixed in "
            f"blocks of {BLOCK}, so each source needs about 1/{BLOCK} of the weight. Raise it, or drop the "
            "source."
        )
    return found
