"""`counterflow schedule`: the documented example, the comparisons, the files and the refusals."""

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from counterflow.cli import main
from counterflow.schedule import SCHEDULES, trace
from counterflow.schedule.measure import idle
from counterflow.schedule.simulate import Costs, simulate, simulate_ops
from counterflow.schedule.text import from_text, to_csv, to_text
from tests.schedule.cases import equal_plans

pytestmark = pytest.mark.pure

EXAMPLE = ["schedule", "dualpipe", "--ranks", "8", "--microbatches", "20"]


def printed(capsys, *words: str) -> str:
    assert main(["schedule", *words]) == 0
    return capsys.readouterr().out


def rows(text: str, columns: int) -> dict[str, list[str]]:
    """Lines of a table by their first word."""
    found: dict[str, list[str]] = {}
    for line in filter(str.strip, text.splitlines()):
        found.setdefault(line.split()[0], line.split()[1 : columns + 1])
    return found


def test_fig5_the_documented_example(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(EXAMPLE) == 0
    out = capsys.readouterr().out
    assert out.startswith(to_text(SCHEDULES["dualpipe"](8, 20)))
    assert "0 F0F1F2F3F4F5F6F0I0W0F1I1W1F2I2W2F3F7&B3'······F4'&B0F8&B4'" in out
    assert "\n3       3 4'    60     6     9.1            9       9  4\n" in out
    assert (
        "dualpipe, 8 ranks, 20 micro-batches: makespan 66, of which a rank is idle 6 on average (9.1%)" in out
    )
    assert "The bubble's formula (Table 2) gives 6 idle: exact." in out


def test_fig5_is_what_is_shown_where_nothing_is_named(capsys):
    assert printed(capsys) == printed(capsys, "dualpipe", "--ranks", "8", "--microbatches", "20")


def test_it_is_quick_and_imports_no_torch():
    """The best of three, since a busy machine is not the command's fault."""
    heavy = "sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    code = f"import sys\nfrom counterflow.cli import main\nassert main({EXAMPLE}) == 0\nprint({heavy})"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert done.stdout.rstrip().endswith("[]")
    assert min(times) < 2.0


def test_several_are_compared_at_an_equal_number_of_stages(capsys):
    out = printed(capsys, "1f1b", "interleaved-1f1b", "zb1p", "dualpipe", "dualpipev", "--microbatches", "24")
    found = rows(out, 8)
    assert found["1f1b"] == ["8", "8", "93", "21", "22.6", "8", "1x", "21"]
    assert found["zb1p"] == ["8", "8", "79", "7", "8.9", "8", "1x", "7"]
    assert found["dualpipe"] == ["8", "8", "78", "6", "7.7", "9", "2x", "6"]
    assert found["dualpipev"] == ["4", "8", "150", "6", "4.0", "9", "2x", "6"]
    assert found["interleaved-1f1b"] == ["8", "16", "82.5", "10.5", "12.7", "11.5", "1x", "10.5"]
    assert "dualpipev is compared at an equal number of stages, as in Table 2: 8 stages on 4 ranks" in out
    assert "Finer stages cost less in proportion" in out


def test_tab2_formula_and_simulation(capsys):
    out = printed(capsys, "--table2", "--ranks", "8", "--microbatches", "20")
    found = rows(out, 7)
    assert found["1f1b"] == ["8", "21", "21", "8", "8", "1x", "exact"]
    assert found["zb1p"] == ["8", "7", "7", "8", "8", "1x", "exact"]
    assert found["dualpipe"] == ["8", "6", "6", "9", "9", "2x", "exact"]
    assert found["dualpipev"] == ["4", "6", "6", "9", "9", "2x", "exact"]
    assert "PP 8, 20 micro-batches, F 1, B 2, W 1, F&B 3, simulated." in out and "measurement" not in out


def test_tab2_of_other_costs_says_how_exact(capsys):
    out = printed(capsys, "--table2", "--costs.b", "2.2", "--costs.w", "0.8", "--costs.pair", "2.9")
    assert "approximate: exact where B - W = F and W <= F" in out and "8.1" in rows(out, 3)["dualpipe"]
    out = printed(capsys, "--table2", "--costs.pair", "2.5", "--latency", "0.1")
    assert "exact on the middle ranks alone, since F&B < F + B; latency 0 is assumed" in out


def test_tab2_with_a_measured_run(capsys, tmp_path):
    schedule = SCHEDULES["dualpipe"](4, 8)
    measured = simulate(schedule, Costs(0.1, 0.2, 0.1), latency=0.01)
    (tmp_path / "trace.json").write_text(trace.write(measured))
    svg = tmp_path / "both.svg"
    out = printed(capsys, "--table2", "--run", str(tmp_path), "--svg", str(svg))
    assert rows(out, 10)["dualpipe"][:5] == ["4", "0.2", "0.2", f"{idle(measured, 4)[0]:.4g}", "5"]
    assert rows(out, 8)["dualpipe"][-2:] == ["2x", "exact"]
    assert rows(out, 4)["1f1b"] == ["4", "0.9", "0.9", "-"]
    assert "PP 4, 8 micro-batches, F 0.1, B 0.2, W 0.1, F&B 0.3; seconds, the run's means." in out
    words = [element.text for element in ElementTree.parse(svg).iter() if element.tag.endswith("text")]
    assert "predicted" in words and "measured" in words


def test_tab2_with_a_run_of_ops(capsys, tmp_path):
    schedule = SCHEDULES["dualpipev"](2, 6)
    spans = simulate_ops(schedule, equal_plans(schedule), lambda rank, op: 1e-3)
    (tmp_path / "trace.json").write_text(trace.write(spans))
    assert rows(printed(capsys, "--table2", "--run", str(tmp_path)), 4)["dualpipev"][0] == "2"


def test_tab2_without_a_trace_says_so(capsys, tmp_path):
    out = printed(capsys, "--table2", "--run", str(tmp_path))
    assert f"{tmp_path} has no trace.json, so nothing is measured here." in out and "measurement" not in out


def test_files_are_written_and_read_back(capsys, tmp_path):
    svg, events, csv = (tmp_path / name for name in ("a.svg", "a.json", "a.csv"))
    out = printed(
        capsys,
        *("dualpipev", "--ranks", "4", "--microbatches", "10", "--text"),
        *("--svg", str(svg), "--trace", str(events), "--csv", str(csv)),
    )
    schedule = SCHEDULES["dualpipev"](4, 10)
    assert out == to_text(schedule) and from_text(out) == schedule
    assert csv.read_text() == to_csv(schedule)
    assert trace.read(events.read_text()) == simulate(schedule)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    (tmp_path / "a.txt").write_text(out)
    for name in ("a.txt", "a.csv"):
        out = printed(capsys, str(tmp_path / name))
        assert "4 ranks, 10 micro-batches: makespan 66, of which a rank is idle 6 on average (9.1%)" in out
    assert rows(printed(capsys, "1f1b", str(tmp_path / "a.txt")), 4)["dualpipev"] == ["4", "8", "66", "6"]


def test_a_comparison_is_drawn_one_over_the_other(tmp_path, capsys):
    printed(
        capsys, "1f1b", "dualpipe", "--ranks", "4", "--microbatches", "8", "--svg", str(tmp_path / "a.svg")
    )
    words = [e.text for e in ElementTree.parse(tmp_path / "a.svg").iter() if e.tag.endswith("text")]
    assert "1f1b, 4 ranks, 8 micro-batches" in words and "dualpipe, 4 ranks, 8 micro-batches" in words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dualpip"], "'dualpip' is no schedule; did you mean 'dualpipe'?"),
        (["dualpipe", "--ranks", "7"], "must be even: take 8"),
        (["dualpipe", "--microbatches", "14"], "take 16"),
        (["1f1b", "dualpipev", "--ranks", "7"], "as many stages on fewer ranks"),
        (["1f1b", "--stages-per-rank", "3"], "1F1B has one"),
        (["nowhere/mine.txt"], "the schedule 'nowhere/mine.txt' cannot be read"),
        (["1f1b", "--rank", "3"], "Unrecognized options: --rank"),
        (["1f1b", "--ranks", "x"], "Error parsing --ranks"),
        (["1f1b", "--ranks"], "Missing value for argument '--ranks'"),
        (["1f1b", "--costs.f", "-1"], "--costs.f is -1; it must be a number from 0 on"),
        (["1f1b", "--costs.w", "3"], "b is the whole backward with its weight part"),
        (["1f1b", "--latency", "nan"], "--latency is nan"),
        (["1f1b", "zb1p", "--csv", "x.csv"], "--csv is for one schedule, and 2 are named"),
        (["dualpipe", "--csv", "x.csv"], "PyTorch's CSV knows one pipe"),
        (
            ["1f1b", "--svg", "/proc/nowhere/x.svg"],
            "'/proc/nowhere/x.svg' cannot be written (No such file or directory)",
        ),
        (["1f1b", "--run", "runs/tiny"], "--run is for Table 2's measured column"),
        (["--table2", "--run", "/nowhere"], "--run is '/nowhere', which is no folder"),
        (["--table2", "--ranks", "5"], "Table 2's PP must be even: take 6"),
        (["--table2", "--svg", "x.svg"], "--svg has nothing to draw"),
        (["1f1b", "--svg", "x.svg", "--theme", "drk"], "did you mean 'dark'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["schedule", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("counterflow: ") and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_of_the_documents_is_what_is_drawn(capsys, tmp_path, theme):
    """`make pictures` was run after the last change of the drawing."""
    drawn = tmp_path / "drawn.svg"
    printed(capsys, "dualpipe", "--theme", theme, "--svg", str(drawn))
    kept = Path(__file__).parents[2] / "docs" / "pictures" / f"dualpipe-{theme}.svg"
    assert drawn.read_text() == kept.read_text()


def test_an_unsound_file_is_shown_with_an_arrow(capsys, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("mine, 2 stages\n0: F0 B0 F1 B1\n1: F0 F1 B0 B1\n")
    assert main(["schedule", str(path)]) == 2
    error = capsys.readouterr().err
    assert "mine, rank 0, cell 1: deadlock" in error and "rank 0: F0 >B0< F1 B1  <--" in error
    path.write_text("mine, 2 stages\n0: F0 G0\n")
    assert main(["schedule", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"counterflow: {path}: line 2: 'G0' is no chunk; write F3, B3, I3 or W3, then ' and @stage.\n"
    )


def test_a_broken_trace_is_refused_by_name(capsys, tmp_path):
    (tmp_path / "trace.json").write_text("{")
    assert main(["schedule", "--table2", "--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'trace.json'}: the trace is no JSON" in error and error.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["schedule", "--help"])
    assert exited.value.code in (0, None)
    out = capsys.readouterr().out
    for option in (
        "--ranks",
        "--microbatches",
        "--costs.pair",
        "--table2",
        "--run",
        "--svg",
        "--trace",
        "--csv",
    ):
        assert option in out
