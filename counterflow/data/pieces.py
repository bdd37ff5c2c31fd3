"""A long text in pieces that the tokenizers library can take.

It takes some 140 bytes for each character that it is given at once, learns from a word in time with the word's
square, and throws a panic where a pattern has too much to try. So a text goes to it in pieces, cut where words begin,
and a word without an end is cut before anything is learnt from it. Not taken: one more step in the vocabulary's own
splitting, half as much time again for texts that need none of this.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from counterflow.errors import DataError, first_line

PIECE = 2**18
"""Characters of a piece at most."""
LONGEST_WORD = 1000
"""Characters of a word that merges are learnt from; the rest of it is another word. What has no spaces, such as DNA, is
one word."""
SPACES = re.compile(rf"\s{{{LONGEST_WORD}}}")
WORD = re.compile(
    rf"[^\s\d!-/:-@\[-`{{-~、-〿！-／：-＠]{{{LONGEST_WORD}}}|[^\w\s]{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}"
)
"""So much of what may be one word: letters with their marks, signs, or spaces."""
CUTS = (re.compile(r"\S\n(?=[^\W\d_])"), re.compile(r"\S(?= [^\W\d_])"))
"""Where a text is cut, the first one rather: words begin there, so that the ids are those of the whole text."""
SEARCHED = 2**13
"""Characters before a piece's end in which a cut is looked for; without one it is cut at its end."""


def pieces(text: str, most: int = PIECE) -> Iterator[str]:
    """The text in pieces of at most so many characters, cut where a word begins as far as there are words."""
    start = 0
    while len(text) - start > most:
        end = start + most
        nearest = (list(cut.finditer(text, max(start, end - SEARCHED), end)) for cut in CUTS)
        cut = next((found[-1].end() for found in nearest if found), end)
        yield text[start:cut]
        start = cut
    yield text[start:]


def without_long_words(piece: str) -> Iterator[str]:
    """The piece, cut wherever a word in it is too long to learn from."""
    start = 0
    if SPACES.search(piece) or max(map(len, piece.split()), default=0) >= LONGEST_WORD:
        for word in WORD.finditer(piece):
            yield piece[start : word.end()]
            start = word.end()
    yield piece[start:]


@contextmanager
def one_line(*texts: str) -> Iterator[None]:
    """Say as a user's error what ends the library, which throws a panic that nothing else catches."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        longest = f" The longest has {max(map(len, texts))} characters." if texts else ""
        raise DataError(
            f"the tokenizer cannot take these texts ({first_line(error)}).{longest} Long runs without words, such as "
            "spaces, are what it fails at: leave them out, or give another tokenizer."
        ) from error
