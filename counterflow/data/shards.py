"""Token shards: documents tokenised once and mapped into memory from then on.

A folder holds the tokens of one part (training or held out) of one source: plain .npy files of uint16 or
uint32, cut between documents, the int64 document boundaries over all of them, and a manifest with what they
were made from and the size and crc32 of each. Not taken: tokenising on the fly, which costs more than a small
model's step, and one growing file, which cannot be checked as a whole. Opening reads everything once for the
checksums, so the first epoch finds it in the page cache.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from counterflow.data.cache import build_once, key_of
from counterflow.data.corpus import Corpus, Document
from counterflow.data.pack import fim_cut
from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import DataError
from counterflow.progress import Progress, sized
from counterflow.units import bytes_

Part = Literal["train", "held_out"]
SHARD_TOKENS = 2**26
"""A shard is saved once this many tokens have come together; so many are held in memory."""
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


def open_shards(
    corpus: Corpus,
    part: Part,
    tokenizer: Tokenizer,
    fim_rate: float,
    cache: Path,
    quiet: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """The shards of one part, tokenised now if this is the first time; FIM is for training alone."""
    rate = fim_rate if part == "train" else 0.0
    if rate and tokenizer.fim is None:
        raise DataError(
            f"data.fim_rate is {rate:g} but the tokenizer has no FIM tokens; documents with a hole need "
            "<|fim_begin|>, <|fim_hole|> and <|fim_end|>. Set data.fim_rate=0, or give a tokenizer that has "
            "them."
        )
    folder = shards_folder(corpus, part, tokenizer, rate, cache, shard_tokens)
    build_once(folder, lambda new: _write(new, corpus, part, tokenizer, rate, quiet, shard_tokens))
    return load(folder)


def shards_folder(
    corpus: Corpus,
    part: Part,
    tokenizer: Tokenizer,
    rate: float,
    cache: Path,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Where the tokens of a part are kept; the held-out part's rate is 0."""
    return cache / "shards" / key_of(VERSION, corpus.key, part, tokenizer.hash, rate, shard_tokens)


class _Writer:
    """Collects documents and saves a shard whenever enough tokens have come together."""

    def __init__(self, folder: Path, dtype: type, shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.names: list[str] = []
        self.lengths: list[int] = []
        self._held: list[ndarray] = []
        self._held_tokens = 0

    def add(self, ids: list[int]) -> None:
        """One document more."""
        self._held.append(np.asarray(ids, self.dtype))
        self.lengths.append(len(ids))
        self._held_tokens += len(ids)
        if self._held_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Save what is held as a shard."""
        if self._held:
            self.names.append(f"tokens-{len(self.names):05d}.npy")
            np.save(self.folder / self.names[-1], np.concatenate(self._held), allow_pickle=False)
        self._held, self._held_tokens = [], 0


def _write(
    folder: Path,
    corpus: Corpus,
    part: Part,
    tokenizer: Tokenizer,
    rate: float,
    quiet: bool,
    shard_tokens: int,
) -> None:
    """Tokenise a part into a folder."""
    writer = _Writer(folder, np.uint16 if tokenizer.size <= 2**16 else np.uint32, shard_tokens)
    documents, text_bytes = corpus.train() if part == "train" else corpus.held_out(), 0
    total = _size(corpus, part)
    what = f"tokenising {PurePath(corpus.source.path).name}, {part.replace('_', '-')}"
    with Progress(what, total, shown=not quiet) as progress:
        for batch, size in _batches(documents):
            for ids in _encode(batch, tokenizer, rate):
                writer.add(ids)
            text_bytes += size
            progress.update(text_bytes, sized(text_bytes, total, bytes_))
    writer.flush()
    boundaries = np.cumsum([0, *writer.lengths], dtype=np.int64)
    np.save(folder / "documents.npy", boundaries, allow_pickle=False)
    manifest = {
        "corpus": corpus.survey.hash,
        "tokenizer": tokenizer.hash,
        "part": part,
        "fim_rate": rate,
        "documents": len(writer.lengths),
        "tokens": int(boundaries[-1]),
        "text_bytes": text_bytes,
        "shards": writer.names,
        "files": {name: _measure(folder / name) for name in [*writer.names, "documents.npy"]},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _size(corpus: Corpus, part: Part) -> int:
    """About how many bytes of text a part has, for the progress bar."""
    return int(corpus.survey.bytes * (corpus.share if part == "held_out" else 1 - corpus.share))


def _batches(documents: Iterator[Document]) -> Iterator[tuple[list[Document], int]]:
    """Documents by batches of about BATCH_BYTES, with the bytes of their text."""
    batch, size = list[Document](), 0
    for document in documents:
        batch.append(document)
        size += len(document.text.encode())
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _encode(batch: list[Document], tokenizer: Tokenizer, rate: float) -> Iterator[list[int]]:
    """The ids of each document with its end; those chosen for FIM in prefix, suffix, middle order."""
    cuts = [fim_cut(document.text, document.digest, rate) for document in batch]
    pieces = [
        [document.text] if cut is None else [cut.prefix, cut.suffix, cut.middle]
        for document, cut in zip(batch, cuts)
    ]
    encoded = iter(tokenizer.encode_all([text for texts in pieces for text in texts]))
    for cut in cuts:
        if cut is None:
            yield [*next(encoded), tokenizer.eos]
        else:
            fim = tokenizer.fim
            assert fim is not None, "open_shards refuses FIM without its tokens"
            prefix, suffix, middle = next(encoded), next(encoded), next(encoded)
            yield [fim.begin, *prefix, fim.hole, *suffix, fim.end, *middle, tokenizer.eos]


def load(folder: Path) -> Shards:
    """A written folder, checked. Fails: DataError naming the file that is missing, truncated or altered."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        shards, files = manifest["shards"], manifest["files"]
        for name, (size, crc) in files.items():
            _verify(folder / name, size, crc)
        tokens = tuple(np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in shards)
        offsets = np.load(folder / "documents.npy", mmap_mode="r", allow_pickle=False)
        starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        return Shards(tokens, starts, offsets, manifest["text_bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
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
