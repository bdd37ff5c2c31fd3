"""How many tokens a second does one GPU train? Steps of a named model on random tokens, the first four not counted.

python bench/train_step_gpu.py small [--steps 10] [--json records/DATE-NAME/raw.json] [train.micro_batch_size=8 ...]
"""

import argparse
import statistics
from pathlib import Path

import torch

from counterflow.benchmark.saved import save
from counterflow.benchmark.steps import RandomTokens, seconds_of_steps
from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.train.provenance import provenance
from counterflow.train.trainer import Trainer

WARMUPS = 4


def main() -> None:
    """Time, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    words = ["train.precision=bf16", "train.batch_size=64", "train.batch_start=0", "train.micro_batch_size=8"]
    run = load_run(asked.model, [*words, "train.ema_decay=0", *asked.settings])
    mesh = Mesh(device=torch.device("cuda"))
    trainer = Trainer(run, RandomTokens(run), mesh)
    seconds = seconds_of_steps(trainer, WARMUPS, asked.steps)
    tokens, memory = run.train.batch_size * run.data.sequence_length, torch.cuda.max_memory_allocated()
    print(
        f"{asked.model}: {tokens / statistics.median(seconds):,.0f} tokens/s, a step of {tokens} in "
        f"{statistics.median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f}), {memory / 1e9:.1f} GB"
    )
    raw = {"provenance": provenance(), "settings": [*words, *asked.settings], "tokens": tokens}
    save(asked.json, raw | {"steps_s": seconds, "memory_bytes": memory})


if __name__ == "__main__":
    main()
