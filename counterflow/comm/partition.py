"""How a GPU's multiprocessors are divided between communication and computation: one number, kept by everybody.

What communicates is bounded from above: our kernels by their grids, NCCL by the CTAs of each communicator, and as many
are left free by the matmuls, whose persistent kernels would otherwise hold them all while a transfer waits for one.
Green contexts, which divide a GPU in hardware, were not taken: they come in steps of eight and every library's stream
would have to be made in one.
"""

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

CHANNEL = 1
"""CTAs of a pipeline channel: a micro-batch's hidden states, a few hundred microseconds beside many milliseconds."""


def expert_share(multiprocessors: int, pipelined: bool) -> int:
    """Of the number for all communication, how many move tokens to experts; a pipeline's channels keep a quarter."""
    return max(1, multiprocessors - multiprocessors // 4 * pipelined) if multiprocessors else 0


def capped(multiprocessors: int, device: torch.device) -> Any:
    """Options of a group whose NCCL kernels take at most so many CTAs, each a multiprocessor; None: no cap.

    NCCL rounds channels up to a power of two, so the largest one within the number is asked for.
    """
    if not multiprocessors or device.type != "cuda" or "nccl" not in dist.get_backend_config():
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = 1 << (multiprocessors.bit_length() - 1)
    options.config.min_ctas = 1
    options._timeout = timedelta(minutes=30)  # a group's own; torch warns where the two differ
    return options


def carve(multiprocessors: int, device: torch.device) -> None:
    """Keep so many multiprocessors out of this process's matmuls; 0: matmuls take what there is."""
    if device.type != "cuda":
        if multiprocessors:
            logging.getLogger(__name__).info(
                "parallel.multiprocessors is %d and does nothing here: the device is a CPU.", multiprocessors
            )
        return
    # cuBLAS's own kernels take no notice, cuBLASLt's and the grouped ones do.
    torch.backends.cuda.preferred_blas_library("cublaslt" if multiprocessors else "default")
    torch._C._set_sm_carveout_experimental(multiprocessors or None)
