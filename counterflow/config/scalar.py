"""One value from outside (TOML, an override, a released config.json) held against the type a setting has.

Both ways in ask here, so that a wrong type is refused alike. A whole number is a number, and 4.0 a whole number;
truth is neither. NaN passes every comparison a check could make by failing it, so it is refused before any.
"""

from typing import Any

from counterflow.errors import ConfigError

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def scalar(value: Any, kind: type, key: str, change: str = "") -> Any:
    """`value` as `kind`. Fails (ConfigError) naming key, value and kind, then what to `change`."""
    if kind is float and type(value) is int:
        value = float(str(value))  # infinity where float(value) would raise an OverflowError
    elif kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind or value != value:  # NaN
        raise ConfigError(f"{key} is {value!r}; it must be {KINDS[kind]}{change}.")
    if isinstance(value, str):
        _require_utf8(value, key)
    return value


def _require_utf8(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key} is {text!a}; it is not valid UTF-8, so a file that keeps it could not be read back: rename it."
        ) from None
