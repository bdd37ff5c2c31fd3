"""Texts that go on from prompts: the one place where evaluation asks a model to write."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import ConfigError
from counterflow.infer.sample import sample_tokens
from counterflow.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn."""

    max_tokens: int = 512
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    seed: int = 0
    """Of the first text; each has its own, one higher than the one before."""
    stops: tuple[str, ...] = ()
    """A text ends before the first of these, and at the end token."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1.")


def complete(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling
) -> Iterator[str]:
    """What follows each prompt, in their order; the prompt begins a document."""
    for number, prompt in enumerate(prompts):
        ids, text = [tokenizer.bos, *tokenizer.encode(prompt)], ""
        tokens: list[int] = []
        for token in sample_tokens(
            model,
            ids,
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.seed + number,
            frozenset([tokenizer.eos]),
        ):
            tokens.append(token)
            text = tokenizer.decode(tokens)
            if cut(text, sampling.stops) != text:
                break
        yield cut(text, sampling.stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
