"""The overlapped pair of Figure 4 at any layer size, on the ranks at hand: what its transfers add to its computation.

The executor, segments, model and backend are those of training. DualPipeV on one pipeline rank puts both ends of the
model there and gives pairs in a row, which are timed from the first op of the first to the last of the last. Four ways
alternate: computation alone (what arrives is already in place, no multiprocessor carved out), communication alone (the
same transfers one after another), in turn (each waited for at once), overlapped.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf

import torch

from counterflow.benchmark.carried import Repeated, Tape, balanced, in_turn, repeats_for
from counterflow.benchmark.equality import with_accumulators
from counterflow.benchmark.processes import share_a_gpu
from counterflow.benchmark.rounds import Rounds
from counterflow.comm import open_dispatcher
from counterflow.comm.channels import Links, LocalChannels
from counterflow.comm.clock import Mark, between, mark
from counterflow.comm.dispatch import Dispatcher, Terms
from counterflow.comm.local import Local
from counterflow.comm.mesh import PRECISIONS, Mesh, precision_for
from counterflow.comm.partition import carve
from counterflow.comm.peers import process_peers
from counterflow.config.backends import BACKENDS
from counterflow.config.model import ModelConfig
from counterflow.config.models import MODELS
from counterflow.config.run import Parallel
from counterflow.errors import ConfigError
from counterflow.model.rope import rope_table
from counterflow.model.transformer import Transformer, keep_experts
from counterflow.pipeline.execute import Executor
from counterflow.pipeline.record import Recorder
from counterflow.pipeline.stage import Pass, Stage, StepSettings, Sums
from counterflow.plan.stages import stage_plans
from counterflow.schedule.dual import dualpipev
from counterflow.schedule.transfers import transfers
from counterflow.schedule.weave import weave
from counterflow.schedule.words import TRANSFERS, Op, Span

WAYS = ("computation", "communication", "in turn", "overlapped")
BYTES_EACH = 6
"""Of a parameter: bf16 and its fp32 gradient."""
ROOM = 0.45
"""Of a GPU's memory that the experts may take; the rest is for activations, arenas and the recorded transfers."""


@dataclass(frozen=True)
class Overlap:
    """What is timed; the defaults are the report's layer, and on a CPU one that its processes can run in a minute."""

    hidden: int = 0
    """0: 7168, on a CPU 64."""
    intermediate: int = 0
    """Of an expert; 0: 2048, on a CPU 32."""
    heads: int = 0
    """0: 128, on a CPU 2."""
    experts: int = 0
    """Of a layer on all ranks together; 0: as many as fit, 256 at most, on a CPU 16."""
    top: int = 8
    layers: int = 4
    """Of both stages together; even."""
    tokens: int = 0
    """Of a micro-batch; 0: 4096, on a CPU 64."""
    microbatches: int = 6
    backends: tuple[str, ...] = ()
    """None: nvlink, on a CPU collective."""
    multiprocessors: tuple[int, ...] = (8,)
    routing: tuple[str, ...] = ("real", "forced balanced")
    ratio: str = ""
    """Empty, or 1:1: transfers are repeated until communication alone takes as long as computation alone."""
    rounds: int = 20
    """At most."""
    warmups: int = 3
    seconds: float = 60.0
    """All rounds together on a CPU, about: fewer are made where they would take longer."""


ON_GPUS = {"hidden": 7168, "intermediate": 2048, "heads": 128, "tokens": 4096, "backends": ("nvlink",)}
ON_A_CPU = {
    "hidden": 64,
    "intermediate": 32,
    "heads": 2,
    "experts": 16,
    "tokens": 64,
    "backends": (Parallel.dispatch,),
}


def settled(wish: Overlap, mesh: Mesh) -> Overlap:
    """The wish with what it leaves to the device decided."""
    usual = ON_GPUS if mesh.device.type == "cuda" else ON_A_CPU
    return replace(wish, **{name: value for name, value in usual.items() if not getattr(wish, name)})


def model_config(wish: Overlap, mesh: Mesh) -> ModelConfig:
    """The model: the report's layer with a small vocabulary, every layer with experts."""
    experts = wish.experts or experts_that_fit(wish, mesh)
    groups = 8 if experts % 8 == 0 and experts >= max(16, 2 * wish.top) else 1  # two experts in each, or more
    return replace(
        MODELS["v3-671b"],
        vocab_size=1024,
        hidden_size=wish.hidden,
        num_layers=wish.layers,
        num_dense_layers=0,
        num_heads=wish.heads,
        moe_intermediate_size=wish.intermediate,
        num_routed_experts=experts,
        num_experts_per_token=wish.top,
        num_groups=groups,
        num_limited_groups=min(4, groups),
        num_mtp_modules=0,
        max_positions=max(wish.tokens, 2),
        yarn=None,
    )


def experts_that_fit(wish: Overlap, mesh: Mesh) -> int:
    """Of a layer, on all ranks together, a multiple of 8 × ranks; 256 at most."""
    memory = torch.cuda.get_device_properties(mesh.device).total_memory
    if share_a_gpu(mesh):
        memory //= mesh.size
    each = 3 * wish.hidden * wish.intermediate * BYTES_EACH * wish.layers
    fits = int(ROOM * memory / each) // 8 * 8
    return min(256, max(8, mesh.everyone(fits)[0]) * mesh.size)


class Pairs:
    """A model on these ranks, its schedule, and the stretch of pairs that is timed. A collective."""

    def __init__(self, wish: Overlap, mesh: Mesh) -> None:
        if wish.layers % 2:
            raise ConfigError(f"layers is {wish.layers}; two stages share them alike: take an even number.")
        self.wish, self.mesh = wish, mesh
        self.config, self.precision = model_config(wish, mesh), precision_for("auto", mesh.device.type)
        self.model = _model(self.config, mesh, PRECISIONS[self.precision])
        self.schedule = dualpipev(1, wish.microbatches)
        half = wish.layers // 2
        plans = stage_plans(self.config, 2, f"embed {half} | {half} head")
        self.stages = {stage: Stage(self.model, plans[stage.index]) for stage in self.schedule.held(0)}
        held = {stage: plans[stage.index] for stage in self.schedule.held(0)}
        woven = [weave(cell, held) for cell in self.schedule.rows[0]]
        pairs = [place for place, cell in enumerate(self.schedule.rows[0]) if len(cell) > 1]
        assert pairs == list(range(pairs[0], pairs[-1] + 1)), "pairs follow each other"
        self.count, self.first, self.last = len(pairs), woven[pairs[0]][0], woven[pairs[-1]][-1]
        moved = [[op for op in ops if op.part in TRANSFERS] for ops in woven]
        self.before = sum(map(len, moved[: pairs[0]]))
        self.within = sum(map(len, moved[pairs[0] : pairs[-1] + 1]))
        generator = torch.Generator().manual_seed(mesh.rank)
        shape = (wish.microbatches, 1, wish.tokens + 1)
        self.samples = torch.randint(self.config.vocab_size, shape, generator=generator).to(mesh.device)
        self.settings = StepSettings(1, wish.tokens, 1.0 / (wish.microbatches * wish.tokens))

    def run(
        self, dispatcher: Dispatcher, annotate: bool = False, record: Recorder | None = None
    ) -> tuple[Mark, Mark]:
        """One step; the moments between which the pairs ran."""
        self.model.dispatcher = dispatcher
        edges: list[Mark] = []
        stages = {
            stage: Edged(inner, (self.first, self.last), edges, self.mesh.device, annotate)
            for stage, inner in self.stages.items()
        }
        links = LocalChannels(Links(self.schedule, transfers(self.schedule)))
        executor = Executor(self.schedule, 0, stages, links, record)
        executor.run(lambda pipe, mb: self.samples[mb], self.settings)
        start, end = edges
        return start, end


class Edged:
    """A stage that marks when the first and the last op of a stretch begin and end."""

    def __init__(
        self, inner: Stage, edges: tuple[Op, Op], marks: list[Mark], device: torch.device, annotate: bool
    ) -> None:
        self.inner, self.plan, self.reads_tokens = inner, inner.plan, inner.reads_tokens
        self._edges, self._marks, self._device, self._annotate = edges, marks, device, annotate

    def run(self, op: Op, state: Pass, sums: Sums) -> None:
        """The op."""
        if op == self._edges[0]:
            self._marks.append(mark(self._device))
        name = f"op {op}"
        with torch.profiler.record_function(name) if self._annotate else nullcontext():
            self.inner.run(op, state, sums)
        if op == self._edges[1]:
            self._marks.append(mark(self._device))

    def drain(self) -> None:
        """The inner one's."""
        self.inner.drain()


def _model(config: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> Transformer:
    """Random weights with fp32 gradients, this rank's part of the experts."""
    with torch.device("meta"):
        model = Transformer(config)
    if mesh.size > 1:
        keep_experts(model, mesh.expert_rank, mesh.size)
    draw_on(model, mesh.device, dtype)
    return with_accumulators(model)


def draw_on(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model, of which nothing counts yet, random weights in `dtype`, drawn where they stay: for models whose
    start `initialise`, on the CPU, would take minutes over."""
    model.to_empty(device="meta")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.rope = rope_table(model.config, model.config.max_positions).to(device)
    for buffer in model.buffers():
        if buffer is not model.rope:
            buffer.zero_()
    torch.manual_seed(7)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.fill_(1.0)
            else:
                value.normal_(0.0, model.config.initializer_std)


@dataclass(frozen=True)
class Contender:
    """A backend with a budget, and how tokens are routed."""

    backend: str
    multiprocessors: int
    routing: str

    @property
    def name(self) -> str:
        """As tables show it."""
        budget = f", {self.multiprocessors} SMs" if self.multiprocessors else ""
        return f"{self.backend}{budget}, {self.routing}"


class Bench:
    """A contender's dispatcher with what was recorded of it. A collective."""

    def __init__(self, pairs: Pairs, contender: Contender) -> None:
        self.pairs, self.contender, mesh = pairs, contender, pairs.mesh
        self.mesh, self.rounds, self.repeats = mesh, Rounds(mesh, flush=False), 1
        self.carrier, self._repeated = _open(pairs, contender)
        experts = pairs.config.num_routed_experts
        forced = contender.routing == "forced balanced"
        self.dispatcher: Dispatcher = balanced(self.carrier, experts) if forced else self.carrier
        self.tape = Tape()
        pairs.run(self.tape.recording(self.dispatcher))
        self.carrier.traffic()
        self.x = torch.randn(pairs.wish.tokens, pairs.wish.hidden).to(pairs.model.head)

    def time(
        self,
        warmups: int,
        rounds: int,
        limit_s: float = inf,
        watch: Callable[[int, int], object] = lambda done, rounds: None,
    ) -> dict[str, list[float]]:
        """Seconds of the slowest rank for all pairs of a run, by way, one a round; ways alternate; see `Rounds`."""
        budget, pairs = self.contender.multiprocessors, self.pairs
        in_place, waits_at_once = self.tape.in_place(self.dispatcher), in_turn(self.dispatcher)

        def step(dispatcher: Dispatcher, carved: int) -> tuple[Mark, Mark]:
            carve(carved, self.mesh.device)
            found = pairs.run(dispatcher)
            self.carrier.traffic()
            return found

        times = self.rounds.time(
            {
                "computation": lambda: step(in_place, 0),
                "communication": self.transfers_alone,
                "in turn": lambda: step(waits_at_once, budget),
                "overlapped": lambda: step(self.dispatcher, budget),
            },
            warmups,
            rounds,
            limit_s,
            watch,
        )
        carve(0, self.mesh.device)
        return times

    def transfers_alone(self) -> None:
        """The transfers of the stretch, one after another."""
        before, within = self.pairs.before, self.pairs.within
        self.tape.again(self.dispatcher, before, before + within, self.x)
        self.carrier.traffic()

    def even(self) -> None:
        """Repeat transfers from here on until communication alone takes about as long as computation alone."""
        times = self.time(1, 3)
        middle = {way: sorted(seconds)[1] for way, seconds in times.items()}
        self.repeats = self.mesh.everyone(repeats_for(middle["communication"], middle["computation"]))[0]
        for exchange in self._repeated:
            exchange.times = self.repeats
        if hasattr(self.carrier, "repeats"):
            self.carrier.repeats = self.repeats  # pyright: ignore[reportAttributeAccessIssue]

    def recorded(self) -> list[Span]:
        """When the ops of the pairs ran in one overlapped run, by the clock, on all ranks; a transfer when issued."""
        self.mesh.barrier()
        recorder = Recorder(self.mesh.device)
        start, end = self.pairs.run(self.dispatcher, record=recorder)
        self.carrier.traffic()
        mine = [
            replace(span, rank=self.mesh.rank)
            for span in recorder.spans()
            if between(start, span.start) >= 0 and between(span.end, end) >= 0
        ]
        return [span for some in self.mesh.everyone(mine) for span in some]

    def waited(self) -> float:
        """Seconds that computation stood still for transfers within the pairs of one overlapped run, here."""
        carve(self.contender.multiprocessors, self.mesh.device)
        start, end = self.pairs.run(self.dispatcher)
        carve(0, self.mesh.device)
        waits = [wait for hop in self.carrier.traffic() for wait in hop.waits]
        return sum(
            between(*wait) for wait in waits if between(start, wait[0]) >= 0 and between(wait[1], end) >= 0
        )


def _open(pairs: Pairs, contender: Contender) -> tuple[Dispatcher, list[Repeated]]:
    """The backend, and the exchanges that can be made to repeat."""
    mesh, wish = pairs.mesh, pairs.wish
    if mesh.size == 1 and not BACKENDS[contender.backend].worst_case:
        return Local(), []
    bounded = replace(mesh, multiprocessors=contender.multiprocessors)
    node = max(1, mesh.size // 2) if BACKENDS[contender.backend].by_node else 0
    peers = process_peers(bounded, node)
    repeated = []
    if not BACKENDS[contender.backend].device:  # by exchanges of rows, which can be repeated
        whole, rail, within = (
            Repeated(one) if one else None for one in (peers.whole, peers.rail, peers.node)
        )
        assert whole is not None, "peers have a whole"
        peers = replace(peers, whole=whole, rail=rail, node=within)
        repeated = [one for one in (whole, rail, within) if one is not None]
    terms = Terms(pairs.config.num_routed_experts, False, wish.tokens, contender.multiprocessors)
    return open_dispatcher(contender.backend, peers, terms), repeated


def contenders(wish: Overlap, mesh: Mesh) -> list[Contender]:
    """Every backend with every budget and routing; the copy engine has no budget."""
    found: Mapping[Contender, None] = {
        Contender(
            backend, budget * (BACKENDS[backend].multiprocessors and mesh.device.type == "cuda"), routing
        ): None
        for routing in wish.routing
        for backend in wish.backends
        for budget in wish.multiprocessors
    }
    return list(found)
