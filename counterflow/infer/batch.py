"""Who runs in the next step, and over how many positions: continuous batching, without a tensor.

Sequences join and leave at every step. Those that write go first, a position and their drafts each; what is
left of the step's rows goes to prompts, in chunks, oldest first; then new sequences are let in. When the cache
is full the youngest sequence gives its blocks back and starts again from its tokens later, which costs time and
changes nothing else.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from counterflow.infer.blocks import Blocks
from counterflow.infer.request import Sequence


@dataclass(frozen=True)
class Work:
    """What one sequence does in a step."""

    sequence: Sequence
    rows: int
    """Known tokens to run over, from `sequence.cached` on."""
    drafts: int = 0

    @property
    def samples(self) -> bool:
        """Whether its last known token is among them, so that a new one follows."""
        return self.sequence.cached + self.rows == len(self.sequence.tokens)


class Batch:
    """The queue and the running sequences."""

    def __init__(self, blocks: Blocks, max_sequences: int, max_rows: int, positions: int) -> None:
        self.blocks = blocks
        self.max_sequences, self.max_rows, self.positions = max_sequences, max_rows, positions
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.reused = 0
        """Tokens of prompts that were found in the cache."""

    def plan(self, depth_of: Callable[[Sequence], int], modules_of: Callable[[Sequence], int]) -> list[Work]:
        """The next step's work, with room in the cache for all of it; `depth_of` says how many drafts may pay, and
        `modules_of` how many modules a text that begins is to keep up with."""
        works: list[Work] = []
        left = self.max_rows
        for sequence in sorted(self.running, key=lambda s: not s.decoding):
            if sequence not in self.running or not left:  # it gave way to an older one
                continue
            work = self._work(sequence, left, depth_of(sequence))
            if self._grow(work):
                works.append(work)
                left -= work.rows + work.drafts
        works = [work for work in works if work.sequence in self.running]
        while left and len(self.running) < self.max_sequences and (sequence := self._next()):
            work = self._admit(sequence, left, modules_of(sequence))
            if work is None:
                break
            works.append(work)
            left -= work.rows
        return works

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is; its published blocks can still be found."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.restart()

    def _work(self, sequence: Sequence, left: int, depth: int) -> Work:
        if sequence.decoding:
            still = sequence.sampling.max_tokens - sequence.made
            room = self.positions - len(sequence.tokens)
            return Work(sequence, 1, max(0, min(depth, still - 1, room, left - 1)))
        return Work(sequence, min(self._goal(sequence) - sequence.cached, left))

    def _goal(self, sequence: Sequence) -> int:
        """Tokens to run over before it writes: its prompt. After a restart the last token is left for a step with
        drafts, so that a seed's randomness replays."""
        return len(sequence.tokens) - (sequence.made > 0)

    def _grow(self, work: Work) -> bool:
        """Make room, at the cost of the youngest if it must be; False if that was the sequence itself."""
        sequence = work.sequence
        while not self.blocks.grow(sequence.blocks, sequence.cached + work.rows + work.drafts):
            youngest = self.running[-1]
            self.remove(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True

    def _next(self) -> Sequence | None:
        """The first in the queue whose leader's prompt, if it has one, can be shared by now."""

        def ready(sequence: Sequence) -> bool:
            leader = sequence.leader
            return leader is None or leader.made > 1 or leader.finish is not None

        return next(filter(ready, self.waiting), None)

    def _admit(self, sequence: Sequence, left: int, modules: int) -> Work | None:
        if not sequence.sampling.prompt_logprobs:
            known = sequence.tokens[: self._goal(sequence)]
            sequence.blocks, sequence.published = self.blocks.match(known, modules)
            sequence.cached = len(sequence.blocks) * self.blocks.size
        sequence.follow(modules)
        work = self._work(sequence, left, 0)
        if not self.blocks.grow(sequence.blocks, sequence.cached + work.rows):
            self.blocks.release(sequence.blocks)
            sequence.restart()
            return None
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.reused += sequence.cached
        return work
