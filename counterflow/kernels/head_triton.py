"""Cross-entropy and its gradient in Triton: logits are read twice and overwritten once (plain ops: nine passes)."""

from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

LOWEST = tl.constexpr(-1e30)
"""Below any logit; minus infinity would take part in differences."""


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float | None) -> Tensor:
    """−log p(target) of every row of logits (T, V) in fp32 nats.

    With a scale, scale × its gradient takes the logits' place, rounded once.
    """
    assert logits.is_contiguous(), "rows lie one behind the other"
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    width = logits.shape[1]
    if len(logits):
        block = min(4096, triton.next_power_of_2(width))
        _rows[(len(logits),)](  # pyright: ignore[reportIndexIssue]
            logits,
            targets,
            nll,
            scale or 0.0,
            width,
            block=block,
            backward=scale is not None,
            num_warps=max(1, min(8, block // 256)),
        )
    return nll


@triton.jit(do_not_specialize=["scale", "width"])
@no_type_check
def _rows(logits, targets, nll, scale, width, block: tl.constexpr, backward: tl.constexpr):
    """One row a program."""
    row = logits + tl.program_id(0).to(tl.int64) * width
    target = tl.load(targets + tl.program_id(0))
    # Step 1: in every lane the largest logit so far, and the sum of exp(logit − largest) along with it.
    largest = tl.full((block,), LOWEST, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for first in range(0, width, block):
        at = first + tl.arange(0, block)
        logit = tl.load(row + at, mask=at < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, logit)
        total = total * tl.exp(largest - higher) + tl.exp(logit - higher)
        largest = higher
    # Step 2: the lanes' sums, all relative to the row's largest.
    top = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - top), 0)
    wanted = tl.load(row + target).to(tl.float32)
    tl.store(nll + tl.program_id(0), tl.log(total) + (top - wanted))
    # Step 3: scale × (softmax − 1 at the target).
    if backward:
        for first in range(0, width, block):
            at = first + tl.arange(0, block)
            logit = tl.load(row + at, mask=at < width, other=float("-inf")).to(tl.float32)
            gradient = (tl.exp(logit - top) / total - tl.where(at == target, 1.0, 0.0)) * scale
            tl.store(row + at, gradient.to(logits.dtype.element_ty), mask=at < width)
