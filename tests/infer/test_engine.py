"""Requests of all kinds beside each other: each gets what it would get alone, and stops where it must."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import ConfigError, RequestError
from counterflow.infer.engine import Engine, EngineSettings, held_by_cache, positions_of, with_room
from counterflow.infer.request import Sampling
from counterflow.infer.sample import sample_tokens
from tests.infer.models import finish, texts, trained_model, write
from tests.model.configs import BASE, random_model

GREEDY = Sampling(max_tokens=12, temperature=0)
PLAIN = EngineSettings(drafts=0)


def prompts(lengths) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(texts(len(lengths), 60, seed=7), lengths)]


def letter(token: int) -> bytes:
    return bytes([ord("a") + token])


def letters(tokens) -> str:
    return b"".join(map(letter, tokens)).decode()


def test_greedy_text_equals_the_reference_without_a_cache():
    model = random_model(replace(BASE, num_mtp_modules=1))
    asked = [torch.randint(0, 97, (n,)).tolist() for n in (1, 9, 30, 4, 17)]
    expected = [list(sample_tokens(model, prompt, 12, temperature=0)) for prompt in asked]
    for max_sequences, max_rows in ((1, 64), (3, 5), (8, 5), (8, 64)):
        settings = EngineSettings(max_sequences=max_sequences, max_rows=max_rows, block_size=4)
        assert write(model, asked, GREEDY, settings)[0] == expected


def test_requests_join_and_leave_at_every_step():
    model, asked = trained_model(), prompts([3, 9, 14, 1, 20, 6])
    alone = [write(model, [p], replace(GREEDY, max_tokens=4 + i), PLAIN)[0][0] for i, p in enumerate(asked)]
    engine, sequences = Engine(model, PLAIN), []
    for i, prompt in enumerate(asked):
        sequences += engine.add(prompt, replace(GREEDY, max_tokens=4 + i))
        engine.step()
    finish(engine)
    assert [s.tokens[s.prompt_length :] for s in sequences] == alone
    assert {s.finish for s in sequences} == {"length"}


def test_deltas_add_up_to_the_tokens():
    engine = Engine(trained_model())
    sequences = [engine.add(prompt, GREEDY)[0] for prompt in prompts([3, 8, 30])]
    given = finish(engine)
    for sequence in sequences:
        tokens = [token for delta in given[sequence] for token in delta.tokens]
        assert tokens == sequence.tokens[sequence.prompt_length :] and len(tokens) == 12
        assert [delta.finish for delta in given[sequence]][-1] == "length"


@pytest.mark.parametrize("drafts", [0, 3])
def test_seeds_replay_whatever_runs_beside_and_differ(drafts):
    model, asked = trained_model(), prompts([5, 11, 2, 24])
    settings = EngineSettings(drafts=drafts, max_sequences=3, max_rows=20, block_size=4)

    def text(prompt: list[int], seed: int) -> list[int]:
        return write(model, [prompt], Sampling(20, temperature=1.5, seed=seed), settings)[0][0]

    engine = Engine(model, settings)
    sequences = [engine.add(p, Sampling(20, temperature=1.5, seed=i))[0] for i, p in enumerate(asked)]
    others = engine.add(asked[0], Sampling(20, temperature=1.0), samples=3)
    finish(engine)
    assert [s.tokens[s.prompt_length :] for s in sequences] == [text(p, i) for i, p in enumerate(asked)]
    assert text(asked[0], 0) != text(asked[0], 1)
    assert len({tuple(s.tokens) for s in others}) > 1


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_full_cache_makes_the_youngest_wait_and_changes_nothing(drafts):
    model, asked = trained_model(), prompts([20, 14, 25, 9, 17])
    sampling = Sampling(25, temperature=1.0, seed=3)
    roomy, _ = write(model, asked, sampling, EngineSettings(drafts=drafts))
    block_bytes = 4 * 24 * (2 + drafts) * 4
    tight = EngineSettings(drafts=drafts, block_size=4, cache_bytes=20 * block_bytes, max_rows=16)
    given, engine = write(model, asked, sampling, tight)
    assert engine.batch.preemptions > 0 and engine.blocks.available == 20
    assert given == roomy


@pytest.mark.parametrize("drafts", [0, 3])
def test_shared_prefixes_are_taken_from_the_cache_and_change_nothing(drafts):
    model, settings = trained_model(), EngineSettings(drafts=drafts, block_size=4, adapt=False)
    (long,) = prompts([30])
    asked = [long, [*long[:26], 1, 2, 3, 4, 5], [*long[:13], 9, 9, 9], long[:21]]
    fresh = [write(model, [prompt], GREEDY, settings)[0][0] for prompt in asked]
    engine = Engine(model, settings)
    first = engine.add(long, GREEDY)[0]
    finish(engine)
    later = [engine.add(prompt, GREEDY)[0] for prompt in asked[1:]]
    finish(engine)
    assert [s.tokens[s.prompt_length :] for s in [first, *later]] == fresh
    shared = {0: 24 + 12 + 20, 3: 20 + 8 + 16}[drafts]
    assert engine.statistics.reused_tokens == shared


def test_samples_of_one_prompt_share_its_blocks():
    engine = Engine(trained_model(), EngineSettings(block_size=4, adapt=False))
    sequences = engine.add(prompts([22])[0], Sampling(8, temperature=1.0, seed=1), samples=4)
    finish(engine)
    assert engine.statistics.reused_tokens == 3 * 16
    assert len({tuple(s.tokens) for s in sequences}) > 1


@pytest.mark.parametrize("drafts", [0, 3])
def test_stop_tokens_and_stop_strings_end_a_text_wherever_they_come(drafts):
    """Every place of the greedy text once as a stop token and once as a stop string of three letters."""
    model, settings = trained_model(), EngineSettings(drafts=drafts, adapt=False)
    (prompt,) = prompts([6])
    sampling = replace(GREEDY, max_tokens=16)
    (whole,), _ = write(model, [prompt], sampling, settings)
    for at in range(len(whole) - 2):
        engine = Engine(model, settings, letter)
        stop = letters(whole[at : at + 3])
        by_text = engine.add(prompt, replace(sampling, stop=("zzz", stop)))[0]
        by_token = engine.add(prompt, replace(sampling, stop_tokens=frozenset([whole[at]])))[0]
        given = finish(engine)
        assert "".join(d.text for d in given[by_text]) == letters(whole)[: letters(whole).index(stop)]
        assert by_text.finish == by_token.finish == "stop"
        assert by_token.tokens[6:] == whole[: whole.index(whole[at])]
        assert "".join(d.text for d in given[by_token]) == letters(by_token.tokens[6:])
        assert engine.blocks.available == engine.blocks.num_blocks


def test_a_stop_string_that_ends_in_what_is_held_back_is_why_a_text_ends():
    """Half a character at a text's end, and a stop string of the sign that stands for it."""
    engine = Engine(random_model(BASE), PLAIN, lambda token: b"\xf0")
    (sequence,) = engine.add([1], replace(GREEDY, max_tokens=1, stop=("\ufffd",)))
    (delta,) = finish(engine)[sequence][-1:]
    assert (delta.text, delta.finish) == ("", "stop")


@pytest.mark.parametrize("drafts", [0, 3])
def test_logprobs_are_the_models_own(drafts):
    """fp32 sums in another order: 1e-4 nats."""
    model, (prompt,) = trained_model(), prompts([9])
    sampling = Sampling(10, temperature=0.7, top_p=0.9, seed=5, logprobs=3, prompt_logprobs=True)
    engine = Engine(model, EngineSettings(drafts=drafts, max_rows=4, max_sequences=1))
    sequence = engine.add(prompt, sampling)[0]
    given = finish(engine)[sequence]
    logs = torch.log_softmax(model.logits(torch.tensor([sequence.tokens]))[0], -1)
    first, *rest = [p for d in given for p in d.prompt_logprobs]
    assert first is None and len(rest) == 8
    named = [*rest, *[p for d in given for p in d.logprobs]]
    assert [p.token for p in named] == sequence.tokens[1:]
    for position, entry in enumerate(named):
        assert abs(entry.logprob - logs[position, entry.token]) < 1e-4
        best = logs[position].topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert all(abs(a - b) < 1e-4 for (_, a), b in zip(entry.top, best.values.tolist()))


def test_a_prompt_is_scored_without_a_token_made():
    engine = Engine(trained_model())
    sequence = engine.add(prompts([8])[0], Sampling(0, prompt_logprobs=True))[0]
    (delta,) = finish(engine)[sequence]
    assert len(delta.prompt_logprobs) == 8 and delta.tokens == () and delta.finish == "length"


def test_a_text_ends_where_the_models_positions_do():
    engine = Engine(trained_model(), EngineSettings(adapt=False))
    sequence = engine.add(prompts([60])[0], replace(GREEDY, max_tokens=50))[0]
    full = engine.add([1] * 64, replace(GREEDY, max_tokens=50))[0]
    finish(engine)
    assert (len(sequence.tokens), sequence.finish, len(full.tokens)) == (65, "length", 65)


def test_a_limit_of_positions_bounds_texts_and_the_cache():
    model = trained_model()
    (long,) = prompts([30])
    free, _ = write(model, [long], GREEDY, EngineSettings(block_size=4))
    limited = EngineSettings(max_sequences=1, block_size=4, positions=34, adapt=False)
    written, engine = write(model, [long], GREEDY, limited)
    assert written[0] == free[0][:5] and engine.blocks.num_blocks == -(-(34 + 3) // 4)
    with pytest.raises(RequestError, match="a text has 34 positions here"):
        engine.add([1] * 35, GREEDY)


@given(cache_bytes=st.integers(1, 200_000), positions=st.integers(1, 80))
def test_a_cache_has_room_for_what_is_asked(cache_bytes, positions):
    """Made longer if it must be; and no longer text than is said to fit is accepted, nor a shorter one refused."""
    model, settings = trained_model(), EngineSettings(block_size=4, cache_bytes=cache_bytes)
    roomy = with_room(model, settings, positions)
    assert (positions_of(model, roomy), roomy.cache_bytes >= cache_bytes) == (min(positions, 64), True)
    assert held_by_cache(model, roomy) >= positions_of(model, roomy)
    held = held_by_cache(model, settings)
    for asked in {max(1, min(held, 64)), max(1, min(held + 1, 64))}:
        fits = with_room(model, replace(settings, cache_bytes=1), asked).cache_bytes <= cache_bytes
        assert fits == (asked <= held)


def test_an_aborted_sequence_frees_its_place():
    engine = Engine(trained_model(), EngineSettings(max_sequences=1))
    first, second = engine.add([1, 2], GREEDY)[0], engine.add([3, 4], GREEDY)[0]
    engine.step()
    engine.abort(first)
    engine.abort(first)
    assert set(finish(engine)) == {second} and first.finish == "abort"
    engine.abort(second)
    assert second.finish == "length" and engine.blocks.available == engine.blocks.num_blocks


@pytest.mark.parametrize(
    ("prompt", "samples", "says"),
    [
        ([], 1, "prompt is empty"),
        ([1] * 65, 1, "has 65 tokens; a text has 64 positions here"),
        ([1, 11], 1, "token 11; tokens are numbers from 0 to 10"),
        ([1], 0, "n is 0"),
    ],
)
def test_impossible_requests_are_refused(prompt, samples, says):
    with pytest.raises(RequestError, match=says):
        Engine(trained_model()).add(prompt, GREEDY, samples)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop": ("",)},
        {"logprobs": 21},
    ],
)
def test_impossible_samplings_are_refused(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong)) if "stop" not in wrong else "stop string"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_rows": 0}, "max_rows is 0"),
        ({"drafts": -2}, "drafts is -2"),
        ({"modules": 4}, "modules is 4 for 4 drafts; the model has 3"),
        ({"modules": 0, "drafts": 2}, "modules is 0"),
        ({"cache_bytes": 1000.0}, "give the cache as much"),
        ({"cache_bytes": 24000.0}, "bytes: .* or set positions to 45 or less"),
        ({"cache_bytes": 0.0}, "must be above 0"),
        ({"positions": -1}, "positions is -1"),
    ],
)
def test_impossible_settings_are_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        Engine(trained_model(), EngineSettings(**{"block_size": 16, **wrong}))


def test_drafts_without_modules_are_refused_and_modules_can_be_left_out():
    model = random_model(BASE)
    with pytest.raises(ConfigError, match="no MTP modules"):
        Engine(model, EngineSettings(drafts=2))
    with_modules, without = Engine(trained_model()), Engine(trained_model(), PLAIN)
    sizes = [len(engine.runner.cache.entries) for engine in (with_modules, without)]
    assert sizes == [5, 2], "without drafts no module has a cache"
