"""What drafts bring: acceptance, accepted length, tokens a second with drafts and without, after held-out texts.

A round writes with every depth in turn, so that a machine that grows slower meets all alike. Only steps in which every
sequence writes are timed, from the end of the prompts to the first text's end, the engine's own bookkeeping included.
The terms of E / (v + D c) are taken from the same steps: v is a verify over a plain step, c a draft over it. A model
that repeats itself is easy to draft for, so the share of repeated 8-grams stands beside the acceptance, and acceptance
is measured on the held-out texts themselves too, each token given and none generated.
"""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from counterflow.data.corpus import open_corpus
from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import DataError
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.request import Sampling
from counterflow.infer.statistics import Statistics
from counterflow.model.transformer import Transformer
from counterflow.train.restore import run_config

NGRAM = 8


def held_out(folder: Path, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens from documents that the run never trained on.   Fails: DataError."""
    data, found = run_config(folder).data, []
    for source in data.sources:
        corpus = open_corpus(source, data.held_out, Path(data.cache_dir))
        for document in corpus.held_out():
            tokens = [tokenizer.bos, *tokenizer.encode(document.text)]
            starts = range(0, len(tokens) - length + 1, length)
            found += [tokens[start : start + length] for start in starts]
    if len(found) < count:
        raise DataError(
            f"the run's held-out part has {len(found)} stretches of {length} tokens; {count} are needed."
        )
    return random.Random(0).sample(found, count)


def measure(
    model: Transformer, prompts: Sequence[list[int]], drafts: int, temperature: float, max_tokens: int
) -> dict[str, Any]:
    """One writing of all prompts at once with a fixed depth; times are of the steps in which all of them write."""
    settings = EngineSettings(max_sequences=len(prompts), drafts=drafts, adapt=False)
    return timed(Engine(model, settings), prompts, temperature, max_tokens)


def timed(
    engine: Engine, prompts: Sequence[list[int]], temperature: float, max_tokens: int
) -> dict[str, Any]:
    """As `measure`, by an engine that is idle; one that has written such texts before has all its graphs recorded."""
    sequences = [engine.add(p, Sampling(max_tokens, temperature, seed=i))[0] for i, p in enumerate(prompts)]
    while not all(sequence.made > 1 for sequence in sequences):
        engine.step()
    engine.statistics = Statistics()
    began = time.perf_counter()
    while not any(sequence.finish for sequence in sequences):
        engine.step()
    took, seen = time.perf_counter() - began, engine.statistics
    while not engine.idle:
        engine.step()
    return {
        "batch": len(prompts),
        "drafts": engine.depth.deepest,
        "tokens_per_s": seen.tokens / took,
        "step_s": took / seen.steps,
        "model_s": seen.model_s / seen.steps,
        "draft_s": seen.draft_s / seen.steps,
        "length": seen.tokens / seen.verified,
        "acceptance": seen.acceptance,
        "repeated": repeated([sequence.tokens[sequence.prompt_length :] for sequence in sequences]),
    }


def repeated(texts: Sequence[Sequence[int]]) -> float:
    """Share of 8-grams that stood in the same text before."""
    grams = [[tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)] for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(each)) for each in grams) / total if total else 0.0


@torch.no_grad()
def teacher_forced(model: Transformer, texts: Sequence[Sequence[int]]) -> list[float]:
    """For each module the share of positions of the given texts where its likeliest token is the model's own."""
    device = model.head.device
    agreed, total = [0] * len(model.mtp), [0] * len(model.mtp)
    for text in texts:
        tokens = torch.tensor([list(text)], device=device)
        own = model.logits(tokens)[0].argmax(-1)
        for depth, logits in enumerate(model.draft_logits(tokens), start=1):
            same = logits[0].argmax(-1) == own[depth:]
            agreed[depth - 1] += int(same.sum())
            total[depth - 1] += len(same)
    return [a / t for a, t in zip(agreed, total, strict=True)]


def rounds(
    model: Transformer,
    texts: Sequence[list[int]],
    batches: Sequence[int],
    depths: Sequence[int],
    temperature: float,
    max_tokens: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """`repeats` rounds of every batch and depth, each round on other prompts, its depths in another order."""
    prompt_length = len(texts[0]) // 2
    for turn in range(repeats):
        for batch in batches:
            start = turn * batch % (len(texts) - batch + 1)
            prompts = [text[:prompt_length] for text in texts[start : start + batch]]
            for drafts in random.Random(turn).sample(list(depths), len(depths)):
                yield {"round": turn, **measure(model, prompts, drafts, temperature, max_tokens)}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a batch and depth: medians over rounds, the speed-up within rounds, and what the terms predict."""
    out = []
    plain = {(row["batch"], row["round"]): row for row in rows if not row["drafts"]}
    for batch, drafts in sorted({(row["batch"], row["drafts"]) for row in rows}):
        mine = [row for row in rows if (row["batch"], row["drafts"]) == (batch, drafts)]
        speed_ups, predictions = [], []
        for row in mine:
            base = plain[batch, row["round"]]
            speed_ups.append(row["tokens_per_s"] / base["tokens_per_s"])
            v, drafting = row["model_s"] / base["model_s"], row["draft_s"] / base["model_s"]
            predictions.append(row["length"] / base["length"] / (v + drafting))
        out.append(
            {
                "batch": batch,
                "drafts": drafts,
                **{
                    k: statistics.median(row[k] for row in mine)
                    for k in ("tokens_per_s", "length", "repeated")
                },
                "acceptance": [statistics.median(each) for each in zip(*(row["acceptance"] for row in mine))],
                "speed_up": statistics.median(speed_ups),
                "speed_up_range": (min(speed_ups), max(speed_ups)),
                "predicted": statistics.median(predictions),
                "v": statistics.median(r["model_s"] / plain[batch, r["round"]]["model_s"] for r in mine),
                "c": statistics.median(r["draft_s"] / plain[batch, r["round"]]["model_s"] for r in mine)
                / max(drafts, 1),
            }
        )
    return out
