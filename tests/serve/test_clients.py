"""OpenAI's client in the loop that its users write, against the command itself: a run, and a release's folder."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT

import openai
import pytest

from counterflow.cli import main
from counterflow.convert.export import Form, export
from tests import processes
from tests.convert.released import released_folder
from tests.model.configs import random_model
from tests.serve.service import CONFIG, learnt

pytestmark = pytest.mark.slow
TURNS = 5
SPECIAL = re.compile(r"<\|.*\|>|\[[A-Z]+\]")
"""Tokens of which a text shows nothing."""


@contextmanager
def served(folder: Path) -> Iterator[openai.OpenAI]:
    """A client of a server on `folder`, in a process of its own."""
    words = [
        "serve",
        f"--run={folder}",
        "--port=0",
        "--max_sequences=4",
        "--positions=256",
        "--precision=fp32",
    ]
    command = [sys.executable, "-m", "counterflow", *words]
    with processes.Popen(command, stdout=PIPE, stderr=STDOUT, text=True) as process:
        said = ""
        try:
            for line in process.stdout:
                said += line
                if found := re.search(r"^Serving .* on (http://127.0.0.1:\d+) ", line):
                    url = f"{found[1]}/v1"
                    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
                        yield client
                    break
        finally:
            process.terminate()
            said += process.stdout.read()
    assert process.returncode == 0 and "Traceback" not in said, said


@pytest.mark.parametrize("kind", ["run", "moonlight-16b-a3b"])
def test_five_turns_of_the_clients_loop(kind, tmp_path):
    if kind == "run":
        export(random_model(CONFIG), learnt(tmp_path), tmp_path / "toy", Form("fp32"))
        folder = tmp_path / "run"
        assert main(["import", str(tmp_path / "toy"), str(folder)]) == 0
    else:
        folder = released_folder(tmp_path, kind)
    with served(folder) as client:
        talk(client, client.models.list().data[0].id)
        for wrong, code in (
            ({"max_tokens": 10_000}, "context_length_exceeded"),
            ({"tools": [{}]}, "unsupported_value"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(
                    model=folder.name, messages=[{"role": "user", "content": "a"}], **wrong
                )
            assert caught.value.code == code


def talk(client: openai.OpenAI, model: str) -> None:
    """Each answer is appended as it came; all that is asked for comes, streamed and not, and both are alike."""
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"the pipeline {turn}"})
        asked = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0, "tools": None}
        asked |= {"logprobs": True, "top_logprobs": 2, "n": 2, "response_format": {"type": "text"}}
        answer = client.chat.completions.create(**asked, stop=None)
        one, other = answer.choices
        assert one.message.content == other.message.content and one.message.role == "assistant"
        shown = (entry for entry in one.logprobs.content if not SPECIAL.fullmatch(entry.token))
        raw = b"".join(bytes(entry.bytes) for entry in shown)
        assert raw.decode(errors="replace") == one.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in one.logprobs.content)
        streamed = {0: "", 1: ""}
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert streamed == {0: one.message.content, 1: one.message.content}
        if stop := one.message.content[2:4].strip():
            ended = client.chat.completions.create(**asked | {"n": 1}, stop=[stop, "\0"]).choices[0]
            whole = one.message.content
            assert (ended.message.content, ended.finish_reason) == (whole[: whole.index(stop)], "stop")
        messages.append(one.message if turn % 2 else {"role": "assistant", "content": streamed[0]})
