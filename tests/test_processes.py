"""A process that is forked from the server cannot be told from one that is executed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from subprocess import PIPE

import pytest

from tests import processes

SAYS = """
import json, os, signal, sys
print(json.dumps([
    sys.argv, os.getcwd(), dict(os.environ), os.getppid(), os.getpid() == os.getsid(0), sys.stdin.read(), __name__,
    str(signal.getsignal(signal.SIGINT)), str(signal.getsignal(signal.SIGTERM)), sorted(os.listdir("/proc/self/fd")),
    sys.stdout.line_buffering, sys.stderr.errors,
]))
"""
ENDS = [
    "sys.exit(3)",
    "sys.exit('no')",
    "1/0",
    "os.kill(os.getpid(), 9)",
    "raise KeyboardInterrupt",
    "print(1)",
]


@pytest.mark.parametrize("session", [False, True])
def test_it_has_its_own_words_folder_environment_streams_and_session(tmp_path, session):
    environment = {"A": "b", "PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    said = []
    for start in (subprocess.Popen, processes.Popen):
        with start(
            [sys.executable, "-c", SAYS, "one", "two"], stdin=PIPE, stdout=PIPE, text=True,
            cwd=tmp_path, env=environment, start_new_session=session,
        ) as process:  # fmt: skip
            said.append(json.loads(process.communicate("given")[0]))
    assert said[0] == said[1]
    assert said[0][3] == os.getpid()


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_as_the_interpreter_ends(how):
    words = [sys.executable, "-c", f"import os, sys; {how}"]
    executed = subprocess.run(words, capture_output=True, text=True)
    forked = processes.run(words)
    assert (forked.returncode, forked.stdout) == (executed.returncode, executed.stdout)
    assert forked.stderr.splitlines()[-1:] == executed.stderr.splitlines()[-1:]


def test_a_signal_and_a_timeout_reach_it():
    with processes.Popen([sys.executable, "-c", "input()"], stdin=PIPE) as process:
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)


def test_what_is_spawned_is_forked_and_passes_queues():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == [True, os.getpid()]
    process.join()
    assert process.exitcode == 7


def answer(queue) -> None:
    queue.put(["torch._dynamo" in sys.modules, os.getppid()])
    sys.exit(7)
