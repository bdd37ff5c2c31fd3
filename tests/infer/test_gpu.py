"""On a GPU the engine writes what it writes on the CPU."""

import logging
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from counterflow.infer import passes
from counterflow.infer.cache import Cache, Extent, bucket_of
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.graphs import Graphs
from counterflow.infer.place import placed
from counterflow.infer.request import Sampling
from counterflow.infer.states import gather, rows_of
from tests.infer.models import texts, trained_model, write
from tests.model.configs import BASE, random_model

pytestmark = pytest.mark.gpu

SETTINGS = EngineSettings(adapt=False, max_rows=24, block_size=4)
WIDE = replace(
    BASE,
    vocab_size=512,
    hidden_size=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    q_lora_rank=64,
    kv_lora_rank=64,
    moe_intermediate_size=64,
    dense_intermediate_size=256,
    num_mtp_modules=1,
    max_positions=128,
)
"""Widths that the GPU's grouped product takes."""


def prompts() -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(texts(5, 60, seed=7), (1, 40, 9, 17, 3))]


def test_greedy_text_in_fp32_equals_the_cpus():
    """A trained model's best token is rarely within a rounding of the second."""
    sampling = Sampling(20, temperature=0)
    expected, _ = write(trained_model(), prompts(), sampling, SETTINGS)
    model = placed(deepcopy(trained_model()), "cuda", "fp32", SETTINGS)
    given, engine = write(model, prompts(), sampling, SETTINGS)
    assert given == expected and sum(engine.statistics.kept) > 0


def test_bf16_writes_the_language_with_drafts_and_without():
    model = placed(deepcopy(trained_model()), "cuda", "bf16", SETTINGS)
    for settings in (SETTINGS, EngineSettings(drafts=0)):
        given, _ = write(model, prompts(), Sampling(20, temperature=1.0, seed=1, logprobs=2), settings)
        assert all(len(text) == 20 for text in given)
    assert next(model.parameters()).dtype == torch.bfloat16


def even_pass(rows: int, context: int, sequences: int) -> tuple[list[Extent], list[list[int]]]:
    """Sequences that each run over `rows` tokens behind a context of about this length, blocks of 16."""
    each = -(-(context + sequences + rows) // 16)
    generator = torch.Generator().manual_seed(rows)
    extents = [
        Extent(context + i, context + i + rows, list(range(i * each, (i + 1) * each)))
        for i in range(sequences)
    ]
    return extents, torch.randint(0, 512, (sequences, rows), generator=generator).tolist()


@torch.no_grad()
def test_a_replayed_pass_equals_the_same_pass_unrecorded_bit_for_bit():
    """Logits of trunk and module, each bucket replayed twice with other inputs between; and within bf16's rounding of
    the pass laid end to end, whose products have other numbers of rows and whose keys are split otherwise."""
    model = placed(random_model(WIDE), "cuda", "bf16", SETTINGS)
    cache = Cache(model, 64, 16, 1)
    cache.entries.normal_(generator=torch.Generator("cuda").manual_seed(0))
    replayed = passes.Passes(model, cache, Graphs(), 3)
    plain = passes.Passes(model, cache, None, 0)
    seen = {}
    for turn in range(2):
        for sequences, rows, context in ((1, 1, 100), (3, 2, 70), (8, 1, 90), (5, 3, 30)):
            extents, tokens = even_pass(rows, context + 2 * turn, sequences)
            h, starts, _ = replayed.trunk(extents, tokens)
            states = [h[start : start + rows] for start in starts]
            waiting = [rows_of(h, start, start + rows) for start in starts]
            deep, _, _ = replayed.module(0, extents, tokens, waiting)
            for few in (False, True):  # a module's rows are laid in powers of two
                bucket = bucket_of(extents, cache.size, 3, few=few)
                numbers = torch.tensor(cache.packed(extents, tokens, bucket), device="cuda")
                flat, laid, _ = cache.even_rows(numbers, bucket)
                if few:
                    given = gather(passes.even(waiting, bucket))
                    assert torch.equal(deep, passes.run_module(model, 0, given, flat, laid, cache))
                else:
                    again = passes.run_trunk(model, flat, laid, cache)
                    assert torch.equal(passes.logits_of(model, h), passes.logits_of(model, again))
            ends, first, _ = plain.trunk(extents, tokens)
            own = torch.cat([ends[start : start + rows] for start in first])
            seen[turn, sequences] = (own - torch.cat(states)).float().norm() / own.float().norm()
    assert replayed.graphs.count == 8, "four buckets, trunk and module"
    assert max(seen.values()) < 2**-6, seen


@pytest.mark.parametrize("drafts", [0, 1])
def test_an_engine_with_graphs_writes_the_greedy_text_without(drafts):
    """In bf16 the two round differently, and a text goes its own way from the first near tie on: most must be equal."""
    model = placed(deepcopy(trained_model()), "cuda", "bf16", SETTINGS)
    written = []
    for graphs in (False, True):
        settings = replace(SETTINGS, drafts=drafts, graphs=graphs)
        given, engine = write(model, prompts() * 4, Sampling(20, temperature=0), settings)
        replayed = engine.runner.passes.graphs
        assert replayed.count > drafts if replayed else not graphs
        written.append(given)
    same = sum(a == b for one, two in zip(*written) for a, b in zip(one, two))
    assert same >= 0.9 * 400, f"{same} of 400 tokens"


def test_fp32_runs_without_graphs(caplog):
    with caplog.at_level(logging.INFO, logger="counterflow"):
        model = placed(deepcopy(trained_model()), "cuda", "fp32", SETTINGS)
        assert Engine(model, SETTINGS).runner.passes.graphs is None
    assert "bf16" in caplog.text
