"""`counterflow evaluate tasks`: lm-eval's tasks on a model of ours."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from counterflow.cli.files import keep
from counterflow.errors import ConfigError, installing

if TYPE_CHECKING:
    from counterflow.comm.mesh import Mesh


@dataclass(frozen=True)
class Tasks:
    """lm-eval's tasks, with the model in this process."""

    tasks: tyro.conf.Positional[tuple[str, ...]]
    """Names of tasks, lm-eval's own or of --include_path."""
    run: str = ""
    """The run's folder or name, or an exported folder."""
    include_path: str = ""
    """A folder with tasks of your own (YAML)."""
    num_fewshot: int = 0
    limit: int = 0
    """Documents of each task; 0: all."""
    window: int = 0
    """Tokens that the model sees at once; 0: its positions."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU, on a CPU what its processor multiplies fast."""
    device: str = "auto"
    """auto (cuda if there is one), cpu or cuda."""
    averaged: bool = False
    json: str = ""
    """Where the results are written too."""


def tasks(wish: Tasks, mesh: "Mesh") -> None:
    """Run them and print lm-eval's table."""
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"lm-eval is not installed ({error}); it is an extra: {installing('lm-eval')}."
        ) from None
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from counterflow.evaluate.harness import CounterflowLM

    if not (wish.run and wish.tasks):
        raise ConfigError("name a model with --run, and one task or more.")
    found = lm_eval.simple_evaluate(
        model=CounterflowLM(wish.run, wish.precision, wish.averaged, mesh.device.type, wish.window),
        tasks=list(wish.tasks),
        num_fewshot=wish.num_fewshot,
        limit=wish.limit or None,
        task_manager=TaskManager(include_path=wish.include_path or None),
    )
    assert found is not None, "lm-eval gives results to its first process, and there is one"
    print(make_table(found))
    kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
    keep({"model": wish.run, "precision": wish.precision} | kept, wish.json)
