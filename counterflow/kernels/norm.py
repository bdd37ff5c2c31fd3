"""RMSNorm: PyTorch's own operator, which is one fused pass on CPUs and GPUs alike."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rms_norm(x: Float[Tensor, "*T D"], gain: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*T D"]:
    """x over its root mean square in the last dim, times the gain; the mean is taken in fp32. [§4.2]"""
    return F.rms_norm(x, gain.shape, gain, eps)
