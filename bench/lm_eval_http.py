"""Does lm-eval see the same model in this process and through the server?

    counterflow export tiny exported --dtype fp32
    counterflow serve --run exported --port 8471 &
    python bench/lm_eval_http.py exported http://127.0.0.1:8471/v1/completions TASKS_FOLDER TASK ...

Runs each task (of likelihoods) with the plug-in and with lm-eval's own local-completions, compares request by request,
and prints one line of JSON a task.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from counterflow.evaluate.harness import CounterflowLM


def evaluated(model: Any, folder: str, task: str, **how: Any) -> dict[str, Any]:
    """Its metrics, (log p, greedy) of every request in order, and seconds."""
    began = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=TaskManager(include_path=folder), log_samples=True, **how
    )
    assert found is not None, "lm-eval gives results to its first process, and there is one"
    samples = sorted(found["samples"][task], key=lambda each: each["doc_id"])
    answers = [(float(p), str(greedy)) for each in samples for ((p, greedy),) in each["resps"]]
    metrics = {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
    return {"metrics": metrics, "answers": answers, "seconds": time.perf_counter() - began}


def main(run: str, url: str, folder: str, *tasks: str) -> None:
    """Each task twice."""
    positions = json.loads((Path(run) / "config.json").read_text())["max_position_embeddings"]
    client = {
        "base_url": url,
        "model": Path(run).name,
        "tokenizer_backend": "huggingface",
        "tokenizer": run,
        "add_bos_token": True,
        "max_length": positions,
    }
    inside = CounterflowLM(run)
    for task in tasks:
        a = evaluated(inside, folder, task)
        b = evaluated("local-completions", folder, task, model_args=client)
        pairs = list(zip(a.pop("answers"), b.pop("answers"), strict=True))
        apart = max(abs(mine - theirs) for (mine, _), (theirs, _) in pairs)
        greedy = sum(mine == theirs for (_, mine), (_, theirs) in pairs)
        line = {"task": task, "requests": len(pairs), "apart": apart, "greedy_equal": greedy}
        line |= {"largest": max(abs(mine) for (mine, _), _ in pairs), "in_process": a, "http": b}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
