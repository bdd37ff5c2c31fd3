"""Keeps freed memory in the process, because a CPU training step asks for the same blocks again and again.

glibc hands blocks above a threshold back to the kernel at once and faults every page in again at the next
request: cloning a 32 MiB tensor took 9.8 ms with that and 1.6 ms without (records/2026-11-23-cpu-kernels). Not taken:
preallocated output buffers for every operation, which tie the model's code to the allocator's habits.
"""

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep and reuse freed blocks up to 1 GiB each; False where there is no such call.

    Costs: the process's resident memory stays at its peak. No effect on CUDA memory.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(
        M_MMAP_THRESHOLD, 1 << 25
    )  # older glibc allows 32 MiB
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1)) and bool(kept)
