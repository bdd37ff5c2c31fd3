"""Cores and memory are those that affinity and control groups of either version leave to this process."""

import os
import sys
from pathlib import Path

import pytest

from counterflow.machine import cores, free_memory

pytestmark = pytest.mark.pure
MIB = 1 << 20


def place(root: Path, groups: str, **files: str) -> Path:
    """A file system with this process's control groups; of a file's path `__` stands for a slash, `_0_` for a dot."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/meminfo").write_text("MemAvailable: 8192 kB\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_0_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def sixteen(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)


def test_affinity_on_linux_and_the_machines_number_elsewhere(tmp_path, monkeypatch):
    assert cores(place(tmp_path, "0::/\n")) == 16
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cores() == 128


def test_a_group_of_version_2_and_those_around_it_limit_cores_and_memory(tmp_path):
    root = place(
        tmp_path,
        "0::/outer/inner\n",
        outer__inner__cpu_0_max="max 100000\n",
        outer__cpu_0_max="250000 100000\n",
        outer__memory_0_max=f"{4 * MIB}\n",
        outer__memory_0_current=f"{3 * MIB}\n",
        outer__memory_0_stat=f"anon 1\ninactive_file {MIB}\n",
    )
    assert cores(root) == 3 and free_memory(root) == 2 * MIB


def test_groups_of_version_1_limit_them_too_also_seen_from_inside_a_container(tmp_path):
    """Which sees its own group at the top, under the path that it has outside."""
    root = place(
        tmp_path,
        "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n",
        cpu__cpu_0_cfs_quota_us="50000\n",
        cpu__cpu_0_cfs_period_us="100000\n",
        memory__memory_0_limit_in_bytes=f"{4 * MIB}\n",
        memory__memory_0_usage_in_bytes=f"{3 * MIB}\n",
        memory__memory_0_stat=f"total_inactive_file {MIB}\n",
    )
    assert cores(root) == 1 and free_memory(root) == 2 * MIB


def test_no_limit_is_none(tmp_path):
    root = place(tmp_path, "3:cpu,cpuacct:/\n", cpu__cpu_0_cfs_quota_us="-1\n")
    assert cores(root) == 16 and free_memory(root) == 8 * MIB
