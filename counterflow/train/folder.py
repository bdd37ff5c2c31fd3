"""A run's folder as it lies on disk: its files' names, its settings, whether a model is there; read without torch."""

from os.path import expanduser
from pathlib import Path

from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.convert.folder import CONFIG
from counterflow.errors import CheckpointError, ConfigError
from counterflow.train.manifest import steps_of

RUN_TOML = "run.toml"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
SAMPLE = "sample.txt"


def run_config(folder: Path) -> RunConfig:
    """The configuration that a run's folder keeps.   Fails: CheckpointError where there is no run."""
    path = folder / RUN_TOML
    if not path.is_file():
        runs = sorted(other.parent.name for other in folder.parent.glob(f"*/{RUN_TOML}"))
        known = f"known there: {', '.join(runs)}." if runs else "train one first: counterflow train."
        raise CheckpointError(
            f"{folder} is no run and no exported model: it has neither {RUN_TOML} nor {CONFIG}; {known}"
        )
    return load_run(str(path))


def folder_of(name: str) -> Path:
    """The folder that a command means: a path, or the name of a run in runs/."""
    path = Path(expanduser(name))
    return path if path.exists() or "/" in name else Path("runs") / name


def require_model(name: str, option: str = "--run") -> None:
    """Refuse a command's run that has nothing to load, before torch is imported.   Fails: CounterflowError."""
    if not name:
        raise ConfigError(f"{option} is missing; give a run's folder or name, or an exported folder.")
    folder = folder_of(name)
    if is_exported(folder):
        return
    run_config(folder)
    if not steps_of(folder / CHECKPOINTS):
        raise CheckpointError(f"{folder} has no checkpoint yet; train it further: counterflow train.")


def require_exported(folder: Path) -> None:
    """Refuse a folder that is not in the released format.   Fails: CheckpointError."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; give a folder in the released checkpoint format.")


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported model; one that is a run too counts as a run."""
    return (folder / CONFIG).is_file() and not (folder / RUN_TOML).is_file()
