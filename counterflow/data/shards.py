"""Token shards: documents tokenised once and mapped into memory from then on.

A folder holds the tokens of one part (training or held out) of one source: plain .npy files of uint16 or
uint32, cut between documents, the int64 document boundaries over all of them, and a manifest with what they
were made from and the size and crc32 of each. Not taken: tokenising on the fly, which costs more than a small
model's step, and one growing file, which cannot be checked as a whole. Opening reads everything once for the
checksums, so the first epoch finds it in the page cache.

While it grows the folder has another name. Each shard is the tokens of so much text, whoever makes it: several
processes each make a share of them, and what a killed one has made is kept. Each reads all of the text, which takes
a fraction of the time that tokenising it does.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from secrets import token_hex
from typing import IO, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from counterflow.data.cache import finish_once, in_place_of, key_of, locked
from counterflow.data.corpus import Corpus, Document
from counterflow.data.pack import fim_cut
from counterflow.data.pieces import pieces
from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import DataError
from counterflow.notation import from_json, sealed, unsealed
from counterflow.progress import Progress, sized
from counterflow.units import bytes_

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")
ALONE = (0, 1)
SHARD_BYTES = 2**26
"""Text of a shard, and at most one document more: what is held in memory, and what a killed process loses."""
COUNTED, MANIFEST = "counted.json", "manifest.json"
BATCH_BYTES = 2**20
"""Text that is tokenised at once."""
VERSION = 2
"""Raised when the same text would give other tokens."""


@dataclass(frozen=True)
class Shards:
    """The tokens of one part of one source, in the source's order of documents."""

    tokens: tuple[ndarray, ...]
    """Mapped files, one after the other."""
    starts: ndarray
    """int64, where each shard starts; one more at the end."""
    offsets: ndarray
    """int64, where each document starts; one more at the end."""
    text_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens, ends of documents included."""
        return int(self.offsets[-1])

    def copy(self, start: int, out: Integer[ndarray, "N"]) -> None:
        """Fill `out` with the tokens from `start` on."""
        filled, shard = 0, int(np.searchsorted(self.starts, start, "right")) - 1
        while filled < len(out):
            within = start + filled - int(self.starts[shard])
            piece = self.tokens[shard][within : within + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1


class Made(NamedTuple):
    """What token shards are made from: a part of a corpus, in the words of a tokenizer."""

    corpus: Corpus
    part: Part
    tokenizer: Tokenizer
    rate: float
    """Share of documents with a hole; of the held-out part 0."""

    def documents(self) -> Iterator[Document]:
        """Those of the part."""
        return self.corpus.train() if self.part == "train" else self.corpus.held_out()


def made_from(corpus: Corpus, part: Part, tokenizer: Tokenizer, fim_rate: float) -> Made:
    """FIM is for training alone.   Fails: DataError where the tokenizer has no signs for it."""
    rate = fim_rate if part == "train" else 0.0
    if rate and tokenizer.fim is None:
        raise DataError(
            f"data.fim_rate is {rate:g} but the tokenizer has no FIM tokens; documents with a hole need "
            "<|fim_begin|>, <|fim_hole|> and <|fim_end|>. Set data.fim_rate=0, or give a tokenizer that has "
            "them."
        )
    return Made(corpus, part, tokenizer, rate)


def open_shards(made: Made, cache: Path, quiet: bool = True, shard_bytes: int = SHARD_BYTES) -> Shards:
    """The shards of one part, tokenised now as far as they are not there yet."""
    folder = shards_folder(made, cache, shard_bytes)
    if not folder.is_dir():
        tokenise(made, cache, ALONE, quiet, shard_bytes)
        growing = _growing(folder)
        finish_once(folder, growing, lambda: _finish(growing, made))
        with in_place_of(folder):
            _clear(folder)
            shutil.rmtree(growing, ignore_errors=True)  # which a process that came late has begun again
    return load(folder)


def shards_folder(made: Made, cache: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Where the tokens of a part are kept."""
    corpus, part, tokenizer, rate = made
    return cache / "shards" / key_of(VERSION, corpus.key, part, tokenizer.hash, rate, shard_bytes)


def is_tokenised(made: Made, cache: Path, shard_bytes: int = SHARD_BYTES) -> bool:
    """Whether all shards of a part are there, put together or not."""
    folder = shards_folder(made, cache, shard_bytes)
    return _are_there(_growing(folder), ALONE) or folder.is_dir()


def tokenise(
    made: Made,
    cache: Path,
    share: tuple[int, int],
    quiet: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Make this process's shards of a part, (index, count) of all that make some, and keep each.

    Fails: DataError if they cannot be written.
    """
    folder, (index, count) = shards_folder(made, cache, shard_bytes), share
    growing, total, done = _growing(folder), _size(made) / count, 0
    # In this order: another process may rename the one to the other in between.
    if _are_there(growing, share) or folder.is_dir() or index * shard_bytes > made.corpus.survey.bytes:
        return

    def watch(size: int) -> None:
        nonlocal done
        done += size
        progress.update(done, sized(done, total, bytes_))

    what = f"tokenising {PurePath(made.corpus.source.path).name}, {made.part.replace('_', '-')}"
    shards, text_bytes = 0, 0
    with in_place_of(folder), Progress(what, total, shown=not quiet) as progress:
        try:
            growing.mkdir(exist_ok=True)
            for documents, size in _parts(made.documents(), shard_bytes):
                if shards % count == index:
                    _write(growing, shards, documents, made, size, watch)
                shards, text_bytes = shards + 1, text_bytes + size
            with _whole(growing / COUNTED) as file:
                file.write(json.dumps({"shards": shards, "text_bytes": text_bytes}).encode())
        except OSError:
            if not folder.is_dir():  # which another process has finished meanwhile
                raise


def _growing(folder: Path) -> Path:
    """Where shards lie until all are there."""
    return folder.with_name(f"{folder.name}.growing")


def _are_there(growing: Path, share: tuple[int, int]) -> bool:
    """Whether a share of the shards is made, and how many there are is known."""
    try:
        shards = range(from_json((growing / COUNTED).read_bytes())["shards"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        return False
    return all((growing / _tokens(number)).is_file() for number in shards[share[0] :: share[1]])


def _tokens(number: int) -> str:
    return f"tokens-{number:05d}.npy"


def _lengths(number: int) -> str:
    return f"lengths-{number:05d}.npy"


def _size(made: Made) -> int:
    """About how many bytes of text a part has, for the progress bar."""
    share = made.corpus.share if made.part == "held_out" else 1 - made.corpus.share
    return int(made.corpus.survey.bytes * share)


def _parts(documents: Iterator[Document], shard_bytes: int) -> Iterator[tuple[list[Document], int]]:
    """The documents of each shard, with the bytes of their text."""
    part, size = list[Document](), 0
    for document in documents:
        part.append(document)
        size += len(document.text.encode())
        if size >= shard_bytes:
            yield part, size
            part, size = [], 0
    if part:
        yield part, size


def _write(
    growing: Path, number: int, documents: list[Document], made: Made, size: int, watch: Callable[[int], None]
) -> None:
    """A shard, if it is not there: its tokens last, so that with them all of it is."""
    with locked(growing / f"{number}.lock"):
        if (growing / _tokens(number)).is_file():
            watch(size)
            return
        tokens, lengths = _encode(documents, made, watch)
        for name, array in ((_lengths(number), lengths), (_tokens(number), tokens)):
            with _whole(growing / name) as file:
                np.save(file, array, allow_pickle=False)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name only once all of it is on the disk."""
    beside = path.with_name(f"{path.name}.{token_hex(4)}.new")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _encode(
    documents: list[Document], made: Made, watch: Callable[[int], None]
) -> tuple[Integer[ndarray, "N"], Integer[ndarray, "M"]]:
    """The documents' tokens end to end, and how many each has; `watch` is told of each batch's bytes."""
    tokens: list[ndarray] = []
    lengths, length = list[int](), 0
    for batch, size in _batches(item for document in documents for item in _items(document, made)):
        encoded = iter(made.tokenizer.encode_all([item for item in batch if isinstance(item, str)]))
        ids: list[int] = []
        for item in batch:
            before = len(ids)
            ids.extend(next(encoded) if isinstance(item, str) else (item.id,))
            length += len(ids) - before
            if isinstance(item, Sign) and item.last:
                lengths.append(length)
                length = 0
        tokens.append(np.asarray(ids, np.uint16 if made.tokenizer.size <= 2**16 else np.uint32))
        watch(size)
    return np.concatenate(tokens), np.asarray(lengths, np.int64)


class Sign(NamedTuple):
    """A token that no text spells; a document's last one ends it."""

    id: int
    last: bool = False


def _items(document: Document, made: Made) -> Iterator[str | Sign]:
    """A document's text in pieces, with its signs; those chosen for FIM in prefix, suffix, middle order."""
    cut, fim = fim_cut(document.text, document.digest, made.rate), made.tokenizer.fim
    if cut is None:
        yield from pieces(document.text)
    else:
        assert fim is not None, "FIM without its signs is refused"
        for sign, text in ((fim.begin, cut.prefix), (fim.hole, cut.suffix), (fim.end, cut.middle)):
            yield Sign(sign)
            yield from pieces(text)
    yield Sign(made.tokenizer.eos, last=True)


def _batches(items: Iterable[str | Sign]) -> Iterator[tuple[list[str | Sign], int]]:
    """Items by batches of about BATCH_BYTES, with the bytes of their text."""
    batch, size = list[str | Sign](), 0
    for item in items:
        batch.append(item)
        size += len(item.encode()) if isinstance(item, str) else 0
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _finish(growing: Path, made: Made) -> None:
    """The boundaries of all documents, and the manifest."""
    counted = from_json((growing / COUNTED).read_bytes())
    numbers = range(counted["shards"])
    try:
        lengths = [np.load(growing / _lengths(number), allow_pickle=False) for number in numbers]
    except (ValueError, EOFError) as error:
        raise DataError(f"token shards in {growing} are damaged ({error}). {_remedy(growing)}") from None
    boundaries = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    with _whole(growing / "documents.npy") as file:
        np.save(file, boundaries, allow_pickle=False)
    shards = [_tokens(number) for number in numbers]
    manifest = {
        "corpus": made.corpus.survey.hash,
        "tokenizer": made.tokenizer.hash,
        "part": made.part,
        "fim_rate": made.rate,
        "documents": len(boundaries) - 1,
        "tokens": int(boundaries[-1]),
        "text_bytes": counted["text_bytes"],
        "shards": shards,
        "files": {name: _measure(growing / name) for name in [*shards, "documents.npy"]},
    }
    with _whole(growing / MANIFEST) as file:
        file.write(sealed(manifest).encode())


def _clear(folder: Path) -> None:
    """Remove what only a growing folder needs."""
    for path in folder.iterdir():
        if not path.name.startswith(("tokens-", "documents.npy", MANIFEST)) or path.suffix == ".new":
            path.unlink(missing_ok=True)


def load(folder: Path) -> Shards:
    """A written folder, checked. Fails: DataError naming the file that is missing, truncated or altered."""
    try:
        manifest = unsealed((folder / MANIFEST).read_bytes())
        shards, files = manifest["shards"], manifest["files"]
        for name, (size, crc) in files.items():
            _verify(folder / name, size, crc)
        tokens = tuple(np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in shards)
        offsets = np.load(folder / "documents.npy", mmap_mode="r", allow_pickle=False)
        starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        return Shards(tokens, starts, offsets, manifest["text_bytes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"token shards in {folder} cannot be read ({error}). {_remedy(folder)}") from error


def _verify(path: Path, size: int, crc: int) -> None:
    found = path.stat().st_size
    if found != size:
        raise DataError(f"{path} has {found} bytes; {size} were written. {_remedy(path.parent)}")
    if _measure(path)[1] != crc:
        raise DataError(f"{path} is not what was written (its crc32 differs). {_remedy(path.parent)}")


def _remedy(folder: Path) -> str:
    return f"Delete the folder {folder}; it is rebuilt from the text."


def _measure(path: Path) -> tuple[int, int]:
    """(bytes, crc32) of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return path.stat().st_size, crc
