"""What is counted of a writing are the steps in which all wrote, and their seconds."""

from dataclasses import replace

import pytest
import torch

from counterflow.benchmark.speculative import rounds, summary, teacher_forced, timed
from counterflow.infer.engine import Engine, EngineSettings
from tests.model.configs import BASE, random_model

CONFIG = replace(BASE, num_mtp_modules=2, max_positions=128)
TEXTS = [[(7 * i + 3 * j) % CONFIG.vocab_size for j in range(16)] for i in range(6)]


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG).requires_grad_(False)


def test_tokens_and_seconds_are_of_the_same_steps(model, monkeypatch):
    """Prompts that come in one after the other end so too; what is written after the first end is in neither."""
    seen = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: seen.append(step(self)) or seen[-1])
    row = timed(Engine(model, EngineSettings(4, max_rows=16, drafts=2, adapt=False)), TEXTS[:4], 0.0, 24)
    made, full, counted, late = dict.fromkeys(range(4), 0), False, 0, 0
    ended = False
    for deltas in seen:
        tokens = sum(len(delta.tokens) for delta in deltas)
        late += ended * tokens
        counted += (full and not ended) * tokens
        for delta in deltas:
            made[delta.sequence.number] += len(delta.tokens)
        full = full or all(count > 1 for count in made.values())
        ended = ended or any(delta.finish for delta in deltas)
    assert row["tokens"] == counted and late > 0
    assert row["seconds"] * 1.001 > (row["model_s"] + row["draft_s"]) * row["seconds"] / row["step_s"]


def test_rounds_have_every_depth_and_the_plain_one_is_the_measure(model):
    rows = list(rounds(model, TEXTS, 2, (0, 1, 2), 0.0, 6, repeats=2))
    assert sorted((row["round"], row["drafts"]) for row in rows) == [
        (t, d) for t in (0, 1) for d in (0, 1, 2)
    ]
    plain, *drafted = summary(rows)
    assert (plain["speed_up"], plain["v"], plain["length"]) == (1.0, 1.0, 1.0)
    for row in drafted:
        assert len(row["acceptance"]) == row["drafts"] and 1 <= row["length"] <= 1 + row["drafts"]


def test_teacher_forced_shares_are_those_of_the_logits(model):
    """A module whose logits are compared with the model's at the same target."""
    found = teacher_forced(model, TEXTS[:2])
    for depth, shares in enumerate(found, start=1):
        agreed = loss = 0.0
        for text in TEXTS[:2]:
            tokens = torch.tensor([text])
            own, drafts = model.logits(tokens)[0], model.draft_logits(tokens)[depth - 1][0]
            for at in range(len(text) - depth - 1):  # the module's row `at` is for token at + depth + 1
                agreed += (own[at + depth].argmax() == drafts[at].argmax()).item()
                loss -= drafts[at].log_softmax(-1)[text[at + depth + 1]].item()
        count = 2 * (len(TEXTS[0]) - depth - 1)
        assert shares["agreed"] == pytest.approx(agreed / count) and 0 < shares["overlap"] <= 1
        assert shares["loss"] == pytest.approx(loss / count, rel=1e-5)
