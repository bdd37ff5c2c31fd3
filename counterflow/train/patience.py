"""When a run stops early: after so many held-out losses in a row that are no better than the best one.

Its two numbers are saved with every checkpoint, so that a resumed run counts on, and a run that has run out of patience
is complete however often it is started; with more patience it goes on. Every rank hears the same losses.
"""

from collections.abc import Mapping
from typing import Any


class Patience:
    """Counts measurements without improvement; `most` of them end the run, 0 never does."""

    def __init__(self, most: int, state: Mapping[str, Any]) -> None:
        """`state` is a checkpoint's, empty at a start."""
        self.most, self.best, self.waited = most, state.get("best"), state.get("waited", 0)

    def is_over_after(self, loss: float) -> bool:
        """Whether the run ends with this measurement."""
        better = self.best is None or loss < self.best
        self.best, self.waited = (loss, 0) if better else (self.best, self.waited + 1)
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return 0 < self.most <= self.waited

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited}
