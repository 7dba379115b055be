"""How far apart are the logits of one pair?  In float64, whatever the files hold."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from llm_serving.precision.pairing import Pair
from llm_serving.precision.reading import Floats, Unreadable, read_logits
from llm_serving.precision.tolerances import Tolerance

__all__ = ["Comparison", "compare", "kl_divergence"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Comparison:
    pair: Pair
    tolerance: Tolerance
    max_error: float
    mean_error: float
    kl: float  # KL divergence of new from base, in nats
    same_top1: bool
    num_beyond: int  # logits beyond the tolerance
    first_beyond: int | None  # the first of them, an index into the vocabulary
    at_max: tuple[int, float, float]  # index of the largest error, base and new there
    num_logits: int

    @property
    def passed(self) -> bool:
        return self.num_beyond == 0

    @property
    def reason(self) -> str:
        if self.passed:
            return ""
        index, base, new = self.at_max
        return (
            f"{self.num_beyond} of {self.num_logits} logits differ by more than the tolerance, the "
            f"first at index {self.first_beyond}, the most at index {index}: {base:.6g} in the "
            f"baseline, {new:.6g} now"
        )


def compare(pair: Pair, tolerance: Tolerance, dtypes: Counter[str]) -> Comparison:
    """Raises Unreadable if there is nothing to compare; counts what was not float32."""
    sides = []
    for where, saved in (("baseline", pair.base), ("new", pair.new)):
        try:
            header, logits = read_logits(saved.path)
            _check_finite(logits)
        except Unreadable as exc:
            which = "" if saved is pair.base else f"its new file {saved.name} "
            folder = saved.path.parent
            raise Unreadable(f"{which}{exc}", is_pickle=exc.is_pickle, folder=folder) from exc
        if header.dtype.itemsize != 4:
            dtypes[f"{where} files are {header.dtype.name}"] += 1
        sides.append(logits)
    base, new = sides
    if len(base) != len(new):
        raise Unreadable(f"has {len(base)} logits, its new file {pair.new.name} {len(new)}")
    return _difference(pair, tolerance, base, new)


def _difference(pair: Pair, tolerance: Tolerance, base: Floats, new: Floats) -> Comparison:
    error = np.abs(new - base)
    beyond = np.flatnonzero(error > tolerance.atol + tolerance.rtol * np.abs(base))
    worst = int(error.argmax())
    return Comparison(
        pair,
        tolerance,
        max_error=float(error[worst]),
        mean_error=float(error.mean()),
        kl=kl_divergence(base, new),
        same_top1=bool(base.argmax() == new.argmax()),
        num_beyond=len(beyond),
        first_beyond=int(beyond[0]) if len(beyond) else None,
        at_max=(worst, float(base[worst]), float(new[worst])),
        num_logits=len(base),
    )


def _check_finite(logits: Floats) -> None:
    """No infinity of float32 passes, not even one of both sides: there is no error to measure."""
    wrong = np.flatnonzero(~(np.abs(logits) <= _FLOAT32_MAX))
    if len(wrong):
        value = "a NaN" if math.isnan(logits[wrong[0]]) else "an infinity"
        raise Unreadable(f"holds {value} at index {wrong[0]} ({len(wrong)} in all are not finite)")


def kl_divergence(base: Floats, new: Floats) -> float:
    """Of softmax(base) from softmax(new), in nats; never negative."""
    log_base, log_new = _log_softmax(base), _log_softmax(new)
    return max(0.0, float((np.exp(log_base) * (log_base - log_new)).sum()))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    log_softmax: Floats = shifted - np.log(np.exp(shifted).sum())
    return log_softmax
