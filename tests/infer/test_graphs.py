"""Passes laid evenly for graphs give what passes laid end to end give; on a CPU nothing is recorded, only laid so."""

import logging

import pytest
import torch

from counterflow.infer import passes
from counterflow.infer.cache import Bucket, Cache, Extent, bucket_of
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.graphs import Graphs
from counterflow.infer.request import Sampling
from counterflow.infer.states import rows_of
from tests.infer.models import finish, texts, trained_model

BOUND = 1e-5
"""Logits near 1 in fp32, the sums of a product in another order."""


@pytest.fixture
def laid(monkeypatch) -> list:
    """What has been laid evenly since: the keys of all runs."""
    keys, real = [], Graphs.run

    def run(self, key, act, *inputs):
        keys.append(key)
        return real(self, key, act, *inputs)

    monkeypatch.setattr(Graphs, "run", run)
    return keys


def test_few_buckets_are_met_and_prompts_have_none():
    def extents(*spans: tuple[int, int]) -> list[Extent]:
        return [Extent(start, end, []) for start, end in spans]

    assert bucket_of(extents((40, 42), (7, 8), (300, 301)), 4, 2) == Bucket(4, 2, 128)
    assert bucket_of(extents((0, 1)), 4, 1) == Bucket(1, 1, 32)
    assert bucket_of(extents((0, 3)), 4, 3) == Bucket(1, 3, 32)
    assert bucket_of(extents((0, 3)), 4, 3, few=True) == Bucket(1, 4, 32)
    assert bucket_of(extents((0, 3), (3, 4)), 4, 2) is None
    assert bucket_of([], 4, 2) is None


def test_an_even_pass_equals_one_laid_end_to_end_and_writes_no_other_entry(laid):
    model, lengths = trained_model(), (9, 4, 13)
    (text,) = texts(1, 20, seed=3).tolist()
    extents = [
        Extent(length - rows, length, [7 * i, 7 * i + 3, 7 * i + 1, 7 * i + 2])
        for i, (length, rows) in enumerate(zip(lengths, (1, 3, 2)))
    ]
    tokens = [text[extent.start : extent.end] for extent in extents]
    found = []
    for graphs in (None, Graphs()):
        cache = Cache(model, 32, 4, 3)
        entries = torch.randn(cache.entries[:, :-4].shape, generator=torch.Generator().manual_seed(0))
        cache.entries[:, :-4] = entries
        each = passes.Passes(model, cache, graphs, 3)
        out = []
        h, starts, best = each.trunk(extents, tokens)
        assert best is None
        out += [h[start : start + len(own)] for start, own in zip(starts, tokens)]
        waiting = [rows_of(h, start, start + len(own)) for start, own in zip(starts, tokens)]
        h, starts, _ = each.module(1, extents, tokens, waiting)
        out += [h[start : start + len(own)] for start, own in zip(starts, tokens)]
        found.append([*out, cache.entries[:, :-4]])
    for plain, even in zip(*found, strict=True):
        assert (plain - even).abs().max() < BOUND
    assert laid == [(0, Bucket(4, 3, 32), False), (2, Bucket(4, 4, 32), False)]


def test_a_pass_reads_the_tokens_that_the_one_before_it_chose_on_the_device():
    """Codes in the place of tokens; the trunk's likeliest ones; and a pass laid end to end, which resolves them."""
    model = trained_model()
    extents, keep = [Extent(0, 2, [0]), Extent(3, 4, [1]), Extent(1, 3, [2])], [2, -1, 0]
    tokens, states = (
        [[5, 7], [9], [10, 3]],
        [[(torch.ones(1, model.config.hidden_size), 0)] * n for n in (2, 1, 2)],
    )
    each = passes.Passes(model, Cache(model, 8, 4, 3), Graphs(), 3, places=3)
    h, starts, best = each.module(0, extents, tokens, states, keep)
    ends = [start + len(own) - 1 for start, own in zip(starts, tokens)]
    likeliest = passes.logits_of(model, h).argmax(-1)[ends].tolist()
    assert best is not None and best[ends].tolist() == likeliest
    assert each.drafted.tolist()[2] == likeliest[0] and each.drafted.tolist()[0] == likeliest[2]
    coded, known = [[-3], [9], [-1]], [[likeliest[0]], [9], [likeliest[2]]]
    assert each.resolved(coded) == known
    further = [Extent(2, 3, [3]), Extent(0, 1, [4]), Extent(1, 2, [5])]
    by_code, by_token = (each.trunk(further, some, choose=True) for some in (coded, known))
    assert torch.equal(by_code.h, by_token.h) and torch.equal(by_code.best, by_token.best)
    each.graphs = None
    assert (each.trunk(further, coded).h - by_code.h[by_code.starts]).abs().max() < BOUND


@pytest.mark.parametrize("drafts", [0, 3])
def test_an_engine_of_even_passes_writes_the_same_text(drafts, laid):
    settings = EngineSettings(drafts=drafts, max_rows=24, block_size=4, adapt=False)
    written = []
    for graphs in (None, Graphs()):
        engine = Engine(trained_model(), settings)
        engine.runner.passes.graphs = graphs
        asked = [row[:n].tolist() for row, n in zip(texts(5, 60, seed=7), (1, 40, 9, 17, 3))]
        sequences = [engine.add(prompt, Sampling(20, temperature=0))[0] for prompt in asked]
        finish(engine)
        written.append([sequence.tokens for sequence in sequences])
    assert written[0] == written[1] and len(laid) > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_recorded_beforehand_is_all_that_texts_need(laid, temperature):
    """Batches that shrink, drafts near a text's end, and depths that change."""
    settings = EngineSettings(max_sequences=5, max_rows=24, block_size=4)
    engine = Engine(trained_model(), settings)
    engine.runner.passes.graphs = Graphs()
    for record in engine.recordings(range(1, 6), [temperature == 0]):
        record()
    recorded = set(laid)
    assert len(recorded) == len(laid), "each once"
    assert not engine.runner.passes.cache.entries[:, :-4].any(), "only nobody's rows are written"
    for row, n, length in zip(texts(7, 60, seed=7), (1, 40, 9, 17, 3, 5, 8), (12, 7, 20, 20, 3, 16, 1)):
        engine.add(row[:n].tolist(), Sampling(length, temperature))
    finish(engine)
    assert len(laid) > len(recorded) and set(laid) == recorded & set(laid)


def test_a_cpu_says_once_that_it_has_no_graphs(caplog):
    with caplog.at_level(logging.INFO, logger="counterflow"):
        engine = Engine(trained_model(), EngineSettings(block_size=4))
        engine.add([1, 2, 3], Sampling(6, temperature=0))
        finish(engine)
    (record,) = [r for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert "on a CPU" in record.getMessage() and engine.runner.passes.graphs is None
