"""One command, as many processes as the run asks for.

Without torchrun's or Slurm's environment the command starts its own ranks through torch's elastic agent, which watches
them, ends all when one dies, and starts them again from the last checkpoint where `parallel.restarts` allows it. Under
torchrun or Slurm each process finds its rank in the environment and joins the others.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from counterflow.comm.mesh import Mesh
from counterflow.config.run import RunConfig
from counterflow.errors import ConfigError, CounterflowError, RankError
from counterflow.plan.layout import require_layout
from counterflow.train.loop import resolve, train

PEER_LOST = 5
"""Exit code of a rank whose neighbour went away: not the one to blame."""
TIMEOUT = timedelta(minutes=30)


def start(run: RunConfig, words: Sequence[str]) -> int:
    """Train a run in this process or in its own ranks, started as `counterflow train WORDS`; the exit code."""
    require_layout(run)
    if "RANK" in os.environ or (
        "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    ):
        return _join(run)
    if run.parallel.processes == 1:
        return train(run)
    return _launch(run, words)


def _join(run: RunConfig) -> int:
    """This process as one of many."""
    with joined(run) as mesh:
        try:
            code = train(run, mesh)
        except CounterflowError as error:
            if error.shared and not mesh.first:
                raise SystemExit(error.exit_code) from None  # the first rank says it
            raise
        except dist.DistError as error:
            return _peer_lost(error)
        except RuntimeError as error:
            if "onnection" not in str(error) and "gloo" not in str(error):
                raise
            return _peer_lost(error)
    return 0 if code >= 128 and "TORCHELASTIC_RUN_ID" in os.environ else code  # stopped and saved: no failure


def _peer_lost(error: Exception) -> int:
    logging.getLogger(__name__).info("a neighbour is gone: %s", error)
    os._exit(PEER_LOST)  # the group cannot be closed any more


@contextmanager
def joined(run: RunConfig) -> Iterator[Mesh]:
    """The mesh of the processes that the environment names.   Fails: ConfigError where they are not as many."""
    rank, world, local = _from_environment()
    wanted = run.parallel.processes
    if world != wanted:
        raise ConfigError(
            f"{world} processes were started and the run has parallel.pipeline {run.parallel.pipeline} × parallel.data "
            f"{run.parallel.data} = {wanted}; start {wanted}, or change one of them."
        )
    device = torch.device(resolve(run).train.device)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"this machine has {torch.cuda.device_count()} GPUs and rank {rank} needs the one numbered {local}; "
                "start fewer processes here, or set train.device=cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A restarted group may find the same store: without a prefix of its own it would read its dead members' addresses.
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=TIMEOUT))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    yield Mesh(run.parallel.pipeline, run.parallel.data, rank, device, run.parallel.expert)
    dist.destroy_process_group()


def _from_environment() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun or Slurm say."""
    if "RANK" in os.environ:
        rank = int(os.environ["RANK"])
        return rank, int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", rank))
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    keys = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    rank, world, local = (int(os.environ.get(key, "0")) for key in keys)
    return rank, world, local


def _first_host(nodes: str) -> str:
    """The first of Slurm's list: 'gpu[03-05,9],x' is gpu03."""
    name, bracket, rest = nodes.split(",")[0].partition("[")
    return name + rest.split("]")[0].split("-")[0] if bracket else name


def _launch(run: RunConfig, words: Sequence[str]) -> int:
    """All ranks on this machine, watched."""
    processes = run.parallel.processes
    threads = run.train.threads or max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=run.parallel.restarts,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "counterflow", "train", *words)
    except SignalException as signalled:
        return 128 + signalled.sigval.value
    except ChildFailedError as failed:
        return _explain(failed, run)
    return 0


def _explain(failed: ChildFailedError, run: RunConfig) -> int:
    """The one rank that is to blame: killed, else stopped by an error of its own, which it has printed."""
    rank, failure = min(failed.failures.items(), key=lambda item: _blame(item[1].exitcode))
    if failure.exitcode < 0:
        again = "the same command goes on from the last checkpoint"
        often = f" after {run.parallel.restarts} restarts" if run.parallel.restarts else ""
        raise RankError(
            f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}{often}, and the others were "
            f"stopped. What was saved is untouched: {again}, and parallel.restarts=N goes on by itself. A kill without "
            "a sender is often the system's, for memory: lower train.micro_batch_size."
        )
    return failure.exitcode


def _blame(code: int) -> int:
    """How little a rank with this exit code is to blame; the agent's SIGTERM ends those that did nothing."""
    if code < 0:
        return 3 if code == -signal.SIGTERM else 0
    return 2 if code == PEER_LOST else 1
