"""Absorbed = expanded, incremental = whole, paged = contiguous, batched = alone, on ragged lengths in fp32.

The forms sum the same products in another order. Hidden states and logits are near 1, sums some hundred terms
long: measured differences are 1e-6 to 4e-6, the bound is 5e-5.
"""

from dataclasses import replace

import pytest
import torch

from counterflow.config.model import Yarn
from counterflow.infer import attend as attention_forms
from counterflow.infer import passes
from counterflow.infer.cache import SHORT, Cache, Extent
from counterflow.model.transformer import Transformer
from tests.model.configs import BASE, random_model

CONFIGS = {
    "latent": BASE,
    "no_latent": replace(BASE, q_lora_rank=0, num_layers=2),
    "yarn": replace(BASE, num_layers=2, yarn=Yarn(factor=4.0, original_max_positions=16)),
}
BOUND = 5e-5
LENGTHS = (1, 7, 16, 33, 50)


def prompts(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, BASE.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def scattered(count: int, size: int, positions: int) -> list[list[int]]:
    """For each sequence blocks in no order, none shared."""
    need = -(-positions // size)
    order = torch.randperm(count * need, generator=torch.Generator().manual_seed(1)).tolist()
    return [order[i * need : (i + 1) * need] for i in range(count)]


def run(model: Transformer, texts: list[list[int]], size: int, chunks: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every position of every text, run in passes; chunks[i] cuts text i."""
    blocks = scattered(len(texts), size, 64)
    cache = Cache(model, sum(map(len, blocks)), size, 0)
    done = [0] * len(texts)
    out: list[list[torch.Tensor]] = [[] for _ in texts]
    for turn in range(max(map(len, chunks))):
        extents, chosen = [], [i for i, cuts in enumerate(chunks) if turn < len(cuts)]
        for i in chosen:
            extents.append(Extent(done[i], done[i] + chunks[i][turn], blocks[i]))
        rows = cache.rows(extents)
        flat = [
            token for at in rows.order for token in texts[chosen[at]][extents[at].start : extents[at].end]
        ]
        h = passes.run_trunk(model, torch.tensor(flat), rows, cache)
        for at, i in enumerate(chosen):
            length = chunks[i][turn]
            out[i].append(passes.logits_of(model, h[rows.starts[at] : rows.starts[at] + length]))
            done[i] += length
    return [torch.cat(pieces) for pieces in out]


def furthest(ours: list[torch.Tensor], model: Transformer, texts: list[list[int]]) -> float:
    whole = [model.logits(torch.tensor([text]))[0] for text in texts]
    return max(float((a - b).abs().max()) for a, b in zip(ours, whole, strict=True))


def cut(length: int, chunk: int) -> list[int]:
    return [min(chunk, length - start) for start in range(0, length, chunk)]


@pytest.fixture(params=["absorbed", "expanded"])
def form(request, monkeypatch) -> str:
    monkeypatch.setattr(attention_forms, "prefers_absorbed", lambda *_: request.param == "absorbed")
    return request.param


@pytest.mark.parametrize(("size", "chunk"), [(1, 5), (4, 1), (4, SHORT + 4), (64, 5), (64, 64)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_passes_over_pages_equal_the_whole_model(name, chunk, size, form):
    """Both forms, token by token and in chunks, in pages of any size (64 is contiguous), ragged and together."""
    model = random_model(CONFIGS[name])
    texts = prompts()
    ours = run(model, texts, size, [cut(len(text), chunk) for text in texts])
    assert furthest(ours, model, texts) < BOUND


@torch.no_grad()
def test_chunks_of_prompts_and_single_tokens_share_a_pass():
    model = random_model(BASE)
    texts = prompts((40, 30, 20, 50))
    cuts = [[1] * 40, [25, 5], [3, 17], [17, 1, 1, 20, 11]]
    assert furthest(run(model, texts, 4, cuts), model, texts) < BOUND


@torch.no_grad()
def test_batched_equals_alone():
    model = random_model(BASE)
    texts = prompts((1, 7, 16))
    together = run(model, texts, 8, [[1] * len(text) for text in texts])
    for text, ours in zip(texts, together, strict=True):
        (alone,) = run(model, [text], 8, [[1] * len(text)])
        assert (ours - alone).abs().max() < BOUND


@torch.no_grad()
def test_a_cut_cache_goes_on_as_if_the_rejected_rows_had_never_been():
    model = random_model(BASE)
    (text,) = prompts((30,))
    blocks, wrong = list(range(16)), [(t + 1) % BASE.vocab_size for t in text]
    cache = Cache(model, 16, 4, 0)
    for start, end, tokens in ((0, 12, text), (12, 20, wrong), (12, 30, text)):
        rows = cache.rows([Extent(start, end, blocks)])
        h = passes.run_trunk(model, torch.tensor(tokens[start:end]), rows, cache)
    assert (passes.logits_of(model, h) - model.logits(torch.tensor([text]))[0, 12:]).abs().max() < BOUND


@torch.no_grad()
def test_the_cache_holds_the_latent_and_the_rotary_key_alone():
    model = random_model(BASE)
    cache = Cache(model, 8, 4, modules=0)
    assert cache.entries.shape == (BASE.num_layers, 32 + 4, BASE.kv_lora_rank + BASE.qk_rope_head_dim)


def test_the_cheaper_form_is_taken():
    """At 671B's shapes 512 × 256 / (1024 − 256) = 170.7 queries break even over many keys."""
    model = random_model(BASE)
    cache = Cache(model, 1024, 64, 0)
    wide = replace(BASE, kv_lora_rank=512, qk_nope_head_dim=128, v_head_dim=128, qk_rope_head_dim=64)
    cache.rope = torch.ones(65536, 4, dtype=torch.complex64)
    for queries, absorbed in ((1, True), (160, True), (180, False), (1000, False)):
        (group,) = cache.rows([Extent(60_000, 60_000 + queries, list(range(1024)))]).groups
        assert attention_forms.prefers_absorbed(wide, group) == absorbed
