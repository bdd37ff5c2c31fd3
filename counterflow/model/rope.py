"""Rotary positions on adjacent pairs, and YaRN's stretched frequencies for long contexts.

Pairs are adjacent elements (interleaved), as the released weights have them, turned as complex numbers in
fp32. The table is made once and passed in; a chunk of a sequence takes its own slice, so nothing here knows
about positions.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from counterflow.config.model import ModelConfig, Yarn


def rope_table(config: ModelConfig, positions: int) -> Complex[Tensor, "S R2"]:
    """e^(i · position · frequency) for every position and pair, complex64, R2 = R / 2 pairs."""
    pairs = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (pairs / config.qk_rope_head_dim)
    length = 1.0
    if config.yarn is not None:
        frequencies = yarn_frequencies(frequencies, config, config.yarn)
        length = yarn_mscale(config.yarn.factor, config.yarn.mscale)
        length /= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.polar(torch.full_like(angles, length), angles)


def yarn_frequencies(plain: Float[Tensor, "R2"], config: ModelConfig, yarn: Yarn) -> Float[Tensor, "R2"]:
    """Slow pairs divided by the factor, fast ones kept, a linear ramp between. [§4.3]"""
    dim = config.qk_rope_head_dim

    def pair_turning(turns: float) -> float:
        positions = yarn.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(positions) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1.0 - ramp.clamp(0.0, 1.0)
    return plain / yarn.factor * (1.0 - keep) + plain * keep


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1, YaRN's growth of the logits with the context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """(H + R)^−½, times mscale² at every length once YaRN is on, as the released weights were trained."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale
