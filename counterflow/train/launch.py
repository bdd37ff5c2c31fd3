"""One command, as many processes as it asks for: a run's ranks, or those that share a model's experts in writing.

Without torchrun's or Slurm's environment the command starts its own ranks through torch's elastic agent, which watches
them, ends all when one dies, and starts them again from the last checkpoint where `parallel.restarts` allows it. Under
torchrun or Slurm each process finds its rank in the environment and joins the others.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from counterflow.comm.mesh import Mesh, device_for
from counterflow.config.run import Parallel, RunConfig
from counterflow.errors import ConfigError, CounterflowError, PeerLostError, RankError
from counterflow.interrupt import end_now, end_with_parent, heard
from counterflow.plan.layout import require_layout
from counterflow.train.begin import started

SHARED = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""PyTorch's own word for symmetric memory of several processes on one GPU; where it is set, ours may share one too: a
trial of what is meant for several GPUs, over gloo, since NCCL refuses."""
AGENT = "TORCHELASTIC_RUN_ID"
"""Set where an agent of torch's, ours or torchrun's, watches this process."""
PEER_LOST = 5
"""Exit code of a rank whose neighbour went away: not the one to blame."""
TIMEOUT = timedelta(minutes=30)
SAVING_S = 3600
"""What ranks that were told to stop may take for the step under way and its checkpoint; their agent kills them then."""
SAVED = (
    "lower train.micro_batch_size. What was saved is untouched: the same command goes on from the last checkpoint, and "
    "parallel.restarts=N goes on by itself"
)
"""Said where one rank of a training was killed."""


def start(run: RunConfig, words: Sequence[str]) -> int:
    """Train a run in this process or in its own ranks, started as `counterflow train WORDS`; the exit code."""
    require_layout(run)
    if started() is None and run.parallel.processes > 1:
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
        return _launch(run.parallel, run.train.threads, ["train", *words], SAVED)
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

    if started() is None:
        return acted(Mesh(device=torch.device(device_for(device, 1))))
    return _join(Parallel(data=ranks, expert=ranks), device_for(device, ranks), acted)


def _join(parallel: Parallel, device: str, act: Callable[[Mesh], int]) -> int:
    """This process as one of many."""
    if AGENT in os.environ:
        end_with_parent()
    with joined(parallel, device) as mesh:
        try:
            return act(mesh)
        except PeerLostError as error:
            if AGENT not in os.environ:  # an agent says it, and how that rank ended
                print(f"counterflow: {error}", file=sys.stderr, flush=True)
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
    logging.getLogger(__name__).info("a neighbour is gone: %s", error)
    os._exit(PEER_LOST)  # the group cannot be closed any more


@contextmanager
def joined(parallel: Parallel, device_type: str) -> Iterator[Mesh]:
    """The mesh of the processes that the environment names.   Fails: ConfigError where they are not as many."""
    rank, world, local = _from_environment()
    wanted = parallel.processes
    if world != wanted:
        raise ConfigError(
            f"{world} processes were started and {parallel.pipeline} (pipeline) × {parallel.data} (data, or ranks) = "
            f"{wanted} are asked for; start {wanted}, or change one of them."
        )
    device, backend = torch.device(device_type), "gloo"
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        shared = SHARED in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > gpus > 0
        if local >= gpus and not shared:
            raise ConfigError(
                f"this machine has {gpus} GPUs and rank {rank} needs the one numbered {local}; start fewer processes "
                "here, or set the device to cpu."
            )
        device, backend = torch.device("cuda", local % gpus), "gloo" if shared else "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # A restarted group may find the same store: without a prefix of its own it would read its dead members' addresses.
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=TIMEOUT))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    bound = parallel.multiprocessors
    yield Mesh(parallel.pipeline, parallel.data, rank, device, parallel.expert, bound)
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


def _launch(parallel: Parallel, threads: int, words: Sequence[str], killed: str) -> int:
    """All ranks on this machine, watched; `killed` is what to know and do where one is killed."""
    processes = parallel.processes
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for told in ("elastic", "elastic.agent.server.api", "launcher"):  # what happened is said once, by us
        logging.getLogger(f"torch.distributed.{told}").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=parallel.restarts,
        monitor_interval=0.2,
    )
    try:
        with heard(_ends_when_told_twice()):
            elastic_launch(settings, sys.executable)("-m", "counterflow", *words)
    except SignalException as signalled:
        return 128 + signalled.sigval.value
    except ChildFailedError as failed:
        return _explain(failed, parallel.restarts, killed)
    return 0


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
    rank, failure = min(failed.failures.items(), key=lambda item: _blame(item[1].exitcode))
    if failure.exitcode < 0:
        often = f" after {restarts} restarts" if restarts else ""
        raise RankError(
            f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}{often}, and the others were "
            f"stopped. A kill without a sender is often the system's, for memory: {killed}."
        )
    return failure.exitcode


def _blame(code: int) -> int:
    """How little a rank with this exit code is to blame; the agent's SIGTERM ends those that did nothing."""
    if code < 0:
        return 3 if code == -signal.SIGTERM else 0
    return 2 if code == PEER_LOST else 1
