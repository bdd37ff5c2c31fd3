"""What a run measures, step by step: a line of JSON each, TensorBoard, and a progress bar.

metrics.jsonl is the truth, the others are views of it. A resumed run first drops the lines after its
checkpoint, so that the file of an interrupted run equals an uninterrupted one's but for times. Not taken:
TensorBoard's event files as the record, which nothing else reads and which cannot be cut at a step;
and a tracking service, which a run without a network would have to do without.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from counterflow.units import seconds

METRICS = "metrics.jsonl"
HEAT_MAP_EVERY = 50
PLAIN_EVERY_S = 10.0


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps a run's folder holds; a last line torn by a kill is left out."""
    path = folder / METRICS
    rows: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Metrics:
    """Writes the steps after `step`, the one resumed from, to a folder's metrics.jsonl and TensorBoard.

    What is there of later steps, or torn, is dropped. The old file stays whole until the new one replaces it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        rows = [row for row in read(folder) if row["step"] <= step]
        beside = folder / (METRICS + ".new")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        beside.rename(folder / METRICS)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run needs it

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """One step: its line, its scalars, and now and then the heat map of expert load."""
        self._file.write(json.dumps(_finite(values)) + "\n")
        self._file.flush()
        step = values["step"]
        for name, value in values.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(name, value, step)
            elif isinstance(value, (list, tuple)):
                for index, item in enumerate(value, start=1):
                    self._board.add_scalar(f"{name}/{index}", item, step)
        self._expert_load(values.get("load", {}), step)

    def _expert_load(self, load: Mapping[str, list[int]], step: int) -> None:
        for layer, counts in load.items():
            mean = sum(counts) / len(counts)
            self._board.add_scalar(f"max_vio_by_layer/{layer}", max(counts) / mean - 1 if mean else 0.0, step)
        if load and (step % HEAT_MAP_EVERY == 0 or step == 1):
            import torch

            counts = torch.tensor(list(load.values()), dtype=torch.float32)
            relative = (counts / counts.mean(1, keepdim=True).clamp_min(1e-9) / 3).clamp(0, 1)
            picture = relative.repeat_interleave(8, 0).repeat_interleave(8, 1)
            self._board.add_image("expert_load, white is three times even", picture[None], step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as null, which JSON has."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A bar over the run's samples on a terminal; elsewhere a line every ten seconds and at the end."""

    def __init__(self, total_samples: int, done_samples: int) -> None:
        self.total, self.done = total_samples, done_samples
        self._said, self._start, self._first = -math.inf, time.monotonic(), done_samples
        self._bar = self._task = None
        if sys.stdout.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(file=sys.stdout))
            self._task = self._bar.add_task("training", total=self.total, completed=self.done, line="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, values: Mapping[str, Any]) -> None:
        """Show a step."""
        self.done = values["samples"]
        line = _line(values)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, line=line)
        elif time.monotonic() - self._said > PLAIN_EVERY_S or self.done >= self.total:
            self._said = time.monotonic()
            left = (self._said - self._start) * (self.total - self.done) / max(1, self.done - self._first)
            print(f"{self.done}/{self.total}  {line}  {seconds(left)} left", flush=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


def _line(values: Mapping[str, Any]) -> str:
    parts = [f"step {values['step']}", f"loss {values['loss']:.3f}"]
    if values.get("mtp_loss"):
        parts.append("MTP " + " ".join(f"{loss:.3f}" for loss in values["mtp_loss"]))
    parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    if "max_vio" in values:
        parts.append(f"MaxVio {values['max_vio']:.2f}")
    return "  ".join(parts)
