"""`counterflow evaluate WHAT`: a model's worth by programs, text, experts or another model."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from counterflow.errors import ConfigError, nearest


@dataclass(frozen=True)
class HumanEval:
    """pass@k on the 164 problems of HumanEval; programs run in a sandbox."""

    run: str = ""
    """The run's folder or name, or an exported folder."""
    completions: str = ""
    """Instead of a run: `canonical` (the reference solutions), `pass` (empty bodies), or a .jsonl file of task_id and
    completion."""
    samples: int = 1
    """Texts for each problem."""
    k: tuple[int, ...] = (1, 10, 100)
    """pass@k for each of these that there are samples enough for."""
    temperature: float = 0.0
    """0 writes the likeliest text; more than one sample needs more, such as 0.8."""
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0
    prompt: str = "as-is"
    """as-is, or stripped of white space at its end."""
    problems: int = 164
    """The first so many, for a quick look; the score is then not HumanEval's."""
    precision: str = "fp32"
    """fp32 or bf16."""
    averaged: bool = False
    """Use the averaged weights (EMA), if the run kept them."""
    workers: int = 0
    """Programs run at a time; 0: one for each core."""
    time_s: float = 3.0
    """Seconds a program may take."""
    memory_mib: int = 512
    """Memory of each of its processes."""
    unconfined: bool = False
    """Run programs although the system gives no namespaces: limits are then all that holds them."""
    json: str = ""
    """Where the report is written; default humaneval.json in the run's folder."""


def humaneval(wish: HumanEval) -> None:
    """Write, run, report."""
    from counterflow.evaluate import humaneval as bench
    from counterflow.evaluate.complete import Sampling
    from counterflow.evaluate.sandbox import Limits, require_confinement

    if bool(wish.run) == bool(wish.completions):
        raise ConfigError("name either --run, whose model writes, or --completions.")
    limits = Limits(time_s=wish.time_s, memory_bytes=wish.memory_mib << 20)
    given = dict(list(bench.problems().items())[: wish.problems])
    require_confinement(limits, wish.unconfined)
    settings: dict[str, Any] = {"model": wish.run or wish.completions}
    if wish.run:
        model, tokenizer, folder = _model(wish.run, wish.averaged, wish.precision)
        sampling = Sampling(wish.max_tokens, wish.temperature, wish.top_p, wish.seed, bench.STOPS)
        settings |= {"precision": wish.precision, "averaged": wish.averaged, "batch": 1}
        settings |= {"prompt": wish.prompt, "sampling": asdict(sampling)}
        texts = bench.written(model, tokenizer, given, sampling, wish.samples, wish.prompt)
        out = Path(wish.json or folder / "humaneval.json")
    else:
        known: dict[str, Callable[[Any], Any]] = {"canonical": bench.canonical, "pass": bench.empty}
        make = known.get(wish.completions)
        texts = make(given) if make else bench.from_file(Path(wish.completions), given)
        out = Path(wish.json) if wish.json else None
    answers = bench.grade(given, list(texts), limits, wish.workers or os.cpu_count() or 1)
    found = bench.report(answers, wish.k, limits, settings)
    _table("HumanEval", _humaneval_rows(found))
    _keep(found, out)


def _humaneval_rows(found: Mapping[str, Any]) -> dict[str, Any]:
    sampling, limits = found.get("sampling", {}), found["limits"]
    held = [name for name, holds in found["confined_by"].items() if holds]
    rows = {name: f"{score:.1%}" for name, score in found["scores"].items()}
    rows |= {"passed": f"{found['passed']} of {found['samples']} programs, {found['problems']} problems"}
    if sampling:
        rows |= {
            "prompt": f"{found['prompt']}, after the beginning token",
            "sampling": f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, "
            f"seed {sampling['seed']}, at most {sampling['max_tokens']} tokens, batch {found['batch']}, "
            f"{found['precision']}",
            "stops": " ".join(repr(stop) for stop in sampling["stops"]) + " and the end token",
        }
    rows["limits"] = (
        f"{limits['time_s']:g} s, {limits['memory_bytes'] >> 20} MiB, {limits['processes']} processes"
    )
    return rows | {"confined by": "limits" + "".join(f", {name}" for name in held)}


def _model(run: str, averaged: bool, precision: str) -> Any:
    """(model, tokenizer, folder) of a run or an exported folder."""
    from counterflow.train.restore import folder_of, model_of

    if not run:
        raise ConfigError("--run is missing; give a run's folder or name, or an exported folder.")
    folder = folder_of(run)
    return *model_of(folder, averaged, precision), folder


def _table(title: str, rows: Mapping[str, Any]) -> None:
    width = max(len(name) for name in rows)
    print(title)
    for name, value in rows.items():
        print(f"  {name:{width}}  {value}")


def _keep(found: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"  {out}")


EVALUATIONS: Mapping[str, tuple[Any, Callable[[Any], None], str]] = {
    "humaneval": (HumanEval, humaneval, "pass@k on HumanEval's 164 problems, run in a sandbox"),
}


def run(arguments: Sequence[str]) -> int:
    """One evaluation."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:13}{says}" for name, (_, _, says) in EVALUATIONS.items())
        print(
            f"usage: counterflow evaluate WHAT ...\n\n{lines}\n\n`counterflow evaluate WHAT --help` says more of one."
        )
        return 0
    what, rest = arguments[0], arguments[1:]
    if what not in EVALUATIONS:
        raise ConfigError(f"'{what}' is no evaluation; {nearest(what, EVALUATIONS)}")
    wish, act, _ = EVALUATIONS[what]
    act(tyro.cli(wish, prog=f"counterflow evaluate {what}", args=rest, use_underscores=True))
    return 0
