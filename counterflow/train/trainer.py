"""One training step in one process: samples in, an optimizer step out.

A step is four lines: accumulate gradients over the micro-batches of the global batch, agree that they are finite,
update, move the router biases. All that changes over a run (learning rate, λ, γ, batch) is a function of the share
of samples already seen, and the samples are a function of their index, so the state of a run is its tensors and one
integer. Resuming is therefore loading; there is no second path (`loop.py`).
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from counterflow.config.run import RunConfig
from counterflow.data.loader import Samples
from counterflow.errors import NonFiniteError
from counterflow.model.balance import max_violation, step_bias
from counterflow.model.debts import Ledger
from counterflow.model.transformer import Transformer, initialise, named_routers
from counterflow.train import lr
from counterflow.train.ema import Ema
from counterflow.train.optim import Optimizer


@dataclass
class Totals:
    """Sums over the micro-batches of a step."""

    nll: list[Tensor] = field(default_factory=list)
    """Main, then each depth, in nats over all target tokens."""
    balance: Tensor | None = None
    counts: Tensor | None = None

    def add(self, nll: tuple[Tensor, ...], balance: Tensor, counts: Tensor) -> None:
        """One micro-batch more."""
        self.nll = [a + b for a, b in zip(self.nll, nll)] if self.nll else list(nll)
        self.balance = balance if self.balance is None else self.balance + balance
        self.counts = counts if self.counts is None else self.counts + counts


class Trainer:
    """A model, its optimizer and its place in the data; `step` advances it by one global batch."""

    def __init__(self, run: RunConfig, samples: Samples, device: torch.device) -> None:
        self.run, self.samples, self.device = run, samples, device
        torch.manual_seed(run.train.seed)
        self.model = Transformer(run.model)
        initialise(self.model, run.train.seed)
        self.model.to(device)
        self.model.recompute = run.train.recompute
        self.optimizer = Optimizer(self.model, run.train, device)
        self.routers = list(named_routers(self.model))
        self.ema = Ema(dict(self.optimizer.masters()), run.train.ema_decay) if run.train.ema_decay else None
        self.sample, self.steps = 0, 0
        self.total = lr.total_samples(run.train, run.data.sequence_length)

    @property
    def done(self) -> float:
        """Share of the run's samples already trained on."""
        return self.sample / self.total

    def step(self) -> dict[str, object]:
        """Train on the next global batch; what it measured, as metrics.jsonl has it. [§4.2 step]"""
        start, train, length = time.perf_counter(), self.run.train, self.run.data.sequence_length
        batch = lr.batch_size(train, length, self.sample)
        mtp_weight = lr.mtp_weight(train, self.done)
        totals = self.accumulate(batch, mtp_weight)
        norm = self.optimizer.norm()
        self.require_finite(totals, norm.item())
        self.optimizer.clip(norm)
        rate, speed = lr.learning_rate(train, self.done), lr.bias_speed(train, self.done)
        self.optimizer.step(rate)
        assert totals.counts is not None and totals.balance is not None, "a step has at least one micro-batch"
        for (_, bias), counts in zip(self.routers, totals.counts):
            step_bias(bias, counts, speed)
        if self.ema is not None:
            self.ema.update()
        self.sample += batch
        self.steps += 1
        seconds = time.perf_counter() - start
        main, *depths = (nll.item() / (batch * length) for nll in totals.nll)
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
            **self.load(totals.counts),
        }

    def accumulate(self, batch: int, mtp_weight: float) -> Totals:
        """Gradients, losses and counts of the next `batch` samples, summed over micro-batches."""
        micro, length, totals = self.run.train.micro_batch_size, self.run.data.sequence_length, Totals()
        scale = 1.0 / (batch * length)
        for first in range(0, batch, micro):
            samples = self.samples.train(self.sample + first, min(micro, batch - first)).to(self.device)
            losses = self.model(samples, scale=scale, mtp_weight=mtp_weight, ledger=Ledger())
            losses.total.backward()
            self.optimizer.drain()
            totals.add(tuple(nll.detach() for nll in losses.nll), losses.balance, losses.counts)
        return totals

    def load(self, counts: Tensor) -> dict[str, object]:
        """Expert load of the step by layer, and how uneven it is."""
        if not len(counts):
            return {"load": {}}
        worst = max_violation(counts)
        load = {name: row for (name, _), row in zip(self.routers, counts.tolist())}
        return {"max_vio": worst.mean().item(), "max_vio_worst": worst.max().item(), "load": load}

    def require_finite(self, totals: Totals, norm: float) -> None:
        """Stop before the update if a loss or the gradient is NaN or infinite; nothing has been changed yet."""
        if torch.isfinite(torch.stack(totals.nll)).all() and norm < float("inf"):
            return
        raise NonFiniteError(
            f"step {self.steps + 1}: {self.blame(norm)}. The checkpoints written so far are untouched. Try a lower "
            f"train.lr.peak (now {self.run.train.lr.peak:g}), a longer train.lr.warmup, a smaller train.clip_norm or "
            "train.precision=fp32, and resume."
        )

    @torch.no_grad()
    def blame(self, norm: float) -> str:
        """The first place in forward order that is not finite; else the gradient nearest the loss that is not."""
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                return f"weight '{name}' is not finite"
        samples = self.samples.train(self.sample, self.run.train.micro_batch_size).to(self.device)
        context = self.model.context(len(samples), samples.shape[1] - 1)
        h = self.model.embed(samples[:, :-1])
        for index, layer in enumerate(self.model.layers):
            h = layer(h, context).h
            if not torch.isfinite(h).all():
                return f"the output of layer {index} is not finite"
        gradients = dict(self.optimizer.gradients())
        in_order = [name for name, _ in self.model.named_parameters()]
        bad = [name for name in in_order if not torch.isfinite(gradients[name]).all()]
        where = (
            f"the gradient of '{bad[-1]}' and of {len(bad) - 1} before it" if bad else "the gradient's norm"
        )
        return f"{where} is not finite (norm {norm:g})"

    @torch.no_grad()
    def held_out_loss(self, count: int) -> float:
        """Mean −log p of the main model over `count` held-out samples, evenly spaced over them all; nats a token."""
        micro, every, total = self.run.train.micro_batch_size, self.samples.num_held_out, 0.0
        places = [index * every // count for index in range(count)]
        for first in range(0, count, micro):
            some = [self.samples.held_out(place, 1) for place in places[first : first + micro]]
            total += self.model(torch.cat(some).to(self.device)).nll[0].item()
        return total / (count * self.run.data.sequence_length)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by name."""
        kept = self.optimizer.tensors() | {f"bias.{name}": bias for name, bias in self.routers}
        if self.ema is not None:
            kept |= {f"ema.{name}": average for name, average in self.ema.averages.items()}
        return kept | {"rng": torch.get_rng_state()}

    def loaded(self, sample: int, steps: int, rng: Tensor) -> None:
        """Take up a place after `tensors()` have been filled from a checkpoint."""
        self.sample, self.steps = sample, steps
        self.optimizer.round_weights()
        torch.set_rng_state(rng)
