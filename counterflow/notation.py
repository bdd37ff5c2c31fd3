"""JSON and TOML as they come from outside: whatever they hold is read, or is a ValueError of one line.

The standard library's readers leave a mark at a file's start, fail with other errors where lists are nested deep, and
read no whole number of more than some thousand digits, which then hides all that stands beside it.
"""

import json
import tomllib
import zlib
from collections.abc import Mapping
from typing import Any

MOST_DIGITS = 4000
"""Of a whole number in TOML; Python's limit is 4,300."""
EXACT_DIGITS = 308
"""Of a whole number in JSON that is read exactly: none of so many is beyond all floats."""
TOO_DEEP = "nested too deep"


def from_json(text: str | bytes) -> Any:
    """What a JSON text in UTF-8 says; a longer number than any that is meant is infinite.   Fails: ValueError."""
    try:
        return json.loads(_unmarked(text), parse_int=_whole)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def from_toml(text: str | bytes) -> dict[str, Any]:
    """What a TOML text in UTF-8 says.   Fails: ValueError."""
    try:
        return tomllib.loads(_unmarked(text))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        if "digits" in str(error):
            raise ValueError(f"a number has more than {MOST_DIGITS} digits") from None
        raise


def sealed(value: Mapping[str, Any]) -> str:
    """A table as JSON with a CRC of what it says."""
    return json.dumps({"crc32": _crc(value), **value}, indent=1)


def unsealed(text: str | bytes) -> dict[str, Any]:
    """A table that was `sealed`, or has no CRC, as it was written.   Fails: ValueError."""
    found = from_json(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no table")
    try:
        whole = "crc32" not in found or found.pop("crc32") == _crc(found)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if not whole:
        raise ValueError("it is not as it was written")
    return found


def _crc(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _unmarked(text: str | bytes) -> str:
    return (text.decode() if isinstance(text, bytes) else text).removeprefix("\ufeff")


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= EXACT_DIGITS else float(digits)
