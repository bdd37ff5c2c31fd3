"""Which share of the all-to-all ran beside computation, kernel by kernel, and its timeline: from torch's profiler.

Ops are annotated when they are issued; a kernel belongs to the op within whose time its launch lies. What runs on the
stream of the most attention kernels is computation, but for kernels that only wait for other ranks; what runs on any
other stream is all-to-all, copies by the copy engine included.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from counterflow.schedule.words import TRANSFERS, Op, Span

Interval = tuple[float, float]
WAITING = ("await_rows", "await_room")
"""Kernels that compute nothing."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def profiled(act: Callable[[], object]) -> list[dict[str, Any]]:
    """The events of one act, as Chrome's trace format has them; times in µs."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        act()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def kernels(
    events: Sequence[Mapping[str, Any]], ops: Mapping[str, Op]
) -> list[tuple[Op, bool, str, Interval]]:
    """(op, whether on the computing stream, name, seconds) of every kernel and copy that an annotated op launched."""
    issued = sorted(
        (event["ts"], event["ts"] + event["dur"], ops[event["name"]])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in ops
    )
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found, at = [], 0
    device = [event for event in events if event.get("cat") in ON_DEVICE]
    device = [event for event in device if event["args"].get("correlation") in launches]
    for event in sorted(device, key=lambda event: launches[event["args"]["correlation"]]):
        moment = launches[event["args"]["correlation"]]
        while at < len(issued) and issued[at][1] < moment:
            at += 1
        if at < len(issued) and issued[at][0] <= moment:
            seconds = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
            found.append((issued[at][2], event["args"].get("stream"), event["name"], seconds))
    streams = Counter(stream for op, stream, _, _ in found if op.part not in TRANSFERS)
    computing = streams.most_common(1)[0][0] if streams else None
    return [(op, stream == computing, name, seconds) for op, stream, name, seconds in found]


def coincidence(found: Sequence[tuple[Op, bool, str, Interval]]) -> float:
    """The share of all-to-all time during which computation runs; 1 where nothing travels."""
    computing = _union([time for _, computes, name, time in found if computes and not _waits(name)])
    moving = _union([time for _, computes, _, time in found if not computes])
    whole = sum(end - start for start, end in moving)
    return _common(computing, moving) / whole if whole else 1.0


def spans(found: Sequence[tuple[Op, bool, str, Interval]], rank: int) -> list[Span]:
    """Each op from its first kernel's start to its last one's end, in its lane; without those that only wait."""
    edges: dict[Op, Interval] = {}
    for op, computes, name, (start, end) in found:
        if _waits(name) or computes == (op.part in TRANSFERS):
            continue
        known = edges.get(op, (start, end))
        edges[op] = min(start, known[0]), max(end, known[1])
    return [Span(rank, op, start, end) for op, (start, end) in edges.items()]


def _waits(name: str) -> bool:
    return any(word in name for word in WAITING)


def _union(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _common(one: list[Interval], other: list[Interval]) -> float:
    """Length of what two unions share."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total
