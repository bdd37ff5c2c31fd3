"""`counterflow export`: a run as a folder that other tools load."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Export:
    """Write a run's newest weights in the released checkpoint format: safetensors shards with their index,
    config.json, tokenizer and generation settings. The folder appears once it is whole."""

    run: tyro.conf.Positional[str]
    """The run's folder or name; an exported folder is written anew in another form."""
    folder: tyro.conf.Positional[str]
    """Where to write; it must not be there yet."""
    dtype: str = "bf16"
    """bf16, fp32, or fp8: e4m3 in blocks of 128 × 128 with their scales, as DeepSeek-V3 was released."""
    mtp: bool = True
    """Write the multi-token modules; --no-mtp leaves them out, and the config says so."""
    shard_gib: float = 4.0
    """Size of a shard."""
    averaged: bool = False
    """Write the averaged weights (EMA), if the run kept them."""


def run(arguments: Sequence[str]) -> int:
    """Write the folder and say how large it is."""
    wish = tyro.cli(Export, prog="counterflow export", args=arguments, use_underscores=True)
    from counterflow.train.folder import folder_of, require_model

    require_model(wish.run)  # before torch is imported
    from counterflow.convert.export import Form, differences, export
    from counterflow.train.restore import model_of
    from counterflow.units import bytes_

    form, folder = Form(wish.dtype, wish.mtp, wish.shard_gib), Path(wish.folder)
    model, tokenizer = model_of(folder_of(wish.run), wish.averaged)
    export(model, tokenizer, folder, form)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {bytes_(size)} in {wish.dtype}{'' if wish.mtp else ', without multi-token modules'}.")
    for line in differences(model.config, tokenizer):
        print(line)
    return 0
