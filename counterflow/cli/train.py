"""`counterflow train`: one run, from its settings to its report and a sample.

tyro prints the help, from the dataclasses' own docstrings; the settings themselves are read by `config.load`, so that
a flag, an override and a line of TOML go one way and fail alike.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.config.runs import RUNS
from counterflow.errors import ConfigError
from counterflow.progress import Progress

DRY_RUN = "--dry-run"
HELP = """usage: counterflow train [RUN] [KEY=VALUE | --KEY VALUE ...]

Train a model. RUN is a named run ({runs}; default tiny) or a .toml file; settings follow as overrides:

  counterflow train tiny train.tokens=1e6 model.num_layers=6
  counterflow train my.toml --data.sources 'texts/*.txt' --keep.folder runs/mine

`model=NAME` takes another named model, `model=PATH/config.json` a released one; `--from PATH` starts from the weights,
model and tokenizer of a run or an exported folder. The run is kept in runs/NAME; started
again it goes on from its last checkpoint (keep.resume=never starts anew). `--dry-run` prints settings, layout, memory
and the first sample, and writes nothing. Settings of '{name}':
"""


def run(arguments: Sequence[str]) -> int:
    """Train, then print where the report is and a sample."""
    words = [word for word in arguments if word != DRY_RUN]
    name, overrides, wants_help = split(words)
    config = load_run(name, overrides)
    if wants_help:
        print(HELP.format(runs=", ".join(RUNS), name=name) + settings_help(config))
        return 0
    if len(words) < len(arguments):
        from counterflow.train.dry import dry_run

        print(dry_run(config))
        return 0
    from counterflow.train.begin import is_complete
    from counterflow.train.environment import started
    from counterflow.train.folder import SAMPLE

    if started() is not None:
        return _started(config, arguments)
    complete = is_complete(config)  # told, like what is wrong, before torch is imported and ranks are started
    code = 0 if complete else _started(config, arguments)
    if code == 0 and config.keep.report and not (complete and (Path(config.folder) / SAMPLE).is_file()):
        from counterflow.cli.generate import print_sample

        print_sample(config.folder)
    return code


def _started(config: RunConfig, arguments: Sequence[str]) -> int:
    """Load what trains, here or in the processes that are started, and train."""
    from counterflow.train.environment import place_here

    place = place_here()
    several = place is None and config.parallel.processes > 1
    doing = f"Starting {config.parallel.processes} processes" if several else "Loading PyTorch"
    with Progress(doing, shown=place is None or place.rank == 0, file=sys.stdout) as progress:
        if place is None:
            progress.note(f"{doing} ...")
        from counterflow.train.launch import start

        if not several:
            import_module("counterflow.train.loop")
    return start(config, arguments)


def split(words: list[str]) -> tuple[str, list[str], bool]:
    """(run, overrides as KEY=VALUE, whether help was asked for) from the words after the verb."""
    wants_help = any(word in ("-h", "--help") for word in words)
    words = [word for word in words if word not in ("-h", "--help")]
    name = words.pop(0) if words and "=" not in words[0] and not words[0].startswith("--") else "tiny"
    overrides: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word:
            if not words:
                raise ConfigError(f"{word} has no value; write {word} VALUE or {word[2:]}=VALUE.")
            word = f"{word}={words.pop(0)}"
        overrides.append(word.removeprefix("--"))
    return name, overrides, wants_help


def settings_help(config: RunConfig) -> str:
    """tyro's table of every setting, its default and its meaning."""
    shown = Annotated[RunConfig, tyro.conf.AvoidSubcommands]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(shown, prog="counterflow train", default=config, args=["--help"], use_underscores=True)
    text = out.getvalue()
    return text[text.find("\n\n") :].strip("\n") if "\n\n" in text else text
