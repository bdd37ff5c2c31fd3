"""`counterflow plan v3-671b --gpus 2048`: which layout, how long, how much, before paying for it.

The run is named and overridden as `counterflow train` has it; what the cards are and what is decided already are
options. No torch is imported.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from counterflow.config.load import load_run
from counterflow.errors import ConfigError, nearest
from counterflow.plan.answer import answer
from counterflow.plan.hardware import hardware
from counterflow.plan.job import RECOMPUTES, job_of
from counterflow.plan.price import DOLLARS, Reliability
from counterflow.plan.report import as_json, terminal
from counterflow.plan.routing import Routing
from counterflow.plan.search import Pins
from counterflow.schedule import SCHEDULES


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
    precision: str = ""
    """fp8, bf16 or fp32; empty: the run's."""
    pins: Annotated[Pins, tyro.conf.arg(name="")] = field(default_factory=Pins)
    loads: str = ""
    """A JSON file with a layer's tokens by expert, for the dispatch; empty: uniform."""
    dollars: float = DOLLARS
    """Of a GPU hour."""
    reliability: Annotated[Reliability, tyro.conf.arg(name="")] = field(default_factory=Reliability)
    json: str = ""
    """Write the numbers into this file."""


def run(arguments: Sequence[str]) -> int:
    """Print the plan and write what was asked for."""
    wish = parse(arguments)
    _require(wish)
    name, *overrides = wish.words if wish.words and "=" not in wish.words[0] else ("tiny", *wish.words)
    config = load_run(name, overrides)
    found = answer(
        job_of(config, wish.precision),
        hardware(wish.card, wish.fabric, wish.hardware),
        wish.gpus,
        wish.pins,
        Routing(_loads(wish.loads)),
        wish.dollars,
        wish.reliability,
        config.parallel.placement,
    )
    print(terminal(found))
    if wish.json:
        write(wish.json, json.dumps(as_json(found), indent=1) + "\n")
    return 0


def parse(arguments: Sequence[str]) -> Wish:
    """The words as a Wish; tyro's boxed complaint becomes one line."""
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
    for name, value, known in (
        ("schedule", wish.pins.schedule, SCHEDULES),
        ("recompute", wish.pins.recompute, RECOMPUTES),
    ):
        if value and value not in known:
            raise ConfigError(f"--{name} is '{value}'; {nearest(value, known)}")
    for name in ("pipeline", "data", "expert", "micro_batch"):
        if getattr(wish.pins, name) < 0:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(wish.pins, name)}; it must be at least 1."
            )
    if not 0 <= wish.dollars < float("inf"):
        raise ConfigError(f"--dollars is {wish.dollars}; it must be a number from 0 on.")


def _loads(name: str) -> tuple[float, ...]:
    if not name:
        return ()
    found = read_json(name)
    if not isinstance(found, list) or not all(isinstance(one, int | float) for one in found):
        raise ConfigError(
            f"{name} holds no list of numbers; give a layer's tokens by expert, such as [12, 9, 14]."
        )
    return tuple(map(float, found))


def read_json(name: str) -> Any:
    """What a JSON file holds.   Fails: ConfigError."""
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{name}' cannot be read as JSON ({error}).") from None


def write(name: str, text: str) -> None:
    """Write a file.   Fails: ConfigError."""
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"'{name}' cannot be written ({error.strerror}); choose another file.") from None
