"""Enforces the package's annotations, shapes included, while tests run: beartype, with ints for floats."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
