"""Which tokens were the likeliest, whichever was drawn.

Among equal logits the lowest id comes first, so that a row's list is a prefix of any longer one
and does not depend on how many alternatives its neighbours asked for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["top_tokens"]


def top_tokens(
    logits: torch.Tensor, logprobs: torch.Tensor, num_wanted: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and log-probabilities, [n, max(num_wanted)], likeliest first.

    A row has num_wanted[i] entries that count; the rest is -1 and -inf.
    """
    width = int(num_wanted.max(initial=0))
    top_ids = np.full((len(logits), width), -1, np.int32)
    top_logprobs = np.full((len(logits), width), -np.inf, np.float32)
    rows = np.flatnonzero(num_wanted > 0)
    if len(rows):
        at = torch.from_numpy(rows).to(logits.device)
        num_top = min(width, logits.shape[1])
        ids = _largest(logits[at], num_top)
        values = logprobs[at[:, None], ids].cpu().numpy()
        counts = np.arange(num_top) < num_wanted[rows, None]
        top_ids[rows, :num_top] = np.where(counts, ids.cpu().numpy(), -1)
        top_logprobs[rows, :num_top] = np.where(counts, values, -np.inf)
    return top_ids, top_logprobs


def _largest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The columns [n, count] of the largest logits, in order of (logit down, column up)."""
    num_seen = min(count + 1, logits.shape[1])
    values, ids = torch.topk(logits, num_seen, dim=-1)
    if num_seen > count:
        tied = (values[:, count] == values[:, count - 1]).nonzero().view(-1)
        if len(tied):
            ids[tied, :count] = _settle(logits[tied], values[tied, :count], ids[tied, :count])
    ids, order = ids[:, :count].sort(-1)
    values, order = logits.gather(1, ids).sort(dim=-1, stable=True, descending=True)
    return ids.gather(1, order)


def _settle(logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`ids` of the largest `values`, with the lowest ids in place of those that equal the last."""
    edge = values[:, -1:]
    num_above = (values > edge).sum(-1)
    rows, columns = (logits == edge).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(logits))
    rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    place = num_above[rows] + rank  # topk sorts, so what is above the edge comes first
    fits = place < values.shape[1]
    ids = ids.clone()
    ids[rows[fits], place[fits]] = columns[fits]
    return ids
