"""Samples text from a model token by token, with nothing cached: every token runs the whole sequence.

Plain on purpose: it is the reference for the engine with its cached latents. MTP modules take no part.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from counterflow.errors import ConfigError
from counterflow.model.transformer import Transformer


def choose_token(
    logits: Float[Tensor, "V"], temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """One token: the best at temperature 0, else drawn from the fewest best tokens that hold `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    p, ids = torch.softmax(logits.double() / temperature, dim=-1).sort(descending=True, stable=True)
    p[p.cumsum(0) - p >= top_p] = 0
    return int(ids[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def sample_tokens(
    model: Transformer,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Up to `max_tokens` tokens after a prompt of at least one, ending before a stop token.

    A context longer than the model's positions keeps its latest part.   Cost: one whole forward a token.
    """
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ConfigError(
            f"temperature is {temperature} and top_p {top_p}; temperature must be 0 (greedy) or above, "
            "top_p above 0 and at most 1."
        )
    if not prompt:
        raise ConfigError(
            "the prompt is empty; give at least one token (the end token starts a new document)."
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        window = torch.tensor([tokens[-model.config.max_positions :]], device=model.head.device)
        token = choose_token(model.logits(window)[0, -1].float().cpu(), temperature, top_p, generator)
        if token in stop:
            return
        tokens.append(token)
        yield token
