"""What `/metrics` says, in Prometheus' text format; the engine's sums are read as they are."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from counterflow.infer.engine import Engine

BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Histogram:
    """Seconds, counted by bucket."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Prometheus' cumulated buckets, sum and count."""
        total = 0
        for limit, count in zip((*BUCKETS_S, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{limit}"}} {total}'
        yield f"{name}_sum {self.sum_s}"
        yield f"{name}_count {total}"


class Metrics:
    """The server's own counts; requests by path and status, and how long they took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.request_s, self.first_token_s = Histogram(), Histogram()

    def text(self, engine: Engine, under_way: int) -> str:
        """All of it."""
        lines = ["# TYPE counterflow_http_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'counterflow_http_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, histogram in (("request", self.request_s), ("first_token", self.first_token_s)):
            lines.append(f"# TYPE counterflow_{name}_seconds histogram")
            lines += histogram.lines(f"counterflow_{name}_seconds")
        for name, value in _gauges(engine, under_way).items():
            lines += [f"# TYPE counterflow_{name} gauge", f"counterflow_{name} {value}"]
        for name, value in _sums(engine).items():
            lines += [f"# TYPE counterflow_{name}_total counter", f"counterflow_{name}_total {value}"]
        for name, counts in (("reached", engine.statistics.reached), ("kept", engine.statistics.kept)):
            lines.append(f"# TYPE counterflow_drafts_{name}_total counter")
            for position, count in enumerate(list(counts), start=1):
                lines.append(f'counterflow_drafts_{name}_total{{position="{position}"}} {count}')
        return "\n".join(lines) + "\n"


def _gauges(engine: Engine, under_way: int) -> dict[str, float]:
    return {
        "texts_under_way": under_way,
        "sequences_running": len(engine.batch.running),
        "cache_blocks": engine.blocks.num_blocks,
        "cache_blocks_available": engine.blocks.available,
    }


def _sums(engine: Engine) -> dict[str, float]:
    statistics = engine.statistics
    return {
        "prompt_tokens": statistics.prompt_tokens,
        "reused_tokens": statistics.reused_tokens,
        "tokens": statistics.tokens,
        "steps": statistics.steps,
        "preemptions": statistics.preemptions,
        "draft_seconds": statistics.draft_s,
        "model_seconds": statistics.model_s,
    }
