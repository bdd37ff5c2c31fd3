"""Enforces the package's annotations, shapes included, while tests run: beartype, with ints for floats.

Schedules and the planner are left to pyright: they know no tensors, and simulate hundreds of thousands of ops.
"""

from typing import Any

from beartype import BeartypeConf, beartype

WITHOUT_TENSORS = ("counterflow.schedule", "counterflow.plan")
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(what: Any) -> Any:
    """The function or class with its annotations enforced, where it may meet a tensor."""
    return what if what.__module__.startswith(WITHOUT_TENSORS) else _check(what)
