"""`counterflow train --dry-run`: what a start would do, told without doing it; nothing is written.

The settings come as TOML, so that the output's first part is a run file. Memory is the planner's count. The first
sample is shown where the text was tokenised before; else what is to be tokenised, and how it begins.
"""

from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path

from counterflow.config.load import to_toml
from counterflow.config.run import RunConfig
from counterflow.data.corpus import documents, open_corpus, survey_folder
from counterflow.data.files import files, skipped
from counterflow.data.shards import PARTS, made_from, shards_folder
from counterflow.data.tokenizer import learnt_folder, load, require_tokenizer
from counterflow.plan.cost import Costs
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.layout import schedule_of
from counterflow.plan.memory import Memory, memory
from counterflow.plan.stages import stage_plans
from counterflow.schedule.words import Part, Plan
from counterflow.train import lr
from counterflow.train.begin import (
    continued,
    folder_for,
    machine_bytes,
    newest,
    on_cpu,
    require_resumable,
    require_tracker,
    trained_by,
)
from counterflow.train.folder import CHECKPOINTS
from counterflow.units import aligned, bytes_, count

SHOWN = 400
"""Characters of text."""


def dry_run(run: RunConfig) -> str:
    """Settings, layout, memory and first sample of a run.   Fails: CounterflowError, as a start would."""
    require_tracker(run)
    require_tokenizer(run.data.tokenizer, run.model.vocab_size)
    folder = folder_for(run)
    step = newest(folder / CHECKPOINTS)
    if run.keep.resume != "never":
        require_resumable(run, folder, step)
    where = f"The run would be kept in {folder}."
    if step and run.keep.resume == "never":
        where = f"The run in {folder} would be moved aside."
    elif step:
        complete = trained_by(run, folder, step)
        where = f"The run in {folder} {'is complete, at' if complete else 'would go on from'} step {step}."
    run = continued(run, folder, 0 if run.keep.resume == "never" else step)
    parts = [
        to_toml(run),
        *_layout(run),
        "",
        *_memory(run),
        "",
        *_text(run),
        "",
        where,
        "Nothing was written.",
    ]
    return "\n".join(parts)


def _layout(run: RunConfig) -> Iterator[str]:
    """Steps, batches, and what each rank holds."""
    parallel, train, length = run.parallel, run.train, run.data.sequence_length
    each = train.batch_size // train.micro_batch_size // parallel.data
    planned = f"{lr.num_steps(train, length)} steps, {count(lr.end(train, length) * length)} tokens"
    if train.minutes:
        most = f", {planned} at most" if train.tokens else ""
        planned = f"As many tokens as {train.minutes:g} minutes allow, by steps timed at the start{most}"
    yield (
        f"{planned}; a step of {train.batch_size} "
        f"sequences of {length} tokens is {each} micro-batches of {train.micro_batch_size} on each of {parallel.data} "
        "data ranks."
    )
    if parallel.pipeline > 1:
        yield f"{parallel.schedule} over {parallel.pipeline} pipeline ranks, which hold:"
        schedule = schedule_of(parallel, each)
        plans = stage_plans(run.model, schedule.stages, parallel.placement)
        for rank in range(schedule.ranks):
            yield f"  rank {rank}: " + "; ".join(
                _held(plans[stage.index], run.model.num_layers) for stage in schedule.held(rank)
            )
    else:
        yield "Each rank holds the whole model."
    if parallel.expert > 1:
        yield f"{parallel.expert} data ranks share the experts of each layer, by {parallel.dispatch}."
    yield from parallel.without_effect("cpu" if on_cpu(run) else "cuda")


def _held(plan: Plan, num_layers: int) -> str:
    """A stage's parts by name: embedding, layers 0 to 3, head, MTP 1."""
    layers = sorted({layer for part, layer in plan if part is Part.ATTN and layer < num_layers})
    words = ["embedding"] if (Part.EMBED, 0) in plan else []
    if layers:
        words.append(f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}")
    words += ["head"] if (Part.HEAD, 0) in plan else []
    return ", ".join([*words, *(f"MTP {depth}" for part, depth in plan if part is Part.MERGE)])


def _memory(run: RunConfig) -> Iterator[str]:
    """The planner's count for every rank."""
    parallel, train = run.parallel, run.train
    layout = Layout(
        parallel.pipeline,
        parallel.data,
        parallel.expert,
        train.micro_batch_size,
        parallel.schedule,
        parallel.stages_per_rank or None,
        recompute=train.recompute,
    )
    cpu = on_cpu(run)
    costs = Costs(
        job_of(run, "fp32" if cpu and train.precision == "auto" else ""),
        layout,
        hardware("cpu" if cpu else "h800"),
    )
    microbatches = train.batch_size // train.micro_batch_size // parallel.data
    schedule = (
        schedule_of(parallel, microbatches) if parallel.pipeline > 1 else layout.rule(min(microbatches, 4))
    )
    plans = stage_plans(run.model, schedule.stages, parallel.placement)
    ranks = memory(costs, schedule, plans, parallel.dispatch if parallel.expert > 1 else "")
    yield f"Memory by the planner, in {costs.job.precision}{'' if cpu else ', on GPUs'}:"
    yield aligned(
        [
            ("rank", "weights", "gradients", "optimizer", "activations", "checkpoint", "rest", "together"),
            *map(_row, ranks),
        ]
    )
    if not cpu:
        yield (
            f"For each, its host keeps {bytes_(max(one.host for one in ranks))} at most: a copy of a checkpoint"
            + (" and the averaged weights." if run.train.ema_decay else ".")
        )
    needed, there = sum(one.needed for one in ranks) * parallel.data, machine_bytes()
    if cpu and needed > there:
        yield f"This machine has {bytes_(there)}: too little for {bytes_(needed)}."


def _row(one: Memory) -> tuple[str, ...]:
    sizes = (
        one.weights,
        one.gradients,
        one.masters + one.moments + one.averages,
        one.activations,
        one.checkpoint,
        one.transient + one.buffers + one.reserved,
        one.total,
    )
    return (str(one.rank), *map(bytes_, sizes))


def _text(run: RunConfig) -> Iterator[str]:
    """The first sample, or what is to be tokenised."""
    if is_tokenised(run):
        from counterflow.data.loader import Samples  # torch

        samples = Samples(run.data, run.model.vocab_size, run.train.seed, quiet=True)
        ids = samples.train(0, 1)[0].tolist()
        yield f"The first sample, {len(ids)} tokens: {' '.join(map(str, ids[:8]))} …"
        yield _quoted(samples.tokenizer.decode(ids, specials=True))
        return
    yield "Not tokenised yet; the start would " + (
        f"learn a tokenizer of {run.model.vocab_size} ids and then read"
        if run.data.tokenizer == "train"
        else "read"
    )
    for source in run.data.sources:
        found = files(source)
        size = sum(path.stat().st_size for _, path in found)
        if left := skipped(source):
            yield f"  {left}"
        yield f"  {source.path}: {len(found)} files, {bytes_(size)}, which begin:"
        yield _quoted(next((document.text for document in documents(source)), ""))


def is_tokenised(run: RunConfig) -> bool:
    """Whether everything that is kept of a run's text between runs is there."""
    data, cache = run.data, Path(expanduser(run.data.cache_dir))
    if not all(survey_folder(source, data.held_out, cache).is_dir() for source in data.sources):
        return False
    corpora = [open_corpus(source, data.held_out, cache) for source in data.sources]
    tokenizer = require_tokenizer(data.tokenizer, run.model.vocab_size)
    if tokenizer is None:
        learnt = learnt_folder(corpora, run.model.vocab_size, cache)
        if not learnt.is_dir():
            return False
        tokenizer = load(learnt / "tokenizer.json")
    return all(
        shards_folder(made_from(corpus, part, tokenizer, data.fim_rate), cache).is_dir()
        for corpus in corpora
        for part in PARTS
    )


def _quoted(text: str) -> str:
    shown = text[:SHOWN] + (" …" if len(text) > SHOWN else "")
    return "\n".join(f"  | {line}" for line in shown.splitlines())
