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
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from counterflow.config.load import settings, to_toml
from counterflow.config.run import RunConfig
from counterflow.data.loader import Samples
from counterflow.errors import CheckpointError, ConfigError, CounterflowError
from counterflow.kernels.memory import keep_freed_memory
from counterflow.plan.count import count_parameters
from counterflow.train import lr
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.metrics import Metrics, Progress
from counterflow.train.provenance import provenance
from counterflow.train.report import write_report
from counterflow.train.restore import CHECKPOINTS, RUN_TOML, TOKENIZER, run_config
from counterflow.train.trainer import Trainer
from counterflow.units import bytes_, count, seconds

FREE_TO_CHANGE = ("keep", "name", "data.cache_dir", "train.threads", "train.device")
"""Settings that a resumed run may have otherwise: they do not decide its numbers, or only by rounding."""
BYTES_EACH = 16
"""Of a parameter in training: fp32 master, gradient and two moments."""
LN2 = 0.6931471805599453


def train(run: RunConfig) -> int:
    """Train a run to its end or until a signal; the exit code, 0 when it is complete."""
    run = resolve(run)
    folder = Path(run.folder).expanduser().resolve()
    require_memory(run)
    with locked(folder):
        if run.keep.resume == "never":
            move_aside(folder)
        checkpoints = Checkpoints(folder / CHECKPOINTS, run.keep.checkpoints)
        step = newest_sound(checkpoints)
        if step:
            require_same_settings(run, folder)
        if run.keep.resume == "must" and not step:
            raise CheckpointError(
                f"{folder} has no checkpoint and keep.resume is 'must'; start with keep.resume=auto."
            )
        planned = lr.total_samples(run.train, run.data.sequence_length)
        if step and checkpoints.state(step)["sample"] >= planned:
            print(f"{folder} is complete (step {step}); keep.resume=never trains it anew.")
            return 0
        samples = Samples(run.data, run.model.vocab_size, run.train.seed)
        trainer = Trainer(run, samples, torch.device(run.train.device))
        already = resume(trainer, checkpoints, step, samples)
        write_run(run, folder, step, samples)
        introduce(trainer, folder, step)
        return loop(trainer, folder, checkpoints, already)


def resolve(run: RunConfig) -> RunConfig:
    """The run with what was left to the machine decided, and the process set up for it."""
    train = run.train
    device = train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "train.device is 'cuda' and PyTorch sees no GPU; set train.device=cpu or check the driver."
        )
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
        return 0.0
    state = checkpoints.state(step)
    if state["fingerprint"] != samples.fingerprint:
        raise CheckpointError(
            f"{checkpoints.path(step)} was trained on other text: a source, the tokenizer or the Python version has "
            "changed. Bring the old text back, or start anew with keep.resume=never."
        )
    tensors = trainer.tensors()
    checkpoints.load(step, tensors)
    trainer.loaded(state["sample"], step, tensors["rng"])
    return state["seconds"]


def introduce(trainer: Trainer, folder: Path, step: int) -> None:
    """One line on what is about to be trained."""
    run, samples = trainer.run, trainer.samples
    parameters = count(sum(parameter.numel() for parameter in trainer.model.parameters()))
    length = run.data.sequence_length
    print(
        f"{'Going on with' if step else 'Training'} {run.name}: {parameters} parameters in {run.train.precision} on "
        f"{run.train.device}, {count(trainer.total * length)} of {count(samples.train_tokens)} tokens in "
        f"{lr.num_steps(run.train, length)} steps{f', from step {step}' if step else ''}; {folder}/"
    )


def loop(trainer: Trainer, folder: Path, checkpoints: Checkpoints, already: float) -> int:
    """Steps until the end or a signal; 0, or 128 + the signal."""
    try:
        stops, took = run_steps(trainer, folder, checkpoints, already)
    except CounterflowError:
        with suppress(OSError):  # the disk may be what failed, and its error is the one to be seen
            write_report(folder)
        raise
    write_report(folder)
    if trainer.sample < trainer.total:
        print(f"Stopped at step {trainer.steps} and saved; the same command goes on from here.")
        return 128 + stops[0]
    print(f"Trained {trainer.steps} steps in {seconds(took)}.")
    return 0


def run_steps(
    trainer: Trainer, folder: Path, checkpoints: Checkpoints, already: float
) -> tuple[list[int], float]:
    """Step, measure and save until the end or a signal; the signals, and seconds trained, earlier ones included."""
    keep, start = trainer.run.keep, time.perf_counter()
    metrics, progress_bar = Metrics(folder, trainer.steps), Progress(trainer.total, trainer.sample)
    with closing(metrics), stop_signals() as stops, progress_bar as progress:
        while trainer.sample < trainer.total and not stops:
            values = trainer.step()
            last = trainer.sample >= trainer.total
            if last or trainer.steps % keep.eval_every == 0:
                values |= evaluate(trainer, None if last else keep.eval_samples)
                progress.note(f"step {trainer.steps}: held-out {values['held_out_bpb']:.3f} bits per byte")
            values |= {
                "seconds": already + time.perf_counter() - start,
                "memory_bytes": peak_memory(trainer.device),
            }
            if last or trainer.steps % keep.log_every == 0 or "held_out_loss" in values:
                metrics.write(values)
            progress.update(values)
            if last or stops or trainer.steps % keep.checkpoint_every == 0:
                state = {"sample": trainer.sample, "step": trainer.steps, "seconds": values["seconds"]}
                state["fingerprint"] = trainer.samples.fingerprint
                checkpoints.save(trainer.steps, trainer.tensors(), state)
    return stops, already + time.perf_counter() - start


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
