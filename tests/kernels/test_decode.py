"""Decoding's attention against a plain loop, and on a GPU its kernel against the reference."""

import pytest
import torch

from counterflow.kernels.decode import decode_attention, reference


def case(
    batch: int, queries: int, heads: int, longest: int, size: int, latent: int, rotary: int, seed: int = 0
):
    """Ragged sequences in blocks of random order, each query at its own last positions."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-longest // size)
    order = torch.randperm(batch * blocks, generator=generator).view(batch, blocks)
    entries = torch.randn(batch * blocks * size, latent + rotary, generator=generator)
    query = torch.randn(batch, queries, heads, latent + rotary, generator=generator)
    last = torch.randint(queries - 1, longest, (batch, 1), generator=generator)
    positions = last - torch.arange(queries).flip(0)
    return query, entries, order, positions


def test_the_reference_is_a_loop_over_queries():
    size, latent = 4, 5
    query, entries, blocks, positions = case(3, 2, 3, 11, size, latent, 2)
    got = reference(query, entries, blocks, positions, size, latent, 0.3)
    for b in range(3):
        for s in range(2):
            rows = [int(blocks[b, p // size]) * size + p % size for p in range(int(positions[b, s]) + 1)]
            for n in range(3):
                p = torch.softmax(0.3 * entries[rows] @ query[b, s, n], 0)
                assert torch.allclose(got[b, s, n], p @ entries[rows][:, :latent], atol=1e-5)
    assert torch.equal(decode_attention(query, entries, blocks, positions, size, latent, 0.3), got)


@pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning"
)  # of an empty split, which weighs nothing
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the kernel, as the next test does")
def test_the_kernel_interpreted_equals_the_reference():
    """Under the hook that checks types, which must leave what Triton reads as it is written."""
    triton = pytest.importorskip(
        "counterflow.kernels.decode_triton", reason="this PyTorch comes without Triton"
    )
    query, entries, blocks, positions = case(2, 2, 3, 300, 16, 16, 4)
    expected = reference(query, entries, blocks, positions, 16, 16, 0.2)
    assert (triton.decode(query, entries, blocks, positions, 16, 16, 0.2) - expected).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 5, 16, 128])
@pytest.mark.parametrize(
    ("batch", "queries", "longest", "size"),
    [(1, 1, 1, 16), (3, 1, 700, 16), (2, 3, 257, 64), (5, 2, 3000, 64)],
)
def test_the_kernel_is_the_reference(heads, batch, queries, longest, size):
    """bf16 products and fp32 sums on both sides: 2 % of the largest, three times what was seen."""
    longest = max(longest, queries)
    query, entries, blocks, positions = case(batch, queries, heads, longest, size, 512, 64, heads)
    query, entries = query.cuda().bfloat16(), entries.cuda().bfloat16()
    settings = (blocks.cuda(), positions.cuda(), size, 512, 192**-0.5)
    got, want = decode_attention(query, entries, *settings), reference(query, entries, *settings)
    assert (got - want).float().abs().max() <= 0.02 * want.float().abs().max()
