"""Seconds of the functions that training calls, at a model's shapes: what `rates` divides work by."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.config.model import ModelConfig
from counterflow.kernels.attention import attention
from counterflow.kernels.grouped import grouped_matmul
from counterflow.kernels.norm import rms_norm
from counterflow.kernels.swiglu import swiglu, swiglu_backward
from counterflow.plan.eager import norm_bytes, swiglu_bytes
from counterflow.plan.job import Job, Layout
from counterflow.plan.work import Workload
from counterflow.schedule.words import Kind

ENOUGH, FEWEST = 10, 3
"""Times the least seconds that all repeats of an act may take, and how many are made even so."""
COPIES = 8
"""Of an act's operands, used in turn: as in training, where each op meets another layer's or micro-batch's."""


@dataclass(frozen=True)
class RatesSettings:
    """What `counterflow bench rates` measures."""

    model: str = "tiny"
    """Whose shapes: a name of MODELS."""
    sequence_length: int = 256
    micro_batch: int = 4
    """Sequences."""
    precision: str = "auto"
    """bf16, fp32, or auto: bf16 where the device multiplies it."""
    processes: int = 1
    """That measure at once, one GPU or one thread each; from two on, their link too."""
    device: str = "auto"
    """auto (cuda if there is a GPU for every process), cpu or cuda."""
    base: str = ""
    """The card whose other numbers stand: memory, watts; empty: the GPU's by its name, or cpu."""
    repeats: int = 5
    """Times each rate is measured; the median counts."""
    seconds: float = 0.2
    """Least seconds of each time."""


@dataclass(frozen=True)
class Bench:
    """Times acts on a device."""

    settings: RatesSettings
    device: torch.device
    dtype: torch.dtype
    model: ModelConfig
    """Whose shapes."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.settings.micro_batch * self.settings.sequence_length

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def seconds(self, make: Callable[[], Callable[[], object]]) -> float:
        """Of one act, the median of means; `make` draws its operands, a few times over, so that no cache holds them.

        Slow acts are repeated less often: enough is `ENOUGH` times the least seconds.

        One thread's processor time where there is one thread: other work hardly enters into it.
        """
        acts = [make() for _ in range(COPIES)]
        wait = torch.cuda.synchronize if self.device.type == "cuda" else _nothing
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        least, means = self.settings.seconds / self.settings.repeats, []
        for act in acts:
            act()
        wait()
        begun = clock()
        for number in range(self.settings.repeats):
            if number >= FEWEST and clock() - begun > ENOUGH * self.settings.seconds:
                break
            start, runs = clock(), 0
            while runs == 0 or clock() - start < least:
                for act in acts:
                    act()
                wait()
                runs += COPIES
            means.append((clock() - start) / runs)
        return statistics.median(means)


def _nothing() -> None:
    pass


def shapes(model: ModelConfig) -> Iterator[tuple[int, int, int]]:
    """(inputs, outputs, how many) of the model's matrices outside of the routed experts; MTP's layers count too."""
    width, heads, layers = model.hidden_size, model.num_heads, model.num_layers + model.num_mtp_modules
    query, latent = model.q_lora_rank, model.kv_lora_rank
    if query:
        yield width, query, layers
    yield query or width, heads * model.qk_head_dim, layers
    yield width, latent + model.qk_rope_head_dim, layers
    yield latent, heads * (model.qk_nope_head_dim + model.v_head_dim), layers
    yield heads * model.v_head_dim, width, layers
    sparse = layers - model.num_dense_layers
    for inner, number in (
        (model.dense_intermediate_size, model.num_dense_layers),
        (model.num_shared_experts * model.moe_intermediate_size, sparse),
    ):
        if inner and number:
            yield width, 2 * inner, number
            yield inner, width, number
    yield width, model.vocab_size, 1 + model.num_mtp_modules


def product_rate(bench: Bench) -> float:
    """FLOP/s of y = x Wᵀ, dx = dy W and dW = dyᵀ x over the model's matrices."""
    flops = seconds = 0.0
    for inputs, outputs, number in shapes(bench.model):
        rows = min(
            bench.tokens, max(256, bench.tokens * 4096 // outputs)
        )  # a large head's rows come in blocks
        times = number * bench.tokens / rows

        def make(rows: int = rows, inputs: int = inputs, outputs: int = outputs) -> Callable[[], object]:
            x, weight, dy = bench.draw(rows, inputs), bench.draw(outputs, inputs), bench.draw(rows, outputs)
            return lambda: (x @ weight.t(), dy @ weight, dy.t() @ x)

        flops += times * 6 * rows * inputs * outputs
        seconds += times * bench.seconds(make)
    return flops / seconds


def grouped_rate(bench: Bench) -> float:
    """FLOP/s of the routed experts' products, forward and for the input, with a share of rows as routing draws it."""
    model = bench.model
    pairs, experts = bench.tokens * model.num_experts_per_token, model.num_routed_experts
    width, inner = model.hidden_size, model.moe_intermediate_size
    generator = torch.Generator().manual_seed(0)

    def make() -> Callable[[], object]:
        chosen = torch.randint(experts, (pairs,), generator=generator)
        ends = torch.bincount(chosen, minlength=experts).cumsum(0).to(bench.device)
        rows, middle, both = bench.draw(pairs, width), bench.draw(pairs, inner), bench.draw(pairs, 2 * inner)
        up, down = bench.draw(experts, 2 * inner, width), bench.draw(experts, width, inner)
        return lambda: (
            grouped_matmul(rows, up.transpose(1, 2), ends),
            grouped_matmul(middle, down.transpose(1, 2), ends),
            grouped_matmul(rows, down, ends),
            grouped_matmul(both, up, ends),
        )

    return 4 * pairs * 3 * inner * width / bench.seconds(make)


def attention_rate(bench: Bench) -> float:
    """Causal FLOP/s of the core, forward and backward: 3.5 forwards' worth."""
    model, length = bench.model, bench.settings.sequence_length
    shape = (bench.settings.micro_batch, length, model.num_heads)

    def make() -> Callable[[], object]:
        q, k = (bench.draw(*shape, model.qk_head_dim).requires_grad_() for _ in range(2))
        v = bench.draw(*shape, model.v_head_dim).requires_grad_()
        dout = bench.draw(shape[0], model.num_heads, length, model.v_head_dim)

        def act() -> None:
            out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.125)
            torch.autograd.grad(out, (q, k, v), dout)

        return act

    core = bench.tokens * model.num_heads * (model.qk_head_dim + model.v_head_dim) * length
    return 3.5 * core / bench.seconds(make)


def passes_rate(bench: Bench) -> float:
    """Bytes/s of a layer's norms and SwiGLU, forward and backward."""
    settings, model = bench.settings, bench.model
    job = Job(model, settings.sequence_length, settings.micro_batch, 1.0, settings.precision)
    load = Workload(job, Layout(1, 1), on_gpu=bench.device.type == "cuda")
    width, inner = model.hidden_size, model.moe_intermediate_size
    pairs = bench.tokens * model.num_experts_per_token

    def make() -> Callable[[], object]:
        x, dy = bench.draw(bench.tokens, width).requires_grad_(), bench.draw(bench.tokens, width)
        gain = torch.ones(width, device=bench.device, dtype=bench.dtype, requires_grad=True)
        both, dout, gates = (
            bench.draw(pairs, 2 * inner),
            bench.draw(pairs, inner),
            torch.ones(pairs).to(bench.device),
        )

        def act() -> None:
            for _ in range(2):
                torch.autograd.grad(rms_norm(x, gain, 1e-6), (x, gain), dy)
            with torch.no_grad():
                swiglu(both, gates)
                swiglu_backward(dout, both, gates)

        return act

    moved = sum(
        2 * norm_bytes(load, kind) * bench.tokens * width + swiglu_bytes(load, kind, True) * pairs * inner
        for kind in (Kind.F, Kind.I)
    )
    return moved / bench.seconds(make)
