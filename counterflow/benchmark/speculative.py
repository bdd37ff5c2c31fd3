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
from dataclasses import replace
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
from counterflow.train.folder import run_config

NGRAM = 8


def held_out(folder: Path) -> list[str]:
    """The documents that a run never trained on."""
    data = run_config(folder).data
    corpora = (open_corpus(source, data.held_out, Path(data.cache_dir)) for source in data.sources)
    return [document.text for corpus in corpora for document in corpus.held_out()]


def stretches(documents: Sequence[str], tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens, drawn from all that the documents have.   Fails: DataError."""
    found = []
    for document in documents:
        tokens = [tokenizer.bos, *tokenizer.encode(document)]
        found += [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    if len(found) < count:
        raise DataError(
            f"the held-out texts have {len(found)} stretches of {length} tokens; {count} are needed: shorten them."
        )
    return random.Random(0).sample(found, count)


def timed(
    engine: Engine, prompts: Sequence[list[int]], temperature: float, max_tokens: int
) -> dict[str, Any]:
    """One writing of all prompts at once with a fixed depth; times are of the steps in which all of them write.

    The engine must be idle; one that has written such texts before has all its graphs recorded.
    """
    sequences = [engine.add(p, Sampling(max_tokens, temperature, seed=i))[0] for i, p in enumerate(prompts)]
    while not all(sequence.made > 1 for sequence in sequences):
        engine.step()
    engine.statistics = Statistics()
    began = time.perf_counter()
    while not any(sequence.finish for sequence in sequences):
        engine.step()
    took, seen = time.perf_counter() - began, engine.statistics
    engine.statistics = Statistics()  # what the others still write is not of these steps
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
        "reached": seen.reached,
        "kept": seen.kept,
        "tokens": seen.tokens,
        "seconds": took,
        "repeated": repeated([sequence.tokens[sequence.prompt_length :] for sequence in sequences]),
    }


def repeated(texts: Sequence[Sequence[int]]) -> float:
    """Share of 8-grams that stood in the same text before."""
    grams = [[tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)] for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(each)) for each in grams) / total if total else 0.0


@torch.no_grad()
def teacher_forced(model: Transformer, texts: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """For each module, over all positions of the given texts (every token given, none written):

    `agreed`, the share where its likeliest token is the model's own, which is its acceptance at temperature 0;
    `overlap`, the mean of Σ min(p, q), its acceptance at temperature 1; `loss` and `model_loss` in nats.
    """
    sums = [dict.fromkeys(("agreed", "overlap", "loss", "model_loss", "positions"), 0.0) for _ in model.mtp]
    for text in texts:
        tokens = torch.tensor([list(text)], device=model.head.device)
        own = model.logits(tokens)[0].float().log_softmax(-1)
        for depth, (logits, into) in enumerate(zip(model.draft_logits(tokens), sums, strict=True), start=1):
            p, q = own[depth:-1], logits[0, :-1].float().log_softmax(-1)
            targets = tokens[0, depth + 1 :, None]
            into["agreed"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
            into["overlap"] += torch.minimum(p.exp(), q.exp()).sum().item()
            into["loss"] -= q.gather(-1, targets).sum().item()
            into["model_loss"] -= p.gather(-1, targets).sum().item()
            into["positions"] += len(targets)
    return [{k: v / each["positions"] for k, v in each.items() if k != "positions"} for each in sums]


def rounds(
    model: Transformer,
    texts: Sequence[list[int]],
    batch: int,
    depths: Sequence[int],
    temperature: float,
    max_tokens: int,
    repeats: int,
    graphs: bool = True,
) -> Iterator[dict[str, Any]]:
    """`repeats` rounds of every depth, each round on other prompts (halves of the texts), its depths in another order.

    Each depth has an engine of its own, which has written once before the first round.
    """
    length = len(texts[0]) // 2
    sizes = EngineSettings(batch, max(512, batch * length), adapt=False, graphs=graphs)
    engines = {depth: Engine(model, replace(sizes, drafts=depth)) for depth in depths}
    for turn in range(-1, repeats):
        start = (turn + 1) * batch % (len(texts) - batch + 1)
        prompts = [text[:length] for text in texts[start : start + batch]]
        for drafts in random.Random(turn).sample(list(depths), len(depths)):
            row = timed(engines[drafts], prompts, temperature, max_tokens)
            if turn >= 0:
                yield {"round": turn, "temperature": temperature, "graphs": graphs, **row}


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
                "acceptance": [
                    sum(kept) / max(sum(reached), 1)
                    for kept, reached in zip(*(zip(*(row[k] for row in mine)) for k in ("kept", "reached")))
                ],
                "speed_up": statistics.median(speed_ups),
                "speed_up_range": (min(speed_ups), max(speed_ups)),
                "predicted": statistics.median(predictions),
                "v": statistics.median(r["model_s"] / plain[batch, r["round"]]["model_s"] for r in mine),
                "c": statistics.median(r["draft_s"] / plain[batch, r["round"]]["model_s"] for r in mine)
                / max(drafts, 1),
            }
        )
    return out
