"""The errors a user can cause. Each says what was found, what must hold and what to change.

Our own mistakes are asserts with a message; these classes are for what came from outside: a setting, a file,
a full disk. The command line prints them as one line and exits with `exit_code`.
"""

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, requires

LONGEST = 1000
"""Characters of a line that an error says."""


class CounterflowError(Exception):
    """A user's error: its text is all that the command line prints."""

    exit_code = 2
    shared = False
    """Whether every rank raises it, so that one need say it."""

    def __init__(self, text: str = "") -> None:
        super().__init__("\n".join(map(brief, text.split("\n"))))


def brief(line: str) -> str:
    """A line that may quote what somebody gave, of any length: the middle of a long one is left out."""
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}"


class ConfigError(CounterflowError):
    """A setting that is unknown, of the wrong type, or impossible beside the others."""


class DataError(CounterflowError):
    """Text, tokenizer or token shards that are missing, empty, undecodable or corrupt."""


class CheckpointError(CounterflowError):
    """A checkpoint that is missing, truncated, of another model, or cannot be written."""


class RequestError(CounterflowError):
    """A request for text that cannot be served: an impossible setting, a prompt that is empty or too long.

    `code` and `param` are what OpenAI's API calls the kind of error and the field that it lies in.
    """

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class ScheduleError(CounterflowError):
    """A schedule that cannot be: a wrong number of ranks or micro-batches, or cells that do not fit together."""


class NonFiniteError(CounterflowError):
    """A loss or gradient that is NaN or infinite; names step and layer."""

    exit_code = 3


class RankError(CounterflowError):
    """A process of a run that died, and with it the run; names the rank and what killed it."""

    exit_code = 4


class PeerLostError(RankError):
    """Another process is gone with which this one shared its work; an agent that started both says how it ended."""


def installing(extra: str) -> str:
    """The command that brings the packages of an extra, by their own names, which any index knows."""
    try:
        named = requires("counterflow") or []
    except PackageNotFoundError:
        named = []
    needed = [one.partition(";")[0].strip() for one in named if re.search(rf"extra == .{extra}.", one)]
    packages = " ".join(f"'{one}'" for one in needed) or f"'.[{extra}]'"
    return f"{sys.executable} -m pip install {packages}"


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint for a misspelt name: "did you mean 'x'?" or the list of what is known."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}."
