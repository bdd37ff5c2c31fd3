"""Sampling: greedy takes the best, top-p stays inside its set, seeds repeat, stops stop."""

import pytest
import torch

from counterflow.errors import ConfigError
from counterflow.infer.sample import choose_token, sample_tokens
from tests.model.configs import BASE, random_model

MODEL = random_model(BASE)


def test_greedy_tokens_are_the_argmax_of_the_whole_sequence():
    tokens = [5, 9, 2]
    for token in sample_tokens(MODEL, [5, 9, 2], 6, temperature=0):
        assert token == int(MODEL.logits(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 9


def test_seeds_repeat_and_differ():
    def text(seed: int) -> list[int]:
        return list(sample_tokens(MODEL, [1], 12, temperature=1.5, top_p=1.0, seed=seed))

    assert text(3) == text(3) != text(4)


def test_top_p_keeps_the_smallest_set_and_its_proportions():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose_token(logits, 1.0, 0.7, generator) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    assert share[2:].sum() == 0
    assert abs(share[0] - 0.625) < 0.03  # three standard deviations are 0.023


def test_stop_tokens_and_long_contexts():
    greedy = list(sample_tokens(MODEL, [5, 9, 2], 3, temperature=0))
    assert list(sample_tokens(MODEL, [5, 9, 2], 9, temperature=0, stop=frozenset([greedy[1]]))) == greedy[:1]
    longer = [1] * (BASE.max_positions + 5)
    assert len(list(sample_tokens(MODEL, longer, 2))) == 2


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 0.5), (1.0, 0.0), (1.0, 1.5)])
def test_impossible_settings_are_refused(temperature, top_p):
    with pytest.raises(ConfigError, match="temperature must be 0"):
        list(sample_tokens(MODEL, [1], 1, temperature, top_p))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="prompt is empty"):
        list(sample_tokens(MODEL, [], 1))
