"""How well do byte n-grams predict the held-out text? python bench/ngram.py [PATH ...] [--json FILE]"""

import argparse
import sys
from pathlib import Path

from counterflow.benchmark.ngram import measure
from counterflow.benchmark.saved import save
from counterflow.config.run import Data, Source
from counterflow.errors import CounterflowError
from counterflow.units import bytes_, seconds


def main() -> int:
    """Print the table; with --json, keep the raw numbers."""
    default = Data()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", default=[source.path for source in default.sources])
    parser.add_argument("--field", default=default.sources[0].field)
    parser.add_argument("--held-out", type=float, default=default.held_out)
    parser.add_argument("--cache-dir", default=default.cache_dir)
    parser.add_argument("--order", type=int, default=6, choices=range(1, 8))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sources = tuple(Source(path=path, field=args.field) for path in args.paths)
    try:
        data = Data(sources=sources, held_out=args.held_out, cache_dir=args.cache_dir)
        found = measure(data, args.order)
    except CounterflowError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{'order':>5}  {'bits per byte':>13}")
    for order, bits in found["bits_per_byte"].items():
        print(f"{order:>5}  {bits:13.4f}")
    print(
        f"trained on {bytes_(found['train_bytes'])}, measured on {bytes_(found['held_out_bytes'])}, "
        f"in {seconds(found['seconds'])}"
    )
    save(args.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
