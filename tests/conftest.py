"""Tests that need a GPU are left out where there is none, and the summary says how many."""

import importlib.util

import pytest
from hypothesis import settings

settings.register_profile("counterflow", deadline=None)  # a busy machine is no failure
settings.load_profile("counterflow")

LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu or has_gpu():
        return
    items[:] = [item for item in items if item not in gpu]
    config.hook.pytest_deselected(items=gpu)
    config.stash[LEFT_OUT] = len(gpu)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} tests need a GPU and were left out: none is here.")


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
