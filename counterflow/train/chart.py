"""The report's charts, drawn by matplotlib's object interface: no global figure, no display.

Colours of text and axes are a grey that reads on light and dark paper; figures have no background of their own.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GREY, ACCENT, SECOND, THIRD = "#8091a3", "#1098ad", "#e8590c", "#7048e8"
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
        axis.tick_params(colors=GREY, labelsize=8)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, list(axes)


def _svg(figure: Any) -> str:
    """The figure as an <svg> element, without XML prologue, date or outside references."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "counterflow", "font.family": "sans-serif"}
    ):
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    return text[text.index("<svg") :]


def _label(axis: Any, title: str, x: str = "tokens") -> None:
    axis.set_title(title, fontsize=9, color=GREY, loc="left")
    axis.set_xlabel(x, fontsize=8, color=GREY)


def _legend(axis: Any) -> None:
    axis.legend(fontsize=8, frameon=False, labelcolor=GREY)


def _values(steps: Steps, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the steps that have the key, not-finite ones as gaps."""
    rows = [step for step in steps if key in step]
    return [row["tokens"] for row in rows], [math.nan if row[key] is None else row[key] for row in rows]


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential mean, free of its start's bias."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        if not math.isnan(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight if weight else math.nan)
    return out


def _draw_losses(axis: Any, steps: Steps) -> None:
    tokens, values = _values(steps, "loss")
    axis.plot(tokens, values, color=ACCENT, alpha=0.25, linewidth=0.8)
    axis.plot(tokens, _smooth(values), color=ACCENT, linewidth=1.6, label="training")
    depths = max((len(step.get("mtp_loss") or ()) for step in steps), default=0)
    for depth in range(depths):
        rows = [step for step in steps if len(step.get("mtp_loss") or ()) > depth]
        mtp = [math.nan if row["mtp_loss"][depth] is None else row["mtp_loss"][depth] for row in rows]
        line = axis.plot([row["tokens"] for row in rows], _smooth(mtp), color=THIRD, linewidth=1.2)[0]
        line.set_alpha(1 - 0.3 * depth)
        line.set_label(f"MTP depth {depth + 1}")
    tokens, values = _values(steps, "held_out_loss")
    if tokens:
        axis.plot(tokens, values, "o-", color=SECOND, markersize=4, linewidth=0.8, label="held out")
    _label(axis, "loss, nats per token")
    _legend(axis)


def losses(steps: Steps) -> str:
    """Training loss (raw faint, smoothed), MTP losses, held-out points."""
    figure, (axis,) = _figure(1, 3.6)
    _draw_losses(axis, steps)
    return _svg(figure)


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
    axis.set_yticks(range(len(layers)), layers, fontsize=8, color=GREY)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.ax.tick_params(colors=GREY, labelsize=7)
    _label(axis, "load relative to even", "expert")


def expert_load(steps: Steps) -> str:
    """Heat map of load by layer and expert; MaxVio over the run."""
    layers, _ = relative_load(steps)
    figure, (left, right) = _figure(2, max(2.6, 0.22 * len(layers) + 1.2), (3, 2))
    _draw_load(figure, left, steps)
    for key, colour, name in (
        ("max_vio", ACCENT, "mean over layers"),
        ("max_vio_worst", SECOND, "worst layer"),
    ):
        tokens, values = _values(steps, key)
        right.plot(tokens, _smooth(values), color=colour, linewidth=1.4, label=name)
    _label(right, "MaxVio")
    _legend(right)
    return _svg(figure)


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
        axis.plot(*_values(steps, key), color=ACCENT, linewidth=1.4)
        axis.set_ylim(bottom=0)
        _label(axis, title)
    return _svg(figure)


def speed(steps: Steps) -> str:
    """Tokens per second, and the gradient's norm before clipping."""
    figure, (left, right) = _figure(2, 2.4)
    left.plot(*_values(steps, "tokens_per_s"), color=ACCENT, linewidth=1.0)
    left.set_ylim(bottom=0)
    _label(left, "tokens per second")
    right.plot(*_values(steps, "grad_norm"), color=ACCENT, linewidth=1.0)
    right.set_yscale("log")
    _label(right, "gradient norm")
    return _svg(figure)


def picture(steps: Steps, path: Path) -> None:
    """Losses beside expert load by layer, as a PNG on white."""
    has_load = any(step.get("load") for step in steps)
    figure, axes = _figure(2 if has_load else 1, 3.8)
    figure.patch.set(facecolor="white", alpha=1)
    _draw_losses(axes[0], steps)
    if has_load:
        _draw_load(figure, axes[1], steps)
    figure.savefig(path, format="png", dpi=130)
