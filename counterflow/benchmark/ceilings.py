"""What a link gives to those who only copy: the same bytes to the same ranks as dispatch, nothing looked up.

Every ceiling moves contiguous rows, already in order, from each rank to each other one; what stays home does not move.
On one rank there is no wire, and a copy within its memory stands for it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from counterflow.benchmark.processes import share_a_gpu
from counterflow.comm.exchange import GroupExchange
from counterflow.comm.mesh import Mesh
from counterflow.comm.peers import process_peers
from counterflow.comm.wire import ALIGNED

Act = Callable[[], object]


class Ceilings:
    """Buffers for at most `rows` rows of `width` bytes from and to every rank, made once. A collective."""

    def __init__(self, mesh: Mesh, rows: int, width: int, budgets: Sequence[int]) -> None:
        self.mesh, self.width, self.budgets = mesh, width, tuple(budgets)
        self.cuda = mesh.device.type == "cuda"
        others = max(mesh.size - 1, 1)
        self.source = torch.ones(others * rows, width, dtype=torch.uint8, device=mesh.device)
        self.target = torch.empty_like(self.source)
        caps = (0, *budgets) if self.cuda else (0,)
        self.exchanges = {cap: _exchange(mesh, cap) for cap in caps} if mesh.size > 1 else {}
        self.arena = None
        if self.cuda and mesh.size > 1:
            size = -(-self.source.numel() // ALIGNED) * ALIGNED
            self.arena = self.exchanges[0].arena(size, mesh.device)

    def acts(self, matrix: Sequence[Sequence[int]]) -> dict[str, Act]:
        """By name; `matrix` has the rows from each rank to each, 0 to itself."""
        if self.mesh.size == 1:
            rows = matrix[0][0]
            return {"copy within memory": lambda: self.target[:rows].copy_(self.source[:rows])}
        found: dict[str, Act] = {}
        me = self.mesh.rank
        sent, received = list(matrix[me]), [row[me] for row in matrix]
        source = self.source[: sum(sent)]
        for cap, exchange in () if share_a_gpu(self.mesh) else self.exchanges.items():
            name = "NCCL" if self.cuda else "gloo"
            name += f", {cap} CTAs" if cap else ""
            found[name] = lambda exchange=exchange: exchange.rows(source, sent, received).wait()
        if self.arena is not None:
            found |= self._pushes(self._pairs(matrix))
        return found

    def _pushes(self, pairs: list[tuple[Tensor, Tensor]]) -> Mapping[str, Act]:
        from counterflow.kernels import copy_triton  # a CPU build of PyTorch comes without Triton

        def copies() -> None:
            for source, target in pairs:
                target.copy_(source, non_blocking=True)

        pushes: dict[str, Act] = {
            f"push, {programs} programs": lambda programs=programs: copy_triton.push(pairs, programs)
            for programs in self.budgets
        }
        return {**pushes, "copy engine": copies}

    def _pairs(self, matrix: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """This rank's rows and where each other rank has room for them, its neighbour's first."""
        assert self.arena is not None, "GPUs have one"
        me, size, pairs = self.mesh.rank, self.mesh.size, []
        for ahead in range(1, size):
            to = (me + ahead) % size
            first, place = sum(matrix[me][:to]), sum(matrix[rank][to] for rank in range(me))
            rows = self.source[first : first + matrix[me][to]]
            there = self.arena.view(to, place * self.width, len(rows), self.width, torch.uint8)
            pairs.append((rows, there))
        return pairs


def _exchange(mesh: Mesh, cap: int) -> GroupExchange:
    exchange = process_peers(Mesh(1, mesh.size, mesh.rank, mesh.device, mesh.size, cap)).whole
    assert isinstance(exchange, GroupExchange), "between processes"
    return exchange
