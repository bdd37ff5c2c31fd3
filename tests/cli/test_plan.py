"""`counterflow plan` as a user types it."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from counterflow.cli import main
from counterflow.config.load import load_run
from counterflow.plan.layout import require_layout

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""

pytestmark = pytest.mark.pure
SMALL = ["small", "--gpus", "4", "--card", "h100", "--expert", "1", "--micro-batch", "4"]


class Page(HTMLParser):
    """The tags of a page, balanced or not."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids = 0

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_a_plan_is_printed_and_written(capsys, tmp_path):
    page, numbers = tmp_path / "plan.html", tmp_path / "sub" / "plan.json"
    assert main(["plan", *SMALL, "--html", str(page), "--json", str(numbers), "train.batch_size=256"]) == 0
    out = capsys.readouterr().out
    for words in ("batch 256 × 2048", "Layouts, the best first", "Memory by rank", "fitted", "data sheet"):
        assert words in out
    found = json.loads(numbers.read_text())
    assert found["batch_size"] == 256 and found["gpus"] == 4
    steps = [one["step_s"] for one in found["layouts"]]
    assert steps[1:] == sorted(steps[1:]) and steps[0] == found["step"]["seconds"] < 1.03 * steps[1]
    first = out.split("peak memory  layout\n")[1].split()[1:3]
    assert f"{float(first[0]):.2f} s a step" in out.splitlines()[0] and first[1] == "s"
    peak = max(one["total"] for one in found["memory"])
    assert peak <= 80e9 and peak == pytest.approx(found["layouts"][0]["peak_bytes"], rel=0.01)


def test_the_page_is_whole_and_fetches_nothing(capsys, tmp_path):
    path = tmp_path / "plan.html"
    assert main(["plan", *SMALL, "--pipeline", "2", "--schedule", "dualpipe", "--html", str(path)]) == 0
    text, page = path.read_text(), Page()
    page.feed(text)
    page.close()
    assert not page.open and not page.fetched
    pictures = [f"<svg{part.split('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]
    assert len(pictures) == 2, "the schedule and the memory"
    for picture in pictures:
        assert len(ElementTree.fromstring(picture)) > 5
    assert "Assumptions" in text and "rank 1" in text and "F0" in text


def test_launch_writes_what_train_accepts(capsys, tmp_path):
    folder = tmp_path / "launch"
    assert main(["plan", *SMALL, "--pipeline", "2", "--schedule", "zb1p", "--launch", str(folder)]) == 0
    run = load_run(str(folder / "run.toml"))
    require_layout(run)
    assert (run.parallel.pipeline, run.parallel.data, run.parallel.schedule) == (2, 2, "zb1p")
    assert run.train.micro_batch_size == 4
    for script in ("torchrun.sh", "slurm.sh"):
        assert subprocess.run(["sh", "-n", folder / script], check=False, timeout=20).returncode == 0
        assert "counterflow train" in (folder / script).read_text()
    assert "--nproc-per-node 4" in (folder / "torchrun.sh").read_text()


def test_a_plan_for_cpus_speaks_of_processes_and_trains_what_they_multiply_fast(
    capsys, tmp_path, monkeypatch
):
    flags, page, folder = tmp_path / "cpuinfo", tmp_path / "plan.html", tmp_path / "launch"
    monkeypatch.setattr("counterflow.plan.hardware.CPU_FLAGS", flags)
    words = ["plan", "tiny", "--card", "cpu", "--gpus", "2", "--micro-batch", "8"]
    flags.write_text("flags : fpu avx2 avx512_bf16\n")
    assert main(words) == 0
    assert "Planning in bf16, what this machine's processor" in capsys.readouterr().err
    flags.write_text("flags : fpu avx2\n")
    assert main([*words, "--html", str(page), "--launch", str(folder)]) == 0
    out, error = capsys.readouterr()
    assert error.startswith("Planning in fp32, ") and error.count("\n") == 1
    assert "tokens/s/process" in out and "process hours" in out and "measured elsewhere" in out
    shown = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page.read_text(), flags=re.DOTALL)
    for text in (out, shown):
        assert not re.search(r"GPU|\$|data sheet|MWh|\de-\d+ Wh", text)
    assert load_run(str(folder / "run.toml")).train.precision == "fp32"
    slurm = (folder / "slurm.sh").read_text()
    assert "--cpus-per-task=1" in slurm and "gpus" not in slurm
    assert main([*words, "--precision", "bf16", "--dollars", "0.5"]) == 0
    out, error = capsys.readouterr()
    assert not error and "at $0.50 a process hour" in out and ", bf16, " in out


def test_files_are_written_though_nobody_reads_to_the_end(tmp_path):
    words = "plan tiny --card cpu --gpus 1 --micro-batch 8 --html plan.html --launch launch"
    command = f"{sys.executable} -c 'from counterflow.cli import main; main()' {words} | true"
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path, timeout=60, capture_output=True)
    assert (tmp_path / "plan.html").is_file() and (tmp_path / "launch" / "run.toml").is_file()


def test_copies_of_experts_are_placed(capsys, tmp_path):
    loads, out = tmp_path / "loads.json", tmp_path / "slots.json"
    loads.write_text(json.dumps([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]))
    words = ["plan", "tiny", "--gpus", "8", "--place", str(loads), "--slots", "16", "--json", str(out)]
    assert main(words) == 0
    assert sorted(set(json.loads(out.read_text())[0])) == list(range(12))
    before, after = capsys.readouterr().out.splitlines()[1].split()[1:3]
    assert float(after) < float(before)


def test_cards_that_do_not_fill_their_nodes_are_said(capsys, tmp_path):
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps([7] * 16))
    assert main(["plan", "tiny", "--gpus", "20", "--place", str(loads)]) == 0
    said = capsys.readouterr()
    assert "20 GPUs do not fill nodes of 8" in said.err and said.out.splitlines()[1].split()[1] == "1.250"
    assert main(["plan", "tiny", "--gpus", "20", "--pipeline", "1", "train.batch_size=40"]) == 0
    assert "20 h800 on 3 nodes of 8 at most, taken to hold them alike, over" in capsys.readouterr().out
    assert main(["plan", "tiny", "--gpus", "16", "--pipeline", "1"]) == 0
    assert capsys.readouterr().out.startswith("16 h800 over")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "0"], "--gpus is 0; a run needs at least 1"),
        (["--card", "h101"], "did you mean 'h100'?"),
        (["--fabric", "ib40"], "did you mean 'ib400'?"),
        (["--hardware", "/nowhere.toml"], "/nowhere.toml cannot be read (No such file or directory)"),
        (["tiny", "--schedule", "dualpip"], "did you mean 'dualpipe'?"),
        (["tiny", "--recompute", "all"], "--recompute is 'all'; known: attention"),
        (["small", "--pipeline", "-2"], "--pipeline is -2; it must be at least 1"),
        (["small", "--gpus", "8", "--pipeline", "4", "--data", "8"], "take --data 2"),
        (["small", "--gpus", "8", "--expert", "5"], "it must divide them: take 4"),
        (["small", "--precision", "fp9"], "did you mean 'fp8'?"),
        (["small", "--card", "a100", "--precision", "fp8"], "a100 has no fp8 products"),
        (["small", "--scale", "--published"], "two questions"),
        (["small", "--scale", "--html", "x"], "--html is not for --scale"),
        (["small", "--svg", "x"], "--svg is not for a plan"),
        (["small", "--slots", "3"], "--slots is not for a plan"),
        (["small", "--gpus", "999999999999"], "no layout on 999999999999 GPUs"),
        (["small", "--gpus", "8", "--recompute", "projections"], "take --recompute attention"),
        (["nosuch"], "'nosuch' is no known run"),
        (["small", "train.batch_siz=3"], "did you mean 'train.batch_size'?"),
        (["small", "--loads", "/nowhere.json"], "'/nowhere.json' cannot be read as JSON"),
        (["small", "--dollars", "-1"], "--dollars is -1"),
        (["small", "--gpu", "x"], "see `counterflow plan --help`"),
        ([*SMALL, "--precision", "fp8", "--launch", "l"], "training multiplies in fp32, bf16"),
        (["small", "--schedules", "--gpus", "3"], "no schedule can be compared on 3 GPUs"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("counterflow: ") and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fits_nowhere_names_what_would_fit(capsys):
    assert main(["plan", "v3-16b", "--gpus", "1", "--card", "a100", "--micro-batch", "1"]) == 2
    error = capsys.readouterr().err
    assert "fits on no layout of 1 a100" in error and "of them would do (PP" in error


def test_help_and_no_torch(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["plan", "--help"])
    assert exited.value.code in (0, None)
    out = capsys.readouterr().out
    for option in (
        "--gpus",
        "--card",
        "--launch",
        "--scale",
        "--schedules",
        "--published",
        "--place",
        "--html",
    ):
        assert option in out
    code = "import sys, counterflow.cli.plan; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.skipif(not BROWSER, reason="no Chromium here: the page is only parsed")
def test_a_real_browser_draws_the_page(capsys, tmp_path):
    """It reads the page as it stands and lays out every box and bar: none is left without a size."""
    path = tmp_path / "plan.html"
    assert main(["plan", *SMALL, "--pipeline", "2", "--schedule", "zb1p", "--html", str(path)]) == 0
    text = path.read_text()
    probe = (
        "<script>const boxes = [...document.querySelectorAll('svg, table, h2')].map(x => x.getBoundingClientRect());"
        "document.title = boxes.length + ' ' + boxes.filter(b => b.width < 1 || b.height < 1).length + ' ' +"
        "document.querySelectorAll('svg rect').length + ' ' + (document.body.scrollWidth <= innerWidth)</script>"
    )
    path.write_text(text.replace("</body>", f"{probe}</body>"))
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,900",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    boxes, empty, drawn, fits = done.stdout.split("<title>")[1].split("</title>")[0].split()
    assert int(boxes) >= 12 and empty == "0" and fits == "true"
    assert int(drawn) == text.count("<rect")
