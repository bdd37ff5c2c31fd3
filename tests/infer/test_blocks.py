"""Blocks are shared where tokens and what the modules read beyond agree, counted, and found again until overwritten."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.infer.blocks import Blocks

pytestmark = pytest.mark.pure


def store(pool: Blocks, tokens: list[int]) -> tuple[list[int], list[int]]:
    blocks, serials = pool.match(tokens)
    assert pool.grow(blocks, len(tokens))
    pool.publish(tokens, blocks, serials, len(tokens))
    return blocks, serials


def test_a_prefix_is_found_while_held_and_after():
    pool = Blocks(10, 4, lookahead=0)
    first, _ = store(pool, list(range(10)))
    again, serials = pool.match(list(range(10)))
    assert again == first[:2] and len(serials) == 2
    pool.release(first)
    pool.release(again)
    assert pool.available == 10
    assert pool.match(list(range(9)) + [77])[0] == first[:2]


def test_one_token_is_always_left_to_run():
    pool = Blocks(10, 4, lookahead=0)
    first, _ = store(pool, list(range(8)))
    assert pool.match(list(range(8)))[0] == first[:1]


def test_the_tokens_that_modules_have_read_beyond_a_block_belong_to_it():
    pool = Blocks(10, 4, lookahead=2)
    first, serials = store(pool, [0, 1, 2, 3, 4, 5, 6, 7, 8])
    assert len(serials) == 1, "the second block's lookahead is not known yet"
    assert pool.match([0, 1, 2, 3, 4, 5, 9, 9])[0] == first[:1]
    assert pool.match([0, 1, 2, 3, 4, 9, 9, 9])[0] == []


def test_a_block_is_found_behind_its_own_predecessor_only():
    pool = Blocks(10, 2, lookahead=0)
    store(pool, [1, 1, 5, 5, 0])
    assert len(pool.match([2, 2, 5, 5, 0])[0]) == 0


def test_the_longest_unused_gives_way_and_is_then_not_found():
    pool = Blocks(4, 2, lookahead=0)
    old, _ = store(pool, [1, 1, 9])
    pool.release(old)
    new, _ = store(pool, [2, 2, 9])
    pool.release(new)
    blocks: list[int] = []
    assert pool.grow(blocks, 6)
    assert pool.match([1, 1, 9])[0] == [] and pool.match([2, 2, 9])[0] == new[:1]
    assert not pool.grow([], 4)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=1, max_size=12)), max_size=40)
)
def test_what_is_found_holds_the_very_tokens_and_nothing_leaks(turns):
    """Against a plain record of what was last written into each block."""
    pool, written, held = Blocks(12, 2, lookahead=1), {}, {}
    for who, tokens in turns:
        if who in held:
            pool.release(held.pop(who))
        blocks, serials = pool.match(tokens)
        for at, block in enumerate(blocks):
            assert written[block] == tokens[: at * 2 + 3]
        if not pool.grow(blocks, len(tokens)):
            pool.release(blocks)
            continue
        for at in range(len(serials), len(blocks)):
            written[blocks[at]] = tokens[: at * 2 + 3]
        pool.publish(tokens, blocks, serials, len(tokens))
        held[who] = blocks
    for blocks in held.values():
        pool.release(blocks)
    assert pool.available == 12
