"""Samples by global index: any slicing gives the same ones, an epoch visits each window once."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.cli import main
from counterflow.config.run import Source
from counterflow.data.loader import Samples
from counterflow.errors import DataError
from tests.data.texts import data, folder
from tests.train.runs import overrides


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Samples:
    """Two sources, three to one."""
    root = tmp_path_factory.mktemp("loader")
    sources = Source(str(folder(root / "a", 50)), 3.0), Source(str(folder(root / "b", 30, first=100)), 1.0)
    return Samples(data(root, *sources), 300, seed=1, quiet=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Samples:
    return Samples(data(tmp_path_factory.mktemp("loader")), 300, seed=1, quiet=True)


@given(index=st.integers(0, 3000), cuts=st.lists(st.integers(0, 12), min_size=1, max_size=5))
def test_any_slicing_is_the_whole(two: Samples, index: int, cuts: list[int]) -> None:
    sizes = [size for size in cuts if size] or [1]
    whole, parts = two.train(index, sum(sizes)), []
    for size in sizes:
        parts.append(two.train(index, size))
        index += size
    assert torch.equal(torch.cat(parts), whole)


def test_slices_out_of_order_and_far_apart(two: Samples) -> None:
    late, early = two.train(100_000, 3), two.train(0, 3)
    assert torch.equal(two.train(100_000, 3), late) and torch.equal(two.train(0, 3), early)


def test_shapes(two: Samples) -> None:
    samples = two.train(5, 4)
    assert samples.shape == (4, 17) and samples.dtype == torch.int64 and samples.max() < 300
    assert two.held_out(0, 2).shape == (2, 17)


def test_seed_decides(one: Samples) -> None:
    same, other = Samples(one.data, 300, 1, quiet=True), Samples(one.data, 300, 2, quiet=True)
    assert torch.equal(same.train(0, 50), one.train(0, 50)) and same.fingerprint == one.fingerprint
    assert not torch.equal(other.train(0, 50), one.train(0, 50)) and other.fingerprint == one.fingerprint
    assert torch.equal(other.held_out(0, 5), one.held_out(0, 5))


def test_sec4_1_every_sample_once_an_epoch(one: Samples) -> None:
    packed, size = one._packed[0], one._packed[0].num_samples
    for epoch in range(2):
        order, _ = packed._order(epoch)
        documents = torch.from_numpy(stream(one))
        offsets = packed.shards.offsets
        laid = torch.cat([documents[offsets[d] : offsets[d + 1]] for d in order])
        wanted = [tuple(laid[j * 16 : j * 16 + 17].tolist()) for j in range(size)]
        found = read(packed, range(epoch * size, (epoch + 1) * size))
        assert Counter(found) == Counter(wanted)
        assert found != wanted, "visited in scattered order"
    assert read(packed, range(size)) != read(packed, range(size, 2 * size)), "each epoch has its own order"


def stream(samples: Samples):
    """All training tokens in the order of the files."""
    shards = samples._packed[0].shards
    out = torch.empty(shards.num_tokens, dtype=torch.int64).numpy()
    shards.copy(0, out)
    return out


def read(packed, numbers) -> list[tuple[int, ...]]:
    """Samples of one source by number."""
    wanted = torch.tensor(list(numbers)).numpy()
    out = torch.empty(len(wanted), packed.length + 1, dtype=torch.int64).numpy()
    packed.read(wanted, out)
    return [tuple(row) for row in out.tolist()]


def test_sec4_1_every_sample_once_through_the_front_door(one: Samples) -> None:
    """A source's numbers come a block of 1024 at a time, so after whole blocks all of them have been read."""
    size = one._packed[0].num_samples
    blocks = -(-size // 1024)
    found = Counter(map(tuple, one.train(0, blocks * 1024).tolist()))
    assert found == Counter(read(one._packed[0], range(blocks * 1024)))


def test_weights_are_respected(two: Samples) -> None:
    sources, _ = two._mixture.locate(0, 2048)
    assert (sources == 0).sum() == 1536 and (sources == 1).sum() == 512


def test_held_out_covers_the_stream_in_order(two: Samples) -> None:
    samples = two.held_out(0, two.num_held_out)
    targets = samples[:, 1:].flatten().tolist()
    ids = [
        i for text in two.held_out_text() for i in [*two.tokenizer.encode(text.decode()), two.tokenizer.eos]
    ]
    assert [samples[0, 0].item(), *targets] == ids[: len(targets) + 1]
    assert len(ids) - 1 - len(targets) < 16, "less than one sample is left out"
    middle = two.num_held_out // 2
    parts = [two.held_out(0, middle), two.held_out(middle, two.num_held_out - middle)]
    assert torch.equal(torch.cat(parts), samples)
    with pytest.raises(AssertionError, match="held-out samples end at"):
        two.held_out(two.num_held_out, 1)


def test_bytes_per_token_counts_text_over_tokens_and_ends(two: Samples) -> None:
    texts = list(two.held_out_text())
    tokens = sum(len(two.tokenizer.encode(text.decode())) + 1 for text in texts)
    assert two.bytes_per_token == sum(map(len, texts)) / tokens
    assert two.train_bytes == sum(map(len, two.train_text()))
    assert two.train_tokens == sum(packed.shards.num_tokens for packed in two._packed)


def test_parts_make_up_the_files(two: Samples) -> None:
    written = sorted(p.read_bytes() for s in two.data.sources for p in Path(s.path).iterdir())
    assert sorted([*two.train_text(), *two.held_out_text()]) == written


def test_fingerprint_follows_text_tokenizer_and_fim(tmp_path: Path) -> None:
    first = data(tmp_path)
    prints = {Samples(first, 300, 0, quiet=True).fingerprint}
    prints.add(Samples(first, 310, 0, quiet=True).fingerprint)
    prints.add(Samples(replace(first, fim_rate=0.3), 300, 0, quiet=True).fingerprint)
    prints.add(Samples(replace(first, held_out=0.3), 300, 0, quiet=True).fingerprint)
    (tmp_path / "texts" / "new.txt").write_text("one more text")
    prints.add(Samples(first, 300, 0, quiet=True).fingerprint)
    assert len(prints) == 5
    moved = replace(first, cache_dir=str(tmp_path / "elsewhere"))
    assert Samples(moved, 300, 3, quiet=True).fingerprint in prints


def test_one_small_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("".join(f"Note {i}: buy bread.\n" for i in range(200)))
    samples = Samples(data(tmp_path, Source(str(tmp_path / "notes.md"))), 300, 0, quiet=True)
    assert samples.train(0, 4).shape == (4, 17) and samples.num_held_out > 5


def test_less_text_than_a_sample(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words\n" * 10)
    short = data(tmp_path, Source(str(tmp_path / "a.txt")), sequence_length=500)
    with pytest.raises(
        DataError, match=r"a\.txt' has \d+ tokens to train on; .*= 501\. Give more text, or lower"
    ):
        Samples(short, 300, 0, quiet=True)
    (tmp_path / "b.txt").write_text("a few more words\n" * 100)
    few = data(tmp_path, Source(str(tmp_path / "b.txt")), sequence_length=60, held_out=0.01)
    with pytest.raises(DataError, match=r"held-out part has \d+ tokens; .*Raise data.held_out \(now 0.01\)"):
        Samples(few, 300, 0, quiet=True)


def test_data_tokenises_before_a_run_alone_or_in_shares(tmp_path, monkeypatch, capsys):
    """Of two processes the last one puts the shares together; training then reads no text."""
    words = ["data", "tiny", *overrides(tmp_path)]
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    for rank, said in (("1", "Rank 1 of 2 has made its share.\n"), ("0", " tokens to train on and ")):
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 0 and said in capsys.readouterr().out
    monkeypatch.delenv("RANK")
    monkeypatch.setattr("counterflow.data.shards.tokenise", None)
    assert main(words) == 0 and " tokens to train on and " in capsys.readouterr().out
