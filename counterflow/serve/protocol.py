"""What OpenAI's completions and chat completions ask, checked, and as prompts and a `Sampling`.

A field that would change the text and is not built here is refused unless it stands at the value that changes
nothing. A field that nobody knows is refused too: a misspelt `max_token` that is read past gives a wrong answer.
"""

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import RequestError
from counterflow.infer.chat import Chat
from counterflow.infer.request import Sampling
from counterflow.infer.text import document

MOST_PROMPTS = 1024
MOST_STOPS = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Of messages, and what they are called in a chat's form."""


class StreamOptions(BaseModel):
    """What a stream says beside its text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False


class Asked(BaseModel):
    """Fields that completions and chat completions share."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr
    max_tokens: StrictInt | None = None
    n: StrictInt = Field(1, ge=1, le=128)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    stop: StrictStr | list[StrictStr] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    user: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def sampling(self, ends: frozenset[int], max_tokens: int, logprobs: int | None, prompt: bool) -> Sampling:
        """How to draw; OpenAI's defaults.   Fails: RequestError."""
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise RequestError(f"{name} is {getattr(self, name)}; it is not supported: leave it out.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MOST_STOPS:
            raise RequestError(f"stop has {len(stop)} texts; it may have {MOST_STOPS} at most.")
        return Sampling(
            max_tokens,
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.top_k or 0,
            self.seed,
            stop,
            ends,
            logprobs,
            prompt,
        )

    @property
    def limit(self) -> int | None:
        """The tokens that a text may have at most, if that is said; chats have a newer name for it."""
        newer = getattr(self, "max_completion_tokens", None)
        return self.max_tokens if newer is None else newer

    def require_room(self, prompts: list[list[int]], positions: int) -> None:
        """Fails (RequestError) if so many tokens as are asked for cannot follow a prompt. A text's last token needs no
        position of its own."""
        longest = max(map(len, prompts))
        if self.limit is not None and longest <= positions < longest + self.limit - 1:
            raise RequestError(
                f"This model's maximum context length is {positions + 1} tokens, its {positions} positions and the "
                f"token behind them; {longest + self.limit} were asked for ({longest} in the prompt). "
                f"Ask for {positions + 1 - longest} tokens at most, shorten the prompt, or leave max_tokens out."
            )


class CompletionAsked(Asked):
    """The body of POST /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    echo: StrictBool = False
    logprobs: StrictInt | None = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt; a text begins a document.   Fails: RequestError."""
        given: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        if not given or len(given) > MOST_PROMPTS:
            raise RequestError(f"prompt is a list of {len(given)}; it must hold 1 to {MOST_PROMPTS} prompts.")
        return [document(tokenizer, one) if isinstance(one, str) else list(one) for one in given]

    def settings(self, ends: frozenset[int]) -> Sampling:
        """How to draw.   Fails: RequestError."""
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(f"best_of is {self.best_of} and n {self.n}; only best_of = n is supported.")
        if self.suffix:
            raise RequestError("suffix is not supported: leave it out.")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return self.sampling(ends, max_tokens, self.logprobs, self.echo and self.logprobs is not None)


class Part(BaseModel):
    """A piece of a message; only text is read."""

    model_config = ConfigDict(extra="forbid")
    type: StrictStr
    text: StrictStr


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: StrictStr
    content: StrictStr | list[Part]
    name: StrictStr | None = None

    def text(self) -> str:
        """The turn's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = None

    def prompts(self, chat: Chat) -> list[list[int]]:
        """Token ids of the conversation up to where the assistant speaks.   Fails: RequestError."""
        foreign = next((message.role for message in self.messages if message.role not in ROLES), None)
        if foreign is not None:
            raise RequestError(f"a message's role is '{foreign}'; known: {', '.join(ROLES)}.")
        return [
            chat.prompt(
                [{"role": ROLES[message.role], "content": message.text()} for message in self.messages]
            )
        ]

    def settings(self, ends: frozenset[int], positions: int, chat: Chat) -> Sampling:
        """How to draw; without a limit to the model's positions.   Fails: RequestError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs} without logprobs; set logprobs to true.")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        sampling = self.sampling(ends, positions if self.limit is None else self.limit, logprobs, False)
        return replace(sampling, stop=(*sampling.stop, *chat.stop))
