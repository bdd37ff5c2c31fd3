"""Text comes whole: no half characters, nothing of a stop string, and together what decoding all at once gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.infer.text import TextStream

pytestmark = pytest.mark.pure


def decode(tokens) -> str:
    """Tokens are bytes, the hardest case."""
    return bytes(tokens).decode("utf-8", errors="replace")


def stream(data: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = TextStream(decode, stop)
    pieces = []
    for token in data:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces, True
    return [*pieces, text.end()], text.stopped


@given(st.text(max_size=30))
def test_pieces_make_up_the_text_and_each_is_whole(text):
    pieces, stopped = stream(text.encode())
    assert "".join(pieces) == text and not stopped
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_before_it(text, stops):
    pieces, stopped = stream(text.encode(), tuple(stops))
    given = "".join(pieces)
    assert stopped == any(stop in text for stop in stops)
    assert not any(stop in given for stop in stops)
    assert text.startswith(given)
    if stopped:
        ends = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        first = [text.index(stop) for stop in stops if stop in text[:ends]]
        assert given == text[: min(first)]
    else:
        assert given == text


def test_text_that_may_become_a_stop_is_held_back_and_then_given():
    text = TextStream(decode, ("END",))
    assert [text.add(token) for token in b"xENE"] == ["x", "", "", "EN"]
    assert text.end() == "E"


def test_broken_bytes_do_not_hold_the_text_back_for_ever():
    pieces, _ = stream(bytes([0xFF]) * 12 + b"ok")
    assert "".join(pieces[:-1]).endswith("ok") or "".join(pieces).endswith("ok")
    assert sum(map(bool, pieces)) > 2


def test_without_a_tokenizer_there_is_no_text():
    text = TextStream(None, ())
    assert text.add(3) == "" == text.end()
