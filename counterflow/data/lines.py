"""JSON lines, wherever they are read: numbered rows of a .jsonl or .jsonl.gz, or one sentence that names the line.

A line ends at a line feed and nowhere else: JSON may hold other separators of Unicode within its strings. What stands
beside the text that is asked for does not matter, so whole numbers of any length are read.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.errors import DataError

MARK = b"\xef\xbb\xbf"
"""Of UTF-8 at a file's start, which some writers set."""
LONGEST = 4000
"""Digits of a number that is read exactly; Python's limit is 4,300."""


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line's number, what it holds) of every line that is not blank.   Fails: DataError; OSError where the file cannot
    be read."""
    offset = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as lines:
            for number, raw in enumerate(lines, 1):
                line = decoded(raw.removeprefix(MARK) if number == 1 else raw, f"{path}:{number}", offset)
                offset += len(raw)
                if line.strip():
                    yield number, _row(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}); write it anew or leave it out.") from None


def decoded(raw: bytes, where: str, offset: int) -> str:
    """The text of bytes that begin at `offset`.   Fails: DataError that names the first which is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8; text must be "
            "UTF-8. Convert the file (iconv -t UTF-8), or leave it out."
        ) from error


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise DataError(
            f"{where} is not JSON ({why}); .jsonl holds one object a line. Mend or drop that line."
        ) from None


def _whole(digits: str) -> int | float:
    """A number longer than Python reads as an int is infinity: it is skipped, as any number is."""
    return int(digits) if len(digits) < LONGEST else float(digits)
