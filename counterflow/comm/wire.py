"""The regions of an arena, and the kernels that fill them from other ranks and read them. What `nvlink` is made of.

On a GPU every method launches and returns. Under Triton's interpreter, where ranks are threads of one process, the host
waits where on a GPU a kernel would, and one kernel runs at a time.
"""

import threading
import time
from enum import IntEnum
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from counterflow.comm.arena import Arena
from counterflow.comm.exchange import Exchange
from counterflow.errors import RankError

PATIENCE_S = 60.0
"""How long a kernel waits for another rank before it complains."""
WARPS = 16
"""Of a program that moves rows: enough loads under way to fill its share of a link."""
TILE = 8
"""Rows that a program moves at once."""
ALIGNED = 1024
"""Bytes; what lies in an arena begins at multiples of it."""
INTERPRETER = threading.Lock()
READY, FREE = 0, 1
PUSHED, ARRIVED, GIVEN = 0, 1, 2


class Region(IntEnum):
    """One for each transfer of a layer, and the flags of the counts."""

    DISPATCH = 0
    COMBINE = 1
    COMBINE_BACKWARD = 2
    DISPATCH_BACKWARD = 3
    COUNTS = 4


class Wire:
    """One rank's part of an arena with room for `rows` rows of `row_bytes` in each region, and of `meta_rows` × `meta`
    words of ids and gates. Made by all ranks at once."""

    def __init__(
        self, exchange: Exchange, rows: int, meta_rows: int, row_bytes: int, meta: int, device: torch.device
    ) -> None:
        from counterflow.kernels import push_triton  # a CPU build of PyTorch comes without Triton

        self.kernels: Any = push_triton
        self.ranks, self.index = exchange.size, exchange.index
        self.rows, self.meta_rows, self.row_bytes, self.meta = rows, meta_rows, row_bytes, meta
        flags, matrix = len(Region) * 2 * self.ranks * 4, 2 * self.ranks**2 * 4
        sizes = [flags, matrix, *[rows * row_bytes] * 4, *[meta_rows * meta * 4] * 4]
        ends = [0, *accumulate(-(-size // ALIGNED) * ALIGNED for size in sizes)]
        self.at_flags, self.at_matrix, self.at_rows, self.at_meta = ends[0], ends[1], ends[2:6], ends[6:10]
        self.arena: Arena = exchange.arena(ends[-1], device)
        self.bases = self.arena.bases()
        self.turns = torch.zeros(len(Region), 3, dtype=torch.int32, device=device)
        self.done = torch.zeros(1, dtype=torch.int32, device=device)
        self.trouble = torch.zeros(3, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.patience = round(PATIENCE_S * 1e9) if device.type == "cuda" else 0

    def lay_out(self, ids: Int[Tensor, "T K"], each: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of each destination (W, T), each token's places (T, W), how many go to each (W)."""
        count = len(ids)
        tokens = torch.empty(self.ranks, count, dtype=torch.int32, device=ids.device)
        slots, sent = tokens.new_empty(count, self.ranks), tokens.new_empty(self.ranks)
        block = min(1024, 1 << max(count - 1, 15).bit_length())
        self._launch(
            self.kernels.lay_out, (self.ranks,), ids, tokens, slots, sent, count,
            K=ids.shape[1], ranks=self.ranks, each=each, block=block,
        )  # fmt: skip
        return tokens, slots, sent

    def share_counts(self, sent: Int[Tensor, "W"]) -> tuple[Int[Tensor, "W W"], Int[Tensor, "W W"]]:
        """Rows from each rank to each, on the device and, once the device has come so far, on the host."""
        matrix = sent.new_empty(self.ranks, self.ranks)
        host = torch.empty(self.ranks, self.ranks, dtype=torch.int32, pin_memory=sent.is_cuda)
        halves = [(True, True)] if sent.is_cuda else [(True, False), (False, True)]
        for tell, take in halves:
            if take:
                self._host_waits(Region.COUNTS, READY, self.turns[Region.COUNTS, PUSHED] + 1)
            self._launch(
                self.kernels.exchange, (1,), sent, self.bases, self.at_matrix, self._flags(Region.COUNTS),
                self.turns[Region.COUNTS, PUSHED:], matrix, host, self.trouble, self.index,
                tell=tell, take=take, ranks=self.ranks, wide=1 << (self.ranks - 1).bit_length(),
                patience=self.patience, num_warps=1,
            )  # fmt: skip
        return matrix, host

    def push(
        self, region: Region, rows: Tensor, tokens: Tensor, matrix: Tensor, programs: int, home: bool,
        ids: Tensor | None = None, gates: Tensor | None = None, each: int = 0, signal: bool = True,
    ) -> None:  # fmt: skip
        """Rows (A or T, …), by kernel: out to the ranks of their experts, or `home`; ids and gates with them."""
        self._host_waits(region, FREE, self.turns[region, PUSHED])
        row_bytes = rows.shape[1] * rows.element_size()
        assert row_bytes <= self.row_bytes and rows.is_contiguous(), "as the arena was made for"
        size = 4 if row_bytes % 16 == 0 else 1
        some = gates.shape[1] if gates is not None else 1
        words = row_bytes // size
        self._launch(
            self.kernels.push, (programs,), _bytes(rows), tokens, tokens if ids is None else ids,
            tokens if gates is None else gates, matrix, self.bases, self.at_rows[region], self.at_meta[region],
            self._flags(region), self.turns[region, PUSHED:], self.done, self.trouble,
            self.index, tokens.shape[1], self.rows, self.meta_rows, row_bytes, some if home else 2 * some, each,
            words=words, block=min(4096, 1 << max(words - 1, 15).bit_length()), tile=TILE, size=size,
            K=some, wide=1 << (some - 1).bit_length(), home=home, meta=gates is not None, signal=signal,
            ranks=self.ranks, patience=self.patience, num_warps=WARPS,
        )  # fmt: skip

    def copy(self, region: Region, parts: list[Tensor], places: list[int], repeats: int = 1) -> None:
        """Rows to each rank's region, from a place on, by the copy engine; an empty part sends nothing."""
        self._host_waits(region, FREE, self.turns[region, PUSHED])
        self._signals(self.kernels.await_room, region, PUSHED, waits=True)
        for rank, (part, place) in enumerate([*zip(parts, places)] * repeats):
            rank %= self.ranks
            if len(part):
                at = self.at_rows[region] + place * part.shape[1] * part.element_size()
                there = self.arena.view(rank, at, len(part), part.shape[1], part.dtype)
                there.copy_(part, non_blocking=True)
        self._signals(self.kernels.tell_rows, region, PUSHED)

    def arrive(self, region: Region) -> None:
        """What follows on the current stream finds the rows of all ranks in the region."""
        self._host_waits(region, READY, self.turns[region, ARRIVED] + 1)
        self._signals(self.kernels.await_rows, region, ARRIVED, waits=True)

    def give_room(self, region: Region) -> None:
        """What follows on the current stream has no more need of the region: others may fill it again."""
        self._signals(self.kernels.give_room, region, GIVEN)

    def rows_of(self, region: Region, width: int, dtype: torch.dtype, rows: int | None = None) -> Tensor:
        """The region's rows as they lie in it."""
        count = self.rows if rows is None else rows
        return self.arena.view(self.index, self.at_rows[region], count, width, dtype)

    def meta_of(self, region: Region, width: int, dtype: torch.dtype, rows: int) -> Tensor:
        """The region's ids and gates as they lie in it."""
        return self.arena.view(self.index, self.at_meta[region], rows, width, dtype)

    def gather_sum(
        self, own: Tensor, box: Tensor, slots: Tensor, matrix: Tensor, into: Tensor | None = None
    ) -> Tensor:
        """into + each token's row of every rank: `own` where it stayed here, else the box's; (T, …)."""
        count, width = len(slots), own.shape[1]
        out = own.new_empty(count, width) if into is None else torch.empty_like(into)
        if count:
            total = self.kernels.tl.float64 if out.dtype == torch.float64 else self.kernels.tl.float32
            block = min(2048, 1 << (width - 1).bit_length())
            self._launch(
                self.kernels.gather_sum, (count, -(-width // block)), out if into is None else into, own, box,
                slots, matrix, out, self.index, width, has_into=into is not None, ranks=self.ranks, block=block,
                total=total,
            )  # fmt: skip
        return out

    def check(self) -> None:
        """Fails: RankError once a kernel has waited in vain."""
        phase, rank, turn = self.trouble.tolist()
        if phase:
            raise RankError(
                f"rank {self.index} of those that share experts waited {PATIENCE_S:.0f} s for the "
                f"{self.kernels.PHASES[phase]} of rank {rank} (turn {turn}); that rank has died, hangs, or does "
                "other work: its own messages say which."
            )

    def _signals(self, kernel: Any, region: Region, role: int, waits: bool = False) -> None:
        trouble = (self.trouble,) if waits else ()
        patience = {"patience": self.patience} if waits else {}
        self._launch(
            kernel, (1,), self.bases, self._flags(region), self.turns[region, role:], *trouble, self.index,
            ranks=self.ranks, num_warps=1, **patience,
        )  # fmt: skip

    def _flags(self, region: Region) -> int:
        return self.at_flags + region * 2 * self.ranks * 4

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **settings: object) -> None:
        if self.bases.is_cuda:
            kernel[grid](*arguments, **settings)
            return
        with INTERPRETER:
            kernel[grid](*arguments, **settings)

    def _host_waits(self, region: Region, kind: int, turn: Tensor) -> None:
        """Where kernels are interpreted: what the next one needs must be there before it starts."""
        if self.bases.is_cuda:
            return
        flags = self.arena.view(self.index, self._flags(region), 2, self.ranks, torch.int32)[kind]
        start = time.monotonic()
        while (flags < turn).any():
            assert time.monotonic() - start < PATIENCE_S, f"{region.name}: no signal"
            time.sleep(1e-4)


def _bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes; one without elements has no bytes to view."""
    return rows.view(torch.uint8) if rows.numel() else rows.new_empty(0, dtype=torch.uint8)
