"""Hidden states that wait for a module: rows of what whole passes gave, named and not cut out.

A pass gives one tensor for all sequences, and a sequence keeps numbers of its rows. They are gathered when a module
runs, for all sequences at once: cut out and joined sequence by sequence they cost the host more than a module takes.
"""

from collections.abc import Sequence as Items

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Row = tuple[Tensor, int]
"""A pass's output (T, D) and one of its rows."""


def upload(
    numbers: Items[int] | Items[float], device: torch.device, dtype: torch.dtype = torch.long
) -> Shaped[Tensor, "_"]:
    """Numbers on the device, which the host does not wait for."""
    there = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)


def rows_of(h: Float[Tensor, "T D"], start: int, end: int) -> list[Row]:
    """These rows of a pass."""
    return [(h, row) for row in range(start, end)]


def gather(rows: Items[Row | None]) -> Float[Tensor, "T D"]:
    """The rows, one of which is there at least; any row where there is None."""
    firsts: dict[int, int] = {}
    sources: list[Tensor] = []
    index, total = [], 0
    for row in rows:
        if row is None:
            index.append(0)
            continue
        source, place = row
        if id(source) not in firsts:
            firsts[id(source)] = total
            sources.append(source)
            total += len(source)
        index.append(firsts[id(source)] + place)
    joined = sources[0] if len(sources) == 1 else torch.cat(sources)
    return joined[upload(index, joined.device)]
