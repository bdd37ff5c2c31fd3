"""A checkpoint is whole or not there: killed at any moment, truncated, corrupted, on a full disk."""

import errno
import os
import random
import resource
import signal
import sys
import threading
import time
from subprocess import PIPE

import pytest
import torch

from counterflow.errors import CheckpointError
from counterflow.train.behind import Behind, free_memory
from counterflow.train.checkpoint import WRITING, Checkpoints, files_of
from counterflow.train.files import SummedFiles, system_error
from counterflow.train.manifest import MANIFEST
from counterflow.train.piece import Piece
from tests import processes


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "master.layers.0.experts.down": torch.randn(3, 5, 7, generator=generator),
        "half": torch.randn(11, generator=generator).bfloat16(),
        "count": torch.tensor([2**60 + 1, -3]),
        "step": torch.tensor(7.0),
        "nothing": torch.zeros(0, 4),
    }


def test_round_trip_is_exact_and_only_the_newest_stay(tmp_path):
    kept = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 10):
        kept.save(step, tensors(step), {"sample": step * 8})
    assert kept.steps() == [2, 10] and kept.state(10) == {"sample": 80}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    kept.load(10, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(10).items())
    part = {"count": torch.zeros(2, dtype=torch.int64)}
    kept.load(2, part, some=True)
    assert torch.equal(part["count"], tensors()["count"])


def test_views_of_one_flat_tensor_are_filled_in_place(tmp_path):
    kept, flat = Checkpoints(tmp_path, keep=1), torch.arange(20.0)
    kept.save(1, {"a": flat[:6].view(2, 3), "b": flat[6:]}, {})
    other = torch.zeros(20)
    kept.load(1, {"a": other[:6].view(2, 3), "b": other[6:]})
    assert torch.equal(flat, other)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_files_are_named_with_the_step_to_go_on_from(tmp_path, damage):
    kept = Checkpoints(tmp_path, keep=3)
    kept.save(1, tensors(), {})
    for name in sorted(path.name for path in kept.path(1).iterdir()):
        kept.save(2, tensors(), {})
        path = kept.path(2) / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
        with pytest.raises(CheckpointError, match=f"(?s){name}.*step 1"):
            kept.load(2, tensors())
    kept.load(1, tensors())


def test_who_needs_the_weights_alone_reads_no_moments(tmp_path):
    kept = Checkpoints(tmp_path, keep=1)
    saved = {f"{kind}.{name}": torch.randn(9) for kind in ("master", "exp_avg") for name in "ab"}
    folder = kept.save(1, saved, {})
    masters, moments = files_of(folder, ["master.a"])[0], files_of(folder, ["exp_avg.b"])[0]
    (folder / moments).write_bytes(b"")
    wanted = {name: torch.zeros(9) for name in saved if name.startswith("master")}
    kept.load(1, wanted, some=True)
    assert all(torch.equal(wanted[name], saved[name]) for name in wanted)
    with pytest.raises(CheckpointError, match=f"{moments} is truncated"):
        kept.load(1, saved)
    (folder / masters).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{masters} is truncated"):
        kept.load(1, wanted, some=True)


def test_every_flipped_bit_of_the_manifest_is_seen_or_changes_nothing(tmp_path):
    """It holds the run's place: a flip that still reads as JSON would go on from another sample."""
    kept, state = Checkpoints(tmp_path, keep=1), {"sample": 123456, "seconds": 1.5}
    path = kept.save(1, tensors(), state) / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        try:
            assert kept.state(1) == state
        except CheckpointError as error:
            assert MANIFEST in str(error)


def test_those_passed_over_at_resuming_do_not_push_out_the_one_just_saved(tmp_path):
    kept = Checkpoints(tmp_path, keep=3)
    for step in (100, 200, 300):
        kept.save(step, tensors(), {})
    narrower = Checkpoints(tmp_path, keep=2)
    narrower.save(150, tensors(), {})
    assert narrower.steps() == [100, 150, 200, 300]
    narrower.save(300, tensors(), {})
    assert narrower.steps() == [200, 300]


def test_a_checkpoint_of_another_model_is_refused_by_tensor(tmp_path):
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, tensors(), {})
    with pytest.raises(CheckpointError, match=r"'half' with 11 elements, this model has 12"):
        kept.load(1, tensors() | {"half": torch.zeros(12, dtype=torch.bfloat16)})
    with pytest.raises(
        CheckpointError, match=r"'half' in torch.bfloat16, this model has it in torch.float32"
    ):
        kept.load(1, tensors() | {"half": torch.zeros(11)})
    with pytest.raises(CheckpointError, match="no tensor 'more'"):
        kept.load(1, tensors() | {"more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds 'half'"):
        kept.load(1, {name: tensor for name, tensor in tensors().items() if name != "half"})


def test_a_full_disk_loses_nothing(tmp_path):
    """The operating system refuses to grow a file: the same path as no space left, without root."""
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, tensors(), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"step-00000002 could not be written; .*ulimit.*untouched: step 1"
        ):
            kept.save(2, {"large": torch.randn(5000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert kept.steps() == [1] and not list(tmp_path.glob("*" + WRITING))
    kept.load(1, tensors())


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(CheckpointError, match="a file stands where a folder must be"):
        Checkpoints(tmp_path / "run" / "checkpoints", keep=1).save(1, tensors(), {})


def test_the_systems_error_is_found_behind_others():
    inner = OSError(errno.ENOSPC, "No space left on device")
    try:
        raise RuntimeError("writer failed") from inner
    except RuntimeError as error:
        assert system_error(error) is inner


def test_a_copy_is_of_one_moment_and_the_next_save_waits(tmp_path):
    """Training goes on in the same tensors while the copy is written."""
    kept, live, said = Checkpoints(tmp_path, keep=3), pieces_of(tensors(0)), []
    with Behind(kept, True, said.append) as saver:
        for step in (1, 2, 3):
            for name, tensor in pieces_of(tensors(step)).items():
                live[name].value.copy_(tensor.value)
            saver.save(step, live, {"sample": step})
            for piece in live.values():
                piece.value.zero_()
        assert saver.agreed(0) == 0 and saver.agreed(15) == 15
    assert kept.steps() == [1, 2, 3] and len(said) == 1 and "copied to memory" in said[0]
    for step in kept.steps():
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        kept.load(step, loaded)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(step).items())
        assert kept.state(step) == {"sample": step}


@pytest.mark.parametrize("asked", ["agreed", "save", "wait", "end"])
def test_a_writers_error_is_raised_when_training_next_asks_and_nothing_is_lost(tmp_path, asked):
    kept, pieces = Checkpoints(tmp_path, keep=2), pieces_of(tensors())
    in_the_way = kept.path(2).with_name(kept.path(2).name + WRITING)
    with (
        pytest.raises(CheckpointError, match=r"step-00000002 could not be written;.*untouched: step 1"),
        Behind(kept, True, print) as saver,
    ):
        saver.save(1, pieces, {})
        saver.wait()
        in_the_way.touch()
        saver.save(2, pieces, {})
        if asked == "agreed":
            while not saver.agreed(0):  # until the writer has failed
                pass
        elif asked != "end":
            {"save": lambda: saver.save(3, pieces, {}), "wait": saver.wait}[asked]()
    assert kept.steps() == [1]
    in_the_way.unlink()
    with Behind(kept, True, print) as saver:
        saver.save(2, pieces, {})
    assert kept.steps() == [1, 2]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_ctrl_c_ends_the_process_without_what_is_being_written(tmp_path, monkeypatch, at_the_end):
    """At once: Python's own end crashed beside a thread in torch's code."""
    held, ended = threading.Event(), []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "write", lambda *_: held.wait(60))
    monkeypatch.setattr("counterflow.train.behind.end_now", lambda: ended.append(True))
    with pytest.raises(KeyboardInterrupt), Behind(Checkpoints(tmp_path, keep=1), True, print) as saver:
        saver.save(1, pieces_of(tensors()), {})
        if at_the_end:
            monkeypatch.setattr(saver, "wait", interrupted)
        else:
            interrupted()
    held.set()
    assert ended


def test_where_memory_is_short_training_waits_and_it_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.train.behind.free_memory", lambda: 1000)
    kept, said = Checkpoints(tmp_path, keep=2), []
    with Behind(kept, True, said.append) as saver:
        for step in (1, 2):
            saver.save(step, pieces_of(tensors()), {})
            assert kept.steps()[-1] == step
    assert len(said) == 1 and "1000 B of memory free: training waits" in said[0]


def test_this_machines_free_memory_is_known():
    assert 1 << 20 < free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_an_error_in_any_of_the_threads_that_write_is_raised(tmp_path, monkeypatch):
    """torch's own threads would lose it, and the checkpoint would lack their tensors."""
    monkeypatch.setattr("counterflow.train.files.cores", lambda: 16)
    kept, given = Checkpoints(tmp_path, keep=1), {f"master.{name}": torch.randn(9) for name in "abcdef"}
    path = kept.save(1, given, {})
    assert len(list(path.glob("*.distcp"))) == 4
    kept.load(1, given)
    plain = SummedFiles.create_stream

    def full(self, path, mode):
        if path.name.startswith("__0_2_"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, path, mode)

    monkeypatch.setattr(SummedFiles, "create_stream", full)
    with pytest.raises(CheckpointError, match="no space is left there"):
        kept.save(2, given, {})
    assert kept.steps() == [1]


def pieces_of(given: dict[str, torch.Tensor]) -> dict[str, Piece]:
    return {name: Piece.whole(tensor) for name, tensor in given.items()}


DIER = """
import os, shutil, signal, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from counterflow.train.behind import Behind
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.piece import Piece

ACTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}
first, left = Path(sys.argv[1]) / "first", Path(sys.argv[1]) / "left"
tensors = lambda step: {"a": torch.full((500,), float(step)), "b": torch.tensor(step)}

def child(work):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    torch.set_num_threads(1)
    work()
    os._exit(0)

def save(step, die_at=None):
    acts = 0
    def count(event, values):
        nonlocal acts
        if event in ACTS and str(values[0]).startswith(str(left)):
            acts += 1
            if acts == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if die_at:
        sys.addaudithook(count)
    pieces = {name: Piece.whole(tensor) for name, tensor in tensors(step).items()}
    with Behind(Checkpoints(left if die_at else first, keep=2), True, str) as saver:
        saver.save(step, pieces, {"sample": step})

def check():
    kept = Checkpoints(left, keep=2)
    assert kept.steps()[-1] in (2, 3), kept.steps()
    for step in kept.steps():
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
        kept.load(step, loaded)
        assert loaded["b"] == step and (loaded["a"] == step).all() and kept.state(step) == {"sample": step}
    kept.save(4, tensors(4), {})
    assert {path.name for path in left.iterdir()} == {kept.path(step).name for step in kept.steps()}

assert child(lambda: [save(step) for step in (1, 2)]) == 0
for die_at in range(1, 1000):
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(first, left)
    died = child(lambda: save(3, die_at))
    assert child(check) == 0, die_at
    if died == 0:
        print(die_at - 1)
        break
    assert died == -signal.SIGKILL, died
"""


@pytest.mark.slow
def test_killed_before_any_file_operation_every_checkpoint_loads(tmp_path):
    """Not at random: the process dies once before each operation of a save behind it, removal of old ones included."""
    done = processes.run([sys.executable, "-c", DIER, str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 10


SAVER = """
import sys, torch
from pathlib import Path
from counterflow.train.behind import Behind
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.piece import Piece
kept = Checkpoints(Path(sys.argv[1]), keep=2)
step = (kept.steps() or [0])[-1]
a, b = torch.zeros(200_000), torch.tensor(0)
print("ready", flush=True)
with Behind(kept, True, str) as saver:
    while True:
        step += 1
        a.fill_(step), b.fill_(step)
        saver.save(step, {"a": Piece.whole(a), "b": Piece.whole(b)}, {"sample": step})
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_newest_loads(tmp_path):
    dice = random.Random(0)
    kept = Checkpoints(tmp_path, keep=2)
    for _ in range(4):
        process = processes.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0.05, 0.4))
        process.kill()
        process.wait()
        process.stdout.close()
        for step in kept.steps():
            loaded = {"a": torch.zeros(200_000), "b": torch.tensor(0)}
            kept.load(step, loaded)
            assert (
                loaded["b"] == step and (loaded["a"] == step).all() and kept.state(step) == {"sample": step}
            )
    assert kept.steps()
