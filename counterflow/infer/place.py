"""A model where it is to run and in which precision, with its MTP modules or without them."""

from counterflow.comm.mesh import PRECISIONS, device_for, precision_for
from counterflow.infer.engine import EngineSettings, chain_of
from counterflow.model.transformer import Transformer


def placed(model: Transformer, device: str, precision: str, settings: EngineSettings) -> Transformer:
    """The model itself, moved, rounded, and without the modules that these settings leave idle.

    Buffers keep their precision: the router's bias decides between scores that are closer than bf16 tells apart.
    Fails: ConfigError on an unknown device or precision.
    """
    device = device_for(device, 1)
    dtype = PRECISIONS[precision_for(precision, device)]
    model.mtp = model.mtp[: chain_of(len(model.mtp), settings)[1]]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return model.to(device)
