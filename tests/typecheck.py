"""Enforces annotations, shapes included, while tests run: beartype, with ints for floats.

`pyproject.toml` lists the floors; those without tensors' shapes in a signature are left to pyright: the planner alone
simulates hundreds of thousands of ops. In each test the first calls of every function are checked: a check costs more
than many a function that it is of, and took three quarters of a pipeline's step.
"""

import sys
from collections import Counter
from functools import wraps
from operator import attrgetter
from typing import Any

from beartype import BeartypeConf, beartype

CALLS = 4
"""Of a function in a test that are checked."""
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_counts: Counter[tuple[str, str]] = Counter()
_unchecked: list[Any] = []


def check(what: Any) -> Any:
    """The function or class with its annotations enforced."""
    if isinstance(what, type):
        return _check(what)
    checked, name = _check(what), (what.__module__, what.__qualname__)

    @wraps(what)
    def counted(*given: Any, **named: Any) -> Any:
        _counts[name] += 1
        if _counts[name] > 2 * CALLS:  # arguments are checked, then arguments and result
            _leave(*name)
        return checked(*given, **named)

    return counted


def check_again() -> None:
    """A test begins: every function is checked again."""
    _counts.clear()
    while _unchecked:
        del _unchecked.pop().__no_type_check__


def _leave(module: str, name: str) -> None:
    """Check a function no more, unless it is inside another: jaxtyping asks before every call whether it may."""
    if "<locals>" in name:
        return
    found = attrgetter(name)(sys.modules[module])
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    while found is not None:
        if "__no_type_check__" not in vars(found):
            found.__no_type_check__ = True
            _unchecked.append(found)
        found = getattr(found, "__wrapped__", None)
