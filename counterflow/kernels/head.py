"""Logits, cross-entropy and both gradients in one pass over blocks of tokens: no logits outlive a block.

At 671B the logits of one 4K sequence take 2 GB a prediction depth; kept for backward they would be the
largest activation of the model. A block's gradient is known as soon as its softmax is, so forward makes it at
once: the gradient of the hidden states is kept (T × D), that of the head's weight is added where it belongs,
and backward only hands the former on. The other way, recomputing logits in backward, costs a third product of
that size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.kernels.product import add_product

BLOCK_BYTES = 8 << 20
"""Of fp32 logits in one block on a CPU: what stays in its last-level cache."""
BLOCK_BYTES_GPU = 2 << 30
"""The weight's gradient, as large as the weight in fp32, is read and written once a block: long blocks, few times."""


def token_blocks(tokens: int, vocab: int, is_cuda: bool) -> range:
    """Starts of the blocks; the step is the block's length in tokens."""
    budget = BLOCK_BYTES_GPU if is_cuda else BLOCK_BYTES
    return range(0, tokens, max(1, budget // (4 * vocab)))


def cross_entropy(
    h: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "T"],
    dweight: Float[Tensor, "V D"] | None,
    scale: float,
) -> tuple[Float[Tensor, "T"], Float[Tensor, "T D"] | None]:
    """−log p(target) of every token in fp32 nats, and scale × its gradient with respect to h.

    With `dweight` (fp32) given, scale × the weight's gradient is added to it; without, no gradient is made at
    all. Cost: one product forward and two for the gradients.   Memory: one block of logits.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    nll = h.new_empty(len(h), dtype=wide)
    dh = torch.empty_like(h) if dweight is not None else None
    blocks = token_blocks(len(h), len(weight), h.is_cuda)
    for start in blocks:
        rows = slice(start, min(start + blocks.step, len(h)))
        nll[rows], dlogits = _entropy(h[rows] @ weight.t(), targets[rows], scale if dh is not None else None)
        if dh is not None and dweight is not None and dlogits is not None:
            torch.mm(dlogits, weight, out=dh[rows])
            add_product(dweight, dlogits, h[rows])
    return nll, dh


def _entropy(
    logits: Float[Tensor, "T V"], targets: Int[Tensor, "T"], scale: float | None
) -> tuple[Float[Tensor, "T"], Float[Tensor, "T V"] | None]:
    """−log p(target) of every row, and with a scale, scale × its gradient; the logits are used up."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from counterflow.kernels import head_triton  # a CPU build of PyTorch comes without Triton

        nll = head_triton.cross_entropy_(logits, targets, scale)
        return nll, logits if scale is not None else None
    p = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    target = targets[:, None]
    # log Σ exp without another pass: the largest probability is 1 / Σ exp(logit − largest logit).
    log_sum = logits.amax(-1).to(p.dtype) - p.amax(-1).log()
    nll = log_sum - logits.gather(1, target)[:, 0].to(p.dtype)
    if scale is None:
        return nll, None
    one_less = p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
    return nll, one_less.to(logits.dtype).mul_(scale)
