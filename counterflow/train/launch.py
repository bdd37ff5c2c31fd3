"""One command, as many processes as it asks for: a run's ranks, or those that share a model's experts in writing.

Without torchrun's or Slurm's environment the command starts its own ranks through torch's elastic agent, which watches
them, ends all when one dies, and starts them again from the last checkpoint where `parallel.restarts` allows it. Under
torchrun or Slurm each process finds its rank in the environment and joins the others.
"""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    get_error_handler,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from counterflow.comm.mesh import Mesh, device_for, objects_group
from counterflow.config.run import Parallel, RunConfig
from counterflow.errors import ConfigError, CounterflowError, PeerLostError, RankError, first_line
from counterflow.interrupt import WARNINGS, end_now, end_with_parent, handled, heard
from counterflow.machine import cores
from counterflow.train.begin import is_trained
from counterflow.train.environment import ProcessPlace, place_here, started

SHARED = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""PyTorch's own word for symmetric memory of several processes on one GPU; where it is set, ours may share one too: a
trial of what is meant for several GPUs, over gloo, since NCCL refuses."""
AGENT = "TORCHELASTIC_RUN_ID"
"""Set where an agent of torch's, ours or torchrun's, watches this process."""
OURS = "counterflow-"
"""How the name begins of a run that our own agent watches."""
PEER_LOST = 5
"""Exit code of a rank whose neighbour went away: not the one to blame."""
TIMEOUT = timedelta(minutes=30)
STOPPED = 128 + signal.SIGTERM
"""Exit code where ranks were stopped, and have saved, without their agent having been told anything."""
SAVING_S = 3600
"""What ranks that were told to stop may take for the step under way and its checkpoint; their agent kills them then."""
AGENT_WAITS_S = 10
"""An agent kills ranks that do not end so many seconds, and more, after the first that failed."""
SAVED = (
    "lower train.micro_batch_size. What was saved is untouched: the same command goes on from the last checkpoint, and "
    "parallel.restarts=N goes on by itself"
)
"""Said where one rank of a training was killed."""


def start(run: RunConfig, words: Sequence[str]) -> int:
    """Train a run in this process or in its own ranks, started as `counterflow train WORDS`; the exit code."""
    if started() is None and run.parallel.processes > 1:
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
        code = _launch(run.parallel, run.train.threads, ["train", *words], SAVED)
        return code or (0 if is_trained(run) else STOPPED)
    from counterflow.train.loop import resolve, train  # seconds, and only those who train need it

    if started() is not None:
        code = _join(run.parallel, resolve(run).train.device, lambda mesh: train(run, mesh))
        # A run that was stopped has saved: no failure, and nothing for the agent to start again.
        return 0 if code >= 128 and AGENT in os.environ else code
    return train(run)


def on_ranks(ranks: int, device: str, words: Sequence[str], act: Callable[[Mesh], object]) -> int:
    """`act` on `ranks` ranks that share the experts, each a process started as `counterflow WORDS`; the exit code.

    0: as many as torchrun or Slurm has started, else one.   Fails: ConfigError where these are not as many.
    """
    if ranks < 0:
        raise ConfigError(f"ranks is {ranks}; it must be at least 1, or 0 for as many as were started.")
    ranks = ranks or started() or 1
    if started() is None and ranks > 1:
        return _launch(Parallel(data=ranks, expert=ranks), 0, words, "start fewer ranks, or give each more")

    def acted(mesh: Mesh) -> int:
        act(mesh)
        return 0

    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    if started() is None:
        return acted(Mesh(device=torch.device(device_for(device, 1))))
    return _join(Parallel(data=ranks, expert=ranks), device_for(device, ranks), acted)


def _join(parallel: Parallel, device: str, act: Callable[[Mesh], int]) -> int:
    """This process as one of many."""
    if AGENT in os.environ:
        end_with_parent()
    mesh = Mesh()
    try:
        with joined(parallel, device) as mesh:
            return act(mesh)
    except PeerLostError as error:
        return _peer_lost(error)
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


def _peer_lost(error: Exception) -> int:
    """End this rank, which has lost another. Our own agent says why; else each rank says what it found."""
    get_error_handler().record_exception(error)
    if not os.environ.get(AGENT, "").startswith(OURS):
        place = place_here()
        rank = f"rank {place.rank}" if place else "this rank"
        print(
            f"counterflow: {rank} lost its connection to another: {first_line(error)}",
            file=sys.stderr,
            flush=True,
        )
    os._exit(PEER_LOST)  # the group cannot be closed any more


@contextmanager
def joined(parallel: Parallel, device_type: str) -> Iterator[Mesh]:
    """The mesh of the processes that the environment names.   Fails: ConfigError where they are not as many."""
    place = place_here()
    assert place is not None, "whoever joins others was started with them"
    wanted = parallel.processes
    if place.processes != wanted:
        raise ConfigError(
            f"{place.processes} processes were started and {parallel.pipeline} (pipeline) × {parallel.data} (data, or "
            f"ranks) = {wanted} are asked for; start {wanted}, or change one of them."
        )
    device, backend = _device_of(place, device_type)
    _meet(place, backend)
    yield Mesh(
        parallel.pipeline,
        parallel.data,
        place.rank,
        device,
        parallel.expert,
        parallel.multiprocessors,
        objects=objects_group() if wanted > 1 else None,
    )
    dist.destroy_process_group()


def _device_of(place: ProcessPlace, device_type: str) -> tuple[torch.device, str]:
    """This rank's device, and what carries tensors between the ranks."""
    device = torch.device(device_type)
    if device.type != "cuda":
        return device, "gloo"
    gpus = torch.cuda.device_count()
    shared = SHARED in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", place.processes)) > gpus > 0
    if place.local_rank >= gpus and not shared:
        raise ConfigError(
            f"this machine has {gpus} GPUs and rank {place.rank} needs the one numbered {place.local_rank}; start "
            "fewer processes here, or set the device to cpu."
        )
    device = torch.device("cuda", place.local_rank % gpus)
    torch.cuda.set_device(device)
    return device, "gloo" if shared else "cpu:gloo,cuda:nccl"


def _meet(place: ProcessPlace, backend: str) -> None:
    """Make the group of all processes.   Fails: ConfigError where they do not find each other."""
    at = f"{place.address}:{place.port} (MASTER_ADDR and MASTER_PORT)"
    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    try:
        socket.getaddrinfo(place.address, place.port)
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.processes, timeout=TIMEOUT))
        # A restarted group may find the same store: without a prefix of its own it would read dead members' addresses.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.processes, timeout=TIMEOUT
        )
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"{at} cannot be reached: no name service knows that address ({first_line(error)}); give the "
            "machine of rank 0 by a name or number that all the others know."
        ) from None
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(f"the port of {at} is taken by another process; choose another port.") from None
        if AGENT in os.environ:  # where it listens, so that another rank has failed
            raise PeerLostError(first_line(error)) from None
        raise ConfigError(
            f"rank {place.rank} did not meet the other {place.processes - 1} at {at}: {first_line(error)}. All must be "
            "started with the same address and port, and reach each other there."
        ) from None


def _launch(parallel: Parallel, threads: int, words: Sequence[str], killed: str) -> int:
    """All ranks on this machine, watched; `killed` is what to know and do where one is killed."""
    processes = parallel.processes
    threads = threads or max(1, cores() // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for told in ("elastic", "elastic.agent.server.api", "launcher"):  # what happened is said once, by us
        logging.getLogger(f"torch.distributed.{told}").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=OURS + uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=parallel.restarts,
        monitor_interval=0.2,
    )
    try:
        with handled(_pass_on, *WARNINGS), heard(_ends_when_told_twice()):
            elastic_launch(settings, sys.executable)("-m", "counterflow", *words)
    except SignalException as signalled:
        return 128 + signalled.sigval.value
    except ChildFailedError as failed:
        return _explain(failed, parallel.restarts, killed)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """For signals that torch's agent knows nothing of: as it hears the others, which its ranks are then sent."""
    raise SignalException(f"signal {number}", signal.Signals(number))


def _ends_when_told_twice() -> Callable[[int], None]:
    """The first signal goes to the ranks, which save; after a second Ctrl-C this process ends, and they with it."""
    told: list[int] = []

    def listen(number: int) -> None:
        told.append(number)
        if told.count(signal.SIGINT) > 1:
            end_now()

    return listen


def _explain(failed: ChildFailedError, restarts: int, killed: str) -> int:
    """The one rank that is to blame: killed, else stopped by an error of its own, which it has printed."""
    first = min(failure.timestamp for failure in failed.failures.values())
    rank, failure = min(failed.failures.items(), key=lambda item: _blame(item[1], first))
    often = f" after {restarts} restarts" if restarts else ""
    if failure.exitcode < 0:
        raise RankError(
            f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}{often}, and the others were "
            f"stopped. A kill without a sender is often the system's, for memory: {killed}."
        )
    if failure.exitcode == PEER_LOST:
        said: Any = failure.message  # by its annotation text; a table where a rank has left more
        said = said["message"] if isinstance(said, dict) else said
        raise RankError(
            f"rank {rank} (process {failure.pid}) lost its connection to another{often}, and no rank said why: "
            f"{said}. What was saved is untouched; start the same command again."
        )
    return failure.exitcode


def _blame(failure: ProcessFailure, first: int) -> int:
    """How little a rank that ended so is to blame; the agent ends those that did nothing, by SIGTERM and, if they do
    not heed it, by SIGKILL much later."""
    if failure.exitcode == -signal.SIGTERM:
        return 3
    if failure.exitcode == -signal.SIGKILL and failure.timestamp - first > AGENT_WAITS_S:
        return 3
    return 0 if failure.exitcode < 0 else 2 if failure.exitcode == PEER_LOST else 1
