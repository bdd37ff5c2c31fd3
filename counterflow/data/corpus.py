"""Where text comes from, and which of it is never trained on.

The default corpus is the running Python's own standard library: real text that is on every machine without a
download, of the kind that HumanEval asks for. It is under the PSF licence, is read in place and never
redistributed. It differs a little from one Python version to the next, so a corpus is known by the hash of
its texts, never by its name. Left out: tests, bundled wheels, what was built on this machine (its paths),
whatever was installed later, and tables written as code, which taught a small model to write tables.

A text is held out when its own hash says so: no list to keep, no dependence on order or on file names, and
two copies of one text always fall on the same side. Not taken: a random split by position, which moves when a
file is added. Where hashing leaves one side empty (a single book, a handful of notes), the tail of every
document is held out.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import NamedTuple

from counterflow.config.run import Source
from counterflow.data.cache import build_once, key_of
from counterflow.data.files import LINES, TEXT, files, form
from counterflow.data.lines import decoded, opened, rows
from counterflow.errors import DataError, nearest
from counterflow.notation import sealed, unsealed
from counterflow.progress import watched

VERSION = 1
"""Raised when the same texts would give another split."""
SURVEYS = 2
"""Raised when the same files would give other documents."""


class Document(NamedTuple):
    """One text; `name` says where it stands, `digest` (32 bytes) decides its side and its FIM cuts."""

    name: str
    text: str
    digest: bytes


@dataclass(frozen=True)
class Survey:
    """What one pass over a source found."""

    hash: str
    """Of all texts in order."""
    documents: int
    bytes: int
    tails: bool
    """Held out are the documents' tails, since hashing left one side empty."""


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, in two parts. Iterators read the files anew each time."""

    source: Source
    share: float
    """The share held out."""
    survey: Survey

    def train(self) -> Iterator[Document]:
        """The documents trained on."""
        for document in documents(self.source):
            if self.survey.tails:
                head = document.text[: tail_start(document.text, self.share)]
                if head:
                    yield document._replace(text=head)
            elif not is_held_out(document.digest, self.share):
                yield document

    def held_out(self) -> Iterator[Document]:
        """The documents never trained on."""
        for document in documents(self.source):
            if self.survey.tails:
                tail = document.text[tail_start(document.text, self.share) :]
                if tail:
                    yield document._replace(text=tail)
            elif is_held_out(document.digest, self.share):
                yield document

    @property
    def key(self) -> str:
        """Names texts and split."""
        return key_of("corpus", VERSION, self.survey.hash, self.share)


def open_corpus(source: Source, share: float, cache: Path) -> Corpus:
    """A source, surveyed once: the result is kept under the sizes and times of its files.

    Fails: DataError if there is no text, or none on one of the two sides.
    """
    folder = survey_folder(source, share, cache)
    build_once(folder, lambda new: (new / "survey.json").write_text(sealed(asdict(survey(source, share)))))
    try:
        found = Survey(**unsealed((folder / "survey.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder} is damaged ({error}); delete that folder, it is rebuilt.") from error
    return Corpus(source, share, found)


def survey_folder(source: Source, share: float, cache: Path) -> Path:
    """Where what was found in a source is kept."""
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files(source)]
    return cache / "corpora" / key_of(SURVEYS, os.path.abspath(source.path), source.field, share, stats)


def survey(source: Source, share: float) -> Survey:
    """Reads all of a source once."""
    total, num, size, num_held, any_split = blake2b(digest_size=16), 0, 0, 0, False
    for document in watched(documents(source), f"reading {PurePath(source.path).name}", unit="documents"):
        total.update(document.digest)
        num, size = num + 1, size + len(document.text.encode())
        num_held += is_held_out(document.digest, share)
        any_split |= 0 < tail_start(document.text, share) < len(document.text)
    if not num:
        raise DataError(
            f"source '{source.path}' holds no text: its documents are empty or blank. Give files with text, "
            "or the right key or column as its field."
        )
    tails = num_held in (0, num)
    if share == 0 or (tails and not any_split):
        raise DataError(
            f"data.held_out is {share:g} and source '{source.path}' has {num} document(s), {size} bytes, "
            "which leaves nothing for training or nothing held out; both are needed. Give more text, or set "
            "data.held_out=0.1."
        )
    return Survey(total.hexdigest(), num, size, tails)


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document's hash, read as a number from 0 to 1, falls under the share."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


def tail_start(text: str, share: float) -> int:
    """Where the held-out tail begins: after the last line break before the share, else right there."""
    cut = int(len(text) * (1 - share))
    return text.rfind("\n", 0, cut) + 1 or cut


def documents(source: Source) -> Iterator[Document]:
    """All documents of a source that are not blank, files in sorted order."""
    for name, path in files(source):
        for where, text in _texts(name, path, source.field):
            if not text.strip():
                continue
            try:
                yield Document(where, text, blake2b(text.encode(), digest_size=32).digest())
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{path}: the text of {where} holds half a surrogate pair at character {error.start}; "
                    "text must be Unicode. Escape the whole pair, or drop that row."
                ) from error


def _texts(name: str, path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(where, text) of one file."""
    try:
        if form(path) in TEXT:
            with opened(path) as file:
                yield name, decoded(file.read(), str(path), 0)
        elif form(path) == LINES:
            yield from _jsonl(name, path, field)
        else:
            yield from _parquet(name, path, field)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error}. Allow reading it, or leave it out of data.sources."
        ) from error


def _jsonl(name: str, path: Path, field: str) -> Iterator[tuple[str, str]]:
    for number, row in rows(path):
        where = f"{path}:{number}"
        known = row.keys() if isinstance(row, dict) else ()
        if field not in known:
            raise _no_field(where, field, known)
        if not isinstance(row[field], str):
            raise DataError(
                f"{where}: '{field}' is {type(row[field]).__name__}; it must be a string. Name "
                "another key as the source's field, or mend that line."
            )
        yield f"{name}:{number}", row[field]


def _parquet(name: str, path: Path, field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is parquet, which needs pyarrow, and that is not installed: pip install pyarrow."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(str(path), field, file.schema_arrow.names)
            column, number = file.schema_arrow.field(field).type, 0
            if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
                raise DataError(
                    f"{path}: column '{field}' is {column}; it must hold strings. Name another as the "
                    "source's field."
                )
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{name}:{number}", text or ""
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is no readable parquet file ({error}); write it anew or leave it out."
        ) from error


def _no_field(where: str, field: str, known: object) -> DataError:
    names = [str(name) for name in known] if known else []  # type: ignore[union-attr]
    hint = nearest(field, names) if names else "it holds no object with keys."
    if "messages" in names:
        hint += " Conversations are not trained on yet: there is no chat template."
    return DataError(f"{where} has no '{field}'; a source's field must name where its text is: {hint}")
