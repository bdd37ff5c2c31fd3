"""SwiGLU on the two halves of one projection, with the gate of the token-expert pair folded in.

The gate multiplies here, before the down projection, so that no expert output has to be kept for the gate's
own gradient [PAPER: where the gate is applied]. Forward keeps only its input; backward makes the product
again, which costs one pass and saves the widest activation of the layer [§3.2.3].
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def swiglu(gate_up: Float[Tensor, "P F2"], gates: Float[Tensor, "P"] | None) -> Float[Tensor, "P F"]:
    """silu(first half) × second half × gate of the row, F = F2 / 2."""
    if gate_up.is_cuda and gate_up.dtype != torch.float64:
        from counterflow.kernels import swiglu_triton  # a CPU build of PyTorch comes without Triton

        return swiglu_triton.swiglu(gate_up, gates)
    left, right = gate_up.chunk(2, dim=-1)
    out = F.silu(left).mul_(right)
    return out if gates is None else out.mul_(gates.to(out.dtype)[:, None])


def swiglu_backward(
    dout: Float[Tensor, "P F"], gate_up: Float[Tensor, "P F2"], gates: Float[Tensor, "P"] | None
) -> tuple[Float[Tensor, "P F2"], Float[Tensor, "P"] | None, Float[Tensor, "P F"]]:
    """Gradients of the input and of the gates, and the forward's output (the weight gradient's operand)."""
    if gate_up.is_cuda and gate_up.dtype != torch.float64:
        from counterflow.kernels import swiglu_triton

        return swiglu_triton.swiglu_backward(dout, gate_up, gates)
    left, right = gate_up.chunk(2, dim=-1)
    silu = F.silu(left)
    out = silu * right
    dgates = None
    if gates is not None:
        dgates = torch.linalg.vecdot(
            *(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dout, out))
        )
        column = gates.to(out.dtype)[:, None]
        dout, out = dout * column, out.mul_(column)
    dgate_up = torch.empty_like(gate_up)
    torch.mul(dout, silu, out=dgate_up[:, silu.shape[1] :])
    dgate_up[:, : silu.shape[1]] = torch.ops.aten.silu_backward(dout * right, left)
    return dgate_up, dgates, out
