"""Who is where: ranks as pipeline × data, and the groups that sum what is held more than once.

Expert parallelism lies inside the data axis: neighbouring data ranks of one pipeline row share the experts of its
layers, each holding every one of `expert` equal parts once. It never crosses rows, so never a mirrored replica.

A rank's data index runs fastest, so that the ranks which will exchange tokens between experts are neighbours on a
host. Nothing here is global: a mesh is made from a rank and two sizes, and only a mesh of several ranks asks
torch.distributed for anything.
"""

import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.partition import CHANNEL, capped, expert_share
from counterflow.config.run import DEVICES
from counterflow.errors import ConfigError, CounterflowError, nearest

Value = TypeVar("Value")
NO_LIMIT = timedelta(days=365)
"""Tokenising a corpus and reading a checkpoint back may take hours, and are not hung."""


def device_for(device: str, processes: int) -> str:
    """cpu or cuda: `auto` is cuda where each of a machine's processes finds a GPU of its own.

    Fails: ConfigError on another word, and on cuda where there is none.
    """
    if device not in DEVICES:
        raise ConfigError(f"device is '{device}'; {nearest(device, DEVICES)}")
    if device == "auto":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' and PyTorch sees no GPU; set it to cpu, or check the driver.")
    return device


def objects_group() -> dist.ProcessGroup | None:
    """A group of all ranks for what one prepares while the others wait: no clock ends that, a rank's end does.

    A collective.
    """
    group = dist.new_group(backend="gloo", timeout=NO_LIMIT)
    return group if isinstance(group, dist.ProcessGroup) else None


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision_for(precision: str, device: str) -> str:
    """fp32 or bf16: `auto` is what the device multiplies fast, bf16 on GPUs and on processors with AVX-512 BF16 or AMX.

    Fails: ConfigError on another word.
    """
    if precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)
        native = (
            torch.cuda.is_bf16_supported(False)
            if device != "cpu"
            else any(cpu().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
        )
        return "bf16" if native else "fp32"
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is '{precision}'; {nearest(precision, ['auto', *PRECISIONS])}")
    return precision


@dataclass(frozen=True)
class Group:
    """Ranks that hold the same thing; `None` as handle where there is one, and nothing travels."""

    ranks: tuple[int, ...]
    index: int
    """This rank's place among them."""
    handle: dist.ProcessGroup | None = None

    def sum(self, value: Tensor) -> None:
        """Sum over the group, in place."""
        if self.handle is not None:
            dist.all_reduce(value, group=self.handle)

    def gather_shards(self, flat: Tensor) -> None:
        """Fill a flat tensor whose i-th of n equal parts the group's i-th rank has, in place."""
        if self.handle is None:
            return
        shards = list(flat.chunk(len(self.ranks)))
        if flat.is_cuda:
            dist.all_gather(shards, shards[self.index].clone(), group=self.handle)
            return
        for owner, shard in zip(
            self.ranks, shards
        ):  # gloo gathers by copying twice; a broadcast writes in place
            dist.broadcast(shard, owner, group=self.handle)


@dataclass(frozen=True)
class Mesh:
    """Pipeline × data ranks; rank = pipeline index × data + data index."""

    pipeline: int = 1
    data: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    expert: int = 1
    """Data ranks that share a layer's experts; divides `data`."""
    multiprocessors: int = 0
    """Of each GPU, for all communication during a pass; 0: no bound."""
    objects: dist.ProcessGroup | None = None
    """What carries Python objects between the ranks, without a limit of time; None: the default group."""

    @property
    def size(self) -> int:
        """All ranks."""
        return self.pipeline * self.data

    @property
    def pipeline_rank(self) -> int:
        """This rank's row of the schedule."""
        return self.rank // self.data

    @property
    def data_rank(self) -> int:
        """This rank's slice of the batch."""
        return self.rank % self.data

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.data_rank % self.expert

    @property
    def expert_multiprocessors(self) -> int:
        """What of the bound is for tokens on their way to experts; 0: no bound."""
        return expert_share(self.multiprocessors, self.pipeline > 1)

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def apart(self) -> "Mesh":
        """This mesh with a group of its own for objects, for a thread beside the one that trains. A collective."""
        return replace(self, objects=objects_group() if self.size > 1 else None)

    def bring(self, samples: Tensor) -> Tensor:
        """Samples of the host's on this rank's device; a GPU is not waited for, as a plain copy would."""
        if self.device.type != "cuda":
            return samples.to(self.device)
        return samples.pin_memory().to(self.device, non_blocking=True)

    def global_rank(self, pipeline_rank: int) -> int:
        """The rank of another row with this rank's data."""
        return pipeline_rank * self.data + self.data_rank

    def group(self, pipeline_ranks: Iterable[int], expert: int | None = None) -> Group:
        """The ranks of these rows with any data index, or of those that hold this part of the experts.

        A collective: every rank asks for the same groups in order.
        """
        indices = [index for index in range(self.data) if expert is None or index % self.expert == expert]
        return self._group([row * self.data + index for row in sorted(pipeline_ranks) for index in indices])

    def expert_group(self, members: Callable[[int], list[int]]) -> Group:
        """This rank's group among those who share its experts; `members` of a part gives the parts of its group.

        A collective: all such groups of all rows are made in the same order.
        """
        own = None
        for block in range(self.size // self.expert):
            made: set[tuple[int, ...]] = set()
            for index in range(self.expert):
                ranks = tuple(block * self.expert + other for other in members(index))
                if ranks in made:
                    continue
                made.add(ranks)
                group = self._group(ranks, self.expert_multiprocessors)
                own = group if group.index >= 0 else own
        assert own is not None, "every rank is in one of the groups"
        return own

    def channel_group(self, sender: int, receiver: int) -> Group:
        """Two rows' ranks with one data index, for a pipeline channel. A collective like `group`."""
        own = None
        for index in range(self.data):
            group = self._group(
                [row * self.data + index for row in (sender, receiver)], self.multiprocessors and CHANNEL
            )
            own = group if own is None or group.index >= 0 else own
        assert own is not None, "there is a data rank"
        return own

    def _group(self, members: Iterable[int], multiprocessors: int = 0) -> Group:
        """A group whose NCCL kernels take at most so many multiprocessors; 0: no bound."""
        ranks = tuple(members)
        place = ranks.index(self.rank) if self.rank in ranks else -1
        if len(ranks) == 1:
            return Group(ranks, place)
        handle = dist.new_group(list(ranks), pg_options=capped(multiprocessors, self.device))
        return Group(ranks, place, handle if isinstance(handle, dist.ProcessGroup) and place >= 0 else None)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def first_does(self, act: Callable[[], Value]) -> Value:
        """What `act` gives on the first rank, on every rank; if it fails there, every rank fails alike."""
        if self.size == 1:
            return act()
        outcome: list[object] = [None, None]
        if self.first:
            try:
                outcome = [act(), None]
            except CounterflowError as error:
                outcome = [None, error]
            pickle.dumps(outcome)
        dist.broadcast_object_list(outcome, src=0, group=self.objects)
        if isinstance(outcome[1], CounterflowError):
            outcome[1].shared = True
            raise outcome[1]
        return outcome[0]  # pyright: ignore[reportReturnType]

    def all_do(self, act: Callable[[], Value]) -> Value:
        """What `act` gives here; if it fails on any rank, every rank fails with the lowest rank's error."""
        if self.size == 1:
            return act()
        value, error = None, None
        try:
            value = act()
        except CounterflowError as found:
            error = found
        for found in self.everyone(error):
            if found is not None:
                found.shared = True
                raise found
        return value  # pyright: ignore[reportReturnType]

    def everyone(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank; they are pickled."""
        if self.size == 1:
            return [value]
        every = [value] * self.size
        dist.all_gather_object(every, value, group=self.objects)
        return every

    def union(self, names: Iterable[str]) -> set[str]:
        """The names of all ranks."""
        return set().union(*self.everyone(set(names)))
