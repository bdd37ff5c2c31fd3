"""A rank's share of a pipelined model: its layers, who else holds them, and a step through the executor.

Every rank builds the whole model on the meta device, which costs nothing, and gives memory only to what its stages
use. Who holds what follows from schedule and plans alone: a layer is held by the ranks of its stage in either pipe,
embedding and head by every rank that uses them, all of them with every data index.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from counterflow.comm.channels import ProcessChannels
from counterflow.comm.mesh import Group, Mesh
from counterflow.config.run import RunConfig
from counterflow.data.loader import Samples
from counterflow.model.layer import Layer
from counterflow.model.mtp import MtpModule
from counterflow.model.rope import rope_table
from counterflow.model.transformer import Transformer, keep_experts
from counterflow.pipeline.execute import Executor
from counterflow.pipeline.record import Recorder
from counterflow.pipeline.stage import Stage, StepSettings, Sums
from counterflow.plan.layout import schedule_of
from counterflow.plan.stages import stage_plans, without_mtp
from counterflow.schedule import forward_only
from counterflow.schedule.transfers import transfers
from counterflow.schedule.words import Part, Plan, Product, Schedule, StageId
from counterflow.train.spread import holders_of


@runtime_checkable
class StepSamples(Protocol):
    """What a step asks of samples: a run's text, or what a benchmark draws."""

    def train(self, index: int, count: int) -> Tensor:
        """The samples from the global `index` on, (count, length + 1)."""
        ...


class Pipelined:
    """The pipeline as one rank sees it."""

    def __init__(self, run: RunConfig, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        unit = run.train.micro_batch_size * run.parallel.data
        self.schedule = schedule_of(run.parallel, run.train.batch_size // unit)
        self.plans = stage_plans(run.model, self.schedule.stages, run.parallel.placement)
        with torch.device("meta"):
            self.model = Transformer(run.model)
        mine = [part for stage in self.schedule.held(mesh.pipeline_rank) for part in self.plans[stage.index]]
        hold(self.model, mine)
        if mesh.expert > 1:
            keep_experts(self.model, mesh.expert_rank, mesh.expert)
        self.model.to_empty(device="cpu")
        self.model.rope = rope_table(run.model, run.model.max_positions)
        self._executors: dict[tuple[int, bool, bool], Executor] = {}
        self._channels: ProcessChannels | None = None
        self.last: tuple[Schedule, dict[StageId, Plan]] | None = None
        """The schedule and all ranks' plans of the last step."""

    def groups(self) -> list[tuple[Group, frozenset[str]]]:
        """The names that the same ranks hold, with their group; the same list in order on every rank."""
        with torch.device("meta"):
            whole = Transformer(self.run.model)
        holders: dict[tuple[int, ...], set[str]] = {}
        rows = [
            {part for stage in self.schedule.held(rank) for part in self.plans[stage.index]}
            for rank in range(self.schedule.ranks)
        ]
        for name, _ in whole.named_parameters():
            users = parts_of(name, self.run.model.num_layers, self.run.model.num_mtp_modules)
            key = tuple(rank for rank, parts in enumerate(rows) if parts & users)
            holders.setdefault(key, set()).add(name)
        return holders_of(self.mesh, holders)

    def step(
        self, samples: StepSamples, start: int, batch: int, mtp_weight: float, record: Recorder | None = None
    ) -> Sums:
        """Accumulate the gradients of the `batch` global samples from `start` on."""
        micro, length = self.run.train.micro_batch_size, self.run.data.sequence_length
        settings = StepSettings(micro, length, 1.0 / (batch * length), mtp_weight)
        each = batch // self.mesh.data
        assert each % micro == 0 and each * self.mesh.data == batch, "each rank trains whole micro-batches"
        schedule = self._executor(each // micro, True, mtp_weight > 0).schedule
        self.last = schedule, {stage: self.plan(stage, mtp_weight > 0) for stage in schedule.rank_of}
        return self._pass(
            each // micro,
            settings,
            lambda number: samples.train(start + self.mesh.data_rank * each + number * micro, micro),
            trains=True,
            record=record,
        )

    def waited(self) -> float:
        """Seconds that this rank stood still for others in the last pass."""
        assert self._channels is not None, "a pass was made"
        return self._channels.waited()

    def held_out(self, samples: Samples, places: Sequence[int], watch: Callable[[int], object]) -> Sums:
        """The main model's losses on held-out samples, each once: whole micro-batches first, the rest one by one.

        `watch` is told how many samples of all ranks were done, each time some are.
        """
        micro, data = self.run.train.micro_batch_size, self.mesh.data
        whole = len(places) // (micro * data) * micro
        mine = places[whole * self.mesh.data_rank : whole * (self.mesh.data_rank + 1)]
        rest, sums = places[whole * data :], Sums()
        heard = sums if self.mesh.data_rank == 0 else Sums()
        if heard is not sums and self.mesh.expert == 1:
            rest = []  # who shares experts takes part where others count
        for some, size, into, ranks in ((mine, micro, sums, data), (rest, 1, heard, 1)):
            most = sum(self.schedule.microbatches) * size
            for start in range(0, len(some), most):
                self._evaluate(samples, some[start : start + most], size, into)
                watch(len(some[start : start + most]) * ranks)
        return sums

    def _evaluate(self, samples: Samples, places: Sequence[int], size: int, sums: Sums) -> None:
        settings = StepSettings(size, self.run.data.sequence_length, 1.0)

        def fetch(number: int) -> Tensor:
            return torch.cat(
                [samples.held_out(place, 1) for place in places[number * size : (number + 1) * size]]
            )

        some = self._pass(len(places) // size, settings, fetch, trains=False)
        for depth, nll in some.nll.items():
            sums.nll[depth] = sums.nll[depth] + nll if depth in sums.nll else nll

    def _pass(
        self,
        microbatches: int,
        settings: StepSettings,
        fetch: Callable[[int], Tensor],
        trains: bool,
        record: Recorder | None = None,
    ) -> Sums:
        """All micro-batches of this data rank through the schedule; `fetch` gives the samples of the i-th."""
        executor = self._executor(microbatches, trains, settings.mtp_weight > 0)
        schedule, channels = executor.schedule, self._channels
        assert channels is not None, "an executor has channels"
        first = [sum(schedule.microbatches[:pipe]) for pipe in range(schedule.pipes)]
        channels.begin(transfers(schedule), lambda product: self._shape(product, settings))
        executor.record = record
        sums = executor.run(lambda pipe, mb: self.mesh.bring(fetch(first[pipe] + mb)), settings)
        channels.end()
        return sums

    def _executor(self, microbatches: int, trains: bool, mtp: bool) -> Executor:
        """One for every number of micro-batches met; the ramp meets a few."""
        key = microbatches, trains, mtp
        if key not in self._executors:
            if self._channels is None:
                self._channels = self._open()
            if trains:
                schedule = schedule_of(self.run.parallel, microbatches)
            else:
                schedule = forward_only(self.schedule, microbatches)
            stages = {stage: self._stage(stage, mtp) for stage in schedule.held(self.mesh.pipeline_rank)}
            self._executors[key] = Executor(schedule, self.mesh.pipeline_rank, stages, self._channels)
        return self._executors[key]

    def _open(self) -> ProcessChannels:
        dtype = next(parameter.dtype for parameter in self.model.parameters() if parameter.dim() > 1)
        return ProcessChannels(self.mesh, transfers(self.schedule), dtype)

    def plan(self, stage: StageId, mtp: bool) -> Plan:
        """A stage's parts in a step with or without MTP."""
        plan = self.plans[stage.index]
        return plan if mtp else without_mtp(plan, self.run.model)

    def _stage(self, stage: StageId, mtp: bool) -> Stage:
        return Stage(self.model, self.plan(stage, mtp))

    def _shape(self, product: Product, settings: StepSettings) -> torch.Size:
        """Of hidden states between stages: the MTP modules before them have taken a position each."""
        index = product.stage.index if product.what == "x" else product.stage.index - 1
        plans = [self.plan(StageId(0, stage), settings.mtp_weight > 0) for stage in range(index + 1)]
        merged = sum(part is Part.MERGE for plan in plans for part, _ in plan)
        return torch.Size([settings.sequences * (settings.length - merged), self.run.model.hidden_size])


def hold(model: Transformer, parts: Sequence[tuple[Part, int]]) -> None:
    """Take everything out of a model on the meta device that none of the parts uses."""
    users = set(parts)
    for index in range(len(model.layers)):
        if (Part.ATTN, index) not in users:
            model.layers[index] = nn.Identity()
    for depth in range(1, len(model.mtp) + 1):
        module = model.mtp[depth - 1]
        if (Part.MERGE, depth) not in users and (Part.HEAD, depth) not in users:
            model.mtp[depth - 1] = nn.Identity()
            continue
        assert isinstance(module, MtpModule), "the model's MTP modules are MtpModules"
        assert isinstance(module.layer, Layer), "a module has a layer"
    kinds = {part for part, _ in parts}
    if not kinds & {Part.EMBED, Part.MERGE}:
        del model.embed
    if Part.HEAD not in kinds:
        del model.head
    if (Part.HEAD, 0) not in users:
        del model.norm


def parts_of(name: str, layers: int, depths: int) -> set[tuple[Part, int]]:
    """The parts that use a parameter."""
    head, _, rest = name.partition(".")
    if head == "layers":
        return {(Part.ATTN, int(rest.split(".")[0]))}
    if head == "mtp":
        return {(Part.MERGE, int(rest.split(".")[0]) + 1)}
    if head == "embed":
        return {(Part.EMBED, 0), *((Part.MERGE, depth) for depth in range(1, depths + 1))}
    if head == "head":
        return {(Part.HEAD, depth) for depth in range(depths + 1)}
    assert head == "norm", f"{name} is used by a part"
    return {(Part.HEAD, 0)}


def schedule_text(schedule: Schedule) -> str:
    """One line on a schedule: its name, ranks and micro-batches."""
    return f"{schedule.name} on {schedule.ranks} ranks, {sum(schedule.microbatches)} micro-batches"
