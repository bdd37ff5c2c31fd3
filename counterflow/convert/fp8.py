"""Weights in FP8 blocks, as the released checkpoints keep them, and back.

A matrix is cut into blocks of 128 × 128, the last ones ragged; each block is divided by its own scale, so that its
largest element is the format's largest, and rounded to e4m3. What is stored beside it is the scale to multiply with
again: W = q · scale_inv. Rounding moves an element by at most 1/16 of itself, or by 2⁻¹⁰ scales where it is so small
that the format has no exponent left for it.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

BLOCK = 128
E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
"""A power of two, which is its exponent."""
LARGEST = torch.finfo(E4M3).max
SCALE = "weight_scale_inv"
"""What a scale's name ends in; the weight's own ends in `weight`."""


def to_blocks(weight: Float[Tensor, "O I"]) -> tuple[Tensor, Float[Tensor, "BO BI"]]:
    """(e4m3 weight, fp32 scales); a block of zeros has scale 1."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    scaled = blocks / scales[:, None, :, None]
    return scaled.flatten(2).flatten(0, 1)[:rows, :columns].to(E4M3), scales


def from_blocks(weight: Float[Tensor, "O I"], scales: Shaped[Tensor, "BO BI"]) -> Float[Tensor, "O I"]:
    """The weight in fp32; bytes as scales are exponents."""
    rows, columns = weight.shape
    numbers = scales.view(E8M0) if scales.dtype == torch.uint8 else scales
    wide = numbers.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * wide


def num_blocks(rows: int, columns: int) -> tuple[int, int]:
    """The scales' shape for a matrix of rows × columns."""
    return -(-rows // BLOCK), -(-columns // BLOCK)
