"""Spans drawn as they lie in time, one row a rank: predicted and measured by the same call, as SVG or as text.

The SVG stands alone and colours by CSS class, so that thousands of spans stay small. Pictures that are compared share
one axis; each begins at its own first span, since a prediction starts at zero and a clock does not. Matplotlib was not
taken: the command that draws must start in a blink, and a tooltip on every cell says more than an axis.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from xml.sax.saxutils import escape

from counterflow.schedule.words import Chunk, Kind, Lane, Op, Span

LEFT, RIGHT, LINE = 64, 16, 20
"""Pixels: the rows' names, the margin, a line of text or a row."""
WIDTHS = 960, 4800
"""Pixels of the time axis; between them the median span gets SPAN."""
SPAN = 18
LETTER = 6.2
"""Pixels of a digit."""
COLOURS = {
    Kind.F: ("#f6b756", "#fce3bb"),
    Kind.B: ("#7fb86a", "#cfe5c6"),
    Kind.I: ("#6ea8dc", "#c8dff3"),
    Kind.W: ("#b59bd6", "#e2d8f0"),
}
"""Of pipe 0 and, lighter, of pipe 1."""
MEANINGS = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward for input",
    Kind.W: "backward for weights",
}
SECONDS = ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs"))
"""(from so many seconds on, factor, unit)."""
ANSI = {Kind.F: 215, Kind.B: 114, Kind.I: 111, Kind.W: 183}
"""Colours of the terminal's 256."""
IDLE = "·"


def svg(spans: Sequence[Span], ranks: int, title: str = "", unit: str = "s") -> str:
    """One picture; `unit` is the spans', and seconds are shown as ms or µs where they are small."""
    return compare({title: spans}, ranks, unit)


def compare(named: Mapping[str, Sequence[Span]], ranks: int | Mapping[str, int], unit: str = "s") -> str:
    """Pictures under their names, one over the other on one time axis."""
    whole = max((_extent(spans)[1] for spans in named.values()), default=0.0) or 1.0
    factor, shown_unit = _shown(whole, unit)
    durations = [span.end - span.start for spans in named.values() for span in spans if span.end > span.start]
    width = min(max(SPAN * whole / median(durations), WIDTHS[0]), WIDTHS[1]) if durations else WIDTHS[0]
    scale = width / whole
    body, top = [], 4.0
    for name, spans in named.items():
        count = ranks if isinstance(ranks, int) else ranks[name]
        drawn, top = _picture(name, spans, count, top, scale, factor, shown_unit)
        body += drawn
    axis = list(_axis(whole, scale, top, factor, shown_unit))
    every = [span for spans in named.values() for span in spans]
    legend = list(_legend(every, top + 2 * LINE))
    return "\n".join([*_head(LEFT + width + RIGHT, top + 3 * LINE), *axis, *body, *legend, "</svg>"]) + "\n"


def _shown(whole: float, unit: str) -> tuple[float, str]:
    """Factor and unit of the numbers shown."""
    if unit != "s":
        return 1.0, unit
    return next((factor, name) for least, factor, name in SECONDS if whole >= least)


def _extent(spans: Sequence[Span]) -> tuple[float, float]:
    """First start, and the time from there to the last end."""
    first = min((span.start for span in spans), default=0.0)
    return first, max((span.end for span in spans), default=0.0) - first


def _head(width: float, height: float) -> Iterator[str]:
    size = f"{_number(width)} {_number(height)}"
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_number(width)}" height="{_number(height)}" '
        f'viewBox="0 0 {size}" font-family="sans-serif" font-size="11">'
    )
    colours = "".join(
        f".{kind}{{fill:{full}}}.{kind}.r{{fill:{light}}}" for kind, (full, light) in COLOURS.items()
    )
    yield (
        f"<style>{colours}rect{{stroke:#fff;stroke-width:.5}}.p{{stroke:#333}}.h,.l{{stroke:none}}"
        ".bg{fill:#fff;stroke:none}.m{text-anchor:middle;font-size:10px}.n{text-anchor:end}.t{font-weight:bold}"
        "line{stroke:#ddd}text{fill:#222;pointer-events:none}</style>"
    )
    yield '<rect class="bg" width="100%" height="100%"/>'


def _picture(
    name: str, spans: Sequence[Span], ranks: int, top: float, scale: float, factor: float, unit: str
) -> tuple[list[str], float]:
    """The lines of one picture, and where the next may begin."""
    lines: list[str] = []
    if name:
        lines.append(f'<text class="t" x="4" y="{_number(top + 14)}">{escape(name)}</text>')
        top += LINE
    first = _extent(spans)[0]
    lanes = _lanes(spans)
    for rank in range(ranks):
        lines.append(f'<text class="n" x="{LEFT - 6}" y="{_number(top + 14)}">rank {rank}</text>')
        for lane in lanes:
            lines.append(f'<g class="m" transform="translate({LEFT} {_number(top)})">')
            of_lane = (span for span in spans if span.rank == rank and span.lane is lane)
            lines += (_span(span, first, scale, factor, unit) for span in of_lane)
            lines.append("</g>")
            top += LINE if len(lanes) == 1 else 0.75 * LINE
        top += 2
    return lines, top + 6


def _lanes(spans: Iterable[Span]) -> tuple[Lane, ...]:
    """Both lanes for ops, one for cells."""
    return tuple(Lane) if any(isinstance(span.what, Op) for span in spans) else (Lane.COMPUTE,)


def _span(span: Span, first: float, scale: float, factor: float, unit: str) -> str:
    x, width = (span.start - first) * scale, (span.end - span.start) * scale
    height = 18 if not isinstance(span.what, Op) else 13
    start, end = ((time - first) * factor for time in (span.start, span.end))
    tip = f"<title>{escape(_name(span))} {start:.6g} – {end:.6g} {unit}".rstrip() + "</title>"
    pieces = _pieces(span)
    kind, chunk = pieces[0]
    boxes = [_box(kind, chunk, (x, 0, width, height), " p" if len(pieces) > 1 else "", tip)]
    if len(pieces) > 1:
        half = width / 2 - min(0.5, width / 8), height - 1  # inside the frame
        boxes.append(_box(*pieces[1], (x + width / 2, 0.5, *half), " h", tip))
    each = width / len(pieces)
    for place, (_, chunk) in enumerate(pieces):
        if len(str(chunk.mb)) * LETTER < each:
            middle = _number(x + (place + 0.5) * each)
            boxes.append(f'<text x="{middle}" y="{height - 5 if height > 13 else 10}">{chunk.mb}</text>')
    return "".join(boxes)


def _box(kind: Kind, chunk: Chunk, place: tuple[float, float, float, float], more: str, tip: str) -> str:
    """A rectangle; `place` is x, y, width, height."""
    reverse = " r" if chunk.stage.pipe else ""
    x, y, width, height = place
    down = f' y="{y}"' if y else ""
    return (
        f'<rect class="{kind}{reverse}{more}" x="{_number(x)}"{down} width="{_number(width)}" '
        f'height="{height}">{tip}</rect>'
    )


def _pieces(span: Span) -> list[tuple[Kind, Chunk]]:
    """What to colour: an op, or each chunk of a cell, the forward first as Figure 5 has it."""
    if isinstance(span.what, Op):
        return [(span.what.kind, span.what.chunk)]
    return sorted(((chunk.kind, chunk) for chunk in span.what), key=lambda piece: piece[0] is not Kind.F)


def _name(span: Span) -> str:
    return str(span.what) if isinstance(span.what, Op) else "&".join(map(str, span.what))


def _axis(whole: float, scale: float, height: float, factor: float, unit: str) -> Iterator[str]:
    """A tick at round numbers every 80 pixels or more."""
    least = 80 / scale * factor
    power = 10.0 ** math.floor(math.log10(least))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= least * (1 - 1e-9))
    for place in range(math.floor(whole * factor / step + 1e-9) + 1):
        x = _number(LEFT + place * step / factor * scale)
        yield f'<line x1="{x}" x2="{x}" y1="4" y2="{_number(height)}"/>'
        label = f"{place * step:.6g} {unit}".rstrip()
        yield f'<text class="m" x="{x}" y="{_number(height + 12)}">{escape(label)}</text>'


def _legend(spans: Sequence[Span], top: float) -> Iterator[str]:
    kinds = {kind for span in spans for kind, _ in _pieces(span)}
    x = float(LEFT)
    entries = [(f"{kind} l", MEANINGS[kind]) for kind in Kind if kind in kinds]
    if any(chunk.stage.pipe for span in spans for _, chunk in _pieces(span)):
        entries.append(("F r l", "lighter: the reverse pipe"))
    if any(len(_pieces(span)) > 1 for span in spans):
        entries.append(("", "framed halves: overlapped"))
    if len(_lanes(spans)) > 1:
        entries.append(("", "lower lane of a rank: all-to-all"))
    for look, meaning in entries:
        if look:
            yield f'<rect class="{look}" x="{_number(x)}" y="{_number(top)}" width="12" height="12"/>'
            x += 16
        yield f'<text x="{_number(x)}" y="{_number(top + 10)}">{meaning}</text>'
        x += len(meaning) * LETTER + 16


def _number(value: float) -> str:
    return f"{round(value, 2):.7g}"


def terminal(spans: Sequence[Span], ranks: int, width: int = 100, colours: bool = False) -> str:
    """A line a rank, for ops one more for their transfers; cells too short for a column are left out."""
    first, whole = _extent(spans)
    columns = max(1, width - len(f"{ranks - 1} "))
    lengths = [span.end - span.start for span in spans if span.end > span.start]
    scale = columns / whole if whole else 1.0
    if lengths and (even := math.floor(min(lengths) * scale + 1e-9)) >= 1:
        scale = even / min(lengths)  # equal cells get equally many columns
        columns = min(columns, math.floor(whole * scale + 0.5))
    lines = []
    for rank in range(ranks):
        for place, lane in enumerate(_lanes(spans)):
            label = "" if place else str(rank)
            of_lane = [span for span in spans if span.rank == rank and span.lane is lane]
            lines.append(f"{label:>{len(str(ranks - 1))}} " + _line(of_lane, first, scale, columns, colours))
    return "\n".join(lines) + "\n"


def _line(spans: Iterable[Span], first: float, scale: float, columns: int, colours: bool) -> str:
    out, at = "", 0
    for span in sorted(spans, key=lambda span: span.start):
        start = max(at, math.floor((span.start - first) * scale + 0.5))
        end = min(columns, math.floor((span.end - first) * scale + 0.5))
        if end <= start:
            continue
        out += IDLE * (start - at) + _word(span, end - start, colours)
        at = end
    return out + IDLE * (columns - at)


def _word(span: Span, columns: int, colours: bool) -> str:
    """A span's name as far as its columns allow: F7&B3', then FB, then &."""
    pieces = _pieces(span)
    if len(pieces) > 1:
        forms = ["&".join(f"{kind}{chunk.mb}" for kind, chunk in pieces), "".join(k for k, _ in pieces), "&"]
    else:
        kind, chunk = pieces[0]
        forms = [f"{kind}{chunk.mb}", *([str(chunk.mb)] if colours else []), str(kind)]
    forms.insert(0, _name(span))
    word = next(form for form in forms if len(form) <= columns or form is forms[-1])
    padded = f"{word:<{columns}}"
    if not colours:
        return padded
    if len(pieces) > 1:
        half = (columns + 1) // 2
        halves = zip(pieces, (padded[:half], padded[half:]))
        return "".join(_coloured(piece, text) for piece, text in halves)
    return _coloured(pieces[0], padded)


def _coloured(piece: tuple[Kind, Chunk], text: str) -> str:
    kind, chunk = piece
    style = "4;" if chunk.stage.pipe else ""
    return f"\x1b[{style}30;48;5;{ANSI[kind]}m{text}\x1b[0m"
