"""How many tokens a second does one GPU train? Steps of a named model on random tokens, the first four not counted.

python bench/train_step_gpu.py small [--steps 10] [--json records/DATE-NAME/raw.json] [train.micro_batch_size=8 ...]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.train.provenance import provenance
from counterflow.train.trainer import Trainer

WARMUPS = 4


class RandomTokens:
    """Samples of random tokens: what they say does not change how long a step takes."""

    def __init__(self, run: RunConfig) -> None:
        self.length, self.vocab = run.data.sequence_length, run.model.vocab_size

    def train(self, first: int, count: int) -> torch.Tensor:
        """(count, length + 1)."""
        generator = torch.Generator().manual_seed(first)
        return torch.randint(self.vocab, (count, self.length + 1), generator=generator)


def seconds_of_steps(run: RunConfig, steps: int) -> list[float]:
    """Of whole steps, the device having come to their end."""
    trainer = Trainer(run, RandomTokens(run), Mesh(device=torch.device("cuda")))  # pyright: ignore[reportArgumentType]
    found = []
    for _ in range(WARMUPS + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[WARMUPS:]


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
    seconds = seconds_of_steps(run, asked.steps)
    tokens, memory = run.train.batch_size * run.data.sequence_length, torch.cuda.max_memory_allocated()
    print(
        f"{asked.model}: {tokens / statistics.median(seconds):,.0f} tokens/s, a step of {tokens} in "
        f"{statistics.median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f}), {memory / 1e9:.1f} GB"
    )
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        raw = {"provenance": provenance(), "settings": [*words, *asked.settings], "tokens": tokens}
        asked.json.write_text(json.dumps(raw | {"steps_s": seconds, "memory_bytes": memory}, indent=1))


if __name__ == "__main__":
    main()
