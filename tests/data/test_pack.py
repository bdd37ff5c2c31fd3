"""FIM, scattering and mixing as arithmetic: round trips, permutations, quotas."""

from collections import Counter
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.data.pack import BLOCK, Mixture, bijection, fim_cut, permutation, quotas, scatter
from counterflow.errors import DataError


def digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=32).digest()


@given(text=st.text(max_size=30))
def test_sec4_1_fim_pieces_make_up_the_document(text: str) -> None:
    cut = fim_cut(text, blake2b(repr(text).encode(), digest_size=32).digest(), 1.0)
    assert cut is not None and cut.prefix + cut.middle + cut.suffix == text
    assert fim_cut(text, bytes(32), 0.0) is None


def test_sec4_1_fim_rate_and_cuts_are_spread() -> None:
    texts = [f"{i:010d}" for i in range(20000)]
    cuts = [cut for text in texts if (cut := fim_cut(text, digest(text), 0.1))]
    assert abs(len(cuts) / len(texts) - 0.1) < 0.0085, "four standard deviations"
    starts = Counter(len(cut.prefix) for cut in cuts)
    assert set(starts) == set(range(11)) and starts[0] > starts[10], "the lesser of two uniform cuts"
    assert Counter(len(cut.suffix) for cut in cuts).keys() == starts.keys()


@given(size=st.integers(1, 600), key=st.integers(0, 2**70))
def test_bijection_is_one(size: int, key: int) -> None:
    found = bijection(np.arange(size, dtype=np.uint64), size, key, 5)
    assert sorted(found.tolist()) == list(range(size))
    assert sorted(permutation(size, key).tolist()) == list(range(size))


def test_bijection_needs_no_table() -> None:
    size = 10**15
    found = bijection(np.arange(1000, dtype=np.uint64), size, 0)
    assert found.max() < size and len(set(found.tolist())) == 1000
    assert abs(found.mean() / size - 0.5) < 0.04, "four standard deviations"


def test_scatter_is_fixed_for_all_time() -> None:
    """Checkpoints rely on it: splitmix64 of 0 is the published first output of seed 0."""
    assert scatter(np.zeros(1, np.uint64)).tolist() == [0xE220A8397B1DCDAF]
    assert bijection(np.arange(5, dtype=np.uint64), 5, 1, 2).tolist() == [3, 2, 1, 0, 4]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_quotas_fill_the_block(weights: list[float]) -> None:
    found = quotas(weights)
    assert found.sum() == BLOCK
    assert np.abs(found - np.asarray(weights) / sum(weights) * BLOCK).max() < 1


def test_too_small_a_weight_is_refused() -> None:
    with pytest.raises(DataError, match=r"source 1 has weight 0.0001 of 1.0001 in all; .*or drop the source"):
        quotas([1.0, 0.0001])


def test_mixture_numbers_each_source_without_gaps() -> None:
    sources, numbers = Mixture([3.0, 1.0, 1.0], 7).locate(0, 5 * BLOCK)
    for source in range(3):
        own = numbers[sources == source]
        assert sorted(own.tolist()) == list(range(len(own)))


@given(index=st.integers(0, 3000), count=st.integers(1, 1500))
def test_mixture_is_the_same_however_asked(index: int, count: int) -> None:
    mixture = Mixture([3.0, 1.0], 7)
    whole, part = mixture.locate(0, index + count), mixture.locate(index, count)
    assert all((a[index:] == b).all() and len(b) == count for a, b in zip(whole, part))


def test_weights_hold_in_every_block() -> None:
    sources, _ = Mixture([3.0, 1.0], 0).locate(0, 4 * BLOCK)
    for block in sources.reshape(4, BLOCK):
        assert np.bincount(block).tolist() == [768, 256]
    assert (sources[:BLOCK] != sources[BLOCK : 2 * BLOCK]).any(), "blocks are shuffled apart"
    quarter = np.bincount(sources[: BLOCK // 4])
    assert abs(quarter[0] - 192) < 28, "mixed within the block, four standard deviations"
