"""A prompt to tokens, and tokens to text as they come: whole characters, and nothing that may belong to a stop string.

A character may take several tokens and a stop string may end in the middle of one, so text is given out late: the
bytes of a character until it is whole, or until a byte comes that it cannot have, and the longest end of the text that
could still grow into a stop string.
"""

from codecs import getincrementaldecoder
from collections.abc import Callable

from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import RequestError


def document(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token that begins a document, and the text's ids.   Fails: RequestError on half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text cannot be written as UTF-8 ({error.reason}); send whole characters."
        ) from None
    return [tokenizer.bos, *tokenizer.encode(text)]


class TextStream:
    """One sequence's text."""

    def __init__(self, bytes_of: Callable[[int], bytes] | None, stop: tuple[str, ...]) -> None:
        self._bytes_of, self._stop = bytes_of, stop
        self._characters = getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; what follows it is not given out."""

    def add(self, token: int) -> str:
        """The text that may be given out once this token is there."""
        if self._bytes_of is None or self.stopped:
            return ""
        return self._given(self._characters.decode(self._bytes_of(token)))

    def end(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        rest = self._given(self._characters.decode(b"", final=True))
        rest, self._held = rest + ("" if self.stopped else self._held), ""
        return rest

    def _given(self, new: str) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
