"""`counterflow where "eq 16"`: the definition that is an item of the paper, and its tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from counterflow.config.paper import find, items
from counterflow.errors import ConfigError, nearest


@dataclass(frozen=True)
class Where:
    """Find an item of the DeepSeek-V3 report in the code."""

    item: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Such as "eq 16", "fig 2" or "§4.2"."""


def run(arguments: Sequence[str]) -> int:
    """Print file, line and first sentence of the item's home, then the tests named after it."""
    query = " ".join(tyro.cli(Where, prog="counterflow where", args=arguments).item)
    found = find(query)
    if not found:
        known = {home.item for home in items()}
        if not query:
            raise ConfigError(
                'name an item of the report, such as "eq 16", "fig 2" or "§4.2", or words of it.'
            )
        raise ConfigError(f"no item of the report in the code is called '{query}'; {nearest(query, known)}")
    for home, tests in found:
        print(f"{home.file}:{home.line}  {home.item}  {home.sentence}")
        for test in tests:
            print(f"    {test}")
    return 0
