"""A trained run as a model to use: its configuration, its newest checkpoint, its tokenizer."""

from pathlib import Path

import torch

from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.data.tokenizer import Tokenizer
from counterflow.data.tokenizer import load as load_tokenizer
from counterflow.errors import CheckpointError
from counterflow.model.transformer import Transformer, named_routers
from counterflow.train.checkpoint import Checkpoints

RUN_TOML = "run.toml"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"


def run_config(folder: Path) -> RunConfig:
    """The configuration that a run's folder keeps.   Fails: CheckpointError where there is no run."""
    path = folder / RUN_TOML
    if not path.is_file():
        runs = sorted(other.parent.name for other in folder.parent.glob(f"*/{RUN_TOML}"))
        known = f"known there: {', '.join(runs)}." if runs else "train one first: counterflow train."
        raise CheckpointError(f"{folder} is no run: it has no {RUN_TOML}; {known}")
    return load_run(str(path))


@torch.no_grad()
def restore(folder: Path, averaged: bool = False) -> tuple[Transformer, Tokenizer]:
    """The run's model, in fp32 on the CPU, and its tokenizer; with `averaged`, its EMA weights.

    Fails: CheckpointError where there is no run, no checkpoint, or no averaged weights.
    """
    run, kept = run_config(folder), Checkpoints(folder / CHECKPOINTS, keep=1)
    if not kept.steps():
        raise CheckpointError(f"{folder} has no checkpoint yet; train it further: counterflow train.")
    if averaged and not run.train.ema_decay:
        raise CheckpointError(f"{folder} kept no averaged weights; train with train.ema_decay above 0.")
    model, kind = Transformer(run.model), "ema" if averaged else "master"
    tensors = {f"{kind}.{name}": weight.data for name, weight in model.named_parameters()}
    tensors |= {f"bias.{name}": bias for _, name, bias in named_routers(model)}
    kept.load(kept.steps()[-1], tensors, some=True)
    return model, load_tokenizer(folder / TOKENIZER)
