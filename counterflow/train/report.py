"""One page for a run, to open in a browser: settings, losses, expert load, speed; and one picture.

Self-contained: charts are SVG from matplotlib set into the page, styles are inline, nothing is fetched, so
that the file can be mailed or kept. A section is a function of what the folder holds that gives HTML, and a
line in SECTIONS; those without data give nothing. Not taken: a template
language, for a page of seven functions.
"""

import html
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterflow.notation import from_json
from counterflow.train import chart
from counterflow.train.changes import recorded
from counterflow.train.metrics import read_light
from counterflow.train.timeline import TIMELINE
from counterflow.units import bytes_, count, seconds

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #ffffff; --soft: #5d6b7a; --line: #d9dfe6;
  --accent: #0b7285 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe6ee; --paper: #14191f; --soft: #93a1b0; --line: #2b343e; --accent: #3bc9db } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; color: var(--accent) }
.numbers { display: flex; flex-wrap: wrap; gap: 1.2rem 2.4rem; margin: 1.2rem 0 }
.numbers b { display: block; font-size: 1.35rem; font-weight: 600 } .numbers span, .note { color: var(--soft);
  font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .6rem 1.6rem }
.charts svg { max-width: 45rem } .scroll { overflow-x: auto } .scroll svg { min-width: 52rem }
svg { width: 100%; height: auto; color: var(--soft) } svg text { font-family: inherit !important }
pre { background: color-mix(in srgb, var(--soft) 10%, transparent);
  padding: .9rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .82rem }
table { border-collapse: collapse; font-size: .88rem }
td { border-top: 1px solid var(--line); padding: .25rem 1rem .25rem 0 }
summary { cursor: pointer; color: var(--accent) }
"""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    steps: list[dict[str, Any]]
    """As `read_light` gives them."""
    provenance: Mapping[int, Mapping[str, str]]
    """By the step it was started or resumed from; 0 is the start."""
    settings: str
    sample: str
    timeline: str
    """An SVG."""


def open_run(folder: Path) -> Run:
    """Read it; what is missing is empty."""

    def text(name: str) -> str:
        path = folder / name
        return path.read_text("utf-8") if path.is_file() else ""

    return Run(
        folder,
        read_light(folder),
        dict(sorted(_origins(folder))),
        text("run.toml"),
        text("sample.txt"),
        text(TIMELINE),
    )


def _origins(folder: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    for path in folder.glob("provenance*.json"):
        if name := re.fullmatch(r"provenance(?:-(\d+))?", path.stem):
            with suppress(ValueError):
                yield int(name[1] or 0), from_json(path.read_bytes())


def write_report(folder: Path) -> Path:
    """Write report.html and picture.png from what the folder holds now; the page's path."""
    run = open_run(folder)
    body = "".join(section(run) for section in SECTIONS.values())
    title = html.escape(folder.resolve().name)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, "utf-8")
    if run.steps:
        chart.picture(run.steps, folder / "picture.png")
    return path


def headline(run: Run) -> str:
    """The run's name and its last numbers."""
    title = f"<h1>{html.escape(run.folder.resolve().name)}</h1>"
    if not run.steps:
        return title + '<p class="note">No step has been measured yet.</p>'
    last, numbers = run.steps[-1], []
    measured = [step for step in run.steps if step.get("held_out_bpb") is not None]
    if measured:
        newest = measured[-1]
        nats = f", {newest['held_out_loss']:.3f} nats per token" if newest.get("held_out_loss") else ""
        numbers.append(
            (f"{newest['held_out_bpb']:.3f}", f"held-out bits per byte{nats}, step {newest['step']}")
        )
    numbers += [(value, label) for value, label in _ends(run.steps)]
    speeds = [step["tokens_per_s"] for step in run.steps if step.get("tokens_per_s") is not None]
    if speeds:
        numbers.append((f"{statistics.median(speeds):,.0f}", "tokens per second, median"))
    numbers.append((count(float(last["tokens"])), "tokens"))
    numbers.append((seconds(last.get("seconds", 0.0)), f"for {last['step']} steps"))
    if last.get("memory_bytes"):
        numbers.append((bytes_(last["memory_bytes"]), "peak memory"))
    cells = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in numbers)
    return f'{title}<div class="numbers">{cells}</div>{_averaged(len(run.steps))}'


def _ends(steps: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Where the curves of the plots end, with what they are."""
    yield _end(chart.smoothed(steps, "loss"), 3), "training loss, nats per token"
    for depth in range(max((len(step.get("mtp_loss") or ()) for step in steps), default=0)):
        yield _end(chart.smoothed(steps, "mtp_loss", depth), 3), f"MTP loss, depth {depth + 1}"
    if any("max_vio" in step for step in steps):
        yield _end(chart.smoothed(steps, "max_vio"), 2), "MaxVio, mean over layers"


def _end(curve: tuple[list[float], list[float]], digits: int) -> str:
    """The last value of a curve."""
    return _number(curve[1][-1] if curve[1] and math.isfinite(curve[1][-1]) else None, digits)


def _averaged(num_steps: int) -> str:
    """What the numbers of training are means of."""
    steps = min(chart.window(num_steps), num_steps - 1) + 1
    many = (
        f"means over the last {steps} steps, as the curves are smoothed" if steps > 1 else "of the last step"
    )
    return f'<p class="note">Training and MTP loss and MaxVio are {many}.</p>'


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def losses(run: Run) -> str:
    """Losses over tokens."""
    note = "The faint line is every step, the strong one their mean. "
    if any(step.get("mtp_loss") for step in run.steps):
        note += (
            "An MTP module predicts the token behind the next one and is given that next one; with a layer more than "
            "the main head it may lie below the training loss. "
        )
    if factor := chart.bits_per_nat(run.steps):
        note += (
            "Held-out points are measured on documents never trained on, which may be harder or easier than the "
            "others; those on the way on a sample of them. "
            f"Bits per byte are nats per token × {factor:.3f}: 1 / ln 2 over the held-out text's bytes per token."
        )
    return _chart("Losses", chart.losses, run, note)


def expert_load(run: Run) -> str:
    """Load by layer and expert, and MaxVio over the run."""
    if not any(step.get("load") for step in run.steps):
        return ""
    note = (
        "Load: each expert's tokens over the last tenth of the run as a multiple of its layer's mean; white is even, "
        "red more, blue less. MaxVio: how far the busiest expert lies above the mean; 0 is perfect balance."
    )
    return _chart("Expert load", chart.expert_load, run, note)


def course(run: Run) -> str:
    """Rate, λ, γ, batch."""
    return _chart("What changed over the run", chart.course, run, "")


def speed(run: Run) -> str:
    """Tokens per second and gradient norm."""
    return _chart("Speed and gradient", chart.speed, run, "")


def timeline(run: Run) -> str:
    """What the pipeline did in one step, over what the simulator predicts; nothing for one process."""
    if not run.timeline:
        return ""
    return (
        f'<h2>A step of the pipeline</h2><div class="scroll">{run.timeline}</div><p class="note">Names and times of '
        "boxes appear under the pointer. The prediction is simulated from the mean time of each kind of op in this "
        "step. trace.json beside this page opens in Perfetto (ui.perfetto.dev).</p>"
    )


def _chart(title: str, draw: Callable[[list[dict[str, Any]]], list[str]], run: Run, note: str) -> str:
    """Panels beside each other where the page is wide enough."""
    if not run.steps:
        return ""
    text = f'<p class="note">{note}</p>' if note else ""
    return f'<h2>{title}</h2><div class="charts">{"".join(draw(run.steps))}</div>{text}'


def sample(run: Run) -> str:
    """What the model writes."""
    return f"<h2>A sample</h2><pre>{html.escape(run.sample)}</pre>" if run.sample else ""


def settings(run: Run) -> str:
    """The whole configuration, and where the numbers came from."""
    table = "".join(_origin(step, facts) for step, facts in run.provenance.items())
    table = f"<h2>Where it was run</h2>{table}" if table else ""
    changed = "".join(
        f'<p class="note">From step {change.step} on {html.escape(str(change))}.</p>'
        for change in recorded(run.folder)
    )
    text = (
        f"<details><summary>run.toml</summary><pre>{html.escape(run.settings)}</pre></details>"
        if run.settings
        else ""
    )
    return f"{table}<h2>Settings</h2>{changed}{text}" if text else table


def _origin(step: int, facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return (f'<p class="note">From step {step} on</p>' if step else "") + f"<table>{rows}</table>"


SECTIONS: Mapping[str, Callable[[Run], str]] = {
    "headline": headline,
    "losses": losses,
    "sample": sample,
    "expert load": expert_load,
    "timeline": timeline,
    "course": course,
    "speed": speed,
    "settings": settings,
}
