"""What a run measures, step by step: a line of JSON each, TensorBoard, a tracking service if wanted, the progress line.

metrics.jsonl is the truth, the others are views of it. A resumed run first drops the lines after its
checkpoint, so that the file of an interrupted run equals an uninterrupted one's but for times. Not taken:
TensorBoard's event files as the record, which nothing else reads and which cannot be cut at a step;
or a tracking service, which a run without a network would have to do without.
"""

import json
import math
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from counterflow.config.run import RunConfig
from counterflow.errors import ConfigError
from counterflow.progress import sized
from counterflow.units import count

METRICS = "metrics.jsonl"
HEAT_MAP_EVERY = 50


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

    What is there of later steps, or torn, is dropped. The old file stays whole until the new one replaces it. The first
    line says what was `changed`.
    """

    def __init__(
        self, folder: Path, step: int, tracker: "Tracker | None" = None, changed: Sequence[Any] = ()
    ) -> None:
        rows = [row for row in read(folder) if row["step"] <= step]
        beside = folder / (METRICS + ".new")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        beside.rename(folder / METRICS)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run needs it

        self._tracker, self._changed = tracker, list(changed)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """One step: its line, its scalars, and now and then the heat map of expert load."""
        changed, self._changed = self._changed, []
        row = {**values, "changed": changed} if changed else values
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        step = values["step"]
        found = dict(scalars(values))
        for name, value in found.items():
            self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.write(found, step)
        self._expert_load(values.get("load", {}), step)

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
