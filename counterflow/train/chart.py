"""The report's charts, drawn by matplotlib's object interface: no global figure, no display.

Figures have no background of their own, and in the page their three colours become its CSS variables, so that
one drawing reads on light and on dark paper. Every panel is a drawing of its own, about as wide as a telephone: a page
sets them side by side or one below the other, and letters stay legible. Not taken: a plotting library in JavaScript, of
which every page would carry megabytes or fetch them from elsewhere.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, GREY, ACCENT = "#1d2733", "#5d6b7a", "#0b7285"
IN_PAGE = {INK: "var(--ink)", GREY: "currentColor", ACCENT: "var(--accent)"}
DASHES = ("--", ":", "-.")
MOST_POINTS = 800
"""Points a curve is drawn with at most, about a pixel each; a page of a million steps stays a page."""
MOST_MARKS = 40
"""Held-out points that get a mark each."""
PANEL, LARGE = (4.2, 2.4), (5.4, 3.0)
"""Inches."""
LETTERS = 7.5
"""Points."""
MOST_LABELS = 24
Steps = Sequence[dict[str, Any]]


def _figure(panels: int = 1, size: tuple[float, float] = PANEL) -> Any:
    """(figure, axes) in the page's manner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.tick_params(which="both", colors=GREY, labelsize=LETTERS)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, list(axes)


def _svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element, without XML prologue, date, outside references or repeated ids."""
    import matplotlib

    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = re.sub(
        r' id="[A-Za-z0-9.]+_\d+"', "", text[text.index("<svg") :]
    )  # of groups; nothing refers to them
    for colour, variable in IN_PAGE.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _label(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=LETTERS + 0.5, color=GREY, loc="left")


def _over_tokens(axis: Any, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    _label(axis, title)
    axis.set_xlabel("tokens", fontsize=LETTERS, color=GREY)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """A count as an axis has room for: 1.5 M."""
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g} {sign}"
    return f"{value:.4g}"


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=LETTERS, frameon=False, labelcolor=GREY)


def _line(axis: Any, tokens: Sequence[float], values: Sequence[float], **style: Any) -> None:
    """A curve; of few points, with a mark at each, since a line through one point cannot be seen."""
    stride = -(-len(tokens) // MOST_POINTS) or 1
    style = {
        "color": ACCENT,
        "linewidth": 1.2,
        "marker": "o" if len(tokens) < 3 else "",
        "markersize": 4,
    } | style
    axis.plot(tokens[::stride], values[::stride], **style)


def _values(steps: Steps, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the steps that have the key, not-finite ones as gaps."""
    rows = [step for step in steps if key in step]
    return [row["tokens"] for row in rows], [math.nan if row[key] is None else row[key] for row in rows]


def window(count: int) -> int:
    """Steps on either side of one over which so many steps' curves are smoothed: of a short run few."""
    return max(count // 80, min(5, count // 10))


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a window about each step, of a fortieth of the run; without the lag of a running mean."""
    reach, sums, counts = window(len(values)), [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (0.0 if math.isnan(value) else value))
        counts.append(counts[-1] + (not math.isnan(value)))
    out = []
    for index in range(len(values)):
        near = min(reach, index)  # narrow at the steep start; one-sided at the end, which is what people read
        first, end = index - near, min(index + near + 1, len(values))
        number = counts[end] - counts[first]
        out.append((sums[end] - sums[first]) / number if number else math.nan)
    return out


def smoothed(steps: Steps, key: str, depth: int | None = None) -> tuple[list[float], list[float]]:
    """Tokens and values as a curve shows them; `depth` picks out of a list."""
    if depth is None:
        tokens, values = _values(steps, key)
        return tokens, _smooth(values)
    rows = [step for step in steps if len(step.get(key) or ()) > depth]
    found = [math.nan if row[key][depth] is None else row[key][depth] for row in rows]
    return [row["tokens"] for row in rows], _smooth(found)


def _draw_losses(axis: Any, steps: Steps) -> None:
    tokens, values = _values(steps, "loss")
    _line(axis, tokens, values, alpha=0.4, linewidth=0.8, marker="")
    _line(axis, *smoothed(steps, "loss"), linewidth=1.6, label="training")
    depths = max((len(step.get("mtp_loss") or ()) for step in steps), default=0)
    for depth in range(depths):
        style = {"color": GREY, "linestyle": DASHES[depth % len(DASHES)], "label": f"MTP, depth {depth + 1}"}
        _line(axis, *smoothed(steps, "mtp_loss", depth), **style)
    tokens, values = _values(steps, "held_out_loss")
    if tokens:
        marker = "o" if len(tokens) <= MOST_MARKS else ""
        _line(axis, tokens, values, color=INK, marker=marker, linewidth=0.6, label="held out")
    _over_tokens(axis, "loss, nats per token" + ("; right: bits per byte" if _in_bits(axis, steps) else ""))
    _legend(axis)


def bits_per_nat(steps: Steps) -> float | None:
    """Bits per byte of a loss of 1 nat per token, by the newest held-out measurement."""
    both = [(step.get("held_out_bpb"), step.get("held_out_loss")) for step in reversed(steps)]
    return next((bits / loss for bits, loss in both if bits and loss), None)


def _in_bits(axis: Any, steps: Steps) -> bool:
    """A second scale on the right, if anything was held out."""
    factor = bits_per_nat(steps)
    if factor is None:
        return False
    right = axis.secondary_yaxis("right", functions=(lambda nats: nats * factor, lambda bits: bits / factor))
    right.tick_params(which="both", colors=GREY, labelsize=LETTERS)
    right.spines["right"].set_color(GREY)
    return True


def losses(steps: Steps) -> list[str]:
    """Training loss (raw faint, smoothed), MTP losses, held-out points."""
    figure, (axis,) = _figure(size=LARGE)
    _draw_losses(axis, steps)
    return [_svg(figure, "Losses over tokens")]


def relative_load(steps: Steps) -> tuple[list[str], list[list[float]]]:
    """Layers, and for each its experts' load over the last tenth of the steps, 1 being even."""
    rows = [step["load"] for step in steps if step.get("load")]
    rows = rows[-max(1, len(rows) // 10) :]
    layers, table = list(rows[-1]), []
    for layer in layers:
        summed = [sum(counts) for counts in zip(*(row[layer] for row in rows if layer in row))]
        mean = sum(summed) / len(summed) or 1.0
        table.append([value / mean for value in summed])
    return layers, table


def load_scale(table: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The colours' ends: as far below 1 as above, and as far as the loads go, but no less than 0."""
    reach = max(0.05, *(abs(value - 1.0) for row in table for value in row))
    return max(0.0, 1.0 - reach), 1.0 + reach


def _draw_load(figure: Any, axis: Any, steps: Steps) -> None:
    from matplotlib.colors import TwoSlopeNorm

    layers, table = relative_load(steps)
    low, high = load_scale(table)
    norm = TwoSlopeNorm(vmin=low, vcenter=1.0, vmax=high)
    image = axis.imshow(table, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    shown = range(0, len(layers), -(-len(layers) // MOST_LABELS))
    axis.set_yticks(shown, [layers[index] for index in shown], fontsize=LETTERS, color=GREY)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("expert", fontsize=LETTERS, color=GREY)
    bar = figure.colorbar(image, ax=axis, pad=0.01, ticks=[low, (low + 1) / 2, 1, (1 + high) / 2, high])
    bar.ax.set_yticklabels([f"{tick:.3g}" for tick in bar.get_ticks()])
    bar.ax.tick_params(colors=GREY, labelsize=LETTERS)
    bar.outline.set_visible(False)
    _label(axis, "expert load, 1 = even")


def expert_load(steps: Steps) -> list[str]:
    """Heat map of load by layer and expert; MaxVio over the run."""
    layers, _ = relative_load(steps)
    size = PANEL[0], max(PANEL[1], 0.2 * min(len(layers), MOST_LABELS) + 1.0)
    load, (left,) = _figure(size=size)
    _draw_load(load, left, steps)
    balance, (right,) = _figure(size=size)
    for key, colour, name in (
        ("max_vio", ACCENT, "mean over layers"),
        ("max_vio_worst", GREY, "worst layer"),
    ):
        tokens, values = smoothed(steps, key)
        if tokens:
            _line(right, tokens, values, color=colour, label=name)
    right.set_ylim(bottom=0)
    _over_tokens(right, "MaxVio")
    _legend(right)
    return [_svg(load, "Expert load by layer"), _svg(balance, "MaxVio over tokens")]


COURSE = {
    "lr": "learning rate",
    "mtp_weight": "λ, MTP weight",
    "gamma": "γ, bias speed",
    "batch": "batch, sequences",
}
SPEED = {"tokens_per_s": "tokens per second", "grad_norm": "gradient norm, before clipping"}


def course(steps: Steps) -> list[str]:
    """Learning rate, λ, γ and batch over the run."""
    return [_over_the_run(steps, key, title) for key, title in COURSE.items()]


def speed(steps: Steps) -> list[str]:
    """Tokens per second, and the gradient's norm before clipping."""
    return [_over_the_run(steps, key, title) for key, title in SPEED.items()]


def _over_the_run(steps: Steps, key: str, title: str) -> str:
    """One quantity from 0 to above its highest value."""
    figure, (axis,) = _figure()
    tokens, values = _values(steps, key)
    _line(axis, tokens, values)
    known = [value for value in values if not math.isnan(value)]
    axis.set_ylim(0, 1.1 * max(known, default=0.0) or None)
    axis.ticklabel_format(axis="y", style="plain")
    _over_tokens(axis, title)
    axis.yaxis.get_major_locator().set_params(nbins=5)
    return _svg(figure, title)


def picture(steps: Steps, path: Path) -> None:
    """Losses beside expert load by layer, as a PNG on white."""
    has_load = any(step.get("load") for step in steps)
    figure, axes = _figure(2 if has_load else 1, (9.6, 3.8))
    figure.patch.set(facecolor="white", alpha=1)
    _draw_losses(axes[0], steps)
    if has_load:
        _draw_load(figure, axes[1], steps)
    figure.savefig(path, format="png", dpi=130)
