"""What is said of routing that has collapsed: one line an event, with all its layers.

A layer has collapsed when more than half of its experts got no token in a step. It is said when it comes, when it has
doubled, and when it is over; never during the warm-up, when it is common and passes.
"""

from collections.abc import Mapping, Sequence

NAMED = 3
"""Layers that a line names."""


class Collapses:
    """What a run has said so far."""

    def __init__(self) -> None:
        self._said = 0
        """Layers when it was last said; 0: none is known to have collapsed."""

    def line(self, step: int, load: Mapping[str, Sequence[int]], warming: bool) -> str:
        """What to say after a step of this load by layer and expert; empty: nothing."""
        dead = {layer: sum(not count for count in counts) for layer, counts in load.items()}
        if self._said and all(4 * dead[layer] <= len(load[layer]) for layer in load):
            self._said = 0
            return f"step {step}: routing has recovered: at least three quarters of all layers' experts get tokens"
        layers = [layer for layer in load if 2 * dead[layer] > len(load[layer])]
        if warming or len(layers) < max(1, 2 * self._said):
            return ""
        self._said = len(layers)
        worst = max(layers, key=lambda layer: dead[layer])
        more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
        return (
            f"step {step}: routing has collapsed in {', '.join(layers[:NAMED])}{more}: {dead[worst]} of "
            f"{len(load[worst])} experts got no token in {worst}; raise train.bias_speed or lower train.lr.peak if it "
            "stays so"
        )
