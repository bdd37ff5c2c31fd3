"""Memory that ranks of one host reach into: an arena of the same size on each, made once and never freed."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.config.backends import backends
from counterflow.errors import RankError


@dataclass(frozen=True)
class Arena:
    """Every rank's part, as bytes in this rank's address space."""

    parts: tuple[Tensor, ...]
    index: int
    handle: object = None
    """What keeps the other ranks' memory mapped."""

    @property
    def own(self) -> Tensor:
        """This rank's."""
        return self.parts[self.index]

    def bases(self) -> Tensor:
        """The address of every part, on the device."""
        return torch.tensor([part.data_ptr() for part in self.parts], device=self.own.device)

    def view(self, rank: int, offset: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Rows of a rank's part, in place; the offset is in bytes."""
        count = rows * width * dtype.itemsize
        return self.parts[rank][offset : offset + count].view(dtype).view(rows, width)


def symmetric_arena(size: int, device: torch.device, group: dist.ProcessGroup | None, index: int) -> Arena:
    """Between processes, each with a GPU, by torch's symmetric memory. A collective of the group.

    Fails: RankError where the GPUs cannot reach each other's memory.
    """
    if group is None:
        return Arena((torch.zeros(size, dtype=torch.uint8, device=device),), index)
    os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")  # an allocation of its own, not one of a pool
    import torch.distributed._symmetric_memory as symmetric

    try:
        memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(memory, group)
    except RuntimeError as error:
        raise RankError(
            f"these ranks cannot reach into each other's memory ({str(error).splitlines()[0]}); their dispatch needs "
            "GPUs of one host that are joined by NVLink: set parallel.dispatch to "
            f"{' or '.join(backends(lambda row: not row.one_host))}."
        ) from error
    parts = tuple(handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size()))
    memory.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)
    return Arena(parts, index, (memory, handle))
