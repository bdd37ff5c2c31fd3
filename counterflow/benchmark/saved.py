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


def note(path: Path, row: Mapping[str, Any]) -> None:
    """One more row at the end of `path`, a line of JSON: what a process has found, for another that watches."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def noted(path: Path) -> list[dict[str, Any]]:
    """The rows so far; a line that is still being written does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
