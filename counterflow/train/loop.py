"""A run from its settings to its last checkpoint: started, resumed, measured, stopped, and never lost.

Its folder holds run.toml, provenance.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/, report.html and
picture.png. Starting a run in a folder that has one goes on from its newest checkpoint; what may be another setting
then is in `changes.py`.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from signal import SIGPIPE
from typing import Any

import torch

from counterflow.comm.mesh import Mesh, device_for, precision_for
from counterflow.config.load import to_toml
from counterflow.config.run import RunConfig
from counterflow.data.files import STDLIB, skipped
from counterflow.data.loader import Samples, open_text, tokenise_share
from counterflow.errors import CheckpointError, CounterflowError
from counterflow.interrupt import STOPS, stop_signals
from counterflow.kernels.memory import keep_freed_memory
from counterflow.machine import cores
from counterflow.pipeline.record import Recorder
from counterflow.plan.count import count_parameters
from counterflow.progress import Progress, say
from counterflow.train import lr
from counterflow.train.begin import (
    asked_of,
    begin,
    changed_at,
    continued,
    folder_for,
    locked,
    require_memory,
)
from counterflow.train.behind import Behind
from counterflow.train.changes import recorded, together
from counterflow.train.changes import to_toml as changes_to_toml
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.collapse import Collapses
from counterflow.train.fit import fit
from counterflow.train.folder import CHECKPOINTS, RUN_TOML, TOKENIZER, folder_of
from counterflow.train.metrics import Metrics, Tracker, facts, load_every
from counterflow.train.patience import Patience
from counterflow.train.provenance import provenance
from counterflow.train.report import write_report
from counterflow.train.restore import write_start
from counterflow.train.timeline import write_timeline
from counterflow.train.trainer import AVERAGES, Trainer, moe_names
from counterflow.units import count, seconds

FIRST_RECORD, RECORD = 3, 50
"""Steps whose ops are timed: the first, so that a run that is soon stopped has a timeline too, is slow and routes
unevenly; the second, or in a short run its middle, takes its place."""
EARLY = ", stopped early: the last {} held-out losses were no better than the best before (train.patience)"
OTHER_TEXT = "a source or the tokenizer"
OTHER_STDLIB = (
    f"the Python version, or what '{STDLIB}' is (its tables, such as encodings, are no longer in it),"
)
STOPPING = "Stopping after this step and saving; Ctrl-C again stops at once."
LN2 = 0.6931471805599453


def train(run: RunConfig, mesh: Mesh | None = None) -> int:
    """Train a run to its end or until a signal; the exit code, 0 when it is complete. Every rank calls it."""
    run = resolve(run)
    mesh = mesh or Mesh(device=torch.device(run.train.device))
    folder = folder_for(run)
    if run.train.device == "cpu":
        require_memory(run)
    with ExitStack() as stack:
        mesh.first_does(lambda: stack.enter_context(locked(folder)))
        checkpoints = Checkpoints(folder / CHECKPOINTS, run.keep.checkpoints, mesh)
        mesh.first_does(checkpoints.clear)
        step = mesh.first_does(lambda: begin(run, folder))
        if step is None:
            return 0
        state = mesh.first_does(lambda: checkpoints.state(step) if step else asked_of(run))
        run = mesh.first_does(lambda: continued(run, folder, step))
        mesh.first_does(lambda: start_from(run, step, checkpoints))
        samples = open_samples(run, mesh)
        with Progress("making the model", shown=mesh.first, file=sys.stdout):
            trainer = Trainer(run, samples, mesh)
            resume(trainer, checkpoints, state)
        if run.train.minutes:
            fit(trainer)
        mesh.first_does(lambda: write_run(trainer.run, folder, step, samples))
        if mesh.first:
            introduce(trainer, folder, step)
        return loop(trainer, folder, checkpoints, state)


def start_from(run: RunConfig, step: int, checkpoints: Checkpoints) -> None:
    """Give a run that begins with the weights of another model its step 0."""
    if run.train.start_from and not step and 0 not in checkpoints.steps():
        alone = Checkpoints(checkpoints.folder, checkpoints.keep)  # the others do not write
        write_start(folder_of(run.train.start_from), alone)


def open_samples(run: RunConfig, mesh: Mesh) -> Samples:
    """The run's text: read through by the first rank, tokenised by all in shares, checked by each."""
    data, size, opened = run.data, run.model.vocab_size, list[Samples]()

    if mesh.first:
        for line in filter(None, map(skipped, data.sources)):
            say(f"counterflow: {line}", sys.stderr)

    def read_through() -> None:
        open_text(data, size)

    def open_here() -> None:
        if not opened:
            opened.append(Samples(data, size, run.train.seed, quiet=not mesh.first))

    if mesh.size > 1:
        mesh.first_does(read_through)
        mesh.all_do(lambda: tokenise_share(data, size, (mesh.rank, mesh.size), quiet=not mesh.first))
    mesh.first_does(open_here)  # what all have made becomes whole
    mesh.all_do(open_here)
    return opened[0]


def resolve(run: RunConfig) -> RunConfig:
    """The run with what was left to the machine decided, and the process set up for it."""
    train = run.train
    device = device_for(train.device, run.parallel.processes)
    torch.set_num_threads(train.threads or min(torch.get_num_threads(), cores()))
    keep_freed_memory()
    precision = precision_for(train.precision, device)
    return dataclasses.replace(run, train=dataclasses.replace(train, device=device, precision=precision))


def write_run(run: RunConfig, folder: Path, step: int, samples: Samples) -> None:
    """The whole configuration and what was changed in it, where it runs, and the tokenizer: before the first step."""
    kept = together(recorded(folder), changed_at(run, folder, step), step) if step else []
    beside = folder / (RUN_TOML + ".new")
    beside.write_text(to_toml(run) + changes_to_toml(kept), encoding="utf-8")
    beside.rename(folder / RUN_TOML)
    name = f"provenance-{step}.json" if step else "provenance.json"
    (folder / name).write_text(json.dumps(provenance(), indent=1), encoding="utf-8")
    samples.tokenizer.save(folder / TOKENIZER)


def resume(trainer: Trainer, checkpoints: Checkpoints, state: Mapping[str, Any]) -> None:
    """Fill the trainer from the checkpoint that has this state; at a start from a step 0, if there is one."""
    if "step" not in state:
        if trainer.mesh.first_does(lambda: 0 in checkpoints.steps()):
            checkpoints.load(0, trainer.given(), some=True)
            trainer.begin_from_given()
        return
    step = state["step"]
    if state["fingerprint"] != trainer.samples.fingerprint:
        stdlib = any(source.path == STDLIB for source in trainer.run.data.sources)
        raise CheckpointError(
            f"{checkpoints.path(step)} was trained on other text: {OTHER_STDLIB if stdlib else OTHER_TEXT} has "
            "changed. Bring the old text back, start anew with keep.resume=never, or start from these weights in "
            f"another folder with name=... --from {checkpoints.folder.parent}."
        )
    averaged = trainer.mesh.first_does(lambda: checkpoints.holds(step, AVERAGES))
    pieces = {
        name: piece for name, piece in trainer.pieces().items() if averaged or not name.startswith(AVERAGES)
    }
    checkpoints.load(step, pieces, some=averaged and trainer.ema is None)
    trainer.loaded(state["sample"], step, averaged)


def introduce(trainer: Trainer, folder: Path, step: int) -> None:
    """One line on what is about to be trained, after settings that change nothing in it."""
    run, samples = trainer.run, trainer.samples
    counts, length = count_parameters(run.model), run.data.sequence_length
    left = lr.num_steps(run.train, length, trainer.sample)
    tokens = lr.end(run.train, length, trainer.sample) * length
    parallel, where = run.parallel, run.train.device
    if parallel.processes > 1:
        how = f"{parallel.schedule} over {parallel.pipeline}" if parallel.pipeline > 1 else "1"
        where = f"{parallel.processes} {where} processes ({how} pipeline × {parallel.data} data ranks)"
    start = f" from the weights of {run.train.start_from}" if run.train.start_from else ""
    mtp = f" + {count(counts.mtp)} (MTP)" if counts.mtp else ""
    for line in parallel.without_effect(run.train.device):
        say(f"counterflow: {line}", sys.stderr)
    say(
        f"{'Going on with' if step else 'Training'} {run.name}{start}: {count(counts.total)}{mtp} parameters in "
        f"{run.train.precision} on {where}, {count(tokens)} tokens ({tokens / samples.train_tokens:.2g} times the "
        f"corpus) in {step + left} steps{f', from step {step}' if step else ''}; {folder}/"
    )
    if changed := "; ".join(str(change) for change in recorded(folder) if step and change.step == step):
        say(f"counterflow: from step {step} on {changed}.", sys.stderr)


def loop(trainer: Trainer, folder: Path, checkpoints: Checkpoints, state: Mapping[str, Any]) -> int:
    """Steps until the end or a signal; 0, or 128 + the signal."""
    first = trainer.mesh.first
    reports = first and trainer.run.keep.report
    try:
        stopped, took = run_steps(trainer, folder, checkpoints, state)
    except CounterflowError as error:
        if error.shared:  # the others stay until then: an agent that sees one gone would end the first
            trainer.mesh.first_does(lambda: last_page(trainer, folder))
        elif first:
            last_page(trainer, folder)
        raise
    if first:
        early = "" if trainer.sample >= trainer.total else EARLY.format(trainer.run.train.patience)
        ended = f"Trained {trainer.steps} steps in {seconds(took)}{early}."
        if stopped:
            ended = f"Stopped at step {trainer.steps} and saved; the same command goes on from here."
        say(ended)
    if reports:
        with Progress("writing the page"):
            write_report(folder)
    return 128 + stopped if stopped else 0


def last_page(trainer: Trainer, folder: Path) -> None:
    """The page of a run that failed; the disk may be what failed, and its error is the one to be seen."""
    if trainer.run.keep.report:
        with suppress(OSError):
            write_report(folder)


def run_steps(
    trainer: Trainer, folder: Path, checkpoints: Checkpoints, state: Mapping[str, Any]
) -> tuple[int, float]:
    """Step, measure and save until the end or a signal; the signal or 0, and seconds trained, earlier ones included."""
    keep, start, mesh = trainer.run.keep, time.perf_counter() - state.get("seconds", 0.0), trainer.mesh
    stopped, last, collapses, length = 0, False, Collapses(), trainer.run.data.sequence_length
    patience = Patience(trainer.run.train.patience, state)
    whole = lr.end(trainer.run.train, length, trainer.sample)
    planned = trainer.steps + lr.num_steps(trainer.run.train, length, trainer.sample), whole * length
    with ExitStack() as stack:
        metrics = open_metrics(trainer, folder, stack)
        progress = Progress("", whole, trainer.sample, shown=mesh.first, stays=True, file=sys.stdout)
        stack.enter_context(progress)
        stops = stack.enter_context(stop_signals(lambda: progress.note(STOPPING), STOPS))
        saver = stack.enter_context(Behind(checkpoints, keep.checkpoint_async, progress.note))
        while not last and not stopped:
            values = timed_step(trainer, folder)
            last = trainer.sample >= trainer.total
            if not last and trainer.steps % keep.eval_every == 0:
                values |= evaluate(trainer, keep.eval_samples, progress)
                last = patience.is_over_after(values["held_out_loss"])
            values |= evaluate(trainer, None, progress) if last else {}
            values |= {
                "seconds": time.perf_counter() - start,
                "checkpoint_seconds": saver.waited(),
                "memory_bytes": peak_memory(trainer.device),
            }
            if metrics and (last or trainer.steps % keep.log_every == 0 or "held_out_loss" in values):
                metrics.write(values)
            if line := collapses.line(trainer.steps, values["load"], trainer.done < trainer.warmup):
                progress.note(line)
            progress.update(trainer.sample, *facts(values, *planned))
            stopped = saver.agreed(stops[0] if stops else SIGPIPE if progress.closed else 0)
            if last or stopped or trainer.steps % keep.checkpoint_every == 0:
                place = {"sample": trainer.sample, "step": trainer.steps, "seconds": values["seconds"]}
                asked = {name: state.get(name, 0) for name in ("minutes", "steps")}
                began = {"fingerprint": trainer.samples.fingerprint, **asked}
                trainer.require_sound()
                saver.save(trainer.steps, trainer.pieces(), place | began | patience.state())
    return 0 if last else stopped, time.perf_counter() - start


def open_metrics(trainer: Trainer, folder: Path, stack: ExitStack) -> Metrics | None:
    """The first rank's, until the stack closes; where it fails, the others do not wait for the first."""
    opened: list[Metrics] = []

    def first() -> None:
        tracker = Tracker(folder, trainer.run) if trainer.run.keep.wandb else None
        changed = [change._asdict() for change in recorded(folder) if change.step == trainer.steps]
        steps = lr.num_steps(trainer.run.train, trainer.run.data.sequence_length)
        every = load_every(len(moe_names(trainer.run.model)) * trainer.run.model.num_routed_experts, steps)
        metrics = Metrics(folder, trainer.steps, tracker, changed, every)
        opened.append(stack.enter_context(closing(metrics)))

    trainer.mesh.first_does(first)
    return opened[0] if opened else None


def timed_step(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """One step; that of `parallel.record_step` leaves its timeline."""
    if trainer.pipeline is None or trainer.steps + 1 not in recorded_steps(trainer.run):
        return trainer.step()
    recorder = Recorder(trainer.device)
    values = trainer.step(recorder)
    mine = [] if trainer.mesh.data_rank else recorder.spans()  # a pipeline each has its own; one is drawn
    spans = [span for rank in trainer.mesh.everyone(mine) for span in rank]
    if trainer.mesh.first and trainer.pipeline.last:
        write_timeline(folder, *trainer.pipeline.last, spans, trainer.steps)
    return values


def recorded_steps(run: RunConfig) -> tuple[int, ...]:
    """The steps that leave their timeline, each over the one before."""
    if run.parallel.record_step:
        return (run.parallel.record_step,)
    whole = lr.num_steps(run.train, run.data.sequence_length)
    return min(FIRST_RECORD, whole), max(min(FIRST_RECORD, whole), min(RECORD, whole // 2))


def evaluate(trainer: Trainer, most: int | None, progress: Progress) -> dict[str, float]:
    """Held-out loss over at most so many samples (None: all), in nats a token and in bits per byte of text; noted."""
    held_out = trainer.samples.num_held_out
    number = held_out if most is None else min(most, held_out)
    done, start = 0, time.perf_counter()

    def watch(samples: int) -> None:
        nonlocal done
        done += samples
        progress.update(done, f"{done}/{number} samples")

    with progress.part("held-out", number):
        loss = trainer.held_out_loss(number, watch)
    bits = loss / LN2 / trainer.samples.bytes_per_token
    progress.note(f"step {trainer.steps}: held-out {bits:.3f} bits per byte")
    took = time.perf_counter() - start
    return {"held_out_loss": loss, "held_out_bpb": bits, "evaluation_seconds": took}


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU if the run is there, else the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
