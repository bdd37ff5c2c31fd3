"""Moments on a device: the clock on a CPU, events on the current stream of a GPU, read once it has passed them."""

import time

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """This moment."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Mark, end: Mark) -> float:
    """Seconds from one to the other; waits for the device."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event), "both of one device"
    end.synchronize()
    return start.elapsed_time(end) / 1e3
