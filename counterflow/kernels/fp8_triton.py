"""Rows to FP8 and back in Triton: one pass over memory, where separate ops take seven."""

from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE = tl.constexpr(128)
SMALLEST, LARGEST = tl.constexpr(1e-12), tl.constexpr(448.0)


def quantise(x: Tensor) -> Tensor:
    """As `fp8.quantise`, to the bit but for tiles with NaN, of which the other numbers survive."""
    tiles = triton.cdiv(x.shape[1], 128)
    packed = torch.empty(len(x), tiles * 132, dtype=torch.uint8, device=x.device)
    if len(x):
        x, wide = x.contiguous(), triton.next_power_of_2(tiles)
        _quantise[(len(x),)](x, packed, x.shape[1], tiles=tiles, wide=wide, num_warps=8)  # pyright: ignore[reportIndexIssue]
    return packed


def dequantise(packed: Tensor, out: Tensor) -> Tensor:
    """As `fp8.dequantise`, into `out` (T, D), whose rows are contiguous."""
    tiles = triton.cdiv(out.shape[1], 128)
    if len(out):
        packed, wide = packed.contiguous(), triton.next_power_of_2(tiles)
        _dequantise[(len(out),)](packed, out, out.shape[1], tiles=tiles, wide=wide, num_warps=8)  # pyright: ignore[reportIndexIssue]
    return out


@triton.jit
@no_type_check
def _quantise(x, packed, width, tiles: tl.constexpr, wide: tl.constexpr):
    """One row a program: its numbers by the scales of their tiles, and then the scales."""
    row = tl.program_id(0).to(tl.int64)
    tile, column = tl.arange(0, wide), tl.arange(0, TILE)
    at = tile[:, None] * TILE + column[None, :]
    values = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    scales = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 1), SMALLEST), LARGEST)
    numbers = tl.div_rn(values, tl.broadcast_to(scales[:, None], (wide, TILE))).to(tl.float8e4nv)
    out = packed + row * (tiles * (TILE + 4))
    tl.store(out + at, numbers.to(tl.uint8, bitcast=True), mask=(tile < tiles)[:, None])
    tl.store((out + tiles * TILE).to(tl.pointer_type(tl.float32)) + tile, scales, mask=tile < tiles)


@triton.jit
@no_type_check
def _dequantise(packed, out, width, tiles: tl.constexpr, wide: tl.constexpr):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    tile, column = tl.arange(0, wide), tl.arange(0, TILE)
    at = tile[:, None] * TILE + column[None, :]
    mine = packed + row * (tiles * (TILE + 4))
    numbers = tl.load(mine + at, mask=at < width, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    scales = tl.load(
        (mine + tiles * TILE).to(tl.pointer_type(tl.float32)) + tile, mask=tile < tiles, other=0.0
    )
    value = numbers * scales[:, None]
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=at < width)
