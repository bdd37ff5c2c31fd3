"""What does it cost to pack rows in FP8 for the wire and to unpack them? Our kernels beside plain ops and a copy.

python bench/fp8_rows.py [--json records/DATE-fp8-rows/raw.json]
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from counterflow.kernels import fp8
from counterflow.train.provenance import provenance


def microseconds(act, repeats: int) -> list[float]:
    """Of single calls on a busy device, so that the host's launching is hidden; the first three are not counted."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(3_000_000)
        start.record()
        act()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times[3:]


def compare(tokens: int, width: int, repeats: int) -> dict[str, list[float]]:
    """The contenders take turns: what disturbs one round disturbs all."""
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
            found[name] += microseconds(act, 5)
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
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
