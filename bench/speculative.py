"""What do drafts by the MTP modules bring, at batch 1, 8 and 32?

counterflow train tiny && python bench/speculative.py --run runs/tiny --json records/DATE-speculative/raw.json
"""

import argparse
import json
import os
from pathlib import Path

import torch

from counterflow.benchmark.speculative import held_out, rounds, summary, teacher_forced
from counterflow.infer.engine import EngineSettings
from counterflow.infer.place import placed
from counterflow.train.provenance import provenance
from counterflow.train.restore import restore


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--tokens", type=int, default=96, help="of each text")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """A table for each temperature, and the raw numbers if asked for."""
    wish = arguments()
    torch.set_num_threads(wish.threads)
    model, tokenizer = restore(wish.run)
    model = placed(model, wish.device, wish.precision, EngineSettings())
    texts = held_out(wish.run, tokenizer, 4 * max(wish.batches), 2 * wish.prompt)
    shares = teacher_forced(model, texts)
    print(
        f"on held-out text the modules agree with the model at {', '.join(f'{s:.1%}' for s in shares)} of positions"
    )
    raw = []
    for temperature in wish.temperatures:
        depths = [0, *wish.depths]
        rows = list(rounds(model, texts, wish.batches, depths, temperature, wish.tokens, wish.rounds))
        raw.append({"temperature": temperature, "rows": rows, "summary": summary(rows)})
        print(f"\ntemperature {temperature:g}")
        print(
            "batch  D  tokens/s  E     v     c     E/(v+Dc)  speed-up (range)     kept by position   repeated 8-grams"
        )
        for row in summary(rows):
            low, high = row["speed_up_range"]
            kept = " ".join(f"{share:.0%}" for share in row["acceptance"])
            print(
                f"{row['batch']:5}  {row['drafts']}  {row['tokens_per_s']:8.0f}  {row['length']:.2f}  {row['v']:.2f}  "
                f"{row['c']:.2f}  {row['predicted']:8.2f}  {row['speed_up']:8.2f} ({low:.2f}-{high:.2f})  {kept:17}  "
                f"{row['repeated']:.1%}"
            )
    if wish.json:
        wish.json.parent.mkdir(parents=True, exist_ok=True)
        facts = provenance() | {
            "threads": str(torch.get_num_threads()),
            "device_type": model.head.device.type,
        }
        wish.json.write_text(
            json.dumps({"provenance": facts, "teacher_forced": shares, "runs": raw}, indent=1)
        )


if __name__ == "__main__":
    main()
