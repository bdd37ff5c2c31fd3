"""What `bench overlap` found: for every contender the four ways' times, cost, coincidence, and timelines.

*Cost* is overlapped over computation alone; *coincidence* the share of all-to-all time during which computation runs.
On a CPU there is no profile of kernels, so what stands there instead is named: the share of the transfers' time alone
for which computation did not wait.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any

from counterflow.benchmark.pair import WAYS, Bench, Contender, Overlap, Pairs, contenders
from counterflow.benchmark.processes import NO_LINK, share_a_gpu
from counterflow.benchmark.profile import coincidence, kernels, profiled, spans
from counterflow.comm.mesh import Mesh
from counterflow.config.models import MODELS
from counterflow.errors import CounterflowError
from counterflow.plan.hardware import hardware
from counterflow.plan.routing import UNIFORM
from counterflow.progress import Progress
from counterflow.schedule import picture
from counterflow.schedule.words import Op, Span
from counterflow.units import bytes_

HEAD = ("ms a pair", "repeats", *WAYS, "ratio", "cost", "spread", "coincidence")
NODES = 8
"""Over which the report shares a layer's experts."""


def overlap(wish: Overlap, mesh: Mesh, progress: Progress) -> Iterator[dict[str, Any]]:
    """The result of a settled wish, growing contender by contender, the same on every rank; each is one of progress."""
    pairs, rows, notes = Pairs(wish, mesh), [], []
    config = pairs.config
    notes.append(
        f"{mesh.size} expert ranks, {config.num_routed_experts} experts of a layer, {wish.layers} layers of hidden "
        f"{wish.hidden} and experts of {wish.intermediate}, {wish.tokens} tokens in {pairs.precision}; "
        f"{pairs.count} pairs a run."
    )
    if mesh.size == 1:
        notes.append(
            "One expert rank: there is no wire; what is called communication is the backend's own copying."
        )
    if share_a_gpu(mesh):
        notes.append(NO_LINK)
    drawings: dict[str, list[Span]] = {}
    everyone = contenders(wish, mesh)
    for place, contender in enumerate(everyone):
        row, drawn = _row(
            pairs, contender, wish.seconds / len(everyone), partial(_tell, progress, place, contender)
        )
        if row is None:
            notes.append(f"{contender.name}: {drawn}")
        else:
            rows.append(row)
            if drawn:
                drawings[contender.name] = drawn  # pyright: ignore[reportArgumentType]
        notes_now = [*notes, *(_on_report_links(wish, row) for row in rows[:1])]
        yield {"ranks": mesh.size, "rows": rows, "notes": notes_now, "timelines": drawings}


def _tell(progress: Progress, place: int, contender: Contender, done: int, rounds: int) -> None:
    progress.update(place + done / rounds, contender.name, f"round {done}/{rounds}")


def _row(
    pairs: Pairs, contender: Contender, limit_s: float, watch: Callable[[int, int], object]
) -> tuple[dict[str, Any] | None, Any]:
    """One contender's line and its timeline; or why it does not run here."""
    mesh, wish, bench, wrong = pairs.mesh, pairs.wish, None, ""
    try:
        bench = Bench(pairs, contender)
    except (CounterflowError, ImportError, RuntimeError) as error:
        wrong = str(error).splitlines()[0]
    failed = [reason for reason in mesh.everyone(wrong) if reason]
    if failed or bench is None:
        return None, failed[0]
    if wish.ratio == "1:1":
        bench.even()
    times = bench.time(wish.warmups, wish.rounds, limit_s, watch)
    middle = {way: median(seconds) / pairs.count for way, seconds in times.items()}
    row: dict[str, Any] = {
        "name": contender.name,
        "repeats": bench.repeats,
        "seconds_a_pair": middle,
        "seconds": times,
        "cost": middle["overlapped"] / middle["computation"],
        "ratio": middle["computation"] / middle["communication"] if middle["communication"] else None,
        "spread": _spread(times["computation"]),
    }
    found: list[Span] = []
    if mesh.device.type == "cuda":
        row["coincidence"], found = _profile(bench)
    else:
        waited = max(mesh.everyone(bench.waited())) / pairs.count
        row["not_waited_for"] = 1.0 - waited / middle["communication"] if middle["communication"] else 1.0
        found = bench.recorded()
    return row, found


def _profile(bench: Bench) -> tuple[float, list[Span]]:
    """Of one profiled overlapped run: the least coincidence of any rank, and all ranks' timeline of its pairs."""
    pairs, mesh = bench.pairs, bench.mesh
    ops = {f"op {op}": op for op in _stretch(pairs)}
    mesh.barrier()
    events = profiled(lambda: pairs.run(bench.dispatcher, annotate=True))
    bench.carrier.traffic()
    found = kernels(events, ops)
    every = mesh.everyone((coincidence(found), spans(found, mesh.rank)))
    return min(share for share, _ in every), [span for _, some in every for span in some]


def _stretch(pairs: Pairs) -> list[Op]:
    """The ops of all pairs."""
    from counterflow.schedule.weave import weave

    held = {stage: inner.plan for stage, inner in pairs.stages.items()}
    return [op for cell in pairs.schedule.rows[0] if len(cell) > 1 for op in weave(cell, held)]


def _spread(seconds: Sequence[float]) -> float:
    """Of the middle half, relative to the median: what no claim may be smaller than."""
    low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else (0.0, 0.0, 0.0)
    return (high - low) / median(seconds)


def _on_report_links(wish: Overlap, row: Mapping[str, Any]) -> str:
    """What a pair's transfers would take on the report's links, beside this run's computation."""
    cluster = hardware("h800")
    away = UNIFORM.places(MODELS["v3-671b"], NODES) * (NODES - 1) / NODES
    moved = wish.layers / 2 * 4 * wish.tokens * away * wish.hidden * 2
    rate = cluster.fabric.bytes_per_s * cluster.efficiencies.network
    computed = row["seconds_a_pair"]["computation"]
    return (
        f"Over the report's {NODES} nodes a pair would send {bytes_(moved)} a GPU between them in bf16 ({away:.2f} "
        f"nodes a token), {moved / rate * 1e3:.3g} ms at {rate / 1e9:.0f} GB/s (predicted, the planner's rate): "
        f"computation : communication = {computed / (moved / rate):.3g} : 1 with this run's computation."
    )


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """All contenders; the first row is the head."""
    lines: list[tuple[str, ...]] = [HEAD]
    for row in result["rows"]:
        seconds = row["seconds_a_pair"]
        share = row.get("coincidence")
        lines.append(
            (
                row["name"],
                str(row["repeats"]),
                *(f"{seconds[way] * 1e3:.3f}" for way in WAYS),
                f"{row['ratio']:.2f}" if row["ratio"] else "",
                f"{row['cost']:.3f}",
                f"{row['spread']:.3f}",
                f"{share:.3f}" if share is not None else f"not waited {row['not_waited_for']:.2f}",
            )
        )
    return lines


def timelines(result: Mapping[str, Any]) -> str:
    """All contenders' on one time axis; empty where none was profiled."""
    drawn = result["timelines"]
    return picture.compare(drawn, result["ranks"]) if drawn else ""
