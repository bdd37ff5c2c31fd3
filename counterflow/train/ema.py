"""Averaged weights, kept in CPU memory so that they cost the accelerator no memory.

A GPU's weights are all copied before one wait, rather than with a wait each. Not taken: averaging in the background
during the next step; a checkpoint would then have to wait for it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """average += (1 − decay) (weight − average), in fp32 on the CPU, after every step. [§3.2.3 EMA]

    Starts from the weights it is given.   Cost: a copy to the CPU and one pass there a step.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = dict(weights)
        self.averages = {name: weight.detach().float().cpu().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take up the weights as they are now."""
        weights = [weight.detach() for weight in self._weights.values()]
        latest = [weight.to("cpu", torch.float32, non_blocking=True) for weight in weights]
        for device in {weight.device for weight in weights if weight.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        torch._foreach_lerp_(list(self.averages.values()), latest, 1.0 - self.decay)
