"""How fast a training step is beside transformers' DeepseekV3, and how near the floor of its products.

Each contender lives in a process of its own, since allocator settings and thread pools are a process's; the
parent asks them for a few steps in turn, so that a noisy minute hits all alike. A step is forward, backward,
clipping and AdamW on random tokens, MTP off on both sides. In bf16 transformers updates bf16 weights
directly, which is less work than our fp32 masters and moments; nothing is taken off for that. The floor is
the time of the step's own matrix products (forward, both gradients) and of nothing else, at their shapes and
dtype, into memory already there.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from counterflow.config.model import ModelConfig
from counterflow.config.run import Train

CLIP_NORM = 1.0
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    model: ModelConfig
    sequences: int
    length: int
    precision: str
    threads: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequences * self.length


def compare(
    setting: Setting, contenders: Sequence[str], rounds: int, steps: int, tell: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Tokens per second of each contender in every round, their parameters and peak resident memory."""
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in contenders:
        pipes[name], there = context.Pipe()
        context.Process(target=_serve, args=(there, name, setting), daemon=True).start()
        there.close()  # so that a contender's death ends the wait for it

    def hear(name: str) -> Any:
        try:
            return pipes[name].recv()
        except EOFError:
            raise RuntimeError(
                f"contender '{name}' ended before it was asked to; its traceback is above"
            ) from None

    results: dict[str, dict[str, Any]] = {}
    for name in contenders:
        results[name] = {"parameters": hear(name), "tokens_per_s": []}
    for index in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(steps)
            results[name]["tokens_per_s"].append(steps * setting.tokens / hear(name))
        speeds = ", ".join(f"{name} {results[name]['tokens_per_s'][-1]:,.0f}" for name in contenders)
        tell(f"{setting.precision} round {index + 1} of {rounds}: {speeds} tokens/s")
    for name, pipe in pipes.items():
        pipe.send(0)
        results[name]["peak_bytes"] = hear(name)
        results[name]["median"] = statistics.median(results[name]["tokens_per_s"])
    return results


def _serve(pipe: Connection, name: str, setting: Setting) -> None:
    import torch

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    parameters, step = CONTENDERS[name](setting)
    samples = torch.randint(0, setting.model.vocab_size, (setting.sequences, setting.length + 1))
    for _ in range(3):
        step(samples)
    pipe.send(parameters)
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            step(samples)
        pipe.send(time.perf_counter() - start)
    pipe.send(_peak_bytes())


def _ours(setting: Setting) -> tuple[int, Callable]:
    import torch

    from counterflow.kernels.memory import keep_freed_memory
    from counterflow.model.debts import Ledger
    from counterflow.model.transformer import Transformer, initialise
    from counterflow.train.optim import Optimizer

    keep_freed_memory()
    model = Transformer(replace(setting.model, num_mtp_modules=0))
    initialise(model, 0)
    optimizer = Optimizer(
        list(model.named_parameters()),
        Train(precision=setting.precision, clip_norm=CLIP_NORM),
        torch.device("cpu"),
    )

    def step(samples: Any) -> None:
        model(samples, ledger=Ledger()).total.backward()
        optimizer.drain()
        norm = optimizer.norm()
        assert torch.isfinite(norm), "the benchmark's gradient is not finite"
        optimizer.clip(norm)
        optimizer.step(LEARNING_RATE)

    return sum(parameter.numel() for parameter in model.parameters()), step


def _theirs(setting: Setting) -> tuple[int, Callable]:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from counterflow.config.released import to_released

    settings: dict[str, Any] = to_released(replace(setting.model, num_mtp_modules=0))
    settings["use_cache"] = False
    config = DeepseekV3Config(**settings)
    model = DeepseekV3ForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model.to(dtype=torch.bfloat16 if setting.precision == "bf16" else torch.float32).train()  # pyright: ignore[reportCallIssue]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(samples: Any) -> None:
        model(input_ids=samples[:, :-1], labels=samples[:, :-1]).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return sum(parameter.numel() for parameter in model.parameters()), step


CONTENDERS: dict[str, Callable[[Setting], tuple[int, Callable]]] = {
    "counterflow": _ours,
    "transformers": _theirs,
}


def _peak_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def products(setting: Setting) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """(how many, (batch, M, K, N)) of every matrix product of a step: forward, then both gradients."""
    model, tokens = setting.model, setting.tokens
    layers, width, latent = model.num_layers, model.hidden_size, model.kv_lora_rank
    heads, inner = setting.sequences * model.num_heads, model.moe_intermediate_size
    linear = [
        (layers, (1, tokens, model.q_lora_rank or width, model.num_heads * model.qk_head_dim)),
        (layers, (1, tokens, width, latent + model.qk_rope_head_dim)),
        (layers, (1, tokens, latent, model.num_heads * (model.qk_nope_head_dim + model.v_head_dim))),
        (layers, (1, tokens, model.num_heads * model.v_head_dim, width)),
        (1, (1, tokens, width, model.vocab_size)),
    ]
    if model.q_lora_rank:
        linear.append((layers, (1, tokens, width, model.q_lora_rank)))
    experts = model.num_moe_layers * model.num_routed_experts
    rows = tokens * model.num_experts_per_token // model.num_routed_experts
    for count, wide, rows_each in (
        (model.num_dense_layers, model.dense_intermediate_size, tokens),
        (model.num_moe_layers, model.num_shared_experts * inner, tokens),
        (experts, inner, rows),
    ):
        if count and wide:
            linear += [(count, (1, rows_each, width, 2 * wide)), (count, (1, rows_each, wide, width))]
    for count, (batch, m, k, n) in linear:
        yield count, (batch, m, k, n)
        yield count, (batch, m, n, k)
        yield count, (batch, n, m, k)
    block = 128
    for start in range(0, setting.length, block):  # scores, P v, dP, dV, dQ, dK of a block of queries
        m, n = min(block, setting.length - start), min(start + block, setting.length)
        qk, v = model.qk_head_dim, model.v_head_dim
        for shape in ((m, qk, n), (m, n, v), (m, v, n), (n, m, v), (m, n, qk), (n, m, qk)):
            yield layers, (heads, *shape)


def floor(setting: Setting, repeats: int = 7) -> tuple[float, float]:
    """Seconds (median) and floating-point operations of all of a step's matrix products, one after another.

    Every product has operands and a result of its own, as in a step: repeating one on the same memory measures the
    cache instead.
    """
    import torch

    torch.set_num_threads(setting.threads)
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    work, operations = [], 0.0
    for count, (batch, m, k, n) in products(setting):
        operations += count * 2.0 * batch * m * k * n
        for _ in range(count):
            shapes = ((batch, m, k), (batch, k, n), (batch, m, n))
            a, b, out = (torch.empty(shape, dtype=dtype).normal_() for shape in shapes)
            work.append((a, b, out) if batch > 1 else (a[0], b[0], out[0]))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for a, b, out in work:
            torch.matmul(a, b, out=out)
        times.append(time.perf_counter() - start)
    return statistics.median(times), operations
