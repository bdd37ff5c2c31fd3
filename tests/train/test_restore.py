"""A run, its export and its import are one model; training goes on from any of them; transformers writes the same."""

import json
from pathlib import Path

import pytest
import torch

from counterflow.cli import main
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.convert.shards import INDEX
from counterflow.errors import CheckpointError, ConfigError
from counterflow.infer.sample import sample_tokens
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.loop import train
from counterflow.train.restore import model_of
from tests.train.runs import overrides, small_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a trained run, its export in fp32, and the import of that."""
    place = tmp_path_factory.mktemp("handover")
    rare = ["keep.checkpoint_every=1000", "keep.eval_every=1000", "data.held_out=0.02"]
    run = small_run(place, "model.num_mtp_modules=2", "train.tokens=3072", "train.lr.peak=1e-2", *rare)
    assert train(run) == 0
    assert main(["export", str(place / "run"), str(place / "out"), "--dtype", "fp32"]) == 0
    assert main(["import", str(place / "out"), str(place / "back")]) == 0
    return place


def equal(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_run_export_and_import_are_one_model(place):
    model, tokenizer = model_of(place / "run")
    for name in ("out", "back"):
        other, other_tokenizer = model_of(place / name)
        assert equal(model, other)
        assert other_tokenizer.encode("the pipeline waits") == tokenizer.encode("the pipeline waits")
    rounded, _ = model_of(place / "run", precision="bf16")
    read, _ = model_of(place / "out", precision="bf16")
    assert equal(rounded, read) and rounded.head.dtype == torch.bfloat16


def test_weights_are_read_into_the_precision_that_is_asked_for(place, monkeypatch):
    """Not into fp32 and rounded afterwards, which takes twice the memory."""
    read, load = [], Checkpoints.load

    def noted(self, step, pieces, some=False):
        read.extend(piece.dtype for name, piece in pieces.items() if name.startswith("master."))
        load(self, step, pieces, some)

    monkeypatch.setattr(Checkpoints, "load", noted)
    monkeypatch.setattr(
        "counterflow.convert.load.load_released",
        lambda model, *_: read.extend(one.dtype for one in model.parameters()),
    )
    for name in ("run", "out"):
        model_of(place / name, precision="bf16")
        assert read and set(read) == {torch.bfloat16}
        read.clear()


def test_all_three_write_the_same(place, capsys):
    texts = set()
    for name in ("run", "out", "back"):
        words = [
            "generate",
            "--run",
            str(place / name),
            "--prompt",
            "the ",
            "--temperature",
            "0",
            "--max_tokens",
            "12",
        ]
        assert main(words) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1 and len(texts.pop()) > 12


def test_transformers_computes_writes_and_drafts_the_same(place, monkeypatch):
    """Its logits to 1e-4 in fp32 on trained weights; its greedy text, drafted by our modules or not."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = model_of(place / "out")
    family = transformers.DeepseekV3ForCausalLM
    layers = [rf"model\.layers\.{model.config.num_layers + depth}\." for depth in range(2)]
    monkeypatch.setattr(family, "_keys_to_ignore_on_load_unexpected", layers)
    theirs = family.from_pretrained(
        str(place / "out"), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = [tokenizer.bos, *tokenizer.encode("the pipeline is fed from both ends and")]
    with torch.no_grad():
        assert (model.logits(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 1e-4
    ours = list(sample_tokens(model, ids, 20, temperature=0))
    given = torch.tensor([ids])
    for how in ({}, {"use_mtp": True}):
        out = theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            **how,
        )
        assert out[0, len(ids) :].tolist() == ours


def hardly_trained(place: Path, name: str, *words: str) -> RunConfig:
    """Two steps too small to move anything, with the model that `name` brings."""
    same = [word for word in overrides(place) if not word.startswith(("model.", "keep.folder"))]
    small = ["train.lr.peak=1e-12", "train.bias_speed=0", "train.tokens=256", "data.held_out=0.02"]
    return load_run(name, [*same, *small, *words])


@pytest.mark.parametrize("source", ["run", "out"])
def test_training_starts_from_a_runs_or_an_exports_weights(place, source, tmp_path, capsys):
    run = hardly_trained(place, "tiny", f"from={place / source}", f"keep.folder={tmp_path / 'on'}")
    assert train(run) == 0
    given, trained = model_of(place / source)[0].state_dict(), model_of(tmp_path / "on")[0].state_dict()
    assert all(torch.allclose(trained[name], given[name], atol=1e-6) for name in given)
    averages = model_of(tmp_path / "on", averaged=True)[0].state_dict()
    assert all(torch.allclose(averages[name], given[name], atol=1e-6) for name in given)
    assert train(run) == 0 and "is complete" in capsys.readouterr().out


def test_an_imported_run_goes_on_from_its_step_0(place, tmp_path):
    assert main(["import", str(place / "out"), str(tmp_path / "given")]) == 0
    assert train(hardly_trained(place, str(tmp_path / "given" / "run.toml"))) == 0
    given, trained = model_of(place / "out")[0].state_dict(), model_of(tmp_path / "given")[0].state_dict()
    assert all(torch.allclose(trained[name], given[name], atol=1e-6) for name in given)


def test_what_is_neither_or_does_not_fit_is_said(place, tmp_path):
    with pytest.raises(CheckpointError, match="no run and no exported model"):
        model_of(tmp_path)
    with pytest.raises(CheckpointError, match="one set of weights"):
        model_of(place / "out", averaged=True)
    with pytest.raises(ConfigError, match="did you mean 'fp32'"):
        model_of(place / "out", precision="fp23")


def test_mistakes_of_export_import_and_from_are_one_line(place, tmp_path, capsys):
    index = place / "out" / INDEX
    kept = index.read_text()
    places = json.loads(kept)
    places["weight_map"]["model.norm.weight"] = "gone.safetensors"
    index.write_text(json.dumps(places))
    try:
        assert main(["import", str(place / "out"), str(tmp_path / "r")]) == 2
    finally:
        index.write_text(kept)
    assert not list(tmp_path.iterdir())
    assert main(["export", str(place / "run"), str(place / "out")]) == 2
    assert main(["train", "tiny", "--from", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "gone.safetensors is missing" in errors[0] and "there already" in errors[1]
    assert "neither run.toml nor config.json" in errors[2]
