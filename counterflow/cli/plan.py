"""`counterflow plan v3-671b --gpus 2048`: which layout, how long, how much, before paying for it.

The run is named and overridden as `counterflow train` has it; what the cards are and what is decided already are
options. No torch is imported.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from counterflow.cli.files import write
from counterflow.config.load import load_run, settings
from counterflow.config.run import RunConfig
from counterflow.errors import ConfigError, nearest
from counterflow.notation import from_json
from counterflow.plan import tables
from counterflow.plan.answer import answer
from counterflow.plan.hardware import Hardware, fast_precision, hardware
from counterflow.plan.job import RECOMPUTES, Job, job_of
from counterflow.plan.launch import files
from counterflow.plan.page import page
from counterflow.plan.placement import Placement, place, unreplicated
from counterflow.plan.price import Reliability
from counterflow.plan.report import as_json, terminal
from counterflow.plan.routing import Routing
from counterflow.plan.scale import curves, schedules
from counterflow.plan.search import Pins
from counterflow.schedule.named import method

SETTING = re.compile(rf"({'|'.join(settings(RunConfig))})(\.\w+)*=")
"""An override, wherever it stands among the options."""


@dataclass(frozen=True)
class Wish:
    """Plan a run: its layouts on so many cards, time, memory and price. KEY=VALUE changes settings of the run."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """A run's name or TOML file, then KEY=VALUE overrides, as for `counterflow train`."""
    gpus: int = 8
    card: str = "h800"
    """h100, h800, h200, b200, gb200, a100 or cpu."""
    fabric: str = ""
    """Between nodes: ib400, roce400, ethernet or loopback; empty: ib400, for a cpu loopback."""
    hardware: str = ""
    """A TOML file with numbers of one's own; docs/PLANNER.md shows one."""
    precision: str = "auto"
    """fp8, bf16 or fp32; auto: the run's, and where that is auto too, bf16 on GPUs and what a CPU multiplies fast."""
    pins: Annotated[Pins, tyro.conf.arg(name="")] = field(default_factory=Pins)
    loads: str = ""
    """A JSON file with a layer's tokens by expert, for the dispatch; empty: uniform."""
    dollars: float | None = None
    """Of a GPU hour; none given: 2, the report's for an H800, and for a CPU no price at all."""
    reliability: Annotated[Reliability, tyro.conf.arg(name="")] = field(default_factory=Reliability)
    json: str = ""
    """Write the numbers into this file."""
    html: str = ""
    """Write a page into this file."""
    launch: str = ""
    """Write run.toml, torchrun.sh and slurm.sh for the best layout into this folder."""
    scale: bool = False
    """Instead: overhead of all-to-all as model and cluster grow together, 8 to 16,384 GPUs."""
    schedules: bool = False
    """Instead: all schedules on the same cards, with --expert ranks sharing experts."""
    published: bool = False
    """Instead: predictions beside what was published, the report's run part by part."""
    place: str = ""
    """Instead: where copies of experts live for inference; a JSON file with every layer's tokens by expert."""
    slots: int = 0
    """For --place: copies of a layer in all; 0: one more on each GPU than without."""
    svg: str = ""
    """For --scale: draw the curves into this file."""


def run(arguments: Sequence[str]) -> int:
    """Print the plan, or what was asked for instead, and write files."""
    wish = parse(arguments)
    _require(wish)
    name, *overrides = wish.words if wish.words and "=" not in wish.words[0] else ("tiny", *wish.words)
    config = load_run(name, overrides)
    if wish.published:
        print(tables.published())
    elif wish.scale:
        _scale(wish, config)
    elif wish.schedules:
        _schedules(wish, config)
    elif wish.place:
        _place(wish, config)
    else:
        _plan(wish, config)
    return 0


def _plan(wish: Wish, config: RunConfig) -> None:
    job, kind = _asked(wish, config)
    if not job.tokens:
        raise ConfigError("train.minutes alone bounds this run; a plan needs a length: set train.tokens.")
    routing = Routing(_loads(wish.loads))
    placement = config.parallel.placement
    found = answer(job, kind, wish.gpus, wish.pins, routing, wish.dollars, wish.reliability, placement)
    said = [terminal(found)]
    if wish.json:
        write(wish.json, json.dumps(as_json(found), indent=1) + "\n")
    if wish.html:
        write(wish.html, page(found, config.name))
    if wish.launch:
        written = files(config, found.step.costs.layout, job.precision, kind)
        for file, text in written.items():
            write(str(Path(wish.launch) / file), text)
        said.append(f"{wish.launch}: {', '.join(written)}.")
    print("\n\n".join(said))  # after the files: who reads only the first lines closes the pipe


def _asked(wish: Wish, config: RunConfig) -> tuple[Job, Hardware]:
    """What is planned, on what; a precision that the machine decided is said."""
    kind, precision = hardware(wish.card, wish.fabric, wish.hardware), wish.precision
    if precision in ("", "auto") and config.train.precision == "auto":
        precision = fast_precision(kind)
        if kind.is_cpu:
            why = (
                "by the rates that were measured"
                if kind.measured
                else "what this machine's processor multiplies fast"
            )
            print(f"Planning in {precision}, {why}; --precision takes another.", file=sys.stderr)
    return job_of(config, "" if precision == "auto" else precision), kind


def _scale(wish: Wish, config: RunConfig) -> None:
    job, kind = _asked(wish, config)
    found = curves(job, kind)
    if wish.svg:
        write(wish.svg, tables.scale_svg(found))
    print(tables.scale(found))


def _schedules(wish: Wish, config: RunConfig) -> None:
    job, kind = _asked(wish, config)
    recompute = wish.pins.recompute or ("projections" if job.precision == "fp8" else "attention")
    expert = wish.pins.expert or 1
    print(tables.schedules(schedules(job, kind, wish.gpus, expert, recompute, Routing(_loads(wish.loads)))))


def _place(wish: Wish, config: RunConfig) -> None:
    """Every layer's copies on --gpus cards."""
    given, card = read_json(wish.place), hardware(wish.card, wish.fabric, wish.hardware).card
    layers = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    if len({len(_numbers(loads)) for loads in layers}) > 1:
        raise ConfigError(f"'{wish.place}' has layers of different lengths; each must list the same experts.")
    nodes, part = card.nodes(wish.gpus), wish.gpus % card.gpus_per_node
    if nodes > 1 and part:
        nodes = 1
        print(
            f"{wish.gpus} GPUs do not fill nodes of {card.gpus_per_node}: copies are placed without regard to nodes.",
            file=sys.stderr,
        )
    pairs: list[tuple[Placement, Placement]] = []
    for loads in map(_numbers, layers):
        slots = wish.slots or (-(-len(loads) // wish.gpus) + 1) * wish.gpus
        after = place(loads, slots, config.model.num_groups, nodes, wish.gpus)
        pairs.append((unreplicated(loads, wish.gpus), after))
    if wish.json:
        write(wish.json, json.dumps([after.experts for _, after in pairs]) + "\n")
    print(tables.placements(pairs))


def parse(arguments: Sequence[str]) -> Wish:
    """The words as a Wish; tyro's boxed complaint becomes one line."""
    overrides = [word for word in arguments if SETTING.match(word)]
    arguments = [word for word in arguments if not SETTING.match(word)]
    first = 1 if arguments and not arguments[0].startswith("-") else 0
    arguments = [*arguments[:first], *overrides, *arguments[first:]]  # tyro wants them together
    said = io.StringIO()
    shown = Annotated[Wish, tyro.conf.FlagCreatePairsOff]
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(shown, prog="counterflow plan", args=arguments)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        lines = [line.strip(" │|") for line in said.getvalue().splitlines() if line[:1] not in "╭╰+"]
        complaint = " ".join(line.strip("─- ") for line in lines if line).split(" Argument helptext")[0]
        complaint = complaint.split(" For full helptext")[0].strip()
        raise ConfigError(
            f"{complaint or 'the words cannot be read'}; see `counterflow plan --help`."
        ) from None


def _require(wish: Wish) -> None:
    """Fails (ConfigError) where an option is impossible."""
    if wish.pins.schedule:
        method(wish.pins.schedule)
    if wish.pins.recompute and wish.pins.recompute not in RECOMPUTES:
        raise ConfigError(
            f"--recompute is '{wish.pins.recompute}'; {nearest(wish.pins.recompute, RECOMPUTES)}"
        )
    for name in ("pipeline", "data", "expert", "micro_batch"):
        if getattr(wish.pins, name) < 0:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(wish.pins, name)}; it must be at least 1."
            )
    instead = [name for name in ("scale", "schedules", "published", "place") if getattr(wish, name)]
    if len(instead) > 1:
        raise ConfigError(f"--{instead[0]} and --{instead[1]} are two questions; ask one at a time.")
    unread = [name for name in ("html", "launch") if instead and getattr(wish, name)]
    unread += ["svg"] if wish.svg and not wish.scale else []
    unread += ["slots"] if wish.slots and not wish.place else []
    if unread:
        raise ConfigError(
            f"--{unread[0]} is not for {f'--{instead[0]}' if instead else 'a plan'}; leave one out."
        )
    if wish.gpus < 1:
        raise ConfigError(f"--gpus is {wish.gpus}; a run needs at least 1.")
    if wish.slots < 0:
        raise ConfigError(f"--slots is {wish.slots}; it must be at least the number of experts, or 0.")
    if wish.dollars is not None and not 0 <= wish.dollars < float("inf"):
        raise ConfigError(f"--dollars is {wish.dollars}; it must be a number from 0 on.")


def _loads(name: str) -> tuple[float, ...]:
    return _numbers(read_json(name)) if name else ()


def _numbers(found: Any) -> tuple[float, ...]:
    if not isinstance(found, list) or not found or not all(isinstance(one, int | float) for one in found):
        raise ConfigError(
            "expert loads are no list of numbers; give a layer's tokens by expert, such as [12, 9, 14]."
        )
    return tuple(map(float, found))


def read_json(name: str) -> Any:
    """What a JSON file holds.   Fails: ConfigError."""
    try:
        return from_json(Path(name).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{name}' cannot be read as JSON ({error}).") from None
