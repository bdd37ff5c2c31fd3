"""Texts that go on from prompts: the one place where evaluation asks a model to write."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import ConfigError
from counterflow.infer import request
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.model.transformer import Transformer

BATCH = EngineSettings().max_sequences
"""Texts written at a time."""


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
    """What follows each prompt, in their order, written side by side; the prompt begins a document.

    A prompt longer than the model's positions keeps its latest part, and a text ends where they end.
    """
    engine = Engine(model, EngineSettings(), tokenizer.decode)
    end, positions = frozenset([tokenizer.eos]), model.config.max_positions
    texts: dict[int, str] = {}
    for number, prompt in enumerate(prompts):
        ids = [tokenizer.bos, *tokenizer.encode(prompt)][-positions:]
        wish = request.Sampling(
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            seed=sampling.seed + number,
            stop=sampling.stops,
            stop_tokens=end,
        )
        engine.add(ids, wish)
    done: set[int] = set()
    for number in range(len(prompts)):
        while number not in done:
            for delta in engine.step():
                place = delta.sequence.number
                texts[place] = texts.get(place, "") + delta.text
                if delta.finish:
                    done.add(place)
        yield texts.pop(number, "")
