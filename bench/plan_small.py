"""Is the planner right about one GPU? `small` under three schedules, predicted first and then trained.

Rates are measured before: products and grouped products at the model's shapes, attention, passes through memory,
launches. From these the planner says seconds and bytes of a step; then the step runs, executor, optimizer and all, on
random tokens, and the two stand side by side. On one rank DualPipeV pairs its two stages' chunks, ZB1P and 1F1B have
one stage.

python bench/plan_small.py --folder records/DATE-plan-small        (one GPU)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.kernels.attention import attention
from counterflow.kernels.grouped import grouped_matmul
from counterflow.kernels.swiglu import swiglu
from counterflow.plan.cost import Costs, predict
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.memory import memory
from counterflow.train.pipelined import Pipelined
from counterflow.train.provenance import provenance
from counterflow.train.trainer import Trainer

SCHEDULES = ("dualpipev", "zb1p", "1f1b")


class RandomTokens:
    """Samples of random tokens: what they say does not change how long a step takes."""

    def __init__(self, run: RunConfig) -> None:
        self.length, self.vocab = run.data.sequence_length, run.model.vocab_size

    def train(self, first: int, count: int) -> torch.Tensor:
        """(count, length + 1)."""
        generator = torch.Generator().manual_seed(first)
        return torch.randint(self.vocab, (count, self.length + 1), generator=generator)


def mean_s(act: Callable[[], object], device: torch.device, least_s: float = 0.15) -> float:
    """Seconds of one run, of as many as fill some time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    act()
    wait()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < least_s:
        for _ in range(10):
            act()
        wait()
        runs += 10
    return (time.perf_counter() - start) / runs


def rates(run: RunConfig, device: torch.device) -> dict[str, float]:
    """FLOP/s and bytes/s at the shapes that the model has, and seconds that the host needs to launch a kernel."""
    model, dtype = run.model, torch.bfloat16
    tokens = run.train.micro_batch_size * run.data.sequence_length
    width, inner = model.hidden_size, model.moe_intermediate_size

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, weight = draw(tokens, width), draw(4 * width, width)
    product = 8 * tokens * width**2 / mean_s(lambda: x @ weight.t(), device)
    pairs = tokens * model.num_experts_per_token
    rows, experts = draw(pairs, width), draw(model.num_routed_experts, width, 2 * inner)
    ends = torch.arange(1, len(experts) + 1, device=device) * (pairs // len(experts))
    grouped = 4 * pairs * width * inner / mean_s(lambda: grouped_matmul(rows, experts, ends), device)
    heads, length = model.num_heads, run.data.sequence_length
    qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    sequences = run.train.micro_batch_size
    query, key, value = (draw(sequences, heads, length, size) for size in (qk, qk, v))
    core = tokens * heads * (qk + v) * length / mean_s(lambda: attention(query, key, value, 0.1), device)
    both, gates, some = draw(pairs, 2 * inner), torch.ones(pairs, device=device), draw(4 * tokens, width)
    passes = pairs * inner * (4 + 2) * 2 / mean_s(lambda: swiglu(both, gates), device)  # as plan.work counts
    copied = torch.empty_like(some)
    copy = 2 * some.numel() * 2 / mean_s(lambda: copied.copy_(some), device)
    small = torch.zeros(16, device=device)
    launch = mean_s(lambda: F.silu(small), device)
    return {
        "product": product,
        "grouped": grouped,
        "core": core,
        "passes": passes,
        "copy": copy,
        "launch": launch,
    }


def hardware_toml(found: dict[str, float], base: str) -> str:
    """A hardware file of the measured rates."""
    both = 2 / (1 / found["product"] + 1 / found["grouped"])
    return f"""base = "{base}"
[card]
bf16_flops = {both:.4g}
memory_bytes_per_s = {found["copy"]:.4g}
launch_s = {found["launch"]:.3g}
source = "bench/plan_small.py"
[efficiencies]
bf16_product = 1.0
attention = {found["core"] / both:.4g}
memory = {min(1.0, found["passes"] / found["copy"]):.4g}
"""


def trained(run: RunConfig, device: torch.device, steps: int) -> tuple[list[float], int]:
    """Seconds of the steps after the first three, and the most bytes that were allocated."""
    mesh = Mesh(device=device)
    trainer = Trainer(run, RandomTokens(run), mesh)  # pyright: ignore[reportArgumentType]
    pipelined = Pipelined(run, mesh)
    pipelined.model = trainer.model  # one rank holds the whole
    trainer.pipeline = pipelined
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(steps + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[3:], torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def main() -> None:
    """Measure rates, predict, train, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small")
    parser.add_argument("--card", default="h100", help="whose memory and multiprocessors the machine has")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--set", nargs="*", default=[], help="further settings, as section.name=value")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = asked.microbatches * asked.micro_batch_size
    words = ["train.precision=bf16", f"train.batch_size={batch}", "train.batch_start=0"]
    words += [f"train.micro_batch_size={asked.micro_batch_size}", "train.ema_decay=0", *asked.set]
    found = rates(load_run(asked.model, words), device)
    text, rows = hardware_toml(found, asked.card), []
    raw = {"rates": found, "rows": rows, "settings": words, "machine": provenance()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "card.toml"
        file.write_text(text)
        for name in SCHEDULES:
            run = load_run(asked.model, [*words, f"parallel.schedule={name}"])
            layout = Layout(1, 1, 1, asked.micro_batch_size, name)
            costs = Costs(job_of(run, "bf16"), layout, hardware(file=str(file)))
            step = predict(costs)
            (rank,) = memory(costs, step.schedule, step.plans)
            expected = rank.total - rank.reserved
            seconds, bytes_ = trained(run, device, asked.steps)
            clock = statistics.median(seconds)
            rows.append(
                {
                    "schedule": name,
                    "predicted": {"step_s": step.seconds, "update_s": step.update.seconds, "bytes": expected},
                    "parts": {part: getattr(rank, part) for part in ("activations", "transient", "masters")},
                    "measured": {"steps_s": seconds, "bytes": bytes_},
                }
            )
            print(
                f"{name:10} step {step.seconds:.3f} predicted, {clock:.3f} s measured "
                f"({min(seconds):.3f}-{max(seconds):.3f}): {step.seconds / clock - 1:+.0%}; memory "
                f"{expected / 1e9:.2f} and {bytes_ / 1e9:.2f} GB: {expected / max(bytes_, 1) - 1:+.0%}",
                flush=True,
            )
            if asked.folder:
                asked.folder.mkdir(parents=True, exist_ok=True)
                (asked.folder / "card.toml").write_text(text)
                (asked.folder / "raw.json").write_text(json.dumps(raw, indent=1) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
