"""What a rank is told to write and what it says of it, in words that travel between processes.

A request is told by a key, its texts by key and index, so that nothing of an engine leaves its rank. Every rank has a
`Desk`, the one that listens too: news before a step, a report after it.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from counterflow.infer.engine import Engine
from counterflow.infer.request import Delta, Sampling, Sequence, TokenLogprob
from counterflow.infer.statistics import Statistics


@dataclass(frozen=True)
class Begin:
    """A prompt to go on from."""

    key: int
    """Unique in the server."""
    prompt: list[int]
    sampling: Sampling
    samples: int


@dataclass(frozen=True)
class End:
    """Word that nobody reads a request's texts any more."""

    key: int


News = Begin | End


@dataclass(frozen=True)
class Written:
    """What one step added to a text."""

    key: int
    index: int
    """Which of the request's samples."""
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...]
    finish: str | None


@dataclass(frozen=True)
class Numbers:
    """What an engine has counted, and holds now."""

    statistics: Statistics
    running: int
    blocks: int
    available: int
    """Of the cache's blocks."""


@dataclass(frozen=True)
class Report:
    """What a rank says after a step."""

    written: list[Written]
    numbers: Numbers


class Desk:
    """A rank's engine, and which of its sequences belong to which request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sequences: dict[int, list[Sequence]] = {}
        self._keys: dict[Sequence, int] = {}

    def step(self, news: Items[News]) -> Report | None:
        """Take in what is new and step, as all ranks do; None where there is nothing to say."""
        for each in news:
            if isinstance(each, Begin):
                self._begin(each)
            else:
                self._end(each.key)
        given = [self._written(delta) for delta in self.engine.step()]
        written = [each for each in given if each.finish or each.tokens or each.text or each.prompt_logprobs]
        return Report(written, self.numbers()) if written or news else None

    def numbers(self) -> Numbers:
        """As they are now; later steps do not change them."""
        batch, blocks, found = self.engine.batch, self.engine.blocks, self.engine.statistics
        kept = replace(found, reached=list(found.reached), kept=list(found.kept))
        return Numbers(kept, len(batch.running), blocks.num_blocks, blocks.available)

    def _begin(self, asked: Begin) -> None:
        sequences = self.engine.add(asked.prompt, asked.sampling, asked.samples)
        self._sequences[asked.key] = sequences
        self._keys.update(dict.fromkeys(sequences, asked.key))

    def _end(self, key: int) -> None:
        for sequence in self._sequences.pop(key, ()):
            self.engine.abort(sequence)
            self._keys.pop(sequence, None)

    def _written(self, delta: Delta) -> Written:
        sequence = delta.sequence
        key = self._keys[sequence]
        if delta.finish:
            del self._keys[sequence]
            self._sequences[key].remove(sequence)
            if not self._sequences[key]:
                del self._sequences[key]
        return Written(
            key,
            sequence.index,
            delta.tokens,
            delta.text,
            delta.logprobs,
            delta.prompt_logprobs,
            delta.finish,
        )
