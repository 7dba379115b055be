"""Who may be the reason that steps are lost: a request on which the agent fails, time after time.

A request that has lost `max_lost_steps` in a row is a suspect.  Suspects run alone, one after the
other, until each has passed the token where its step was lost; one that loses a step while it is
alone is guilty.  Everybody else loses time, and nothing more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from llm_serving.master.request import Request, RequestStatus
from llm_serving.master.step import Row

__all__ = ["Suspects"]


@dataclass(frozen=True, slots=True)
class _Suspect:
    request: Request
    until: int  # innocent once so many of its tokens are computed


class Suspects:
    def __init__(self, max_lost_steps: int) -> None:
        self._max_lost_steps = max_lost_steps
        self._queue: deque[_Suspect] = deque()

    def first(self) -> Request | None:
        """The one to run alone now; those who have ended or proved innocent leave."""
        while self._queue:
            request, until = self._queue[0].request, self._queue[0].until
            is_over = request.status is RequestStatus.FINISHED
            if not is_over and request.num_computed_tokens < until:
                return request
            self._queue.popleft()
        return None

    def blame(self, rows: Iterable[Row]) -> list[Request]:
        """Count a lost step against the rows that were in it; those that are guilty of it."""
        rows = list(rows)
        alone = self._queue[0].request if self._queue else None
        for row in rows:
            row.request.num_lost_steps += 1
            is_suspect = row.request.num_lost_steps >= self._max_lost_steps
            if is_suspect and row.request is not alone:
                self._queue.append(_Suspect(row.request, row.start + row.num_tokens))
        return [row.request for row in rows if row.request is alone]
