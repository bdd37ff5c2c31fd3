"""What is to be trained and how it is spread: the two arguments of every question to the planner.

A `Job` is what a run does whatever it runs on; a `Layout` is how it lies on the ranks. `Precision` says byte by byte
what each kind of tensor costs, since memory and transfers follow from nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from counterflow.config.model import ModelConfig
from counterflow.config.run import Parallel, RunConfig
from counterflow.errors import ConfigError, ScheduleError, nearest
from counterflow.schedule import PLAIN_LOOP
from counterflow.schedule.method import Method
from counterflow.schedule.named import made, method
from counterflow.schedule.words import Schedule


@dataclass(frozen=True)
class Precision:
    """Bytes of an element, by what it is for."""

    name: str
    product: str
    """The card's rate at which weights are multiplied."""
    operand: float
    """Of what a product reads."""
    weight: float
    gradient: float
    master: float
    """Owned once; 0: the weights are the masters."""
    moment: float
    """Of each of Adam's two; owned once."""
    hidden: float
    """Of the residual stream and what else is neither quantised nor a weight."""
    attended: float
    """Of the attention's output kept for its projection."""
    cached: float
    """Of the other inputs of products that are kept for backward."""
    dispatched: float
    """Of a row on its way to an expert, and of its output's gradient."""
    combined: float
    """Of a row on its way back, and of its input's gradient."""


SCALED = 1 + 4 / 128
"""An FP8 element with its share of the fp32 scale of 128 [§3.3.2]."""
PRECISIONS: Mapping[str, Precision] = {
    "fp8": Precision("fp8", "fp8", SCALED, 2, 4, 4, 2, 2, 1.5, SCALED, SCALED, 2),
    "bf16": Precision("bf16", "bf16", 2, 2, 4, 4, 4, 2, 2, 2, 2, 2),
    "fp32": Precision("fp32", "fp32", 4, 4, 4, 0, 4, 4, 4, 4, 4, 4),
}
"""fp8 is the report's [§3.2.3, §3.3]: weights in FP8 and transposed, moments in bf16, E5M6 after attention; bf16 and
fp32 are what `counterflow train` does."""
RECOMPUTES = ("none", "projections", "attention", "layer")
"""What is made again in backward: `projections` is the report's, norms and MLA's up-projections [§3.2.3]; the others
are `train.recompute`'s."""


@dataclass(frozen=True)
class Job:
    """A model, its batch and its length."""

    model: ModelConfig
    sequence_length: int
    batch_size: int
    """Sequences of one optimizer step, all ranks together."""
    tokens: float
    """Of the whole run."""
    precision: str = "bf16"
    kernels: str = "eager"
    """What runs between products: `eager`, this system's own ops, or `fused`, other systems'. FP8 is the report's alone
    and always fused."""
    averaged: bool = False
    """Whether an average of the weights is kept, in the host's memory (`train.ema_decay`)."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision is '{self.precision}'; {nearest(self.precision, PRECISIONS)}")

    @property
    def is_eager(self) -> bool:
        """Whether its passes are those of this system's own ops."""
        return self.kernels == "eager" and self.precision != "fp8"

    @property
    def bytes_of(self) -> Precision:
        """Its precision's bytes."""
        return PRECISIONS[self.precision]

    @property
    def tokens_per_step(self) -> int:
        """Of the whole batch."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Layout:
    """PP × DP ranks with EP inside DP, as `parallel` has them; the schedule and what is recomputed."""

    pipeline: int
    data: int
    expert: int = 1
    micro_batch: int = 1
    """Sequences."""
    schedule: str = Parallel.schedule
    stages_per_rank: int | None = None
    recompute: str = "none"
    tensor: int = 1
    """Ranks that share every layer outside the experts, sequence-parallel; other systems' runs alone have it."""

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.pipeline * self.data * self.tensor

    def microbatches(self, job: Job) -> int:
        """Of one data rank in one step."""
        return job.batch_size // (self.data * self.micro_batch)

    @property
    def name(self) -> str:
        """Of what it runs: its schedule, or one rank's plain loop."""
        return PLAIN_LOOP if self.pipeline == 1 else self.schedule

    @property
    def method(self) -> Method:
        """What is known of that."""
        return method(self.name)

    def rule(self, microbatches: int) -> Schedule:
        """Its schedule.   Fails: ConfigError, ScheduleError."""
        per_rank = self.stages_per_rank if self.name == self.schedule else None
        return made(self.name, self.pipeline, microbatches, per_rank)

    def __str__(self) -> str:
        words = [f"PP{self.pipeline}", f"EP{self.expert}", f"DP{self.data}", f"mb{self.micro_batch}"]
        words += [f"TP{self.tensor}"] if self.tensor > 1 else []
        name = self.schedule + (f"×{self.stages_per_rank}" if self.stages_per_rank else "")
        return " ".join([*words, name if self.pipeline > 1 else "no pipeline", f"recompute {self.recompute}"])


def job_of(run: RunConfig, precision: str = "") -> Job:
    """What a run's settings ask for; `auto` precision is bf16, as it is on every GPU here."""
    named = precision or run.train.precision
    named = "bf16" if named == "auto" else named
    averaged = run.train.ema_decay > 0
    size, length = run.train.batch_size, run.data.sequence_length
    lengths = [tokens for tokens in (run.train.tokens, run.train.steps * size * length) if tokens]
    return Job(run.model, length, size, min(lengths, default=0.0), named, averaged=averaged)


def require(job: Job, layout: Layout) -> None:
    """Fails (ConfigError) where a layout contradicts itself or the job; says what would do."""
    for name in ("pipeline", "data", "expert", "micro_batch"):
        if getattr(layout, name) < 1:
            raise ConfigError(f"{name} is {getattr(layout, name)}; it must be at least 1.")
    experts, group = job.model.num_routed_experts, layout.data * layout.tensor
    if group % layout.expert or experts % layout.expert:
        raise ConfigError(
            f"expert is {layout.expert} with {group} data ranks and {experts} experts; it must divide both: take "
            f"{_largest_divisor(group, experts, layout.expert)}."
        )
    if job.batch_size % (layout.data * layout.micro_batch):
        unit = layout.data * layout.micro_batch
        raise ConfigError(
            f"a batch of {job.batch_size} sequences with {layout.data} data ranks and micro-batches of "
            f"{layout.micro_batch}; it must be a multiple of {unit}: take {-(-job.batch_size // unit) * unit}."
        )
    if layout.recompute not in RECOMPUTES:
        raise ConfigError(f"recompute is '{layout.recompute}'; {nearest(layout.recompute, RECOMPUTES)}")
    method(layout.schedule)
    if layout.recompute == "layer" and layout.pipeline > 1:
        raise ConfigError("recompute=layer needs one pipeline rank; set recompute=attention or pipeline=1.")
    try:
        layout.rule(layout.microbatches(job))
    except ScheduleError as error:
        raise ConfigError(f"{layout}: {error}") from None


def _largest_divisor(first: int, second: int, below: int) -> int:
    return max(size for size in range(1, below + 1) if first % size == 0 and second % size == 0)
