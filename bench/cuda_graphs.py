"""What do CUDA graphs bring to decoding? Tokens a second with and without, plain and with drafts, by batch.

python bench/cuda_graphs.py [--json records/DATE-cuda-graphs/raw.json]

Weights are random, so hardly a draft is kept: with drafts look at a step's time, and not at tokens a second. Each
engine writes its texts once before it is timed.
"""

import argparse
import random
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from counterflow.benchmark.saved import save
from counterflow.benchmark.speculative import timed
from counterflow.config.models import MODELS
from counterflow.convert.load import empty_model
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.place import placed
from counterflow.model.transformer import Transformer
from counterflow.train.provenance import provenance

PROMPT = 64


def random_weights(name: str) -> Transformer:
    """A model on the GPU in bf16, its weights drawn there."""
    model = placed(empty_model(MODELS[name], torch.bfloat16), "cuda", "bf16", EngineSettings())
    generator = torch.Generator("cuda").manual_seed(0)
    for weight in model.parameters():
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 0.02, generator=generator)
    return model


def compared(model: Transformer, batch: int, drafts: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Rounds of an engine without graphs and one with, in turn."""
    numbers = random.Random(batch)
    prompts = [[numbers.randrange(len(model.head)) for _ in range(PROMPT)] for _ in range(batch)]
    settings = EngineSettings(max_sequences=batch, drafts=drafts, adapt=False)
    engines = [Engine(model, replace(settings, graphs=graphs)) for graphs in (False, True)]
    rows = []
    for turn in range(rounds + 1):
        for engine in engines:
            row = timed(engine, prompts, 0.0, tokens)
            graphs = engine.runner.passes.graphs
            rows.append({"round": turn, "graphs": 0 if graphs is None else graphs.count, **row})
    return [row for row in rows if row["round"]]


def main() -> None:
    """A line an engine, and all rounds as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    wish = parser.parse_args()
    model, raw = random_weights(wish.model), {"model": wish.model, "provenance": provenance(), "rows": []}
    for batch, drafts in product(wish.batches, (0, 1)):
        rows = compared(model, batch, drafts, wish.tokens, wish.rounds)
        raw["rows"] += rows
        for graphs in sorted({row["graphs"] for row in rows}):
            mine = [row for row in rows if row["graphs"] == graphs]
            speed, step, draft = (
                statistics.median(row[key] for row in mine) for key in ("tokens_per_s", "step_s", "draft_s")
            )
            print(
                f"batch {batch:2}  drafts {drafts}  graphs {graphs:2}  {speed:7.0f} tokens/s  "
                f"step {step * 1e3:6.2f} ms, drafting {draft * 1e3:5.2f}",
                flush=True,
            )
        save(wish.json, raw)


if __name__ == "__main__":
    main()
