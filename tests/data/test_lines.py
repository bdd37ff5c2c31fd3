"""JSON lines end at line feeds, whatever their strings hold, and every fault of a file is one sentence."""

import gzip
import json

import pytest

from counterflow.data.lines import rows
from counterflow.errors import DataError

pytestmark = pytest.mark.pure


def test_lines_end_at_line_feeds_alone(tmp_path):
    texts = ["a\u2028b", "c\u0085d\x1e", "\ufeff", "e\rf"]
    lines = [json.dumps({"text": text, "id": 7}, ensure_ascii=False) for text in texts]
    lines.insert(1, " \r")
    raw = b"\xef\xbb\xbf" + "\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.GZ").write_bytes(gzip.compress(raw))
    for name in ("a.jsonl", "b.jsonl.GZ"):
        found = list(rows(tmp_path / name))
        assert [number for number, _ in found] == [1, 3, 4, 5]
        assert [row for _, row in found] == [{"text": text, "id": 7} for text in texts]


def test_what_stands_beside_a_text_does_not_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "ok", "id": ' + "7" * 5000 + ', "tree": ' + "[" * 900 + "]" * 900 + "}"
    )
    ((_, row),) = rows(tmp_path / "a.jsonl")
    assert row["text"] == "ok"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n' + b"[" * 100_000, r"a\.jsonl:2 is not JSON \(nested too deep\)"),
        (b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl:2: byte 24 \(0xe9\) is not UTF-8"),
        (b'{"text": "a"}\n{"text": ', r"a\.jsonl:2 is not JSON .*Mend or drop"),
    ],
)
def test_faults_are_named_by_their_line(tmp_path, content, says):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "raw", [b"no gzip", gzip.compress(b'{"text": "a"}\n' * 99)[:-12]], ids=["other", "cut"]
)
def test_a_broken_gzip_file_is_named(tmp_path, raw):
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is no whole gzip file"):
        list(rows(tmp_path / "a.jsonl.gz"))
