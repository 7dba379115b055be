"""Which part of every stage did the agent have to wait for?

Takes the steps of `GET /trace` as arrays, in nanoseconds.  A moment of a master stage is exposed
where it lies within an idle stage of the agent, of whichever step, for steps overlap; the rest of
it is hidden beside the model.  Seen from the other side, an idle stage is covered by stages of the
master, of whichever step, and what none of them covers was on the way: wake-ups and the socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from llm_serving.diagnostics.breakdown.observation import TraceAnswer
from llm_serving.errors import ConfigError
from llm_serving.step_trace import KINDS, MASTER_STAMPS, StepRecord

__all__ = ["COLUMNS", "Spans", "Steps", "read_steps"]

Ns = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

COLUMNS = StepRecord._fields
_MASTER_ORDER = ("schedule", "build", "shm_write", "frame_send", "sent")
_AGENT_ORDER = ("previous", "waiting", "received", "forward", "sample", "result_write", "done")
_ANSWER_ORDER = ("done", "shm_read", "update", "publish", "end")
_WAY = "frame_receive"  # the only stage of the master's in which it may do something else
_ORDERS = (_MASTER_ORDER, _AGENT_ORDER, _ANSWER_ORDER, ("frame_send", "received"))


class Spans:
    """The union of some stretches of time."""

    def __init__(self, starts: Ns, ends: Ns) -> None:
        is_real = ends > starts
        order = np.argsort(starts[is_real], kind="stable")
        starts, reach = starts[is_real][order], np.maximum.accumulate(ends[is_real][order])
        is_new = np.ones(len(starts), np.bool_)
        is_new[1:] = starts[1:] > reach[:-1]
        self._starts = starts[is_new]
        self._ends = reach[np.append(is_new[1:], True)] if len(reach) else reach
        self._before = np.cumsum(self._ends - self._starts) - (self._ends - self._starts)

    def within(self, starts: Ns, ends: Ns) -> Ns:
        """How much of each stretch from `starts` to `ends` lies in the union."""
        if not len(self._starts):
            return np.zeros(len(starts), np.int64)
        return self._up_to(ends) - self._up_to(starts)

    def _up_to(self, moments: Ns) -> Ns:
        at = np.searchsorted(self._starts, moments, side="right") - 1
        i = np.maximum(at, 0)
        inside = np.minimum(moments, self._ends[i]) - self._starts[i]
        return np.where(at < 0, 0, self._before[i] + inside).astype(np.int64)


@dataclass(frozen=True)
class Steps:
    """Steps in the order in which they ended, and what follows from all of them together."""

    table: Ns  # [num_steps, num_columns] a StepRecord each
    agent: Ns  # [num_steps, agent stages]
    master: Ns  # [num_steps, master stages]
    exposed: Ns  # [num_steps, master stages] of that, within any idle stage
    waits: (
        Ns  # [num_steps, master stages] of the step's idle stage, within such a stage of any step
    )
    on_the_way: Ns  # [num_steps] of the step's idle stage, within no stage of the master
    beside_sending: Ns  # [num_steps] the master's work while the agent sent the answer before

    @classmethod
    def of(cls, table: Ns) -> Steps:
        def column(name: str) -> Ns:
            return table[:, COLUMNS.index(name)]

        record = StepRecord(*cast("Any", table.T))  # its arithmetic, on whole columns
        idle = (column("waiting"), column("received"))
        idle_spans = Spans(*idle)
        stretches = [(column(begin), column(end)) for begin, end in MASTER_STAMPS.values()]
        busy = _union(stretches)
        work = _union([s for name, s in zip(MASTER_STAMPS, stretches, strict=True) if name != _WAY])
        return cls(
            table,
            np.stack(record.agent_stages(), 1),
            np.stack(record.master_stages(), 1),
            np.stack([idle_spans.within(*stretch) for stretch in stretches], 1),
            np.stack([Spans(*stretch).within(*idle) for stretch in stretches], 1),
            idle[1] - idle[0] - busy.within(*idle),
            work.within(column("previous"), column("waiting")),
        )

    def __len__(self) -> int:
        return len(self.table)

    def where(self, mask: Mask) -> Steps:
        return Steps(
            self.table[mask],
            self.agent[mask],
            self.master[mask],
            self.exposed[mask],
            self.waits[mask],
            self.on_the_way[mask],
            self.beside_sending[mask],
        )

    def column(self, name: str) -> Ns:
        return self.table[:, COLUMNS.index(name)]

    def kind(self, name: str) -> Steps:
        """Those of one of KINDS."""
        return self.where(self.column("kind") == KINDS.index(name))

    @property
    def period(self) -> Ns:
        period: Ns = self.column("done") - self.column("previous")
        return period

    @property
    def pauses(self) -> Ns:
        """[num_steps - 1] from the end of each step to the beginning of the next one's period."""
        return self.column("previous")[1:] - self.column("done")[:-1]

    @property
    def sending(self) -> Ns:
        """[num_steps] of the stage result_write: the answer before is encoded and sent."""
        sending: Ns = self.column("waiting") - self.column("previous")
        return sending

    @property
    def at_once(self) -> Ns:
        """[num_steps] of the idle stage, what two stages cover and `waits` has counted twice."""
        covered: Ns = self.agent[:, 0] - self.on_the_way
        return cast("Ns", self.waits.sum(1) - covered)


def read_steps(answer: TraceAnswer) -> tuple[Steps, list[int]]:
    """The steps whose stamps are in order, and the ids of those whose stamps are not.

    Raises ConfigError if it is no trace of this release.
    """
    missing = [name for name in COLUMNS if name not in answer.columns]
    if missing:
        raise ConfigError(f"the trace has no column {missing[0]!r}: another release has written it")
    if any(len(row) != len(answer.columns) for row in answer.steps):
        raise ConfigError("the trace has steps that are longer or shorter than its columns")
    places = [answer.columns.index(name) for name in COLUMNS]
    try:
        whole = np.array(answer.steps, np.int64).reshape(-1, len(answer.columns))
    except OverflowError:
        raise ConfigError("the trace has numbers that no clock shows: it is damaged") from None
    table = whole[:, places]
    table = table[np.argsort(table[:, COLUMNS.index("done")], kind="stable")]
    in_order = _in_order(table)
    return Steps.of(table[in_order]), table[~in_order, 0].tolist()


def _union(stretches: Sequence[tuple[Ns, Ns]]) -> Spans:
    return Spans(*(np.concatenate(ends) for ends in zip(*stretches, strict=True)))


def _in_order(table: Ns) -> Mask:
    kinds = table[:, COLUMNS.index("kind")]
    right = (kinds >= 0) & (kinds < len(KINDS))
    for order in _ORDERS:
        stamps = table[:, [COLUMNS.index(name) for name in order]]
        right &= (np.diff(stamps, axis=1) >= 0).all(1)
    return right
