"""One compute part on one micro-batch with an autograd graph of its own.

It is entered at detached leaves and keeps the graph's edges, not its output tensors, so that the output is freed as
soon as the next part has read it, and so that forward and backward of different micro-batches can be issued part by
part from one thread. Not taken: one graph a stage with hooks between its parts, whose order autograd would choose.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Segment:
    """The graph between named leaves and named outputs."""

    def __init__(self, leaves: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self._leaves = dict(leaves)
        self._edges: dict[str, GradientEdge] = {
            name: get_gradient_edge(value) for name, value in outputs.items() if value.requires_grad
        }

    def backward(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leaves' gradients from those of the outputs; outputs without one take no part."""
        given = {name: grads[name] for name in self._edges if name in grads}
        if given:
            torch.autograd.backward([self._edges[name] for name in given], list(given.values()))
        found = {name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}
        self._leaves, self._edges = {}, {}
        return found


def leaf(value: Tensor) -> Tensor:
    """The same numbers, cut from the graph they came from and the start of another."""
    return value.detach().requires_grad_(torch.is_grad_enabled())
