"""Tests that need a GPU are left out where there is none, and the summary says how many; each test has one thread."""

import importlib.util
import multiprocessing.util
import os

import pytest
from hypothesis import settings

from tests import processes, typecheck

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small products are slower on several; before torch is imported
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; before Triton is imported
settings.register_profile("counterflow", deadline=None)  # a busy machine is no failure
settings.load_profile("counterflow")


@pytest.fixture(autouse=True, scope="session")
def spawned_processes_are_forked():
    """From a server in which torch is imported; it starts with the first of them."""
    earlier = processes.spawn_by(processes.Popen)
    yield
    multiprocessing.util.spawnv_passfds = earlier


@pytest.fixture(autouse=True)
def shapes_are_checked():
    """Of the first calls of every function, in each test anew."""
    typecheck.check_again()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not has_gpu():
        items[:] = [item for item in items if item not in gpu]
        config.hook.pytest_deselected(items=gpu)


def pytest_terminal_summary(terminalreporter) -> None:
    if not has_gpu():  # said by the process that reports, which need not be one that collects
        terminalreporter.write_line("Tests that need a GPU (mark gpu) were left out: none is here.")


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
