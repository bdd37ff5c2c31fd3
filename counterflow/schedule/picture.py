"""Spans drawn as they lie in time, one row a rank: predicted and measured by the same call, as SVG or as text.

The SVG stands alone, is as wide as a page, scales, and colours by CSS class, so that thousands of spans stay small and
dark pages get a dark picture. Pictures that are compared share one axis; each begins at its own first span, since a
prediction starts at zero and a clock does not. Where spans are too many for their numbers, a frame marks the part that
is drawn once more, larger. Matplotlib was not taken: the command that draws must start in a blink, and a tooltip on
every cell says more than an axis.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from xml.sax.saxutils import escape

from counterflow.schedule.words import Chunk, Kind, Lane, Op, Span

LEFT, PLOT, RIGHT = 92, 852, 16
"""Pixels: the rows' names, the time axis, the margin."""
LINE = 20
"""Pixels of a line of text or a row."""
READABLE, LARGE = 12, 20
"""Pixels of the median chunk: below the first a part is drawn once more, where it gets the second."""
LETTER, LEGEND_LETTER = 6.2, 5.4
"""Pixels of a digit or capital, and of a letter of the legend on average."""
COLOURS = {
    Kind.F: ("#f6b756", "#fce3bb"),
    Kind.B: ("#7fb86a", "#cfe5c6"),
    Kind.I: ("#6ea8dc", "#c8dff3"),
    Kind.W: ("#b59bd6", "#e2d8f0"),
}
"""Of pipe 0 and, lighter, of pipe 1; digits in them are dark on every page."""
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1d2733", "soft": "#5d6b7a", "line": "#d0d6dd", "wait": "#eceff3"},
    "dark": {"paper": "#14191f", "ink": "#dfe6ee", "soft": "#93a1b0", "line": "#3a4550", "wait": "#262f38"},
}
"""Colours of what is no span."""
MEANINGS = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward for input",
    Kind.W: "backward for weights",
}
TRANSFERS = "dispatch, combine"
"""The name of a rank's second row."""
VISIBLE = 0.01
"""The share of the time that transfers must take to get a row: without expert ranks they are a copy or nothing."""
LONE = (Lane.COMPUTE,)
SECONDS = ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs"))
"""(from so many seconds on, factor, unit)."""
ANSI = {Kind.F: 215, Kind.B: 114, Kind.I: 111, Kind.W: 183}
"""Colours of the terminal's 256."""
IDLE = "·"
Window = tuple[float, float]
"""Start and end on the clock of a picture's spans."""


@dataclass(frozen=True)
class Picture:
    """A title, and a row a rank under it."""

    title: str
    spans: Sequence[Span]
    ranks: int
    window: Window | None = None
    """The part that is drawn; None: all."""
    frame: Window | None = None
    """The part that another picture shows larger."""

    @cached_property
    def whole(self) -> Window:
        """First start and last end."""
        return _extent(self.spans)

    @cached_property
    def shown(self) -> Window:
        """From where to where on its clock."""
        return self.window or self.whole

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """Both for ops whose transfers take time that can be seen; one for cells."""
        start, end = self.whole
        moving = sum(span.end - span.start for span in self.spans if span.lane is Lane.ALL_TO_ALL)
        return tuple(Lane) if moving > VISIBLE * self.ranks * (end - start) else LONE

    @cached_property
    def waits(self) -> bool:
        """Whether a rank computes less than all the time."""
        busy = sum(span.end - span.start for span in self.spans if span.lane is Lane.COMPUTE)
        return busy < 0.999 * self.ranks * (self.whole[1] - self.whole[0])


def svg(spans: Sequence[Span], ranks: int, title: str = "", unit: str = "s") -> str:
    """One picture; `unit` is the spans', and seconds are shown as ms or µs where they are small."""
    return compare({title: spans}, ranks, unit)


def compare(
    named: Mapping[str, Sequence[Span]], ranks: int | Mapping[str, int], unit: str = "s", theme: str = ""
) -> str:
    """Pictures under their names, one over the other on one time axis; below, if need be, their middles, larger."""
    pictures = [
        Picture(name, spans, ranks if isinstance(ranks, int) else ranks[name])
        for name, spans in named.items()
    ]
    return draw(enlarged(pictures), unit, theme)


def enlarged(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """The pictures as a panel, and where most of their spans are narrow a second one of their middles."""
    spans = [span for one in pictures for span in one.spans if span.end > span.start]
    durations = [(span.end - span.start) / len(_pieces(span)) for span in spans]
    whole = max((one.shown[1] - one.shown[0] for one in pictures), default=0.0)
    if not durations or PLOT * median(durations) / whole >= READABLE:
        return [list(pictures)]
    reach = PLOT / LARGE * median(durations) / 2
    framed, middles = [], []
    for one in pictures:
        middle = sum(one.shown) / 2
        frame = max(middle - reach, one.shown[0]), min(middle + reach, one.shown[1])
        framed.append(Picture(one.title, one.spans, one.ranks, one.window, frame))
        middles.append(Picture(f"{one.title}: the framed part".lstrip(": "), one.spans, one.ranks, frame))
    return [framed, middles]


def draw(panels: Sequence[Sequence[Picture]], unit: str = "s", theme: str = "") -> str:
    """Panels of pictures, those of a panel on one time axis; `theme` is light, dark or empty: the reader's."""
    body: list[str] = []
    top = 4.0
    for pictures in filter(None, panels):
        drawn, top = _panel(pictures, top, unit)
        body += drawn
    legend, bottom = _legend([one for pictures in panels for one in pictures], top)
    return "\n".join([*_head(LEFT + PLOT + RIGHT, bottom, theme), *body, *legend, "</svg>"]) + "\n"


def _shown(whole: float, unit: str) -> tuple[float, str]:
    """Factor and unit of the numbers shown."""
    if unit != "s":
        return 1.0, unit
    return next((factor, name) for least, factor, name in SECONDS if whole >= least)


def _extent(spans: Sequence[Span]) -> Window:
    """First start and last end."""
    first = min((span.start for span in spans), default=0.0)
    return first, max((span.end for span in spans), default=first)


def _head(width: float, height: float, theme: str) -> Iterator[str]:
    size = f"{_number(width)} {_number(height)}"
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="spans" width="{_number(width)}" '
        f'height="{_number(height)}" viewBox="0 0 {size}" font-family="sans-serif" font-size="11">'
    )
    rules = ["{max-width:100%;height:auto}"]
    rules += [f".{kind}{{fill:{full}}}.{kind}.r{{fill:{light}}}" for kind, (full, light) in COLOURS.items()]
    rules.append("rect{stroke-width:.5}.z{fill:none;stroke-width:1.5}")
    rules.append("text{pointer-events:none}.m{text-anchor:middle;font-size:10px;fill:#1d2733}")
    rules.append(".n{text-anchor:end}.s{font-size:9px}.t{font-weight:bold}")
    style = _scoped("".join(rules) + _theme(theme or "light"))
    if not theme:
        style += f"@media(prefers-color-scheme:dark){{{_scoped(_theme('dark'))}}}"
    yield f"<style>{style}</style>"
    yield '<rect class="bg" width="100%" height="100%"/>'


def _theme(name: str) -> str:
    colours = THEMES[name]
    return (
        "{{background:{paper}}}rect{{stroke:{paper}}}.bg,.h,.l{{stroke:none}}.bg{{fill:{paper}}}.w{{fill:{wait};stroke:none}}"
        ".p,.z{{stroke:{ink}}}line{{stroke:{line}}}.c{{fill:{ink}}}.a,.s{{fill:{soft}}}"
    ).format(**colours)


def _scoped(rules: str) -> str:
    """Rules for this kind of picture alone: a page has others."""
    scoped = "".join(f".spans {rule}}}".replace(" {", "{") for rule in rules.split("}") if rule)
    return scoped.replace(",.", ",.spans .")


def _panel(pictures: Sequence[Picture], top: float, unit: str) -> tuple[list[str], float]:
    """The lines of pictures on one axis, and where the next panel may begin."""
    whole = max((one.shown[1] - one.shown[0] for one in pictures), default=0.0) or 1.0
    factor, shown_unit = _shown(whole, unit)
    scale, rows = PLOT / whole, []
    under, over = [], []
    for one in pictures:
        rows.append((top + LINE * bool(one.title) - 3, 0.0))
        below, above, top = _picture(one, top, scale, factor, shown_unit)
        rows[-1] = rows[-1][0], top - 5
        under += below
        over += above
    return [*under, *_axis(whole, scale, rows, factor, shown_unit), *over], top + 1.5 * LINE


def _picture(
    one: Picture, top: float, scale: float, factor: float, unit: str
) -> tuple[list[str], list[str], float]:
    """What lies under the axis, what lies over it, and where the next may begin."""
    under, over = [], []
    if one.title:
        over.append(f'<text class="t c" x="4" y="{_number(top + 14)}">{escape(one.title)}</text>')
        top += LINE
    first, rows = one.shown[0], top
    for rank in range(one.ranks):
        over.append(f'<text class="n c" x="{LEFT - 6}" y="{_number(top + 14)}">rank {rank}</text>')
        for lane in one.lanes:
            height = LINE if len(one.lanes) == 1 else 0.75 * LINE
            box = f'width="{_number((one.shown[1] - first) * scale)}" height="{_number(height - 2)}"'
            if lane is Lane.COMPUTE:
                under.append(f'<rect class="w" x="{LEFT}" y="{_number(top)}" {box}/>')
            else:
                over.append(f'<text class="n s" x="{LEFT - 6}" y="{_number(top + 10)}">{TRANSFERS}</text>')
            over.append(f'<g class="m" transform="translate({LEFT} {_number(top)})">')
            of_lane = (span for span in one.spans if span.rank == rank and span.lane is lane)
            over += (_span(span, one, scale, factor, unit) for span in of_lane if _within(span, one))
            over.append("</g>")
            top += height
        top += 2
    if one.frame:
        x, width = LEFT + (one.frame[0] - first) * scale, (one.frame[1] - one.frame[0]) * scale
        place = f'x="{_number(x)}" y="{_number(rows - 2)}" width="{_number(width)}"'
        over.append(f'<rect class="z" {place} height="{_number(top - rows + 1)}"/>')
    return under, over, top + 6


def _within(span: Span, one: Picture) -> bool:
    """Whether anything of a span is in the part that is drawn."""
    return one.window is None or (span.end > one.window[0] and span.start < one.window[1])


def _span(span: Span, one: Picture, scale: float, factor: float, unit: str) -> str:
    """A span's boxes, cut where the picture ends, with its whole times in the tooltip."""
    first, last = one.shown
    x, end = (max(span.start, first) - first) * scale, (min(span.end, last) - first) * scale
    width, height = end - x, 18 if len(one.lanes) == 1 else 13
    times = ((time - one.whole[0]) * factor for time in (span.start, span.end))
    tip = (
        f"<title>{escape(_name(span))} {' – '.join(f'{time:.6g}' for time in times)} {unit}".rstrip()
        + "</title>"
    )
    pieces = _pieces(span)
    kind, chunk = pieces[0]
    boxes = [_box(kind, chunk, (x, 0, width, height), " p" if len(pieces) > 1 else "", tip)]
    if len(pieces) > 1:
        half = width / 2 - min(0.5, width / 8), height - 1  # inside the frame
        boxes.append(_box(*pieces[1], (x + width / 2, 0.5, *half), " h", tip))
    each = width / len(pieces)
    for place, (_, chunk) in enumerate(pieces):
        word = f"{span.what.part} {span.what.layer}" if isinstance(span.what, Op) else str(chunk.mb)
        if len(word) * LETTER < each:
            middle = _number(x + (place + 0.5) * each)
            boxes.append(f'<text x="{middle}" y="{height - 5 if height > 13 else 10}">{word}</text>')
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


def _axis(
    whole: float, scale: float, rows: Sequence[tuple[float, float]], factor: float, unit: str
) -> Iterator[str]:
    """A tick at round numbers every 80 pixels or more, through the rows of each picture."""
    least = 80 / scale * factor
    power = 10.0 ** math.floor(math.log10(least))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= least * (1 - 1e-9))
    for place in range(math.floor(whole * factor / step + 1e-9) + 1):
        x = _number(LEFT + place * step / factor * scale)
        for top, bottom in rows:
            yield f'<line x1="{x}" x2="{x}" y1="{_number(top)}" y2="{_number(bottom)}"/>'
        label = f"{place * step:.6g} {unit}".rstrip()
        yield f'<text class="m a" x="{x}" y="{_number(rows[-1][1] + 14)}">{escape(label)}</text>'


def _legend(pictures: Sequence[Picture], top: float) -> tuple[list[str], float]:
    """What is drawn and nothing else, in as many lines as it takes; and where they end."""
    lines: list[str] = []
    x = float(LEFT)
    for look, meaning in _entries(pictures):
        width = 16 * bool(look) + len(meaning) * LEGEND_LETTER
        if x > LEFT and x + width > LEFT + PLOT:
            x, top = float(LEFT), top + LINE
        if look:
            lines.append(f'<rect class="{look}" x="{_number(x)}" y="{_number(top)}" width="12" height="12"/>')
        at = _number(x + 16 * bool(look))
        lines.append(f'<text class="c" x="{at}" y="{_number(top + 10)}">{meaning}</text>')
        x += width + 18
    return lines, top + LINE


def _entries(pictures: Sequence[Picture]) -> Iterator[tuple[str, str]]:
    """(class of a box, its meaning)."""
    spans = [span for one in pictures for span in one.spans if span.lane in one.lanes]
    pieces = [piece for span in spans for piece in _pieces(span)]
    kinds = {kind for kind, _ in pieces}
    yield from ((f"{kind} l", MEANINGS[kind]) for kind in Kind if kind in kinds)
    if any(chunk.stage.pipe for _, chunk in pieces):
        yield "F r l", "lighter: in the reverse direction"
    if any(one.waits for one in pictures):
        yield "w", "waiting"
    if len(pieces) > len(spans):
        yield "", "two halves in an outline: both overlapped"
    if any(not isinstance(span.what, Op) for span in spans):
        yield "", "a number: the micro-batch"
    if any(isinstance(span.what, Op) for span in spans):
        yield "", "a word: part and layer"
    if any(one.frame for one in pictures):
        yield "", "a frame: the part that is larger below"


def _number(value: float) -> str:
    return f"{round(value, 2):.7g}"


def terminal(spans: Sequence[Span], ranks: int, width: int = 100, colours: bool = False) -> str:
    """A line a rank, for ops one more for their transfers; cells too short for a column are left out."""
    first, last = _extent(spans)
    whole, lanes = last - first, tuple(Lane) if any(isinstance(span.what, Op) for span in spans) else LONE
    columns = max(1, width - len(f"{ranks - 1} "))
    lengths = [span.end - span.start for span in spans if span.end > span.start]
    scale = columns / whole if whole else 1.0
    if lengths and (even := math.floor(min(lengths) * scale + 1e-9)) >= 1:
        scale = even / min(lengths)  # equal cells get equally many columns
        columns = min(columns, math.floor(whole * scale + 0.5))
    lines = []
    for rank in range(ranks):
        for place, lane in enumerate(lanes):
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
