"""What has travelled between the master and its agents since the start, by call and by byte.

A call is a frame and its answer: `Execute` for a step, `Ping` when an agent starts.  Counting is
always on; a line for each call is written only if there is a log.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from llm_serving.protocol import PeerTimes
from llm_serving.transport.call_log import METHODS, CallLog

__all__ = ["Call", "Traffic"]

_FLUSH_S = 0.5


@dataclass(slots=True)
class Call:
    """Our half of one call; stamps are CLOCK_MONOTONIC nanoseconds."""

    begin_ns: int
    written_ns: int = 0  # the arrays are in shared memory
    encoded_ns: int = 0
    sent_ns: int = 0
    frame_bytes: int = 0
    memory_bytes: int = 0


@dataclass(slots=True)
class Traffic:
    log: CallLog | None = None  # its lines wait for half a second at most
    num_calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(METHODS, 0))
    frame_bytes_sent: int = 0
    frame_bytes_received: int = 0
    memory_bytes_sent: int = 0
    memory_bytes_received: int = 0
    _is_flushing: bool = False  # it will be, by a timer

    def sent(self, call: Call, num_ranks: int) -> None:
        """The same frame has gone to so many agents, the arrays are written once."""
        self.frame_bytes_sent += call.frame_bytes * num_ranks
        self.memory_bytes_sent += call.memory_bytes

    def answered(
        self,
        method: str,
        call: Call,
        peer: PeerTimes,
        *,
        arrived_ns: int,
        frame_bytes: int,
        memory_bytes: int = 0,
    ) -> None:
        """The answer has just been decoded and read; `arrived_ns` is when its bytes came."""
        self.num_calls[method] += 1
        self.frame_bytes_received += frame_bytes
        self.memory_bytes_received += memory_bytes
        if self.log is not None:
            self.log.add(
                method,
                begin_ns=call.begin_ns,
                encoded_ns=call.encoded_ns,
                sent_ns=call.sent_ns,
                arrived_ns=arrived_ns,
                decoded_ns=time.monotonic_ns(),
                peer_waiting_ns=peer.waiting,
                peer_received_ns=peer.received,
                peer_done_ns=peer.done,
                sent_bytes=call.frame_bytes + call.memory_bytes,
                received_bytes=frame_bytes + memory_bytes,
            )
            if not self._is_flushing:
                self._is_flushing = True
                asyncio.get_running_loop().call_later(_FLUSH_S, self._flush, self.log)

    def _flush(self, log: CallLog) -> None:
        self._is_flushing = False
        log.flush()
