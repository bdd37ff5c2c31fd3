"""The report's charts, drawn by matplotlib's object interface: no global figure, no display.

Figures have no background of their own, and in the page their three colours become its CSS variables, so that
one drawing reads on light and on dark paper. Not taken: a plotting library in JavaScript, of which every page
would carry megabytes or fetch them from elsewhere.
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
MOST_POINTS = 2000
"""Points a curve is drawn with at most; a page of a million steps stays a page."""
MOST_LABELS = 24
Steps = Sequence[dict[str, Any]]


def _figure(columns: int, height: float = 3.0, widths: Sequence[float] | None = None) -> Any:
    """(figure, axes) in the page's manner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), layout="constrained")
    figure.patch.set_alpha(0)
    ratios = {"width_ratios": widths} if widths else None
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw=ratios)[0]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.tick_params(which="both", colors=GREY, labelsize=8)
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
    axis.set_title(title, fontsize=9, color=GREY, loc="left")


def _over_tokens(axis: Any, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    _label(axis, title)
    axis.set_xlabel("tokens", fontsize=8, color=GREY)
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
        axis.legend(fontsize=8, frameon=False, labelcolor=GREY)


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


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a window about each step, of a fortieth of the run; without the lag of a running mean."""
    reach, sums, counts = len(values) // 80, [0.0], [0]
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


def _draw_losses(axis: Any, steps: Steps) -> None:
    tokens, values = _values(steps, "loss")
    _line(axis, tokens, values, alpha=0.4, linewidth=0.8, marker="")
    _line(axis, tokens, _smooth(values), linewidth=1.6, label="training")
    depths = max((len(step.get("mtp_loss") or ()) for step in steps), default=0)
    for depth in range(depths):
        rows = [step for step in steps if len(step.get("mtp_loss") or ()) > depth]
        mtp = [math.nan if row["mtp_loss"][depth] is None else row["mtp_loss"][depth] for row in rows]
        style = {"color": GREY, "linestyle": DASHES[depth % len(DASHES)], "label": f"MTP, depth {depth + 1}"}
        _line(axis, [row["tokens"] for row in rows], _smooth(mtp), **style)
    tokens, values = _values(steps, "held_out_loss")
    if tokens:
        _line(axis, tokens, values, color=INK, marker="o", linewidth=0.6, label="held out")
    _over_tokens(axis, "loss, nats per token")
    _legend(axis)


def losses(steps: Steps) -> str:
    """Training loss (raw faint, smoothed), MTP losses, held-out points."""
    figure, (axis,) = _figure(1, 3.6)
    _draw_losses(axis, steps)
    return _svg(figure, "Losses over tokens")


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


def _draw_load(figure: Any, axis: Any, steps: Steps) -> None:
    layers, table = relative_load(steps)
    image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=3, interpolation="nearest")
    shown = range(0, len(layers), -(-len(layers) // MOST_LABELS))
    axis.set_yticks(shown, [layers[index] for index in shown], fontsize=8, color=GREY)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("expert", fontsize=8, color=GREY)
    bar = figure.colorbar(image, ax=axis, pad=0.01, ticks=(0, 1, 2, 3))
    bar.ax.tick_params(colors=GREY, labelsize=8)
    bar.outline.set_visible(False)
    _label(axis, "expert load, 1 = even")


def expert_load(steps: Steps) -> str:
    """Heat map of load by layer and expert; MaxVio over the run."""
    layers, _ = relative_load(steps)
    figure, (left, right) = _figure(2, max(2.6, 0.22 * len(layers) + 1.2), (3, 2))
    _draw_load(figure, left, steps)
    for key, colour, name in (
        ("max_vio", ACCENT, "mean over layers"),
        ("max_vio_worst", GREY, "worst layer"),
    ):
        tokens, values = _values(steps, key)
        if tokens:
            _line(right, tokens, _smooth(values), color=colour, label=name)
    right.set_ylim(bottom=0)
    _over_tokens(right, "MaxVio")
    _legend(right)
    return _svg(figure, "Expert load by layer, and MaxVio")


def course(steps: Steps) -> str:
    """Learning rate, λ, γ and batch over the run."""
    figure, axes = _figure(4, 2.2)
    named = (
        ("lr", "learning rate"),
        ("mtp_weight", "λ, MTP weight"),
        ("gamma", "γ, bias speed"),
        ("batch", "batch"),
    )
    for axis, (key, title) in zip(axes, named):
        _line(axis, *_values(steps, key))
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="plain")
        _over_tokens(axis, title)
        axis.xaxis.get_major_locator().set_params(nbins=3)
        axis.yaxis.get_major_locator().set_params(nbins=4)
    return _svg(figure, "Learning rate, λ, γ and batch")


def speed(steps: Steps) -> str:
    """Tokens per second, and the gradient's norm before clipping."""
    figure, (left, right) = _figure(2, 2.4)
    _line(left, *_values(steps, "tokens_per_s"))
    left.set_ylim(bottom=0)
    _over_tokens(left, "tokens per second")
    _line(right, *_values(steps, "grad_norm"))
    right.set_ylim(bottom=0)
    _over_tokens(right, "gradient norm, before clipping")
    return _svg(figure, "Tokens per second and gradient norm")


def picture(steps: Steps, path: Path) -> None:
    """Losses beside expert load by layer, as a PNG on white."""
    has_load = any(step.get("load") for step in steps)
    figure, axes = _figure(2 if has_load else 1, 3.8)
    figure.patch.set(facecolor="white", alpha=1)
    _draw_losses(axes[0], steps)
    if has_load:
        _draw_load(figure, axes[1], steps)
    figure.savefig(path, format="png", dpi=130)
