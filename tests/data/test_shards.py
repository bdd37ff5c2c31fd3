"""Shards hold the documents' tokens, are made once, and are refused when they are not what was written."""

import json
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path

import numpy as np
import pytest

from counterflow.config.run import Source
from counterflow.data.corpus import open_corpus
from counterflow.data.pack import fim_cut
from counterflow.data.pieces import pieces
from counterflow.data.shards import Shards, is_tokenised, made_from, open_shards, tokenise
from counterflow.data.tokenizer import Tokenizer, open_tokenizer
from counterflow.errors import DataError
from tests.data.texts import folder, text


class Made:
    """A corpus, its tokenizer and where its shards go."""

    def __init__(self, root: Path) -> None:
        self.cache = root / "cache"
        self.corpus = open_corpus(Source(str(folder(root / "texts", 60))), 0.2, self.cache)
        self.tokenizer = open_tokenizer("train", 300, [self.corpus], self.cache, quiet=True)

    def open(self, part="train", fim_rate=0.5, **rest) -> Shards:
        return open_shards(made_from(self.corpus, part, self.tokenizer, fim_rate), self.cache, **rest)

    def folder(self) -> Path:
        (found,) = (self.cache / "shards").iterdir()
        return found


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def tokens(shards: Shards) -> list[list[int]]:
    """Ids of each document."""
    out = np.empty(shards.num_tokens, np.int64)
    shards.copy(0, out)
    return [part.tolist() for part in np.split(out, shards.offsets[1:-1])]


def test_sec4_1_documents_are_prefix_suffix_middle_or_plain(made: Made) -> None:
    tokenizer, rewritten = made.tokenizer, 0
    fim = tokenizer.fim
    for document, ids in zip(made.corpus.train(), tokens(made.open()), strict=True):
        *body, end = ids
        assert end == tokenizer.eos
        if fim_cut(document.text, document.digest, 0.5) is None:
            assert tokenizer.decode(body) == document.text
            continue
        rewritten += 1
        hole, close = body.index(fim.hole), body.index(fim.end)
        assert body[0] == fim.begin and 0 < hole < close
        prefix, suffix, middle = body[1:hole], body[hole + 1 : close], body[close + 1 :]
        assert "".join(map(tokenizer.decode, (prefix, middle, suffix))) == document.text
    assert rewritten > 5


def test_sec4_1_held_out_part_has_no_holes(made: Made) -> None:
    held_out = made.open("held_out", fim_rate=1.0)
    texts = [made.tokenizer.decode(ids) for ids in tokens(held_out)]
    assert texts == [document.text for document in made.corpus.held_out()]
    assert held_out.text_bytes == sum(len(text.encode()) for text in texts)
    assert made.tokenizer.fim.begin not in {i for ids in tokens(held_out) for i in ids}


def test_many_shards_read_as_one(made: Made) -> None:
    whole, parts = made.open(), made.open(shard_bytes=1000)
    assert len(parts.tokens) > 4 and len(whole.tokens) == 1
    assert parts.num_tokens == whole.num_tokens and tokens(parts) == tokens(whole)
    for start in range(0, whole.num_tokens - 300, 97):
        one, other = np.empty(300, np.int64), np.empty(300, np.int64)
        whole.copy(start, one)
        parts.copy(start, other)
        assert (one == other).all()


def test_manifest_says_what_is_there(made: Made) -> None:
    shards = made.open(shard_bytes=2000)
    manifest = json.loads((made.folder() / "manifest.json").read_text())
    assert manifest["tokens"] == shards.num_tokens == sum(map(len, shards.tokens))
    assert manifest["documents"] == len(list(made.corpus.train()))
    assert manifest["text_bytes"] == sum(len(d.text.encode()) for d in made.corpus.train())
    assert manifest["corpus"] == made.corpus.survey.hash and manifest["tokenizer"] == made.tokenizer.hash
    assert shards.tokens[0].dtype == np.uint16 and shards.offsets.dtype == np.int64
    assert {path.name for path in made.folder().iterdir()} == {*manifest["files"], "manifest.json"}


def test_large_vocabularies_take_32_bits(made: Made) -> None:
    made.tokenizer = replace(made.tokenizer, size=2**16 + 1)
    assert made.open().tokens[0].dtype == np.uint32


def test_made_once_for_each_setting(made: Made, monkeypatch) -> None:
    made.open(), made.open(fim_rate=0.25)
    assert len(list((made.cache / "shards").iterdir())) == 2
    made.open("held_out", 0.5), made.open("held_out", 0.25)
    assert len(list((made.cache / "shards").iterdir())) == 3, "FIM does not touch the held-out part"
    monkeypatch.setattr("counterflow.data.shards.tokenise", None)
    made.open()


@pytest.mark.parametrize("name", ["tokens-00000.npy", "documents.npy"])
def test_damaged_files_are_named(made: Made, name: str) -> None:
    made.open()
    path = made.folder() / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        DataError, match=rf"{name} has \d+ bytes; \d+ were written. Delete the folder .*rebuilt"
    ):
        made.open()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{name} is not what was written .*Delete the folder"):
        made.open()
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.*Delete the folder"):
        made.open()


def test_damaged_manifest(made: Made) -> None:
    made.open()
    (made.folder() / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be read .*Delete the folder"):
        made.open()


def test_fim_needs_its_tokens(made: Made) -> None:
    made.tokenizer = replace(made.tokenizer, fim=None)
    with pytest.raises(
        DataError, match=r"data.fim_rate is 0.5 but the tokenizer has no FIM.*data.fim_rate=0"
    ):
        made.open()
    assert made.open(fim_rate=0.0).num_tokens


def test_full_disk(made: Made, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"cannot write .*shards.*No space left on device.*data.cache_dir"):
        made.open()
    assert not list(made.cache.rglob("*.new"))
    monkeypatch.undo()
    made.open()


def test_cache_that_cannot_be_a_folder(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made.cache = tmp_path / "file" / "cache"
    with pytest.raises(DataError, match=r"cannot write .*Not a directory.*data.cache_dir"):
        made.open()


def test_shares_of_a_text_that_are_kept_are_those_of_one_process(made: Made, monkeypatch) -> None:
    """Three make a share each; what is there then is made no more, whoever goes on, and is the whole."""
    whole = made.open(shard_bytes=999)
    expected = tokens(whole)
    text = made_from(made.corpus, "train", made.tokenizer, 0.5)
    seen: list[int] = []
    encode = Tokenizer.encode_all
    monkeypatch.setattr(Tokenizer, "encode_all", lambda self, texts: seen.append(1) or encode(self, texts))
    for share in ((0, 3), (2, 3), (1, 3)):
        before = len(seen)
        tokenise(text, made.cache, share, shard_bytes=1000)
        assert len(seen) > before
    (growing,) = (made.cache / "shards").glob("*.growing")
    (growing / "tokens-00002.npy").unlink()  # a share of a machine with another disk, or a killed one
    before = len(seen)
    assert tokens(made.open(shard_bytes=1000)) == expected
    assert len(seen) == before + 1 and not growing.exists()


def test_kept_shards_that_are_damaged_are_made_again_or_named(made: Made) -> None:
    text = made_from(made.corpus, "train", made.tokenizer, 0.5)
    tokenise(text, made.cache, (0, 1))
    (growing,) = (made.cache / "shards").glob("*.growing")
    for damaged in ("{", '{"shards": null}'):
        (growing / "counted.json").write_text(damaged)
        assert not is_tokenised(text, made.cache)
    (growing / "lengths-00000.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"are damaged .* Delete the folder"):
        made.open()


def test_a_long_text_has_the_tokens_that_it_has_at_once(made: Made) -> None:
    long = "".join(text(seed) for seed in range(40))
    cut = list(pieces(long, 300))
    assert "".join(cut) == long and max(map(len, cut)) <= 300 < 10 * len(cut)
    ids = [id for piece in cut for id in made.tokenizer.encode(piece)]
    assert ids == made.tokenizer.encode(long)
    assert list(map(len, pieces("x" * 1000, 300))) == [300, 300, 300, 100]
