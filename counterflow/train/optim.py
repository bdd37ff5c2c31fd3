"""Master weights, gradients and Adam's moments in flat tensors, each element with exactly one owner. [§3.2.1 ZeRO-1]

Parameters that the same ranks hold make a bucket: one flat gradient, one flat weight tensor, and of masters and moments
the shard that this rank owns. A step sums the gradients over the holders, updates the shard and gathers the weights.
One process is a bucket with one holder, and nothing of that travels. One flat tensor makes the norm one pass, the
update one fused call and the checkpoint a list of intervals. With fp32 training the weights *are* the masters; with
bf16 they are rounded from them after every step. Matrices decay, gains do not (the report is silent; this is the usual
choice), so a flat tensor has the decaying intervals first.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.comm.mesh import Group, Mesh
from counterflow.config.run import Train
from counterflow.model.experts import Shard
from counterflow.train.piece import Piece

ALIGNMENT = 16
"""Elements an interval starts at a multiple of: 64 bytes, so that kernels see the same alignment in every run."""
NORM_ROW = 1024
"""Elements whose squares are summed at once: one fp32 sum over ten million is off by 4e-4, sums of sums by 1e-7."""
ALONE = Group((0,), 0)

Named = Sequence[tuple[str, torch.nn.Parameter]]
Shards = Mapping[str, Shard]


class Interval(NamedTuple):
    """Where one parameter lies in the flat tensors."""

    name: str
    start: int
    shape: torch.Size
    shard: Shard
    """Where its elements lie in the weight of that name, of which other ranks may hold the rest."""

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's view of a flat tensor."""
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)

    def within(self, shard: Tensor, start: int) -> Piece:
        """The part of the parameter that lies in a shard which begins at `start`; may be empty."""
        total = self.shape.numel()
        first = min(max(self.start, start), self.start + total)
        last = max(min(self.start + total, start + len(shard)), first)
        value = shard[first - start : last - start] if last > first else shard[:0]
        return Piece(value, self.shard.offset + first - self.start, self.shard.total)


class Bucket:
    """Parameters with the same holders, re-homed into flat tensors."""

    def __init__(
        self, named: Named, group: Group, train: Train, device: torch.device, shards: Shards
    ) -> None:
        self.group = group
        named = sorted(named, key=lambda item: item[1].dim() == 1)
        parts = len(group.ranks)
        self.intervals, decayed, total = _lay_out(named, shards, NORM_ROW * parts)
        size = total // parts
        self.start = size * group.index
        own = slice(self.start, self.start + size)
        self.grad = torch.zeros(total, device=device)
        low = train.precision == "bf16"
        self.weights = torch.zeros(total, dtype=torch.bfloat16 if low else torch.float32, device=device)
        for interval, (_, parameter) in zip(self.intervals, named):
            interval.of(self.weights).copy_(parameter.data)
        self.master = self.weights[own]
        if low:
            self.master = torch.zeros(size, device=device)
            for interval, (_, parameter) in zip(self.intervals, named):
                piece = interval.within(self.master, self.start)
                first = piece.offset - interval.shard.offset
                piece.value.copy_(parameter.data.flatten()[first : first + len(piece.value)])
        self.own_grad = self.grad[own]
        for interval, (_, parameter) in zip(self.intervals, named):
            parameter.data = interval.of(self.weights)
            parameter.main_grad = interval.of(self.grad)  # pyright: ignore[reportAttributeAccessIssue]
        self.moments = (torch.zeros_like(self.master), torch.zeros_like(self.master))
        self.adam, self.count = self._build(train, min(max(decayed - self.start, 0), size))

    def _build(self, train: Train, decayed: int) -> tuple[torch.optim.AdamW, Tensor]:
        """Adam over the shard, in two pieces by decay, and the count of its steps."""
        groups, states = [], []
        for piece, decay in ((slice(0, decayed), train.weight_decay), (slice(decayed, None), 0.0)):
            flat = torch.nn.Parameter(self.master[piece])
            flat.grad = self.own_grad[piece]
            groups.append({"params": [flat], "weight_decay": decay})
            states.append((flat, piece))
        betas = (train.beta1, train.beta2)
        adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train.adam_eps, fused=True)
        for flat, piece in states:  # there before the first step, so that a checkpoint can fill it
            first, second = (moment[piece] for moment in self.moments)
            step = torch.zeros((), device=flat.device)
            adam.state[flat] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return adam, adam.state[states[0][0]]["step"]

    def step(self, learning_rate: float) -> None:
        """Update the shard and gather the weights; gradients are zero afterwards."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        self.round_weights()
        self.grad.zero_()

    def round_weights(self) -> None:
        """The weights of all holders from the masters."""
        own = self.weights[self.start : self.start + len(self.master)]
        if own.data_ptr() != self.master.data_ptr():
            own.copy_(self.master)
        self.group.gather_shards(self.weights)

    def set_count(self, value: Tensor) -> None:
        """Take up the number of steps done."""
        for state in self.adam.state.values():
            state["step"].copy_(value)


class Optimizer:
    """AdamW with clipping over a model's parameters. [§4.2 AdamW]"""

    def __init__(
        self,
        named: Named,
        train: Train,
        device: torch.device,
        mesh: Mesh | None = None,
        groups: Sequence[tuple[Group, frozenset[str]]] = (),
        shards: Shards = MappingProxyType({}),
    ) -> None:
        """`groups` says which names the same ranks hold; without any, this process holds all. `shards` names the
        parameters that are a part of a larger weight."""
        self.clip_norm, self.mesh = train.clip_norm, mesh or Mesh()
        groups = groups or [(ALONE, frozenset(name for name, _ in named))]
        chosen = [(group, [item for item in named if item[0] in names]) for group, names in groups]
        self.buckets = [Bucket(some, group, train, device, shards) for group, some in chosen if some]
        self._gains = [parameter for _, parameter in named if parameter.dim() == 1]
        self.round_weights()

    def drain(self) -> None:
        """Add the gains' gradients, which autograd leaves in `.grad`, to their fp32 accumulators."""
        for parameter in self._gains:
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)  # pyright: ignore[reportAttributeAccessIssue]
                parameter.grad = None

    def reduce(self) -> None:
        """Sum the gradients over their holders."""
        for bucket in self.buckets:
            bucket.group.sum(bucket.grad)

    def norm(self) -> Tensor:
        """The gradient's global norm, each element counted once; a 0-dim tensor, the same on every rank."""
        norms = [
            torch.linalg.vector_norm(bucket.own_grad.view(-1, NORM_ROW), dim=1) for bucket in self.buckets
        ]
        norm = torch.linalg.vector_norm(torch.cat(norms))
        return norm if self.mesh.size == 1 else self.mesh.sum(norm.square()).sqrt()

    def clip(self, norm: Tensor) -> None:
        """Scale the gradient, whose norm is given, to at most `clip_norm`."""
        factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for bucket in self.buckets:
            bucket.own_grad.mul_(factor)

    def step(self, learning_rate: float) -> None:
        """One update of the masters and the weights; gradients are zero afterwards."""
        for bucket in self.buckets:
            bucket.step(learning_rate)

    def round_weights(self) -> None:
        """The model's weights from the masters."""
        for bucket in self.buckets:
            bucket.round_weights()

    def masters(self) -> Iterator[tuple[str, Piece]]:
        """The owned part of every parameter in fp32, by name; parameters of which none is owned are left out."""
        yield from self._pieces("master")

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The accumulated fp32 gradient of every parameter held, by name."""
        for bucket in self.buckets:
            yield from ((interval.name, interval.of(bucket.grad)) for interval in bucket.intervals)

    def _pieces(self, what: str) -> Iterator[tuple[str, Piece]]:
        for bucket in self.buckets:
            flat = {"master": bucket.master, "exp_avg": bucket.moments[0], "exp_avg_sq": bucket.moments[1]}[
                what
            ]
            for interval in bucket.intervals:
                piece = interval.within(flat, bucket.start)
                if len(piece.value) or not piece.total:
                    yield interval.name, piece

    def pieces(self) -> dict[str, Piece]:
        """What a checkpoint keeps, by canonical name: owned parts of masters and moments, and the count of steps."""
        kept = {
            f"{what}.{name}": piece
            for what in ("master", "exp_avg", "exp_avg_sq")
            for name, piece in self._pieces(what)
        }
        return kept | {"adam_step": Piece.whole(self.buckets[0].count)}

    def forget(self) -> None:
        """Moments and count of steps as before the first one."""
        for bucket in self.buckets:
            for moment in bucket.moments:
                moment.zero_()
            bucket.set_count(torch.zeros(()))

    def loaded(self) -> None:
        """Take up what was read into `pieces()`."""
        for bucket in self.buckets:
            bucket.set_count(self.buckets[0].count.clone())
        self.round_weights()


def _lay_out(named: Named, shards: Shards, multiple: int) -> tuple[list[Interval], int, int]:
    """Intervals in the given order, the end of the decayed ones, and the whole length, padding included."""
    intervals, start, decayed = [], 0, 0
    for name, parameter in named:
        shard = shards.get(name, Shard(0, parameter.numel()))
        intervals.append(Interval(name, start, parameter.shape, shard))
        start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        decayed = start if parameter.dim() > 1 else decayed
    return intervals, decayed, -(-start // multiple) * multiple
