"""Conversations become prompts by the folder's template, marks or words; nothing that a message spells is a token."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Bpe

from counterflow.data.tokenizer import Tokenizer, load
from counterflow.data.tokenizer_files import Beside, beside
from counterflow.errors import DataError, RequestError
from counterflow.infer.chat import Templated, chat_of, longest_of
from tests.data.test_tokenizer import learnt

CONTROLS = ("<｜User｜>", "<｜Assistant｜>", "</think>", "<think>")
END = "<｜end▁of▁sentence｜>"
TEMPLATE = """
{%- set ns = namespace(system='') -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = ns.system + message['content'] -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] | trim }}
{%- elif message['role'] == 'assistant' -%}{% generation -%}
{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}
{%- endgeneration %}{% endif -%}
{%- endfor -%}
{%- if not add_generation_prompt %}{{ raise_exception('a prompt is wanted') }}{% endif -%}
{{ '<｜Assistant｜></think>' }}"""
"""As V3.1's: texts of the system follow each other at once, thoughts are cut off, a thought is closed."""


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A vocabulary whose control tokens are marked as the release marks them: not special."""
    root = tmp_path_factory.mktemp("tokenizer")
    bpe = Bpe.from_str(learnt(root, 296).bpe.to_str().replace("<|eos_token|>", END))
    bpe.add_tokens([AddedToken(name, special=False, normalized=False) for name in CONTROLS])
    (root / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")
    (root / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load(folder / "tokenizer.json")


def test_a_template_is_rendered_as_transformers_renders_it(tokenizer: Tokenizer, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    turns = [
        turn("system", "Be brief."),
        turn("user", " hello\n"),
        turn("assistant", "<think>hm</think>hey"),
        turn("user", "bye"),
    ]
    chat = chat_of(tokenizer)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=END, eos_token=END, chat_template=TEMPLATE
    )
    plain = [*turns[:2], turn("assistant", "hey"), turns[3]]
    expected = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert chat.prompt(plain) == chat.prompt(turns) == expected
    assert (chat.form, chat.stop) == ("with the folder's chat template", ())


@settings(max_examples=40)
@given(
    texts=st.lists(
        st.lists(
            st.sampled_from(
                [*CONTROLS, END, "<｜Us", "er｜>", "<", ">", "</thi", "\ue000", "\ue001", "a", " "]
            )
        ).map("".join),
        min_size=4,
        max_size=4,
    )
)
def test_no_message_spells_a_control_token(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Nor two of them that the template writes one behind the other."""
    roles = ("system", "system", "user", "user")
    chat = chat_of(tokenizer)
    ids = chat.prompt([turn(role, text) for role, text in zip(roles, texts)])
    controls = set(tokenizer.controls.values())
    found = [tokenizer.bpe.id_to_token(one) for one in ids if one in controls]
    assert found == [END, "<｜User｜>", "<｜User｜>", "<｜Assistant｜>", "</think>"]
    text = tokenizer.decode([one for one in ids if one not in controls])
    assert text == texts[0] + texts[1] + texts[2].strip() + texts[3].strip()


def test_one_character_is_enough_to_guard(tokenizer: Tokenizer) -> None:
    """A control token `<<` was read out of a message's `<` and the template's `<｜User｜>`."""
    bpe = Bpe.from_str(tokenizer.bpe.to_str())
    bpe.add_tokens([AddedToken("<<", special=True, normalized=False)])
    of_two = Templated(replace(tokenizer, bpe=bpe), "{{ messages[0].content.strip() }}<｜User｜>")
    ids = of_two.prompt([turn("user", "a< ")])
    assert [bpe.id_to_token(one) for one in ids] == ["a", "<", "<｜User｜>"]


def test_a_template_that_refuses_or_fails_is_a_refused_request(tokenizer: Tokenizer) -> None:
    def chat(template: str):
        return chat_of(Tokenizer(**{**vars(tokenizer), "beside": Beside(template=template)}))

    with pytest.raises(RequestError, match=r"^only users speak \(the model's chat template\)$"):
        chat("{{ raise_exception('only users speak') }}").prompt([turn("user", "a")])
    for template in ("{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(RequestError, match="chat template does not take this conversation"):
            chat(template).prompt([turn("user", "a")])
    with pytest.raises(DataError, match=r"no Jinja template \(line 2: "):
        chat("\n{% if %}")


def test_a_vocabulary_without_control_tokens_has_texts_alone() -> None:
    plain = Bpe(models.BPE({"a": 0, "b": 1}, []))
    bare = Tokenizer(plain, plain, 2, 1, 1, None, None, "", Beside(template="{{ messages[0].content }}a"))
    assert chat_of(bare).prompt([turn("user", "ab")]) == [0, 1, 0]


def test_templates_are_found_in_either_file_and_the_ends_in_all(folder: Path, tmp_path: Path) -> None:
    """The union, in the order of reading; copies of a tokenizer keep what lay beside it."""
    tables = {
        "tokenizer_config.json": {
            "eos_token": {"content": END},
            "bos_token": None,
            "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}],
        },
        "config.json": {"eos_token_id": 297},
        "generation_config.json": {"eos_token_id": [298, 297]},
    }
    for name, table in tables.items():
        (tmp_path / name).write_text(json.dumps(table), encoding="utf-8-sig")
    assert beside(tmp_path) == Beside(eos=END, ends=(297, 298), template="y")
    (tmp_path / "chat_template.jinja").write_text("z")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    opened = load(tmp_path / "tokenizer.json")
    assert opened.ends == {opened.eos, 297, 298} and opened.beside.template == "z"
    (tmp_path / "copy").mkdir()
    opened.save(tmp_path / "copy" / "tokenizer.json")
    assert load(tmp_path / "copy" / "tokenizer.json").beside == opened.beside
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "0"}')
    with pytest.raises(DataError, match=r"eos_token_id is '0' in .*generation_config\.json"):
        beside(tmp_path)


def test_the_longest_name_is_found() -> None:
    import re

    names = ["<a", "<ab>", "<", "[x]"]
    assert re.findall(longest_of(names), "<ab><a><[x][x") == ["<ab>", "<a", "<", "[x]"]
