"""How many drafts pay: from the seconds that steps took and the share of drafts that were kept.

A step with d drafts gives E(d) = 1 + a₁ + a₁a₂ + … tokens and takes t(d) seconds; the depth with the most tokens a
second is taken, 0 among them. t depends on how many sequences write at once, so each power of two of them is
measured by itself. Depths are tried a few times each when a batch size is new, and one step in many goes to another
depth, because what a text is like changes. Nothing is assumed of the device: where a verify costs as much as its
rows, drafts stop by themselves.
"""

from collections import defaultdict, deque
from statistics import median

TRIALS = 3
"""Steps at each depth before one is preferred."""
RETRY_EVERY = 48
"""One step in so many goes to another depth."""
RECENT = 16
"""Steps that a time is the median of."""
FADE = 0.995
"""What an older step's acceptance weighs beside a newer one's."""


class Depth:
    """The depth of the next step's drafts; `deepest` is never exceeded, and kept to if `adapt` is off."""

    def __init__(self, deepest: int, adapt: bool) -> None:
        self.deepest, self.adapt = deepest, adapt
        self._draft_s: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._verify_s: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._reached = [0.0] * deepest
        self._kept = [0.0] * deepest
        self._choices: dict[int, int] = defaultdict(int)

    def choose(self, sequences: int) -> int:
        """The depth for a step in which so many sequences write."""
        if not self.adapt or not self.deepest or not sequences:
            return self.deepest
        size = _size(sequences)
        untried = [d for d in range(self.deepest, -1, -1) if len(self._verify_s[size, d]) < TRIALS]
        if untried:
            return untried[0]
        self._choices[size] += 1
        turn, rest = divmod(self._choices[size], RETRY_EVERY)
        if rest == 0:
            return turn % (self.deepest + 1)
        return self.best(sequences)

    def best(self, sequences: int) -> int:
        """The depth with the most tokens a second, of those measured at this batch size."""
        rates = {
            d: self.expected(d) / s for d in range(self.deepest + 1) if (s := self.seconds(sequences, d))
        }
        return max(rates, key=lambda d: rates[d], default=self.deepest)

    def record(self, sequences: int, depth: int, draft_s: float, verify_s: float) -> None:
        """A step in which all sequences wrote, each with `depth` drafts."""
        self._draft_s[_size(sequences), depth].append(draft_s)
        self._verify_s[_size(sequences), depth].append(verify_s)

    def count(self, drafted: list[int], kept: list[int]) -> None:
        """How many drafts each sequence had, and kept, in one step."""
        for position in range(self.deepest):
            reached = sum(d > position and k >= position for d, k in zip(drafted, kept, strict=True))
            if reached:
                self._reached[position] = FADE * self._reached[position] + reached
                stayed = sum(k > position for k in kept)
                self._kept[position] = FADE * self._kept[position] + stayed

    def expected(self, depth: int) -> float:
        """E: tokens of a step at this depth, from the recent acceptance; 1 where nothing is known."""
        tokens, chance = 1.0, 1.0
        for position in range(depth):
            reached = self._reached[position]
            chance *= self._kept[position] / reached if reached else 0.0
            tokens += chance
        return tokens

    def seconds(self, sequences: int, depth: int) -> float | None:
        """Median seconds of a step at this depth, draft and verify; None where none was measured."""
        draft, verify = self.terms(sequences, depth)
        return None if draft is None or verify is None else draft + verify

    def terms(self, sequences: int, depth: int) -> tuple[float | None, float | None]:
        """Median seconds of drafting and of verifying."""
        key = _size(sequences), depth
        if not self._verify_s[key]:
            return None, None
        return median(self._draft_s[key]), median(self._verify_s[key])

    def speed_up(self, sequences: int, depth: int) -> float | None:
        """Tokens a second at this depth over those without drafts, E / (v + D c); None if either was not measured."""
        plain, drafted = self.seconds(sequences, 0), self.seconds(sequences, depth)
        return self.expected(depth) * plain / drafted if plain and drafted else None


def _size(sequences: int) -> int:
    """The next power of two."""
    return 1 << (sequences - 1).bit_length()
