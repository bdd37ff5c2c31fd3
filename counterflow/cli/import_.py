"""`counterflow import`: a folder in the released format as a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Import:
    """Make a run of a folder in the released checkpoint format (config.json, safetensors, tokenizer.json), in fp32.

    `generate`, `evaluate` and `train --from` also take such a folder as it is."""

    folder: tyro.conf.Positional[str]
    """The folder to read; FP8 blocks are multiplied out."""
    run: tyro.conf.Positional[str]
    """The run to make: its folder, or a name in runs/. It must not be there yet."""


def run(arguments: Sequence[str]) -> int:
    """Make the run and say so."""
    wish = tyro.cli(Import, prog="counterflow import", args=arguments, use_underscores=True)
    from counterflow.train.folder import require_exported

    require_exported(Path(wish.folder))  # before torch is imported
    from counterflow.plan.count import count_parameters
    from counterflow.train.restore import import_run
    from counterflow.units import count

    folder = Path(wish.run) if "/" in wish.run else Path("runs") / wish.run
    sizes = count_parameters(import_run(Path(wish.folder), folder).config)
    print(
        f"{folder}: {count(sizes.total + sizes.mtp)} parameters; counterflow generate --run {folder} writes with it."
    )
    return 0
