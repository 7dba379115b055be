"""What did the counters of /metrics do between two scrapes?

A counter that has fallen means that the server was started again in between: then everything it
counts is of the time between the scrapes, and it is measured from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from llm_serving.errors import ConfigError

__all__ = ["Change", "Histogram"]

_Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
_STARTED = "process_start_time_seconds"
_COUNTING = ("_total", "_count", "_sum", "_bucket")


@dataclass(frozen=True, slots=True)
class Histogram:
    """What was observed between two scrapes."""

    bounds: list[float]  # the last is infinite
    counts: list[float]  # of each bucket alone
    total: float

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """As if the values of a bucket were spread evenly over it; 0 of nothing."""
        rank, below = share * self.count, 0.0
        for i, count in enumerate(self.counts):
            lower = self.bounds[i - 1] if i else 0.0
            if count and below + count >= rank:
                upper = self.bounds[i]
                return (
                    lower if math.isinf(upper) else lower + (upper - lower) * (rank - below) / count
                )
            below += count
        return 0.0


class Change:
    """All series of a scrape, less those of an earlier one; `model_name` does not matter."""

    def __init__(self, before: str, after: str) -> None:
        """Raises ConfigError for what is no exposition of metrics."""
        earlier, self._after = _parse(before), _parse(after)
        self.was_restarted = any(
            value > self._after.get(key, 0.0)
            if key[0].endswith(_COUNTING)
            else key[0] == _STARTED and value != self._after.get(key)
            for key, value in earlier.items()
        )
        self._before: _Series = {} if self.was_restarted else earlier

    def knows(self, name: str) -> bool:
        return any(key[0] == name for key in self._after)

    def total(self, name: str, **labels: str) -> float:
        """The change of a counter, summed over the series that have these labels."""
        return sum(
            value - self._before.get(key, 0.0)
            for key, value in self._after.items()
            if key[0] == name and labels.items() <= key[1]
        )

    def now(self, name: str) -> float:
        """A gauge, at the end."""
        return sum(value for key, value in self._after.items() if key[0] == name)

    def labels(self, name: str, label: str) -> list[str]:
        """Values of a label, in the order of the exposition."""
        seen = [dict(key[1]).get(label) for key in self._after if key[0] == name]
        return [value for value in dict.fromkeys(seen) if value is not None]

    def histogram(self, name: str, **labels: str) -> Histogram:
        bounds = sorted(map(float, self.labels(f"{name}_bucket", "le")))
        spelled = {float(text): text for text in self.labels(f"{name}_bucket", "le")}
        sums = [self.total(f"{name}_bucket", **labels, le=spelled[bound]) for bound in bounds]
        counts = [high - low for high, low in zip(sums, [0.0, *sums], strict=False)]
        return Histogram(bounds, counts, self.total(f"{name}_sum", **labels))


def _parse(text: str) -> _Series:
    try:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except ValueError as exc:
        raise ConfigError(f"/metrics is not in the Prometheus text format: {exc}") from exc
