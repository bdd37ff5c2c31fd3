"""The engine's deltas in the form of OpenAI's answers: whole, or a chunk each of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import brief
from counterflow.infer.request import TokenLogprob
from counterflow.serve.desk import Written


@dataclass
class Choice:
    """One text of an answer."""

    index: int
    prompt: list[int]
    text: str = ""
    tokens: int = 0
    named: list[TokenLogprob | None] = field(default_factory=list)
    """Log-probabilities so far, the prompt's first if they were asked for."""
    finish: str | None = None
    begun: bool = False
    """Whether a chunk of it was sent."""

    def add(self, delta: Written) -> None:
        """Take in a delta."""
        self.text += delta.text
        self.tokens += len(delta.tokens)
        self.named += [*delta.prompt_logprobs, *delta.logprobs]
        self.finish = delta.finish or self.finish


class Form(ABC):
    """What completions' and chat completions' answers share."""

    kind: str
    chunk: str
    """What a chunk of a stream calls itself."""
    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, wants_logprobs: bool) -> None:
        self.model, self.tokenizer, self.wants_logprobs = model, tokenizer, wants_logprobs
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields around the choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    @abstractmethod
    def whole(self, choice: Choice) -> dict[str, Any]:
        """The choice of an answer in one piece."""

    @abstractmethod
    def piece(self, choice: Choice, delta: Written) -> dict[str, Any]:
        """The choice of a chunk that adds `delta` to what was sent of `choice`."""

    def token(self, token: int) -> str:
        """A token's text; where it is part of a character, its bytes in OpenAI's spelling."""
        raw = self.tokenizer.bytes_of(token, specials=True)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionForm(Form):
    """`text_completion`.

    Where the end token ended the text, its log-probability is the last of the lists, as vLLM's is: lm-eval asks for one
    token after a text and takes the last entry off unseen.
    """

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The choice of an answer in one piece."""
        named = self.logprobs(choice.prompt, choice.named, 0) if self.wants_logprobs else None
        return {"index": choice.index, "text": choice.text, "logprobs": named, "finish_reason": choice.finish}

    def piece(self, choice: Choice, delta: Written) -> dict[str, Any]:
        """The choice of a chunk that adds `delta` to what was sent of `choice`."""
        named = [*delta.prompt_logprobs, *delta.logprobs]
        said = self.logprobs(choice.prompt, named, len(choice.text)) if self.wants_logprobs else None
        return {"index": choice.index, "text": delta.text, "logprobs": said, "finish_reason": delta.finish}

    def logprobs(
        self, prompt: list[int], named: Sequence[TokenLogprob | None], offset: int
    ) -> dict[str, Any]:
        """OpenAI's four lists; the prompt's first token has no log-probability."""
        ids = [prompt[0] if one is None else one.token for one in named]
        characters = getincrementaldecoder("utf-8")("replace")
        lengths = [len(characters.decode(self.tokenizer.bytes_of(one))) for one in ids]
        offsets = list(accumulate(lengths, initial=offset))[:-1]
        top = [one and {self.token(token): value for token, value in one.top} for one in named]
        return {
            "tokens": list(map(self.token, ids)),
            "token_logprobs": [one and one.logprob for one in named],
            "top_logprobs": top,
            "text_offset": offsets,
        }


class ChatForm(Form):
    """`chat.completion`."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The choice of an answer in one piece."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        named = self.logprobs(choice.named[: choice.tokens]) if self.wants_logprobs else None
        return {"index": choice.index, "message": message, "logprobs": named, "finish_reason": choice.finish}

    def piece(self, choice: Choice, delta: Written) -> dict[str, Any]:
        """The choice of a chunk that adds `delta` to what was sent of `choice`; the first names the role."""
        said = {"content": delta.text} | ({} if choice.begun else {"role": "assistant"})
        named = self.logprobs(delta.logprobs[: len(delta.tokens)]) if self.wants_logprobs else None
        return {"index": choice.index, "delta": said, "logprobs": named, "finish_reason": delta.finish}

    def logprobs(self, named: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """A list with an entry a token."""
        return {
            "content": [
                self._entry(one.token, one.logprob)
                | {"top_logprobs": [self._entry(token, value) for token, value in one.top]}
                for one in named
                if one is not None
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.bytes_of(token, specials=True)
        return {"token": self.token(token), "logprob": logprob, "bytes": list(raw)}


def usage(prompts: list[list[int]], choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens read and written; a prompt counts once for all its samples."""
    read, written = sum(map(len, prompts)), sum(choice.tokens for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def failure(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error. It may quote what cannot be written as UTF-8, so that is replaced, or is long."""
    message = brief(message).encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
