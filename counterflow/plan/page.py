"""A plan as one HTML page: numbers, layouts, a step drawn, memory by rank, what was assumed. Nothing is fetched."""

from collections.abc import Sequence
from html import escape

from counterflow.plan import chart, report
from counterflow.plan.answer import Answer
from counterflow.plan.search import cell_spans, taken
from counterflow.schedule import picture
from counterflow.units import bytes_, seconds

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #ffffff; --soft: #5d6b7a; --line: #d9dfe6;
  --accent: #0b7285 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe6ee; --paper: #14191f; --soft: #93a1b0; --line: #2b343e; --accent: #3bc9db } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; color: var(--accent) }
.numbers { display: flex; flex-wrap: wrap; gap: 1.2rem 2.4rem; margin: 1.2rem 0 }
.numbers b { display: block; font-size: 1.35rem; font-weight: 600 }
.numbers span, .note { color: var(--soft); font-size: .85rem }
.wide { overflow-x: auto } .wide svg { min-width: 52rem } svg { color: var(--soft) }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600 } td, th { border-top: 1px solid var(--line); padding: .25rem 1rem .25rem 0 }
.fitted, .assumed { color: #c92a2a } .measured { color: #2b8a3e }
"""


def page(answer: Answer, name: str) -> str:
    """The whole page."""
    title = f"{escape(name)} on {escape(report.cards(answer))}"
    sections = [
        f"<h1>{title}</h1>{_numbers(answer)}",
        f"<h2>Layouts, the best first</h2>{_table(report.layouts(answer))}{_fell_out(answer)}",
        f"<h2>One step of the first</h2>{_table(report.step_rows(answer))}",
        f"<h2>Its schedule</h2>{_timeline(answer)}",
        f"<h2>One layer with experts, op by op</h2>{_table(report.op_rows(answer))}",
        f"<h2>Memory by rank at its peak</h2>{_memory(answer)}",
        f"<h2>The whole run</h2>{_table(report.price_rows(answer))}",
        f"<h2>Assumptions</h2>{_assumptions(answer)}",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _numbers(answer: Answer) -> str:
    step, cost, unit = answer.step, answer.price, answer.hardware.unit
    paid = report.dollars(cost.dollars), f"at ${cost.dollars / cost.gpu_hours:.2f} a {unit} hour"
    shown = (
        (f"{step.seconds:.2f} s", "a step"),
        (f"{step.tokens_per_s:.0f}", f"tokens/s of a {unit}"),
        (f"{100 * step.mfu():.1f} %", "MFU, causal"),
        (bytes_(max(one.total for one in answer.memory)), "peak memory"),
        (seconds(cost.days_with_failures * 86400), "the run"),
        *([paid] if cost.dollars else []),
        (report.energy(cost.energy_mwh), "energy"),
    )
    items = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in shown)
    layout = (
        f"<p>{escape(str(step.costs.layout))}; {escape(answer.job.precision)}; predicted, not measured.</p>"
    )
    return f'<div class="numbers">{items}</div>{layout}'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _fell_out(answer: Answer) -> str:
    reasons = "".join(
        f"<li>{times} × {escape(reason)}</li>" for reason, times in answer.found.fell_out.most_common()
    )
    fit = report.fitting(answer.found.fitting)
    return f'<p class="note">{fit}. Others fell out:</p><ul class="note">{reasons}</ul>'


def _timeline(answer: Answer) -> str:
    """A step of as few micro-batches as show every phase: hundreds more would look like its middle."""
    layout = answer.step.costs.layout
    whole = sum(answer.step.schedule.microbatches)
    more = 2 if answer.step.schedule.pipes > 1 else layout.pipeline
    count = min(whole, 2 * layout.pipeline + more)
    count = taken(layout, count, whole)
    schedule, spans = cell_spans(answer.step.costs, count)
    part = report.microbatches(count) if count == whole else f"{count} of the step's {whole} micro-batches"
    note = f"{part}, cell by cell; names and times of cells appear under the pointer."
    return f'<p class="note">{note}</p><div class="wide">{picture.svg(spans, schedule.ranks)}</div>'


def _memory(answer: Answer) -> str:
    names, room = report.MEMORY, answer.hardware.card.memory_bytes / 2**30
    bars = {f"rank {one.rank}": [getattr(one, name) / 2**30 for name in names] for one in answer.memory}
    return f'<div class="wide">{chart.stacked(names, bars, room, "GiB")}</div>'


def _assumptions(answer: Answer) -> str:
    head, *rows = report.assumption_rows(answer)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = [escape(cell) for cell in row]
        cells[2] = f'<span class="{cells[2].split()[0]}">{cells[2]}</span>'
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
