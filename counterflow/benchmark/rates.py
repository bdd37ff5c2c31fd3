"""What this machine reaches at a model's shapes, as the file that `counterflow plan --hardware` reads.

Every rate is timed with the functions that training calls and divided by what `plan` counts for them, so that the
planner gives back the times that were measured. Launches are timed with a narrow model's step on few tokens
(`launches`): autograd and Python cost more than a bare kernel. Processes measure at once, as they train at once, and
the slowest speaks for all. Not taken: a table of times by shape, which says nothing of another micro-batch.
"""

import ctypes
import gc
import json
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from counterflow.benchmark.launches import FEW, NARROW, launch_seconds
from counterflow.benchmark.processes import on_processes
from counterflow.benchmark.steps import RandomTokens
from counterflow.benchmark.timing import (
    Bench,
    RatesSettings,
    attention_rate,
    grouped_rate,
    passes_rate,
    product_rate,
)
from counterflow.comm.mesh import PRECISIONS, Mesh, precision_for
from counterflow.config.load import load_run
from counterflow.config.model import ModelConfig
from counterflow.config.models import MODELS
from counterflow.config.run import Parallel
from counterflow.errors import ConfigError
from counterflow.kernels.memory import keep_freed_memory
from counterflow.progress import Progress
from counterflow.train.trainer import Trainer

__all__ = ["Rates", "RatesSettings", "measure_rates", "measured", "rates_toml", "slowest"]
LINK_BYTES = 16 << 20


@dataclass(frozen=True)
class Rates:
    """What was measured, one process's share of the machine."""

    product_flops_per_s: float
    """Products with the model's matrices, forward and both backward ones."""
    grouped_flops_per_s: float
    """The routed experts' products."""
    attention_flops_per_s: float
    """The core, forward and backward, causal FLOPs."""
    copy_bytes_per_s: float
    """Read and written."""
    passes_bytes_per_s: float
    """Norms and SwiGLU, forward and backward, bytes as `plan.eager` counts them."""
    launch_s: float
    """The host's, for one kernel, autograd and Python included."""
    reserved_bytes: float
    """Of the process, or on the GPU, beyond tensors: interpreter, libraries, compiled kernels, context."""
    link_bytes_per_s: float = 0.0
    """From one process to another; 0: there was one."""
    link_latency_s: float = 0.0


def measure_rates(settings: RatesSettings) -> Rates:
    """The machine's rates.   Cost: half a minute, a process for each of `processes`.   Fails: ConfigError."""
    settings = settled(settings)
    if settings.processes == 1:
        return measured(Mesh(device=torch.device("cuda" if _on_gpu(settings) else "cpu")), settings)
    parallel, device = Parallel(data=settings.processes), "cuda" if _on_gpu(settings) else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        on_processes(_rank, parallel, device, settings, folder)
        files = [Path(folder) / f"{rank}.json" for rank in range(settings.processes)]
        return slowest([Rates(**json.loads(file.read_text())) for file in files])


def slowest(rates: Sequence[Rates]) -> Rates:
    """Of every rate the least, of every time and size the largest."""
    every = [asdict(one) for one in rates]
    worst = {
        name: max if name.endswith(("_s", "_bytes")) and "per_s" not in name else min for name in every[0]
    }
    return Rates(**{name: worst[name](one[name] for one in every) for name in worst})


def rates_toml(settings: RatesSettings, found: Rates) -> str:
    """The rates as a file for `counterflow plan --hardware`."""
    settings = settled(settings)
    peak, product = max(found.product_flops_per_s, found.attention_flops_per_s), found.product_flops_per_s
    link = ""
    if found.link_bytes_per_s:
        link = f"nvlink_bytes_per_s = {found.link_bytes_per_s:.4g}\n"
        link += (
            f"[fabric]\nbytes_per_s = {found.link_bytes_per_s:.4g}\nlatency_s = {found.link_latency_s:.3g}\n"
        )
    memory = max(found.copy_bytes_per_s, found.passes_bytes_per_s)
    update = found.copy_bytes_per_s / memory
    return f"""# counterflow bench rates: {settings.model}, micro-batches of {settings.micro_batch} × \
{settings.sequence_length} tokens, {settings.processes} processes
base = "{_base(settings)}"
[card]
{settings.precision}_flops = {peak:.4g}
memory_bytes_per_s = {memory:.4g}
launch_s = {found.launch_s:.3g}
reserved_bytes = {found.reserved_bytes:.4g}
source = "counterflow bench rates"
{link}[efficiencies]
{settings.precision}_product = {product / peak:.4g}
grouped_product = {found.grouped_flops_per_s / product:.4g}
attention = {found.attention_flops_per_s / peak:.4g}
memory = {found.passes_bytes_per_s / memory:.4g}
update = {update:.4g}
nvlink = 1.0
network = 1.0
collective = 1.0
"""


def settled(settings: RatesSettings) -> RatesSettings:
    """The settings with the precision decided.   Fails: ConfigError where they are impossible."""
    _require(settings)
    device = "cuda" if _on_gpu(settings) else "cpu"
    return replace(settings, precision=precision_for(settings.precision, device))


def _require(settings: RatesSettings) -> None:
    if settings.model not in MODELS:
        raise ConfigError(
            f"model is '{settings.model}'; rates are measured at the shapes of {', '.join(MODELS)}."
        )
    for name in ("sequence_length", "micro_batch", "processes", "repeats"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}; it must be at least 1.")
    if settings.device == "cuda" and torch.cuda.device_count() < settings.processes:
        raise ConfigError(
            f"{settings.processes} processes need as many GPUs and PyTorch sees {torch.cuda.device_count()}; lower "
            "processes, or set device=cpu."
        )


def _on_gpu(settings: RatesSettings) -> bool:
    return settings.device != "cpu" and torch.cuda.device_count() >= settings.processes


def _base(settings: RatesSettings) -> str:
    if settings.base or not _on_gpu(settings):
        return settings.base or "cpu"
    name = torch.cuda.get_device_name(0).lower()
    return next((card for card in ("gb200", "b200", "h200", "h800", "h100", "a100") if card in name), "h100")


def _rank(mesh: Mesh, settings: RatesSettings, folder: str) -> None:
    (Path(folder) / f"{mesh.rank}.json").write_text(json.dumps(asdict(measured(mesh, settings))))


def measured(mesh: Mesh, settings: RatesSettings, shapes: ModelConfig | None = None) -> Rates:
    """One process's rates, at the shapes of the settings' model or of another. A collective."""
    keep_freed_memory()
    settings = settled(settings)
    bench = Bench(settings, mesh.device, PRECISIONS[settings.precision], shapes or MODELS[settings.model])
    parts: Mapping[str, Callable[[], Any]] = {
        "products": lambda: product_rate(bench),
        "experts": lambda: grouped_rate(bench),
        "attention": lambda: attention_rate(bench),
        "copies": lambda: copy_rate(bench),
        "norms and SwiGLU": lambda: passes_rate(bench),
        "launches": lambda: launch_seconds(bench),
        "the link": lambda: link(bench),
        "memory": lambda: reserved_after(mesh, settings.precision),
    }
    found: list[Any] = []
    with Progress("measuring", len(parts), shown=mesh.first) as progress:
        for what, measure in parts.items():
            progress.update(len(found), what)
            found.append(measure())
    *rates, joined, reserved = found
    return Rates(*rates, reserved, *joined)  # pyright: ignore[reportCallIssue]


def copy_rate(bench: Bench) -> float:
    """Bytes/s, read and written, of copies beyond every cache."""
    copied, into = bench.draw(1 << 26), bench.draw(1 << 26)
    return 2 * copied.nbytes / bench.seconds(lambda: lambda: into.copy_(copied))


def reserved_after(mesh: Mesh, precision: str) -> float:
    """What is reserved after a training step."""
    train_once(mesh, precision)
    return reserved_bytes(mesh.device)


def train_once(mesh: Mesh, precision: str) -> None:
    """A training step of a narrow model, so that the process holds what training loads besides tensors."""
    words = [f"parallel.data={mesh.data}", "parallel.pipeline=1", f"train.precision={precision}"]
    words += [f"data.sequence_length={FEW}", "train.micro_batch_size=1", "train.batch_start=0"]
    run = load_run("tiny", [*words, f"train.batch_size={mesh.data}"])
    run = replace(run, model=NARROW)
    Trainer(run, RandomTokens(run), mesh).step()


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # noqa: SIM905
    ]


def free_heap_bytes() -> int:
    """What glibc holds and nothing uses, as its mallinfo2 tells; 0 where there is none."""
    call = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if call is None:
        return 0
    call.restype = _MallInfo
    return call().fordblks


def reserved_bytes(device: torch.device) -> float:
    """Taken beyond tensors once everything has run: interpreter, libraries, compiled kernels, the GPU's context."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free - torch.cuda.memory_reserved(device))
    return float(resident_bytes() - free_heap_bytes())


def most_in_use(act: Callable[[], object]) -> int:
    """The most bytes that are resident and in use during an act: without what the heap holds and nothing uses."""
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(1e-3):
            most = max(most, resident_bytes() - free_heap_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        act()
    finally:
        over.set()
        watching.join()
    return most


def resident_bytes(name: str = "VmRSS") -> int:
    """Of this process now, or at most so far (VmHWM); where there is no /proc, at most so far."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def link(bench: Bench) -> tuple[float, float]:
    """(bytes/s of one direction, latency); zeros for one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0, 0.0
    peers, took = dist.get_world_size(), []
    for size in (LINK_BYTES // 4, 1):
        flat = torch.zeros(size, device=bench.device)
        means = []
        for _ in range(bench.settings.repeats + 1):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(4):
                dist.all_reduce(flat)
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            means.append((time.perf_counter() - start) / 4)
        took.append(statistics.median(means[1:]))
    return 2 * LINK_BYTES * (peers - 1) / peers / (took[0] - took[1]), took[1] / 2
