"""A model that has learnt a language of its own in seconds, and the texts of that language.

Each token follows from the two before it by a table, nine times in ten; so a draft needs the hidden state and the
embedding both. The final norm's gains start far apart, as they lie in trained models: a module that is given the
hidden state before that norm is given something else.
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.request import Delta, Sampling, Sequence
from counterflow.model.transformer import Transformer
from tests.model.configs import BASE, random_model

VOCAB = 11
LANGUAGE = replace(
    BASE,
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_routed_experts=6,
    num_groups=3,
    num_experts_per_token=2,
    num_mtp_modules=3,
)


def texts(count: int, length: int, seed: int) -> Tensor:
    """(count, length) tokens of the language."""
    table = torch.randint(0, VOCAB, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCAB, (count, length), generator=generator)
    follows = torch.rand(count, length, generator=generator) < 0.9
    for i in range(2, length):
        rows[:, i] = torch.where(follows[:, i], table[rows[:, i - 2], rows[:, i - 1]], rows[:, i])
    return rows


@cache
def trained_model() -> Transformer:
    """Some seconds of training, once."""
    torch.manual_seed(0)
    model = random_model(LANGUAGE)
    with torch.no_grad():
        model.norm.weight.copy_(torch.exp(torch.linspace(-2, 2, LANGUAGE.hidden_size)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, 2 * (1 - step / STEPS))
        optimizer.zero_grad()
        model(texts(32, 25, seed=step + 1), mtp_weight=1.0).total.backward()
        optimizer.step()
    return model.requires_grad_(False)


STEPS = 100


def finish(engine: Engine) -> dict[Sequence, list[Delta]]:
    """Step until nothing is left; what each sequence was given."""
    given: dict[Sequence, list[Delta]] = {}
    for _ in range(10_000):
        if engine.idle:
            return given
        for delta in engine.step():
            given.setdefault(delta.sequence, []).append(delta)
    raise AssertionError("the engine does not come to an end")


def write(
    model: Transformer, prompts: list[list[int]], sampling: Sampling, settings: EngineSettings
) -> tuple[list[list[int]], Engine]:
    """The tokens after each prompt, all run together, and the engine."""
    engine = Engine(model, settings)
    sequences = [engine.add(prompt, sampling)[0] for prompt in prompts]
    finish(engine)
    return [s.tokens[s.prompt_length :] for s in sequences], engine
