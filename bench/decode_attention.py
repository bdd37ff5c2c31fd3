"""How near its limits is decoding's attention? The report's shapes on one GPU, beside a copy and a matrix product.

The kernel is timed as decoding runs it, replayed in a CUDA graph: launched one by one from Python, short ones would
show the host's time and not theirs.

python bench/decode_attention.py [--size 16] [--json records/DATE-decode-attention/raw.json]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from counterflow.benchmark.rounds import alone
from counterflow.benchmark.saved import save
from counterflow.kernels.decode import decode_attention, reference
from counterflow.train.provenance import provenance

LATENT, ROTARY = 512, 64


def median_ms(act: Callable[[], object]) -> float:
    """Of one call; the L2 cache is flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    return 1e3 * statistics.median(alone(act, 20, flush.zero_))


def replayed(act: Callable[[], object]) -> Callable[[], object]:
    """The act recorded once; whoever calls this replays it."""
    act()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return graph.replay


def limits() -> tuple[float, float]:
    """Bytes per second of a large copy, read and written, and FLOP per second of a bf16 product."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.numel() / median_ms(lambda: b.copy_(a)) * 1e3
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / median_ms(lambda: x @ y) * 1e3


def case(batch: int, heads: int, context: int, size: int) -> tuple:
    """Random queries and entries, blocks in random order: the arguments of a call."""
    blocks = context // size
    order = torch.randperm(batch * blocks, device="cuda").view(batch, blocks)
    entries = torch.randn(batch * context, LATENT + ROTARY, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(batch, 1, heads, LATENT + ROTARY, device="cuda", dtype=torch.bfloat16)
    positions = torch.full((batch, 1), context - 1, device="cuda")
    return query, entries, order, positions, size, LATENT, 192**-0.5


def main() -> None:
    """A line a shape: time, bytes and FLOP per second, as shares of the limits; the largest error of small ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64, help="entries of a block")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    copy, product = limits()
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s", flush=True)
    rows = []
    for heads in (16, 128):
        for batch in (1, 8, 32, 128):
            for context in (1024, 4096, 32768):
                if batch * context > 1 << 21:
                    continue
                given = case(batch, heads, context, arguments.size)
                ms = median_ms(replayed(partial(decode_attention, *given)))
                moved = batch * context * (LATENT + ROTARY) * 2
                flop = 2 * batch * heads * context * (2 * LATENT + ROTARY)
                row = {"heads": heads, "batch": batch, "context": context, "ms": ms}
                row |= {"copy_share": moved / ms * 1e3 / copy, "product_share": flop / ms * 1e3 / product}
                floor = max(moved / copy, flop / product) * 1e3
                row["floor_share"] = floor / ms
                if batch * context <= 1 << 15:
                    got, want = decode_attention(*given), reference(*given)
                    row["error"] = ((got - want).float().abs().max() / want.float().abs().max()).item()
                rows.append(row)
                print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    facts = {"copy": copy, "product": product, "size": arguments.size, "rows": rows}
    save(arguments.json, facts | {"provenance": provenance()})


if __name__ == "__main__":
    main()
