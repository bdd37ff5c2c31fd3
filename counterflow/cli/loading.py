"""A model that a verb was told to use: read in the precision it runs in, on its device, and what was chosen said."""

import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from counterflow.comm.mesh import Mesh
    from counterflow.data.tokenizer import Tokenizer
    from counterflow.infer.engine import EngineSettings
    from counterflow.model.transformer import Transformer


def mesh_on(device: str) -> "Mesh":
    """This process alone, on cpu, cuda, or where auto finds a GPU."""
    import torch

    from counterflow.comm.mesh import Mesh, device_for

    return Mesh(device=torch.device(device_for(device, 1)))


def precision_on(mesh: "Mesh", precision: str) -> str:
    """fp32 or bf16; a choice that was left to the machine is said in one line."""
    from counterflow.comm.mesh import precision_for

    chosen = precision_for(precision, mesh.device.type)
    if precision == "auto" and mesh.first:
        where = "a GPU" if mesh.device.type == "cuda" else "this processor"
        print(
            f"Running on {where} in {chosen}, which it multiplies fastest (--precision changes it).",
            file=sys.stderr,
        )
    return chosen


def settings_of(
    max_sequences: int, drafts: int, positions: int = 0, cache_bytes: float = 2**30
) -> "EngineSettings":
    """An engine's settings: a number of drafts that somebody names is kept to, −1 leaves it to what is measured."""
    from counterflow.infer.engine import ALL, EngineSettings

    return EngineSettings(
        max_sequences, drafts=drafts, adapt=drafts == ALL, positions=positions, cache_bytes=cache_bytes
    )


def say_unpacked(folder: Path, precision: str) -> None:
    """One line where an exported folder's weights are FP8: nothing multiplies them as they are."""
    from counterflow.config.released import read_json, scales_of
    from counterflow.convert.folder import CONFIG

    if scales_of(read_json(folder / CONFIG)):
        times = {"bf16": "twice", "fp32": "four times"}[precision]
        print(f"Its weights are FP8 and run unpacked to {precision}: {times} the memory.", file=sys.stderr)


def _awake(device: "torch.device") -> None:
    """Seconds that a GPU's first product and kernel take otherwise: its context, cuBLAS, Triton."""
    import torch

    with suppress(RuntimeError, ImportError):  # whoever needs it says what is wrong
        ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        torch.mm(ones, ones)
        import_module("triton")


def loaded(
    folder: Path, averaged: bool, precision: str, mesh: "Mesh", settings: "EngineSettings | None" = None
) -> "tuple[Transformer, Tokenizer]":
    """The model of a run or an exported folder on the mesh's device, of its experts this rank's, and its tokenizer.

    Without the MTP modules that an engine of these settings leaves idle.
    """
    from counterflow.infer.engine import EngineSettings
    from counterflow.infer.place import placed
    from counterflow.train.folder import is_exported
    from counterflow.train.restore import model_of

    chosen = precision_on(mesh, precision)
    if mesh.device.type == "cuda":  # while the weights are read
        threading.Thread(target=_awake, args=[mesh.device], daemon=True).start()
    model, tokenizer = model_of(folder, averaged, chosen, mesh)
    if mesh.first and is_exported(folder):
        say_unpacked(folder, chosen)
    return placed(model, mesh.device.type, chosen, settings or EngineSettings()), tokenizer
