"""What `/metrics` says, in Prometheus' text format; what an engine counts bears the label of its rank."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from counterflow.serve.desk import Numbers

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

    def __init__(self, loading_s: float = 0.0) -> None:
        self.loading_s = loading_s
        """From the command until the server could listen."""
        self.requests: Counter[tuple[str, int]] = Counter()
        self.request_s, self.first_token_s = Histogram(), Histogram()

    def text(self, numbers: Sequence[Numbers], under_way: int) -> str:
        """All of it; `numbers` are each rank's."""
        lines = ["# TYPE counterflow_http_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'counterflow_http_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, histogram in (("request", self.request_s), ("first_token", self.first_token_s)):
            lines.append(f"# TYPE counterflow_{name}_seconds histogram")
            lines += histogram.lines(f"counterflow_{name}_seconds")
        for name, value in (("loading_seconds", self.loading_s), ("texts_under_way", under_way)):
            lines += [f"# TYPE counterflow_{name} gauge", f"counterflow_{name} {value}"]
        lines += _by_rank("gauge", [_gauges(each) for each in numbers])
        lines += _by_rank("counter", [_sums(each) for each in numbers])
        return "\n".join(lines) + "\n"


def _by_rank(kind: str, values: list[dict[str, list[float]]]) -> Iterator[str]:
    """Each name's values by rank, and by position where there is one for each draft of a chain."""
    for name in values[0]:
        yield f"# TYPE counterflow_{name} {kind}"
        for rank, found in enumerate(values):
            for position, value in enumerate(found[name], start=1):
                place = f',position="{position}"' if name.startswith("drafts") else ""
                yield f'counterflow_{name}{{rank="{rank}"{place}}} {value}'


def _gauges(numbers: Numbers) -> dict[str, list[float]]:
    return {
        "sequences_running": [numbers.running],
        "cache_blocks": [numbers.blocks],
        "cache_blocks_available": [numbers.available],
    }


def _sums(numbers: Numbers) -> dict[str, list[float]]:
    statistics = numbers.statistics
    return {
        "prompt_tokens_total": [statistics.prompt_tokens],
        "reused_tokens_total": [statistics.reused_tokens],
        "tokens_total": [statistics.tokens],
        "steps_total": [statistics.steps],
        "preemptions_total": [statistics.preemptions],
        "draft_seconds_total": [statistics.draft_s],
        "model_seconds_total": [statistics.model_s],
        "drafts_reached_total": list(statistics.reached),
        "drafts_kept_total": list(statistics.kept),
    }
