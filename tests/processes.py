"""Processes of this project that start at once: forked from a server in which torch is imported already.

`run` and `Popen` take what `subprocess`'s take. A command of this Python (`-m`, `-c` or a file) is forked, in a few
milliseconds instead of some seconds of imports, and is then as an executed one would be: a child of the test, with its
own arguments, environment, folder, streams, session, signals and exit code. So are what `multiprocessing` spawns in a
test, and ranks that a forked command starts itself. A test that is about the start uses `subprocess`.

Each test process has one server, which ends with it. The server forks twice, so that a command has no parent but the
nearest that adopts orphans, which the test process is meanwhile: Linux knows this, elsewhere commands are executed.
"""

import atexit
import ctypes
import fcntl
import gc
import inspect
import json
import multiprocessing.util
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    *(
        f"counterflow.cli.{verb}"
        for verb in ("train", "generate", "serve", "export", "evaluate", "bench", "plan")
    ),
    "counterflow.serve.app",
)
"""What commands import, some of it when they need it."""
HEAD_BYTES = 8
MOST_FILES = 32
ADOPT_ORPHANS = 36
"""Linux's PR_SET_CHILD_SUBREAPER."""


def run(words: list[str], timeout: float = 240.0, **given: Any) -> subprocess.CompletedProcess:
    """As `subprocess.run`, with the output kept as text."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(words, **streams | given) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def counterflow(*words: str, **given: Any) -> subprocess.CompletedProcess:
    """The command `counterflow WORDS`, run to its end."""
    return run([sys.executable, "-m", "counterflow", *words], **given)


class Popen(subprocess.Popen):
    """As `subprocess.Popen`; a command of this Python is forked from the server."""

    @staticmethod
    def fork(start: dict[str, Any], files: list[int]) -> int:
        """The process id of a new child of this process that becomes what `start` says."""
        return _server().fork(start, files)

    def _execute_child(self, *given: Any) -> None:
        told = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments
        words = [told["args"]] if isinstance(told["args"], (str, bytes, os.PathLike)) else told["args"]
        if told["shell"] or not _known(words):
            return super()._execute_child(*given)
        files = [told["p2cread"], told["c2pwrite"], told["errwrite"]]
        files = [standard if own == -1 else own for standard, own in enumerate(files)]
        told_too = {"folder": told["cwd"], "environment": told["env"], "session": told["start_new_session"]}
        self.pid = self.fork(start_of(words, told["pass_fds"], **told_too), [*files, *told["pass_fds"]])
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(told[pipe] for pipe in pipes))
        return None


class RankPopen(Popen):
    """As `Popen`, forked from this process, which was forked itself: of an elastic agent, its ranks."""

    @staticmethod
    def fork(start: dict[str, Any], files: list[int]) -> int:
        """A child of this process."""
        return os.fork() or become(start, files)


def spawn_by(popen: type[Popen]) -> Callable[..., int]:
    """What multiprocessing starts its spawned processes with; the function that it had."""

    def spawn(path: str, words: Sequence[str], files: Iterable[int]) -> int:
        options = multiprocessing.util._args_from_interpreter_flags()  # the server has them too
        python, *rest = [os.fsdecode(word) for word in words]
        words, files = [python, *rest[len(options) * (rest[: len(options)] == options) :]], sorted(files)
        if not _known(words):
            return earlier(path, [python, *rest], files)
        return popen.fork(start_of(words, files), [0, 1, 2, *files])

    earlier, multiprocessing.util.spawnv_passfds = multiprocessing.util.spawnv_passfds, spawn
    return earlier


def _known(words: Sequence[Any]) -> bool:
    """Whether a command can be forked here: of this Python, without the interpreter's options."""
    python = sys.platform == "linux" and len(words) > 1 and words[0] == sys.executable
    return python and (words[1] in ("-m", "-c") or not os.fspath(words[1]).startswith("-"))


def start_of(
    words: Sequence[Any],
    files: Iterable[int],
    folder: Any = None,
    environment: Any = None,
    session: bool = False,
) -> dict[str, Any]:
    """What a process starts with, its streams apart; `files` are the numbers of further ones that it is given."""
    return {
        "words": [os.fspath(word) for word in words[1:]],
        "files": list(files),
        "folder": os.fspath(folder or os.getcwd()),
        "environment": dict(os.environ if environment is None else environment),
        "session": session,
    }


class Server:
    """The test process's side of its server."""

    def __init__(self) -> None:
        self.socket, there = socket.socketpair()
        self.lock = threading.Lock()
        code = f"from tests.processes import serve; serve({there.fileno()})"
        found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(found)}
        words = [sys.executable, "-c", code]
        self.process = subprocess.Popen(words, env=environment, pass_fds=[there.fileno()])
        there.close()
        atexit.register(self.end)

    def end(self) -> None:
        """The server ends when nobody holds the other end of its socket."""
        self.socket.close()
        self.process.wait()

    def fork(self, start: dict[str, Any], files: list[int]) -> int:
        """The process id of a new child of this process, which adopts orphans just as long as it takes."""
        data = json.dumps(start).encode()
        with self.lock:
            adopt_orphans(True)
            try:
                socket.send_fds(self.socket, [len(data).to_bytes(HEAD_BYTES, "big")], files)
                self.socket.sendall(data)
                pid = int.from_bytes(self.socket.recv(HEAD_BYTES), "big")
            finally:
                adopt_orphans(False)
        assert pid, "the server of processes has ended"
        return pid


@cache
def _server() -> Server:
    return Server()


def adopt_orphans(wanted: bool) -> None:
    """Whether this process becomes the parent of its descendants whose own parent has ended."""
    assert ctypes.CDLL(None).prctl(ADOPT_ORPHANS, int(wanted), 0, 0, 0) == 0


def serve(number: int) -> None:
    """The server: fork what is asked for at the socket of this number until nobody holds its other end."""
    for name in PRELOADED:
        import_module(name)
    gc.freeze()  # a collection in a child would write to, and so copy, every page
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all that runs there
    asked = socket.socket(fileno=number)
    while True:
        head, files, _, _ = socket.recv_fds(asked, HEAD_BYTES, MOST_FILES)
        if not head:
            return
        data, size = b"", int.from_bytes(head, "big")
        while len(data) < size:
            data += asked.recv(size - len(data))
        asked.sendall(orphan(json.loads(data), files).to_bytes(HEAD_BYTES, "big"))
        for file in files:
            os.close(file)


def orphan(start: dict[str, Any], files: list[int]) -> int:
    """The process id of a child of a child, whose own parent has ended."""
    there, here = os.pipe()
    middle = os.fork()
    if not middle:
        parent, child = os.getpid(), os.fork()
        if child:
            os.write(here, child.to_bytes(HEAD_BYTES, "big"))
            os._exit(0)
        while os.getppid() == parent:
            time.sleep(1e-4)
        become(start, files)
    os.waitpid(middle, 0)
    pid = int.from_bytes(os.read(there, HEAD_BYTES), "big")
    os.close(there)
    os.close(here)
    return pid


def become(start: dict[str, Any], files: list[int]) -> NoReturn:
    """Make this process, just forked, the one that `start` says, and end it with its exit code."""
    code = 1
    try:
        _place(files, [0, 1, 2, *start["files"]])
        _settle(start)
        _execute(start["words"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _end(code)


def _place(files: list[int], numbers: list[int]) -> None:
    """Open files under new numbers, which may be some of theirs, and no others."""
    above = max(*numbers, *files) + 1
    files = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    os.closerange(0, above)
    for file, number in zip(files, numbers):
        os.dup2(file, number)
    os.closerange(above, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _settle(start: dict[str, Any]) -> None:
    """All that a new process has of its own."""
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    if start["session"]:
        os.setsid()
    os.chdir(start["folder"])
    os.environ.clear()
    os.environ.update(start["environment"])
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, paths), *(path for path in sys.path if path not in ("", str(ROOT)))]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    random.seed()
    if not os.path.exists("/dev/nvidiactl"):  # a process that has asked for GPUs cannot be forked
        subprocess_handler.Popen = RankPopen
        spawn_by(RankPopen)


def _execute(words: list[str]) -> None:
    """What the interpreter does with these words."""
    what, *rest = words
    if what == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        assert not what.startswith("-"), f"{what}: options of the interpreter are not known here"
        sys.argv = words
        runpy.run_path(what, run_name="__main__")


def _end(code: int) -> NoReturn:
    """As the interpreter ends: threads are waited for, what was registered is called, streams are emptied."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
