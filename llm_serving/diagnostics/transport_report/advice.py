"""What do the figures of a transport log ask for?  Each piece of advice shows its own.

Pings are left out: they are transport and nothing else, so that a share of theirs tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llm_serving.diagnostics.transport_report.log import TransportLog
from llm_serving.diagnostics.transport_report.statistics import OTHER, Statistics, rounded_percent

__all__ = ["Advice", "advise", "explain_other"]

_MAX_SHARE = 0.30  # of Total, for coding and for travelling
_MAX_CALLS = 50  # for a request


@dataclass(frozen=True, slots=True)
class Advice:
    figure: str
    sentence: str


def advise(log: TransportLog, statistics: Statistics) -> list[Advice]:
    """None if nothing stands out."""
    return [*_coding(log, statistics), *_travelling(log, statistics), *_calls(statistics)]


def explain_other(log: TransportLog, statistics: Statistics) -> Iterator[str]:
    """Sentences on the share that no transport can change, and on what Total means."""
    percent = rounded_percent(statistics.overall.shares)
    if math.isnan(percent[OTHER]):
        yield "Every duration is 0 or missing: there is nothing to share out."
        return
    yield f"The four stages take {statistics.overall.transport_ms:,.4f} ms of a call on average."
    if log.is_older:
        yield (
            "Other is what Total has beyond them. In this older format Recv may hold the peer's "
            "own work, so that it is not known what a faster transport could save."
        )
    else:
        yield (
            f"Other, {percent[OTHER]:.1f} %, is the peer's own work and its being busy with "
            f"earlier calls: a faster transport saves {100 - percent[OTHER]:.1f} % at most."
        )
    if statistics.mean_in_flight > 1.05:
        yield (
            f"{statistics.mean_in_flight:.1f} calls were open at once on average (Total over the "
            "seconds of the log), so that Total holds the waiting for other calls, too."
        )
    if excess := statistics.overall.excess:
        yield (
            f"The stages add up to {100 * excess:.1f} % of Total, which cannot be: clocks of two "
            "machines, or an edited log. The shares are of the stages' sum instead."
        )


def _coding(log: TransportLog, statistics: Statistics) -> Iterator[Advice]:
    figure = _over(statistics, "Serialize_ms", "Deserialize_ms")
    if figure and "shm" in log.transport.lower():
        yield Advice(
            figure,
            "the arrays are in shared memory already: 16-bit numbers instead of 32-bit ones halve "
            "what is copied, and a few large arrays cost less than many small ones",
        )
    elif figure:
        yield Advice(
            figure,
            "put the arrays into shared memory instead of into the message, and send 16-bit "
            "numbers instead of 32-bit ones",
        )


def _travelling(log: TransportLog, statistics: Statistics) -> Iterator[Advice]:
    if not (figure := _over(statistics, "Send_ms", "Recv_ms")):
        return
    transport = log.transport.lower()
    is_tcp, is_shared = "tcp" in transport, "shm" in transport
    if not is_shared and is_tcp:
        sentence = "TCP carries the arrays where shared memory was meant; a Unix socket is quicker"
    elif not is_shared:
        sentence = "the arrays go through a socket: put them into shared memory"
    elif is_tcp:
        sentence = "the frames go over TCP: a Unix socket (agent.transport: unix) is quicker"
    else:
        sentence = (
            "shared memory and a Unix socket are in use: see whether both ends get a processor"
        )
    yield Advice(figure, f"{sentence} (`llm-serving diagnose` measures what this machine can do)")


def _calls(statistics: Statistics) -> Iterator[Advice]:
    if statistics.calls_per_request > _MAX_CALLS:
        yield Advice(
            f"{statistics.calls_per_request:,.1f} calls a request, pings apart, over {_MAX_CALLS}",
            "fuse calls, so that one does the work of several, or batch: requests that run at the "
            "same time share the calls of their steps",
        )


def _over(statistics: Statistics, first: str, second: str) -> str | None:
    """The two shares in words, if together they are too large a part of Total."""
    work = statistics.work
    if work is None or not work.shares[first] + work.shares[second] > _MAX_SHARE:
        return None
    percent = rounded_percent(work.shares)
    but = "" if work.num_calls == statistics.overall.num_calls else " without pings"
    parts = " + ".join(
        f"{name.removesuffix('_ms')} {percent[name]:.1f} %" for name in (first, second)
    )
    both = percent[first] + percent[second]
    return f"{parts} = {both:.1f} % of Total{but}, over {100 * _MAX_SHARE:.0f} %"
