"""A model where it is to run and in which precision, with its MTP modules or without them."""

import torch

from counterflow.errors import ConfigError
from counterflow.infer.engine import EngineSettings, chain_of
from counterflow.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")


def placed(model: Transformer, device: str, precision: str, settings: EngineSettings) -> Transformer:
    """The model itself, moved, rounded, and without the modules that these settings leave idle.

    Buffers keep their precision: the router's bias decides between scores that are closer than bf16 tells apart.
    Fails: ConfigError on an unknown device or precision.
    """
    if device not in DEVICES or precision not in DTYPES:
        raise ConfigError(
            f"device is '{device}' and precision '{precision}'; known: {', '.join(DEVICES)}; {', '.join(DTYPES)}."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' and PyTorch sees no GPU; take device cpu, or check the driver.")
    model.mtp = model.mtp[: chain_of(len(model.mtp), settings)[1]]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(DTYPES[precision])
    return model.to(device)
