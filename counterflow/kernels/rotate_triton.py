"""Rotary positions in Triton: heads read once and written once, their last numbers turned."""

from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

HEADS = 16
"""At once, of one token."""


def rotate(x: Tensor, table: Tensor, keep: int, back: bool = False) -> Tensor:
    """As `rotate.rotate`, and `back` by the opposite angles; rows of x may lie anywhere, each in one piece."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    sequences, length, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        tile, pairs = min(HEADS, triton.next_power_of_2(heads)), (width - keep) // 2
        _rotate[(sequences * length, triton.cdiv(heads, tile))](  # pyright: ignore[reportIndexIssue]
            x, torch.view_as_real(table.contiguous()), out, length, heads, *x.stride()[:3],
            keep=keep, keep_wide=triton.next_power_of_2(max(keep, 1)), pairs=pairs,
            pairs_wide=triton.next_power_of_2(pairs), tile=tile, sign=-1 if back else 1, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length"])  # or it is compiled again for lengths in multiples of 16
@no_type_check
def _rotate(
    x, table, out, length, heads, by_sequence, by_position, by_head,
    keep: tl.constexpr, keep_wide: tl.constexpr, pairs: tl.constexpr, pairs_wide: tl.constexpr,
    tile: tl.constexpr, sign: tl.constexpr,
):  # fmt: skip
    """Some heads of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    position = token % length
    head = tl.program_id(1) * tile + tl.arange(0, tile)
    mine = x + (token // length) * by_sequence + position * by_position + head.to(tl.int64)[:, None] * by_head
    theirs = out + (token * heads + head)[:, None] * (keep + 2 * pairs)
    here = (head < heads)[:, None]
    if keep:
        column = tl.arange(0, keep_wide)[None, :]
        mask = here & (column < keep)
        tl.store(theirs + column, tl.load(mine + column, mask=mask), mask=mask)
    pair = tl.arange(0, pairs_wide)
    angle = table + (position * pairs + pair) * 2
    cosine = tl.load(angle, mask=pair < pairs, other=0.0)[None, :]
    sine = sign * tl.load(angle + 1, mask=pair < pairs, other=0.0)[None, :]
    at, mask = keep + 2 * pair[None, :], here & (pair < pairs)[None, :]
    a = tl.load(mine + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(mine + at + 1, mask=mask, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(theirs + at, (a * cosine - b * sine).to(kind), mask=mask)
    tl.store(theirs + at + 1, (a * sine + b * cosine).to(kind), mask=mask)
