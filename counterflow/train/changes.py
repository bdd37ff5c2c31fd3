"""What may be another setting when a run goes on from a checkpoint, and the record of what was another one.

A checkpoint is tensors and a place in the text. Whatever takes up both may change; what gives the tensors another
shape, or the place another meaning, may not. A change that a number can tell is said, stands in run.toml with the step
that it holds from, and in the metrics of the first step after. Not taken: refusing every change, which makes the
remedies for a run that diverges or runs out of memory refuse themselves.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from counterflow.config.load import CHANGES, literal, settings
from counterflow.config.run import RunConfig
from counterflow.errors import ConfigError
from counterflow.notation import from_toml
from counterflow.train.folder import RUN_TOML

TAKEN_UP: Mapping[str, str] = {
    "train.lr": "the rate is of the steps to come",
    "train.tokens": "all that changes over a run is a function of the share done, and follows its length",
    "train.batch_size": "the place is a number of samples, whatever batches they came in",
    "train.batch_start": "as above",
    "train.batch_ramp_until": "as above",
    "train.batch_increment": "as above",
    "train.micro_batch_size": "the same batch in other parts: sums are rounded otherwise",
    "train.recompute": "the same numbers, made again or kept",
    "train.precision": "masters and moments are fp32 in both",
    "train.clip_norm": "the optimizer's, for the steps to come",
    "train.beta1": "as above",
    "train.beta2": "as above",
    "train.adam_eps": "as above",
    "train.weight_decay": "as above",
    "train.mtp_weight": "a weight of the losses to come",
    "train.mtp_weight_late": "as above",
    "train.mtp_change_at": "as above",
    "train.bias_speed": "how far biases move from now on",
    "train.bias_speed_start": "as above",
    "train.bias_stop_at": "as above",
    "train.ema_decay": "averages that a checkpoint lacks begin as its weights",
    "train.patience": "counted on from what was measured",
    "train.device": "rounded otherwise",
    "parallel": "the same batches, rounded otherwise; a ramp is coarser where the layout asks for it",
    "keep.checkpoint_every": "what is written, and when",
    "keep.checkpoint_async": "as above",
    "keep.checkpoints": "as above",
    "keep.eval_every": "as above",
    "keep.eval_samples": "as above",
    "keep.log_every": "as above",
}
"""Settings (or all of a table) that may change, each with its reason."""
UNSEEN = (
    "name",
    "data.cache_dir",
    "train.threads",
    "keep.folder",
    "keep.resume",
    "keep.wandb",
    "keep.report",
)
"""Those that may change and that no number tells; they are not recorded."""


class Change(NamedTuple):
    """A setting that is another one from a step on; the values as one writes them."""

    step: int
    setting: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.setting} was {self.was}, is {self.now}"


def changes(before: RunConfig, run: RunConfig, folder: Path, step: int) -> list[Change]:
    """What is another setting from `step` on.   Fails: ConfigError for a setting that cannot be taken up."""
    found = [Change(step, *values) for values in _differences(before, run)]
    refused = [str(change) for change in found if not _listed(change.setting, TAKEN_UP)]
    if refused:
        length = any(text.startswith("train.minutes") for text in refused)
        raise ConfigError(
            f"{folder} holds a run with other settings: {'; '.join(refused[:3])}. "
            + ("Give another length as train.tokens=..., choose" if length else "Choose")
            + " another folder with name=... or keep.folder=..., take the old settings, start anew with "
            f"keep.resume=never, or start from its weights in another folder with --from {folder}."
        )
    return found


def recorded(folder: Path) -> list[Change]:
    """The changes that a run's run.toml keeps.   Fails: ConfigError where they are not as they were written."""
    path = folder / RUN_TOML
    kept = from_toml(path.read_bytes()).get(CHANGES, []) if path.is_file() else []
    try:
        found = [Change(**row) for row in kept]
        if all(list(map(type, change)) == [int, str, str, str] for change in found):
            return found
    except TypeError:
        pass
    raise ConfigError(
        f"{path} has {CHANGES} that are not as they were written; correct them, or delete those tables."
    )


def together(earlier: Sequence[Change], new: Sequence[Change], step: int) -> list[Change]:
    """Both, at a run that goes on from `step`: what was changed later than that holds from there."""
    merged: dict[tuple[int, str], Change] = {}
    for change in (*earlier, *new):
        key = min(change.step, step), change.setting
        was = merged[key].was if key in merged else change.was
        merged[key] = Change(key[0], change.setting, was, change.now)
    return [change for change in merged.values() if change.was != change.now]


def to_toml(changed: Sequence[Change]) -> str:
    """As run.toml keeps them."""
    return "".join(
        f"\n[[{CHANGES}]]\n"
        + "".join(f"{name} = {literal(item)}\n" for name, item in change._asdict().items())
        for change in changed
    )


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(setting, was, is) of what is not the same; `auto` is anything, until decided."""
    for name in settings(type(old)):
        key, before, after = prefix + name, getattr(old, name), getattr(new, name)
        if before == after or after == "auto" or _listed(key, UNSEEN):
            continue
        if dataclasses.is_dataclass(before) and type(before) is type(after):
            yield from _differences(before, after, key + ".")
        elif isinstance(before, tuple) and len(before) == len(after):
            for place, (one, other) in enumerate(zip(before, after)):
                yield from _differences(one, other, f"{key}.{place}.")
        else:
            yield key, _shown(before), _shown(after)


def _listed(key: str, names: Sequence[str] | Mapping[str, str]) -> bool:
    """Whether a setting, or the table it is in, is one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shown(value: Any) -> str:
    """As one writes it on the command line."""
    if isinstance(value, tuple):
        return " and ".join(f"'{getattr(item, 'path', item)}'" for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else f"{value}"
