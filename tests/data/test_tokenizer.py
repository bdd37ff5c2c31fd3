"""A learnt vocabulary loses nothing and keeps its special tokens apart; a given one must fit the model."""

import base64
import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Bpe

from counterflow.config.run import Source
from counterflow.data.corpus import open_corpus
from counterflow.data.pieces import without_long_words
from counterflow.data.tokenizer import SPECIALS, Fim, Tokenizer, load, open_tokenizer
from counterflow.data.tokenizer_files import spelling
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


def test_control_tokens_cannot_be_spelt_whatever_their_mark(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The release marks its FIM signs and roles as not special; white space that was added stays what it is."""
    bpe = Bpe.from_str(tokenizer.bpe.to_str())
    names = ["<｜fim▁hole｜>", "</s>", "   "]
    bpe.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    bpe.save(str(tmp_path / "t.json"))
    opened = load(tmp_path / "t.json")
    text = "a" + "b".join((*SPECIALS, *names[:2])) + "c"
    for ids in (opened.encode(text), *opened.encode_all([text])):
        assert max(ids) < 300 and min(ids) >= len(SPECIALS) and opened.decode(ids) == text
    assert opened.encode("   ") == [302] and opened.decode([300, 302, 0]) == names[0] + names[2]
    assert opened.controls == {name: opened.bpe.token_to_id(name) for name in (*SPECIALS, *names[:2])}


def test_a_vocabulary_that_reads_control_tokens_out_of_texts_is_refused(tmp_path: Path) -> None:
    bpe = Bpe(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    bpe.add_special_tokens(["</s>"])
    bpe.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"reads its control token '</s>' out of a text"):
        load(tmp_path / "t.json")


RANKS = [
    *(bytes([byte]) for byte in range(256)),
    b"th",
    b"an",
    b"and",
    b"the",
    b" the",
    b"ther",
    b"\xe6\xb1",
    b"xthe",
]
"""The last follows from no merges: only a word that it is as a whole becomes it."""


def tiktoken_folder(folder: Path, kind: str = "TikTokenTokenizer") -> Path:
    """A vocabulary in the form in which Moonlight and Kimi have theirs; where its tokenizer.json would be."""
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(RANKS)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines))
    first = len(RANKS)
    names = dict(enumerate(("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>"), start=first)) | {
        first + 255: "[PAD]"
    }
    settings = {
        "tokenizer_class": kind,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "added_tokens_decoder": {str(one): {"content": name, "special": True} for one, name in names.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def merged(piece: bytes) -> list[int]:
    """tiktoken's rule for a piece of text: itself, or the pair of the lowest rank joined until none has one."""
    parts = [piece] if piece in RANKS else [bytes([byte]) for byte in piece]
    while True:
        pairs = [(RANKS.index(a + b), at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in RANKS]
        if not pairs:
            return [RANKS.index(part) for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> Tokenizer:
    return load(tiktoken_folder(tmp_path_factory.mktemp("ranks")))


@given(
    pieces=st.lists(
        st.sampled_from([" the", " thether", " xan", " and", "汉字", "\n", "777", " !?", " [EOS"])
    )
)
def test_a_tiktoken_file_is_read_as_tiktoken_reads_it(ranked: Tokenizer, pieces: list[str]) -> None:
    """Each piece of the split joined by rank."""
    text = "".join(pieces)
    split = [piece for piece, _ in ranked.bpe.pre_tokenizer.pre_tokenize_str(text)]
    bytes_of = {character: byte for byte, character in spelling().items()}
    found = [bytes(bytes_of[character] for character in piece) for piece in split]
    assert b"".join(found) == text.encode()
    assert ranked.encode(text) == [token for piece in found for token in merged(piece)]
    assert ranked.decode(ranked.encode(text)) == text


def test_a_tiktoken_file_keeps_words_whole_and_names_its_reserved_tokens(ranked: Tokenizer) -> None:
    assert ranked.encode("xthe xther") == [263, 32, *merged(b"xther")] and ranked.encode("Isn't")[-3:] == [
        *b"n't"
    ]
    first = len(RANKS)
    assert (ranked.bos, ranked.eos, ranked.pad, ranked.size) == (first, first + 1, first + 255, first + 256)
    assert ranked.bpe.id_to_token(first + 9) == f"<|reserved_token_{first + 9}|>"


def test_a_foreign_or_broken_tiktoken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the tokenizer_class 'QWenTokenizer'.* put a tokenizer\.json there"):
        load(tiktoken_folder(tmp_path, "QWenTokenizer"))
    path = tiktoken_folder(tmp_path)
    settings = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(settings.replace("[PAD]", "[EOS]"))
    with pytest.raises(DataError, match=r"two tokens have one name"):
        load(path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    whole = (tmp_path / "tiktoken.model").read_bytes()
    for broken in (whole[:-30], b"%%% 0", b"YQ== x", b"YQ==", b"\xff 1"):
        (tmp_path / "tiktoken.model").write_bytes(broken)
        with pytest.raises(DataError, match=r"tiktoken\.model is no (whole )?tiktoken file"):
            load(path)


@given(draw=st.lists(st.integers(0, 299), max_size=12))
def test_the_bytes_of_tokens_joined_are_their_text(tokenizer: Tokenizer, draw: list[int]) -> None:
    """Whatever the tokens, halves of characters and invalid bytes among them."""
    joined = b"".join(map(tokenizer.bytes_of, draw))
    assert joined.decode(errors="replace") == tokenizer.decode(draw)
    named = b"".join(tokenizer.bytes_of(token, specials=True) for token in draw)
    assert named.decode(errors="replace") == tokenizer.decode(draw, specials=True)
    assert tokenizer.bytes_of(10**6) == b""


def test_bytes_of_tokens_that_are_no_byte_level_ones(tmp_path: Path) -> None:
    vocabulary = ["</s>", "<0xF0>", "<0x9F>", "<0xA7>", "<0xAA>", "▁a", "b"]
    bpe = Bpe(models.BPE({name: id_ for id_, name in enumerate(vocabulary)}, [], byte_fallback=True))
    bpe.add_special_tokens(["</s>"])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(parts)
    bpe.save(str(tmp_path / "tokenizer.json"))
    found = load(tmp_path / "tokenizer.json")
    assert b"".join(map(found.bytes_of, [6, 5, 1, 2, 3, 4, 0])) == "b a🧪".encode()
    assert found.ends_with(["b"]) == {0} and found.bytes_of(0, specials=True) == b"</s>"


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


def test_what_has_no_words_is_learnt_from_in_time_with_its_length(tmp_path: Path) -> None:
    """DNA and spaces: no word is longer than a thousand characters; the square of these lengths takes minutes."""
    (tmp_path / "texts").mkdir()
    dna = "".join(Random(0).choices("ACGT", k=2**18))
    (tmp_path / "texts" / "dna.txt").write_text(dna + " " * 2**18 + "x")
    tokenizer = learnt(tmp_path)
    assert tokenizer.size == 300 and tokenizer.decode(tokenizer.encode(dna)) == dna


def test_words_that_are_long_change_no_others() -> None:
    dna, prose = "ACGT" * 600, "Ein Satz, der kurz ist. " * 100
    assert list(without_long_words(prose)) == [prose]
    assert [len(part) for part in without_long_words(f"{prose}{dna} {prose}")] == [3400, 1000, 2801]


def test_a_panic_of_the_library_is_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Onig gives up: the pattern has 2^n ways to fail."""
    content = json.loads(tokenizer.bpe.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a|a)+b"
    (tmp_path / "t.json").write_text(json.dumps(content))
    opened = open_tokenizer(str(tmp_path / "t.json"), 300, [], tmp_path, quiet=True)
    for encode in (opened.encode, lambda text: opened.encode_all([text])):
        with pytest.raises(DataError, match=r"cannot take these texts .*40 characters"):
            encode("a" * 40)
