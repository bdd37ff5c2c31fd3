"""What a run is: model, data, training, folder. Frozen dataclasses whose names are the command line's flags.

Shapes over the run (learning rate, batch ramp, λ, γ) are fractions of its tokens, so that one setting serves
a run of a million tokens and one of 14.8 trillion; the defaults are the report's own, divided by 14.8 T
[§4.2].
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from os.path import expanduser
from pathlib import PurePath

from counterflow.config.backends import BACKENDS, Backend, backends
from counterflow.config.model import ModelConfig
from counterflow.errors import ConfigError, nearest

PRECISIONS = ("auto", "fp32", "bf16")
DISPATCHES = backends(lambda row: True)
RECOMPUTES = ("none", "attention", "layer")
DEVICES = ("auto", "cpu", "cuda")
RESUMES = ("auto", "must", "never")


@dataclass(frozen=True)
class Source:
    """A source of text: a file, folder or glob of .txt, .md, .py, .jsonl (or packed), .parquet, or 'python-stdlib'."""

    path: str = "python-stdlib"
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights."""
    field: str = "text"
    """The key or column that holds the text, in .jsonl and .parquet."""


@dataclass(frozen=True)
class Data:
    """Text to samples. Samples are sequence_length + 1 tokens. [§4.1]"""

    sources: tuple[Source, ...] = (Source(),)
    tokenizer: str = "train"
    """'train': a byte-level BPE of model.vocab_size learnt from the training part; else a tokenizer.json."""
    sequence_length: int = 256
    fim_rate: float = 0.1
    """Share of documents rewritten prefix, suffix, middle."""
    held_out: float = 0.03
    """Share of documents never trained on; chosen by a hash of their texts."""
    cache_dir: str = ".cache/counterflow"
    """Where the tokenizer and the token shards are kept between runs."""

    def __post_init__(self) -> None:
        _between("data.fim_rate", self.fim_rate, 0.0, 1.0)
        _between("data.held_out", self.held_out, 0.0, 0.9)
        _at_least("data.sequence_length", self.sequence_length, 2)
        if not self.sources:
            raise ConfigError("data.sources is empty; a run needs text: give one path or more.")
        for source in self.sources:
            if not source.weight > 0:
                raise ConfigError(f"weight of source '{source.path}' is {source.weight}; it must be above 0.")


@dataclass(frozen=True)
class LearningRate:
    """Warm-up, constant, cosine, constant, constant: the report's five phases. [§4.2]"""

    peak: float = 2.2e-4
    warmup: float = 0.0085
    """Linear over this fraction of the run: a step's rate is that at its end, so that the first is not 0. The report's
    2K steps are 0.0019 of its tokens, since they lie at the start of its batch ramp; 0.0085 would be 2K steps of its
    full batch."""
    warmup_steps: int = 0
    """Optimizer steps that the warm-up has at least; a shorter run warms up until `constant_until`."""
    constant_until: float = 0.676
    cosine_until: float = 0.966
    floor: float = 0.1
    """Where the cosine ends, relative to the peak."""
    last_from: float = 0.9887
    last: float = 0.0332
    """The last constant phase, relative to the peak."""

    def __post_init__(self) -> None:
        marks = (0.0, self.warmup, self.constant_until, self.cosine_until, self.last_from, 1.0)
        if not all(before <= after for before, after in pairwise(marks)):
            raise ConfigError(
                f"train.lr's phases end at {', '.join(f'{mark:g}' for mark in marks[1:-1])}; they must rise from 0 to "
                "1: warmup <= constant_until <= cosine_until <= last_from."
            )
        for name in ("floor", "last", "warmup_steps"):
            _at_least(f"train.lr.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class Train:
    """How a model is trained. [§4.2]"""

    tokens: float = 1.5e6
    """Length of the run, in trained tokens, rounded up to whole batches. Of tokens, steps and minutes the shortest that
    is not 0 holds; giving one sets aside what the named run has of the others."""
    steps: int = 0
    """Length in optimizer steps."""
    minutes: float = 0.0
    """Length in minutes, held-out losses and checkpoints included: a few steps are timed first, then it is turned into
    tokens. A machine that gets slower later takes longer."""
    patience: int = 0
    """Held-out losses in a row that are no better than the best one before the run ends early; 0: never."""
    batch_size: int = 16
    """Sequences of one optimizer step, all ranks together, once the ramp is over."""
    batch_start: int = 0
    """Sequences of the first step; 0: no ramp."""
    batch_ramp_until: float = 0.0317
    """The batch grows linearly over this fraction of the run."""
    batch_increment: int = 0
    """Sequences by which it grows at a time; 0: as few as the layout in which the run begins allows."""
    micro_batch_size: int = 8
    """Sequences that go through the model at once; gradients accumulate over the others."""
    lr: LearningRate = field(default_factory=LearningRate)
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_weight: float = 0.3
    """λ until `mtp_change_at`, then `mtp_weight_late`."""
    mtp_weight_late: float = 0.1
    mtp_change_at: float = 0.676
    bias_speed: float = 0.001
    """γ until `bias_stop_at`, then 0; 0 trains without the auxiliary-loss-free bias."""
    bias_speed_start: float = 0.0
    """γ at the first step, from where it falls linearly to `bias_speed` over the warm-up; 0: `bias_speed` throughout.
    Early in a run all tokens are nearly alike, and experts' scores drift faster than later."""
    bias_stop_at: float = 0.966
    ema_decay: float = 0.0
    """Decay per step of the averaged weights kept on the CPU; 0 keeps none."""
    precision: str = "fp32"
    """fp32, bf16 with fp32 masters, gradients and moments, or auto: bf16 where the hardware multiplies it."""
    recompute: str = "none"
    """What is made again in backward instead of kept: none; attention (its norms, latents, queries, keys, values and
    probabilities); or layer (everything but each layer's input; for one pipeline rank)."""
    start_from: str = ""
    """A run's folder or an exported one whose weights training starts from; empty: random ones. `--from PATH` also
    takes model and tokenizer from there."""
    seed: int = 0
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    device: str = "auto"
    """auto (cuda if there is a GPU for every process), cpu or cuda."""

    def __post_init__(self) -> None:
        self._require_length()
        for name in ("batch_size", "micro_batch_size"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("batch_start", "batch_increment"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.batch_size % self.micro_batch_size or self.batch_start % self.micro_batch_size:
            raise ConfigError(
                f"train.batch_size is {self.batch_size} and train.batch_start {self.batch_start}; both must "
                f"be multiples of train.micro_batch_size, which is {self.micro_batch_size}."
            )
        if self.batch_start > self.batch_size:
            raise ConfigError(
                f"train.batch_start is {self.batch_start}; the ramp rises, so it must be at most "
                f"train.batch_size, {self.batch_size}."
            )
        if self.recompute not in RECOMPUTES:
            raise ConfigError(f"train.recompute is '{self.recompute}'; {nearest(self.recompute, RECOMPUTES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"train.precision is '{self.precision}'; {nearest(self.precision, PRECISIONS)}")
        for name in ("lr.peak", "adam_eps", "clip_norm"):
            owner, _, leaf = name.rpartition(".")
            value = getattr(self.lr if owner else self, leaf)
            if not value > 0:
                raise ConfigError(f"train.{name} is {value}; it must be above 0.")
        for name in ("ema_decay", "beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(
                    f"train.{name} is {getattr(self, name)}; it must be at least 0 and below 1."
                )
        for name in ("weight_decay", "mtp_weight", "mtp_weight_late", "threads"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("bias_speed", "bias_speed_start"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.device not in DEVICES:
            raise ConfigError(f"train.device is '{self.device}'; {nearest(self.device, DEVICES)}")
        for name in ("mtp_change_at", "bias_stop_at", "batch_ramp_until"):
            _between(f"train.{name}", getattr(self, name), 0.0, 1.0)

    def _require_length(self) -> None:
        for name in ("tokens", "steps", "minutes", "patience"):
            _at_least(f"train.{name}", getattr(self, name), 0)
            if not getattr(self, name) < float("inf"):
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be a finite number.")
        if not (self.tokens or self.steps or self.minutes):
            raise ConfigError(
                "train.tokens, train.steps and train.minutes are 0; set one: a run has a length."
            )


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over processes; pipeline × data of them."""

    pipeline: int = 1
    """Pipeline ranks; 1: every process holds the whole model."""
    data: int = 1
    """Data ranks: each trains on its slice of every batch, and owns a part of the optimizer's state (ZeRO-1)."""
    schedule: str = "dualpipe"
    """A rule of SCHEDULES, a .txt or .csv file with a schedule, or MODULE:FUNCTION that makes one from (ranks,
    microbatches)."""
    stages_per_rank: int = 0
    """Stages of each pipeline rank where the rule leaves a choice (interleaved-1f1b); 0: the rule's own."""
    placement: str = ""
    """What each stage holds, as in 'embed 2 | 3 head 1mtp'; empty: cut so that stages weigh alike."""
    expert: int = 1
    """Data ranks that share the experts of each layer (expert parallelism); divides `data`."""
    dispatch: str = "collective"
    """How tokens reach experts on other ranks: collective (gloo, NCCL), two_hop between nodes, and between the GPUs of
    one host nvlink (our kernels), copy_engine, or deep_ep where it is installed."""
    node_ranks: int = 0
    """For two_hop: expert ranks of a node, real or declared so; a divisor of `expert`."""
    dispatch_fp8: bool = False
    """Send tokens to experts in FP8, a scale for every 128 numbers; what comes back is not."""
    dispatch_room: float = 0.0
    """For nvlink and copy_engine: the rows that a rank has room for, as a multiple of the tokens of its micro-batch; 0:
    as many as can come. What exceeds it ends the run with an error, no row is dropped."""
    multiprocessors: int = 0
    """Multiprocessors of a GPU for communication: they bound its kernels and NCCL, and matmuls leave them free;
    0: as many as each takes by itself."""
    record_step: int = 0
    """The step whose ops are timed for the timeline; 0: the 50th, or the middle one of a shorter run (until then the
    third)."""
    restarts: int = 0
    """How often all processes of this machine are started again from the last checkpoint when one dies."""

    def __post_init__(self) -> None:
        for name in ("pipeline", "data", "expert"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        for name in ("stages_per_rank", "node_ranks", "multiprocessors", "record_step", "restarts"):
            _at_least(f"parallel.{name}", getattr(self, name), 0)
        if self.data % self.expert:
            raise ConfigError(
                f"parallel.expert is {self.expert} and parallel.data {self.data}; experts are shared by data ranks: "
                "make the second a multiple of the first."
            )
        if self.dispatch_room < 0:
            raise ConfigError(f"parallel.dispatch_room is {self.dispatch_room}; it must be 0 or above.")
        if self.dispatch not in DISPATCHES:
            raise ConfigError(f"parallel.dispatch is '{self.dispatch}'; {nearest(self.dispatch, DISPATCHES)}")
        if self.backend.by_node and (not self.node_ranks or self.expert % self.node_ranks):
            raise ConfigError(
                f"parallel.dispatch is {self.dispatch} with parallel.expert {self.expert} and parallel.node_ranks "
                f"{self.node_ranks}; set parallel.node_ranks to the expert ranks of one node, a divisor of the first."
            )

    @property
    def backend(self) -> Backend:
        """What is known of its dispatch."""
        return BACKENDS[self.dispatch]

    @property
    def processes(self) -> int:
        """All ranks."""
        return self.pipeline * self.data

    def without_effect(self, device: str) -> Iterator[str]:
        """What is set and does nothing beside the other settings on such a device: a sentence for each reason."""
        reasons: dict[str, tuple[bool, tuple[str, ...]]] = {
            "parallel.expert is 1: no token goes to another rank": (
                self.expert == 1,
                ("dispatch", "dispatch_fp8", "dispatch_room", "node_ranks"),
            ),
            f"parallel.dispatch is {self.dispatch}, which knows no nodes": (
                not self.backend.by_node,
                ("node_ranks",),
            ),
            f"parallel.dispatch is {self.dispatch}, which makes room for the rows that come": (
                not self.backend.worst_case,
                ("dispatch_room",),
            ),
            f"parallel.dispatch is {self.dispatch}, which sends what it is given": (
                not self.backend.fp8,
                ("dispatch_fp8",),
            ),
            "parallel.pipeline is 1": (
                self.pipeline == 1,
                ("stages_per_rank", "placement", "record_step"),
            ),
            "there is one process": (self.processes == 1, ("restarts",)),
            "the device is a CPU": (device == "cpu", ("multiprocessors",)),
        }
        said: set[str] = set()
        for reason, (holds, names) in reasons.items():
            plain = Parallel()
            idle = [name for name in names if holds and getattr(self, name) != getattr(plain, name)]
            if idle := [name for name in idle if name not in said]:
                said.update(idle)
                settings = ", ".join(f"parallel.{name}" for name in idle)
                yield f"{settings} {'has' if len(idle) == 1 else 'have'} no effect, since {reason}."


@dataclass(frozen=True)
class Keep:
    """The run's folder: what is written there, how often, and what to do with an earlier one."""

    folder: str = ""
    """Empty: runs/NAME."""
    resume: str = "auto"
    """auto: go on from the folder's last checkpoint, or start; must: fail without one; never: start anew, the
    old folder moved aside."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    checkpoint_async: bool = True
    """Copy a checkpoint to memory and write it while training goes on, where half of the host's free memory holds the
    copy: 12 bytes a parameter, 4 more for averaged weights. Otherwise training waits."""
    checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    eval_every: int = 100
    """Steps between held-out losses; the last step always measures one over the whole held-out part."""
    eval_samples: int = 64
    """Held-out samples of the measurements on the way, evenly spaced; their bits per byte are approximate."""
    log_every: int = 1
    """Steps between log lines in metrics.jsonl and TensorBoard."""
    wandb: str = ""
    """A project of Weights & Biases that the run is logged to as well, by the package wandb; empty: none. With
    WANDB_MODE=offline it stays on this machine."""
    report: bool = True
    """Draw the page report.html at the end and write a sample; without, only the numbers are kept."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "checkpoints", "eval_every", "eval_samples", "log_every"):
            _at_least(f"keep.{name}", getattr(self, name), 1)
        if self.resume not in RESUMES:
            raise ConfigError(f"keep.resume is '{self.resume}'; {nearest(self.resume, RESUMES)}")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: everything that decides its numbers, and where it is kept."""

    name: str = "tiny"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    keep: Keep = field(default_factory=Keep)

    def __post_init__(self) -> None:
        path = PurePath(self.name)
        if not self.keep.folder and (not path.parts or path.is_absolute() or ".." in path.parts):
            raise ConfigError(
                f"name is '{self.name}' and keep.folder is empty; the run is kept in runs/NAME: give it a name "
                "that stays inside runs, or set keep.folder."
            )
        if self.model.num_routed_experts % self.parallel.expert:
            raise ConfigError(
                f"parallel.expert is {self.parallel.expert} and model.num_routed_experts "
                f"{self.model.num_routed_experts}; every rank holds as many experts: take a divisor."
            )
        if self.data.sequence_length > self.model.max_positions:
            raise ConfigError(
                f"data.sequence_length is {self.data.sequence_length}; the model has "
                f"{self.model.max_positions} positions: lower it or raise model.max_positions."
            )
        if self.data.sequence_length <= self.model.num_mtp_modules:
            raise ConfigError(
                f"model.num_mtp_modules is {self.model.num_mtp_modules} at data.sequence_length "
                f"{self.data.sequence_length}; each depth loses one position: raise the length."
            )

    @property
    def folder(self) -> str:
        """Where the run is kept."""
        return expanduser(self.keep.folder) or f"runs/{self.name}"


def _at_least(name: str, value: float | int, low: float | int) -> None:
    if not value >= low:
        raise ConfigError(f"{name} is {value}; it must be at least {low:g}.")


def _between(name: str, value: float | int, low: float | int, high: float | int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must lie between {low:g} and {high:g}.")
