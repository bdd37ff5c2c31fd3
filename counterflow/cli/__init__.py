"""The command line: `counterflow VERB`. Each verb builds its settings and calls one function.

The table below is all that `counterflow --help` reads, so help answers before torch could be imported; a verb's
module is imported when it is called. Users' errors end here as one line on stderr and an exit code.
"""

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from keyword import iskeyword
from os.path import expanduser

from counterflow.errors import ConfigError, CounterflowError, nearest
from counterflow.interrupt import INTERRUPTED, ends_at_once, say_interrupted
from counterflow.progress import say

VERBS: Mapping[str, str] = {
    "train": "train a model: a run's name or a TOML file, then key=value overrides",
    "data": "turn a run's text into tokens before it is trained on",
    "generate": "write text with a trained run or an exported model",
    "serve": "serve a model by OpenAI's API, with a page to try it",
    "export": "write a run as a folder in the released checkpoint format",
    "import": "make a run of a folder in the released checkpoint format",
    "evaluate": "measure a model: HumanEval, bits per byte, expert load, Binoculars",
    "schedule": "print, check, simulate, draw and compare pipeline schedules",
    "plan": "which layout, how long, how much: a run on a cluster, predicted",
    "bench": "time transfers and what hides them, on the GPUs or cores at hand",
    "models": "list the named models with their parameter counts",
    "where": 'find an item of the paper in the code: counterflow where "eq 16"',
}


STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)
"""What a disk answers that has no room or no permission: a user's error wherever it arises."""


TEXTS = ("--prompt",)
"""Options whose values are no paths."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code: 0 done, 2 a user's error, 3 not finite, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word if before in TEXTS else at_home(word) for before, word in zip(["", *given], given)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal has every character
    with ends_at_once():
        return answered(lambda: _call(words))


def at_home(word: str) -> str:
    """The word with `~` as a shell reads it: one in quotes, or behind KEY=, it has left as it is."""
    key, equals, value = ("", "", word) if word.startswith("~") else word.partition("=")
    return f"{key}{equals}{expanduser(value)}" if key not in TEXTS else word


def answered(act: Callable[[], int]) -> int:
    """The exit code that `act` gives; what a user can cause is said in one line on stderr, and its code given."""
    try:
        return act()
    except CounterflowError as error:
        say(f"counterflow: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        say_interrupted()
        return INTERRUPTED
    except BrokenPipeError:
        return 128 + 13  # what a shell reports of SIGPIPE
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print(
            f"counterflow: out of memory ({str(error).splitlines()[0] if str(error) else 'allocation failed'}); ",
            end="",
            file=sys.stderr,
        )
        print(
            "lower train.micro_batch_size, set train.recompute=attention, or start another run with a lower "
            "data.sequence_length.",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        where = f"{error.filename}: " if error.filename else "what is written or printed: "
        print(
            f"counterflow: {where}{error.strerror}; free space there, mend its permissions, or ",
            end="",
            file=sys.stderr,
        )
        print("write elsewhere (keep.folder, data.cache_dir, the shell's >).", file=sys.stderr)
        return 2


def _call(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-v", "-V", "--version"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"counterflow {version('counterflow')}")
        except PackageNotFoundError:
            raise ConfigError(
                "counterflow runs from its source folder; install it to give it a version: pip install ."
            ) from None
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise ConfigError(
            f"unknown command '{verb}'; {nearest(verb, VERBS)} `counterflow --help` lists them all."
        )
    return import_module(f"counterflow.cli.{verb}{'_' * iskeyword(verb)}").run(rest)


def usage() -> str:
    """What `counterflow --help` prints."""
    verbs = "\n".join(f"  {verb:10}{line}" for verb, line in VERBS.items())
    return (
        "usage: counterflow VERB ...\n\nTrains, runs, evaluates and plans language models of the DeepSeek-V3 "
        f"architecture.\n\n{verbs}\n\n`counterflow VERB --help` says more of one."
    )
