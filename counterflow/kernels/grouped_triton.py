"""Zeros behind the last expert's rows, in Triton: only those rows are written, and the host need not know which."""

from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


def zero_tail(out: Tensor, ends: Tensor) -> Tensor:
    """`out` (P, N), contiguous, with zeros in its rows from `ends[-1]` on."""
    if out.numel():
        grid, sizes = (triton.cdiv(len(out), 16),), {"width": out.shape[1], "block": 512}
        _zero_tail[grid](out, ends, len(out), last=len(ends) - 1, **sizes)  # pyright: ignore[reportIndexIssue]
    return out


@triton.jit(do_not_specialize=["rows"])  # or it is compiled again for rows in multiples of 16
@no_type_check
def _zero_tail(out, ends, rows, last: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """Sixteen rows a program; most programs have nothing to do."""
    end = tl.load(ends + last)
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    if tl.program_id(0) * 16 + 16 > end:
        for first in range(0, width, block):
            at = first + tl.arange(0, block)
            mask = ((row >= end) & (row < rows))[:, None] & (at < width)[None, :]
            nothing = tl.zeros((16, block), out.dtype.element_ty)
            tl.store(out + row.to(tl.int64)[:, None] * width + at[None, :], nothing, mask=mask)
