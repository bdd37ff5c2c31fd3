"""JSON lines, wherever they are read: numbered rows of a .jsonl, packed or not, or one sentence that names the line.

A line ends at a line feed and nowhere else: JSON may hold other separators of Unicode within its strings. What stands
beside the text that is asked for does not matter, so whole numbers of any length are read.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

from counterflow.errors import DataError, installing
from counterflow.notation import from_json

MARK = "\ufeff"
"""Of UTF-8 at a file's start, which some writers set."""
GZIP, ZSTD = PACKED = (".gz", ".zst")


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line's number, what it holds) of every line that is not blank.   Fails: DataError; OSError where the file cannot
    be read."""
    offset = 0
    with opened(path) as lines:
        for number, raw in enumerate(lines, 1):
            line = decoded(raw, f"{path}:{number}", offset)
            offset += len(raw)
            if line.strip():
                yield number, _row(line, f"{path}:{number}")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where its ending says that they are packed.

    Fails: DataError where they are not whole, or nothing unpacks them here.
    """
    ending = path.suffix.lower()
    try:
        with (
            gzip.open(path) if ending == GZIP else _zstd(path) if ending == ZSTD else open(path, "rb") as file
        ):
            yield cast("IO[bytes]", file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}); write it anew or leave it out.") from None


def _zstd(path: Path) -> BufferedReader:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{path} is packed with zstd, which pyarrow unpacks, and that is not installed: unpack it, or "
            f"{installing('parquet')}."
        ) from error
    return BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def decoded(raw: bytes, where: str, offset: int) -> str:
    """The text of bytes that begin at `offset`, without the mark of a file's start, which joined files have within.

    Fails: DataError that names the first which is not UTF-8.
    """
    try:
        return raw.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8; text must be "
            "UTF-8. Convert the file (iconv -f ENCODING -t UTF-8), or leave it out."
        ) from error


def _row(line: str, where: str) -> Any:
    try:
        return from_json(line)
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON ({error}); .jsonl holds one object a line. Mend or drop that line."
        ) from None
