"""Several acts timed in turn on all ranks, the slowest rank's time of every round: what all timings of transfers share.

Before each act the caches of the device are flushed and a barrier lets all ranks begin at once, on the device: a sleep
there first lets the host get ahead, so that its launches are not taken for the act's time unless it waits for the
device within.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from counterflow.comm.clock import between, mark
from counterflow.comm.mesh import Mesh

FLUSHED = 2**27
"""Bytes written between acts; twice the second-level cache of an H100."""
LEAD = 600_000
"""Cycles that the device sleeps before an act: some 300 µs."""


class Rounds:
    """Acts in turn, each after a flush and a barrier."""

    def __init__(self, mesh: Mesh, flush: bool = True) -> None:
        self.mesh, self._cuda = mesh, mesh.device.type == "cuda"
        self._one = torch.zeros(1, device=mesh.device)
        self._waste = (
            torch.empty(FLUSHED, dtype=torch.uint8, device=mesh.device) if flush and self._cuda else None
        )

    def time(
        self,
        acts: Mapping[str, Callable[[], object]],
        warmups: int,
        rounds: int,
        limit_s: float = math.inf,
        watch: Callable[[int, int], object] = lambda done, rounds: None,
    ) -> dict[str, list[float]]:
        """Seconds of the slowest rank by act, one a round; acts alternate. A collective.

        An act that gives two marks is timed between them. On a CPU fewer rounds are made where all would take more than
        `limit_s`, by the second's time; `watch` is told of each how many were made, and of how many.
        """
        marks, number, planned = {name: [] for name in acts}, 0, warmups + rounds
        begun = time.perf_counter()
        while number < planned:
            for name, act in acts.items():
                self._prepare()
                start = mark(self.mesh.device)
                found = act()
                edges = found if isinstance(found, tuple) else (start, mark(self.mesh.device))
                if number >= warmups:
                    marks[name].append(edges)
            number += 1
            if number == 2 and not self._cuda:
                each = max(self.mesh.everyone(time.perf_counter() - begun))
                planned = int(min(planned, limit_s / each))
                warmups = min(warmups, max(2, planned // 4))
                planned = max(planned, warmups + 1)
            begun = time.perf_counter()
            watch(number, planned)
        seconds = torch.tensor(
            [[between(*pair) for pair in pairs] for pairs in marks.values()], dtype=torch.float64
        ).to(self.mesh.device)
        if self.mesh.size > 1 and seconds.numel():
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return dict(zip(acts, seconds.tolist()))

    def _prepare(self) -> None:
        if self._waste is not None:
            self._waste.zero_()
        if not self._cuda:
            self.mesh.barrier()
            return
        torch.cuda._sleep(LEAD)
        if self.mesh.size > 1:
            dist.all_reduce(self._one)


def alone(act: Callable[[], object], repeats: int, before: Callable[[], object] | None = None) -> list[float]:
    """Seconds of single calls by this GPU's events, `before` each outside of them; three more go first, uncounted."""
    device, times = torch.device("cuda"), []
    for _ in range(repeats + 3):
        if before:
            before()
        start = mark(device)
        act()
        times.append(between(start, mark(device)))
    return times[3:]


def middle(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
