"""Conversations become tokens: with the release's marks where the tokenizer has them, else with words."""

import json

import pytest
from pydantic import ValidationError

from counterflow.data.tokenizer import load
from counterflow.errors import RequestError
from counterflow.infer.chat import Chat, chat_of
from counterflow.serve.answers import ChatForm, Choice
from counterflow.serve.protocol import ChatAsked, CompletionAsked
from counterflow.serve.refuse import described
from tests.serve.service import learnt

END = frozenset([0])
WORDS = Chat("as words", lambda turns: [])
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    {"role": "assistant", "content": "ho <｜User｜>"},
    {"role": "user", "content": "bye"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One without marks, and the same with two of its special tokens renamed to them."""
    root = tmp_path_factory.mktemp("tokenizer")
    plain = learnt(root)
    text = plain.bpe.to_str()
    for old, new in {"<|fim_begin|>": "<｜User｜>", "<|fim_hole|>": "<｜Assistant｜>"}.items():
        text = text.replace(json.dumps(old), json.dumps(new, ensure_ascii=False))
    (root / "marked.json").write_text(text, encoding="utf-8")
    return plain, load(root / "marked.json")


def test_roles_are_marks_where_the_tokenizer_has_them_and_nobody_can_spell_one(tokenizers):
    tokenizer = tokenizers[1]
    user, assistant = (tokenizer.bpe.token_to_id(mark) for mark in ("<｜User｜>", "<｜Assistant｜>"))
    (ids,) = ChatAsked(model="x", messages=TURNS).prompts(chat_of(tokenizer))
    assert ids[0] == tokenizer.eos and ids[-1] == assistant
    assert (ids.count(user), ids.count(assistant), ids.count(tokenizer.eos)) == (2, 2, 2)
    assert tokenizer.decode(ids) == "Be brief.helloho <｜User｜>bye"
    assert ChatAsked(model="x", messages=TURNS).settings(tokenizer.ends, 64, chat_of(tokenizer)).stop == ()


def test_roles_are_words_otherwise_and_the_next_turn_stops(tokenizers):
    tokenizer = tokenizers[0]
    asked = ChatAsked(model="x", messages=TURNS, stop="END", max_completion_tokens=5)
    (ids,) = asked.prompts(chat_of(tokenizer))
    assert tokenizer.decode(ids).endswith(
        "User: hello\n\nAssistant: ho <｜User｜>\n\nUser: bye\n\nAssistant:"
    )
    settings = asked.settings(tokenizer.ends, 64, chat_of(tokenizer))
    assert settings.stop == ("END", "\n\nUser:") and settings.max_tokens == 5


COMPLETION = {"model": "x", "prompt": "a"}
CHAT = {"model": "x", "messages": TURNS}
NOTHING = {
    CompletionAsked: [
        {"presence_penalty": 0, "best_of": 1, "logit_bias": {"5": 0}, "user": "me", "suffix": ""},
        {"repetition_penalty": 1.0, "min_p": 0, "ignore_eos": False, "store": True, "metadata": {"a": "b"}},
    ],
    ChatAsked: [
        {"tools": [], "tool_choice": "none", "functions": [], "function_call": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "parallel_tool_calls": True},
        {"stream_options": {"include_obfuscation": False}, "verbosity": "medium", "service_tier": "auto"},
    ],
}


def test_fields_at_the_value_that_changes_nothing_are_taken():
    for asked, kinds in NOTHING.items():
        plain = {CompletionAsked: COMPLETION, ChatAsked: CHAT}[asked]
        for fields in kinds:
            found = asked(**plain, **fields)
            drawn = found.settings(END) if asked is CompletionAsked else found.settings(END, 64, WORDS)
            assert drawn.temperature == 1.0 and drawn.seed is None


@pytest.mark.parametrize("asked", [CompletionAsked, ChatAsked])
def test_null_is_not_given_in_every_field(asked):
    plain = {CompletionAsked: COMPLETION, ChatAsked: CHAT}[asked]
    nulls = {name: None for name in asked.model_fields if name not in plain}
    assert asked(**nulls, **plain) == asked(**plain)
    inner = {"stream_options": {"include_usage": None, "include_obfuscation": None}}
    assert asked(**plain, **inner).stream_options.include_usage is False
    with pytest.raises(ValidationError, match="Field required"):
        asked(**{**plain, "model": None})


def test_an_answer_is_taken_back_as_a_message(tokenizers):
    whole = Choice(0, [1], text="hello", finish="stop")
    message = ChatForm("x", tokenizers[0], False).whole(whole)["message"]
    others = {
        "tool_calls": [],
        "function_call": None,
        "audio": None,
        "annotations": [],
        "reasoning_content": "",
    }
    asked = ChatAsked(model="x", messages=[TURNS[1], message, message | others, TURNS[3]])
    assert [turn.text() for turn in asked.messages] == ["hello", "hello", "hello", "bye"]
    for wrong in (
        {"tool_calls": [{"id": "1"}]},
        {"refusal": "no"},
        {"audio": {"id": "a"}},
        {"content": None},
    ):
        with pytest.raises(ValidationError):
            ChatAsked(model="x", messages=[message | wrong])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ],
)
def test_what_is_not_built_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says) as caught:
        ChatAsked(model="x", messages=TURNS, **fields)
    error = caught.value.errors()[0]
    message, _, code, param = described({**error, "loc": ("body", *error["loc"])})
    assert (
        code == "unsupported_value"
        and "not supported: leave it out" in message
        and param.startswith(next(iter(fields)))
    )


def test_top_logprobs_want_logprobs():
    with pytest.raises(RequestError, match="top_logprobs is 3 without logprobs"):
        ChatAsked(model="x", messages=TURNS, top_logprobs=3).settings(END, 64, WORDS)
