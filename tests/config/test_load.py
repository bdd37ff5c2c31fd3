"""Runs from names, files and overrides; every mistake named with its nearest remedy."""

import dataclasses
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.cli import at_home
from counterflow.config.load import all_keys, load_run, to_toml
from counterflow.config.model import Yarn
from counterflow.config.models import MODELS
from counterflow.config.run import RunConfig, Source
from counterflow.config.runs import RUNS
from counterflow.data.files import files
from counterflow.errors import ConfigError
from counterflow.plan.layout import schedule_of
from counterflow.schedule import SCHEDULES
from counterflow.schedule.text import to_csv
from counterflow.train.folder import folder_of

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("name", RUNS)
def test_every_named_run_survives_its_toml(name, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(load_run(name)))
    assert load_run(str(path)) == RUNS[name]


@given(
    st.text(max_size=20).map("run {}".format).filter(lambda name: ".." not in name),
    st.floats(1e-9, 1e3),
    st.lists(st.tuples(st.text(min_size=1), st.floats(1e-3, 10)), min_size=1, max_size=3),
    st.booleans(),
)
def test_toml_round_trip(tmp_path_factory, name, rate, sources, yarn):
    run = load_run("tiny")
    run = dataclasses.replace(
        run,
        name=name,
        data=dataclasses.replace(run.data, sources=tuple(Source(path, weight) for path, weight in sources)),
        model=dataclasses.replace(run.model, yarn=Yarn(factor=rate) if yarn else None),
    )
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    path.write_text(to_toml(run), encoding="utf-8")
    assert load_run(str(path)) == run


def test_overrides_and_bases(tmp_path):
    run = load_run(
        "tiny", ["train.lr.peak=1e-4", "--model.num_layers=6", "name=other", "train.recompute=layer"]
    )
    assert (run.train.lr.peak, run.model.num_layers, run.name, run.train.recompute) == (
        1e-4,
        6,
        "other",
        "layer",
    )
    assert load_run("tiny", ["model=v3-16b"]).model == MODELS["v3-16b"]
    assert load_run("tiny", ["model=small", "model.num_layers=3"]).model.num_layers == 3
    path = tmp_path / "a.toml"
    path.write_text('base = "small"\n[model]\nbase = "tiny"\nnum_heads = 2\n[data]\nsources = ["a", "b"]\n')
    run = load_run(str(path), ["data.sources=texts/*.txt"])
    assert run.model == dataclasses.replace(MODELS["tiny"], num_heads=2)
    assert run.data.sources == (Source("texts/*.txt"),)
    assert load_run(str(path)).data.sources == (Source("a"), Source("b"))
    assert load_run("tiny", ["train.tokens=5"]).train.tokens == 5.0
    assert load_run("tiny", ["model.yarn.factor=8"]).model.yarn == Yarn(factor=8.0)


BODY = Source("a.jsonl", field="body")


@pytest.mark.parametrize(
    ("overrides", "sources"),
    [
        (["data.sources=a.jsonl", "data.sources.0.field=body"], (BODY,)),
        (["data.sources.0.field=body", "data.sources=a.jsonl"], (BODY,)),
        (["data.sources.field=body", "data.sources=a.jsonl"], (BODY,)),
        (["data.sources.0.path=a.jsonl", "data.sources.0.field=body"], (BODY,)),
        (["data.sources.0=a.jsonl", "data.sources.field=body"], (BODY,)),
        (
            ["data.sources.1.path=b", "data.sources.1.weight=2", "data.sources=a"],
            (Source("a"), Source("b", 2.0)),
        ),
        (
            ['data.sources=["a.jsonl", "b"]', "data.sources.field=body", "data.sources.1.field=x"],
            (BODY, Source("b", field="x")),
        ),
    ],
)
def test_sources_are_given_in_any_order(overrides, sources):
    assert load_run("tiny", overrides).data.sources == sources


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        ('sources = "a"', (Source("a", field="body"),)),
        ('sources = ["a", "b"]', (Source("a", field="body"), Source("b"))),
        ('sources = {path = "a", weight = 2}', (Source("a", 2.0, "body"),)),
        (
            '[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"',
            (Source("a", field="body"), Source("b")),
        ),
    ],
)
def test_a_setting_of_a_source_changes_what_a_file_says(tmp_path, given, sources):
    path = tmp_path / "run.toml"
    path.write_text(given if given.startswith("[[") else f"[data]\n{given}\n")
    assert load_run(str(path), ["data.sources.0.field=body"]).data.sources == sources


SIX = dataclasses.replace(MODELS["small"], num_layers=6)


@pytest.mark.parametrize(
    ("overrides", "model", "lr", "batch"),
    [
        (["model.num_layers=6", "model=small"], SIX, 3e-3, 16),
        (["model={num_layers=6}", "model=small"], SIX, 3e-3, 16),
        (["model=small", "model={num_layers=6}"], SIX, 3e-3, 16),
        (["train.lr.peak=1.0", "train={batch_size=32}"], MODELS["tiny"], 1.0, 32),
        (["train={batch_size=32}", "train={lr={peak=2.0}}", "train.lr.peak=1.0"], MODELS["tiny"], 1.0, 32),
    ],
)
def test_a_name_and_tables_leave_settings_given_before_or_after(overrides, model, lr, batch):
    run = load_run("tiny", overrides)
    assert (run.model, run.train.lr.peak, run.train.batch_size) == (model, lr, batch)


def test_a_table_on_the_command_line_leaves_a_files_settings_and_another_model_beside_them_is_refused(
    tmp_path,
):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nnum_layers = 6\n[train]\nbatch_size = 32\n")
    run = load_run(str(path), ["train={seed=5}", "model.num_heads=2"])
    assert (run.train.batch_size, run.train.seed, run.model.num_layers, run.model.num_heads) == (32, 5, 6, 2)
    with pytest.raises(ConfigError, match=r"has settings for its own \(model.num_layers\)"):
        load_run(str(path), ["model=small"])
    path.write_text('model = "tiny"\n')
    assert load_run(str(path), ["model=small", "model.num_layers=6"]).model == SIX


def test_what_was_changed_in_a_run_is_no_setting(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[[changes]]\nstep = 3\nsetting = "train.lr.peak"\nwas = "1"\nnow = "2"\n')
    assert load_run(str(path)) == RunConfig(name="run", model=MODELS["tiny"])


@pytest.mark.parametrize("key", ["data.sources", "data.tokenizer", "keep.folder", "data.cache_dir", "name"])
def test_a_name_that_run_toml_could_not_hold_is_refused(key):
    with pytest.raises(ConfigError, match=r"is 'caf\\udce9'; it is not valid UTF-8"):
        load_run("tiny", [f"{key}={os.fsdecode(b'caf' + bytes([0xE9]))}"])


def test_a_tilde_is_the_home_folder_in_every_setting(tmp_path, monkeypatch):
    """What a shell expands only where it begins a word: from TOML, and behind KEY=."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text("[model]\nnum_layers = 6\n")
    (tmp_path / "own.csv").write_text(to_csv(SCHEDULES["1f1b"](2, 4)))
    (tmp_path / "t.txt").write_text("text")
    run = load_run(
        "tiny", ["from=~/run", "keep.folder=~/run", "parallel.schedule=~/own.csv", "parallel.pipeline=2"]
    )
    assert run.model.num_layers == 6 and folder_of(run.train.start_from) == tmp_path / "run"
    assert run.folder == str(tmp_path / "run") and schedule_of(run.parallel, 4).ranks == 2
    assert load_run("tiny", ["model=~/run/run.toml"]).model.num_layers == 6
    assert files(Source("~/t.txt")) == [("t.txt", tmp_path / "t.txt")]
    words = ["--launch=~/out", "name=~/a", "~/t.txt", "a~b", "x=a~", "--prompt=~/a"]
    home = [f"--launch={tmp_path}/out", f"name={tmp_path}/a", f"{tmp_path}/t.txt", *words[3:]]
    assert list(map(at_home, words)) == home


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.sources.2.path=c"], "give data.sources.1.path first"),
        (["data.sources.1.field=c"], "give data.sources.1.path first"),
        (['data.sources=["a", "b"]', "data.sources.path=c"], "say which, such as data.sources.0.path"),
        (["data.sources.0.pth=c"], "did you mean 'data.sources.0.path'"),
        (["data.sources=5"], "data.sources.0 is 5; it must be a path or a table"),
    ],
)
def test_sources_that_cannot_be_are_refused_by_their_numbers(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_run("tiny", overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.lr.peek=1"], "train.lr.peek is not a setting; did you mean 'train.lr.peak'?"),
        (["trian.tokens=1"], "did you mean 'train.tokens'?"),
        (["train.batch_size=many"], "train.batch_size is 'many'; it must be a whole number"),
        (["train.batch_size=2.5"], "must be a whole number"),
        (["train.recompute=lair"], "did you mean 'layer'?"),
        (["train.lr=3"], "table of settings"),
        (["train.tokens.x=3", "train.tokens=1", "train.tokens.y=3"], "is a value, not a table"),
        (["nonsense"], "write KEY=VALUE"),
        (["model=tinny"], "did you mean 'tiny'?"),
        (["model=no/config.json"], "cannot be read"),
        (["model.num_heads=0"], "model.num_heads is 0; it must be at least 1"),
        (["model.num_experts_per_token=9"], "2 groups of 4 experts offer 8"),
        (["model.num_groups=5"], "multiple of model.num_groups"),
        (["model.num_groups=16"], "holds two or more"),
        (["model.num_limited_groups=5"], "more groups than there are"),
        (["model.qk_rope_head_dim=7"], "make it even"),
        (["model.num_dense_layers=5"], "more dense layers than layers"),
        (["model.balance.auxiliary=swich"], "did you mean 'switch'?"),
        (["train.batch_size=10"], "multiples of train.micro_batch_size"),
        (["train.precision=fp8"], "train.precision is 'fp8'"),
        (["train.lr.peak=0"], "train.lr.peak is 0.0; it must be above 0"),
        (["train.lr.warmup=0.9"], "must rise"),
        (["data.sequence_length=4096"], "raise model.max_positions"),
        (["data.fim_rate=1.5"], "between 0 and 1"),
        (["train.device=gpu"], "train.device is 'gpu'"),
        (["train.threads=-1"], "must be at least 0"),
        (["train.beta1=1"], "at least 0 and below 1"),
        (["train.weight_decay=-1"], "must be at least 0"),
        (["train.tokens=inf"], "must be a finite number"),
        ([f"train.tokens=1{'0' * 400}"], "must be a finite number"),
        (["train.tokens=0", "train.minutes=0"], "a run has a length"),
        (["train.patience=-1"], "must be at least 0"),
        (["model.initializer_std=-1"], "must be above 0"),
        (["model.yarn.beta_fast=0"], "model.yarn.beta_fast is 0.0; it must be above 0"),
        (["name=123"], "put it in quotes"),
        (["keep.resume=perhaps"], "keep.resume is 'perhaps'"),
    ],
)
def test_every_mistake_is_one_message_with_a_remedy(overrides, says):
    with pytest.raises(ConfigError) as raised:
        load_run("tiny", overrides)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        ([], (1.7e6, 0, 5.0)),
        (["train.tokens=1e5"], (1e5, 0, 0.0)),
        (["train.steps=7"], (0.0, 7, 0.0)),
        (["train.minutes=60"], (0.0, 0, 60.0)),
        (["train.minutes=0"], (1.7e6, 0, 0.0)),
        (["train.tokens=1e5", "train.minutes=2"], (1e5, 0, 2.0)),
        (["train.lr.peak=1e-3"], (1.7e6, 0, 5.0)),
    ],
)
def test_a_length_that_is_given_sets_aside_those_of_the_named_run(overrides, lengths, tmp_path):
    train = load_run("tiny", overrides).train
    assert (train.tokens, train.steps, train.minutes) == lengths
    path = tmp_path / "run.toml"
    path.write_text(to_toml(load_run("tiny", overrides)))
    assert load_run(str(path)).train == train


@pytest.mark.parametrize(
    ("given", "meant"),
    [("train.patince", "train.patience"), ("train.stps", "train.steps"), ("keep.steps", "train.steps")],
)
def test_a_misspelt_setting_names_the_one_that_was_meant(given, meant):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        load_run("tiny", [f"{given}=3"])
    with pytest.raises(
        ConfigError, match=r"train\.epochs is not a setting; known: train\.tokens, train\.steps"
    ):
        load_run("tiny", ["train.epochs=3"])


def test_unknown_runs_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load_run("tinny")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(str(tmp_path / "none.toml"))
    path = tmp_path / "broken.toml"
    path.write_text("name = 'x'\ntrain = [\n")
    with pytest.raises(ConfigError, match="line"):
        load_run(str(path))


def test_every_key_is_reachable():
    keys = list(all_keys())
    assert "train.lr.peak" in keys and "model.yarn.factor" in keys and "model.balance.sequence_alpha" in keys
    assert math.isclose(RunConfig().train.lr.peak, 2.2e-4)


def test_a_misspelt_setting_of_a_source_names_the_nearest(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('base = "tiny"\n[[data.sources]]\npath = "x"\nwieght = 2\n')
    with pytest.raises(ConfigError, match=r"did you mean 'data.sources.weight'\?"):
        load_run(str(path))
    path.write_text('base = ["tiny"]\n')
    with pytest.raises(ConfigError, match="no known run"):
        load_run(str(path))


@pytest.mark.parametrize(
    ("settings", "device", "said"),
    [
        (
            ("dispatch_fp8=true", "data=2"),
            "cuda",
            "parallel.dispatch_fp8 has no effect, since parallel.expert is 1",
        ),
        (
            ("dispatch_room=2", "node_ranks=2"),
            "cuda",
            "dispatch_room, parallel.node_ranks have no effect, since",
        ),
        (
            ("data=2", "expert=2", "node_ranks=2"),
            "cuda",
            "node_ranks has no effect, since parallel.dispatch is collective, which knows no nodes",
        ),
        (
            ("data=2", "expert=2", "dispatch_room=2"),
            "cuda",
            "dispatch_room has no effect, since parallel.dispatch",
        ),
        (
            ("data=2", "expert=2", "dispatch=deep_ep", "dispatch_fp8=true"),
            "cuda",
            "since parallel.dispatch is deep_ep",
        ),
        (("record_step=5",), "cuda", "parallel.record_step has no effect, since parallel.pipeline is 1"),
        (("restarts=1",), "cuda", "parallel.restarts has no effect, since there is one process"),
        (("multiprocessors=8",), "cpu", "parallel.multiprocessors has no effect, since the device is a CPU"),
        (("multiprocessors=8",), "cuda", None),
        (("pipeline=2", "record_step=5", "restarts=1"), "cpu", None),
        (("data=2", "expert=2", "dispatch=nvlink", "dispatch_room=2", "dispatch_fp8=true"), "cuda", None),
        (("data=4", "expert=4", "dispatch=two_hop", "node_ranks=2", "dispatch_fp8=true"), "cuda", None),
    ],
)
def test_settings_without_effect_are_named_with_the_reason(settings, device, said):
    run = load_run("small", [f"parallel.{setting}" for setting in settings])
    lines = list(run.parallel.without_effect(device))
    assert [said in line for line in lines] == [True] if said else not lines
