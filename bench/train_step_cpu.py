"""How fast is a CPU training step beside transformers' DeepseekV3, and how near its products' floor?

python bench/train_step_cpu.py --json records/DATE-train-step-cpu/raw.json
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from counterflow.benchmark.saved import save
from counterflow.benchmark.train_step import CONTENDERS, Setting, compare, floor
from counterflow.config.models import MODELS
from counterflow.train.provenance import provenance
from counterflow.units import bytes_

WIDE = replace(
    MODELS["tiny"],
    hidden_size=512,
    num_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    dense_intermediate_size=1536,
    moe_intermediate_size=256,
)
SIZES = {"tiny": MODELS["tiny"], "wide": WIDE}


def main() -> None:
    """Both sizes, both precisions; a table, and the raw numbers if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for size, model in SIZES.items():
        for precision in ("fp32", "bf16"):
            setting = Setting(model, arguments.sequences, arguments.length, precision, arguments.threads)
            least, operations = floor(setting)
            results = compare(setting, list(CONTENDERS), arguments.rounds, arguments.steps)
            after, _ = floor(setting)
            rows.append(
                {
                    "size": size,
                    "precision": precision,
                    "floor_tokens_per_s": setting.tokens / least,
                    "floor_tokens_per_s_after": setting.tokens / after,
                    "floor_flops": operations,
                    "results": results,
                }
            )
    print(
        f"\n{'size':6}{'precision':>10}{'counterflow':>13}{'transformers':>14}{'ratio':>7}{'of floor':>10}"
        "  peak memory"
    )
    for row in rows:
        ours, theirs = (row["results"][name] for name in ("counterflow", "transformers"))
        share = ours["median"] / row["floor_tokens_per_s"]
        print(
            f"{row['size']:6}{row['precision']:>10}{ours['median']:>13,.0f}{theirs['median']:>14,.0f}"
            f"{ours['median'] / theirs['median']:>7.2f}{share:>10.0%}  "
            f"{bytes_(ours['peak_bytes'])}, {bytes_(theirs['peak_bytes'])}"
        )
    save(arguments.json, {"provenance": provenance(), "rows": rows})


if __name__ == "__main__":
    main()
