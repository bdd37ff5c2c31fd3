"""Which of several processes this one is, as torchrun or Slurm's srun say in the environment; read without torch.

Inside a Slurm job srun alone starts processes: a batch script, and an interactive shell, have the job's variables and
are one process, which starts its own ranks. What srun has started is known by its step.
"""

import os
import re
from typing import NamedTuple

from counterflow.errors import ConfigError

PORTS = 20000
"""The processes of a Slurm step meet at one of so many ports, from this number on, by the ids of job and step."""
OTHER_STEP = 1009
"""How far apart the ports of two steps of a job are."""


class ProcessPlace(NamedTuple):
    """A process among those that were started together, and where they meet."""

    rank: int
    processes: int
    local_rank: int
    """Among those on this machine."""
    address: str
    port: int


def started() -> int | None:
    """How many processes torchrun or Slurm has started, this one among them; None where neither has."""
    place = place_here()
    return place.processes if place else None


def place_here() -> ProcessPlace | None:
    """This process's place; None where neither torchrun nor srun has started several.

    Fails: ConfigError where a variable is missing or no number.
    """
    if "RANK" in os.environ:
        rank = _number("RANK")
        processes = _number("WORLD_SIZE", "1", least=1)
        local = _number("LOCAL_RANK", str(rank))
        address, port = _text("MASTER_ADDR"), _number("MASTER_PORT", least=1)
    elif "SLURM_STEP_ID" in os.environ and (processes := _tasks()) > 1:
        rank, local = _number("SLURM_PROCID"), _number("SLURM_LOCALID")
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        address = os.environ.get("MASTER_ADDR") or first_host(nodes or "localhost")
        step = _number("SLURM_JOB_ID", "0") + OTHER_STEP * _number("SLURM_STEP_ID")
        port = _number("MASTER_PORT", str(PORTS + step % PORTS), least=1)
    else:
        return None
    if rank >= processes:
        raise ConfigError(
            f"this is rank {rank} of {processes} processes; ranks are counted from 0: {_REMEDY}"
        )
    if port >= 2**16:
        raise ConfigError(f"MASTER_PORT is {port}; ports end at 65535: {_REMEDY}")
    return ProcessPlace(rank, processes, local, address, port)


_REMEDY = "start with torchrun or srun, which set it, or unset RANK and SLURM_STEP_ID for ranks that are started here."


def _tasks() -> int:
    """Processes of the Slurm step; that of an interactive shell has one, in a job of many."""
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    return _number(name, "1")


def _number(name: str, default: str | None = None, least: int = 0) -> int:
    text = _text(name, default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ConfigError(f"{name} is '{text}'; it must be a whole number from {least} on: {_REMEDY}")
    return int(text)


def _text(name: str, default: str | None = None) -> str:
    text = os.environ.get(name, default)
    if not text:
        raise ConfigError(f"{name} is {'empty' if text == '' else 'missing'} and is needed: {_REMEDY}")
    return text


def first_host(nodes: str) -> str:
    """The first of Slurm's list: 'gpu[03-05,9]-ib,x' is gpu03-ib."""
    first = re.match(r"(?:\[[^\]]*\]?|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]?", r"\1", first[0] if first else nodes)
