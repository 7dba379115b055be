"""Which id a row gets: the likeliest, or one drawn from what its filters leave.

Drawing is the inverse of the cumulative distribution over the kept tokens in order of their ids,
at the row's one uniform.  Rows are grouped by what they ask for themselves, and sums are exact
(see filters), so a row's company never shows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.agent.filters import is_filtered, narrow, to_weights
from llm_serving.agent.philox import uniforms
from llm_serving.agent.scratch import Scratch

__all__ = ["choose", "draw"]

_Way = Callable[[torch.Tensor, npt.NDArray[np.void], torch.Tensor, Scratch], torch.Tensor]

_BLOCK = 256  # columns that are summed, or searched for their maximum, as one
_SHORT_LIST = 128  # a top_k below this is worked on by itself
_LARGE_GROUP = 32  # rows that are worked on at once, which bounds the memory
_SMALL_GROUP = 8  # the same where much is needed, so that it stays in the processor's caches
_LARGEST = float(torch.finfo(torch.float32).max)


def choose(
    logits: torch.Tensor,
    sampling: npt.NDArray[np.void],
    positions: npt.NDArray[np.int32],
    scratch: Scratch,
) -> torch.Tensor:
    """An id [n] int64 for every row of `logits` [n, vocab], whose token has this position [n]."""
    is_greedy = sampling["temperature"] <= 0
    if is_greedy.all():
        return _likeliest(logits)
    uniform = uniforms(sampling["seed"], positions, sampling["sample_index"])
    draws = torch.from_numpy(uniform).to(logits.device)
    is_short = (sampling["top_k"] > 0) & (sampling["top_k"] < _SHORT_LIST)
    is_short &= logits.shape[1] > _SHORT_LIST
    ways: tuple[tuple[_Way, int], ...] = (
        (_likeliest, _LARGE_GROUP),
        (_draw_short, _LARGE_GROUP),
        (_draw_filtered, _SMALL_GROUP),
        (_draw_plain, _SMALL_GROUP),
    )
    way_of = np.select([is_greedy, is_short, is_filtered(sampling)], [0, 1, 2], 3)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for number, (way, size) in enumerate(ways):
        group = np.flatnonzero(way_of == number)
        for start in range(0, len(group), size):
            rows = group[start : start + size]
            at = torch.from_numpy(rows).to(logits.device)
            room = scratch.like(logits[: len(rows)], "scores")
            scores = torch.index_select(logits, 0, at, out=room)
            ids[at] = way(scores, sampling[rows], draws[at], scratch)
    return ids


def _likeliest(scores: torch.Tensor, *_: object) -> torch.Tensor:
    """The lowest id of the largest score: by blocks, as a maximum is faster than its place."""
    num_rows, width = scores.shape
    if width % _BLOCK:
        return scores.argmax(-1)
    blocks = scores.view(num_rows, width // _BLOCK, _BLOCK)
    best = blocks.amax(-1).argmax(-1)
    return best * _BLOCK + _block(blocks, best).argmax(-1)


def _draw_plain(
    scores: torch.Tensor, sampling: npt.NDArray[np.void], draws: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    return draw(_heat(scores, sampling), draws, scratch)


def _draw_filtered(
    scores: torch.Tensor, sampling: npt.NDArray[np.void], draws: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    narrow(_heat(scores, sampling), sampling, scratch)
    return draw(scores, draws, scratch)


def _draw_short(
    scores: torch.Tensor, sampling: npt.NDArray[np.void], draws: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """For a small top_k only its candidates, in order of their ids, instead of the vocabulary."""
    top = torch.topk(_heat(scores, sampling), _SHORT_LIST, dim=-1)
    top_k = torch.from_numpy(sampling["top_k"].astype(np.int64)).to(scores.device)
    edge = top.values.gather(1, top_k[:, None] - 1)[:, 0]
    ids, order = top.indices.sort(-1)
    candidates = top.values.gather(1, order)
    narrow(candidates, sampling, scratch)
    drawn = ids.gather(1, draw(candidates, draws, scratch)[:, None])[:, 0]
    spilt = np.flatnonzero((top.values[:, -1] >= edge).cpu().numpy())  # its equals may be outside
    if len(spilt):
        at = torch.from_numpy(spilt).to(scores.device)
        rest = scores[at]
        narrow(rest, sampling[spilt], scratch)
        drawn[at] = draw(rest, draws[at], scratch)
    return drawn


def _heat(scores: torch.Tensor, sampling: npt.NDArray[np.void]) -> torch.Tensor:
    """Divide by the temperature, in place; one so low that the quotient overflows is raised."""
    temperature = torch.from_numpy(sampling["temperature"].copy()).to(scores.device)
    lowest = scores.amax(-1).abs_().div_(_LARGEST)
    return scores.div_(torch.maximum(temperature, lowest)[:, None])


def draw(scores: torch.Tensor, draws: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The first column at which the cumulative distribution exceeds the row's uniform."""
    weights = to_weights(scores, scratch)
    if weights.shape[1] % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK))
    blocks = weights.view(len(weights), -1, _BLOCK)
    sums = blocks.sum(-1)
    running = sums.cumsum(-1)
    total = running[:, -1:]
    target = torch.minimum((draws[:, None] * total).floor_(), total - 1)
    block = (running <= target).sum(-1)
    target -= (running - sums).gather(1, block[:, None])
    inner = _block(blocks, block).cumsum(-1)
    return block * _BLOCK + (inner <= target).sum(-1)


def _block(blocks: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """One block [n, _BLOCK] of each row of [n, num_blocks, _BLOCK]."""
    return blocks[torch.arange(len(blocks), device=blocks.device), which]
