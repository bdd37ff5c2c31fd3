"""CUDA graphs: a pass recorded once for each shape of its inputs, and replayed.

A decoding step is some hundreds of kernels of a few microseconds each; issued one by one from Python they leave the
device waiting. A graph issues them all at once, but it reads and writes the memory it was recorded with: inputs are
copied into buffers of its own, and what it gives is copied out, since hidden states outlive the next replay. Nothing
in a recorded pass may ask the host. Intermediate memory is one pool for all graphs, as only one runs at a time.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.comm.local import Local
from counterflow.kernels.grouped import GROUPED_ALIGNMENT
from counterflow.model.transformer import Transformer

WARM_UP = 2
"""Plain passes before a recording: kernels are compiled and chosen in them."""


class Recorded(NamedTuple):
    """A graph, and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Recorded passes by name and shape. Inputs on a CPU are passed straight on: there is nothing to record."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, Recorded] = {}
        self._pool = None

    @property
    def count(self) -> int:
        """How many are recorded."""
        return len(self._recorded)

    def run(
        self, key: Hashable, act: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`act(*inputs)`, where `key` says which act on which shapes."""
        if not inputs[0].is_cuda:
            return act(*inputs)
        if key not in self._recorded:
            self._recorded[key] = self._record(act, inputs)
        recorded = self._recorded[key]
        for buffer, given in zip(recorded.inputs, inputs, strict=True):
            buffer.copy_(given)
        recorded.graph.replay()
        return tuple(output.clone() for output in recorded.outputs)

    def _record(self, act: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Recorded:
        """Cost: some passes, and memory for inputs, outputs and, beyond what the pool has, the pass."""
        buffers = tuple(given.clone() for given in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                act(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server may use the device meanwhile; only this one is held to the rules of a recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = act(*buffers)
        return Recorded(graph, buffers, outputs)


def hindrance(model: Transformer) -> str:
    """Why this model's passes cannot be recorded; empty where they can."""
    config = model.config
    if not model.head.is_cuda:
        return "the model is on a CPU"
    if not isinstance(model.dispatcher, Local):
        return "ranks tell each other through the host how many rows they send"
    width = min(config.hidden_size, config.moe_intermediate_size) * 2
    if model.head.dtype != torch.bfloat16 or width % GROUPED_ALIGNMENT:
        return "experts' products ask the host for their rows but in bf16 at widths in multiples of 8"
    return ""
