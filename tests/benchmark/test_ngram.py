"""Byte n-grams: a distribution for every context, and the same numbers as counting with dictionaries."""

from collections import Counter, defaultdict
from math import log2
from random import Random

import numpy as np
import pytest

from counterflow.benchmark.ngram import END, SYMBOLS, NGram, keys, measure, symbols
from counterflow.config.run import Data, Source

TRAIN = [b"the cat sat on the mat\n", b"a dog sat on a log\n", b"\x00\xff\x80" * 5, b"a"]
HELD_OUT = [b"the dog sat\n", b"zebra", b"on the log"]


class Plain:
    """Interpolated Witten-Bell with dictionaries, written down from the formula."""

    def __init__(self, documents: list[bytes], order: int) -> None:
        self.counts = [defaultdict(Counter) for _ in range(order)]
        for text in documents:
            for history, symbol in positions(text, order):
                for n, table in enumerate(self.counts):
                    table[history[len(history) - n :]][symbol] += 1

    def p(self, history: tuple[int, ...], symbol: int, n: int) -> float:
        if n == 0:
            return 1 / SYMBOLS
        below = self.p(history, symbol, n - 1)
        seen = self.counts[n - 1].get(history[len(history) - n + 1 :])
        if not seen:
            return below
        return (seen[symbol] + len(seen) * below) / (seen.total() + len(seen))


def positions(text: bytes, order: int):
    past = [END] * (order - 1)
    for symbol in [*text, END]:
        yield tuple(past[len(past) - order + 1 :]), symbol
        past.append(symbol)


@pytest.mark.pure
def test_equals_dictionaries() -> None:
    order = 6
    plain, found = Plain(TRAIN, order), NGram(TRAIN, order).bits_per_byte(HELD_OUT)
    for n, bits in enumerate(found, 1):
        wanted = sum(-log2(plain.p(h, s, n)) for text in HELD_OUT for h, s in positions(text, order))
        assert bits == pytest.approx(wanted / sum(map(len, HELD_OUT)), rel=1e-12)


@pytest.mark.pure
def test_probabilities_of_every_context_sum_to_one() -> None:
    random, model = Random(0), NGram(TRAIN, 6)
    seen = keys(symbols(TRAIN), 6) >> np.uint64(9)
    contexts = [
        *seen[::3].tolist(),
        *(sum(random.randrange(257) << 9 * i for i in range(5)) for _ in range(20)),
    ]
    for context in contexts:
        grams = np.asarray([context << 9 | symbol for symbol in range(SYMBOLS)], np.uint64)
        for p in model.probabilities(grams):
            assert p.min() > 0
            assert p.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.pure
def test_documents_do_not_see_each_other() -> None:
    """Only what a document holds counts, so their order does not."""
    one, other = NGram(TRAIN, 4), NGram(TRAIN[::-1], 4)
    assert one.bits_per_byte(HELD_OUT) == other.bits_per_byte(HELD_OUT)
    assert one.bits_per_byte(HELD_OUT) == pytest.approx(one.bits_per_byte(HELD_OUT[::-1]), rel=1e-12)


@pytest.mark.pure
def test_measure_reads_both_parts_of_a_run(tmp_path) -> None:
    text = "".join(f"line {i % 7} of a text\n" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    data = Data(sources=(Source(str(tmp_path / "book.txt")),), cache_dir=str(tmp_path / "cache"))
    found = measure(data, 3)
    assert found["train_bytes"] + found["held_out_bytes"] == len(text)
    bits = list(found["bits_per_byte"].values())
    assert bits == sorted(bits, reverse=True) and bits[-1] < 1.5
