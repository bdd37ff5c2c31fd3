"""One step on real processes against the plain loop on one of them, the loop's routing replayed: what must be equal.

Every rank plays the plain loop over the whole batch on its own device and holds the gradients that it has after the
pipeline's step, summed over their holders as training sums them, against the loop's. The experts that the first rank's
loop chose are every other run's too, so that a rounding which tips a token to another expert (a flip) is counted and
not mistaken for an error. Not taken: gathering gradients on one rank, which several gigabytes of them forbid.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterflow.benchmark.equality import Gradients, relative_error, run_plain
from counterflow.benchmark.saved import note
from counterflow.benchmark.several_steps import opened
from counterflow.comm.mesh import Mesh
from counterflow.config.run import RunConfig
from counterflow.model import route
from counterflow.model.layer import Choose
from counterflow.model.transformer import Transformer, expert_shards, initialise, moe_layers, named_routers
from counterflow.pipeline.stage import StepSettings, Sums
from counterflow.schedule.words import Schedule
from counterflow.train.optim import Optimizer
from counterflow.train.pipelined import Pipelined

BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}
"""Of a weight's gradient, relative to its largest element: some thousand roundings of 6e-8, and a dozen of 4e-3. A row
that is missing, doubled or of another token is off by tenths."""
Routing = Mapping[int, list[Tensor]]
"""The experts of every micro-batch's tokens, (T, K), by layer; micro-batches in the order of the global batch."""


class FixedSamples:
    """Samples drawn once, by their global index."""

    def __init__(self, run: RunConfig) -> None:
        generator = torch.Generator().manual_seed(run.train.seed)
        shape = (run.train.batch_size, run.data.sequence_length + 1)
        self.all = torch.randint(run.model.vocab_size, shape, generator=generator)

    def train(self, index: int, count: int) -> Tensor:
        """(count, length + 1)."""
        return self.all[index : index + count]


@dataclass
class Reference:
    """The plain loop's step."""

    gradients: dict[str, Tensor]
    nll: dict[int, Tensor]
    balance: Tensor
    counts: dict[int, Tensor]
    routing: Routing


def recording(into: list[Tensor]) -> Choose:
    """The router's own choices, noted."""

    def choose(scores: Tensor, bias: Tensor, config: Any) -> Tensor:
        into.append(route.choose(scores, bias, config))
        return into[-1]

    return choose


def replaying(given: Iterable[Tensor], flips: list[Tensor]) -> Choose:
    """One given choice after another; how many experts of each the router would not have chosen is noted."""
    left = iter(given)

    def choose(scores: Tensor, bias: Tensor, config: Any) -> Tensor:
        ids, own = next(left).to(scores.device), route.choose(scores, bias, config)
        flips.append((own[:, :, None] != ids[:, None, :]).all(-1).sum())
        return ids

    return choose


def plain_step(
    run: RunConfig,
    whole: Transformer,
    schedule: Schedule,
    samples: FixedSamples,
    device: torch.device,
    routing: Routing | None,
) -> Reference:
    """The step by the plain loop, summed per data rank and pipe as the pipeline sums; without a routing, its own."""
    model = copy.deepcopy(whole).to(device)
    found: dict[int, list[Tensor]] = defaultdict(list)
    for index, _, layer in moe_layers(model):
        layer.router.choose = recording(found[index]) if routing is None else replaying(routing[index], [])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if run.train.precision == "bf16" else torch.float32)
    micro, length = run.train.micro_batch_size, run.data.sequence_length
    settings = StepSettings(micro, length, 1.0 / (run.train.batch_size * length), _mtp_weight(run))
    by_data = samples.all.view(run.parallel.data, sum(schedule.microbatches), micro, -1).to(device)
    total: dict[str, Tensor] = {}
    every: list[Sums] = []
    for own in by_data:
        for some in own.split(list(schedule.microbatches)):
            gradients, sums = run_plain(model, some, settings)
            total = {name: total[name] + one if total else one for name, one in gradients.items()}
            every.append(sums)
    nll, balance, counts = summed(every, device)
    return Reference(total, nll, balance, counts, routing or found)


def _mtp_weight(run: RunConfig) -> float:
    return run.train.mtp_weight if run.model.num_mtp_modules else 0.0


def summed(
    every: Sequence[Sums], device: torch.device
) -> tuple[dict[int, Tensor], Tensor, dict[int, Tensor]]:
    """Losses by depth, balance losses and counts by layer of several runs together."""
    nll: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    balance = torch.zeros((), dtype=torch.float64, device=device)
    for sums in every:
        for into, some in ((nll, sums.nll), (counts, sums.counts)):
            for key, value in some.items():
                value = value.double() if value.is_floating_point() else value
                into[key] = into[key] + value if key in into else value
        if sums.balance:
            balance = balance + torch.stack(sums.balance).double().sum()
    return nll, balance, counts


def whole_model(run: RunConfig) -> Transformer:
    """All of it, as training starts, on the CPU."""
    model = Transformer(run.model)
    initialise(model, run.train.seed)
    return model


class Share:
    """The step's other side: this rank's part of the model, its optimizer's buckets and its place in the pipeline."""

    def __init__(self, run: RunConfig, mesh: Mesh, whole: Transformer) -> None:
        self.run, self.mesh = run, mesh
        self.pipelined = Pipelined(run, mesh)
        self.model = self.pipelined.model
        self.shards = expert_shards(self.model)
        weights, named = dict(whole.named_parameters()), list(self.model.named_parameters())
        for name, value in named:
            value.data.copy_(self._mine(name, value, weights[name].data))
        for _, _, bias in named_routers(self.model):
            bias.zero_()
        self.model.to(mesh.device)
        self.optimizer = Optimizer(named, run.train, mesh.device, mesh, self.pipelined.groups(), self.shards)

    def step(self, samples: FixedSamples, routing: Routing) -> tuple[Sums, int]:
        """The sums of a step, and flips; the gradients are in the buckets, summed over their holders."""
        flips: list[Tensor] = []
        places = self._micro_batches()
        for index, _, layer in moe_layers(self.model):
            mine = [routing[index][place] for place in places[index]]
            layer.router.choose = replaying(mine, flips)
        for bucket in self.optimizer.buckets:
            bucket.grad.zero_()
        batch, weight = self.run.train.batch_size, _mtp_weight(self.run)
        sums = self.pipelined.step(samples, 0, batch, weight)
        self.model.dispatcher.traffic()  # raises where a kernel waited in vain
        self.optimizer.reduce()
        return sums, sum(int(one) for one in flips)

    def _micro_batches(self) -> Mapping[int, list[int]]:
        """Which of the global batch's micro-batches pass each layer here, in order."""
        schedule, found = self.pipelined.schedule, defaultdict[int, list[int]](list)
        first = self.mesh.data_rank * sum(schedule.microbatches)
        for stage in schedule.held(self.mesh.pipeline_rank):
            start = first + sum(schedule.microbatches[: stage.pipe])
            for layer in {layer for part, layer in self.pipelined.plans[stage.index] if part == "ATTN"}:
                found[layer] += range(start, start + schedule.microbatches[stage.pipe])
        return found

    def errors(self, gradients: Gradients) -> Iterator[tuple[str, float]]:
        """Every weight's, relative to the largest element of what it should be; 0.0 is equal bit for bit."""
        for name, value in self.optimizer.gradients():
            yield name, relative_error(value, self._mine(name, value, gradients[name]))

    def _mine(self, name: str, here: Tensor, whole: Tensor) -> Tensor:
        """What this rank holds of a weight, or of its gradient."""
        start = self.shards[name].offset if name in self.shards else 0
        return whole.flatten()[start : start + here.numel()].view(here.shape)


def step_equality(
    mesh: Mesh, run: RunConfig, name: str, precisions: Sequence[str], backends: Sequence[str], rows: Path
) -> None:
    """A row for every precision and backend, noted by the first rank. A collective."""
    samples, whole = FixedSamples(run), whole_model(run)
    for precision in precisions:
        ours = Share(replace(run, train=replace(run.train, precision=precision)), mesh, whole)
        reference = _reference(ours, whole, samples)
        for backend in backends:
            found = _compared(ours, reference, samples, backend)
            if mesh.first:
                named = {"name": step_name(name, precision, backend, mesh.expert), "bound": BOUNDS[precision]}
                note(rows, named | found)


def step_name(name: str, precision: str, backend: str, expert: int) -> str:
    """Of a row; no backend where every rank has all experts."""
    return ", ".join([name, precision, *[backend] * (expert > 1)])


def _reference(ours: Share, whole: Transformer, samples: FixedSamples) -> Reference:
    """The plain loop's step with the first rank's choices, on this rank's own device. A collective."""
    mesh, schedule, kept = ours.mesh, ours.pipelined.schedule, list[Reference]()

    def first() -> Routing:
        kept.append(plain_step(ours.run, whole, schedule, samples, mesh.device, None))
        return {index: [ids.cpu() for ids in some] for index, some in kept[0].routing.items()}

    routing = mesh.first_does(first)
    return kept[0] if kept else plain_step(ours.run, whole, schedule, samples, mesh.device, routing)


def _compared(ours: Share, reference: Reference, samples: FixedSamples, backend: str) -> dict[str, Any]:
    """Differences between both, over all ranks; or why the backend does not run here, on all ranks alike."""
    mesh, parallel = ours.mesh, replace(ours.run.parallel, dispatch=backend)
    ours.model.dispatcher, why_not = opened(replace(ours.run, parallel=parallel), mesh)
    if why_not:
        return {"failed": why_not}
    sums, flips = ours.step(samples, reference.routing)
    errors: dict[str, float] = {}
    for some in mesh.everyone(dict(ours.errors(reference.gradients))):
        errors |= {name: max(error, errors.get(name, 0.0)) for name, error in some.items()}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "worst": errors[worst],
        "worst_name": worst,
        "exact": sum(error == 0.0 for error in errors.values()),
        "weights": len(errors),
        "flips": sum(mesh.everyone(flips)),
        "choices": sum(len(ids) * ids.shape[1] for some in reference.routing.values() for ids in some),
        **_losses(ours, reference, sums),
    }


def _losses(ours: Share, reference: Reference, sums: Sums) -> dict[str, Any]:
    """Relative differences of the losses by depth and of the balance loss, and whether all counts are the same."""
    mesh, device = ours.mesh, ours.mesh.device
    mine, balance, counted = summed([sums], device)
    depths = [mine.get(depth, balance.new_zeros(())) for depth in reference.nll]
    found = mesh.sum(torch.stack([*depths, balance]))
    want = torch.stack([*reference.nll.values(), reference.balance])
    counts = torch.stack(list(reference.counts.values()))
    here = torch.stack([counted.get(index, torch.zeros_like(counts[0])) for index in reference.counts])
    return {
        "losses": (found / (ours.run.train.batch_size * ours.run.data.sequence_length)).tolist(),
        "loss_errors": ((found - want) / want).abs().tolist(),
        "same_counts": torch.equal(mesh.sum(here), counts),
    }
