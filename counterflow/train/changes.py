"""Which settings may change when a run is resumed from a checkpoint, and the record of those that did.

A checkpoint is tensors and a place in the text. A setting may change unless it gives a tensor another shape or the
place another meaning. A change that affects the numbers is printed, kept in run.toml with the step from which it holds,
and written to the metrics of the first step after. Not taken: refusing every change, since a run that diverges or runs
out of memory needs one.
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

CHANGEABLE: Mapping[str, str] = {
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
"""Settings, or all of a table, that may change, each with the reason why it may."""
UNRECORDED = (
    "name",
    "data.cache_dir",
    "train.threads",
    "keep.folder",
    "keep.resume",
    "keep.wandb",
    "keep.report",
)
"""Settings that may change and affect no number; their changes are not recorded."""


class Change(NamedTuple):
    """A setting that changed: the step from which it holds, and both values as the command line takes them."""

    step: int
    setting: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.setting} was {self.was}, is {self.now}"


def changes(before: RunConfig, run: RunConfig, folder: Path, step: int) -> list[Change]:
    """The settings that differ from `step` on.   Fails: ConfigError for one that may not change."""
    found = [Change(step, *values) for values in _differences(before, run)]
    refused = [str(change) for change in found if not _listed(change.setting, CHANGEABLE)]
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
    """Both, for a run that is resumed at `step`; what had changed after it counts as changed there."""
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
        if before == after or after == "auto" or _listed(key, UNRECORDED):
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
