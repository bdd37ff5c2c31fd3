"""Ctrl-C is heard while a library keeps the main thread; what is to be saved is let finish, and a second one is not."""

import json
import os
import signal
import subprocess
import sys
import threading
import zlib

import pytest

from counterflow.interrupt import ends_at_once, stop_signals

pytestmark = pytest.mark.pure
KEPT = (
    "import hashlib, os, signal, threading\n"
    " threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
    " hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
)
"""Minutes in one call that lets no Python handler of a signal run; Ctrl-C comes soon."""


def interrupted(code: str, *numbers: int) -> tuple[int, str]:
    """Exit code of a process that is sent signals, each after a line of its, and what it said after them."""
    # Whoever runs the tests in the background has Ctrl-C ignored, and a new process inherits that.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", heard + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for number in numbers:
            process.stdout.readline()
            process.send_signal(number)
        said = process.stdout.read()
    return process.returncode, said


def test_a_command_that_a_library_keeps_ends_without_it():
    code = f"from counterflow.interrupt import ends_at_once\nwith ends_at_once():\n {KEPT}"
    assert interrupted(code) == (130, "counterflow: interrupted.\n")


def test_a_stop_is_answered_while_the_step_goes_on_and_a_second_ends_it():
    code = (
        "from counterflow.interrupt import stop_signals\n"
        f"with stop_signals(lambda: print('Stopping', flush=True)):\n {KEPT}"
    )
    assert interrupted(code, signal.SIGINT) == (130, "counterflow: interrupted.\n")


def test_a_checkpoint_that_is_verified_is_not_waited_for(tmp_path):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    with (folder / "large").open("wb") as file:
        file.truncate(2**40)  # many minutes to sum, no room on the disk
    files = {"large": {"bytes": 2**40, "crc32": 0}}
    content = {"files": files, "state": {}, "crc32": zlib.crc32(json.dumps([files, {}]).encode())}
    (folder / "manifest.json").write_text(json.dumps(content))
    code = (
        "import os, signal, threading\n"
        "from pathlib import Path\n"
        "from counterflow.interrupt import ends_at_once\n"
        "from counterflow.train.manifest import verify\n"
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        f"with ends_at_once():\n verify(Path({str(folder)!r}))\n"
    )
    status, said = interrupted(code)
    assert status == -signal.SIGINT and "KeyboardInterrupt" in said


def test_what_can_take_the_interrupt_is_given_it_and_tidies_up():
    tidied = []
    with pytest.raises(KeyboardInterrupt), ends_at_once():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            tidied.append(True)
    assert tidied


def test_signals_are_collected_said_once_and_the_handlers_go_again():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said, heard = [], threading.Event()
    with stop_signals(lambda: (said.append("Stopping"), heard.set())) as got:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert heard.wait(10)
    assert got == [signal.SIGTERM, signal.SIGINT] and said == ["Stopping"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
