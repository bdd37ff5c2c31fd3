"""`counterflow schedule dualpipe --ranks 8 --microbatches 20`: a schedule in text, picture and numbers.

Everything is simulated from the costs one gives, unless `--run` brings a measured trace; no torch is imported. Beside
others a schedule is given what the same model would give it: costs are those of one of `--ranks` stages, finer stages
cost less in proportion, and a rule of two stages a rank, DualPipeV's, runs on half of the ranks, as Table 2 counts.
"""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.cli.files import write
from counterflow.config.run import Parallel
from counterflow.errors import ConfigError, ScheduleError, nearest
from counterflow.schedule import SCHEDULES, picture, trace
from counterflow.schedule.check import check
from counterflow.schedule.measure import held, idle
from counterflow.schedule.method import Method
from counterflow.schedule.named import is_file, method
from counterflow.schedule.simulate import Costs, makespan, simulate
from counterflow.schedule.table2 import Row, rows, rows_of_run
from counterflow.schedule.text import to_csv, to_text
from counterflow.schedule.words import Schedule, Span
from counterflow.units import aligned

FIGURE_5 = Parallel.schedule
"""What is shown where nothing is named; its defaults are the report's."""
WIDTH = 136
"""Columns where no terminal tells: Figure 5's 66 units of time get two each."""

NAMES = (
    f"{', '.join(SCHEDULES)}, a file of a schedule's text or PyTorch's .csv, or MODULE:FUNCTION; several are "
    "compared."
)


@dataclass(frozen=True)
class Wish:
    """Print, check, simulate, draw and compare pipeline schedules. The defaults are the report's Figure 5."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help=NAMES)] = ()
    ranks: int = 8
    microbatches: int = 20
    """Of both pipes together."""
    stages_per_rank: int | None = None
    """For a rule that leaves it open, as interleaved-1f1b does."""
    latency: float = 0.0
    """Added where a product goes to another rank, in the unit of the costs."""
    costs: Costs = field(default_factory=Costs)
    table2: bool = False
    """The report's Table 2: formula, simulation and, with --run, measurement."""
    run: str | None = None
    """A run's folder with a trace.json, for --table2; ranks, micro-batches and costs are then the run's."""
    text: bool = False
    """Print the text form alone, which a file may hold and this command reads."""
    svg: str | None = None
    """Draw into this file."""
    theme: str = ""
    """For --svg: light or dark; empty: as the reader's browser has it."""
    trace: str | None = None
    """Write a Chrome trace, for Perfetto, into this file."""
    csv: str | None = None
    """Write PyTorch pipelining's compute-only form into this file."""


@dataclass(frozen=True)
class Simulated:
    """A schedule and its spans."""

    schedule: Schedule
    on_fewer_ranks: bool
    """Than the others, for as many stages."""
    share: float
    """How much of the stage that the costs are given for one of its stages is."""
    costs: Costs
    spans: list[Span]

    @property
    def title(self) -> str:
        """Name, ranks and micro-batches."""
        count = sum(self.schedule.microbatches)
        return (
            f"{self.schedule.name}, {_many(self.schedule.ranks, 'rank')}, {_many(count, 'micro-batch', 'es')}"
        )


def run(arguments: Sequence[str]) -> int:
    """Print what was asked for and write the files."""
    wish = _parse(arguments)
    if not wish.names and not wish.table2:
        wish = replace(wish, names=(FIGURE_5,))
    _require(wish)
    several = len(wish.names) > 1
    found = [_simulated(name, wish, several) for name in wish.names]
    if wish.text:
        print("\n".join(to_text(one.schedule) for one in found), end="")
    elif several:
        print(_compared(found, wish))
    elif found:
        print(_described(found[0], wish))
    pictures = {one.title: one for one in found}
    drawn = {title: (one.spans, one.schedule.ranks) for title, one in pictures.items()}
    if wish.table2:
        if found:
            print()
        drawn = _print_table2(wish) or drawn
    _write_files(wish, found, drawn)
    return 0


def _parse(arguments: Sequence[str]) -> Wish:
    """The words as a Wish; tyro's boxed complaint becomes one line."""
    said = io.StringIO()
    shown = Annotated[Wish, tyro.conf.FlagCreatePairsOff]
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(shown, prog="counterflow schedule", args=arguments)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        lines = [line.strip(" │|") for line in said.getvalue().splitlines() if line[:1] not in "╭╰+"]
        complaint = " ".join(line.strip("─- ") for line in lines if line).split(" Argument helptext")[0]
        complaint = complaint.split(" For full helptext")[0].strip()
        raise ConfigError(
            f"{complaint or 'the words cannot be read'}; see `counterflow schedule --help`."
        ) from None


def _require(wish: Wish) -> None:
    """Fails (ConfigError, ScheduleError) where the options are impossible together."""
    costs = wish.costs
    numbers = {"costs.f": costs.f, "costs.b": costs.b, "costs.w": costs.w, "latency": wish.latency}
    for name, value in (numbers | ({} if costs.pair is None else {"costs.pair": costs.pair})).items():
        if not isfinite(value) or value < 0:
            raise ConfigError(f"--{name} is {value:g}; it must be a number from 0 on.")
    if costs.w > costs.b:
        raise ConfigError(
            f"--costs.w is {costs.w:g} and --costs.b {costs.b:g}; b is the whole backward with its weight part: "
            f"take b {costs.f + costs.w:g}, or w {costs.b / 2:g}."
        )
    if wish.theme and wish.theme not in picture.THEMES:
        raise ConfigError(f"--theme is '{wish.theme}'; {nearest(wish.theme, picture.THEMES)}")
    if wish.run is not None and not wish.table2:
        raise ConfigError("--run is for Table 2's measured column; add --table2.")
    if len(wish.names) != 1 and (wish.trace or wish.csv):
        option = "--trace" if wish.trace else "--csv"
        raise ConfigError(f"{option} is for one schedule, and {len(wish.names)} are named; name one.")


def _simulated(name: str, wish: Wish, several: bool) -> Simulated:
    row, from_rule = method(name), not is_file(name)
    ranks, per_rank = wish.ranks, wish.stages_per_rank
    if several and from_rule:
        ranks, per_rank = _beside_others(name, row, wish)
    schedule = check(row(ranks, wish.microbatches, per_rank))
    share = wish.ranks / schedule.stages if several and from_rule else 1.0
    costs = scaled(wish.costs, share)
    return Simulated(schedule, ranks < wish.ranks, share, costs, simulate(schedule, costs, wish.latency))


def _beside_others(name: str, row: Method, wish: Wish) -> tuple[int, int | None]:
    """Ranks for as many stages as the others have, and stages a rank for a rule that leaves them open."""
    if row.choices:
        return wish.ranks, wish.stages_per_rank
    ranks, over = divmod(wish.ranks, row.stages_per_rank)
    if over:
        raise ScheduleError(
            f"{wish.ranks} ranks; beside others {name} has as many stages on fewer ranks, {row.stages_per_rank} on "
            f"each: take {(ranks + 1) * row.stages_per_rank}."
        )
    return ranks, None


def scaled(costs: Costs, share: float) -> Costs:
    """The costs of a stage that is so much of the stage they were given for."""
    pair = None if costs.pair is None else costs.pair * share
    return Costs(costs.f * share, costs.b * share, costs.w * share, pair)


def _described(one: Simulated, wish: Wish) -> str:
    """Text, picture and a row a rank."""
    schedule, spans = one.schedule, one.spans
    whole, waits = makespan(spans), idle(spans, schedule.ranks)
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    table = [["rank", "stages", "busy", "idle", "idle %", "activations", "F to I", "I to W"]]
    for rank, (wait, kept) in enumerate(zip(waits, held(schedule))):
        stages = " ".join(map(str, schedule.held(rank)))
        peaks = map(str, (kept.activations, kept.whole, kept.owed))
        table.append([str(rank), stages, _short(whole - wait), _short(wait), _percent(wait, whole), *peaks])
    mean = sum(waits) / len(waits)
    lines = [to_text(schedule), picture.terminal(spans, schedule.ranks, width, colours), aligned(table), ""]
    lines.append(
        f"{one.title}: makespan {_short(whole)}, of which a rank is idle {_short(mean)} on average "
        f"({_percent(mean, whole)}%), simulated with {_said(one.costs, wish.latency)}."
    )
    row, formula = SCHEDULES.get(schedule.name), _formula(one)
    if row is not None and formula:
        exact = _exactness(row, one.costs, wish.latency)
        lines.append(f"The bubble's formula ({row.source}) gives {formula} idle: {exact}.")
    lines.append(
        "Activations are peaks in micro-batches of one stage, from F to I whole, from I to W for weights."
    )
    return "\n".join(lines)


def _compared(found: Sequence[Simulated], wish: Wish) -> str:
    """One row a schedule."""
    table = [
        ["schedule", "ranks", "stages", "makespan", "idle", "idle %", "activations", "parameters", "formula"]
    ]
    for one in found:
        schedule, whole, waits = one.schedule, makespan(one.spans), idle(one.spans, one.schedule.ranks)
        kept = held(schedule)
        table.append(
            [
                schedule.name,
                str(schedule.ranks),
                str(schedule.stages),
                _short(whole),
                _span_of(waits),
                _percent(sum(waits) / len(waits), whole),
                _short(max(some.activations for some in kept) * one.share),
                f"{_short(max(some.stages for some in kept) * one.share)}x",
                _formula(one),
            ]
        )
    lines = [
        aligned(table),
        "",
        f"Simulated: {_many(wish.microbatches, 'micro-batch', 'es')}, {_said(wish.costs, wish.latency)}, of one of "
        f"{wish.ranks} stages.",
        "Idle is per rank; activations are the fullest rank's peak, parameters its share, both in such stages.",
    ]
    lines += [
        f"{one.schedule.name} is compared at an equal number of stages, as in Table 2: {one.schedule.stages} stages on "
        f"{one.schedule.ranks} ranks, each with {wish.ranks // one.schedule.ranks} times the work."
        for one in found
        if one.on_fewer_ranks
    ]
    if any(one.share not in (1.0,) for one in found):
        lines.append("Finer stages cost less in proportion.")
    return "\n".join(lines)


def _formula(one: Simulated) -> str:
    """Idle time by the published formula, if there is one."""
    row, schedule = SCHEDULES.get(one.schedule.name), one.schedule
    if row is None or row.bubble is None:
        return ""
    return _short(row.bubble(schedule.ranks, schedule.stages, one.costs))


def _print_table2(wish: Wish) -> dict[str, tuple[list[Span], int]]:
    """Print the table; the pictures of the run: predicted and measured."""
    measured = None if wish.run is None else _measured(Path(wish.run))
    drawn: dict[str, tuple[list[Span], int]] = {}
    if measured is None:
        if wish.ranks < 2 or wish.ranks % 2:
            raise ScheduleError(
                f"{wish.ranks} ranks; Table 2's PP must be even: take {max(2, wish.ranks + 1)}."
            )
        found, costs, stages, count = (
            rows(wish.ranks, wish.microbatches, wish.costs, wish.latency),
            wish.costs,
            wish.ranks,
            wish.microbatches,
        )
    else:
        result = rows_of_run(measured, wish.latency)
        found, costs, stages, count = result.rows, result.costs, result.schedule.stages, result.microbatches
        ranks = result.schedule.ranks
        drawn = {"predicted": (result.predicted, ranks), "measured": (result.measured, ranks)}
    print(_table2(found, costs, wish.latency, measured is not None))
    print(f"\nPP {stages}, {_many(count, 'micro-batch', 'es')}, {_said(costs, wish.latency)}", end="")
    print("; seconds, the run's means." if measured is not None else ", simulated.")
    if wish.run is not None and measured is None:
        print(f"{wish.run} has no trace.json, so nothing is measured here.")
    return drawn


def _table2(found: Sequence[Row], costs: Costs, latency: float, measured: bool) -> str:
    head = ["method", "devices", "bubble, formula", "simulation", *(["measurement"] if measured else [])]
    table = [[*head, "activations, formula", "counted", "parameters", "the formula is"]]
    for row in found:
        numbers = [_short(row.formula), _span_of(row.simulated)]
        if measured:
            numbers.append(_span_of(row.measured))
        note = row.refused or _exactness(SCHEDULES[row.name], costs, latency)
        counted = "-" if row.activations is None else str(row.activations)
        table.append(
            [
                row.name,
                str(row.devices),
                *numbers,
                str(row.activations_formula),
                counted,
                f"{row.parameters}x",
                note,
            ]
        )
    return aligned(table)


def _exactness(row: Method, costs: Costs, latency: float) -> str:
    return row.exactness(costs) + ("; latency 0 is assumed" if latency else "")


def _measured(folder: Path) -> list[Span] | None:
    """The run's spans, if it kept any."""
    if not folder.is_dir():
        raise ConfigError(f"--run is '{folder}', which is no folder; give a run's, such as runs/tiny.")
    path = folder / "trace.json"
    try:
        return trace.read(path.read_text(encoding="utf-8-sig")) if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from None
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None


def _write_files(wish: Wish, found: Sequence[Simulated], drawn: dict[str, tuple[list[Span], int]]) -> None:
    if wish.svg:
        if not drawn:
            raise ConfigError("--svg has nothing to draw; name a schedule.")
        unit = "s" if "measured" in drawn else ""
        named = {title: spans for title, (spans, _) in drawn.items()}
        ranks = {title: number for title, (_, number) in drawn.items()}
        write(wish.svg, picture.compare(named, ranks, unit, wish.theme))
    if wish.trace:
        write(wish.trace, trace.write(found[0].spans))
    if wish.csv:
        write(wish.csv, to_csv(found[0].schedule))


def _said(costs: Costs, latency: float) -> str:
    """The costs in words."""
    pair = costs.f + costs.b if costs.pair is None else costs.pair
    text = f"F {_short(costs.f)}, B {_short(costs.b)}, W {_short(costs.w)}, F&B {_short(pair)}"
    return text + (f", latency {_short(latency)}" if latency else "")


def _span_of(values: Sequence[float] | None) -> str:
    """A number, or the least and the largest of several that differ."""
    if not values:
        return "-"
    least, most = _short(min(values)), _short(max(values))
    return least if least == most else f"{least} – {most}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0.0:.1f}"


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _many(count: int, word: str, plural: str = "s") -> str:
    return f"{count} {word}{'' if count == 1 else plural}"
