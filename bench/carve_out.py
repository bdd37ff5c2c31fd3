"""Do matmuls leave the multiprocessors free that communication is given? Times of the same products, and of a stranger.

For each carve-out the products are timed alone, and then beside a kernel of that many programs which is launched
behind them on another stream: if they leave room it starts at once, and if not it ends after them.

python bench/carve_out.py --json records/DATE-carve-out/raw.json
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from counterflow.benchmark.rounds import alone
from counterflow.benchmark.saved import save
from counterflow.comm.partition import carve
from counterflow.kernels.grouped import add_grouped_product, grouped_matmul
from counterflow.kernels.product import add_product
from counterflow.train.provenance import provenance

CARVED = (0, 4, 8, 16, 32, 64)


def products(scale: int) -> dict[str, Callable[[], object]]:
    """Each about a millisecond at scale 1 on an H100."""
    device, bf16 = torch.device("cuda"), torch.bfloat16
    wide, rows, experts = 7168 // scale, 16384 // scale, 8
    x = torch.randn(rows, wide, device=device, dtype=bf16)
    y = torch.randn(rows, 2048, device=device, dtype=bf16)
    weights = torch.randn(experts, wide, 2048, device=device, dtype=bf16)
    total = torch.zeros(wide, 2048, device=device)
    totals = torch.zeros(experts, wide, 2048, device=device)
    ends = torch.arange(1, experts + 1, device=device) * (rows // experts)
    return {
        "mm": lambda: x @ weights[0],
        "mm, fp32 sums": lambda: add_product(total, x, y),
        "grouped": lambda: grouped_matmul(x, weights, ends),
        "grouped, weight gradient": lambda: add_grouped_product(totals, x, y, ends),
    }


def beside(act: Callable[[], object], stranger: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds until the stranger has ended, and until the product has, both from the product's start."""
    side, found = torch.cuda.Stream(priority=-1), []
    for number in range(rounds + 3):
        start, ready, there, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        torch.cuda._sleep(1_000_000)  # the host gets ahead
        start.record()
        for _ in range(4):
            act()
        with torch.cuda.stream(side):
            side.wait_event(start)
            torch.cuda._sleep(200_000)  # the products hold the device by now
            ready.record()
            stranger()
            there.record()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            found.append((ready.elapsed_time(there) / 1e3, start.elapsed_time(end) / 1e3))
    return tuple(statistics.median(values) for values in zip(*found))


def main() -> None:
    """All carve-outs with both libraries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--scale", type=int, default=1, help="smaller products")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from counterflow.kernels import copy_triton

    made, rows = provenance(), []
    acts = products(arguments.scale)
    source = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for library in ("cublas", "cublaslt"):
        for carved in CARVED:
            carve(carved, torch.device("cuda"))
            torch.backends.cuda.preferred_blas_library(library)  # carving chooses one
            programs = carved or 8
            copy = partial(copy_triton.push, [(source, target)], programs)
            moved = statistics.median(alone(copy, arguments.rounds))
            for name, act in acts.items():
                by_itself = statistics.median(alone(act, arguments.rounds))
                waits, both = beside(act, copy, arguments.rounds)
                row = {"library": library, "carved": carved, "product": name, "seconds": by_itself}
                rows.append({**row, "copy_alone_s": moved, "copy_beside_s": waits, "four_beside_s": both})
                print(
                    f"{library:9} carved {carved:3} {name:26} {by_itself * 1e6:7.0f} µs alone; a copy of {programs:2} "
                    f"programs {moved * 1e6:6.0f} µs alone, {waits * 1e6:6.0f} beside four of them",
                    flush=True,
                )
            save(arguments.json, {"provenance": made, "rows": rows})


if __name__ == "__main__":
    main()
