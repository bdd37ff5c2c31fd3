"""One training step: samples in, an optimizer step out, whether the model is here or spread over ranks.

A step is four lines: accumulate gradients over the micro-batches of the global batch, agree that they are finite,
update, move the router biases. All that changes over a run (learning rate, λ, γ, batch) is a function of the share
of samples already seen, and the samples are a function of their index, so the state of a run is its tensors and one
integer. Resuming is therefore loading; there is no second path (`loop.py`).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from counterflow.comm.mesh import Mesh
from counterflow.comm.partition import carve
from counterflow.config.model import ModelConfig
from counterflow.config.run import RunConfig, Train
from counterflow.data.loader import Samples
from counterflow.errors import NonFiniteError
from counterflow.model.balance import load_entropy, max_violation, step_bias
from counterflow.model.debts import Ledger
from counterflow.model.transformer import expert_shards, initialise, named_routers
from counterflow.pipeline.record import Recorder
from counterflow.pipeline.stage import Sums
from counterflow.plan.layout import begun, require_layout
from counterflow.train import lr
from counterflow.train.ema import Ema
from counterflow.train.optim import Optimizer
from counterflow.train.piece import Piece
from counterflow.train.pipelined import Pipelined, StepSamples
from counterflow.train.spread import dispatcher_of, holders_of, whole_model

GIVEN = ("master.", "bias.")
AVERAGES = "ema."
"""How the names of a checkpoint's averaged weights begin."""
LARGEST = 1e16
"""Of a weight: the squares of larger ones, summed over a layer, are beyond fp32."""
REMEDY = (
    "Start the same command again with a lower train.lr.peak, a longer train.lr.warmup, a smaller train.clip_norm or "
    "train.precision=fp32: it goes on from the newest checkpoint; if that is past saving, delete it for the one before"
)


@dataclass
class Totals:
    """Sums over the micro-batches of a step, once reduced over all ranks."""

    nll: Tensor
    """Main, then each depth, in nats over all target tokens; fp64."""
    balance: Tensor
    counts: Tensor
    """Tokens given to each expert of each MoE layer; int64."""


class Trainer:
    """A model, its optimizer and its place in the data; `step` advances it by one global batch."""

    def __init__(self, run: RunConfig, samples: Samples | StepSamples, mesh: Mesh) -> None:
        require_layout(run := begun(run))
        self.run, self.mesh, self.device = run, mesh, mesh.device
        # What a benchmark draws has no held-out part, and none is asked for.
        self.samples: Samples = samples  # pyright: ignore[reportAttributeAccessIssue]
        carve(run.parallel.multiprocessors, self.device)
        self.pipeline = Pipelined(run, mesh) if mesh.pipeline > 1 else None
        self.model = self.pipeline.model if self.pipeline else whole_model(run, mesh)
        self.model.dispatcher = self.dispatcher = dispatcher_of(run, mesh)
        initialise(self.model, run.train.seed)
        self.model.to(self.device)
        self.model.recompute = run.train.recompute
        named = list(self.model.named_parameters())
        if self.pipeline:
            groups = self.pipeline.groups()
        else:
            groups = holders_of(mesh, {(0,): {name for name, _ in named}})
        shards = expert_shards(self.model)
        self.optimizer = Optimizer(named, run.train, self.device, mesh, groups, shards)
        self.routers = list(named_routers(self.model))
        self.masters = dict(self.optimizer.masters())
        owned = {name: piece.value for name, piece in self.masters.items()}
        self.ema = Ema(owned, run.train.ema_decay) if run.train.ema_decay else None
        self.sample, self.steps = 0, 0
        self.set_length(run.train)

    def set_length(self, train: Train) -> None:
        """Take settings that differ in the run's length alone; all that changes over a run follows it."""
        length, self.run = self.run.data.sequence_length, replace(self.run, train=train)
        self.total = lr.total_samples(train, length)
        self.warmup = lr.warmup(train, length)

    @property
    def done(self) -> float:
        """Share of the run's samples already trained on."""
        return self.sample / self.total

    def step(self, record: Recorder | None = None) -> dict[str, object]:
        """Train on the next global batch; what it measured, as metrics.jsonl has it. [§4.2 step]"""
        start, train, length = time.perf_counter(), self.run.train, self.run.data.sequence_length
        batch = lr.batch_size(train, length, self.sample)
        mtp_weight = lr.mtp_weight(train, self.done)
        totals = self.accumulate(batch, mtp_weight, record)
        self.optimizer.reduce()
        norm = self.optimizer.norm()
        self.require_finite(totals, norm.item())
        waited = self.waited()
        self.optimizer.clip(norm)
        rate, speed = self.rates(batch)
        self.optimizer.step(rate)
        for row, _, bias in self.routers:
            if row < len(totals.counts):
                step_bias(bias, totals.counts[row], speed)
        if self.ema is not None:
            self.ema.update()
        self.sample += batch
        self.steps += 1
        seconds = time.perf_counter() - start
        main, *depths = (totals.nll / (batch * length)).tolist()
        return {
            "step": self.steps,
            "samples": self.sample,
            "tokens": self.sample * length,
            "loss": main,
            "mtp_loss": depths,
            "balance_loss": totals.balance.item(),
            "grad_norm": norm.item(),
            "lr": rate,
            "gamma": speed,
            "mtp_weight": mtp_weight,
            "batch": batch,
            "tokens_per_s": batch * length / seconds,
            "step_seconds": seconds,
            **waited,
            **self.traffic(),
            **self.load(totals.counts),
        }

    def rates(self, batch: int) -> tuple[float, float]:
        """Learning rate and bias speed of the next step, which trains on `batch` samples."""
        train, after = self.run.train, (self.sample + batch) / self.total
        return lr.learning_rate(train, after, self.warmup), lr.bias_speed(train, self.done, self.warmup)

    def accumulate(self, batch: int, mtp_weight: float, record: Recorder | None = None) -> Totals:
        """Gradients here, and losses and counts of all ranks, of the next `batch` samples."""
        if self.pipeline:
            sums = self.pipeline.step(self.samples, self.sample, batch, mtp_weight, record)
        else:
            sums = self.plain(batch, mtp_weight)
        config = self.run.model
        depths = config.num_mtp_modules if mtp_weight else 0
        rows = config.num_layers + depths - config.num_dense_layers
        floats = torch.zeros(2 + depths, dtype=torch.float64, device=self.device)
        counts = torch.zeros(rows, config.num_routed_experts, dtype=torch.int64, device=self.device)
        for depth, nll in sums.nll.items():
            floats[depth] = nll
        if sums.balance:
            floats[-1] = torch.stack(sums.balance).double().sum()
        for index, row in sums.counts.items():
            counts[index - config.num_dense_layers] = row
        self.mesh.sum(floats)
        return Totals(floats[:-1], floats[-1], self.mesh.sum(counts))

    def waited(self) -> dict[str, list[float]]:
        """Of a pipeline: seconds that each pipeline rank stood still for others in the step, data ranks averaged."""
        if self.pipeline is None:
            return {}
        seconds = torch.zeros(self.mesh.pipeline, dtype=torch.float64, device=self.device)
        seconds[self.mesh.pipeline_rank] = self.pipeline.waited() / self.mesh.data
        return {"pipeline_wait_seconds": self.mesh.sum(seconds).tolist()}

    def traffic(self) -> dict[str, list[float]]:
        """With shared experts, by hop, outermost first: bytes that left any rank, seconds a rank waited for them."""
        hops = self.dispatcher.traffic()
        if not hops:
            return {}
        moved = torch.tensor(
            [[hop.bytes for hop in hops], [hop.waited() for hop in hops]], dtype=torch.float64
        )
        moved, waited = self.mesh.sum(moved.to(self.device)).tolist()
        return {"dispatch_bytes": moved, "dispatch_wait_seconds": [one / self.mesh.size for one in waited]}

    def plain(self, batch: int, mtp_weight: float) -> Sums:
        """This data rank's slice of the batch, micro-batch by micro-batch through the whole model."""
        micro, length, sums = self.run.train.micro_batch_size, self.run.data.sequence_length, Sums()
        scale, each = 1.0 / (batch * length), batch // self.mesh.data
        assert each % micro == 0 and each * self.mesh.data == batch, "each rank trains whole micro-batches"
        start = self.sample + self.mesh.data_rank * each
        for first in range(start, start + each, micro):
            samples = self.mesh.bring(self.samples.train(first, micro))
            losses = self.model(samples, scale=scale, mtp_weight=mtp_weight, ledger=Ledger())
            losses.total.backward()
            self.optimizer.drain()
            for depth, nll in enumerate(losses.nll):
                sums.nll[depth] = sums.nll[depth] + nll.detach() if depth in sums.nll else nll.detach()
            sums.balance.append(losses.balance)
            for row, counts in enumerate(losses.counts, start=self.run.model.num_dense_layers):
                sums.counts[row] = sums.counts[row] + counts if row in sums.counts else counts
        return sums

    def load(self, counts: Tensor) -> dict[str, object]:
        """Expert load of the step by layer, and how uneven it is."""
        if not len(counts):
            return {"load": {}}
        worst = max_violation(counts)
        load = dict(zip(moe_names(self.run.model), counts.tolist()))
        return {
            "max_vio": worst.mean().item(),
            "max_vio_worst": worst.max().item(),
            "load_entropy": load_entropy(counts).tolist(),
            "dead_experts": (counts == 0).sum(-1).tolist(),
            "load": load,
        }

    def require_finite(self, totals: Totals, norm: float) -> None:
        """Stop before the update if a loss or the gradient is NaN or infinite; nothing has been changed yet."""
        if torch.isfinite(totals.nll).all() and norm < float("inf"):
            return
        error = NonFiniteError(
            f"step {self.steps + 1}: {self.blame(norm)}. The checkpoints written so far are untouched. {REMEDY} "
            f"(train.lr.peak is {self.run.train.lr.peak:g})."
        )
        error.shared = True  # the sums are the same on all ranks
        raise error

    def require_sound(self) -> None:
        """Stop before a checkpoint of weights that nothing can be computed with takes a good one's place."""
        values = [piece.value for piece in self.masters.values() if len(piece.value)]
        largest = [torch.linalg.vector_norm(value, float("inf")) for value in values]
        lost = not all(bool(value < LARGEST) for value in largest)  # NaN too
        if not any(self.mesh.everyone(lost)):
            return
        error = NonFiniteError(
            f"step {self.steps}: weights have grown beyond {LARGEST:g}, and no checkpoint of them is written. {REMEDY} "
            f"(train.lr.peak is {self.run.train.lr.peak:g})."
        )
        error.shared = True
        raise error

    def blame(self, norm: float) -> str:
        """The first place, over all ranks, that is not finite."""
        found = [text for text in self.mesh.everyone(self.blame_here()) if text]
        return f"{found[0] if found else 'the gradient'} is not finite (norm {norm:g})"

    @torch.no_grad()
    def blame_here(self) -> str:
        """The first weight held or output in forward order that is not finite; else the gradient nearest the loss."""
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                return f"weight '{name}'"
        if not self.pipeline:
            samples = self.samples.train(self.sample, self.run.train.micro_batch_size).to(self.device)
            context = self.model.context(len(samples), samples.shape[1] - 1)
            h = self.model.embed(samples[:, :-1])
            for index, layer in enumerate(self.model.layers):
                h = layer(h, context).h
                if not torch.isfinite(h).all():
                    return f"the output of layer {index}"
        gradients = dict(self.optimizer.gradients())
        in_order = [name for name, _ in self.model.named_parameters()]
        bad = [name for name in in_order if not torch.isfinite(gradients[name]).all()]
        return f"the gradient of '{bad[-1]}' and of {len(bad) - 1} before it" if bad else ""

    @torch.no_grad()
    def held_out_loss(self, count: int, watch: Callable[[int], object] = lambda samples: None) -> float:
        """Mean −log p of the main model over `count` held-out samples, evenly spaced over them all; nats a token.

        `watch` is told how many samples of all ranks were done, each time some are.
        """
        micro, every = self.run.train.micro_batch_size, self.samples.num_held_out
        places = [index * every // count for index in range(count)]
        if self.pipeline:
            sums = self.pipeline.held_out(self.samples, places, watch)
            total = sums.nll[0].double() if 0 in sums.nll else torch.zeros((), dtype=torch.float64)
        else:
            total = torch.zeros((), dtype=torch.float64)
            unit = micro * self.mesh.data
            for start in range(0, count, unit):  # every rank takes part in each round: they may share experts
                mine = places[start : start + unit][self.mesh.data_rank :: self.mesh.data]
                some = [self.samples.held_out(place, 1) for place in mine or places[:1]]
                nll = self.model(torch.cat(some).to(self.device)).nll[0].cpu()
                total += nll if mine else 0
                watch(min(unit, count - start))
        return self.mesh.sum(total.to(self.device)).item() / (count * self.run.data.sequence_length)

    def pieces(self) -> dict[str, Piece]:
        """All that a checkpoint keeps and this rank owns, by name."""
        kept = self.optimizer.pieces() | {f"bias.{name}": Piece.whole(bias) for _, name, bias in self.routers}
        if self.ema is not None:
            averages = self.ema.averages.items()
            kept |= {
                AVERAGES + name: replace(self.masters[name], value=average) for name, average in averages
            }
        return kept

    def given(self) -> dict[str, Piece]:
        """What a run has at its step 0; moments are zero there, and averages are the masters."""
        return {name: piece for name, piece in self.pieces().items() if name.startswith(GIVEN)}

    def begin_again(self, given: Mapping[str, Tensor]) -> None:
        """Go back to step 0, with the values that `given()` had there."""
        for name, piece in self.given().items():
            piece.value.copy_(given[name])
        self.optimizer.forget()
        self.sample, self.steps = 0, 0
        self.begin_from_given()

    def begin_from_given(self) -> None:
        """Begin with the weights that have been filled into the masters."""
        self.optimizer.round_weights()
        self.begin_averages()

    def begin_averages(self) -> None:
        """The averages, where there are any, are the masters."""
        if self.ema is not None:
            for name, average in self.ema.averages.items():
                average.copy_(self.masters[name].value)

    def loaded(self, sample: int, steps: int, averaged: bool) -> None:
        """Take up a place after `pieces()` have been filled from a checkpoint, or all but averages that it lacks."""
        self.sample, self.steps = sample, steps
        self.optimizer.loaded()
        if not averaged:
            self.begin_averages()


def moe_names(config: ModelConfig) -> list[str]:
    """The MoE layers in the order of the rows of counts."""
    layers = [f"layers.{index}" for index in range(config.num_dense_layers, config.num_layers)]
    return layers + [f"mtp.{index}" for index in range(config.num_mtp_modules)]
