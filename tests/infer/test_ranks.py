"""Engines on ranks that share the experts write what one engine with all experts writes, whoever has how many requests.

Ranks are threads here; processes are in `tests/cli/test_processes.py`.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest

from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Terms
from counterflow.comm.peers import Peers, thread_peers
from counterflow.infer.engine import Engine, EngineSettings, pass_rows
from counterflow.infer.ranks import Ranks
from counterflow.infer.request import Sampling
from counterflow.model.transformer import Transformer, expert_shards, keep_experts
from tests.infer.models import LANGUAGE, finish, texts, trained_model

SETTINGS = EngineSettings(max_sequences=3, max_rows=20, block_size=4, adapt=False)
GREEDY = Sampling(10, temperature=0)
RAGGED = [(5, 11, 2, 24), (), (17,)]
"""Lengths of each rank's prompts."""


def part_of(whole: Transformer, index: int, peers: Peers, parts: int, backend: str) -> Transformer:
    """The model with one rank's experts."""
    model = deepcopy(whole)
    keep_experts(model, index, parts)
    shards, full = expert_shards(model), whole.state_dict()
    for name, weight in model.named_parameters():
        if name in shards:
            start = shards[name].offset
            weight.data = full[name].flatten()[start : start + weight.numel()].view_as(weight).clone()
    model.dispatcher = open_dispatcher(
        backend, peers, Terms(LANGUAGE.num_routed_experts, tokens=SETTINGS.max_rows)
    )
    return model.requires_grad_(False)


def prompts_of(lengths: list[tuple[int, ...]]) -> list[list[list[int]]]:
    rows = iter(texts(sum(map(len, lengths)), 60, seed=7))
    return [[next(rows)[:length].tolist() for length in own] for own in lengths]


def write_together(
    asked: list[list[list[int]]], samplings: list[Sampling], settings: EngineSettings, backend: str
) -> tuple[list[list[list[int]]], list[Engine]]:
    """Each rank's texts after its prompts, the i-th of each by the i-th sampling, and the engines."""
    whole, parts = trained_model(), len(asked)
    peers = thread_peers(parts, 1 if backend == "two_hop" else 0)

    def rank(index: int) -> tuple[list[list[int]], Engine]:
        model = part_of(whole, index, peers[index], parts, backend)
        engine = Engine(model, settings, ranks=Ranks(peers[index].whole))
        sequences = [engine.add(p, s)[0] for p, s in zip(asked[index], samplings)]
        while not engine.finished():
            engine.step()
        return [sequence.tokens[sequence.prompt_length :] for sequence in sequences], engine

    with ThreadPoolExecutor(parts) as pool:
        found = list(pool.map(rank, range(parts)))
    return [texts for texts, _ in found], [engine for _, engine in found]


def write_alone(asked: list[list[int]], samplings: list[Sampling], settings: EngineSettings):
    engine = Engine(trained_model(), settings)
    sequences = [engine.add(p, s)[0] for p, s in zip(asked, samplings)]
    finish(engine)
    return [sequence.tokens[sequence.prompt_length :] for sequence in sequences]


@pytest.mark.parametrize(
    ("backend", "drafts", "modules"),
    [("collective", 0, 0), ("collective", 3, 3), ("two_hop", 3, 1)],
)
def test_greedy_text_equals_one_ranks_with_ragged_requests_and_a_rank_without(backend, drafts, modules):
    settings = replace(SETTINGS, drafts=drafts, modules=modules)
    asked = prompts_of(RAGGED)
    given, engines = write_together(asked, [GREEDY] * 4, settings, backend)
    for own, texts_ in zip(asked, given, strict=True):
        assert texts_ == write_alone(own, [GREEDY] * 4, settings)
    assert len({engine.statistics.steps for engine in engines}) == 1, "they stop together"
    assert engines[1].statistics.tokens == 0 and all(len(text) == 10 for own in given for text in own)
    if drafts:
        assert all(sum(engines[i].statistics.kept) > 0 for i in (0, 2))


def test_ranks_with_drafts_of_their_own_depth_stay_in_step():
    """A full budget on one rank, a text that nearly ends on the other, and depths that are tried by measured times."""
    settings = replace(SETTINGS, adapt=True)
    asked = prompts_of([(9, 30), (4,)])
    given, engines = write_together(asked, [replace(GREEDY, max_tokens=3), GREEDY], settings, "collective")
    assert [[len(text) for text in own] for own in given] == [[3, 10], [3]]
    for own, texts_ in zip(asked, given, strict=True):
        assert texts_ == write_alone(own, [replace(GREEDY, max_tokens=3), GREEDY], settings)
    assert engines[0].statistics.steps == engines[1].statistics.steps


def test_seeds_replay_on_ranks_and_on_one():
    samplings = [Sampling(10, temperature=1.3, top_p=0.9, seed=seed) for seed in range(4)]
    asked = prompts_of(RAGGED)
    first, _ = write_together(asked, samplings, SETTINGS, "collective")
    assert first == write_together(asked, samplings, SETTINGS, "collective")[0]
    assert first == [write_alone(own, samplings, SETTINGS) for own in asked]


def test_requests_may_come_to_one_rank_while_the_others_have_none():
    """Rank 1's only request is added after some steps without any on it, and rank 0's have ended by then."""
    whole, peers = trained_model(), thread_peers(2)
    (late,) = prompts_of([(7,)])[0]

    def rank(index: int) -> list[int]:
        model = part_of(whole, index, peers[index], 2, "collective")
        engine, sequences = Engine(model, SETTINGS, ranks=Ranks(peers[index].whole)), []
        for step in range(12):
            if step == 8 * index:
                sequences = engine.add(late, replace(GREEDY, max_tokens=4))
            engine.step()
        assert engine.finished()
        return sequences[0].tokens

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert first == second == [*late, *write_alone([late], [replace(GREEDY, max_tokens=4)], SETTINGS)[0]]


@pytest.mark.parametrize(("modules", "size"), [(1, 8), (3, 8), (1, 32)])
def test_no_pass_runs_over_more_rows_than_backends_make_room_for(modules, size, monkeypatch):
    """Modules run over what waited while nothing was drafted: more than a step's positions, no more than is said,
    also where a block has more positions than a step."""
    settings = EngineSettings(max_sequences=4, max_rows=16, block_size=size, drafts=3, modules=modules)
    engine, dice, seen = Engine(trained_model(), settings), random.Random(0), []
    run = engine.runner.passes._run

    def spied(name, act, extents, tokens, *rest):
        seen.append(sum(map(len, tokens)))
        return run(name, act, extents, tokens, *rest)

    monkeypatch.setattr(engine.runner.passes, "_run", spied)
    monkeypatch.setattr(engine.depth, "choose", lambda *_: dice.choice((0, 0, 0, 0, 3)))
    for prompt in texts(14, 40, seed=3):
        engine.add(prompt[: dice.randint(1, 40)].tolist(), replace(GREEDY, max_tokens=dice.randint(1, 20)))
    finish(engine)
    assert engine.batch.max_rows < max(seen) <= pass_rows(engine.model, settings)
