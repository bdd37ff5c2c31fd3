"""Even expert load: the bias step, the complementary sequence-wise loss, and conventional losses as baseline.

The bias follows the load over the whole batch of a step and pushes with a fixed speed against it; no gradient
is involved, so the language model's loss is left alone. The sequence-wise loss only guards against a single
lopsided sequence. Counts are integers and come back from forward as a result, never added to a buffer there:
so recomputation and evaluation cannot count twice.

Where the report is silent: f of Eq. 18 uses the unbiased scores' top-K without group limit, as printed;
losses are averaged over the sequences of the global batch and summed over layers.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.config.model import Balance


@torch.no_grad()
def step_bias(bias: Float[Tensor, "*L E"], counts: Int[Tensor, "*L E"], speed: float) -> None:
    """bias += speed · sign(mean load − load), in place, once a step. [§2.1.2 bias]"""
    total = counts.sum(-1, keepdim=True)
    bias += speed * torch.sign(total - counts * counts.shape[-1]).to(bias.dtype)


def max_violation(counts: Int[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """MaxVio: how far the busiest expert's load lies above the mean, relative to it; 0 is perfect balance."""
    mean = counts.double().mean(-1)
    return (counts.double().amax(-1) / mean.clamp_min(1e-12) - 1).float()


def load_entropy(counts: Int[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """Entropy of the experts' loads over that of even loads: 1 is even, 0 is one expert for all."""
    share = counts.double() / counts.double().sum(-1, keepdim=True).clamp_min(1e-12)
    return (torch.special.entr(share).sum(-1) / math.log(counts.shape[-1])).float()


def sequence_loss(scores: Float[Tensor, "B S E"], num_chosen: int, alpha: float) -> Float[Tensor, "B"]:
    """α Σ f P of each sequence: its fractions chosen times its mean normalised scores. [Eq. 17-20]"""
    experts = scores.shape[-1]
    chosen = scores.detach().topk(num_chosen, dim=-1, sorted=False).indices
    f = _frequencies(chosen, experts).to(scores.dtype)
    p = (scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)).mean(1)
    return alpha * (f * p).sum(-1)


def auxiliary_loss(
    scores: Float[Tensor, "T E"], ids: Int[Tensor, "T K"], balance: Balance
) -> Float[Tensor, ""]:
    """The conventional loss over all tokens at hand: α E Σ (share of choices) × (mean normalised score).

    `switch` counts every choice of a token (Switch Transformer's f, widened from top-1 to top-K as V2 does);
    `gshard` counts its first choice only (GShard's c / S).
    """
    if balance.auxiliary == "gshard":
        ids = scores.detach().argmax(-1, keepdim=True)
    f = _frequencies(ids[None], scores.shape[-1])[0].to(scores.dtype)
    p = (scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)).mean(0)
    return balance.auxiliary_alpha * (f * p).sum()


def _frequencies(chosen: Int[Tensor, "B S K"], experts: int) -> Float[Tensor, "B E"]:
    """Share of the choices that fell on each expert, times E: 1 is even."""
    batch, length, num_chosen = chosen.shape
    counts = torch.zeros(batch, experts, dtype=torch.float64, device=chosen.device)
    counts.scatter_add_(1, chosen.flatten(1), counts.new_ones(()).expand(batch, length * num_chosen))
    return counts * (experts / (num_chosen * length))
