"""A model where it is to run and in which precision, with its MTP modules or without them."""

import torch

from counterflow.comm.mesh import device_for
from counterflow.errors import ConfigError, nearest
from counterflow.infer.engine import EngineSettings, chain_of
from counterflow.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def placed(model: Transformer, device: str, precision: str, settings: EngineSettings) -> Transformer:
    """The model itself, moved, rounded, and without the modules that these settings leave idle.

    Buffers keep their precision: the router's bias decides between scores that are closer than bf16 tells apart.
    Fails: ConfigError on an unknown device or precision.
    """
    if precision not in DTYPES:
        raise ConfigError(f"precision is '{precision}'; {nearest(precision, DTYPES)}")
    device = device_for(device, 1)
    model.mtp = model.mtp[: chain_of(len(model.mtp), settings)[1]]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(DTYPES[precision])
    return model.to(device)
