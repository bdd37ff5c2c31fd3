"""What a run measures, step by step: a line of JSON each, TensorBoard, a tracking service if wanted, the progress line.

metrics.jsonl is the truth, the others are views of it. A resumed run first drops the lines after its
checkpoint, so that the file of an interrupted run equals an uninterrupted one's but for times. The loads of a large
model's experts would be most of a long run's file, so it has their sums over several steps. Not taken:
TensorBoard's event files as the record, which nothing else reads and which cannot be cut at a step;
or a tracking service, which a run without a network would have to do without.
"""

import json
import math
import os
import re
import secrets
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from counterflow.config.run import RunConfig
from counterflow.errors import ConfigError
from counterflow.notation import from_json
from counterflow.progress import sized
from counterflow.units import count

METRICS = "metrics.jsonl"
HEAT_MAP_EVERY = 50
MOST_LOADS = 2**24
"""Numbers that a run's lines have of its experts' loads, a hundred megabytes, however long and large it is."""
BY_LAYER = ("load", "load_entropy", "dead_experts")
"""What a step says of each layer, which makes most of its line."""
FIRST = re.compile(rb'\{"step": (\d{1,18})[,}]')
"""How a line begins, so that its step is known without reading all of it."""


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The steps a run's folder holds, read one by one; lines torn by a kill, or damaged, are left out."""
    path = folder / METRICS
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError):
                row = from_json(line)
                if isinstance(row, dict) and {"step", "tokens"} <= row.keys():
                    yield row


def read(folder: Path) -> list[dict[str, Any]]:
    """All steps that a run's folder holds."""
    return list(rows(folder))


def read_light(folder: Path) -> list[dict[str, Any]]:
    """All steps, without what they say of single layers; the last has, as its load, that of the last tenth of them."""
    light: list[dict[str, Any]] = []
    loads: deque[Mapping[str, list[int]]] = deque()
    seen = 0
    for row in rows(folder):
        if load := row.get("load"):
            seen += 1
            loads.append(load)
            while len(loads) > max(1, seen // 10):
                loads.popleft()
        light.append({sys.intern(key): value for key, value in row.items() if key not in BY_LAYER})
    if loads:
        light[-1]["load"] = summed(loads)
    return light


def summed(loads: Collection[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """Tokens of each expert of several steps, by the newest one's layers."""
    *_, newest = loads
    return {
        layer: [sum(of) for of in zip(*(load[layer] for load in loads if layer in load))] for layer in newest
    }


def load_every(numbers: int, steps: int) -> int:
    """How many of so many steps, each with so many numbers of load, share one line that has it."""
    return max(1, math.ceil(numbers * steps / MOST_LOADS))


def drop_after(path: Path, step: int) -> None:
    """Cut a metrics.jsonl behind the line of a step, torn ones too. It is read through and not rewritten."""
    if not path.is_file():
        return
    end = place = 0
    with path.open("rb") as lines:
        for line in lines:
            number, place = FIRST.match(line), place + len(line)
            if number and int(number[1]) > step:
                break
            if number and line.endswith(b"}\n"):
                end = place
    os.truncate(path, end)


class Metrics:
    """Writes the steps after `step`, the one resumed from, to a folder's metrics.jsonl and TensorBoard.

    What is there of later steps, or torn, is dropped. The first line says what was `changed`. The load of experts is
    written every `load_every` steps, then as the sum of those.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        tracker: "Tracker | None" = None,
        changed: Sequence[Any] = (),
        load_every: int = 1,
    ) -> None:
        drop_after(folder / METRICS, step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run needs it

        self._tracker, self._changed = tracker, list(changed)
        self._every, self._load, self._load_steps = load_every, {}, 0
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """One step: its line, its scalars, and now and then the heat map of expert load."""
        row, changed, self._changed = dict(values), self._changed, []
        if changed:
            row["changed"] = changed
        if self._every > 1 and row.get("load"):
            row |= self._together(row.pop("load"), row["step"])
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        step = values["step"]
        found = dict(scalars(values))
        for name, value in found.items():
            self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.write(found, step)
        self._expert_load(values.get("load", {}), step)

    def _together(self, load: Mapping[str, list[int]], step: int) -> dict[str, Any]:
        """What a step's line has of the load: the sum since the last that had it, where it is this one's turn."""
        self._load = summed([self._load, load])
        self._load_steps += 1
        if step % self._every:
            return {}
        done = {"load": self._load, "load_steps": self._load_steps}
        self._load, self._load_steps = {}, 0
        return done

    def _expert_load(self, load: Mapping[str, list[int]], step: int) -> None:
        if load and (step % HEAT_MAP_EVERY == 0 or step == 1):
            import torch

            counts = torch.tensor(list(load.values()), dtype=torch.float32)
            relative = (counts / counts.mean(1, keepdim=True).clamp_min(1e-9) / 3).clamp(0, 1)
            picture = relative.repeat_interleave(8, 0).repeat_interleave(8, 1)
            self._board.add_image("expert_load, white is three times even", picture[None], step)

    def close(self) -> None:
        """Flush all."""
        self._file.close()
        self._board.close()
        if self._tracker is not None:
            self._tracker.close()


class Tracker:
    """A run at Weights & Biases, one id over all its starts, kept in the run's folder.   Fails: ConfigError.

    Steps that a resumed run makes once more were logged before, and the service keeps what it had of them.
    """

    def __init__(self, folder: Path, run: RunConfig) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        place = folder / "wandb.txt"
        if not place.is_file():
            place.write_text(f"{secrets.token_hex(4)}\n")
        try:
            self._run: Any = wandb.init(
                project=run.keep.wandb,
                name=run.name,
                id=place.read_text().strip(),
                resume="allow",
                dir=str(folder),
                config=asdict(run),
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"keep.wandb is '{run.keep.wandb}' and wandb does not start: {str(error).splitlines()[0]}; run `wandb "
                "login`, or set WANDB_MODE=offline."
            ) from None

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """A step's numbers, by TensorBoard's names."""
        self._tell(lambda run: run.log(dict(scalars), step=step))

    def close(self) -> None:
        """See everything off."""
        self._tell(lambda run: run.finish())

    def _tell(self, act: Callable[[Any], object]) -> None:
        """A service that fails does not end the training: it is said once, and nothing more is sent."""
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # whatever its client raises
            self._run = None
            print(
                f"counterflow: Weights & Biases has failed ({(str(error) or repr(error)).splitlines()[0]}) and gets "
                f"nothing more of this run; {METRICS} has it all.",
                file=sys.stderr,
            )


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of all that a step measured: lists by position, the experts' load as MaxVio by layer."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and name != "step":
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}/{index}", item) for index, item in enumerate(value, start=1))
    for layer, counts in values.get("load", {}).items():
        mean = sum(counts) / len(counts)
        yield f"max_vio_by_layer/{layer}", max(counts) / mean - 1 if mean else 0.0


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as null, which JSON has."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(values: Mapping[str, Any], steps: int, tokens: float) -> list[str]:
    """What a step's line says, of a run of so many steps and tokens, the most important first."""
    parts = [
        f"step {values['step']}/{steps}",
        sized(values["tokens"], tokens, count).replace(" of ", "/") + " tokens",
        f"loss {values['loss']:.3f}",
        f"{values['tokens_per_s']:,.0f} tokens/s",
    ]
    if "max_vio" in values:
        parts.append(f"MaxVio {values['max_vio']:.2f}")
    if values.get("mtp_loss"):
        parts.append("MTP " + " ".join(f"{loss:.3f}" for loss in values["mtp_loss"]))
    return parts
