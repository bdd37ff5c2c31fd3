"""Do woven chunks hide each other's transfers? The real executor on a slow wire, on a CPU, computation paced.

python bench/overlap_cpu.py --unit 0.02 --layers 8 --repeats 5 --json records/DATE-overlap-cpu/raw.json
"""

import argparse
import statistics
from pathlib import Path

import torch

from counterflow.benchmark.overlap import pair_lanes, pair_seconds
from counterflow.benchmark.saved import save
from counterflow.train.provenance import provenance


def main() -> None:
    """Per ratio of wire to computation: a pair woven and in turn, alternating, beside its two lanes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unit", type=float, default=0.02, help="seconds of each computation")
    parser.add_argument("--layers", type=int, default=8, help="of both stages of the one rank")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 0.9, 1.0], help="wire : computation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    unit, layers, rows, made = arguments.unit, arguments.layers, [], provenance()
    for ratio in arguments.ratios:
        compute, transfers = pair_lanes(unit, unit, layers)
        wire = ratio * unit * compute / transfers
        both = [
            [pair_seconds(unit, wire, in_turn, layers) for in_turn in (False, True)]
            for _ in range(arguments.repeats)
        ]
        woven, in_turn = (statistics.median(values) for values in zip(*both))
        longer = compute * max(1.0, ratio)
        rows.append({"ratio": ratio, "compute": compute, "wire": compute * ratio, "woven_and_in_turn": both})
        print(
            f"wire {ratio:.2f} of computation ({compute:.3f} s): woven {woven:.3f} s, {woven / longer:.3f} of the "
            f"longer lane; in turn {in_turn:.3f} s, {in_turn / (compute * (1 + ratio)):.3f} of the sum",
            flush=True,
        )
    save(arguments.json, {"settings": vars(arguments), "provenance": made, "rows": rows})


if __name__ == "__main__":
    main()
