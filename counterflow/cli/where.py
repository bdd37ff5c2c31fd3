"""`counterflow where "eq 16"`: the definition that is an item of the paper, and its tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Where:
    """Find an item of the paper in the code."""

    item: Annotated[str, tyro.conf.Positional]
    """Such as "eq 16", "fig 2" or "§4.2"."""
