"""What an engine counts: tokens, steps, seconds, and drafts by their position in the chain."""

from dataclasses import dataclass, field

from counterflow.infer.depth import Depth
from counterflow.units import seconds


@dataclass
class Statistics:
    """Sums since the engine began."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Prompt tokens that were found in the cache."""
    tokens: int = 0
    """Tokens given out."""
    steps: int = 0
    verified: int = 0
    """Times a sequence was given its next tokens, with drafts or without."""
    preemptions: int = 0
    draft_s: float = 0.0
    model_s: float = 0.0
    """Of the trunk's passes: prompts, plain steps and verifies."""
    reached: list[int] = field(default_factory=list)
    """How often a draft at each position was judged: all before it had been kept."""
    kept: list[int] = field(default_factory=list)
    drafted_turns: int = 0
    """Times a sequence was given its next tokens with drafts at hand, and ..."""
    drafted_tokens: int = 0
    """... the tokens it was given then, before any stop."""

    def count(self, drafted: int, kept: int) -> None:
        """One sequence's drafts of one step."""
        self.verified += 1
        if not drafted:
            return
        self.drafted_turns += 1
        self.drafted_tokens += kept + 1
        missing = drafted - len(self.reached)
        self.reached += [0] * missing
        self.kept += [0] * missing
        for position in range(min(kept + 1, drafted)):
            self.reached[position] += 1
            self.kept[position] += kept > position

    @property
    def acceptance(self) -> list[float]:
        """Share of drafts kept at each position, of those that were reached; 0 at a position that none reached."""
        return [kept / max(reached, 1) for kept, reached in zip(self.kept, self.reached, strict=True)]

    @property
    def accepted_length(self) -> float | None:
        """Mean tokens of a turn with drafts, the token behind them included; None without any."""
        return self.drafted_tokens / self.drafted_turns if self.drafted_turns else None


@dataclass(frozen=True)
class Took:
    """Seconds that one text took, part by part."""

    loading_s: float
    """Of the command, until the first prompt could be read."""
    first_s: float
    """From there to the first token."""
    rest_s: float
    """To the last one."""


def described(statistics: Statistics, depth: Depth, took: Took) -> str:
    """How fast one text was written, and what drafts brought, for people."""
    rest = max(0, statistics.tokens - 1)
    rate = f"{rest / took.rest_s:,.1f} tokens/s after it" if rest and took.rest_s else "no more than that"
    lines = [
        f"Loading took {seconds(took.loading_s)}, the first token {seconds(took.first_s)} more (after "
        f"{statistics.prompt_tokens} of prompt); {rate} ({rest} in {seconds(took.rest_s)})."
    ]
    if statistics.accepted_length is None:
        return lines[0]
    kept = ", ".join(f"{share:.0%}" for share in statistics.acceptance)
    lines.append(
        f"Drafted tokens that were kept, first, second, ... of a step: {kept}. Steps with drafts gave "
        f"{statistics.accepted_length:.2f} tokens each, and {statistics.drafted_turns} of {statistics.verified} "
        "steps had some."
    )
    lines.append(_worth(depth))
    return "\n".join(lines)


def _worth(depth: Depth) -> str:
    """What the depth that was chosen in the end brings, as far as it was measured."""
    chosen, deepest = depth.best(1), depth.deepest
    speed_up = depth.speed_up(1, chosen or deepest)
    if speed_up is None:
        return "What the speed is without drafts was not measured, so the gain is not known."
    if not chosen:
        return f"In the end none were made, since {deepest} a step is {speed_up:.2f} times as fast as none."
    return f"In the end {chosen} a step, which is {speed_up:.2f} times as fast as none."
