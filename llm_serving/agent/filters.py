"""Which tokens may be drawn at all: top_k, top_p, min_p and typical_p.

Each filter sets what it removes to -inf, in place, and works on what the one before it left.
The kept sets are those of transformers' warpers; its order among equal logits at the edge of
top_p, which its sort leaves open, is that of a stable sort: the highest ids stay.

Probabilities are counted in whole units of 2**-50 ("weights", exact in float64), so a sum does
not depend on the order, the batch or the backend that it was taken in, and nothing has to be
sorted: a histogram over the vocabulary finds the 1/64 nat in which a threshold lies, and only the
few tokens within it are put in order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.agent.scratch import Scratch

__all__ = ["is_filtered", "narrow", "to_weights"]

_UNIT = 2.0**-50
_BUCKETS_PER_NAT = 64
_NUM_BUCKETS = 2048  # 32 nats; what is less likely shares the last one

Filter = Callable[[torch.Tensor, torch.Tensor, Scratch], None]


def is_filtered(sampling: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Which of [n] SAMPLING_DTYPE records use a filter."""
    used = np.stack([used for _, used, _ in _filters(sampling)])
    return np.asarray(used.any(axis=0))


def narrow(scores: torch.Tensor, sampling: npt.NDArray[np.void], scratch: Scratch) -> None:
    """Set what the records [n] remove from `scores` [n, width] to -inf; never a whole row.

    `scores` are logits after penalties and temperature; each row's largest is finite.
    """
    for keep, used, parameter in _filters(sampling):
        rows = np.flatnonzero(used)
        if not len(rows):
            continue
        limits = torch.from_numpy(parameter[rows]).to(scores.device)[:, None]
        if len(rows) == len(scores):
            keep(scores, limits, scratch)
        else:
            at = torch.from_numpy(rows).to(scores.device)
            part = scores[at]
            keep(part, limits, scratch)
            scores[at] = part


def to_weights(scores: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Softmax of [n, width] in whole units of 2**-50, float64; valid until the next call."""
    shares = torch.softmax(scores, dim=-1, out=scratch.like(scores, "shares"))
    shares.div_(_UNIT).floor_()
    return scratch.like(scores, "weights", torch.float64).copy_(shares)


def _filters(
    sampling: npt.NDArray[np.void],
) -> list[tuple[Filter, npt.NDArray[np.bool_], npt.NDArray[np.generic]]]:
    """The filters in their order: what to do, which records use it, their parameter."""
    top_k, top_p = sampling["top_k"].astype(np.float64), sampling["top_p"]
    min_p, typical_p = sampling["min_p"], sampling["typical_p"]
    return [
        (_keep_top_k, top_k > 0, top_k),
        (_keep_top_p, top_p < 1, _decimal(1 - top_p)),
        (_keep_min_p, min_p > 0, min_p),
        (_keep_typical, typical_p < 1, _decimal(typical_p)),
    ]


def _decimal(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The decimal that a float32 was written as: 0.1, not 0.10000000149."""
    return np.maximum(np.round(values.astype(np.float64), 7), 1e-7)


def _keep_top_k(scores: torch.Tensor, top_k: torch.Tensor, scratch: Scratch) -> None:
    """Everything not below the k-th largest score, so perhaps more than k."""
    ones = scratch.like(scores, "weights", torch.float64).fill_(1)
    threshold, _ = _first_beyond(scores, ones, top_k.clamp(max=scores.shape[1]) - 1, scratch)
    _remove_below(threshold, scores, scores, scratch)


def _keep_top_p(scores: torch.Tensor, tail: torch.Tensor, scratch: Scratch) -> None:
    """Without the least likely tokens that together have no more than `tail` = 1 - top_p.

    Holtzman et al., "The curious case of neural text degeneration" (2019).
    """
    weights = to_weights(scores, scratch)
    total = weights.sum(-1, True)
    limit = (total - (tail * total).floor() - 1).clamp_(min=0)
    threshold, after = _first_beyond(scores, weights, limit, scratch)
    _remove_below(threshold, scores, scores, scratch)
    scores.view(-1)[after] = -torch.inf


def _keep_min_p(scores: torch.Tensor, min_p: torch.Tensor, scratch: Scratch) -> None:
    """Everything at least `min_p` times as likely as the likeliest."""
    shares = torch.softmax(scores, dim=-1, out=scratch.like(scores, "shares"))
    _remove_below(min_p * shares.amax(-1, True), shares, scores, scratch)


def _keep_typical(scores: torch.Tensor, mass: torch.Tensor, scratch: Scratch) -> None:
    """The tokens whose information is nearest to the entropy, until they have `mass`.

    Meister et al., "Locally typical sampling" (2022).
    """
    weights = to_weights(scores, scratch)
    total = weights.sum(-1, True)
    surprise = torch.log_softmax(scores, dim=-1, out=scratch.like(scores, "typicality"))
    surprise.clamp_(min=-200).neg_()  # no nan where the probability is 0
    # whole units again, so that the sum of a row alone is that of a row in company; 16 nats fit
    units = torch.mul(weights, surprise, out=scratch.like(scores, "units", torch.float64))
    entropy = units.div_(16).round_().sum(-1, True).mul_(16 * _UNIT)
    typicality = surprise.sub_(entropy.float()).abs_().neg_()
    threshold, _ = _first_beyond(typicality, weights, (mass * total).ceil_() - 1, scratch)
    _remove_below(threshold, typicality, scores, scratch)


def _remove_below(
    threshold: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, scratch: Scratch
) -> None:
    mask = torch.lt(values, threshold, out=scratch.like(scores, "mask", torch.bool))
    scores.masked_fill_(mask, -torch.inf)


def _first_beyond(
    values: torch.Tensor, weights: torch.Tensor, limit: torch.Tensor, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the running weight of a row first exceeds its limit, in order of (value, column) down.

    `limit` [n, 1] is a whole number, at least 0 and below the row's weight.  Returns the value
    [n, 1] of that entry and the flat places of entries that come after it, all that equal it
    among them.
    """
    num_rows, width = values.shape
    bucket_of = torch.sub(values.amax(-1, True), values, out=scratch.like(values, "distance"))
    bucket_of.mul_(_BUCKETS_PER_NAT).clamp_(max=_NUM_BUCKETS - 1).floor_()
    index = scratch.like(values, "index", torch.int64).copy_(bucket_of)
    histogram = torch.zeros(num_rows, _NUM_BUCKETS, dtype=torch.float64, device=values.device)
    running = histogram.scatter_add_(1, index, weights).cumsum(-1)
    bucket = (running <= limit).sum(-1, True)
    before = torch.nn.functional.pad(running, (1, 0)).gather(1, bucket)

    mask = torch.eq(bucket_of, bucket, out=scratch.like(values, "mask", torch.bool))
    places = mask.view(-1).nonzero().view(-1).flip(0)
    places = places[values.view(-1)[places].sort(stable=True, descending=True).indices]
    rows, order = (places // width).sort(stable=True)
    places = places[order]
    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    amounts = weights.view(-1)[places].to(torch.int64)
    sums = amounts.cumsum(0)
    sums -= (sums - amounts)[starts[rows]]
    within = sums <= (limit - before).to(torch.int64).view(-1)[rows]
    firsts = starts + torch.bincount(rows[within], minlength=num_rows)
    after = torch.arange(len(places), device=values.device) > firsts[rows]
    return values.view(-1)[places[firsts]][:, None], places[after]
