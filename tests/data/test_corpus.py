"""Documents of every kind of file, the split, and what a user is told when there is no text."""

import builtins
import gzip
import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from counterflow.config.run import Source
from counterflow.data.corpus import documents, is_held_out, open_corpus
from counterflow.data.files import files, skipped
from counterflow.errors import DataError
from tests.data.texts import folder


def opened(path: Path | str, root: Path, share: float = 0.2, **rest):
    return open_corpus(Source(str(path), **rest), share, root / "cache")


def test_stdlib_is_source_code_without_tests_and_installed_packages() -> None:
    names = [name for name, _ in files(Source())]
    assert len(names) > 400 and names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    left_out = "(^|/)tests?/|site-packages|dist-packages|ensurepip|lib-dynload|sysconfigdata|__pycache__"
    assert not [name for name in names if re.search(left_out, name)]
    tables = ("encodings", "pydoc_data", "html/entities", "re/_casefix", "stringprep", "locale.py")
    assert not [name for name in names if name.startswith(tables)]


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    (tmp_path / "sub" / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "a.txt").write_bytes("ä\r\n\ufeff".encode())
    (tmp_path / "sub" / "b.md").write_text("# b")
    (tmp_path / "sub" / "c.py").write_text("c = 1")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "d.jsonl").write_text('{"text": "d1"}\n\n{"text": "d2", "other": 3}\n')
    (tmp_path / "image.png").write_bytes(b"\xff")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["e1", None, "e3"]}), tmp_path / "e.parquet")
    found = {document.name: document.text for document in documents(Source(str(tmp_path)))}
    assert found == {
        "a.txt": "ä\r\n\ufeff",
        "d.jsonl:1": "d1",
        "d.jsonl:3": "d2",
        "e.parquet:1": "e1",
        "e.parquet:3": "e3",
        "sub/b.md": "# b",
        "sub/c.py": "c = 1",
    }
    globbed = [document.text for document in documents(Source(str(tmp_path / "**" / "*.md")))]
    assert globbed == ["# b"]


def test_each_source_has_its_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": "no"}\n')
    assert [d.text for d in documents(Source(str(tmp_path), field="body"))] == ["yes"]


def test_split_is_a_partition_and_follows_the_text(tmp_path: Path) -> None:
    corpus = opened(folder(tmp_path / "texts", 200), tmp_path)
    train, held_out = list(corpus.train()), list(corpus.held_out())
    assert sorted(train + held_out) == sorted(documents(corpus.source))
    assert all(is_held_out(d.digest, 0.2) for d in held_out) and not corpus.survey.tails
    assert 20 <= len(held_out) <= 60, "five sigma about 40 of 200 documents"
    for file in sorted((tmp_path / "texts").iterdir()):
        file.rename(file.with_name("renamed-" + file.name))
    renamed = opened(tmp_path / "texts", tmp_path)
    assert [d.text for d in renamed.held_out()] == [d.text for d in held_out]
    assert renamed.key == corpus.key, "names are no part of a corpus"


def test_one_document_is_split_at_a_line_break(tmp_path: Path) -> None:
    lines = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "book.txt").write_text(lines)
    corpus = opened(tmp_path / "book.txt", tmp_path, 0.1)
    (train,), (held_out,) = corpus.train(), corpus.held_out()
    assert train.text + held_out.text == lines and train.text.endswith("\n")
    assert 0.08 < len(held_out.text) / len(lines) < 0.13
    (tmp_path / "line.txt").write_text("x" * 1000)
    corpus = opened(tmp_path / "line.txt", tmp_path, 0.1)
    assert [len(d.text) for d in corpus.train()] == [900]


def test_survey_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch) -> None:
    path = folder(tmp_path / "texts", 40)
    key = opened(path, tmp_path).key
    with monkeypatch.context() as patch:
        patch.setattr("counterflow.data.corpus.survey", None)
        assert opened(path, tmp_path).key == key
    (path / "000.txt").write_text("another text")
    assert opened(path, tmp_path).key != key


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (
            lambda p: p / "absent",
            r"absent' is not there; .*known: a\.csv|absent' is not there; .*did you mean",
        ),
        (lambda p: p / "absent" / "b.txt", "there is no folder"),
        (lambda p: p / "*.txt", "has no file that ends in .txt, .md"),
        (lambda p: p / "a.csv", "a.csv is not text that is known here"),
        (lambda p: p, "has no file that ends in"),
    ],
)
def test_no_files(tmp_path: Path, make, wanted: str) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=wanted):
        opened(make(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"abc\xff", r"a\.txt: byte 3 \(0xff\) is not UTF-8; .*iconv -f"),
        ("a.txt", b"x", "data.held_out is 0.2 .* both are needed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', r"a\.jsonl:2: byte 14 \(0xff\)"),
        ("a.jsonl", b'{"texts": "a"}\n', r"a\.jsonl:1 has no 'text'; .*did you mean 'texts'\?"),
        ("a.jsonl", b'{"messages": []}\n', r"a\.jsonl:1 has no 'text'; .*no chat template"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1 has no 'text'; .*no object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' is int; it must be a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair at character 0"),
        ("a.parquet", b"no parquet at all", r"a\.parquet is no readable parquet file"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=wanted):
        opened(tmp_path / name, tmp_path)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    table = pyarrow.table({"content": ["a"], "number": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no 'contents'.*did you mean 'content'"):
        opened(tmp_path / "a.parquet", tmp_path, field="contents")
    with pytest.raises(DataError, match="column 'number' is int64; it must hold strings"):
        opened(tmp_path / "a.parquet", tmp_path, field="number")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install pyarrow"):
        opened(tmp_path / "a.parquet", tmp_path)


def test_unreadable_file_and_damaged_survey(tmp_path: Path, monkeypatch) -> None:
    path = folder(tmp_path / "texts", 20)
    opened(path, tmp_path)
    (kept,) = (tmp_path / "cache" / "corpora").glob("*/survey.json")
    kept.write_text(json.dumps({"hash": 1}))
    with pytest.raises(DataError, match=r"is damaged .* delete that folder"):
        opened(path, tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("counterflow.data.corpus.opened", refuse)
    with pytest.raises(DataError, match=r"cannot read .*Permission denied"):
        list(documents(Source(str(path))))


def test_a_folder_and_its_glob_are_the_same_files_each_once(tmp_path: Path) -> None:
    """Links to folders and files are followed, loops end, endings in capitals and packed files are read."""
    root, other = tmp_path / "texts", tmp_path / "other"
    for path, text in ((root / "a.txt", "a"), (root / "sub" / "b.TXT", "b"), (other / "in" / "c.txt", "c")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d"}'))
    (root / "e.JSONL").write_text('{"text": "e"}')
    (root / "f.md.Gz").write_bytes(gzip.compress(b"f"))
    (root / "linked").symlink_to(other)
    (root / "sub" / "up").symlink_to(root)
    (root / "aa.txt").symlink_to(root / "a.txt")
    (other / "in" / "in").symlink_to(other)
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    for name in ("x.png", "y.png", "readme", "z.parquet.gz"):
        (root / name).touch()
    whole = [(document.name, document.text) for document in documents(Source(str(root)))]
    names = ["a.txt", "d.jsonl.gz:1", "e.JSONL:1", "f.md.Gz", "linked/in/c.txt", "sub/b.TXT"]
    assert whole == list(zip(names, "adefcb"))
    globbed = [document.text for document in documents(Source(f"{root}/**/*"))]
    assert globbed == [text for _, text in whole]
    assert [document.text for document in documents(Source(f"{root}/**/*.txt"))] == ["a", "c"]
    said = "not read are .png (2), broken links (1), no ending (1), .gz (1), links to what is read (1)."
    assert said in skipped(Source(str(root)))
    assert skipped(Source(str(root / "a.txt"))) == skipped(Source()) == ""


def test_a_packed_file_needs_what_unpacks_it(tmp_path: Path, monkeypatch) -> None:
    text = "\n".join(f"line {number}" for number in range(9999))
    for name, raw in (("a.txt.zst", text.encode()), ("b.jsonl.zst", json.dumps({"text": text}).encode())):
        with pyarrow.output_stream(str(tmp_path / name), compression="zstd") as file:
            file.write(raw)
    assert [document.text for document in documents(Source(str(tmp_path)))] == [text, text]
    (tmp_path / "a.txt.zst").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"cannot read .*a\.txt\.zst"):
        list(documents(Source(str(tmp_path))))
    (tmp_path / "a.txt.gz").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"a\.txt\.gz is no whole gzip file"):
        list(documents(Source(str(tmp_path / "a.txt.gz"))))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.txt\.zst is packed with zstd, which pyarrow unpacks"):
        list(documents(Source(str(tmp_path / "a.txt.zst"))))


def test_a_byte_order_mark_at_a_files_start_is_no_text(tmp_path: Path) -> None:
    """Files that were joined have it within; one elsewhere in a text is text."""
    (tmp_path / "a.txt").write_bytes("\ufeffa\ufeff".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "b"}\n\ufeff{"text": "\ufeffc"}\n'.encode())
    assert [document.text for document in documents(Source(str(tmp_path)))] == ["a\ufeff", "b", "\ufeffc"]
