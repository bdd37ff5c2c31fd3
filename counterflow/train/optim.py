"""Master weights, gradients and Adam's moments, each one flat fp32 tensor with a named interval per parameter.

One flat tensor makes the norm one pass, the update one fused call, the checkpoint a list of intervals, and any later
sharding over ranks (ZeRO-1) a cut of it. With fp32 training the model's parameters *are* the masters; with bf16 they
are a second flat tensor, rounded from the masters after every step. Matrices decay, gains do not (the report is
silent; this is the usual choice), so the flat tensor has the decaying intervals first.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.config.run import Train
from counterflow.model.transformer import Transformer

ALIGNMENT = 16
"""Elements an interval starts at a multiple of: 64 bytes, so that kernels see the same alignment in every run."""
NORM_ROW = 1024
"""Elements whose squares are summed at once: one fp32 sum over ten million is off by 4e-4, sums of sums by 1e-7."""


class Interval(NamedTuple):
    """Where one parameter lies in the flat tensors."""

    name: str
    start: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's view of a flat tensor."""
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


class Optimizer:
    """AdamW with clipping over a model's parameters, which it re-homes into flat tensors. [§4.2 AdamW]"""

    def __init__(self, model: Transformer, train: Train, device: torch.device) -> None:
        self.clip_norm = train.clip_norm
        named = sorted(model.named_parameters(), key=lambda item: item[1].dim() == 1)
        self.intervals, decayed, total = _lay_out(named)
        self.master = torch.zeros(total, device=device)
        self.grad = torch.zeros(total, device=device)
        self.weights = self.master
        if train.precision == "bf16":
            self.weights = torch.zeros(total, dtype=torch.bfloat16, device=device)
        self._gains: list[tuple[torch.nn.Parameter, Tensor]] = []
        for interval, (_, parameter) in zip(self.intervals, named):
            interval.of(self.master).copy_(parameter.data)
            parameter.data = interval.of(self.weights)
            main_grad = interval.of(self.grad)
            parameter.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]
            if parameter.dim() == 1:
                self._gains.append((parameter, main_grad))
        self.round_weights()
        self._adam = self._build(train, decayed)

    def _build(self, train: Train, decayed: int) -> torch.optim.AdamW:
        groups = []
        for piece, decay in ((slice(0, decayed), train.weight_decay), (slice(decayed, None), 0.0)):
            flat = torch.nn.Parameter(self.master[piece])
            flat.grad = self.grad[piece]
            groups.append({"params": [flat], "weight_decay": decay})
        betas = (train.beta1, train.beta2)
        adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train.adam_eps, fused=True)
        for group in adam.param_groups:
            for flat in group["params"]:  # there before the first step, so that a checkpoint can fill it
                adam.state[flat] = {
                    "step": torch.zeros((), device=flat.device),
                    "exp_avg": torch.zeros_like(flat),
                    "exp_avg_sq": torch.zeros_like(flat),
                }
        return adam

    def drain(self) -> None:
        """Add the gains' gradients, which autograd leaves in `.grad`, to their fp32 accumulators."""
        for parameter, main_grad in self._gains:
            if parameter.grad is not None:
                main_grad.add_(parameter.grad)
                parameter.grad = None

    def norm(self) -> Tensor:
        """The gradient's global norm; a 0-dim tensor."""
        return torch.linalg.vector_norm(torch.linalg.vector_norm(self.grad.view(-1, NORM_ROW), dim=1))

    def clip(self, norm: Tensor) -> None:
        """Scale the gradient, whose norm is given, to at most `clip_norm`."""
        self.grad.mul_((self.clip_norm / (norm + 1e-6)).clamp(max=1.0))

    def step(self, learning_rate: float) -> None:
        """One update of the masters and the weights; gradients are zero afterwards."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self.round_weights()
        self.grad.zero_()

    def round_weights(self) -> None:
        """The model's weights from the masters, if they are not the same tensor."""
        if self.weights is not self.master:
            self.weights.copy_(self.master)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's fp32 view, by name."""
        for interval in self.intervals:
            yield interval.name, interval.of(self.master)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's accumulated fp32 gradient, by name."""
        for interval in self.intervals:
            yield interval.name, interval.of(self.grad)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by canonical name: views of masters and moments, and the step counts."""
        kept = {f"master.{name}": view for name, view in self.masters()}
        states = [self._adam.state[group["params"][0]] for group in self._adam.param_groups]
        for moment in ("exp_avg", "exp_avg_sq"):
            boundary = states[0][moment].numel()
            for interval in self.intervals:
                first = interval.start < boundary
                flat = states[0 if first else 1][moment]
                shifted = interval if first else interval._replace(start=interval.start - boundary)
                kept[f"{moment}.{interval.name}"] = shifted.of(flat)
        return kept | {f"adam_step.{index}": state["step"] for index, state in enumerate(states)}


def _lay_out(named: list[tuple[str, torch.nn.Parameter]]) -> tuple[list[Interval], int, int]:
    """Intervals in the given order, the end of the decayed ones, and the whole length, padding included."""
    intervals, start, decayed = [], 0, 0
    for name, parameter in named:
        intervals.append(Interval(name, start, parameter.shape))
        start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        decayed = start if parameter.dim() > 1 else decayed
    return intervals, decayed, -(-start // NORM_ROW) * NORM_ROW
