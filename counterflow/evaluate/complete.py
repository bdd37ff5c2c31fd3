"""Texts that go on from prompts: the one place where evaluation asks a model to write."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from counterflow.comm.mesh import Mesh
from counterflow.config.run import Parallel
from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import ConfigError
from counterflow.infer import request
from counterflow.infer.engine import Engine, EngineSettings, pass_rows, positions_of, with_room
from counterflow.infer.ranks import share_experts
from counterflow.infer.text import document
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
    positions: int = 0
    """Prompt and text together have so many tokens at most; 0: the model's positions."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if self.positions < 0:
            raise ConfigError(f"positions is {self.positions}; it must be at least 1, or 0 for the model's.")


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    mesh: Mesh | None = None,
    dispatch: str = Parallel.dispatch,
) -> Iterator[str]:
    """What follows each prompt, in their order, written side by side; the prompt begins a document.

    A prompt longer than the positions keeps its latest part, and a text ends where they end; the cache has room for the
    longest text. Ranks that share the experts write the prompts in turn and each is given all texts, at the end.
    """
    mesh, settings = mesh or Mesh(), EngineSettings(positions=sampling.positions)
    positions = positions_of(model, settings)
    given = [document(tokenizer, prompt)[-positions:] for prompt in prompts]
    settings = with_room(model, settings, max(map(len, given), default=0) + sampling.max_tokens)
    ranks = share_experts(model, mesh, pass_rows(model, settings), dispatch)
    engine = Engine(model, settings, tokenizer.bytes_of, ranks)
    own = range(mesh.rank, len(prompts), mesh.size)
    for number in own:
        wish = request.Sampling(
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            seed=sampling.seed + number,
            stop=sampling.stops,
            stop_tokens=tokenizer.ends_with(sampling.stops),
        )
        engine.add(given[number], wish)
    if mesh.size == 1:
        yield from _texts(engine, len(own))
        return
    written = {
        n: text
        for each in mesh.everyone(dict(zip(own, _texts(engine, len(own)))))
        for n, text in each.items()
    }
    yield from (written[number] for number in range(len(prompts)))


def _texts(engine: Engine, count: int) -> Iterator[str]:
    """The texts of all requests, in their order, each once it and those before it have ended."""
    texts, done, given = [""] * count, set(), 0
    while not engine.finished():
        for delta in engine.step():
            texts[delta.sequence.number] += delta.text
            if delta.finish:
                done.add(delta.sequence.number)
        while given in done:
            yield texts[given]
            given += 1
