"""What a run leaves in metrics.jsonl and TensorBoard, also after a kill; and what it says meanwhile."""

import json
import math
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.config.load import load_run
from counterflow.config.runs import RUNS
from counterflow.errors import ConfigError
from counterflow.train import begin, chart, lr
from counterflow.train.metrics import (
    METRICS,
    MOST_LOADS,
    Metrics,
    Tracker,
    drop_after,
    facts,
    load_every,
    read,
    read_light,
)
from counterflow.train.trainer import moe_names


def step_values(step: int, **more: Any) -> dict[str, Any]:
    """A step as the trainer gives it, of 8 samples of 32 tokens."""
    return {
        "step": step,
        "samples": 8 * step,
        "tokens": 256 * step,
        "loss": 5.0 / step,
        "mtp_loss": [6.0 / step, 7.0 / step],
        "tokens_per_s": 1000.0,
        "max_vio": 0.5,
        "load": {"layers.1": [3, 1, 2, 2], "layers.2": [2, 2, 2, 2]},
        **more,
    }


def write(folder: Path, first: int, last: int, **more: Any) -> None:
    """Open after the step before `first` and write up to `last`."""
    written = Metrics(folder, first - 1)
    for step in range(first, last + 1):
        written.write(step_values(step, **more))
    written.close()


def board(folder: Path) -> Any:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_a_step_is_read_back_as_written(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    assert read(tmp_path) == [step_values(step) for step in (1, 2, 3)]


def test_a_folder_without_metrics_reads_as_empty(tmp_path: Path) -> None:
    assert read(tmp_path) == []


def test_a_step_is_on_disk_before_the_next(tmp_path: Path) -> None:
    written = Metrics(tmp_path, 0)
    written.write(step_values(1))
    assert len(read(tmp_path)) == 1
    written.close()


def test_resuming_drops_later_steps(tmp_path: Path) -> None:
    write(tmp_path, 1, 7)
    write(tmp_path, 5, 6, resumed=True)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "resumed" in row] == [5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, "tensorboard"]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "{", "\0\0\0", '{"step": 4}'])
def test_resuming_drops_a_torn_line(tmp_path: Path, torn: str) -> None:
    write(tmp_path, 1, 3)
    with (tmp_path / METRICS).open("a") as file:
        file.write(torn)
    write(tmp_path, 4, 4)
    assert read(tmp_path) == [step_values(step) for step in (1, 2, 3, 4)]


def test_a_damaged_line_is_left_out_and_costs_no_other(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    path = tmp_path / METRICS
    lines = path.read_bytes().split(b"\n")
    for number, damaged in (
        (1, lines[1][:-1]),
        (2, lines[2].replace(b"tokens", b"tokenz")),
        (3, b"x" + lines[3]),
    ):
        path.write_bytes(b"\n".join([*lines[:number], damaged, *lines[number + 1 :]]))
        write(tmp_path, 6, 6)
        assert [row["step"] for row in read(tmp_path)] == [step for step in range(1, 7) if step != number + 1]


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    Metrics(tmp_path, 0).close()
    assert read(tmp_path) == []


def test_a_long_history_is_cut_where_it_goes_on_and_read_without_its_loads(tmp_path: Path) -> None:
    """Of lines that are mostly loads: at a resume in the memory of a few, and for the page with one load."""
    load = {f"layers.{layer}": list(range(1000, 1256)) for layer in range(10)}
    write(tmp_path, 1, 40, load=load, dead_experts=[0] * 10)
    size = (tmp_path / METRICS).stat().st_size
    tracemalloc.start()
    drop_after(tmp_path / METRICS, 30)
    cut = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    rows = read_light(tmp_path)
    light = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["step"] for row in rows] == list(range(1, 31)) and size > 40 * 12_000
    assert cut < size / 8 and light < 6 * size / 8, "three loads of ints, which take four times their digits"
    assert [row["step"] for row in rows if "load" in row or "dead_experts" in row] == [30]
    assert rows[-1]["load"] == {name: [3 * count for count in counts] for name, counts in load.items()}


def test_the_loads_of_a_long_run_are_written_as_sums_and_the_page_shows_the_same(tmp_path: Path) -> None:
    loads = {step: {"layers.1": [step, 1, 2, 2], "layers.2": [2, step, 2, 2]} for step in range(1, 31)}
    (tmp_path / "all").mkdir()
    kept, all_ = Metrics(tmp_path, 0, load_every=3), Metrics(tmp_path / "all", 0)
    for step, load in loads.items():
        for metrics in (kept, all_):
            metrics.write(step_values(step, load=load))
    kept.close()
    all_.close()
    rows = read(tmp_path)
    assert [row["step"] for row in rows if "load" in row] == list(range(3, 31, 3)) and len(rows) == 30
    assert (
        rows[2]["load"] == {"layers.1": [6, 3, 6, 6], "layers.2": [6, 6, 6, 6]} and rows[2]["load_steps"] == 3
    )
    assert chart.relative_load(read_light(tmp_path)) == chart.relative_load(read(tmp_path / "all"))
    assert chart.relative_load(read_light(tmp_path / "all")) == chart.relative_load(read(tmp_path / "all"))


@pytest.mark.parametrize("name", list(RUNS))
def test_the_loads_of_a_whole_run_stay_small_and_those_of_the_small_runs_are_complete(name: str) -> None:
    run = RUNS[name]
    numbers = len(moe_names(run.model)) * run.model.num_routed_experts
    steps = lr.num_steps(run.train, run.data.sequence_length)
    every = load_every(numbers, steps)
    assert numbers * (steps // every) <= MOST_LOADS and (every == 1) == (name in ("tiny", "small"))


def test_not_finite_is_null(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, loss=math.nan, grad_norm=math.inf, mtp_loss=[1.0, -math.inf])
    text = (tmp_path / METRICS).read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = json.loads(text)
    assert (row["loss"], row["grad_norm"], row["mtp_loss"]) == (None, None, [1.0, None])


def test_tensorboard_has_scalars_lists_layers_and_the_heat_map(tmp_path: Path) -> None:
    write(tmp_path, 48, 51)
    shown = board(tmp_path)
    tags = set(shown.Tags()["scalars"])
    wanted = {"loss", "mtp_loss/1", "mtp_loss/2", "max_vio_by_layer/layers.1", "max_vio_by_layer/layers.2"}
    assert wanted <= tags and "step" not in tags
    assert [event.value for event in shown.Scalars("max_vio_by_layer/layers.1")] == [0.5] * 4
    (image,) = shown.Tags()["images"]
    assert [event.step for event in shown.Images(image)] == [50]


def test_tensorboard_is_purged_on_resume(tmp_path: Path) -> None:
    write(tmp_path, 1, 7)
    write(tmp_path, 5, 6, loss=1.0)
    events = board(tmp_path).Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events][-2:] == [1.0, 1.0]


def test_a_layer_without_tokens_and_a_run_without_experts(tmp_path: Path) -> None:
    write(tmp_path, 50, 50, load={"layers.1": [0, 0]})
    write(tmp_path, 51, 51, load={})
    assert [row["load"] for row in read(tmp_path)] == [{"layers.1": [0, 0]}, {}]


def test_a_step_says_the_most_important_first() -> None:
    assert facts(step_values(2), 40, 10_240) == [
        "step 2/40",
        "512/10.24 K tokens",
        "loss 2.500",
        "1,000 tokens/s",
        "MaxVio 0.50",
        "MTP 3.000 3.500",
    ]


def test_a_tracked_run_keeps_its_id_over_its_starts(tmp_path: Path, monkeypatch) -> None:
    """Offline, with the real package: both starts log to one run of the service, by TensorBoard's names."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = load_run("tiny", ["keep.wandb=project"])
    for first in (1, 3):
        written = Metrics(tmp_path, first - 1, Tracker(tmp_path, run))
        for step in (first, first + 1):
            written.write(step_values(step))
        written.close()
    (number,) = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert number == (tmp_path / "wandb.txt").read_text().strip()
    logs = [path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert len(logs) == 2 and all(
        b"max_vio_by_layer/layers.1" in log and b"mtp_loss/2" in log for log in logs
    )


def test_a_tracking_service_that_fails_is_said_once_and_ends_nothing(tmp_path, monkeypatch, capsys) -> None:
    """A stand-in, since the real one does not fail when asked to."""

    class Failing:
        def log(self, *_: Any, **__: Any) -> None:
            raise BrokenPipeError("the service is gone")

    client = SimpleNamespace(init=lambda **_: Failing(), Settings=dict, errors=SimpleNamespace(Error=OSError))
    monkeypatch.setitem(sys.modules, "wandb", client)
    metrics = Metrics(tmp_path, 0, Tracker(tmp_path, load_run("tiny", ["keep.wandb=project"])))
    for step in (1, 2):
        metrics.write(step_values(step))
    metrics.close()
    assert len(read(tmp_path)) == 2
    assert capsys.readouterr().err.count("Weights & Biases has failed (the service is gone)") == 1


def test_a_tracker_that_is_not_installed_is_said_before_the_start(monkeypatch) -> None:
    monkeypatch.setattr(begin, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"wandb is not installed; leave it out, or: .* -m pip install '.*wandb"
    ):
        begin.is_complete(load_run("tiny", ["keep.wandb=project"]))
