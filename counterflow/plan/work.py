"""What one op does: products, attention, passes over memory, kernels; and what a part keeps for backward.

An op is one part of one layer for one micro-batch on one rank (`schedule.words.Op`). Products are counted exactly.
Passes are the reads and writes between them that fused kernels need, to a few tens of percent: norms, rotations,
gathers, SwiGLU; `eager` has those of this system's own ops. Kept bytes follow from what each part's autograd function
saves.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

from counterflow.config.model import ModelConfig
from counterflow.plan.job import Job, Layout
from counterflow.plan.routing import UNIFORM, Routing
from counterflow.schedule.words import Kind, Part, Plan


class Work(NamedTuple):
    """Of one op. FLOPs count a multiplication and an addition as two."""

    products: float = 0.0
    """FLOPs with weights at the precision's rate."""
    grouped: float = 0.0
    """FLOPs of the routed experts' grouped products, at the precision's rate."""
    wide: float = 0.0
    """FLOPs with weights that stay in bf16 or fp32: head and router [§3.3.1]."""
    attention: float = 0.0
    """FLOPs of the attention core, causal."""
    weights: float = 0.0
    """Bytes of weights read."""
    passes: float = 0.0
    """Bytes read and written outside of products."""
    kernels: float = 0


@dataclass(frozen=True)
class Sizes:
    """Elements of a token's tensors in one layer, in the letters of docs/CONVENTIONS.md."""

    model: ModelConfig
    queries: int
    """N (H + R): queries of all heads, and as many keys."""
    contents: int
    """N H."""
    values: int
    """N V."""
    arrived: float
    """Rows that arrive at a rank for each of its own tokens: the distinct ranks of a token's experts."""
    pairs: float
    """Pairs of row and expert at the fullest rank for each of its own tokens."""

    @staticmethod
    def of(model: ModelConfig, expert_ranks: int, routing: Routing) -> "Sizes":
        """For experts on so many ranks."""
        heads, uneven = model.num_heads, routing.imbalance(model, expert_ranks)
        return Sizes(
            model,
            queries=heads * model.qk_head_dim,
            contents=heads * model.qk_nope_head_dim,
            values=heads * model.v_head_dim,
            arrived=routing.places(model, expert_ranks) * uneven,
            pairs=model.num_experts_per_token * uneven,
        )

    @property
    def up(self) -> int:
        """Weights of the up-projections that the report recomputes: W_UQ, W_QR, W_UK, W_UV."""
        model = self.model
        return model.q_lora_rank * self.queries + model.kv_lora_rank * (self.contents + self.values)

    @property
    def attend(self) -> int:
        """Weights before the attention core."""
        model = self.model
        down = model.hidden_size * (model.q_lora_rank or self.queries)
        return self.up + down + model.hidden_size * (model.kv_lora_rank + model.qk_rope_head_dim)

    @property
    def attention(self) -> int:
        """Weights of the whole attention."""
        return self.attend + self.values * self.model.hidden_size

    @property
    def latents(self) -> int:
        """Q + C + R."""
        return self.model.q_lora_rank + self.model.kv_lora_rank + self.model.qk_rope_head_dim

    @property
    def expert(self) -> int:
        """Weights of one expert."""
        return 3 * self.model.hidden_size * self.model.moe_intermediate_size

    @property
    def shared(self) -> int:
        """Width of the shared experts together."""
        return self.model.num_shared_experts * self.model.moe_intermediate_size


@dataclass(frozen=True)
class Workload:
    """The ops of a job in a layout; calling it gives the work of one."""

    job: Job
    layout: Layout
    routing: Routing = UNIFORM
    on_gpu: bool = True

    @cached_property
    def tokens(self) -> float:
        """Of a micro-batch on one rank."""
        return self.layout.micro_batch * self.job.sequence_length / self.layout.tensor

    @cached_property
    def sizes(self) -> Sizes:
        """Of its layers."""
        return _sizes(self.job.model, self.layout.expert, self.routing)

    @property
    def head_block(self) -> int:
        """Bytes that the logits made at once would take in fp32 (`kernels.head`)."""
        return 2**31 if self.on_gpu else 8 * 2**20

    def __call__(self, kind: Kind, part: Part, layer: int) -> Work:
        """The work of an op on one rank; `kind` is F, I or W."""
        moe = self.job.model.is_moe(layer)
        return _work(self, kind, part, moe if part in (Part.ATTN, Part.MLP) else False)


@cache
def _sizes(model: ModelConfig, expert_ranks: int, routing: Routing) -> Sizes:
    return Sizes.of(model, expert_ranks, routing)


@lru_cache(maxsize=4096)
def _work(load: Workload, kind: Kind, part: Part, moe: bool) -> Work:
    made = _PARTS[part](load, kind, moe)
    recomputed = load.layout.recompute == "layer" and kind is Kind.I and part in (Part.ATTN, Part.MLP)
    if not recomputed:
        return made
    return Work(*(own + again for own, again in zip(made, _PARTS[part](load, Kind.F, moe))))


def _attn(load: Workload, kind: Kind, moe: bool) -> Work:
    sizes, model, job, tokens = load.sizes, load.job.model, load.job, load.tokens
    core = tokens * (sizes.queries + sizes.values) * job.sequence_length
    again = {"projections": sizes.up, "attention": sizes.attend}.get(load.layout.recompute, 0)
    router = 2 * tokens * model.hidden_size * model.num_routed_experts * moe
    remade = (
        4 * model.hidden_size + 3 * sizes.latents + 6 * sizes.queries + 2 * sizes.contents + 2 * sizes.values
    )
    passes = remade + 5 * model.hidden_size + 2 * sizes.values + 8 * model.num_routed_experts * moe
    product = 2 * tokens * sizes.attention
    weights, wide = sizes.attention * job.bytes_of.operand, job.bytes_of.hidden * tokens
    if kind is Kind.F:
        return Work(product, 0.0, router, core, weights, passes * wide, 25)
    if kind is Kind.W:
        operands = 2 * (
            2 * model.hidden_size + sizes.latents + sizes.queries + sizes.contents + 2 * sizes.values
        )
        return Work(product, 0.0, router, 0.0, sizes.attention * 8, operands * wide, 8)
    replayed = core if load.layout.recompute == "attention" else 0.0
    passes = 2 * passes + (remade if again else 0)
    made_again = 2 * tokens * again
    return Work(product + made_again, 0.0, router, 2.5 * core + replayed, weights, passes * wide, 60)


def _mlp(load: Workload, kind: Kind, moe: bool) -> Work:
    return _experts(load, kind) if moe else _dense(load, kind)


def _dense(load: Workload, kind: Kind) -> Work:
    model, bytes_ = load.job.model, load.job.bytes_of
    inner = model.dense_intermediate_size
    weights = 3 * model.hidden_size * inner
    passes = 2 * (model.hidden_size + 2 * inner) * bytes_.hidden + 2 * inner * bytes_.operand
    kernels = 8 if kind is Kind.F else 12
    product = 2 * load.tokens * weights
    return Work(product, 0.0, 0.0, 0.0, weights * bytes_.operand, load.tokens * passes, kernels)


def _experts(load: Workload, kind: Kind) -> Work:
    """Shared and routed: rows are gathered to pairs, multiplied, gated, multiplied and summed back to rows."""
    sizes, model, bytes_ = load.sizes, load.job.model, load.job.bytes_of
    width, operand, wide = model.hidden_size, bytes_.operand, bytes_.hidden
    shared = 3 * width * sizes.shared
    product, grouped = 2 * load.tokens * shared, 2 * load.tokens * sizes.pairs * sizes.expert
    weights = model.num_routed_experts // load.layout.expert * sizes.expert + shared
    middle = sizes.pairs * model.moe_intermediate_size + sizes.shared
    rows = sizes.pairs * width * (3 * operand + 2 * wide) + (sizes.arrived + 4) * width * wide
    passes, kernels = {
        Kind.F: (rows + middle * (4 * wide + 2 * operand), 16),
        Kind.I: (rows + middle * (6 * wide + 3 * operand), 24),
        Kind.W: ((4 * sizes.pairs * width + 6 * middle) * operand, 8),
    }[kind]
    read = weights * (8 if kind is Kind.W else operand)  # a weight gradient is read and written in fp32
    return Work(product, grouped, 0.0, 0.0, read, load.tokens * passes, kernels)


def _embed(load: Workload, kind: Kind, moe: bool) -> Work:
    del moe
    return Work(passes=2 * load.tokens * load.job.model.hidden_size * load.job.bytes_of.hidden, kernels=2)


def _merge(load: Workload, kind: Kind, moe: bool) -> Work:
    del moe
    width, bytes_ = load.job.model.hidden_size, load.job.bytes_of
    passes = 8 * load.tokens * width * bytes_.hidden
    return Work(4 * load.tokens * width**2, 0.0, 0.0, 0.0, 2 * width**2 * bytes_.operand, passes, 8)


def _head(load: Workload, kind: Kind, moe: bool) -> Work:
    """Logits and both gradients are made at once in F; I hands the hidden states' on."""
    del moe
    model, tokens, bytes_ = load.job.model, load.tokens, load.job.bytes_of
    if kind is Kind.I:
        return Work(passes=4 * tokens * model.hidden_size * bytes_.hidden, kernels=4)
    table = model.hidden_size * model.vocab_size
    logits = tokens * model.vocab_size * (3 * bytes_.hidden + 4 * 4)
    return Work(0.0, 0.0, 6 * tokens * table, 0.0, table * (2 * bytes_.hidden + 8), logits, 30)


def _transfer(load: Workload, kind: Kind, moe: bool) -> Work:
    del load, kind, moe
    return Work()


_PARTS: Mapping[Part, Callable[[Workload, Kind, bool], Work]] = {
    Part.EMBED: _embed,
    Part.ATTN: _attn,
    Part.DISPATCH: _transfer,
    Part.MLP: _mlp,
    Part.COMBINE: _transfer,
    Part.MERGE: _merge,
    Part.HEAD: _head,
}


class Kept(NamedTuple):
    """Bytes of one part for one micro-batch on one rank."""

    whole: float = 0.0
    """From F to I."""
    owed: float = 0.0
    """From I to W: what the weight gradients read."""


def stage_kept(load: Workload, plan: Plan) -> Kept:
    """What a stage keeps for one micro-batch."""
    number = Counter((part, load.job.model.is_moe(layer)) for part, layer in plan)
    every = [(count, kept(load, *key)) for key, count in number.items()]
    return Kept(sum(count * one.whole for count, one in every), sum(count * one.owed for count, one in every))


EXPLICIT_LENGTH, QUERY_BLOCK = 1024, 128
"""On a CPU probabilities are kept up to this length, block of queries by block (`kernels.attention`)."""


def _probabilities(load: Workload) -> float:
    """Bytes of a token beyond fused attention's, which keeps the contents that values came with instead of them."""
    length, model = load.job.sequence_length, load.job.model
    if load.on_gpu or length > EXPLICIT_LENGTH:
        return 0.0
    seen = (length + min(QUERY_BLOCK, length)) / 2
    return (model.num_heads * seen - load.sizes.contents) * load.job.bytes_of.hidden


def kept(load: Workload, part: Part, moe: bool) -> Kept:
    """What a part keeps for backward; `moe` says whether its layer has experts."""
    sizes, model, bytes_, recompute = load.sizes, load.job.model, load.job.bytes_of, load.layout.recompute
    width = model.hidden_size
    if part is Part.ATTN:
        inputs = (
            width + model.q_lora_rank + model.kv_lora_rank
        ) * bytes_.cached + sizes.values * bytes_.attended
        grads = (sizes.latents + sizes.queries + sizes.contents + sizes.values + width) * bytes_.cached
        whole = 2 * width * bytes_.hidden + sizes.values * bytes_.attended + 4 * model.num_heads
        if recompute == "none":
            normalised = width + model.q_lora_rank + model.kv_lora_rank
            made = normalised + sizes.latents + 2 * sizes.queries + sizes.contents + sizes.values
            whole += made * bytes_.hidden + _probabilities(load)
        elif recompute == "layer":
            whole = width * bytes_.hidden
        return Kept(load.tokens * whole, load.tokens * (inputs + grads))
    if part is Part.MLP and recompute != "layer":
        middle = (
            sizes.pairs * model.moe_intermediate_size + sizes.shared if moe else model.dense_intermediate_size
        )
        rows = (sizes.arrived if load.layout.expert > 1 else 0) + 1 if moe else 1
        whole = (rows * width + 2 * middle) * bytes_.cached + (8 * model.num_experts_per_token if moe else 0)
        owed = (2 * rows * width + 3 * middle) * bytes_.cached
        return Kept(load.tokens * whole, load.tokens * owed)
    if part is Part.MERGE:
        both = load.tokens * 2 * width * bytes_.hidden
        return Kept(2 * both, 2 * both)
    return Kept(load.tokens * width * bytes_.hidden if part is Part.HEAD else 0.0, 0.0)
