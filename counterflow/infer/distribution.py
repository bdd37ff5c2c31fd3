"""The distribution a token is drawn from: temperature, then top-k, then top-p; and a draw from it.

A draw is the inverse of the cumulated probabilities at a number from the sequence's own generator, so that what
runs beside a sequence cannot change its randomness; the sums are in double precision, where no likely token
is lost. Temperature 0 is the limit: all probability on the best token.
"""

from collections.abc import Sequence as Items

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.infer.request import Sampling
from counterflow.infer.states import upload


def distribution(logits: Float[Tensor, "*B V"], samplings: Items[Sampling]) -> Float[Tensor, "*B V"]:
    """Each row's probabilities after its request's temperature, top-k and top-p; the first dim is requests."""
    temperature = _column(logits, [s.temperature for s in samplings])
    p = torch.softmax(logits / torch.where(temperature > 0, temperature, 1.0), dim=-1)
    vocab = logits.shape[-1]
    if any(s.temperature and (s.top_p < 1 or 0 < s.top_k < vocab) for s in samplings):
        p = _limited(p, samplings)
    if all(s.temperature for s in samplings):
        return p
    best = torch.zeros_like(p).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(temperature > 0, p, best)


def _limited(p: Float[Tensor, "*B V"], samplings: Items[Sampling]) -> Float[Tensor, "*B V"]:
    ranked, ids = p.sort(dim=-1, descending=True, stable=True)
    top_k = _column(p, [s.top_k or p.shape[-1] for s in samplings])
    ranked = ranked.masked_fill(torch.arange(p.shape[-1], device=p.device) >= top_k, 0.0)
    top_p = _column(p, [s.top_p for s in samplings])
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.masked_fill(before >= top_p * ranked.sum(-1, keepdim=True), 0.0)
    kept = torch.zeros_like(p).scatter_(-1, ids, ranked)
    return kept / kept.sum(-1, keepdim=True)


def _column(like: Float[Tensor, "*B V"], values: Items[float]) -> Float[Tensor, "..."]:
    """One value a request, to be broadcast over the rest of `like`."""
    return upload(values, like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


def draw(p: Float[Tensor, "B V"], uniform: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The token at which the cumulated probabilities, which need not sum to 1, pass `uniform` of their sum."""
    sums = p.double().cumsum(-1)
    at = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    return at[:, 0].clamp_max(p.shape[-1] - 1)
