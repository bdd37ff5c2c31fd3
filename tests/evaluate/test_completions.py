"""lm-eval through the server is lm-eval in the process: its own local-completions client, a task from files of ours."""

import json

import pytest

from counterflow.convert.export import Form, export
from tests.serve.service import learnt, running

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")
pytest.importorskip(
    "tenacity", reason="lm-eval's client of servers needs tenacity: pip install 'lm-eval[api]'"
)
pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's own and its dependencies'

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {cache}
test_split: test
output_type: {kind}
target_delimiter: ""
doc_to_text: "{{{{context}}}}"
{answer}
metric_list:
{metrics}
"""
TASKS = ("ours_choices", "ours_continued", "ours_rolling")
DOCS = [
    {"context": "the pipeline is fed", "choices": [" from both ends", " 1234 5", " x"], "right": 0},
    {"context": "def f(x):\n    return ", "choices": ["x", "12 + x\n", "(end) (end)"], "right": 1},
    {"context": "ein paar Wörter: ", "choices": ["übrig", "that", "which flows"], "right": 2},
    {"context": "ein paar (end)", "choices": [".\n that", "!", " x"], "right": 0},
    {"context": "12345 67", "choices": ["8", "9 10 11 12 13", ".\n\n\n"], "right": 0},
]


def write_tasks(place) -> None:
    """A task of choices and one of single continuations."""
    file = place / "docs.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in DOCS))
    common = {"file": file, "cache": place / "cache"}
    choices = 'doc_to_choice: "{{choices}}"\ndoc_to_target: right'
    tasks = (
        ("ours_choices", "multiple_choice", choices, "  - metric: acc"),
        (
            "ours_continued",
            "loglikelihood",
            'doc_to_target: "{{choices[right]}}"',
            "  - metric: perplexity\n  - metric: acc",
        ),
        (
            "ours_rolling",
            "loglikelihood_rolling",
            'doc_to_target: "{{context}} {{choices[1]}}"',
            "  - metric: bits_per_byte",
        ),
    )
    for name, kind, answer, metrics in tasks:
        (place / f"{name}.yaml").write_text(
            TASK.format(name=name, kind=kind, answer=answer, metrics=metrics, **common)
        )


def scored(model, place, names=TASKS, **how) -> dict[str, list]:
    """(log p, greedy) of every request of every task, by document."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(place), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=tasks, log_samples=True, bootstrap_iters=0, **how
    )
    assert found is not None
    by_document = {name: sorted(found["samples"][name], key=lambda each: each["doc_id"]) for name in names}
    return {name: [each["resps"] for each in rows] for name, rows in by_document.items()}


def flat(answers) -> list[tuple[float, bool]]:
    """Of nested lists of requests' answers, each (log p, greedy); a rolling one has no second."""
    if isinstance(answers, (list, tuple)) and answers and isinstance(answers[0], (list, tuple)):
        return [pair for each in answers for pair in flat(each)]
    log_p, *greedy = answers if isinstance(answers, (list, tuple)) else (answers,)
    return [(float(log_p), str(*greedy) == "True")]


def test_in_process_and_over_http_give_the_same_likelihoods(tmp_path):
    """Within 1e-4 in fp32: the server's passes are absorbed and batched, the other's expanded and alone."""
    import counterflow.evaluate.harness as harness

    tokenizer = learnt(tmp_path)
    seam = len(tokenizer.encode(DOCS[3]["context"]))
    assert tokenizer.encode(DOCS[3]["context"] + DOCS[3]["choices"][0])[:seam] != tokenizer.encode(
        DOCS[3]["context"]
    )
    write_tasks(tmp_path)
    with running(tokenizer) as server:
        export(server.service.engine.model, tokenizer, tmp_path / "out", Form("fp32"))
        inside = scored(harness.CounterflowLM(run=str(tmp_path / "out")), tmp_path)
        client: dict = {
            "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
            "model": "toy",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tmp_path / "out"),
            "add_bos_token": True,
            "max_length": 256,
        }
        outside = scored("local-completions", tmp_path, TASKS[:2], model_args=client)
        # Before a whole text the client sets the beginning token itself.
        client["add_bos_token"] = False
        outside |= scored("local-completions", tmp_path, TASKS[2:], model_args=client)
    for name, answers in inside.items():
        mine, theirs = flat(answers), flat(outside[name])
        assert len(mine) == len(theirs) == {"ours_choices": 15}.get(name, 5)
        assert all(log_p < -1 for log_p, _ in mine), mine
        for (a, a_greedy), (b, b_greedy) in zip(mine, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-4) and a_greedy == b_greedy
