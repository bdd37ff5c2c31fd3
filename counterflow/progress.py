"""A bar on the terminal for work that takes longer than a breath; nothing where nobody watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def watched(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on stderr that says how many are done and how long the rest takes."""
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    return iter(track(items, what, total, console=console, transient=True, disable=not console.is_terminal))
