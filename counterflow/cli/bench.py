"""`counterflow bench all-to-all`, `overlap`, `rates`: what transfers cost here, what hides them, the planner's rates.

A bench takes every GPU of the machine, one process each, or a few processes on a CPU; under torchrun or Slurm the
processes are theirs.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from counterflow.benchmark.all_to_all import AllToAll
from counterflow.benchmark.pair import Overlap
from counterflow.benchmark.rates import RatesSettings, measure_rates, rates_toml
from counterflow.errors import ConfigError, nearest
from counterflow.progress import Progress, watched

CPU_RANKS = 2


@dataclass(frozen=True)
class Place:
    """Where a bench runs and what it leaves."""

    ranks: int = 0
    """Processes; 0: one for every GPU, two on a CPU."""
    device: str = "auto"
    """cpu, cuda or auto."""
    folder: Path | None = None
    """For the numbers as JSON and the pictures."""


@dataclass(frozen=True)
class AllToAllBench:
    """Dispatch and combine by every backend that works here, against plain copies over the same link."""

    place: Annotated[Place, tyro.conf.arg(name="")] = field(default_factory=Place)
    wish: Annotated[AllToAll, tyro.conf.arg(name="")] = field(default_factory=AllToAll)


@dataclass(frozen=True)
class OverlapBench:
    """The overlapped pair of Figure 4: what its transfers add to its computation, with every backend named."""

    place: Annotated[Place, tyro.conf.arg(name="")] = field(default_factory=Place)
    wish: Annotated[Overlap, tyro.conf.arg(name="")] = field(default_factory=Overlap)


@dataclass(frozen=True)
class RatesBench:
    """What this machine reaches at a model's shapes, as a file that `counterflow plan --hardware` reads."""

    settings: Annotated[RatesSettings, tyro.conf.arg(name="")] = field(default_factory=RatesSettings)
    output: Path | None = None
    """The file; none: printed."""


def run(arguments: Sequence[str]) -> int:
    """One of the benches."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: counterflow bench BENCH ...\n")
        for name, (_, line) in BENCHES.items():
            print(f"  {name:12}{line}")
        print("\n`counterflow bench BENCH --help` says more of one.")
        return 0
    name, rest = arguments[0], list(arguments[1:])
    if name not in BENCHES:
        raise ConfigError(
            f"'{name}' is no bench; {nearest(name, BENCHES)} `counterflow bench --help` lists them."
        )
    return BENCHES[name][0](rest)


def _all_to_all(arguments: list[str]) -> int:
    asked = tyro.cli(AllToAllBench, prog="counterflow bench all-to-all", args=arguments)
    place = asked.place

    def act(mesh: Any) -> None:
        from counterflow.benchmark.all_to_all import all_to_all, settled
        from counterflow.benchmark.shown import focus, picture, table

        wish = settled(asked.wish, mesh)
        for result in watched(all_to_all(wish, mesh), "timing", len(wish.tokens) + 1, "sizes", mesh.first):
            if mesh.first and place.folder:
                write(place.folder, asdict(wish), result, picture(result))
        if mesh.first:
            show(f"{focus(result)} tokens a rank, {mesh.size} ranks", table(result, focus(result)))
            print("\n".join(result["notes"]))

    return _on_ranks(place, ["bench", "all-to-all", *arguments], act)


def _overlap(arguments: list[str]) -> int:
    asked = tyro.cli(OverlapBench, prog="counterflow bench overlap", args=arguments)
    place = asked.place

    def act(mesh: Any) -> None:
        from counterflow.benchmark.pair import contenders, settled
        from counterflow.benchmark.pair_result import overlap, table, timelines

        wish = settled(asked.wish, mesh)
        number = len(contenders(wish, mesh))
        with Progress("timing", number, shown=mesh.first) as progress:
            if mesh.device.type != "cuda":
                progress.note(f"Timing takes about {wish.seconds:.0f} s; --seconds says how long.")
            for result in overlap(wish, mesh, progress):
                if mesh.first and place.folder:
                    numbers = {key: value for key, value in result.items() if key != "timelines"}
                    write(place.folder, asdict(wish), numbers, timelines(result))
        if mesh.first:
            show(f"a pair, {mesh.size} expert ranks", table(result))
            print("\n".join(result["notes"]))

    return _on_ranks(place, ["bench", "overlap", *arguments], act)


def _rates(arguments: list[str]) -> int:
    asked = tyro.cli(RatesBench, prog="counterflow bench rates", args=arguments)
    print("Measuring takes about half a minute.", file=sys.stderr, flush=True)
    text = rates_toml(asked.settings, measure_rates(asked.settings))
    if asked.output is None:
        print(text, end="")
        return 0
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(text, encoding="utf-8")
    print(f"{asked.output}: counterflow plan --hardware {asked.output} reads it")
    return 0


def _on_ranks(place: Place, words: list[str], act: Callable[[Any], None]) -> int:
    import torch

    from counterflow.train.environment import started
    from counterflow.train.launch import on_ranks

    cuda = torch.cuda.is_available() and place.device != "cpu"
    ranks = place.ranks or started() or (torch.cuda.device_count() if cuda else CPU_RANKS)
    return on_ranks(ranks, place.device, words, act)


def write(folder: Path, wish: Mapping[str, Any], result: Mapping[str, Any], picture: str) -> None:
    """Numbers and picture."""
    from counterflow.benchmark.saved import save
    from counterflow.train.provenance import provenance

    save(folder / "raw.json", {"settings": wish, "provenance": provenance(), **result})
    if picture:
        (folder / "picture.svg").write_text(picture, encoding="utf-8")


def show(title: str, lines: Sequence[Sequence[str]]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for place, word in enumerate(lines[0]):
        drawn.add_column(word, justify="right" if place else "left", no_wrap=True)
    for line in lines[1:]:
        drawn.add_row(*line)
    Console(width=None if Console().is_terminal else 140).print(drawn)


BENCHES: Mapping[str, tuple[Callable[[list[str]], int], str]] = {
    "all-to-all": (_all_to_all, "dispatch and combine by every backend, against plain copies"),
    "overlap": (_overlap, "a forward and a backward chunk that hide each other's transfers"),
    "rates": (_rates, "the machine's rates at a model's shapes, for the planner"),
}
