"""Speculative decoding gives what plain decoding gives: the same greedy text, the same distribution when drawn."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from math import erfc, sqrt

import pytest
import torch
from torch import Tensor

from counterflow.infer import passes, run
from counterflow.infer.distribution import distribution, draw
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.request import Sampling
from counterflow.infer.sample import sample_tokens
from counterflow.infer.speculate import verdict
from tests.infer.models import LANGUAGE, finish, texts, trained_model, write
from tests.model.configs import BASE, random_model

CHAINS = {
    1: (1, 1),
    2: (2, 2),
    3: (3, 3),
    "one re-used": (3, 1),
    "beyond two": (4, 2),
    "part of three": (1, 3),
}
"""(drafts, modules): chains of distinct modules, of one re-used, and mixed."""


def settings(chain, **others) -> EngineSettings:
    drafts, modules = CHAINS[chain]
    return EngineSettings(drafts=drafts, modules=modules, adapt=False, block_size=4, **others)


def prompts(count: int) -> list[list[int]]:
    lengths = [1 + 5 * i % 23 for i in range(count)]
    return [row[:n].tolist() for row, n in zip(texts(count, 30, seed=11), lengths, strict=True)]


@cache
def reference() -> list[list[int]]:
    """Greedy texts of eight prompts without a cache or a draft."""
    return [list(sample_tokens(trained_model(), prompt, 24, 0.0)) for prompt in prompts(8)]


@pytest.mark.parametrize("batch", [1, 24])
@pytest.mark.parametrize("chain", CHAINS)
def test_sec5_4_3_greedy_text_with_drafts_is_the_plain_text(chain, batch):
    """Ragged prompts, one after the other or together, a stop token that comes in the middle of kept runs, and a limit
    of tokens."""
    asked, texts_ = prompts(8)[-batch:], reference()[-batch:]
    engine, given, expected = Engine(trained_model(), settings(chain, max_sequences=batch)), [], []
    for stop in (None, 4, 7):
        sampling = Sampling(24, temperature=0, stop_tokens=frozenset([] if stop is None else [stop]))
        given += [engine.add(prompt, sampling)[0] for prompt in asked]
        expected += [text[: text.index(stop)] if stop in text else text for text in texts_]
    finish(engine)
    assert [sequence.tokens[sequence.prompt_length :] for sequence in given] == expected
    assert sum(engine.statistics.kept) > 0, "some drafts are kept, else nothing was tried"


@pytest.mark.parametrize("chain", [3, "beyond two"])
def test_drafts_are_what_the_modules_say_of_the_whole_text(chain, monkeypatch):
    """At every step each draft is the likeliest token of `draft_logits` over the whole text up to it: so every
    module's cache is true to the cut, after every rejection. Behind the last module there is no such reference."""
    model, seen = random_model(replace(LANGUAGE, initializer_std=0.3)), []
    inner = run.Drafter.draft

    def watched(self, sequences, wanted, uniforms):
        known = [list(sequence.tokens) for sequence in sequences]
        chain = inner(self, sequences, wanted, uniforms)
        seen.extend(zip(known, self.passes.resolved(chain.tokens), strict=True))
        return chain

    monkeypatch.setattr(run.Drafter, "draft", watched)
    _, engine = write(model, prompts(4), Sampling(8, temperature=0), settings(chain))
    assert 0 < sum(engine.statistics.kept) < sum(engine.statistics.reached)
    checked = 0
    for (known, drafted), depth in product(seen, range(CHAINS[chain][1])):
        if depth < len(drafted):
            text = torch.tensor([[*known, *drafted[:depth], 0, 0, 0]])
            logits = model.draft_logits(text)[depth][0, len(known) - 2]
            assert logits[drafted[depth]] > logits.max() - 1e-4
            checked += 1
    assert checked > 30


def plain_distribution(logits, sampling: Sampling):
    """Temperature, top-k and top-p again, over sorted lists."""
    p = torch.softmax(logits.double() / sampling.temperature, -1).tolist()
    order = sorted(range(len(p)), key=lambda t: -p[t])[: sampling.top_k or len(p)]
    total, kept, out = sum(p[t] for t in order), 0.0, [0.0] * len(p)
    for token in order:
        if kept >= sampling.top_p * total:
            break
        kept += p[token]
        out[token] = p[token]
    return [value / kept for value in out]


def enumerated(model, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of every continuation by three tokens."""
    found = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, chance in found.items():
            p = plain_distribution(model.logits(torch.tensor([[*prompt, *tokens]]))[0, -1], sampling)
            longer |= {(*tokens, t): chance * each for t, each in enumerate(p) if each}
        found = longer
    return found


def deviation(model, sampling: Sampling, draws: int) -> float:
    """The p-value of a chi-square test of the engine's first three tokens against the enumeration."""
    prompt = [3, 1, 4]
    expected = enumerated(model, prompt, sampling)
    engine = Engine(model, EngineSettings(max_sequences=250, adapt=False))
    sequences = engine.add(prompt, sampling, samples=draws)
    finish(engine)
    counts = Counter(tuple(sequence.tokens[3:6]) for sequence in sequences)
    assert counts.keys() <= expected.keys(), "a token outside top-p or top-k"
    common = {tokens for tokens, chance in expected.items() if chance * draws >= 10}
    cells = [(counts[tokens], expected[tokens] * draws) for tokens in common]
    rare = draws - sum(want for _, want in cells)
    if rare >= 10:
        cells.append((draws - sum(found for found, _ in cells), rare))
    statistic = sum((found - want) ** 2 / want for found, want in cells)
    return chi_square_tail(statistic, len(cells) - 1)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Wilson and Hilferty's approximation, good to a few percent of the tail."""
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / sqrt(spread)
    return 0.5 * erfc(z / sqrt(2))


SMALL = replace(BASE, vocab_size=6, num_layers=1, num_dense_layers=1, hidden_size=32, max_positions=16)
SAMPLINGS = [
    Sampling(4, temperature=1.0, seed=1),
    Sampling(4, temperature=0.7, top_p=0.85, seed=2),
    Sampling(4, temperature=1.6, top_k=3, seed=3),
    Sampling(4, temperature=1.2, top_k=4, top_p=0.9, seed=4),
]


def drafting_model():
    """Drafts and model differ, as they do in life, and agree often enough."""
    return random_model(replace(SMALL, num_mtp_modules=3, initializer_std=0.25)).requires_grad_(False)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["all", "top_p", "top_k", "both"])
def test_sec5_4_3_drawn_tokens_have_the_models_distribution(sampling):
    """The engine's own texts. Seeds are fixed, so the p-value is always the same; a bound of 1e-3 would be crossed by
    one right verifier in 250."""
    assert deviation(drafting_model(), sampling, 1_500) > 1e-3


def drawn_with_drafts(p: list[Tensor], q: list[Tensor], verify, draws: int) -> Tensor:
    """(draws, 3) tokens: two drafts from q, the verdict, and what is missing from p. p[i] and q[i] hold a distribution
    for every i tokens before."""
    generator = torch.Generator().manual_seed(5)
    uniforms = torch.rand(draws, 8, dtype=torch.float64, generator=generator)
    first = draw(q[0].expand(draws, -1), uniforms[:, 0])
    second = draw(q[1][first], uniforms[:, 1])
    drafts = torch.stack([first, second], 1)
    asked = torch.stack([q[0].expand(draws, -1), q[1][first]], 1)
    given = torch.stack([p[0].expand(draws, -1), p[1][first], p[2][first, second]], 1)
    kept, token = verify(given, asked, drafts, torch.full((draws,), 2), uniforms[:, 2:5])
    out = torch.where(torch.arange(3) < kept[:, None], torch.cat([drafts, token[:, None]], 1), token[:, None])
    out[:, 1] = torch.where(kept < 1, draw(p[1][out[:, 0]], uniforms[:, 5]), out[:, 1])
    out[:, 2] = torch.where(kept < 2, draw(p[2][out[:, 0], out[:, 1]], uniforms[:, 6]), out[:, 2])
    return out


def verdict_deviation(sampling: Sampling, verify) -> float:
    """The p-value of 200,000 texts of three tokens over a vocabulary of five, p and q from logits drawn at random."""
    generator, draws = torch.Generator().manual_seed(3), 200_000
    logits = [2 * torch.randn(1, *[5] * (i + 1), generator=generator) for i in range(3)]
    p = [distribution(each, [sampling])[0] for each in logits]
    q = [distribution(each + torch.randn(each.shape, generator=generator), [sampling])[0] for each in logits]
    tokens = drawn_with_drafts(p, q, verify, draws)
    found = torch.bincount(tokens @ torch.tensor([25, 5, 1]), minlength=125)
    want = draws * (p[0][:, None, None] * p[1][:, :, None] * p[2]).flatten().double()
    assert not found[want == 0].any(), "a token outside top-p or top-k"
    large = want >= 10
    cells = list(zip(found[large].tolist(), want[large].tolist(), strict=True))
    cells.append((int(found[~large].sum()), float(want[~large].sum())))
    cells = [(f, w) for f, w in cells if w > 0]
    return chi_square_tail(sum((f - w) ** 2 / w for f, w in cells), len(cells) - 1)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["all", "top_p", "top_k", "both"])
def test_sec5_4_3_verdicts_leave_the_distribution_as_it_is(sampling):
    assert verdict_deviation(sampling, verdict) > 1e-3
    assert verdict_deviation(sampling, by_argmax) < 1e-9, (
        "the test finds a verifier that accepts the likeliest"
    )


def by_argmax(p, q, drafts, counts, uniforms):
    """Keeps a draft if the model finds it the likeliest: biased."""
    real = torch.arange(drafts.shape[1]) < counts[:, None]
    kept = ((p[:, :-1].argmax(-1) == drafts) & real).long().cumprod(1).sum(1)
    return kept, draw(p[torch.arange(len(p)), kept], uniforms[:, -1])


def test_sec5_4_3_the_engines_test_finds_a_verifier_that_accepts_the_likeliest(monkeypatch):
    monkeypatch.setattr(run, "verdict", by_argmax)
    assert deviation(drafting_model(), SAMPLINGS[0], 3_000) < 1e-9


def test_a_draft_that_the_model_would_not_draw_is_never_kept():
    """p and q share no token: nothing is kept and what follows is drawn from p."""
    p = torch.tensor([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]]).repeat(100, 1, 1)
    q = torch.tensor([[[1.0, 0.0, 0.0]]]).repeat(100, 1, 1)
    uniforms = torch.rand(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept, token = verdict(
        p, q, torch.zeros(100, 1, dtype=torch.long), torch.ones(100, dtype=torch.long), uniforms
    )
    assert not kept.any() and set(token.tolist()) == {1, 2}


CONTROLS = {
    "swapped": lambda model, depth, hidden, embedded, positions: (embedded, hidden),
    "hidden before the norm": lambda model, depth, hidden, embedded, positions: (
        hidden / model.norm.weight if depth == 0 else hidden,
        embedded,
    ),
    "embedding zeroed at position 0": lambda model, depth, hidden, embedded, positions: (
        hidden,
        embedded * (positions > 0)[:, None],
    ),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_sec5_4_3_wrong_drafts_change_no_text_but_are_kept_less(control, monkeypatch):
    """Negative controls: what is drafted decides the speed and nothing else. The zeroed embedding acts where the
    modules see position 0, so prompts are one token and texts short."""
    model, chain = trained_model(), settings(2)
    length = 3 if "position 0" in control else 24
    sampling = Sampling(length, temperature=0)
    asked = [[i % 11] for i in range(22)] if "position 0" in control else prompts(12)
    right, engine = write(model, asked, sampling, chain)
    inner, distort = passes.run_module, CONTROLS[control]

    def wrong(model, depth, hidden, tokens, rows, cache):
        module = model.mtp[depth]
        merge = type(module).merge
        positions = torch.cat([group.positions.flatten()[group.places] for group in rows.groups])

        def distorted(self, h, embedded, ledger):
            return merge(self, *distort(model, depth, h, embedded, positions), ledger)

        with monkeypatch.context() as patch:
            patch.setattr(type(module), "merge", distorted)
            return inner(model, depth, hidden, tokens, rows, cache)

    monkeypatch.setattr(passes, "run_module", wrong)
    given, worse = write(model, asked, sampling, chain)
    assert given == right
    assert worse.statistics.acceptance[0] < engine.statistics.acceptance[0] - 0.1
