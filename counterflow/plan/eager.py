"""Passes over memory and kernels of `counterflow train`'s own ops: eager PyTorch, one kernel after another.

`work` counts what fused kernels must move, as the report's and other large systems have them. Ours read and write
most intermediate tensors: on a CPU RMSNorm's backward alone moves 82 bytes an element where 8 would do; on a GPU norms,
SwiGLU and rotation are one pass each. Bytes are counted tensor by tensor from the code named in each line, kernels too;
tests hold both against a counter that watches the ops of a CPU run, and a profile tells the kernels of a GPU's step.
`e` is the bytes of an element of activations, `c` those of a cast to or from fp32, which fp32 training has none of.
"""

from collections.abc import Callable, Mapping

from counterflow.plan.work import Work, Workload
from counterflow.schedule.words import Kind, Part

ACCUMULATE_BYTES, FUSED_ACCUMULATE_BYTES = 10, 4
"""Of a weight for each product in bf16: it is read, the fp32 gradient read and written; on a GPU one matrix's product
reads the gradient that it writes (kernels.product)."""
NORM_BACKWARD = 64
"""Bytes of an element in fp32 (kernels.norm): two products and sums, two matrix-vector products, dx in three passes."""
NORM_KERNELS, NORM_BACKWARD_KERNELS, FUSED_NORM_BACKWARD_KERNELS = 9, 20, 3
ROUTER_FORWARD, ROUTER_BACKWARD = 88, 113
"""Bytes of a token's score for one expert: sigmoid, bias, group limit, top K, the balance loss; all in fp32."""


def eager(load: Workload, kind: Kind, part: Part, moe: bool, work: Work) -> Work:
    """The op with this system's passes and kernels in place of fused ones'."""
    passes, kernels = _PARTS[part](load, kind, moe)
    if load.layout.recompute == "layer" and kind is Kind.I and part in (Part.ATTN, Part.MLP):
        again, launches = _PARTS[part](load, Kind.F, moe)
        passes, kernels = passes + again, kernels + launches
    return work._replace(passes=passes, kernels=kernels)


Passes = tuple[float, float]
"""Bytes and kernels."""


def _element(load: Workload) -> tuple[float, float]:
    element = load.job.bytes_of.hidden
    return element, element + 4 if element < 4 else 0.0


def norm_bytes(load: Workload, kind: Kind) -> float:
    """Of an element: on a GPU one kernel, in backward one more for the gain; on a CPU PyTorch's composite and ours."""
    e, c = _element(load)
    if load.on_gpu:
        return 2 * e if kind is Kind.F else 5 * e
    return 2 * c + 20 + 3 * e if kind is Kind.F else NORM_BACKWARD + 3 * c


def norm_kernels(load: Workload, kind: Kind) -> int:
    """Of one norm."""
    if kind is Kind.F:
        return 1 if load.on_gpu else NORM_KERNELS
    return FUSED_NORM_BACKWARD_KERNELS if load.on_gpu else NORM_BACKWARD_KERNELS


def rotate_bytes(load: Workload) -> float:
    """Of a token, either way: a cast, a complex product, a cast of each rotary number (kernels.rotate).

    On a GPU only of the shared key's: the queries turn in the pass that would join them.
    """
    model, (e, c) = load.job.model, _element(load)
    if load.on_gpu:
        return 2 * e * model.qk_rope_head_dim
    return (8 + 2 * c) * (model.num_heads + 1) * model.qk_rope_head_dim


def swiglu_bytes(load: Workload, kind: Kind, gated: bool) -> float:
    """Of an element between the projections (kernels.swiglu)."""
    e, c = _element(load)
    if load.on_gpu:
        return 3 * e if kind is Kind.F else 6 * e
    if kind is Kind.F:
        return 5 * e + 2 * e * gated
    return 17 * e + (2 * c + 16 + 4 * e) * gated


def _attend(load: Workload) -> float:
    """Bytes of a token from the residual stream to the heads' outputs, in forward."""
    sizes, model, (e, _) = load.sizes, load.job.model, _element(load)
    norms = norm_bytes(load, Kind.F) * (model.hidden_size + model.q_lora_rank + model.kv_lora_rank)
    rotary = model.num_heads * model.qk_rope_head_dim
    joined = 2 * e * (2 * sizes.queries) - e * rotary  # the one rotary key of all heads is read once
    return norms + rotate_bytes(load) + joined + _core_copies(load)


def _core_copies(load: Workload) -> float:
    """Of a token: on a CPU heads are laid side by side first, and the probabilities are passes (kernels.attention)."""
    if load.on_gpu:
        return 0.0
    sizes, (e, _) = load.sizes, _element(load)
    return 4 * e * (sizes.queries + sizes.values)


def _attn(load: Workload, kind: Kind, moe: bool) -> Passes:
    sizes, model, (e, c) = load.sizes, load.job.model, _element(load)
    width = model.hidden_size
    norms = 2 * width + model.q_lora_rank + model.kv_lora_rank
    if kind is Kind.W:
        return _accumulate(load, sizes.attention), 5 * _added(load) + moe
    forward, launches = _attend(load), 4 * norm_kernels(load, Kind.F) + (13 if load.on_gpu else 18)
    if kind is Kind.F:
        row = (
            forward
            + norm_bytes(load, kind) * width
            + 3 * e * width
            + (c * width + ROUTER_FORWARD * model.num_routed_experts) * moe
        )
        return load.tokens * row, launches + 35 * moe
    parted = 2 * e * (sizes.queries + sizes.contents + sizes.values + model.kv_lora_rank)
    row = norm_bytes(load, kind) * norms + rotate_bytes(load) + parted + 9 * e * width
    row += 2 * _core_copies(load)  # dq, dk, scaled in place, and the probabilities' gradient
    row += (6 * e * width + 2 * c * width + ROUTER_BACKWARD * model.num_routed_experts) * moe
    again = load.layout.recompute == "attention"
    kernels = 4 * norm_kernels(load, kind) + (20 if load.on_gpu else 30) + 34 * moe
    return load.tokens * (row + forward * again), kernels + launches * again


def _mlp(load: Workload, kind: Kind, moe: bool) -> Passes:
    return _experts(load, kind) if moe else _dense(load, kind)


def _dense(load: Workload, kind: Kind) -> Passes:
    model, (e, _) = load.job.model, _element(load)
    inner, width = model.dense_intermediate_size, model.hidden_size
    if kind is Kind.W:
        return _accumulate(load, 3 * width * inner), 2 * _added(load)
    row = swiglu_bytes(load, kind, False) * inner + (3 * e * width if kind is Kind.F else 0)
    kernels = (3, 3) if load.on_gpu else (5, 8)
    return load.tokens * row, kernels[kind is not Kind.F]


def _experts(load: Workload, kind: Kind) -> Passes:
    """Gathers to pairs, SwiGLU, the sum back to rows, the residual."""
    sizes, model, (e, _) = load.sizes, load.job.model, _element(load)
    width, inner = model.hidden_size, sizes.pairs * model.moe_intermediate_size
    held = model.num_routed_experts // load.layout.expert
    if kind is Kind.W:
        runs = 1 if load.on_gpu else 2  # whole granules of an expert's rows, and the rest
        routed = runs * held * sizes.expert * (ACCUMULATE_BYTES if e < 4 else 0)
        kernels = 10 if load.on_gpu else 6 + 12 * held
        added = routed + _accumulate(load, 3 * width * sizes.shared)
        return load.tokens * 4 * e * sizes.pairs * width + added, kernels
    row = 2 * e * sizes.pairs * width + e * (sizes.pairs + sizes.arrived) * width
    row += swiglu_bytes(load, kind, True) * inner + swiglu_bytes(load, kind, False) * sizes.shared
    row += (
        6 * e * width * (kind is Kind.F)
    )  # the shared experts' and, where nothing travels, the routed ones' sum
    if load.on_gpu:
        return load.tokens * row, 32 if kind is Kind.F else 22
    return load.tokens * row, (29 if kind is Kind.F else 32) + 2 * held


def _accumulate(load: Workload, weights: float) -> float:
    """Bytes of single matrices' gradients; fp32 operands' are added to within the product."""
    a_weight = FUSED_ACCUMULATE_BYTES if load.on_gpu else ACCUMULATE_BYTES
    return weights * a_weight if load.job.bytes_of.hidden < 4 else 0.0


def _added(load: Workload) -> int:
    """Launches of a single matrix's gradient."""
    return 1 if load.on_gpu else 2


def _embed(load: Workload, kind: Kind, moe: bool) -> Passes:
    """On a GPU the gradient is made for the whole table and then added, so that sums have an order."""
    del moe
    model, (e, c) = load.job.model, _element(load)
    if kind is Kind.F:
        return load.tokens * 2 * e * model.hidden_size, 2
    table = 16 * model.vocab_size if load.on_gpu else 8 * load.tokens
    return (load.tokens * c + table) * model.hidden_size, 5


def _merge(load: Workload, kind: Kind, moe: bool) -> Passes:
    """Two norms, the concatenation, and an embedding of its own."""
    width, (e, _) = load.job.model.hidden_size, _element(load)
    if kind is Kind.W:
        return _accumulate(load, 2 * width * width), _added(load)
    looked, kernels = _embed(load, kind, moe)
    row = (2 * norm_bytes(load, kind) + 4 * e) * width
    return load.tokens * row + looked, kernels + 6 + 2 * norm_kernels(load, kind) * (kind is not Kind.F)


def _head(load: Workload, kind: Kind, moe: bool) -> Passes:
    """Block by block: softmax, its largest, the cast and scaled gradient, on a GPU one kernel that reads twice and
    writes once; the weight's gradient once a block."""
    del moe
    model, tokens, (e, c) = load.job.model, load.tokens, _element(load)
    if kind is Kind.I:
        return tokens * (norm_bytes(load, kind) + 2 * e) * model.hidden_size, norm_kernels(load, kind) + 2
    logit = 3 * e if load.on_gpu else c + 8 + e + 4 + c + 2 * e
    blocks = -(-tokens * model.vocab_size * 4 // load.head_block)
    added = blocks * _accumulate(load, model.vocab_size * model.hidden_size)
    passes = tokens * (logit * model.vocab_size + norm_bytes(load, kind) * model.hidden_size) + added
    return passes, (5 if load.on_gpu else 22) * blocks + norm_kernels(load, Kind.F)


def _transfer(load: Workload, kind: Kind, moe: bool) -> Passes:
    del load, kind, moe
    return 0.0, 0.0


_PARTS: Mapping[Part, Callable[[Workload, Kind, bool], Passes]] = {
    Part.EMBED: _embed,
    Part.ATTN: _attn,
    Part.DISPATCH: _transfer,
    Part.MLP: _mlp,
    Part.COMBINE: _transfer,
    Part.MERGE: _merge,
    Part.HEAD: _head,
}
