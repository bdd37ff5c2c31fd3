"""What does it cost to pack rows in FP8 for the wire and to unpack them? Our kernels beside plain ops and a copy.

python bench/fp8_rows.py [--json records/DATE-fp8-rows/raw.json]
"""

import argparse
import statistics
from pathlib import Path

import torch

from counterflow.benchmark.rounds import alone
from counterflow.benchmark.saved import save
from counterflow.kernels import fp8
from counterflow.train.provenance import provenance


def compare(tokens: int, width: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds of each, in turn: what disturbs one round disturbs all. The device sleeps before each call, so that
    the host's launching is hidden."""
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    packed, out = fp8.quantise(x), torch.empty_like(x)
    acts = {
        "copy bf16": lambda: out.copy_(x),
        "quantise": lambda: fp8.quantise(x),
        "quantise, plain ops": lambda: fp8.quantise_plainly(x),
        "dequantise": lambda: fp8.dequantise(packed, width, x.dtype, out),
        "dequantise, plain ops": lambda: out.copy_(fp8.dequantise_plainly(packed, width)),
    }
    found: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(repeats):
        for name, act in acts.items():
            found[name] += [1e6 * each for each in alone(act, 5, lambda: torch.cuda._sleep(3_000_000))]
    return found


def main() -> None:
    """For the report's width and several numbers of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result: dict = {"provenance": provenance(), "microseconds": {}}
    for tokens in (128, 1024, 4096, 16384):
        found = result["microseconds"][tokens] = compare(tokens, 7168, arguments.repeats)
        print(f"{tokens} x 7168:", *(f"{name} {statistics.median(us):.0f}," for name, us in found.items()))
        save(arguments.json, result)


if __name__ == "__main__":
    main()
