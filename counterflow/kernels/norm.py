"""RMSNorm. On a GPU PyTorch's own, fused both ways; on a CPU, where its backward is many passes, with a backward of our
own (records/2026-11-23-cpu-kernels)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rms_norm(x: Float[Tensor, "*T D"], gain: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*T D"]:
    """x over its root mean square in the last dim, times the gain; statistics in fp32 or wider."""
    if x.is_cuda and x.dtype == gain.dtype != torch.float64:
        return F.rms_norm(x, gain.shape, gain, eps)
    return _RmsNorm.apply(x, gain, eps)  # pyright: ignore[reportReturnType]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, gain)
        return F.rms_norm(x, gain.shape, gain, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, drows = x.flatten(0, -2).to(wide), dy.flatten(0, -2).to(wide)
        scale = torch.rsqrt(torch.linalg.vecdot(rows, rows) / rows.shape[1] + ctx.eps)[:, None]
        weighed = drows * rows
        dgain = torch.mv(weighed.t(), scale[:, 0])
        # dx = s (g dy − s² x mean(g dy x)), with s the inverse root mean square.
        shift = torch.mv(weighed, gain.to(wide))[:, None] * scale.pow(2) / rows.shape[1]
        dx = drows.mul(gain).addcmul_(rows, shift, value=-1).mul_(scale)
        return dx.to(x.dtype).view_as(x), dgain.to(gain.dtype), None
