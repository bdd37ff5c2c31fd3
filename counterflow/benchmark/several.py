"""The core claim on several GPUs at once, in one go and within a time: run part by part, kept after every row.

Every part has processes of its own and a limit, so that one that fails or hangs loses itself alone. What a rank notes
is taken up as it comes: held against what was predicted before, drawn, said, and written to the record. Whatever time
did not allow, or what failed, stands in the record by name with its reason.
"""

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessException

from counterflow.benchmark.processes import begun
from counterflow.benchmark.saved import noted, save
from counterflow.benchmark.several_parts import Part, Several, out_of_reach, parts
from counterflow.benchmark.several_predicted import (
    Prediction,
    errors,
    held_against,
    prediction,
    scheduled,
    simulated_from,
)
from counterflow.benchmark.several_shown import readme, said
from counterflow.config.run import Parallel
from counterflow.errors import CounterflowError
from counterflow.plan.hardware import Hardware, hardware
from counterflow.schedule import trace
from counterflow.train.provenance import provenance
from counterflow.train.timeline import caption, drawn

NOTHING = "no step came by the backend that was asked for, before"
CPU_SLACK = 10.0
"""Times a part's limit, which is a GPU's: a few cores that others use too need it."""
GRACE_S = 15.0
"""For processes to end, once they have said all."""
LEAST_S = 15.0
"""Too little to begin a part with."""


@dataclass
class Record:
    """A folder that is whole after every row: raw.json, output.txt, README.md, card files, timelines."""

    folder: Path
    settings: Mapping[str, Any]
    end: float
    """On the monotonic clock."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    made: Mapping[str, str] = field(default_factory=provenance)

    @property
    def left_s(self) -> float:
        """Until the time is over."""
        return self.end - time.monotonic()

    def say(self, words: str) -> None:
        """On the terminal and in output.txt, with the minutes since the start."""
        line = f"{(time.monotonic() - self.begun) / 60:5.1f} min  {words}"
        print(line, flush=True)
        with (self.folder / "output.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def keep(self) -> None:
        """Write what is known."""
        raw = {
            "settings": self.settings,
            "provenance": self.made,
            "predictions": self.predictions,
            "rows": self.rows,
            "not_run": self.not_run,
        }
        save(self.folder / "raw.json", raw)
        (self.folder / "README.md").write_text(readme(raw), encoding="utf-8")


class Run:
    """One go through all parts."""

    def __init__(self, wish: Several, folder: Path, minutes: float, notes: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "output.txt").unlink(missing_ok=True)
        self.wish, self.notes = wish, notes
        self.record = Record(folder, asdict(wish), time.monotonic() + 60 * minutes)
        self.record.not_run |= out_of_reach(wish.ranks)
        self.machines: dict[str, Hardware] = {}
        """By the model and layout whose rates they are."""
        self.predicted: dict[str, Prediction] = {}

    def go(self) -> None:
        """All parts while time is left."""
        for name, why in self.record.not_run.items():
            self.record.say(f"{name}: {why}")
        for number, part in enumerate(parts(self.wish)):
            self._part(part.without(self._lost()), self.notes / f"{number}.jsonl")
            self.record.keep()
        self.record.say(f"{len(self.record.rows)} rows; not run: {len(self.record.not_run)}")
        self.record.keep()

    def _lost(self) -> set[str]:
        """Backends by which no step came out where one did by `collective`: nothing more is asked of them."""
        compared = [name.split(", ") for name in (*self.record.rows, *self.record.not_run)]
        tried = {words[3] for words in compared if words[0] == "equality" and len(words) == 4}
        gave = {name.split(", ")[-1] for name, row in self.record.rows.items() if "worst" in row}
        return tried - gave if Parallel.dispatch in gave else set()

    def _part(self, part: Part, file: Path) -> None:
        """A part's rows, as they come; what it did not give is not run, for one reason."""
        left, why = self.record.left_s, ""
        if left < LEAST_S:
            why = f"no time: {max(0.0, left):.0f} s were left"
        else:
            self.record.say(f"{part.name} ... ({left:.0f} s left)")
            try:
                self._predict(part)
                slack = CPU_SLACK if self.wish.device == "cpu" else 1.0
                self._play(part, file, min(left, slack * part.limit_s))
            except (TimeoutError, CounterflowError) as error:
                why = str(error)
            except ProcessException as error:
                why = str(error).strip().splitlines()[-1]
                with (self.record.folder / "failures.txt").open("a", encoding="utf-8") as failures:
                    failures.write(f"{part.name}\n{error}\n\n")
        self._take(part, file)
        for name in part.rows:
            if name not in self.record.rows:
                lost = name.split(", ")[-1] in self._lost()
                self.record.not_run[name] = why or (NOTHING if lost else "its processes ended without it")
                self.record.say(f"{name}: NOT RUN, {self.record.not_run[name]}")

    def _play(self, part: Part, file: Path, limit_s: float) -> None:
        """A part's processes until they end, or until all rows are there and they had a while to end."""
        whole = float("inf")
        for _ in begun(part.play, part.parallel, self.wish.device, *part.given, file, limit_s=limit_s):
            self._take(part, file)
            if all(name in self.record.rows for name in part.rows):
                whole = min(whole, time.monotonic())
            if time.monotonic() - whole > GRACE_S:
                self.record.say(f"{part.name}: its processes did not end when all was done, and were ended")
                return

    def _predict(self, part: Part) -> None:
        """What the planner says of a part's ways, before it runs."""
        if part.run is None or not part.ways:
            return
        machine = self.machines.get(_place(part.name)) or self._sheet(part)
        for name, way in zip(part.rows, part.ways):
            found = self.predicted[name] = prediction(part.run, way, machine)
            self.record.predictions[name] = {
                key: value for key, value in vars(found).items() if key != "spans"
            }
        self.record.keep()

    def _sheet(self, part: Part) -> Hardware:
        """A data sheet's machine, where no rates were measured."""
        card = "cpu" if self.wish.device == "cpu" else "h200"
        self.record.say(f"{part.name}: no rates were measured; predicted from the data sheet of {card}")
        return hardware(card)

    def _take(self, part: Part, file: Path) -> None:
        """The rows that have come since."""
        for row in noted(file):
            name = row["name"]
            if name in self.record.rows:
                continue
            if "toml" in row:
                self._machine(name, row)
            elif part.ways and part.run is not None:
                self._meant(part, row)
            self.record.rows[name] = row
            if "failed" in row:
                self.record.not_run[name] = row["failed"]
            self.record.say(said(row))
            self.record.keep()

    def _machine(self, name: str, row: Mapping[str, Any]) -> None:
        """Measured rates, as the planner's file."""
        path = self.record.folder / f"{_file(name)}.toml"
        path.write_text(row["toml"], encoding="utf-8")
        self.machines[_place(name.removeprefix("rates, "))] = hardware(file=str(path))

    def _meant(self, part: Part, row: dict[str, Any]) -> None:
        """A timed row with what it means, and its timeline."""
        assert part.run is not None, "timed steps have a run"
        spans = trace.read(Path(row.pop("trace")).read_text(encoding="utf-8"))
        way = part.ways[part.rows.index(row["name"])]
        row |= held_against(part.run, way, row, spans)
        predicted = self.predicted[row["name"]]
        row["predicted"] = self.record.predictions[row["name"]]
        row["errors"] = errors(predicted, row)
        if part.run.parallel.dispatch != self.wish.dispatch[0]:
            row["by_collective"] = NOTHING
        schedule, named = scheduled(part.run)[0], {}
        for what, some in (
            ("predicted by the planner before the run", predicted.spans),
            ("simulated from the step's own op times", simulated_from(part.run, way, spans)),
            ("measured (a transfer that overlaps is drawn while it is issued)", spans),
        ):
            named[caption(what, some, schedule.ranks)] = some
        svg = drawn(schedule, named)
        (self.record.folder / f"{_file(row['name'])}.svg").write_text(svg, encoding="utf-8")


def several(wish: Several, folder: Path, minutes: float) -> Record:
    """Everything that is asked and that the time allows; the record, which lies in the folder too."""
    with tempfile.TemporaryDirectory() as notes:
        run = Run(wish, folder, minutes, Path(notes))
        run.go()
    return run.record


def _place(name: str) -> str:
    """Of `MODEL, SCHEDULE, LAYOUT` or `MODEL, LAYOUT`: model and layout."""
    words = name.split(", ")
    return f"{words[0]}, {words[-1]}"


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
