"""The report page and its picture, from runs made up: of many steps and of one, whole and not."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from counterflow.train import chart
from counterflow.train.report import SECTIONS, open_run, write_report

PNG = b"\x89PNG\r\n\x1a\n"
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "whole": lambda step: step,
    "no experts": lambda step: [step.pop(key) for key in ("load", "max_vio", "max_vio_worst", "gamma")],
    "empty load": lambda step: [step.update(load={}), step.pop("max_vio"), step.pop("max_vio_worst")],
    "no MTP": lambda step: step.update(mtp_loss=[]),
    "nothing held out": lambda step: [step.pop(key, None) for key in ("held_out_loss", "held_out_bpb")],
    "not finite": lambda step: step.update(loss=None, grad_norm=None, mtp_loss=[None], held_out_loss=None),
    "zeros": lambda step: step.update(grad_norm=0.0, lr=0.0, gamma=0.0, load={"layers.1": [0, 0]}),
    "only what must be": lambda step: [step.pop(key) for key in set(step) - {"step", "samples", "tokens"}],
}


def write_run(
    folder: Path, num_steps: int, change: Callable[[dict[str, Any]], Any] = CHANGES["whole"]
) -> Path:
    """A run of so many steps whose losses fall from 9; every fourth and the last are measured held out."""
    lines = []
    for step in range(1, num_steps + 1):
        values: dict[str, Any] = {
            "step": step,
            "samples": 16 * step,
            "tokens": 4096 * step,
            "loss": 2.125 + 7 / step,
            "mtp_loss": [3.375 + 7 / step],
            "balance_loss": 1.0,
            "grad_norm": 1 + 1 / step,
            "lr": 2.2e-4,
            "gamma": 0.001,
            "mtp_weight": 0.3,
            "batch": 16,
            "tokens_per_s": 1234.0 + step % 2,
            "step_seconds": 0.5,
            "seconds": 0.5 * step,
            "max_vio": 0.64,
            "max_vio_worst": 0.9,
            "load": {"layers.1": [30, 10, 20, 20], "layers.2": [20, 20, 20, 20]},
            "memory_bytes": 3 * 2**29,
        }
        if step % 4 == 0 or step == num_steps:
            values |= {"held_out_loss": 2.5 + 7 / step, "held_out_bpb": 1.482}
        change(values)
        lines.append(json.dumps(values) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def page_of(folder: Path) -> str:
    """The page, written anew."""
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text("utf-8")


class Tags(HTMLParser):
    """Checks that tags nest, and collects ids and what is referred to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href", "src"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run of a hundred steps."""
    return page_of(write_run(tmp_path_factory.mktemp("hundred"), 100))


def test_the_page_has_the_last_numbers(page: str) -> None:
    for number in (
        "1.482",
        "2.570 nats per token",
        "0.64",
        "1,234",
        "409.60 K",
        "50.0 s",
        "for 100 steps",
        "1.50 GiB",
    ):
        assert number in page, number
    assert page.count("<svg") == 9


@pytest.mark.parametrize("num_steps", [1, 40])
def test_tiles_are_where_the_curves_end(
    tmp_path: Path, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last value of each drawn curve, not the last step's, which scatters about it."""

    def scatter(step: dict[str, Any]) -> None:
        step |= {"loss": 3 + step["step"] % 2, "max_vio": 0.2 + 0.3 * (step["step"] % 2)}

    drawn: dict[str, list[float]] = {}
    line = chart._line

    def noted(axis: Any, tokens: Any, values: list[float], **style: Any) -> None:
        drawn.setdefault(style.get("label", ""), list(values))
        line(axis, tokens, values, **style)

    monkeypatch.setattr(chart, "_line", noted)
    page = page_of(write_run(tmp_path, num_steps, scatter))
    tiles = {label: value for value, label in re.findall(r"<b>([^<]*)</b><span>([^<]*)</span>", page)}
    assert tiles["training loss, nats per token"] == f"{drawn['training'][-1]:.3f}"
    assert tiles["MTP loss, depth 1"] == f"{drawn['MTP, depth 1'][-1]:.3f}"
    assert tiles["MaxVio, mean over layers"] == f"{drawn['mean over layers'][-1]:.2f}"
    steps = chart.window(num_steps) + 1
    last = [3 + step % 2 for step in range(1, num_steps + 1)][-steps:]
    assert drawn["training"][-1] == pytest.approx(sum(last) / len(last))
    assert ("of the last step" if steps == 1 else f"means over the last {steps} steps") in page


def test_the_colours_of_load_fit_its_spread_and_are_even_at_one() -> None:
    assert chart.load_scale([[0.9, 1.1, 1.0]]) == pytest.approx((0.9, 1.1))
    assert chart.load_scale([[0.0, 3.67]]) == pytest.approx((0.0, 3.67))
    assert chart.load_scale([[1.0, 1.0]]) == pytest.approx((0.95, 1.05)), "no noise blown up"


def test_a_long_run_gives_no_larger_a_chart() -> None:
    steps = [
        {"tokens": at, "loss": 1 / at, "held_out_loss": 2 / at} for at in range(1, 4 * chart.MOST_POINTS)
    ]
    few, many = (len(chart.losses(steps[:count])[0]) for count in (chart.MOST_POINTS, len(steps)))
    assert many < 1.2 * few


def test_what_lies_under_the_top_of_a_chart_is_seen() -> None:
    """A batch that grows in the last step: the axis ends above it."""
    from matplotlib.axes import Axes

    ends: list[float] = []
    steps = [{"tokens": step, "batch": 16 + 8 * (step == 9)} for step in range(10)]
    before = Axes.set_ylim

    def noted(self: Axes, *arguments: Any, **words: Any) -> Any:
        ends.append(before(self, *arguments, **words)[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "set_ylim", noted)
        chart.course(steps)
    assert max(ends) > 24


def test_bits_per_byte_and_nats_per_token_share_one_chart(tmp_path: Path) -> None:
    shown = SECTIONS["losses"](open_run(write_run(tmp_path, 8)))
    assert "right: bits per byte" in shown and f"nats per token × {1.482 / (2.5 + 7 / 8):.3f}" in shown
    bare = SECTIONS["losses"](open_run(write_run(tmp_path, 8, CHANGES["nothing held out"])))
    assert "bits per byte" not in bare.lower()


def test_the_page_stands_alone(page: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'<>]*", page)) <= NAMESPACES
    tags = Tags(page)
    assert len(set(tags.ids)) == len(tags.ids)
    for reference in tags.references:
        assert reference.startswith("data:image/png;base64,") or reference.removeprefix("#") in tags.ids
    assert "<script" not in page and "<link" not in page and "@import" not in page


def test_charts_take_the_pages_colours(page: str) -> None:
    drawn = page[page.index("<svg") :]
    assert "prefers-color-scheme: dark" in page and "currentColor" in drawn and "var(--accent)" in drawn
    assert not [colour for colour in (chart.INK, chart.GREY, chart.ACCENT) if colour in drawn]
    assert not re.findall(r"<text[^>]*fill: (?!currentColor)", drawn)
    assert not re.findall(r"<text(?![^>]*fill: )[^>]*>", drawn), "a text in black"


@pytest.mark.parametrize(
    ("change", "num_steps"),
    [*((change, 30) for change in CHANGES), ("whole", 2), ("zeros", 1), ("not finite", 1)],
)
def test_what_is_missing_is_left_out(tmp_path: Path, change: str, num_steps: int) -> None:
    page = page_of(write_run(tmp_path, num_steps, CHANGES[change]))
    Tags(page)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page) and "None" not in page
    assert ("<h2>Expert load" in page) == (change not in ("no experts", "empty load", "only what must be"))
    assert ("held-out bits per byte" in page) == (change not in ("nothing held out", "only what must be"))
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_a_folder_before_its_first_step(tmp_path: Path) -> None:
    assert "No step has been measured yet" in page_of(tmp_path)
    assert not (tmp_path / "picture.png").exists()


def test_text_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    folder.mkdir()
    write_run(folder, 2)
    (folder / "sample.txt").write_text("<script>alert('ä')</script>", "utf-8")
    (folder / "run.toml").write_text('name = "<i>"')
    (folder / "provenance.json").write_text(json.dumps({"cpu": "<u>fast"}))
    page = page_of(folder)
    assert "&lt;script&gt;alert(&#x27;ä&#x27;)&lt;/script&gt;" in page
    assert not [tag for tag in ("<script", "<i>", "<u>", "<b>run") if tag in page]
    assert "name = &quot;&lt;i&gt;&quot;" in page and "&lt;u&gt;fast" in page


def test_each_resume_says_where_it_ran(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    for name, cpu in (("", "cpu-A"), ("-20", "cpu-C"), ("-5", "cpu-B")):
        (tmp_path / f"provenance{name}.json").write_text(json.dumps({"cpu": cpu}))
    page = page_of(tmp_path)
    found = re.findall(r"From step \d+ on|cpu-[ABC]", page)
    assert found == ["cpu-A", "From step 5 on", "cpu-B", "From step 20 on", "cpu-C"]


def test_a_section_is_a_line_in_the_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(SECTIONS, "another", lambda run: f"<p>{len(run.steps)} steps of another</p>")
    assert "<p>3 steps of another</p>" in page_of(write_run(tmp_path, 3))


def test_load_is_that_of_the_last_tenth_relative_to_even() -> None:
    steps = [{"load": {"a": [9, 1], "b": [0, 8]}}] * 18 + [{"load": {"a": [1, 3], "b": [2, 2]}}] * 2
    assert chart.relative_load(steps) == (["a", "b"], [[0.5, 1.5], [1.0, 1.0]])


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    assert page_of(tmp_path) == page_of(tmp_path)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    page_of(write_run(tmp_path, 3))
    assert dict(matplotlib.rcParams) == before
