"""Enforces annotations, shapes included, while tests run: beartype, with ints for floats.

`pyproject.toml` lists the floors; those without tensors' shapes in a signature are left to pyright: the planner alone
simulates hundreds of thousands of ops.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
