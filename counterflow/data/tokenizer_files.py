"""What lies beside a vocabulary in a released folder: names of its tokens, ids that end a text, the chat template; and
the one other form of vocabulary that such folders have, `tiktoken.model`.

A file that is there is read, whichever of them names something: releases differ in where they put it. What was read is
written again beside every copy of the tokenizer, so that a run made of a folder ends its texts where the folder did.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Bpe

from counterflow.errors import DataError
from counterflow.notation import from_json

TOKENIZER, TIKTOKEN = "tokenizer.json", "tiktoken.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"

TIKTOKEN_CLASS = "TikTokenTokenizer"
"""Of the releases (Moonlight, Kimi) whose split and reserved tokens these are."""
TIKTOKEN_SPLIT = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_RESERVED = 256
"""Ids behind the ranks; those that no file names are `<|reserved_token_ID|>`."""


@dataclass(frozen=True)
class Beside:
    """What the files beside a vocabulary say."""

    bos: str | None = None
    eos: str | None = None
    """The token that ends a document, by name."""
    pad: str | None = None
    ends: tuple[int, ...] = ()
    """Ids at which generated text ends, of every file that names some; a turn of a chat often ends at another than a
    document."""
    template: str | None = None
    """Of chats, in Jinja."""

    def write(self, folder: Path) -> None:
        """Write it where `beside` finds it; nothing where nothing was said."""
        names = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        tables = {TOKENIZER_CONFIG: names, GENERATION: {"eos_token_id": list(self.ends) or None}}
        for file, table in tables.items():
            said = {name: value for name, value in table.items() if value is not None}
            if said:
                write_json(folder / file, said)
        if self.template is not None:
            (folder / TEMPLATE).write_text(self.template, encoding="utf-8")


def beside(folder: Path) -> Beside:
    """What a folder's files say.   Fails: DataError for a file that is not what its name says."""
    settings = _table(folder / TOKENIZER_CONFIG)
    ends = [end for file in (CONFIG, GENERATION) for end in _ids(folder / file, _table(folder / file))]
    bos, eos, pad = (_name(settings.get(f"{token}_token")) for token in ("bos", "eos", "pad"))
    return Beside(bos, eos, pad, tuple(dict.fromkeys(ends)), _template(folder, settings))


def _table(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        table = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}); fetch it anew.") from None
    if not isinstance(table, dict):
        raise DataError(f"{path} holds no JSON object; fetch it anew.")
    return table


def _name(token: Any) -> str | None:
    """A token's name, which may stand in a table of its properties."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _ids(path: Path, table: Mapping[str, Any]) -> list[int]:
    value = table.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(one) is not int for one in ids):
        raise DataError(f"eos_token_id is {value!r} in {path}; it must be a token's id, or a list of them.")
    return [one for one in ids if one >= 0]


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The file's own, else the one in the tokenizer's settings, there by itself or the default one of several."""
    path, found = folder / TEMPLATE, settings.get("chat_template")
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it anew.") from None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def write_json(path: Path, value: Any) -> None:
    """As released folders have it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def from_tiktoken(path: Path) -> Bpe:
    """The vocabulary of a `tiktoken.model`, with the tokens that the tokenizer's settings beside it name.

    Fails: DataError where it is of another kind than Moonlight's and Kimi's, whose split is code and not in any file.
    """
    settings = _table(path.parent / TOKENIZER_CONFIG)
    if settings.get("tokenizer_class") != TIKTOKEN_CLASS:
        raise DataError(
            f"{path} comes with the tokenizer_class {settings.get('tokenizer_class')!r} in {TOKENIZER_CONFIG}; how "
            f"any but {TIKTOKEN_CLASS} (Moonlight, Kimi) splits texts is not known here: put a {TOKENIZER} there."
        )
    ranks = _ranks(path)
    characters = spelling()
    words = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [(words[left], words[right]) for left, right in _merges(ranks)]
    vocabulary = {words[token]: rank for token, rank in ranks.items()}
    bpe = Bpe(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(TIKTOKEN_SPLIT), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([*_reserved(len(ranks), settings)])
    if bpe.get_vocab_size() != len(ranks) + TIKTOKEN_RESERVED:
        raise DataError(
            f"two tokens have one name in added_tokens_decoder of {TOKENIZER_CONFIG} beside {path}; fetch it anew."
        )
    return bpe


def _ranks(path: Path) -> dict[bytes, int]:
    """Tokens by rank, which is their id: a line has a token in base64 and its rank."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no tiktoken file ({error}); fetch it anew.") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not all(
        bytes([byte]) in ranks for byte in range(256)
    ):
        raise DataError(f"{path} is no whole tiktoken file: ranks or bytes are missing; fetch it anew.")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that make a token, by its rank. Which of them is taken follows from the merges before it."""
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def spelling() -> dict[int, str]:
    """Each byte as the character that stands for it in byte-level vocabularies: itself where it prints."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    return {byte: chr(byte) for byte in prints} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _reserved(first: int, settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    """By the table of the tokenizer's settings; what it does not hide is shown in texts."""
    table = settings.get("added_tokens_decoder")
    named = table if isinstance(table, dict) else {}
    for token in range(first, first + TIKTOKEN_RESERVED):
        said = named.get(str(token))
        shown = isinstance(said, dict) and said.get("special") is False
        name = _name(said) or f"<|reserved_token_{token}|>"
        yield AddedToken(name, special=not shown, normalized=False)
