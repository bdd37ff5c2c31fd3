"""Where a result came from: the code's commit, versions, device; written before the first step."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("counterflow", "torch", "numpy", "tokenizers", "triton", "transformers")


def provenance() -> dict[str, str]:
    """Commit, versions, device and time, as text."""
    facts = {"commit": commit(), "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts |= device_facts()
    return facts | {"started": datetime.now(UTC).isoformat(timespec="seconds")}


def commit() -> str:
    """The checkout's commit, with +changes if it has uncommitted ones; 'unknown' outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(here), *words],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        if not (Path(top) / "counterflow" / "train").samefile(here):
            return "unknown"
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_facts() -> dict[str, str]:
    """The processor, its cores and memory, and the GPU if there is one."""
    import torch

    facts = {"cpu": _cpu_name(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts["memory"] = f"{memory / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
