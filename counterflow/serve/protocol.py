"""What OpenAI's completions and chat completions ask, checked, and as prompts and a `Sampling`.

Null is the same as not given, in every place. A field that would change the text and is not built here is refused
unless it stands at the value that changes nothing; what our own answers hold is taken back as a message. A field that
nobody knows is refused too: a misspelt `max_token` that is ignored gives a wrong answer.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import RequestError
from counterflow.infer.chat import Chat
from counterflow.infer.request import Sampling
from counterflow.infer.text import document

MOST_PROMPTS = 1024
MOST_STOPS = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Of messages, and what they are called in a chat's form."""
Empty = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[StrictFloat, Field(ge=0, le=0)]
One = Annotated[StrictFloat, Field(ge=1, le=1)]


def _off(given: bool) -> bool:
    if given:
        raise ValueError("input should be false")
    return given


Off = Annotated[StrictBool, AfterValidator(_off), WithJsonSchema({"const": False})]
"""A literal would take 0."""


def _nullable(schema: dict[str, Any]) -> None:
    """In the description: null is taken for every field that may be left out."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name not in required:
            field.pop("default", None)
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Given(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return (
            {name: value for name, value in given.items() if value is not None}
            if isinstance(given, dict)
            else given
        )


class StreamOptions(Given):
    """What a stream says beside its text."""

    include_usage: StrictBool = False
    include_obfuscation: Off = False


class Unbuilt(Given):
    """Fields that are taken only at the value that changes nothing."""

    repetition_penalty: One | None = None
    length_penalty: One | None = None
    min_p: Zero | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=0)] | None = None
    ignore_eos: Off | None = None
    use_beam_search: Off | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: dict[str, Zero] | None = None


class TextFormat(Given):
    """The form of an answer."""

    type: Literal["text"]


class UnbuiltOfChats(Given):
    """The same of chats."""

    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None


class UnbuiltOfMessages(Given):
    """The same of messages: what an answer has, ours or another server's, where the model only wrote text."""

    refusal: Annotated[StrictStr, Field(max_length=0)] | None = None
    reasoning_content: Annotated[StrictStr, Field(max_length=0)] | None = None
    tool_calls: Empty | None = None
    annotations: Empty | None = None
    function_call: None = None
    audio: None = None


class Asked(Unbuilt):
    """Fields that completions and chat completions share."""

    model: StrictStr
    max_tokens: StrictInt | None = Field(None, json_schema_extra={"minimum": 0})
    n: StrictInt = Field(1, ge=1, le=128)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    stop: StrictStr | list[StrictStr] | None = None
    temperature: StrictFloat | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 100})
    top_p: StrictFloat | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    top_k: StrictInt | None = Field(None, json_schema_extra={"minimum": 0})
    seed: StrictInt | None = None
    user: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    service_tier: StrictStr | None = None
    parallel_tool_calls: StrictBool | None = None

    def sampling(self, ends: frozenset[int], max_tokens: int, logprobs: int | None, prompt: bool) -> Sampling:
        """How to draw; OpenAI's defaults.   Fails: RequestError."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MOST_STOPS:
            raise RequestError(f"stop has {len(stop)} texts; it may have {MOST_STOPS} at most.", param="stop")
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
        """Fails (RequestError) if a prompt is too long, or so many tokens as are asked for cannot follow it. A text's
        last token needs no position of its own."""
        longest, kind = max(map(len, prompts)), "context_length_exceeded"
        asked = "messages" if "messages" in type(self).model_fields else "prompt"
        if longest > positions:
            raise RequestError(
                f"This model's maximum context length is {positions} tokens; the {asked} resulted in {longest}: "
                f"shorten the {asked}.",
                kind,
                asked,
            )
        if self.limit is not None and positions < longest + self.limit - 1:
            raise RequestError(
                f"This model's maximum context length is {positions + 1} tokens, its {positions} positions and the "
                f"token behind them; {longest + self.limit} were asked for ({longest} in the prompt). "
                f"Ask for {positions + 1 - longest} tokens at most, shorten the prompt, or leave max_tokens out.",
                kind,
                asked,
            )


class CompletionAsked(Asked):
    """The body of POST /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    echo: StrictBool = False
    logprobs: StrictInt | None = None
    best_of: StrictInt | None = None
    suffix: Annotated[StrictStr, Field(max_length=0)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt; a text begins a document.   Fails: RequestError."""
        given: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        if not given or len(given) > MOST_PROMPTS:
            raise RequestError(
                f"prompt is a list of {len(given)}; it must hold 1 to {MOST_PROMPTS} prompts.", param="prompt"
            )
        return [document(tokenizer, one) if isinstance(one, str) else list(one) for one in given]

    def settings(self, ends: frozenset[int]) -> Sampling:
        """How to draw.   Fails: RequestError."""
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(
                f"best_of is {self.best_of} and n {self.n}; only best_of = n is supported.", param="best_of"
            )
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return self.sampling(ends, max_tokens, self.logprobs, self.echo and self.logprobs is not None)


class Part(Given):
    """A piece of a message; only text is read."""

    type: Literal["text"]
    text: StrictStr


class Message(UnbuiltOfMessages):
    """One turn of a conversation; an answer of ours is one."""

    role: StrictStr = Field(json_schema_extra={"enum": [*ROLES]})
    content: StrictStr | list[Part]
    name: StrictStr | None = None

    def text(self) -> str:
        """The turn's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked, UnbuiltOfChats):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, json_schema_extra={"minimum": 0})
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})

    def prompts(self, chat: Chat) -> list[list[int]]:
        """Token ids of the conversation up to where the assistant speaks.   Fails: RequestError."""
        foreign = next((message.role for message in self.messages if message.role not in ROLES), None)
        if foreign is not None:
            raise RequestError(
                f"a message's role is '{foreign}'; known: {', '.join(ROLES)}.", param="messages"
            )
        return [
            chat.prompt(
                [{"role": ROLES[message.role], "content": message.text()} for message in self.messages]
            )
        ]

    def settings(self, ends: frozenset[int], positions: int, chat: Chat) -> Sampling:
        """How to draw; without a limit to the model's positions.   Fails: RequestError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs} without logprobs; set logprobs to true.",
                param="top_logprobs",
            )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        sampling = self.sampling(ends, positions if self.limit is None else self.limit, logprobs, False)
        return replace(sampling, stop=(*sampling.stop, *chat.stop))


UNBUILT = frozenset(["suffix", "include_obfuscation"]).union(
    *(kind.model_fields for kind in (Unbuilt, UnbuiltOfChats, UnbuiltOfMessages))
)
