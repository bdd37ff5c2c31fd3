"""How many drafts pay: from the seconds that steps took and the share of drafts that were kept.

A step with d drafts gives E(d) = 1 + a₁ + a₁a₂ + … tokens and takes t(d) seconds; the depth with the most tokens a
second is taken, 0 among them. t depends on how many sequences write at once, so each power of two of them is measured
by itself. Nothing is assumed of the device: where a verify costs as much as its rows, drafts stop by themselves.

Times are compared side by side only: a depth is tried for some steps, and what they took is set against the steps
before them, so that a machine that grows slower or a text that grows longer changes no choice. When a batch size is new
all depths are tried; after that a trial happens when a hundredth of the time since has paid for it, by what the last
one lost. So trials are rare where they are dear and frequent where two depths come to much the same. Steps in which
something was compiled, recorded or caught up are no times of their depth; modules that must catch up are part of a
trial's price all the same.
"""

from collections import deque
from dataclasses import dataclass, field
from math import sqrt
from statistics import median

TRIAL = 6
"""Steps of a trial that are timed."""
MOST = 4 * TRIAL
"""Steps after which a trial ends with the times it has."""
APART = 24
"""Steps between two trials, at least."""
SHARE, ADVANCE = 0.01, 2
"""Of all time, what trials may lose; and what a new batch size has to lose beforehand, in steps."""
RECENT = 16
"""Steps at the chosen depth that a trial is compared with."""
BLENDED = 4
"""A trial's time weighs as one of so many."""
JUDGED = 32
"""Drafts judged before one may say that too few are kept."""
REMEMBERED = 4
"""What the drafts judged before weigh, when drafts are taken up again after a time without."""
FADE = 0.997
"""What an older step's acceptance weighs beside a newer one's."""
LONGEST = 8
"""Steps' time that one step can count as in a trial's price: what was compiled in it is not compiled again."""
MARGIN = 0.01
"""By how much another depth must be faster to be taken."""
DOUBT = 0.7
"""Standard deviations of what is known of acceptance by which fewer drafts must be faster."""


@dataclass
class Size:
    """What is known of one batch size."""

    current: int
    untried: list[int]
    cost: dict[int, float] = field(default_factory=dict)
    """Seconds of a step at each depth, comparable with each other."""
    trials: dict[int, int] = field(default_factory=dict)
    price: dict[int, float] = field(default_factory=dict)
    """Seconds that the last trial of a depth lost."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    saved: float = 0.0
    """Seconds that trials may lose now."""
    since: int = 0
    """Steps since the last trial."""
    trial: int | None = None
    times: list[float] = field(default_factory=list)
    """Of the trial's steps that count, and ..."""
    spent: list[float] = field(default_factory=list)
    """... of all."""


class Depth:
    """The depth of the next step's drafts; `deepest` is never exceeded, and kept to if `adapt` is off."""

    def __init__(self, deepest: int, adapt: bool) -> None:
        self.deepest, self.adapt = deepest, adapt
        self._sizes: dict[int, Size] = {}
        self._reached = [0.0] * deepest
        self._kept = [0.0] * deepest

    def choose(self, sequences: int, limit: int | None = None) -> int:
        """The depth for a step in which so many sequences write, none of which can have more than `limit` drafts."""
        limit = self.deepest if limit is None else limit
        if not self.adapt or not self.deepest or not sequences:
            return min(self.deepest, limit)
        size = self._size(sequences)
        if size.trial is None and not size.untried:
            self._change(size)
        if size.trial is None and (next_one := self._due(size, limit)) is not None:
            self._begin(size, next_one)
        return min(size.current if size.trial is None else size.trial, limit)

    def best(self, sequences: int) -> int:
        """The depth that is chosen but for trials."""
        return self._size(sequences).current if self.adapt and self.deepest else self.deepest

    def needed(self, sequences: int) -> int:
        """Drafts that texts which begin now should be ready for: the best depth, that of a trial that is due, or of a
        new batch size the deepest."""
        if not self.adapt or not self.deepest:
            return self.deepest
        size = self._size(sequences)
        due = size.trial if size.trial is not None else self._due(size, self.deepest)
        return max(size.current, due or 0, *size.untried)

    def record(self, sequences: int, depth: int, seconds: float, steady: bool = True) -> None:
        """A step in which all sequences wrote, each with `depth` drafts; `steady` if it did nothing else."""
        size = self._size(sequences)
        size.saved += SHARE * seconds
        if depth == size.trial:
            size.spent.append(seconds)
            if steady:
                size.times.append(seconds)
            learnt = depth == 0 or not size.untried or self._reached[0] >= JUDGED
            if (len(size.times) >= TRIAL and learnt) or len(size.spent) >= MOST + JUDGED:
                self._end(size)
        elif depth == size.current:
            size.since += 1
            if steady:
                size.recent.append(seconds)

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

    def speed_up(self, sequences: int, depth: int) -> float | None:
        """Tokens a second at this depth over those without drafts; None if either was not measured."""
        cost = self._size(sequences).cost
        return self.expected(depth) * cost[0] / cost[depth] if {0, depth} <= cost.keys() else None

    def _size(self, sequences: int) -> Size:
        """That of the next power of two; a new one begins with the depth of the nearest that is known."""
        key = (sequences - 1).bit_length()
        if key not in self._sizes:
            known = [other for other in self._sizes if self._sizes[other].cost]
            nearest = min(known, key=lambda other: abs(other - key), default=None)
            first = self.deepest if nearest is None else self._sizes[nearest].current
            others = [depth for depth in range(self.deepest, -1, -1) if depth != first]
            self._sizes[key] = Size(first, [first, *others])
        return self._sizes[key]

    def _due(self, size: Size, limit: int) -> int | None:
        """The depth to try now: one that never was, or the one tried least of those that can be paid for."""
        if size.untried:
            return next((depth for depth in size.untried if depth <= limit), None)
        if size.since < APART:
            return None
        others = [depth for depth in range(limit + 1) if depth != size.current]
        return min(
            (depth for depth in others if size.price.get(depth, 0.0) <= size.saved),
            key=lambda depth: size.trials.get(depth, 0),
            default=None,
        )

    def _begin(self, size: Size, depth: int) -> None:
        size.trial, size.times, size.spent = depth, [], []
        if depth and size.cost and not size.current:  # what was kept long ago says little of the text now
            for position in range(self.deepest):
                fade = min(1.0, REMEMBERED / max(self._reached[position], 1.0))
                self._reached[position] *= fade
                self._kept[position] *= fade

    def _end(self, size: Size) -> None:
        """Take in what the trial has shown."""
        depth, size.trial, size.since = size.trial, None, 0
        assert depth is not None, "a trial ends that has begun"
        if depth in size.untried:
            size.untried.remove(depth)
        if not size.times:
            return
        took = median(size.times)
        spent = [min(seconds, LONGEST * took) for seconds in size.spent]
        if not size.cost:
            size.current, size.cost[depth] = depth, took
            size.saved = ADVANCE * took
            size.recent.extend(size.times)
            return
        beside = median(size.recent) if size.recent else size.cost[size.current]
        found = size.cost[size.current] * took / beside
        trials = size.trials[depth] = size.trials.get(depth, 0) + 1
        old = size.cost.get(depth, found)
        size.cost[depth] = old * (found / old) ** (1 / min(trials, BLENDED))
        worth = beside * self.expected(depth) / self.expected(size.current)
        size.price[depth] = max(0.0, sum(spent) - worth * len(spent))
        size.saved -= size.price[depth] if not size.untried else 0.0
        if self._change(size) == depth:
            size.recent.extend(size.times)

    def _change(self, size: Size) -> int:
        """Go to the depth with the most tokens a second, if that is another by a margin; the depth then."""
        if size.untried:
            return size.current
        rates = {depth: self.expected(depth) / seconds for depth, seconds in size.cost.items()}
        best = max(rates, key=lambda depth: rates[depth])
        margin = MARGIN + (DOUBT * self._doubt(size.current) if best < size.current else 0.0)
        if rates[best] > (1 + margin) * rates[size.current]:
            size.current = best
            size.recent.clear()
        return size.current

    def _doubt(self, depth: int) -> float:
        """Standard deviation of E at this depth, as a share of it, by the drafts judged at the first position."""
        reached = self._reached[0] if depth else 0.0
        share = self._kept[0] / reached if reached else 0.5
        return sqrt(share * (1 - share) / max(reached, 1.0)) / self.expected(depth)
