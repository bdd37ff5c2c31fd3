"""Text to token ids and back: a byte-level BPE learnt from the training part, or a given tokenizer.json.

Learning, splitting and merging are the `tokenizers` library's; what is ours is which of them, and the names
of the special tokens. The split is DeepSeek-V3's: digits in groups of up to three, words with the sign before
them, punctuation that may take the line breaks after it along. Every byte is in the alphabet, so every text
comes back as it was. Control tokens written out in a text are encoded as plain text, however the vocabulary marks
them: a corpus cannot end a document or open a hole by spelling it, nor a message begin a turn. Not taken: a bundled
vocabulary, which would cost more parameters than a small model has.

Not done: the report splits tokens of punctuation and line breaks at random in training, at a rate it does not
state.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from os.path import expanduser
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Bpe

from counterflow.data.cache import build_once, key_of
from counterflow.data.corpus import Corpus
from counterflow.data.pieces import one_line, pieces, without_long_words
from counterflow.data.tokenizer_files import (
    TIKTOKEN,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Beside,
    beside,
    from_tiktoken,
    spelling,
)
from counterflow.errors import DataError
from counterflow.progress import Progress
from counterflow.units import bytes_

SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""DeepSeek-V3's pre-tokenizer (tokenizer.json of the release), applied one after the other."""
EOS = ("<|eos_token|>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
BOS = ("<|bos_token|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>")
"""A vocabulary without one begins a document after the end of the one before."""
FIM_BEGIN = ("<|fim_begin|>", "<｜fim▁begin｜>")
FIM_HOLE = ("<|fim_hole|>", "<｜fim▁hole｜>")
FIM_END = ("<|fim_end|>", "<｜fim▁end｜>")
PAD = ("<|pad|>", "<｜▁pad▁｜>")
SPECIALS = tuple(names[0] for names in (EOS, FIM_BEGIN, FIM_HOLE, FIM_END, PAD))
SMALLEST = 256 + len(SPECIALS)
LEARN_FROM = 200_000
"""Documents at most that the merges are learnt from, by turns from each source."""
MISSING = f"weights come with a {TOKENIZER} or a {TIKTOKEN}: fetch it"
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A byte in vocabularies that are no byte-level ones."""
VERSION = 1
"""Raised when the same text would give another vocabulary."""


@dataclass(frozen=True)
class Fim:
    """Ids of the three signs of a document with a hole."""

    begin: int
    hole: int
    end: int


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its special ids."""

    bpe: Bpe = field(repr=False)
    plain: Bpe = field(repr=False)
    """The same vocabulary, with no control token that a text could spell: it encodes."""
    size: int
    """One more than the largest id."""
    eos: int
    """What ends a document."""
    bos: int
    """What a document follows: a beginning token, or the end of the document before."""
    fim: Fim | None
    pad: int | None
    hash: str
    beside: Beside = field(default=Beside(), repr=False)

    @property
    def ends(self) -> frozenset[int]:
        """Ids at which generated text ends: the end of a document, and what the release's files name."""
        return frozenset((self.eos, *self.beside.ends))

    @property
    def controls(self) -> dict[str, int]:
        """The tokens that no text becomes, by name: all that were added to the vocabulary, but white space."""
        return {
            token.content: number
            for number, token in self.bpe.get_added_tokens_decoder().items()
            if token.content.strip()
        }

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end token."""
        with one_line(text):
            encoded = (self.plain.encode(piece, add_special_tokens=False) for piece in pieces(text))
            return [id for piece in encoded for id in piece.ids]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, each no longer than `pieces` are, on all cores."""
        with one_line(*texts):
            return [encoded.ids for encoded in self.plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of ids; special tokens are written out only if asked for."""
        return self.bpe.decode(list(ids), skip_special_tokens=not specials)

    def bytes_of(self, token: int, specials: bool = False) -> bytes:
        """A token's own bytes, which may be part of a character; none of a special one, unless asked for.

        Those of several, joined and decoded with replacements, are their text.
        """
        if not specials and token in self._special:
            return b""
        name = self.bpe.id_to_token(token)
        if name is None:
            return b""
        if self._spelling:
            known = [self._spelling.get(sign) for sign in name]
            return name.encode() if None in known else bytes(known)  # type: ignore[arg-type]
        if BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        # Behind another, since some decoders take the space off a text's first token.
        alone = self.bpe.decode([token], skip_special_tokens=False)
        return self.bpe.decode([token, token], skip_special_tokens=False)[len(alone) :].encode()

    def ends_with(self, stops: Sequence[str]) -> frozenset[int]:
        """`ends`, and the special tokens among a request's stop strings: no decoded text holds those."""
        return self.ends.union(id_ for id_, name in self._special.items() if name in stops)

    @cached_property
    def _special(self) -> dict[int, str]:
        added = self.bpe.get_added_tokens_decoder()
        return {id_: one.content for id_, one in added.items() if one.special}

    @cached_property
    def _spelling(self) -> dict[str, int]:
        """The byte that each sign of a byte-level vocabulary stands for; empty if the vocabulary is of another kind."""
        known, decoder = spelling(), self.bpe.decoder
        is_bytes = decoder is not None and decoder.decode([known[ord(" ")]]) == " "
        return {sign: byte for byte, sign in known.items()} if is_bytes else {}

    def save(self, path: str | Path) -> None:
        """Write it as a tokenizer.json, and beside it what files beside it said."""
        Path(path).write_text(self.bpe.to_str(), encoding="utf-8")
        self.beside.write(Path(path).parent)


def open_tokenizer(
    name: str, vocab_size: int, corpora: Sequence[Corpus], cache: Path, quiet: bool
) -> Tokenizer:
    """The tokenizer that data.tokenizer names: 'train' learns one, once; else a tokenizer.json."""
    given = require_tokenizer(name, vocab_size)
    if given is not None:
        return given
    folder = learnt_folder(corpora, vocab_size, cache)
    build_once(
        folder,
        lambda new: (new / "tokenizer.json").write_text(
            learn(corpora, vocab_size, quiet).to_str(), encoding="utf-8"
        ),
    )
    return load(folder / "tokenizer.json")


def learnt_folder(corpora: Sequence[Corpus], vocab_size: int, cache: Path) -> Path:
    """Where a tokenizer that was learnt is kept."""
    return cache / "tokenizers" / key_of(VERSION, [corpus.key for corpus in corpora], vocab_size)


def require_tokenizer(name: str, vocab_size: int) -> Tokenizer | None:
    """The tokenizer.json that is named, None where one is to be learnt.   Fails: DataError where the vocabulary is too
    small for either."""
    if name != "train":
        path = Path(expanduser(name))
        return fitting(
            load(path, "data.tokenizer must be 'train' or the path of a tokenizer.json"), vocab_size, name
        )
    if vocab_size < SMALLEST:
        raise DataError(
            f"model.vocab_size is {vocab_size}; 256 bytes and {len(SPECIALS)} special tokens need at least "
            f"{SMALLEST}. Raise model.vocab_size."
        )
    return None


def learn(corpora: Sequence[Corpus], vocab_size: int, quiet: bool = True) -> Bpe:
    """A byte-level BPE of at most vocab_size ids, learnt from the training parts alone. [§4.1 tokenizer]"""
    bpe = Bpe(models.BPE())
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, whole])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with Progress("learning the tokenizer", shown=not quiet) as progress:
        texts = _watched(islice(_by_turns(corpora), LEARN_FROM), progress)
        with one_line():
            bpe.train_from_iterator(
                (part for text in texts for piece in pieces(text) for part in without_long_words(piece)),
                trainer,
            )
    return bpe


def _watched(texts: Iterable[str], progress: Progress) -> Iterator[str]:
    """The texts, counted; what the library does after the last of them tells nobody how far it is."""
    size = 0
    for text in texts:
        yield text
        progress.update(size := size + len(text.encode()), f"{bytes_(size)} read")
    progress.update(size, f"{bytes_(size)} read, merging")


def _by_turns(corpora: Sequence[Corpus]) -> Iterable[str]:
    streams = [corpus.train() for corpus in corpora]
    while streams:
        for stream in tuple(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                yield document.text


def load(path: Path, otherwise: str = MISSING) -> Tokenizer:
    """A tokenizer.json, or the tiktoken.model that lies where it is not, with what the files beside it say.

    Fails: DataError if it is missing, unreadable or has no end token; `otherwise` is what to change.
    """
    bpe, said = _read(path, otherwise), beside(path.parent)
    bpe.no_padding()
    bpe.no_truncation()
    vocabulary = bpe.get_vocab(with_added_tokens=True)
    eos = _first(vocabulary, (said.eos, *EOS))
    if eos is None:
        raise DataError(
            f"{path} has no end token; documents end with the eos_token of a {TOKENIZER_CONFIG} beside it, or with one "
            f"of {', '.join(EOS)}. Name it there, or set data.tokenizer=train."
        )
    begin, hole, end = (_first(vocabulary, names) for names in (FIM_BEGIN, FIM_HOLE, FIM_END))
    fim = None if begin is None or hole is None or end is None else Fim(begin, hole, end)
    digest = blake2b(bpe.to_str().encode(), digest_size=16).hexdigest()
    bos, pad = _first(vocabulary, (said.bos, *BOS)), _first(vocabulary, (said.pad, *PAD))
    bos, size = eos if bos is None else bos, max(vocabulary.values()) + 1
    return _guarded(Tokenizer(bpe, _plain(bpe), size, eos, bos, fim, pad, digest, said), path)


def _read(path: Path, otherwise: str) -> Bpe:
    tiktoken = path.with_name(TIKTOKEN)
    if not path.is_file() and tiktoken.is_file():
        return from_tiktoken(tiktoken)
    if not path.is_file():
        raise DataError(f"tokenizer {path} is not there; {otherwise}.")
    try:
        return Bpe.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"{path} is no tokenizer.json ({error}); delete it if it lies in data.cache_dir (it is learnt "
            "again), else give another as data.tokenizer."
        ) from error


def _plain(bpe: Bpe) -> Bpe:
    """The vocabulary for encoding. The library spares texts only the tokens that are marked as special."""
    added = bpe.get_added_tokens_decoder().values()
    marked = [
        AddedToken(**_kept(token), special=True)
        for token in added
        if token.content.strip() and not token.special
    ]
    plain = Bpe.from_str(bpe.to_str()) if marked else bpe
    plain.add_special_tokens(marked)
    plain.encode_special_tokens = True
    return plain


def _kept(token: AddedToken) -> dict[str, Any]:
    return {
        name: getattr(token, name) for name in ("content", "single_word", "lstrip", "rstrip", "normalized")
    }


def _guarded(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer, if its vocabulary makes no control token of its own name."""
    controls = tokenizer.controls
    ids = set(controls.values())
    spelt = [
        name for name, found in zip(controls, tokenizer.encode_all([*controls])) if ids.intersection(found)
    ]
    if spelt:
        raise DataError(
            f"{path} reads its control token '{spelt[0]}' out of a text that spells it; such a text could end a "
            "document: give a byte-level tokenizer, or set data.tokenizer=train."
        )
    return tokenizer


def fitting(tokenizer: Tokenizer, vocab_size: int, name: str) -> Tokenizer:
    """The tokenizer, if the model has a row for each id. Fewer ids than rows are fine."""
    if tokenizer.size > vocab_size:
        raise DataError(
            f"tokenizer {name} has {tokenizer.size} ids but model.vocab_size is {vocab_size}; every id needs "
            f"a row. Set model.vocab_size={tokenizer.size} or more."
        )
    return tokenizer


def _first(vocabulary: dict[str, int], names: Sequence[str | None]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)
