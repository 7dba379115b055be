"""What do the agents' answers mean?  Each lands a step, or it is none and ends the epoch.

A step is over when all ranks have answered it, and what rank 0 found is its result.  A failure is
an answer, too: it costs its step only, unless one follows the other without end.
"""

from __future__ import annotations

import time

from llm_serving.errors import AgentError, ChannelError
from llm_serving.protocol import Executed, Failed, PeerTimes, Reply
from llm_serving.step_arrays import TransferTimes
from llm_serving.worker.agent_group import AgentGroup
from llm_serving.worker.flights import Flight, Flights
from llm_serving.worker.segments import Segments
from llm_serving.worker.step_transfer import read_result, result_bytes
from llm_serving.worker.traffic import Call, Traffic

__all__ = ["Answers"]

_MAX_FAILURES = 16  # steps in a row; one request that is to blame itself costs at most five


class Answers:
    """Those of one epoch."""

    def __init__(
        self, group: AgentGroup, segments: Segments, flights: Flights, traffic: Traffic
    ) -> None:
        self._group = group
        self._segments = segments
        self._flights = flights
        self._traffic = traffic
        self._num_failures = 0  # in a row

    def take(self, rank: int, reply: Reply) -> None:
        """One answer of a rank.  Raises AgentError, which ends the epoch, for what is none."""
        if isinstance(reply, Executed):
            self._on_executed(self._flights.answer(rank, reply.step_id), rank, reply)
        elif isinstance(reply, Failed) and reply.step_id >= 0:
            self._on_failed(self._flights.answer(rank, reply.step_id), rank, reply)
        else:
            raise _unexpected(rank, reply)
        if (over := self._flights.take_over()) is not None:
            self._segments.inputs.release(over.slot)
            over.land()

    def _on_executed(self, flight: Flight, rank: int, reply: Executed) -> None:
        if reply.agent_epoch != self._group.agent_epoch:
            raise ChannelError(f"agent {rank} answered for epoch {reply.agent_epoch}")
        call = flight.call
        transfer = TransferTimes(call.begin_ns, call.written_ns, call.sent_ns, time.monotonic_ns())
        result = read_result(self._segments.results[rank], reply, transfer)
        self._count(rank, call, reply.times, result_bytes(reply))
        self._num_failures = 0
        if rank == 0:
            flight.result = result

    def _on_failed(self, flight: Flight, rank: int, reply: Failed) -> None:
        self._count(rank, flight.call, reply.times, 0)
        flight.failure = _step_failure(rank, reply)
        self._num_failures += 1
        if self._num_failures == _MAX_FAILURES:  # it is not the steps, it is the agent
            raise AgentError(f"{_MAX_FAILURES} steps failed in a row: {reply.message}")

    def _count(self, rank: int, call: Call, times: PeerTimes, memory_bytes: int) -> None:
        channel = self._group.agents[rank].channel
        self._traffic.answered(
            "Execute",
            call,
            times,
            arrived_ns=channel.arrived_ns,
            frame_bytes=channel.frame_bytes,
            memory_bytes=memory_bytes,
        )


def _step_failure(rank: int, failed: Failed) -> AgentError:
    kind = ChannelError if failed.code == ChannelError.code else AgentError
    return kind(f"step {failed.step_id} failed on agent {rank}: {failed.message}")


def _unexpected(rank: int, reply: Reply) -> AgentError:
    if isinstance(reply, Failed):
        return AgentError(f"agent {rank} gave up: {reply.message}")
    return ChannelError(f"agent {rank} said {reply!r:.200}, which nobody had asked for")
