"""What moved over a link, and how long computation stood still for it."""

from dataclasses import dataclass, field

from counterflow.comm.clock import Mark, between


@dataclass
class Traffic:
    """What a backend has moved over one link since it was last asked."""

    rows: int = 0
    """Tokens' rows that left this rank, either way; what stays home does not count."""
    bytes: int = 0
    """All that left it, ids and gates included."""
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)
    """When computation stood still for it."""

    def waited(self) -> float:
        """Seconds that computation stood still."""
        return sum(between(start, end) for start, end in self.waits)
