"""A conversation as a prompt: by the template that came with the weights, else in the form of the release's marks or of
plain words.

A template is rendered as transformers renders it, in Jinja's sandbox. What it writes is text in which control tokens
are spelt, its own and whatever a message spells; only its own become tokens. So what a message spells of them is put
between two characters that occur nowhere in it (fences), which are taken out again behind the template: it may cut,
strip and compare texts in between, as releases do.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import DataError, RequestError
from counterflow.infer.text import document

Turn = Mapping[str, str]
"""`role` and `content`."""
WORDS = {"system": "System", "user": "User", "assistant": "Assistant"}
MARKS = {"user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
"""The release's control tokens for roles."""
FENCES = range(0xE000, 0xF8FF)
"""Characters for private use, of which two that no message holds stand around what it spells of control tokens."""

NOTHING = "(?!)"
"""A pattern that matches nowhere."""


@dataclass(frozen=True)
class Chat:
    """How the conversations with one model are written."""

    form: str
    """In words, said when a server starts."""
    prompt: Callable[[Sequence[Turn]], list[int]]
    """Token ids up to where the assistant speaks.   Fails: RequestError."""
    stop: tuple[str, ...] = ()
    """Texts that end a turn, where no token does."""


def chat_of(tokenizer: Tokenizer) -> Chat:
    """The template's form where there is one, else marks where the vocabulary has them, else words.

    Fails: DataError for a template that is none.
    """
    if tokenizer.beside.template is not None:
        return Chat("with the folder's chat template", Templated(tokenizer, tokenizer.beside.template).prompt)
    if all(mark in tokenizer.controls for mark in MARKS.values()):
        form = f"with the marks {' and '.join(MARKS.values())}, since the folder has no chat template"
        return Chat(form, lambda turns: _marked(tokenizer, turns))
    form = "as lines of 'User:' and 'Assistant:', since the folder has neither a chat template nor tokens for roles"
    return Chat(form, lambda turns: _worded(tokenizer, turns), stop=("\n\nUser:",))


def _worded(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    said = "".join(f"{WORDS[turn['role']]}: {turn['content']}\n\n" for turn in turns)
    return document(tokenizer, said + "Assistant:")


def _marked(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    marks = {role: tokenizer.controls[mark] for role, mark in MARKS.items()}
    ids = [tokenizer.bos]
    for turn in turns:
        ids += [marks[turn["role"]]] if turn["role"] in marks else []
        ids += document(tokenizer, turn["content"])[1:]
        ids += [tokenizer.eos] if turn["role"] == "assistant" else []
    return [*ids, marks["assistant"]]


def compiled(source: str) -> Template:
    """A chat template with the filters and functions that transformers gives to them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is no Jinja template (line {error.lineno}: {error}); fetch it anew."
        ) from None


class _Generation(Extension):
    """`{% generation %}`, by which templates say for training what the assistant wrote: here its content alone."""

    tags = {"generation"}  # noqa: RUF012  # as the library declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise RequestError(f"{message} (the model's chat template)")


class Templated:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        """Fails: DataError for a source that is no template."""
        self.tokenizer, self.template, self.controls = tokenizer, compiled(source), tokenizer.controls
        ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
        self.names = {name: tokenizer.bpe.id_to_token(one) for name, one in ids.items() if one is not None}
        self.longest = max(map(len, self.controls), default=0)
        cuts = [(name, cut) for name in self.controls for cut in range(1, len(name))]
        self.heads, self.tails = {name[:cut] for name, cut in cuts}, {name[cut:] for name, cut in cuts}
        self.spelt = longest_of([*self.controls]) or NOTHING

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids up to where the assistant speaks.   Fails: RequestError."""
        opened, closed = _fences(turns)
        given = [{**turn, "content": self.fenced(turn["content"], opened, closed)} for turn in turns]
        try:
            written = self.template.render(
                messages=given, add_generation_prompt=True, tools=None, documents=None, **self.names
            )
        except RequestError:
            raise
        except Exception as error:  # whatever the expressions of a template raise
            raise RequestError(
                f"the model's chat template does not take this conversation: {error}."
            ) from None
        return [*self.ids(written, opened, closed)]

    def fenced(self, text: str, opened: str, closed: str) -> str:
        """The text with fences around the control tokens that it spells, and one at an end that could make one with the
        text before or behind: within white space there, which a template may strip."""
        text = re.sub(self.spelt, lambda found: f"{opened}{found[0]}{closed}", text)
        lengths, bare = range(1, self.longest), text.strip()
        if not bare:
            return text
        before, _, behind = text.partition(bare)
        if any(bare[-length:] in self.heads for length in lengths):
            behind = closed + behind
        if any(bare[:length] in self.tails for length in lengths):
            before += opened
        return before + bare + behind

    def ids(self, written: str, opened: str, closed: str) -> Iterator[int]:
        """Of what the template wrote: its control tokens, and the texts between them without fences."""
        parts = re.compile(f"{opened}({self.spelt}){closed}|({self.spelt})|[{opened}{closed}]")
        text, done = "", 0
        for part in parts.finditer(written):
            fenced, control = part[1], part[2]
            text, done = text + written[done : part.start()] + (fenced or ""), part.end()
            if control:
                yield from document(self.tokenizer, text)[1:]
                yield self.controls[control]
                text = ""
        yield from document(self.tokenizer, text + written[done:])[1:]


def _fences(turns: Sequence[Turn]) -> tuple[str, str]:
    used = {character for turn in turns for character in turn["content"]}
    free = (chr(code) for code in FENCES if chr(code) not in used)
    try:
        return next(free), next(free)
    except StopIteration:
        raise RequestError(
            "the conversation uses every character for private use; leave two of them."
        ) from None


def longest_of(names: Sequence[str]) -> str:
    """A pattern of the longest of some names that stands at a place, which is looked up letter by letter."""
    rests: dict[str, list[str]] = {}
    for name in filter(None, names):
        rests.setdefault(name[0], []).append(name[1:])
    if not rests:
        return ""
    ways = "|".join(re.escape(first) + longest_of(rest) for first, rest in rests.items())
    return f"(?:{ways}){'?' if '' in names else ''}"
