"""Bits per byte against plain sums, Binoculars against its definition, expert load against what was forced."""

import json
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.cli import main
from counterflow.config.run import Source
from counterflow.errors import ConfigError, DataError
from counterflow.evaluate import likelihood
from counterflow.evaluate.expert_load import counts, draw, expert_load, relative_load
from counterflow.evaluate.likelihood import binoculars, half, ids_of, nll, perplexity, windows
from tests.data.test_tokenizer import learnt
from tests.model.configs import BASE, random_model

CONFIG = replace(BASE, vocab_size=300, max_positions=16)
MODEL, OTHER = random_model(CONFIG, 1), random_model(CONFIG, 2)
TEXT = "def f(x):\n return 12345 + x\n\n (end). Wörter 日本 🙂 that paar" * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return learnt(tmp_path_factory.mktemp("tokenizer"))


def uniform():
    """A model that finds every token equally likely."""
    model = random_model(CONFIG)
    with torch.no_grad():
        model.head.zero_()
    return model


@given(count=st.integers(1, 200), size=st.integers(1, 40), stride=st.sampled_from([half, int]))
def test_windows_predict_every_token_once_with_half_a_window_before_it_or_apart(count, size, stride):
    predicted = []
    for start, first, end in windows(count, size, stride(size)):
        assert 0 <= start < first < end and end - 1 - start <= size
        assert start == 0 or first - start >= (size // 2 if stride is half else 1)
        assert start == 0 or first - start == (1 if stride is int else size - half(size) + 1) or end == count
        predicted += range(first, end)
    assert predicted == list(range(1, count))


@pytest.mark.parametrize("tokens", [8, 16, 32, 112])
def test_windows_apart_are_those_of_lm_eval(tokens):
    """Each goes on from the last token of the one before, and the last begins as early as it can: of half a window, of
    one, two and seven; lm-eval's own rule, written out."""
    expected, done, size = [(0, 1, min(16, tokens) + 1)], min(16, tokens), 16
    while done < tokens:
        ends = min(tokens, done + size)
        expected.append((ends - size, done + 1, ends + 1))
        done = ends
    assert list(windows(tokens + 1, size, size)) == expected and len(expected) == -(-tokens // size)


def test_losses_are_the_plain_ones_window_by_window(tokenizer):
    ids = ids_of(MODEL, tokenizer, TEXT)
    found = nll(MODEL, tokenizer, TEXT)
    assert len(found) == len(ids) - 1 > 3 * CONFIG.max_positions
    with torch.no_grad():
        for place in (1, 7, 16, 17, 24, 25, len(ids) - 1):
            start, _, _ = next(
                window for window in windows(len(ids), 16, 8) if window[1] <= place < window[2]
            )
            log_p = MODEL.logits(ids[None, start:place])[0, -1].double().log_softmax(-1)
            assert abs(found[place - 1] + log_p[ids[place]]) < 1e-4  # fp32 sums in another order


def test_logits_are_made_a_block_at_a_time(tokenizer, monkeypatch):
    """A window's would be its tokens × the vocabulary."""
    whole = nll(MODEL, tokenizer, TEXT)
    monkeypatch.setattr(likelihood, "token_blocks", lambda tokens, *_: range(0, tokens, 3))
    blocks = [len(targets) for _, targets in likelihood.predictions(MODEL, ids_of(MODEL, tokenizer, TEXT))]
    assert max(blocks) == 3 and sum(blocks) == len(whole)
    assert torch.allclose(nll(MODEL, tokenizer, TEXT), whole, atol=1e-5)


def test_bits_per_byte_of_a_model_that_knows_nothing(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.txt").write_text("12", encoding="utf-8")
    found = perplexity(uniform(), tokenizer, Source(str(tmp_path)))
    assert found.documents == 2 and found.bytes == len(TEXT.encode()) + 2
    assert found.tokens == len(tokenizer.encode(TEXT)) + len(tokenizer.encode("12"))
    assert found.bits_per_byte == pytest.approx(found.tokens * math.log2(300) / found.bytes, rel=1e-6)
    assert perplexity(uniform(), tokenizer, Source(str(tmp_path)), most_bytes=1).documents == 1
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        perplexity(MODEL, tokenizer, Source(str(tmp_path / "c")))


def test_binoculars_is_perplexity_over_crossed_entropy(tokenizer):
    text = "def f(x)"
    ids = ids_of(MODEL, tokenizer, text)
    assert len(ids) <= CONFIG.max_positions
    with torch.no_grad():
        seen = MODEL.logits(ids[None, :-1])[0].double().softmax(-1)
        made = OTHER.logits(ids[None, :-1])[0].double().log_softmax(-1)
    own = sum(-made[place, token] for place, token in enumerate(ids[1:].tolist()))
    crossed = sum(-(seen[place] @ made[place]) for place in range(len(ids) - 1))
    assert binoculars(MODEL, OTHER, tokenizer, text) == pytest.approx((own / crossed).item(), rel=1e-5)
    assert binoculars(OTHER, MODEL, tokenizer, text) != pytest.approx((own / crossed).item(), rel=1e-3)
    assert binoculars(MODEL, uniform(), tokenizer, TEXT) == pytest.approx(1.0)
    with pytest.raises(DataError, match="no tokens"):
        binoculars(MODEL, OTHER, tokenizer, "")


def test_fig9_load_is_counted_by_domain_and_moves_nothing(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    model = random_model(CONFIG)
    model.layers[2].router.bias[5] = 10.0  # every token takes expert 5 of the last layer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = counts(model, tokenizer, Source(str(tmp_path)), most_tokens=40)
    assert found.shape == (2, 12) and found.sum(-1).tolist() == [40 * 3, 40 * 3]
    assert found[1, 5] == 40 and relative_load(found)[1, 5] == pytest.approx(40 / (120 / 12))
    assert torch.allclose(relative_load(found).mean(-1), torch.ones(2, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loads = {"one": relative_load(found), "two": relative_load(found.flip(1))}
    for suffix, sign in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        draw(loads, 1, tmp_path / f"load{suffix}")
        assert (tmp_path / f"load{suffix}").read_bytes().startswith(sign)
    with pytest.raises(ConfigError, match="no layer with experts"):
        expert_load(random_model(replace(CONFIG, num_dense_layers=3)), tokenizer, {}, 10)


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    from counterflow.convert.export import Form, export

    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    export(MODEL, tokenizer, tmp_path / "one", Form("fp32"))
    export(OTHER, tokenizer, tmp_path / "two", Form("fp32"))
    return tmp_path


def test_a_reading_that_is_interrupted_says_what_it_found(tokenizer, tmp_path, monkeypatch, capsys):
    (path := tmp_path / "a.txt").write_text(TEXT)
    whole = likelihood.predictions

    def cut(*given):
        yield from islice(whole(*given), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(likelihood, "predictions", cut)
    with pytest.raises(KeyboardInterrupt):
        perplexity(MODEL, tokenizer, Source(str(path)))
    assert re.search(
        r"reading .*a\.txt  \d\.\d{3} bits per byte so far  \d+ of \d+ B", capsys.readouterr().err
    )


def test_the_commands_write_what_they_measure(folder, tokenizer, capsys):
    text, one = str(folder / "text.txt"), str(folder / "one")
    assert main(["evaluate", "perplexity", text, "--run", one, "--json", str(folder / "p.json")]) == 0
    report = json.loads((folder / "p.json").read_text())
    assert (report["window"], report["stride"]) == (16, 8)
    (found,) = report["texts"]
    expected = nll(MODEL, tokenizer, TEXT).double().sum().item() / math.log(2) / len(TEXT.encode())
    assert found["bits_per_byte"] == pytest.approx(expected)
    said = capsys.readouterr().out
    assert f"{expected:.4f} bits per byte" in said and "16 tokens, each 8 on from the one before" in said
    assert main(["evaluate", "perplexity", text, "--run", one, "--window", "4"]) == 0
    expected = nll(MODEL, tokenizer, TEXT, 4).double().sum().item() / math.log(2) / len(TEXT.encode())
    assert f"{expected:.4f} bits per byte" in capsys.readouterr().out
    assert main(["evaluate", "perplexity", text, "--run", one, "--window", "17"]) == 2
    assert "window is 17 and the model has 16 positions" in capsys.readouterr().err
    loads = ["evaluate", "expert-load", f"code={text}", "--run", one, "--max_tokens", "30", "--picture"]
    assert main([*loads, str(folder / "load.bmp")]) == 2
    assert "its name must end in .png, .svg, .pdf" in capsys.readouterr().err
    assert main([*loads, str(folder / "new" / "load.png")]) == 0
    assert (folder / "new" / "load.png").is_file()
    kept = json.loads((folder / "new" / "load.json").read_text())
    assert kept["first_layer"] == 1 and sum(kept["domains"]["code"]["counts"][0]) == 90
    capsys.readouterr()
    words = ["evaluate", "binoculars", text, "--observer", one, "--performer", str(folder / "two")]
    (folder / "b").mkdir()
    (folder / "b" / "text.txt").write_text("def f(x)")  # of the other's name
    assert main([*words[:3], str(folder / "b" / "text.txt"), *words[3:]]) == 0
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    texts = {text: TEXT, str(folder / "b" / "text.txt"): "def f(x)"}
    assert scores == {name: f"{binoculars(MODEL, OTHER, tokenizer, one):.4f}" for name, one in texts.items()}
    assert main(["evaluate", "perplexity", text]) == 2
    assert main(["evaluate", "binoculars", text, "--observer", one]) == 2
    (folder / "empty.txt").write_text("")
    assert main([*words[:2], str(folder / "empty.txt"), *words[3:]]) == 2
    assert main(["evaluate", "perplexity", text, "--run", one, "--max_bytes=-5"]) == 2
    errors = capsys.readouterr().err
    assert "--run is missing" in errors and "--performer is missing" in errors
    assert "empty.txt hold no text" in errors and "max_bytes is -5.0; it must be at least 1" in errors


def test_models_of_other_vocabularies_are_not_compared(folder, tmp_path_factory, capsys):
    from counterflow.convert.export import Form, export

    other = learnt(tmp_path_factory.mktemp("other"), vocab_size=290)
    export(OTHER, other, folder / "three", Form("fp32"))
    words = ["--observer", str(folder / "one"), "--performer", str(folder / "three")]
    assert main(["evaluate", "binoculars", str(folder / "text.txt"), *words]) == 2
    assert "different vocabularies" in capsys.readouterr().err
