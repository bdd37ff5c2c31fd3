"""What several GPUs are asked, as parts in the order of their weight: each a few rows on processes of its own.

Equality comes first, since nothing that is not equal is worth timing; then the steps of the largest model under
DualPipe, dispatch and combine, the other schedules, the other models, and last what fewer ranks than there are could
show as well. A part knows its rows by name before it runs, so that what it did not come to can be said.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from counterflow.benchmark.all_to_all import AllToAll, all_to_all
from counterflow.benchmark.rates import RatesSettings, measured, rates_toml, slowest
from counterflow.benchmark.saved import note
from counterflow.benchmark.several_equality import step_equality, step_name
from counterflow.benchmark.several_predicted import laid_out, report_words
from counterflow.benchmark.several_steps import Way, step_speed
from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.model import ModelConfig
from counterflow.config.run import Parallel, RunConfig
from counterflow.errors import ConfigError, nearest
from counterflow.schedule import SCHEDULES

PRECISIONS = ("fp32", "bf16")
KINDS = ("equality", "steps", "dispatch")
REPORT = "report"
"""As a model: layers of the report's sizes, as many as fit the GPUs."""
ARRANGED: Mapping[int, tuple[tuple[int, int], ...]] = {
    2: ((2, 1), (1, 2)),
    4: ((2, 2), (4, 1)),
    8: ((4, 2), (2, 4), (1, 8)),
}
"""(pipeline, expert) ranks whose step is compared, by number of ranks; those that share experts stand first from four
on, and steps are timed in the first alone; on two, where none is both, in each."""
WAYS = (Way(True, False), Way(False, False), Way(True, True), Way(False, True))
EQUALITY_S, STEPS_S, ALL_TO_ALL_S, RATES_S = 150.0, 150.0, 100.0, 90.0
"""The longest that a part of each kind may take."""


@dataclass(frozen=True)
class Several:
    """What is asked; the defaults are for GPUs."""

    ranks: int = 8
    """2, 4 or 8, a GPU each."""
    kinds: tuple[str, ...] = KINDS
    """Of parts."""
    device: str = "cuda"
    models: tuple[str, ...] = (REPORT, "small")
    """Whose steps are timed: names of runs, or `report`: layers of the report's sizes, as many as fit."""
    schedules: tuple[str, ...] = ("dualpipe", "dualpipev", "zb1p", "1f1b")
    compared: str = "small"
    """The model of the step that must be equal."""
    compared_length: int = 256
    dispatch: tuple[str, ...] = ("nvlink", "collective")
    """Backends whose step must be equal; the first moves the tokens of timed steps."""
    precision: str = "bf16"
    microbatches: int = 0
    """Of a data rank; 0: four for each pipeline rank, eight at least."""
    length: int = 0
    """Of a sequence; 0: the run's own."""
    steps: int = 5
    warmups: int = 2
    rates_s: float = 0.1
    """Least seconds over which each of the planner's rates is measured."""
    transfers: AllToAll = field(default_factory=lambda: AllToAll((256, 1024, 4096), rounds=20, warmups=5))
    words: tuple[str, ...] = ()
    """Further settings of timed runs, KEY=VALUE."""
    memory_bytes: float = 141e9
    """Of a GPU, for `report`."""

    def __post_init__(self) -> None:
        if self.ranks not in ARRANGED:
            raise ConfigError(
                f"--ranks is {self.ranks}; pipeline and expert parallelism are shown on 2, 4 or 8 ranks: take one of "
                "these."
            )
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"--kinds has '{kind}'; {nearest(kind, KINDS)}")


@dataclass(frozen=True)
class Part:
    """Rows that one set of processes finds: `play(mesh, *given, file)` notes them in the file."""

    name: str
    rows: tuple[str, ...]
    play: Callable[..., None]
    parallel: Parallel
    given: tuple[Any, ...]
    limit_s: float
    run: RunConfig | None = None
    """Of timed steps, or of the rates that predict them."""
    ways: tuple[Way, ...] = ()
    """The rows' own."""

    def without(self, backends: Collection[str]) -> "Part":
        """The same by `collective`, where it would go by one of the backends that are lost; a step that is compared by
        one is not compared."""
        if self.play is step_equality:
            *given, some = self.given
            return replace(self, given=(*given, tuple(one for one in some if one not in backends)))
        if self.run is None or not self.ways or self.run.parallel.dispatch not in backends:
            return self
        run = replace(self.run, parallel=replace(self.run.parallel, dispatch=Parallel.dispatch))
        return replace(self, run=run, parallel=run.parallel, given=(run, *self.given[1:]))


def layout_name(pipeline: int, expert: int) -> str:
    """As tables show it."""
    return "·".join(f"{what}{size}" for what, size in (("PP", pipeline), ("EP", expert)) if size > 1)


def parts(wish: Several) -> Iterator[Part]:
    """All of them, the weightiest first."""
    places = ARRANGED[wish.ranks]
    places = places if wish.ranks == 2 else places[:1]
    timed = [_timed(wish, model, place) for model in wish.models for place in places if "steps" in wish.kinds]
    yield from (_rates(wish, some[0]) for some in timed)
    yield from _equality(wish, wish.ranks)
    yield from (some[0] for some in timed[:1])
    yield from _dispatch(wish, wish.ranks)
    yield from (part for number, some in enumerate(timed) for part in some[number == 0 :])
    if wish.ranks == 8:
        yield from _equality(wish, 4)
        yield from _dispatch(wish, 4)


def out_of_reach(ranks: int) -> dict[str, str]:
    """What so few ranks cannot show, and why."""
    missing = {}
    for needed in (4, 8):
        if ranks < needed:
            names = [f"equality, {layout_name(*place)}" for place in ARRANGED[needed]]
            names += [f"steps, {layout_name(*ARRANGED[needed][0])}", f"dispatch, EP{needed}"]
            missing |= dict.fromkeys(names, f"needs {needed} ranks, and there are {ranks}")
    return missing


def _equality(wish: Several, ranks: int) -> Iterator[Part]:
    """A part for every layout: both precisions, every backend, the plainest first."""
    backends = sorted(wish.dispatch, key=lambda name: name != Parallel.dispatch)
    for pipeline, expert in ARRANGED[ranks] if "equality" in wish.kinds else ():
        some = tuple(backends) if expert > 1 else backends[:1]
        schedule = "dualpipe" if pipeline > 1 else "dualpipev"
        words = laid_out(pipeline, expert, 2 * max(pipeline, 2), 1, schedule)
        run = load_run(wish.compared, [*words, f"data.sequence_length={wish.compared_length}"])
        name = f"equality, {layout_name(pipeline, expert)}"
        rows = tuple(step_name(name, precision, one, expert) for precision in PRECISIONS for one in some)
        given = (run, name, PRECISIONS, some)
        yield Part(name, rows, step_equality, run.parallel, given, EQUALITY_S)


def _timed(wish: Several, model: str, place: tuple[int, int]) -> list[Part]:
    """A model's steps in a layout, a part for every schedule that it has."""
    pipeline, expert = place
    count = wish.microbatches or max(8, 4 * pipeline)
    schedules = [name for name in wish.schedules if pipeline > 1 or not SCHEDULES[name].even_ranks]
    more = [f"data.sequence_length={wish.length}"] if wish.length else []
    more += [f"train.precision={wish.precision}", f"parallel.dispatch={wish.dispatch[0]}", *wish.words]
    base, words = model, []
    if model == REPORT:
        base, words = "v3-671b", report_words(*place, wish.memory_bytes, count, schedules, more)
    size = load_run(base, more).train.micro_batch_size
    found = []
    for schedule in schedules:
        run = load_run(base, [*words, *laid_out(pipeline, expert, count, size, schedule), *more])
        name = f"{model}, {schedule}, {layout_name(pipeline, expert)}"
        ways = WAYS if expert > 1 else WAYS[:1]
        given = (run, name, ways, wish.warmups, wish.steps)
        rows = tuple(f"{name}, {way}" for way in ways)
        found.append(Part(name, rows, step_speed, run.parallel, given, STEPS_S, run, ways))
    return found


def _rates(wish: Several, steps: Part) -> Part:
    """What predicts a model's steps: rates at its shapes, every rank with its share of the experts."""
    run = steps.run
    assert run is not None, "steps have a run"
    each = run.model.num_routed_experts // run.parallel.expert
    shapes = replace(run.model, num_routed_experts=each, num_groups=1, num_limited_groups=1)
    settings = RatesSettings(
        run.name,
        run.data.sequence_length,
        run.train.micro_batch_size,
        wish.precision,
        wish.ranks,
        wish.device,
        repeats=3,
        seconds=wish.rates_s,
    )
    name = f"rates, {steps.name.partition(',')[0]}, {layout_name(run.parallel.pipeline, run.parallel.expert)}"
    ranks = Parallel(data=wish.ranks)
    return Part(name, (name,), note_rates, ranks, (settings, shapes, name), RATES_S, run)


def note_rates(mesh: Mesh, settings: RatesSettings, shapes: ModelConfig, name: str, rows: Path) -> None:
    """The planner's file from the slowest rank's rates. A collective."""
    every = mesh.everyone(measured(mesh, settings, shapes))
    if mesh.first:
        found = slowest(every)
        note(rows, {"name": name, "rates": asdict(found), "toml": rates_toml(settings, found)})


def _dispatch(wish: Several, ranks: int) -> Iterator[Part]:
    """One part, a row for every size."""
    if "dispatch" not in wish.kinds:
        return
    name = f"dispatch, EP{ranks}"
    rows = tuple(f"{name}, {tokens} tokens" for tokens in wish.transfers.tokens)
    parallel = Parallel(data=ranks, expert=ranks)
    yield Part(name, rows, note_dispatch, parallel, (wish.transfers, name), ALL_TO_ALL_S)


def note_dispatch(mesh: Mesh, wish: AllToAll, name: str, rows: Path) -> None:
    """Dispatch and combine against ceilings, a row for every size; torch's own device-side all-to-all, which takes
    processes of its own, is left to `counterflow bench all-to-all`. A collective."""
    sizes: Sequence[int] = wish.tokens
    for tokens, result in zip(sizes, islice(all_to_all(wish, mesh), len(sizes))):
        own = [row for row in result["rows"] if row["tokens"] == tokens]
        if mesh.first:
            note(
                rows,
                {"name": f"{name}, {tokens} tokens", "tokens": tokens, "rows": own, "notes": result["notes"]},
            )
