"""Absorbed attention over a paged cache of latents: what decoding spends its time in.

The latent is key and value of all heads at once, so every entry is read once for all of them. On a GPU a Triton kernel
(`decode_triton`) reads the blocks where they lie. A verified draft is just more queries of the same sequence, each with
its own last key. On a CPU, and for dtypes but bf16, the reference runs.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def decode_attention(
    query: Float[Tensor, "B S N W"],
    entries: Float[Tensor, "P W"],
    blocks: Int[Tensor, "B M"],
    positions: Int[Tensor, "B S"],
    size: int,
    latent: int,
    scale: float,
) -> Float[Tensor, "B S N C"]:
    """Each query's mean of the latents of its sequence's entries up to its position, weighted by softmax(scale q·k).

    Entry p of sequence b lies at row `blocks[b, p // size] * size + p % size`; its first `latent` numbers are the
    value.
    """
    if query.is_cuda and query.dtype == torch.bfloat16 and latent >= 16 and latent.bit_count() == 1:
        from counterflow.kernels.decode_triton import decode  # a CPU build of PyTorch comes without Triton

        return decode(query, entries, blocks, positions, size, latent, scale)
    return reference(query, entries, blocks, positions, size, latent, scale)


def reference(
    query: Tensor, entries: Tensor, blocks: Tensor, positions: Tensor, size: int, latent: int, scale: float
) -> Tensor:
    """The same in plain PyTorch: gather, product, softmax, product."""
    seen = entries.view(-1, size, entries.shape[-1])[blocks].flatten(1, 2)
    scores = torch.einsum("bsnw,bkw->bsnk", query, seen).float() * scale
    keys = torch.arange(seen.shape[1], device=query.device)
    scores.masked_fill_(keys > positions[:, :, None, None], float("-inf"))
    p = torch.softmax(scores, dim=-1).to(query.dtype)
    return torch.einsum("bsnk,bkc->bsnc", p, seen[..., :latent])
