"""A plain copy by a set number of programs, in Triton: what a link gives to kernels that do nothing else.

The ceiling beside which dispatch is timed: rows lie side by side, nothing is looked up, nobody is told.
"""

from collections.abc import Sequence
from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

WORDS, WARPS = 32768, 16
"""Four-byte words that a program has under way, and its warps."""


def push(pairs: Sequence[tuple[Tensor, Tensor]], programs: int) -> None:
    """Each source into its target, contiguous bytes in multiples of 16, on this device or a neighbour's."""
    for source, target in pairs:
        words = source.numel() * source.element_size() // 4
        assert source.numel() * source.element_size() % 16 == 0, "words of 16 bytes"
        if words:
            _push[(programs,)](source.view(-1), target.view(-1), words, block=WORDS, num_warps=WARPS)


@triton.jit
@no_type_check
def _push(source, target, words, block: tl.constexpr):
    here = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
    there = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
    whole = words // block * block
    for first in range(tl.program_id(0) * block, whole, tl.num_programs(0) * block):
        at = first + tl.arange(0, block)
        tl.store(there + at, tl.load(here + at))
    if tl.program_id(0) == 0:
        for first in range(whole, words, block):
            at = first + tl.arange(0, block)
            tl.store(there + at, tl.load(here + at, mask=at < words), mask=at < words)
