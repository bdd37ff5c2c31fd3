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


def described(statistics: Statistics, depth: Depth, sequences: int = 1) -> str:
    """Speed, and what drafts brought, for people; `sequences` wrote at once."""
    took = statistics.draft_s + statistics.model_s
    rate = f"{statistics.tokens / took:,.0f} tokens/s" if took else "no time at all"
    lines = [
        f"{statistics.tokens} tokens after {statistics.prompt_tokens} of prompt in {seconds(took)}: {rate}."
    ]
    if statistics.accepted_length is None:
        return lines[0]
    kept = ", ".join(f"{share:.0%}" for share in statistics.acceptance)
    lines.append(
        f"Drafts kept, by position: {kept}; {statistics.accepted_length:.2f} tokens a step that had drafts "
        f"({statistics.drafted_turns} of {statistics.verified})."
    )
    chosen = depth.best(sequences) if depth.adapt else depth.deepest
    speed_up = depth.speed_up(sequences, chosen)
    if speed_up is None:
        lines.append(
            "No step without drafts was timed, so no speed-up is known (a seed keeps the drafts' depth)."
        )
    else:
        lines.append(
            f"Speed-up {speed_up:.2f} with {chosen} at a time, by the times of such steps and of plain ones."
        )
    return "\n".join(lines)
