"""Two small charts as SVG: stacked bars of memory by rank, and lines over sizes that double.

They stand alone, take their ink from the page they are set into, and name every value on hover. Matplotlib was not
taken: the planner starts in a blink.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from math import log2

COLOURS = ("#0b7285", "#f08c00", "#7048e8", "#2b8a3e", "#c2255c", "#868e96", "#1971c2", "#e8590c", "#adb5bd")
WIDTH, LEFT, LINE = 960, 76, 18
Place = Callable[[float, float], tuple[float, float]]
"""Pixels of a point."""


def stacked(names: Sequence[str], bars: Mapping[str, Sequence[float]], limit: float, unit: str) -> str:
    """A bar a row, a piece a name; `limit` is a line that no bar should pass."""
    whole = max([limit, *(sum(values) for values in bars.values())]) * 1.02
    scale, lines = (WIDTH - LEFT - 10) / whole, list(_legend(names, 4))
    top = 30.0
    for label, values in bars.items():
        lines.append(f'<text x="{LEFT - 6}" y="{top + 12:g}" text-anchor="end">{escape(label)}</text>')
        x = float(LEFT)
        for name, value, colour in zip(names, values, COLOURS):
            width = value * scale
            tip = f"<title>{escape(label)}, {escape(name)}: {value:.3g} {escape(unit)}</title>"
            lines.append(
                f'<rect x="{x:.1f}" y="{top:g}" width="{width:.1f}" height="14" fill="{colour}">{tip}</rect>'
            )
            x += width
        top += LINE
    at = LEFT + limit * scale
    lines.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="26" y2="{top:g}" style="stroke:currentColor" stroke-width="2"/>'
    )
    lines.append(
        f'<text x="{at - 4:.1f}" y="{top + 12:g}" text-anchor="end">{limit:.3g} {escape(unit)}</text>'
    )
    return _svg(lines, top + 20)


def curves(named: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, most: float) -> str:
    """Lines of (x, y) over a doubling axis; what is above `most` is drawn at the edge with its number."""
    xs = sorted({x for points in named.values() for x, _ in points})
    first, span = log2(xs[0]), (log2(xs[-1]) - log2(xs[0])) or 1.0
    bottom, top = 330.0, 30.0 + LINE * len(named)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (log2(x) - first) / span * (WIDTH - LEFT - 40)
        return across, bottom - min(y, most) / most * (bottom - top)

    lines = list(_grid(xs, most, place, bottom))
    lines.append(f'<text x="{WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">{escape(x_name)}</text>')
    lines.append(f'<text x="4" y="14">{escape(y_name)}</text>')
    for at, ((name, points), colour) in enumerate(zip(named.items(), COLOURS)):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in points:
            across, down = place(x, y)
            tip = f"<title>{escape(name)}: {x:g}, {y:.3g}</title>"
            lines.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3.5" fill="{colour}">{tip}</circle>')
        key = 22 + LINE * at
        lines.append(f'<rect x="{LEFT}" y="{key}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + 18}" y="{key + 10}">{escape(name)}</text>')
    return _svg(lines, bottom + 44)


def _grid(xs: Sequence[float], most: float, place: Place, bottom: float) -> Iterator[str]:
    for x in xs:
        across, _ = place(x, 0)
        yield f'<text x="{across:.1f}" y="{bottom + 16:g}" text-anchor="middle">{x:g}</text>'
    for part in range(5):
        _, down = place(xs[0], most * part / 4)
        yield f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{down:.1f}" y2="{down:.1f}" style="stroke:#8884"/>'
        yield f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{100 * most * part / 4:.3g} %</text>'


def _legend(names: Sequence[str], top: float) -> Iterator[str]:
    x = float(LEFT)
    for name, colour in zip(names, COLOURS):
        yield f'<rect x="{x:g}" y="{top:g}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 16:g}" y="{top + 10:g}">{escape(name)}</text>'
        x += 34 + 6.6 * len(name)


def _svg(lines: Sequence[str], height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} '
        f'{height:g}" font-family="sans-serif" font-size="11" color="#777">'
    )
    inked = (
        line.replace("<text ", '<text style="fill:currentColor" ') for line in lines
    )  # above a page's own rules
    return "\n".join([head, *inked, "</svg>"]) + "\n"
