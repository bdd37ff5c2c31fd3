"""A learnt vocabulary loses nothing and keeps its special tokens apart; a given one must fit the model."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.config.run import Source
from counterflow.data.corpus import open_corpus
from counterflow.data.tokenizer import SPECIALS, Fim, Tokenizer, open_tokenizer
from counterflow.errors import DataError
from tests.data.texts import folder


def learnt(root: Path, vocab_size: int = 300, share: float = 0.2) -> Tokenizer:
    if not (root / "texts").exists():
        folder(root / "texts", 40)
    corpus = open_corpus(Source(str(root / "texts")), share, root / "cache")
    return open_tokenizer("train", vocab_size, [corpus], root / "cache", quiet=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return learnt(tmp_path_factory.mktemp("tokenizer"))


def renamed(tokenizer: Tokenizer, path: Path, names: dict[str, str]) -> Path:
    """The tokenizer's file with its special tokens under other names."""
    text = tokenizer.bpe.to_str()
    for old, new in names.items():
        text = text.replace(json.dumps(old, ensure_ascii=False), json.dumps(new, ensure_ascii=False))
    path.write_text(text, encoding="utf-8")
    return path


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "  \n\n\t x", "a\r\n", "\x00\x7f", "1234567", "é\u0301🏳️‍🌈", "汉字 かな"]
)
def test_hard_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_cannot_be_spelt(tokenizer: Tokenizer) -> None:
    text = "".join(SPECIALS)
    ids = tokenizer.encode(text)
    assert min(ids) >= len(SPECIALS) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos]) == text
    assert tokenizer.decode([tokenizer.eos], specials=True) == SPECIALS[0]


def test_digits_are_split_by_threes(tokenizer: Tokenizer) -> None:
    split = tokenizer.bpe.pre_tokenizer.pre_tokenize_str("a 1234567;\n\nb")
    assert [piece for piece, _ in split] == ["a", "Ġ", "123", "456", "7", ";ĊĊ", "b"]


def test_learning_is_deterministic_and_kept(tmp_path: Path, monkeypatch) -> None:
    first, second = learnt(tmp_path / "a"), learnt(tmp_path / "b")
    assert first.hash == second.hash and first.size == 300
    monkeypatch.setattr("counterflow.data.tokenizer.learn", None)
    assert learnt(tmp_path / "a").hash == first.hash


def test_learnt_from_the_training_part_alone(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text("aaaa bbbb\n" * 80 + "zyxzyxzyxzyx\n" * 20)
    vocabulary = learnt(tmp_path, 300, share=0.3).bpe.get_vocab()
    assert "aaaa" in vocabulary and "zy" not in vocabulary


def test_given_tokenizer_with_fewer_ids_is_fine(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = renamed(tokenizer, tmp_path / "t.json", {})
    opened = open_tokenizer(str(path), 512, [], tmp_path, quiet=True)
    assert (opened.size, opened.eos, opened.fim, opened.pad) == (300, 0, Fim(1, 2, 3), 4)
    tokenizer.save(tmp_path / "saved.json")
    assert open_tokenizer(str(tmp_path / "saved.json"), 300, [], tmp_path, True).encode(
        "ab"
    ) == opened.encode("ab")


def test_deepseek_names_are_known(tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = ["<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜▁pad▁｜>"]
    path = renamed(tokenizer, tmp_path / "t.json", dict(zip(SPECIALS, names)))
    opened = open_tokenizer(str(path), 300, [], tmp_path, quiet=True)
    assert (opened.eos, opened.fim, opened.pad) == (0, Fim(1, 2, 3), 4)
    for end in ("<|endoftext|>", "</s>"):
        path = renamed(tokenizer, tmp_path / "t.json", {SPECIALS[0]: end, SPECIALS[1]: "other"})
        opened = open_tokenizer(str(path), 300, [], tmp_path, quiet=True)
        assert opened.eos == 0 and opened.fim is None


def test_given_tokenizers_that_do_not_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def open_(path: Path, vocab_size: int = 300) -> Tokenizer:
        return open_tokenizer(str(path), vocab_size, [], tmp_path, quiet=True)

    path = renamed(tokenizer, tmp_path / "t.json", {})
    with pytest.raises(DataError, match=r"has 300 ids but model.vocab_size is 299; .*model.vocab_size=300"):
        open_(path, 299)
    with pytest.raises(DataError, match=r"absent.json is not there; data.tokenizer must be 'train' or"):
        open_(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer.json"):
        open_(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"has no end token; .*data.tokenizer=train"):
        open_(renamed(tokenizer, tmp_path / "end.json", {SPECIALS[0]: "other"}))


def test_vocabulary_too_small_for_bytes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.vocab_size is 260; .* need at least 261"):
        learnt(tmp_path, 260)
    assert learnt(tmp_path, 261).size == 261
