"""What is shown on several GPUs: all of it runs on a CPU's processes, what differs is said, what did not run named."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from counterflow.benchmark.all_to_all import AllToAll
from counterflow.benchmark.processes import begun
from counterflow.benchmark.saved import note, noted
from counterflow.benchmark.several import Run, several
from counterflow.benchmark.several_equality import FixedSamples, Share, plain_step, step_equality, whole_model
from counterflow.benchmark.several_parts import Part, Several, note_dispatch, out_of_reach, parts
from counterflow.benchmark.several_predicted import ROOM, held_against, laid_out, prediction, report_words
from counterflow.benchmark.several_shown import holds, markdown, readme, said
from counterflow.benchmark.several_steps import Way, step_speed
from counterflow.comm.mesh import Mesh
from counterflow.config import run as settings
from counterflow.config.load import load_run
from counterflow.errors import ConfigError
from counterflow.plan.hardware import hardware
from counterflow.schedule import trace

NARROW = (
    "model.hidden_size=32", "model.num_heads=2", "model.vocab_size=64", "model.q_lora_rank=16",
    "model.kv_lora_rank=16", "model.dense_intermediate_size=32", "model.moe_intermediate_size=16",
    "model.initializer_std=0.1", "data.sequence_length=8",
)  # fmt: skip
ALL = ("dualpipe", "dualpipev", "zb1p", "1f1b")


def narrow(pipeline: int = 1, expert: int = 1, schedule: str = "dualpipev"):
    """A run of `tiny`, made narrow: four micro-batches of one sequence for each data rank."""
    return load_run("tiny", [*NARROW, *laid_out(pipeline, expert, 4, 1, schedule), "train.precision=fp32"])


def test_parts_are_what_the_claim_needs_and_equality_is_first():
    names = [part.name for part in parts(Several(ranks=8))]
    compared = [name for name in names if name.startswith("equality")]
    assert compared == [f"equality, {one}" for one in ("PP4·EP2", "PP2·EP4", "EP8", "PP2·EP2", "PP4")]
    steps = [f"{model}, {schedule}, PP4·EP2" for model in ("report", "small") for schedule in ALL]
    assert [name for name in names if name in steps] == steps
    assert (
        names.index("equality, EP8")
        < names.index(steps[0])
        < names.index("dispatch, EP8")
        < names.index(steps[1])
    )
    assert names[-1] == "dispatch, EP4" and len(names) == 2 + 5 + 8 + 2
    rows = [row for part in parts(Several(ranks=4, models=("small",))) for row in part.rows]
    assert len(set(rows)) == len(rows) and "small, zb1p, PP2·EP2, overlap off, forced balanced" in rows
    assert {"equality, PP4, bf16", "equality, PP2·EP2, fp32, nvlink"} <= set(rows)


def test_what_few_ranks_cannot_show_is_named():
    assert "equality, EP8" in out_of_reach(4) and "equality, PP4" not in out_of_reach(4)
    assert {"equality, PP4", "dispatch, EP4", "dispatch, EP8"} <= set(out_of_reach(2)) and not out_of_reach(8)
    with pytest.raises(ConfigError, match="--ranks is 3"):
        Several(ranks=3)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        Several(kinds=("step",))


def test_report_layers_take_as_many_experts_as_every_schedule_has_room_for():
    def experts(memory: float) -> int:
        words = dict(word.split("=") for word in report_words(2, 2, memory, 8, ALL))
        return int(words["model.num_routed_experts"])

    assert experts(80e9) < experts(141e9)
    words = report_words(2, 2, 141e9, 8, ALL)
    for schedule in ALL:
        run = load_run("v3-671b", [*words, *laid_out(2, 2, 8, 1, schedule)])
        assert (run.model.hidden_size, run.model.moe_intermediate_size, run.model.num_heads) == (
            7168,
            2048,
            128,
        )
        found = prediction(run, Way(True, False), hardware("h200"))
        assert max(found.memory_bytes) < ROOM * 141e9
    with pytest.raises(ConfigError, match="take more GPUs"):
        report_words(2, 2, 8e9, 8, ALL)


def test_the_loops_routing_is_replayed_and_flips_are_counted():
    """Given another run's experts a step takes these, says how many it would not have chosen, and differs."""
    run, mesh = narrow(), Mesh()
    samples, whole = FixedSamples(run), whole_model(run)
    ours = Share(run, mesh, whole)
    schedule = ours.pipelined.schedule
    own = plain_step(run, whole, schedule, samples, mesh.device, None)
    _, flips = ours.step(samples, own.routing)
    assert flips == 0 and max(error for _, error in ours.errors(own.gradients)) < 1e-6
    moved = {index: [(ids + 1) % 16 for ids in some] for index, some in own.routing.items()}
    other = plain_step(run, whole, schedule, samples, mesh.device, moved)
    sums, flips = ours.step(samples, moved)
    assert flips > 0 and max(error for _, error in ours.errors(other.gradients)) < 1e-6
    assert max(error for _, error in ours.errors(own.gradients)) > 0.1
    counts = sum(sums.counts.values())
    assert isinstance(counts, torch.Tensor) and int(counts.sum()) == sum(
        ids.numel() for some in moved.values() for ids in some
    )


def test_a_step_that_is_not_the_loops_is_called_so(tmp_path):
    step_equality(Mesh(), narrow(), "equality, one", ("fp32", "bf16"), ("collective",), tmp_path / "rows")
    rows = noted(tmp_path / "rows")
    assert [row["name"] for row in rows] == ["equality, one, fp32", "equality, one, bf16"]
    assert all(holds(row) and row["same_counts"] and row["choices"] == 8 * 4 * 4 * 4 - 4 * 4 for row in rows)
    assert rows[0]["exact"] >= rows[0]["weights"] - 2  # embedding and head are summed in another order
    wrong = rows[0] | {"worst": 0.3}
    assert not holds(wrong) and "NOT EQUAL" in said(wrong) and "NOT EQUAL" in page(wrong)
    assert not holds(rows[0] | {"same_counts": False})


def page(*rows: dict, not_run: dict | None = None) -> str:
    made = {"started": "2026-01-01T00:00", "torch": "2", "commit": "c", "cpu": "a CPU", "cores": "2"}
    about = {"ranks": 2, "device": "cpu", "steps": 2, "warmups": 1}
    return readme(
        {
            "settings": about,
            "provenance": made,
            "rows": {row["name"]: row for row in rows},
            "not_run": not_run or {},
        }
    )


def test_a_step_is_held_against_its_prediction_and_its_own_op_times(tmp_path):
    run, ways = narrow(), (Way(True, False), Way(False, True))
    step_speed(Mesh(), run, "narrow", ways, 1, 2, tmp_path / "rows.jsonl")
    rows = noted(tmp_path / "rows.jsonl")
    assert [row["name"] for row in rows] == [f"narrow, {way}" for way in ways]
    for row, way in zip(rows, ways):
        spans = trace.read(Path(row["trace"]).read_text())
        found = held_against(run, way, row, spans)
        tokens = run.train.batch_size * run.data.sequence_length
        assert found["tokens_per_s"] * found["step_s"] == pytest.approx(tokens) and len(row["steps_s"]) == 2
        # On one rank nothing waits: without the host's gaps between ops the simulation is never longer.
        assert 0 < found["simulated"]["pipeline_s"] <= found["measured"]["pipeline_s"] * (1 + 1e-6)
        assert found["exposed_pipeline_s"] == 0.0
        expected = prediction(run, way, hardware("cpu"))
        assert 0 < expected.pipeline_s < expected.step_s and len(expected.memory_bytes) == 1


def test_transfers_that_nothing_hides_are_predicted_slower():
    run = load_run("small", laid_out(2, 2, 8, 8, "dualpipe"))
    machine = hardware("h200")
    on, off = (prediction(run, Way(overlapped, False), machine) for overlapped in (True, False))
    assert 0 < off.all_to_all_s < off.pipeline_s
    assert off.pipeline_s > 0.9 * on.pipeline_s  # launches bind `small`, and are counted either way
    assert off.idle_s > on.idle_s  # a cell whose ops follow each other leaves the next rank waiting longer


def test_sizes_of_dispatch_come_one_by_one(tmp_path):
    wish = AllToAll((16, 32), 64, 8, 2, rounds=2, warmups=1)
    note_dispatch(Mesh(), wish, "dispatch, EP1", tmp_path / "rows")
    rows = noted(tmp_path / "rows")
    assert [row["name"] for row in rows] == ["dispatch, EP1, 16 tokens", "dispatch, EP1, 32 tokens"]
    assert all(one["tokens"] == row["tokens"] for row in rows for one in row["rows"])
    assert "GB/s on the wire" in said(rows[0]) and "| copy within memory |" in page(*rows)


def test_a_table_has_as_many_cells_in_every_row():
    lines = list(markdown(("a", "b"), [("1",), ("2", "3")]))
    assert lines == ["| a | b |", "|---|---:|", "| 1 |  |", "| 2 | 3 |"]
    assert "- steps, x: no time" in page(not_run={"steps, x": "no time"})


def noting(mesh: Mesh, fate: str, file) -> None:
    """A part's play that notes one of its rows and then hangs or fails."""
    if mesh.first:
        note(file, {"name": "one", "failed": "it was told to"})
    mesh.barrier()
    if fate == "hangs":
        time.sleep(600)
    raise ValueError("told to fail")


@pytest.mark.slow
def test_a_part_that_fails_keeps_its_rows_and_names_the_rest(tmp_path):
    run = Run(Several(ranks=2, device="cpu"), tmp_path, 5.0, tmp_path)
    part = Part("part", ("one", "two"), noting, settings.Parallel(data=2), ("fails",), 60.0)
    run._part(part, tmp_path / "rows")
    assert list(run.record.rows) == ["one"] and "told to fail" in run.record.not_run["two"]
    assert "two: NOT RUN" in (tmp_path / "output.txt").read_text()
    run._part(replace(part, rows=("three",), given=("hangs",), limit_s=0.1), tmp_path / "others")
    assert "did not end within 1 s" in run.record.not_run["three"]
    run.record.end = time.monotonic()
    run._part(replace(part, rows=("four",)), tmp_path / "more")
    assert run.record.not_run["four"].startswith("no time")


def test_a_backend_that_gave_no_step_is_asked_nothing_more(tmp_path):
    wish = Several(ranks=4, models=("small",))
    run = Run(wish, tmp_path, 5.0, tmp_path)
    equality = next(part for part in parts(wish) if part.name == "equality, PP2·EP2")
    steps = next(part for part in parts(wish) if part.ways)
    run.record.rows["equality, PP2·EP2, fp32, collective"] = {"worst": 0.0}
    assert not run._lost() and steps.without(run._lost()) is steps
    run.record.not_run["equality, PP2·EP2, fp32, nvlink"] = (
        "4 processes did not end within 150 s and were killed"
    )
    assert run._lost() == {"nvlink"} and equality.without(run._lost()).given[-1] == ("collective",)
    instead = steps.without(run._lost())
    assert instead.given[0].parallel.dispatch == "collective" and instead.rows == steps.rows
    run.record.rows["equality, PP2·EP2, bf16, nvlink"] = {"worst": 0.0}
    assert not run._lost()


@pytest.mark.slow
def test_two_processes_leave_a_whole_record(tmp_path):
    """Rates, and steps in both layouts: what is asked is in the record, what cannot be is named there."""
    wish = Several(
        ranks=2,
        kinds=("steps",),
        device="cpu",
        models=("tiny",),
        schedules=("1f1b",),
        dispatch=("collective",),
        precision="fp32",
        microbatches=4,
        steps=2,
        warmups=1,
        rates_s=0.001,
        words=NARROW,
    )
    record = several(wish, tmp_path, 10.0)
    raw = json.loads((tmp_path / "raw.json").read_text())
    expected = {row for part in parts(wish) for row in part.rows}
    assert set(raw["rows"]) == expected and set(raw["not_run"]) == set(out_of_reach(2))
    row = record.rows["tiny, 1f1b, EP2, overlap off, real routing"]
    assert row["exposed_all_to_all_s"] > 0 and set(row["errors"]) == {"step", "pipeline", "memory"}
    text = (tmp_path / "README.md").read_text()
    assert "nothing about speed" in text and "equality, EP8: needs 8 ranks" in text
    assert hardware(file=str(tmp_path / "rates-tiny-pp2.toml")).card.launch_s > 0
    drawn = (tmp_path / "tiny-1f1b-pp2-overlap-on-real-routing.svg").read_text()
    assert all(word in drawn for word in ("predicted by the planner", "simulated from", "measured"))


def test_processes_are_ended_when_their_time_is_over():
    with pytest.raises(TimeoutError, match="2 processes did not end within 1 s"):
        for _ in begun(noting, settings.Parallel(data=2), "cpu", "hangs", Path("/dev/null"), limit_s=1.0):
            pass
