"""Modules that nobody drafts with cost nothing, and when they are used again they draft as if they always had been."""

from dataclasses import replace
from itertools import chain, cycle

import pytest
import torch

from counterflow.infer import engine as engines
from counterflow.infer import run
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.request import Sampling
from tests.infer.models import LANGUAGE, finish, texts, trained_model
from tests.model.configs import random_model

GREEDY = Sampling(30, temperature=0)
SETTINGS = EngineSettings(drafts=3, block_size=4, max_rows=16)


def prompts() -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(texts(4, 30, seed=11), (1, 9, 23, 14))]


@pytest.fixture
def passes_of_modules(monkeypatch) -> list[int]:
    """The depth of every module's pass since."""
    seen, inner = [], run.passes.Passes.module
    monkeypatch.setattr(
        run.passes.Passes,
        "module",
        lambda self, depth, *rest: seen.append(depth) or inner(self, depth, *rest),
    )
    return seen


def test_drafts_after_a_rest_are_what_the_modules_say_of_the_whole_text(monkeypatch):
    """Rests longer and shorter than a block, of all modules and of some; each draft against `draft_logits`."""
    model, seen, inner = random_model(replace(LANGUAGE, initializer_std=0.3)), [], run.Drafter.draft

    def watched(self, sequences, wanted, uniforms):
        known = [list(sequence.tokens) for sequence in sequences]
        drafted = inner(self, sequences, wanted, uniforms)
        seen.extend(zip(known, self.passes.resolved(drafted.tokens), strict=True))
        return drafted

    monkeypatch.setattr(run.Drafter, "draft", watched)
    engine, depths = Engine(model, SETTINGS), cycle([*[0] * 9, 3, 3, *[1] * 6, 2, 0, 0, 3])
    monkeypatch.setattr(engine.depth, "choose", lambda *_: next(depths))
    for prompt in prompts():
        engine.add(prompt, GREEDY)
    finish(engine)
    checked = 0
    for known, drafted in seen:
        for depth in range(len(drafted)):
            text = torch.tensor([[*known, *drafted[:depth], 0, 0, 0]])
            logits = model.draft_logits(text)[depth][0, len(known) - 2]
            assert logits[drafted[depth]] > logits.max() - 1e-4
            checked += 1
    assert checked > 60


def test_without_drafts_no_module_runs_and_what_was_written_is_shared_with_texts_like_it(
    monkeypatch, passes_of_modules
):
    """A later text whose modules are to draft takes no block that they have not filled; then it fills them itself."""
    engine = Engine(trained_model(), SETTINGS)
    for depth, shared in ((0, 0), (0, 20), (3, 0), (3, 20)):
        monkeypatch.setattr(engine.depth, "choose", lambda *_, depth=depth: depth)
        monkeypatch.setattr(engine.depth, "needed", lambda _, depth=depth: depth)
        (sequence,) = engine.add(prompts()[2], GREEDY)
        reused = engine.statistics.reused_tokens
        finish(engine)
        assert engine.statistics.reused_tokens - reused == shared
        assert bool(passes_of_modules) == (depth > 0)
        assert sequence.modules == depth
    assert engine.blocks.available == engine.blocks.num_blocks


def test_a_text_that_has_not_drafted_for_long_is_written_without(monkeypatch, passes_of_modules):
    monkeypatch.setattr(engines, "LONGEST_WAIT", 12)
    settings = replace(SETTINGS, max_sequences=1, max_rows=4)
    engine, chosen = Engine(trained_model(), settings), chain([1] * 4, [0] * 14, cycle([3]))
    monkeypatch.setattr(engine.depth, "choose", lambda _, limit: min(next(chosen), limit))
    (sequence,) = engine.add(prompts()[1], GREEDY)
    finish(engine)
    assert sequence.modules == 0 and len(sequence.tokens) == 39
    assert passes_of_modules and not sequence.waiting
    plain = Engine(trained_model(), EngineSettings(drafts=0))
    expected = plain.add(prompts()[1], GREEDY)[0]
    finish(plain)
    assert sequence.tokens == expected.tokens


def test_a_prompt_that_is_read_in_one_step_keeps_its_modules_however_long_it_is(monkeypatch):
    monkeypatch.setattr(engines, "LONGEST_WAIT", 12)
    engine = Engine(trained_model(), SETTINGS)
    (sequence,) = engine.add(prompts()[2], Sampling(8, temperature=1.0, seed=0))
    finish(engine)
    assert sequence.modules == 3 and engine.statistics.drafted_turns > 0


def test_what_waits_for_modules_keeps_no_prompt_of_another_text(monkeypatch):
    engine = Engine(trained_model(), SETTINGS)
    monkeypatch.setattr(engine.depth, "choose", lambda *_: 0)
    (first,) = engine.add(prompts()[0], GREEDY)
    for prompt in prompts()[1:]:
        engine.step()
        engine.add(prompt, GREEDY)
    engine.step()
    assert len(first.waiting[0]) == 4 and max(len(states) for states, _ in first.waiting[0]) <= 4
