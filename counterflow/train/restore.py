"""A trained run, or a folder in the released format, as a model to use; and such a model as the start of a run."""

from pathlib import Path

import torch
from torch import Tensor

from counterflow.comm.mesh import PRECISIONS, Mesh, precision_for
from counterflow.config.load import to_toml
from counterflow.config.run import Data, Keep, RunConfig
from counterflow.convert.folder import whole_folder
from counterflow.convert.load import empty_model, load_folder
from counterflow.data.tokenizer import Tokenizer
from counterflow.data.tokenizer import load as load_tokenizer
from counterflow.errors import CheckpointError
from counterflow.model.transformer import Transformer, expert_shards, named_routers
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.folder import CHECKPOINTS, RUN_TOML, TOKENIZER, is_exported, run_config
from counterflow.train.piece import Piece


def model_of(
    path: Path, averaged: bool = False, precision: str = "fp32", mesh: Mesh | None = None
) -> tuple[Transformer, Tokenizer]:
    """Model on the CPU, in fp32 or bf16 (the routers' biases in fp32), and tokenizer of a run or a released folder.

    `precision` may be auto, for the mesh's device.

    Of its experts the part that is this rank's on `mesh`. `averaged` takes a run's EMA weights.

    Fails: CheckpointError that says what is wrong with either.
    """
    mesh = mesh or Mesh()
    dtype = PRECISIONS[precision_for(precision, mesh.device.type)]
    if not is_exported(path):
        return restore(path, averaged, mesh, dtype)
    if averaged:
        raise CheckpointError(
            f"{path} is an exported folder and holds one set of weights; leave out averaged."
        )
    return mesh.all_do(lambda: load_folder(path, dtype, (mesh.expert_rank, mesh.expert)))


@torch.no_grad()
def restore(
    folder: Path, averaged: bool = False, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Transformer, Tokenizer]:
    """The run's model, in `dtype` on the CPU, and its tokenizer; with `averaged`, its EMA weights.

    Of its experts the part that is this rank's on `mesh`, whose ranks all call this. Weights are rounded as they are
    read, so that there is never more of the model than is kept.

    Fails: CheckpointError where there is no run, no checkpoint, or no averaged weights.
    """
    mesh = mesh or Mesh()
    kept = Checkpoints(folder / CHECKPOINTS, 1, mesh)

    def empty() -> Transformer:
        run = run_config(folder)
        if not kept.steps():
            raise CheckpointError(f"{folder} has no checkpoint yet; train it further: counterflow train.")
        if averaged and not run.train.ema_decay:
            raise CheckpointError(f"{folder} kept no averaged weights; train with train.ema_decay above 0.")
        return empty_model(run.model, dtype, (mesh.expert_rank, mesh.expert))

    model = mesh.all_do(empty)
    kept.load(kept.steps()[-1], weights(model, "ema" if averaged else "master"), some=True)
    return model, load_tokenizer(folder / TOKENIZER)


def weights(model: Transformer, kind: str = "master") -> dict[str, Piece | Tensor]:
    """What a checkpoint keeps of the model itself, by name: fp32 weights (masters or averages) and routers' biases."""
    shards, kept = expert_shards(model), {}
    for name, weight in model.named_parameters():
        value = weight.data
        kept[f"{kind}.{name}"] = Piece(value.view(-1), *shards[name]) if name in shards else value
    return kept | {f"bias.{name}": bias for _, name, bias in named_routers(model)}


def write_start(source: Path, checkpoints: Checkpoints) -> tuple[Transformer, Tokenizer]:
    """Step 0 of a run: the weights of another run or of a released folder, and nothing else. Model and tokenizer."""
    model, tokenizer = model_of(source)
    checkpoints.save(0, weights(model), {"sample": 0, "step": 0, "seconds": 0.0, "fingerprint": ""})
    return model, tokenizer


def import_run(source: Path, folder: Path) -> Transformer:
    """Make a run whose step 0 is a released folder's weights; the model.   Fails: CheckpointError.

    Cost: the model in fp32, in memory and on disk.
    """
    with whole_folder(folder) as new:
        model, tokenizer = write_start(source, Checkpoints(new / CHECKPOINTS, keep=1))
        length = min(Data().sequence_length, model.config.max_positions)
        data = Data(sequence_length=length, tokenizer=str(folder / TOKENIZER))
        run = RunConfig(folder.name, model.config, data, keep=Keep(folder=str(folder)))
        (new / RUN_TOML).write_text(to_toml(run), encoding="utf-8")
        tokenizer.save(new / TOKENIZER)
    return model
