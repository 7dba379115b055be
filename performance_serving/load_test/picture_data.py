"""Which series of numbers does a picture show?  Pure; the figures of a run are in `figures`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from load_test.results import RequestRecord

__all__ = [
    "FloatArray",
    "TokenRate",
    "array_of",
    "medians",
    "open_requests",
    "shares",
    "token_rate",
]

FloatArray = npt.NDArray[np.float64]

_MAX_BINS = 100
_NUM_PIECES = 100
_SHARES = np.unique(np.concatenate([np.linspace(0, 1, 501), np.linspace(0.99, 1, 201)]))


@dataclass(frozen=True, slots=True)
class Band:
    """A number that changes too often to be drawn: its least, mean and most in even pieces."""

    at: FloatArray  # middle of each piece
    low: FloatArray
    mean: FloatArray
    high: FloatArray


@dataclass(frozen=True, slots=True)
class TokenRate:
    """Output tokens a second between neighbouring edges."""

    step_s: float  # the last may be shorter, or longer by half
    edges_s: FloatArray
    counted: FloatArray  # on requests that ended well, were cancelled or are unfinished
    lost: FloatArray  # on requests that failed later


def token_rate(requests: Sequence[RequestRecord]) -> TokenRate | None:
    """None if no token came; an event of several tokens counts as so many."""
    at: list[float] = []
    weights: list[float] = []
    is_lost: list[bool] = []
    for r in requests:
        events = r.token_s or ([r.end_s] if r.output_tokens and r.end_s is not None else [])
        at += events
        weights += [r.output_tokens / len(events)] * len(events) if events else []
        is_lost += [r.state == "error"] * len(events)
    end_s = max((r.last_s or 0.0 for r in requests), default=0.0)
    if not at or end_s <= 0:
        return None
    step_s = _round_step(end_s / min(_MAX_BINS, max(10, len(at) ** 0.5)))
    edges = np.append(np.arange(max(1, round(end_s / step_s))) * step_s, end_s)
    lost = np.histogram(at, edges, weights=np.where(is_lost, weights, 0))[0] / np.diff(edges)
    counted = np.histogram(at, edges, weights=np.where(is_lost, 0, weights))[0] / np.diff(edges)
    return TokenRate(step_s, edges, counted, lost)


def open_requests(requests: Iterable[RequestRecord]) -> tuple[FloatArray, FloatArray]:
    """The times at which the number of open requests changed, and the number from then on."""
    changes: list[tuple[float, int]] = []
    for r in requests:
        if r.sent_s is not None:
            changes.append((r.sent_s, 1))
            changes += [(r.last_s, -1)] if r.last_s is not None else []
    changes.sort(key=lambda change: change[0])
    if changes:
        changes.insert(0, (min(0.0, changes[0][0]), 0))
    return array_of(at for at, _ in changes), np.cumsum([by for _, by in changes], dtype=float)


def band(at: FloatArray, values: FloatArray) -> Band | None:
    """Each value holds until the next; None if there are so few that they can be drawn."""
    if at.size <= 4 * _NUM_PIECES or at[-1] <= at[0]:
        return None
    edges = np.linspace(at[0], at[-1], _NUM_PIECES + 1)
    before = values[np.searchsorted(at, edges[:-1], side="right") - 1]  # as a piece begins
    times = np.concatenate([edges[:-1], at[:-1]])
    order = np.argsort(times, kind="stable")
    held, lasts = np.concatenate([before, values[:-1]])[order], np.diff(times[order], append=at[-1])
    begins = np.searchsorted(times[order], edges[:-1], side="left")
    mean = np.add.reduceat(held * lasts, begins) / np.diff(edges)
    low, high = np.minimum.reduceat(held, begins), np.maximum.reduceat(held, begins)
    return Band((edges[:-1] + edges[1:]) / 2, low, mean, high)


def shares(seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The curve on which the percentiles of `figures` lie, from share 0 to 1."""
    return np.quantile(seconds, _SHARES), _SHARES


def medians(at: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Of at most 60 groups of neighbours, a dozen or more in each."""
    parts = np.array_split(np.argsort(at, kind="stable"), max(1, min(60, at.size // 12)))
    middle = [float(np.median(at[part])) for part in parts]
    return np.array(middle), np.array([_median(values[part]) for part in parts])


def array_of(values: Iterable[float | None]) -> FloatArray:
    """None becomes not-a-number, which is not drawn."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _median(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def _round_step(least: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(least))
    return float(next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9)))
