"""Beyond which figure is something slow?  One table; docs/troubleshooting.md shows the same.

A threshold is wide: it is not the figure of a good machine but one that no healthy machine misses,
so that "slow" is worth a look.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_serving.diagnostics.findings import Verdict

__all__ = ["THRESHOLDS", "Threshold", "verdict_of"]


@dataclass(frozen=True, slots=True)
class Threshold:
    limit: float
    unit: str
    reason: str
    at_least: bool = False  # a figure below the limit is slow; else one above it

    def is_slow(self, figure: float) -> bool:
        return figure < self.limit if self.at_least else figure > self.limit

    @property
    def words(self) -> str:
        """`< 2 GB/s`: what is slow."""
        return f"{'<' if self.at_least else '>'} {self.limit:g} {self.unit}".rstrip()


THRESHOLDS = {
    "ping p50": Threshold(
        200, "us", "a step waits for one round trip; 0.2 ms is 2 % of a decode step of 10 ms"
    ),
    "ping p99": Threshold(
        5000, "us", "a process waits that long for a core: stutters that a stream shows"
    ),
    "shared memory copy": Threshold(
        2,
        "GB/s",
        "one core copies 5 GB/s and more; less is swap, or a folder that is no tmpfs",
        True,
    ),
    "shared memory gain": Threshold(
        1, "times", "at 4 MB fewer copies must beat a socket, or they are not in memory", True
    ),
    "HTTP": Threshold(
        100, "ms", "/livez computes nothing: the event loop is held up, or the network is far"
    ),
    "one token": Threshold(
        5000, "ms", "a short prompt waits behind others, or the model is large for this machine"
    ),
    "refusal": Threshold(1000, "ms", "whoever has no key must not hold the listener up"),
    "clock resolution": Threshold(1000, "ns", "stages of a step are stamped to the microsecond"),
    "clock call": Threshold(1000, "ns", "a step takes about 20 stamps"),
    "open files": Threshold(
        1024, "files", "a socket for every client that runs or waits, and the server's own", True
    ),
    "processes": Threshold(
        256, "", "the threads of the agent, of the front end and of tokenizers count", True
    ),
    "cores": Threshold(
        2, "", "agent and front end work side by side; on one core they take turns", True
    ),
    "free memory": Threshold(1, "GB", "the default model takes 0.6 GB with its cache", True),
    "load": Threshold(
        1, "of the cores", "they are taken: every figure here is that of a busy machine"
    ),
}


def verdict_of(name: str, figure: float) -> Verdict:
    """OK or slow."""
    return "slow" if THRESHOLDS[name].is_slow(figure) else "OK"
