"""A run from its settings to its last checkpoint: started, resumed, measured, stopped, and never lost.

Its folder holds run.toml, provenance.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/, report.html and
picture.png. Starting a run in a folder that has one goes on from its newest checkpoint, and refuses if any setting
that decides its numbers is another one now.
"""

import dataclasses
import fcntl
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from counterflow.comm.mesh import Mesh, device_for
from counterflow.config.load import settings, to_toml
from counterflow.config.run import RunConfig
from counterflow.data.corpus import STDLIB
from counterflow.data.loader import Samples
from counterflow.errors import CheckpointError, ConfigError, CounterflowError
from counterflow.kernels.memory import keep_freed_memory
from counterflow.pipeline.record import Recorder
from counterflow.plan.count import count_parameters
from counterflow.plan.layout import require_layout
from counterflow.train import lr
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.lr import Grain
from counterflow.train.metrics import Metrics, Progress
from counterflow.train.provenance import provenance
from counterflow.train.report import write_report
from counterflow.train.restore import CHECKPOINTS, RUN_TOML, TOKENIZER, folder_of, run_config, write_start
from counterflow.train.timeline import write_timeline
from counterflow.train.trainer import Trainer
from counterflow.units import bytes_, count, seconds

FREE_TO_CHANGE = ("keep", "name", "data.cache_dir", "train.threads", "train.device", "parallel")
"""Settings that a resumed run may have otherwise: they do not decide its numbers, or only by rounding."""
BYTES_EACH = 16
"""Of a parameter in training: fp32 master, gradient and two moments."""
RECORD_STEP = 3
"""The step whose ops are timed: after the first two, which pay for warming up."""
GIVEN = ("master.", "bias.")
"""What a run takes from its step 0, where it has one."""
OTHER_TEXT = "a source or the tokenizer"
OTHER_STDLIB = (
    f"the Python version, or what '{STDLIB}' is (its tables, such as encodings, are no longer in it),"
)
LN2 = 0.6931471805599453


def train(run: RunConfig, mesh: Mesh | None = None) -> int:
    """Train a run to its end or until a signal; the exit code, 0 when it is complete. Every rank calls it."""
    run = resolve(run)
    mesh = mesh or Mesh(device=torch.device(run.train.device))
    folder = Path(run.folder).expanduser().resolve()
    require_memory(run)
    with ExitStack() as stack:
        mesh.first_does(lambda: stack.enter_context(locked(folder)))
        checkpoints = Checkpoints(folder / CHECKPOINTS, run.keep.checkpoints, mesh)
        step = mesh.first_does(lambda: begin(run, folder, checkpoints))
        if step is None:
            return 0
        mesh.first_does(lambda: start_from(run, step, checkpoints))
        samples = open_samples(run, mesh)
        trainer = Trainer(run, samples, mesh)
        already = resume(trainer, checkpoints, step, samples)
        mesh.first_does(lambda: write_run(run, folder, step, samples))
        if mesh.first:
            introduce(trainer, folder, step)
        return loop(trainer, folder, checkpoints, already)


def begin(run: RunConfig, folder: Path, checkpoints: Checkpoints) -> int | None:
    """The step to go on from, 0 for a start; None where the run is complete."""
    if run.keep.resume == "never":
        move_aside(folder)
    step = newest_sound(checkpoints)
    if step:
        require_same_settings(run, folder)
    if run.keep.resume == "must" and not step:
        raise CheckpointError(
            f"{folder} has no checkpoint and keep.resume is 'must'; start with keep.resume=auto."
        )
    planned = lr.total_samples(run.train, run.data.sequence_length, Grain(*require_layout(run)))
    if step and checkpoints.state(step)["sample"] >= planned:
        print(f"{folder} is complete (step {step}); keep.resume=never trains it anew.")
        return None
    return step


def start_from(run: RunConfig, step: int, checkpoints: Checkpoints) -> None:
    """Give a run that begins with the weights of another model its step 0."""
    if run.train.start_from and not step and 0 not in checkpoints.steps():
        write_start(folder_of(run.train.start_from), checkpoints)


def open_samples(run: RunConfig, mesh: Mesh) -> Samples:
    """The run's text; the first rank makes what is cached, the others read it."""
    opened: list[Samples] = []

    def first() -> None:
        opened.append(Samples(run.data, run.model.vocab_size, run.train.seed))

    mesh.first_does(first)
    return opened[0] if opened else Samples(run.data, run.model.vocab_size, run.train.seed, quiet=True)


def resolve(run: RunConfig) -> RunConfig:
    """The run with what was left to the machine decided, and the process set up for it."""
    train = run.train
    device = device_for(train.device, run.parallel.processes)
    if train.threads:
        torch.set_num_threads(train.threads)
    keep_freed_memory()
    precision = train.precision
    if precision == "auto":
        native = (
            torch.cuda.is_bf16_supported(False)
            if device != "cpu"
            else getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
        )
        precision = "bf16" if native else "fp32"
    return dataclasses.replace(run, train=dataclasses.replace(train, device=device, precision=precision))


def require_memory(run: RunConfig) -> None:
    """Refuse a model whose weights and optimizer alone are more than the CPU's memory, before anything is made."""
    counts = count_parameters(run.model)
    each = BYTES_EACH + (4 if run.train.ema_decay else 0) + (2 if run.train.precision == "bf16" else 0)
    needed = (counts.total + counts.mtp) * each
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if run.train.device == "cpu" and needed > there:
        raise ConfigError(
            f"{run.name} needs {bytes_(needed)} for weights, gradients and optimizer, and this machine has "
            f"{bytes_(there)}; one process trains smaller models: choose another, or lower its sizes."
        )


def move_aside(folder: Path) -> None:
    """Give an earlier run another name, so that a new one can have its folder."""
    if (folder / RUN_TOML).is_file():
        aside = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"The earlier run is now {aside}.")
        folder.mkdir(parents=True)


def require_same_settings(run: RunConfig, folder: Path) -> None:
    """Refuse to go on with a checkpoint under settings that would have made another one."""
    changed = list(differences(run_config(folder), run))
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings: {'; '.join(changed[:3])}. Choose another folder with "
            "name=... or keep.folder=..., take the old settings, or start anew with keep.resume=never."
        )


def write_run(run: RunConfig, folder: Path, step: int, samples: Samples) -> None:
    """The whole configuration, where it runs, and the tokenizer: before the first step."""
    beside = folder / (RUN_TOML + ".new")
    beside.write_text(to_toml(run), encoding="utf-8")
    beside.rename(folder / RUN_TOML)
    name = f"provenance-{step}.json" if step else "provenance.json"
    (folder / name).write_text(json.dumps(provenance(), indent=1))
    samples.tokenizer.save(folder / TOKENIZER)


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Settings that decide numbers and are not the same, as 'key was x, is y'."""
    for name in settings(type(old)):
        key, before, after = prefix + name, getattr(old, name), getattr(new, name)
        if before == after or key in FREE_TO_CHANGE:
            continue
        if dataclasses.is_dataclass(before) and type(before) is type(after):
            yield from differences(before, after, key + ".")
        else:
            yield f"{key} was {before!r}, is {after!r}"


def newest_sound(checkpoints: Checkpoints) -> int:
    """The newest checkpoint that is as it was written; 0 without one. What is passed over is said."""
    for step in reversed(checkpoints.steps()):
        try:
            checkpoints.verify(step)
            return step
        except CheckpointError as error:
            if step == checkpoints.steps()[0]:
                raise
            print(f"counterflow: {error} Going on from the one before.", file=sys.stderr)
    return 0


def resume(trainer: Trainer, checkpoints: Checkpoints, step: int, samples: Samples) -> float:
    """Fill the trainer from a checkpoint, if there is one; seconds trained before."""
    if not step:
        if trainer.mesh.first_does(lambda: 0 in checkpoints.steps()):
            weights = {name: piece for name, piece in trainer.pieces().items() if name.startswith(GIVEN)}
            checkpoints.load(0, weights, some=True)
            trainer.begin_from_given()
        return 0.0
    state = trainer.mesh.first_does(lambda: checkpoints.state(step))
    if state["fingerprint"] != samples.fingerprint:
        stdlib = any(source.path == STDLIB for source in trainer.run.data.sources)
        raise CheckpointError(
            f"{checkpoints.path(step)} was trained on other text: {OTHER_STDLIB if stdlib else OTHER_TEXT} has "
            "changed. Bring the old text back, start anew with keep.resume=never, or start from these weights in "
            f"another folder with name=... --from {checkpoints.folder.parent}."
        )
    checkpoints.load(step, trainer.pieces())
    trainer.loaded(state["sample"], step)
    return state["seconds"]


def introduce(trainer: Trainer, folder: Path, step: int) -> None:
    """One line on what is about to be trained."""
    run, samples = trainer.run, trainer.samples
    counts, length = count_parameters(run.model), run.data.sequence_length
    tokens, parallel, where = trainer.total * length, run.parallel, run.train.device
    if parallel.processes > 1:
        how = f"{parallel.schedule} over {parallel.pipeline}" if parallel.pipeline > 1 else "1"
        where = f"{parallel.processes} {where} processes ({how} pipeline × {parallel.data} data ranks)"
    print(
        f"{'Going on with' if step else 'Training'} {run.name}: {count(counts.total + counts.mtp)} parameters in "
        f"{run.train.precision} on {where}, {count(tokens)} tokens ({tokens / samples.train_tokens:.2g} times the "
        f"corpus) in {lr.num_steps(run.train, length, trainer.grain)} steps{f', from step {step}' if step else ''}; "
        f"{folder}/",
        flush=True,
    )


def loop(trainer: Trainer, folder: Path, checkpoints: Checkpoints, already: float) -> int:
    """Steps until the end or a signal; 0, or 128 + the signal."""
    first = trainer.mesh.first
    try:
        stopped, took = run_steps(trainer, folder, checkpoints, already)
    except CounterflowError:
        if first:
            with suppress(OSError):  # the disk may be what failed, and its error is the one to be seen
                write_report(folder)
        raise
    if first:
        write_report(folder)
    if trainer.sample < trainer.total:
        if first:
            print(f"Stopped at step {trainer.steps} and saved; the same command goes on from here.")
        return 128 + stopped
    if first:
        print(f"Trained {trainer.steps} steps in {seconds(took)}.")
    return 0


def run_steps(trainer: Trainer, folder: Path, checkpoints: Checkpoints, already: float) -> tuple[int, float]:
    """Step, measure and save until the end or a signal; the signal or 0, and seconds trained, earlier ones included."""
    keep, start, mesh = trainer.run.keep, time.perf_counter(), trainer.mesh
    stopped, collapses = 0, set()
    with ExitStack() as stack:
        stops = stack.enter_context(stop_signals())
        metrics = stack.enter_context(closing(Metrics(folder, trainer.steps))) if mesh.first else None
        progress = stack.enter_context(Progress(trainer.total, trainer.sample)) if mesh.first else None
        while trainer.sample < trainer.total and not stopped:
            values = timed_step(trainer, folder)
            last = trainer.sample >= trainer.total
            if last or trainer.steps % keep.eval_every == 0:
                values |= evaluate(trainer, None if last else keep.eval_samples)
                if progress:
                    progress.note(
                        f"step {trainer.steps}: held-out {values['held_out_bpb']:.3f} bits per byte"
                    )
            values |= {
                "seconds": already + time.perf_counter() - start,
                "memory_bytes": peak_memory(trainer.device),
            }
            if metrics and (last or trainer.steps % keep.log_every == 0 or "held_out_loss" in values):
                metrics.write(values)
            if progress:
                for line in collapsed(values, collapses):
                    progress.note(line)
                progress.update(values)
            stopped = max(mesh.everyone(stops[0] if stops else 0))
            if last or stopped or trainer.steps % keep.checkpoint_every == 0:
                state = {"sample": trainer.sample, "step": trainer.steps, "seconds": values["seconds"]}
                state["fingerprint"] = trainer.samples.fingerprint
                checkpoints.save(trainer.steps, trainer.pieces(), state)
    return stopped, already + time.perf_counter() - start


def timed_step(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """One step; that of `parallel.record_step` leaves its timeline."""
    wanted = trainer.run.parallel.record_step or RECORD_STEP
    if trainer.pipeline is None or trainer.steps + 1 != wanted:
        return trainer.step()
    recorder = Recorder(trainer.device)
    values = trainer.step(recorder)
    spans = [span for rank in trainer.mesh.everyone(recorder.spans()) for span in rank]
    if trainer.mesh.first and trainer.pipeline.last:
        write_timeline(folder, *trainer.pipeline.last, spans)
    return values


def collapsed(values: dict[str, Any], known: set[str]) -> Iterator[str]:
    """A line for every layer whose routing has collapsed, more than half of its experts without a token; said once."""
    for layer, counts in values["load"].items():
        dead = sum(count == 0 for count in counts)
        if 2 * dead <= len(counts):
            known.discard(layer)
        elif layer not in known:
            known.add(layer)
            yield (
                f"step {values['step']}: routing of {layer} has collapsed, {dead} of {len(counts)} experts got no "
                "token; raise train.bias_speed or lower train.lr.peak if it stays so"
            )


def evaluate(trainer: Trainer, most: int | None) -> dict[str, float]:
    """Held-out loss over at most so many samples (None: all), in nats a token and in bits per byte of text."""
    held_out = trainer.samples.num_held_out
    loss = trainer.held_out_loss(held_out if most is None else min(most, held_out))
    return {"held_out_loss": loss, "held_out_bpb": loss / LN2 / trainer.samples.bytes_per_token}


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU if the run is there, else the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process trains in a folder; another is told so.

    The lock file stands beside the folder, so that the folder itself may be moved aside while it is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training in {folder}; wait for it, or choose another folder with name=..."
            ) from None
        file.write(str(os.getpid()))
        yield


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while inside, so that no step is cut short; a second SIGINT stops at once."""
    got: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in got:
            raise KeyboardInterrupt
        got.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
