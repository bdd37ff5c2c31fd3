"""Which way of the small operations is fastest on a CPU? The choices behind kernels/ and model/experts.py.

python bench/kernels_cpu.py --json records/DATE-cpu-kernels/raw.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from counterflow.benchmark.saved import save
from counterflow.kernels.attention import attention
from counterflow.kernels.memory import keep_freed_memory
from counterflow.kernels.norm import rms_norm
from counterflow.train.provenance import provenance

TOKENS, WIDTH, CHOSEN = 2048, 256, 4


def milliseconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Every repeat's time after two to warm up."""
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        step()
        if repeat >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return times


def backward(make: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward of what `make` gives."""

    def step() -> None:
        out = make()
        out.backward(torch.ones_like(out))

    return step


def cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """name: one way of doing it; ways of the same thing share the name's first word."""
    pairs = torch.randn(TOKENS * CHOSEN, WIDTH).to(dtype)
    places = torch.randperm(len(pairs))
    table = places.view(TOKENS, CHOSEN)
    x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    gain = torch.ones(WIDTH, dtype=dtype).requires_grad_()
    q, k = (torch.randn(8, 4, 256, 64).to(dtype).requires_grad_() for _ in range(2))
    v = torch.randn(8, 4, 256, 64).to(dtype).requires_grad_()
    flat = torch.randn(10_000_000) if dtype == torch.float32 else None
    out: dict[str, Callable[[], object]] = {
        "gather x[rows]": lambda: pairs[places],
        "gather index_select": lambda: pairs.index_select(0, places),
        "sum_pairs index and sum": lambda: pairs[places].view(TOKENS, CHOSEN, -1).sum(1),
        "sum_pairs embedding_bag": lambda: F.embedding_bag(table, pairs, mode="sum"),
        "rms_norm PyTorch's autograd": backward(lambda: F.rms_norm(x, (WIDTH,), gain, 1e-6)),
        "rms_norm own backward": backward(lambda: rms_norm(x, gain, 1e-6)),
        "attention PyTorch's kernel": backward(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1)
        ),
        "attention explicit blocks": backward(lambda: attention(q, k, v, 0.1)),
    }
    if flat is not None:
        out["norm of 10M at once"] = lambda: torch.linalg.vector_norm(flat)
        out["norm of 10M by rows"] = lambda: torch.linalg.vector_norm(
            torch.linalg.vector_norm(flat[: 9765 * 1024].view(-1, 1024), dim=1)
        )
    return out


def main() -> None:
    """Both precisions; a table of medians; the allocator's effect first, since it cannot be undone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    large = torch.randn(2048, 4096)
    results = {"clone of 32 MiB, glibc as it is": milliseconds(large.clone, arguments.repeats)}
    keep_freed_memory()
    results["clone of 32 MiB, freed memory kept"] = milliseconds(large.clone, arguments.repeats)
    for dtype in (torch.float32, torch.bfloat16):
        for name, step in cases(dtype).items():
            results[f"{str(dtype)[6:]} {name}"] = milliseconds(step, arguments.repeats)
    exact = (flat := torch.randn(10_000_000)).double().norm().item()
    error = abs(torch.linalg.vector_norm(flat).item() / exact - 1)
    for name, times in results.items():
        print(f"{name:48}{statistics.median(times):9.3f} ms, {min(times):.3f} to {max(times):.3f}")
    print(f"norm of 10M at once is off by {error:.1e}")
    save(arguments.json, {"provenance": provenance(), "milliseconds": results, "error": error})


if __name__ == "__main__":
    main()
