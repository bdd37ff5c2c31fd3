"""Rows in FP8 for the wire: E4M3 numbers with one fp32 scale for every 128 of them, packed as bytes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

TILE = 128
"""Numbers that share a scale. The report's 1 × 128."""
LARGEST = 448.0
"""The largest finite E4M3 number."""


def quantise(x: Float[Tensor, "T D"]) -> UInt8[Tensor, "T N"]:
    """Each row's numbers and then its scales, as bytes; D is filled up to whole tiles. NaN stays NaN."""
    if x.is_cuda and x.dtype != torch.float64:
        from counterflow.kernels import fp8_triton  # a CPU build of PyTorch comes without Triton

        return fp8_triton.quantise(x)
    return quantise_plainly(x)


def dequantise(
    packed: UInt8[Tensor, "T N"], width: int, dtype: torch.dtype, out: Tensor | None = None
) -> Float[Tensor, "T D"]:
    """The rows again, to within 1/16 of each number that is not tiny beside its tile's largest; into `out` if given."""
    if out is None:
        out = torch.empty(len(packed), width, dtype=dtype, device=packed.device)
    if packed.is_cuda and dtype != torch.float64:
        from counterflow.kernels import fp8_triton

        return fp8_triton.dequantise(packed, out)
    return out.copy_(dequantise_plainly(packed, width))


def quantise_plainly(x: Float[Tensor, "T D"]) -> UInt8[Tensor, "T N"]:
    """The same by ops of PyTorch."""
    if not len(x):
        return x.new_empty(0, -(-x.shape[1] // TILE) * (TILE + 4), dtype=torch.uint8)
    tiles = F.pad(x.float(), (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
    scales = tiles.abs().amax(-1).clamp_min(1e-12) / LARGEST
    numbers = (tiles / scales[..., None]).to(torch.float8_e4m3fn).flatten(1)
    return torch.cat([numbers.view(torch.uint8), scales.view(torch.uint8)], dim=1)


def dequantise_plainly(packed: UInt8[Tensor, "T N"], width: int) -> Float[Tensor, "T D"]:
    """The same by ops of PyTorch, in fp32."""
    tiles = -(-width // TILE)
    numbers = packed[:, : tiles * TILE].contiguous().view(torch.float8_e4m3fn).float()
    scales = packed[:, tiles * TILE :].contiguous().view(torch.float32)
    return (numbers.unflatten(1, (tiles, TILE)) * scales[..., None]).flatten(1)[:, :width]
