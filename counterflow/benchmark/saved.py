"""What a benchmark keeps: its numbers as JSON, anew after every part: a run that is cut off leaves what it has."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """The result at `path`, folders and all; None: nobody asked for it."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")
