"""Numbers as people write them, 671.03 B, 1.5 GiB, 3 min 20 s, and tables of them in plain text."""

from collections.abc import Sequence


def count(value: float) -> str:
    """A count with its decimal prefix, three or more significant digits: 671.03 B, 36.63 B, 4.7 M."""
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.2f} {sign}"
    return f"{value:g}"


def bytes_(value: float) -> str:
    """Bytes with a binary prefix: 1.50 GiB."""
    for size, sign in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.2f} {sign}"
    return f"{value:g} B"


def seconds(value: float) -> str:
    """A duration in at most two units: 4.2 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    for size, sign, small, small_sign in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {sign} {whole % size // small} {small_sign}"
    return f"{value:.1f} s"


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest word: the first and the last to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    lines: list[str] = []
    for row in table:
        ends = (0, len(row) - 1)
        cells = [
            f"{cell:<{width}}" if place in ends else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
