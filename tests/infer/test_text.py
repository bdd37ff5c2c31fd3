"""Text comes whole: no half characters, nothing of a stop string, and together what decoding all at once gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.infer.text import TextStream

pytestmark = pytest.mark.pure


def byte(token: int) -> bytes:
    """Tokens are bytes, the hardest case."""
    return bytes([token])


def stream(data: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = TextStream(byte, stop)
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
    text = TextStream(byte, ("END",))
    assert [text.add(token) for token in b"xENE"] == ["x", "", "", "EN"]
    assert text.end() == "E"


def test_broken_bytes_do_not_hold_the_text_back():
    assert stream(bytes([0xFF]) * 3 + b"ok\xf0")[0] == ["\ufffd"] * 3 + ["o", "k", "", "\ufffd"]


@given(
    st.lists(
        st.sampled_from([b"a", b"\xff", b"\x80", b"\xe2", b"\xf0\x9f", *(bytes([x]) for x in "😀€".encode())])
    )
)
def test_an_invalid_byte_swallows_nothing_that_follows(parts):
    data = b"".join(parts)
    assert "".join(stream(data)[0]) == data.decode(errors="replace")


def test_without_a_tokenizer_there_is_no_text():
    text = TextStream(None, ())
    assert text.add(3) == "" == text.end()
