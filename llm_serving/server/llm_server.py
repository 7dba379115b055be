"""The front desk: from a prompt to a stream of events, and every stream to its one last event.

    open      check, encode, submit       (a long prompt in a thread: the loop is never stopped)
    publish   once a step: text, stop strings, events and metrics of all its requests

A request is in `_streams` from its submission to its last event and at no other time; what the
master says of one that is not there is late and dropped.  The master owns the request's life,
this file its text.  Everything but `Admission.prepare` runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Protocol

from llm_serving.errors import (
    AgentError,
    RequestAborted,
    RequestFailed,
    ServingError,
    Unavailable,
)
from llm_serving.generation import FinishReason, TokenOutput
from llm_serving.master.request import Request
from llm_serving.metrics import Metrics
from llm_serving.server.admission import Admission, GenerationRequest, ServerLimits, check_text
from llm_serving.server.detokenizer import Detokenizer
from llm_serving.server.output_stream import OutputStream
from llm_serving.server.service_rate import ServiceRate
from llm_serving.server.stop_strings import StopStrings
from llm_serving.server.tokenizer import Tokenizer

__all__ = ["GenerationRequest", "LLMServer", "Master", "ServerLimits"]

logger = logging.getLogger(__name__)

LONG_TEXT = 4096  # characters; shorter ones are encoded faster than a thread is reached
FINISHED_AS = {  # vLLM's words for the metrics
    FinishReason.EOS: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TIMEOUT: "timeout",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
}
UNANSWERED = (FinishReason.ABORT, FinishReason.ERROR)
SERVED = ("stop", "length")


class Master(Protocol):
    def submit(self, request: Request) -> None:
        """Raises InvalidRequest, Overloaded or Unavailable: nothing changed."""

    def abort(self, request: Request, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request, with one more output of it; no effect on one that has ended."""


class LLMServer:
    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        limits: ServerLimits,
        eos_token_ids: Collection[int],
        cache_salt: bytes,
        metrics: Metrics,
        health: Callable[[], str | None],
        has_stopped: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`health` says why a request sent now would not be served, if it would not.

        `has_stopped` says whether none will ever be again; None: as long as `health` complains.
        `clock` must be that of the event loop, or finer with the same zero.
        """
        self.tokenizer = tokenizer
        self.limits = limits
        self._admission = Admission(tokenizer, limits, eos_token_ids, cache_salt, clock)
        self._metrics = metrics
        self._health = health
        self._has_stopped = has_stopped or (lambda: health() is not None)
        self._clock = clock
        self._rate = ServiceRate()
        self._master: Master | None = None
        self._streams: dict[str, OutputStream] = {}
        self._num_opening = 0
        self.num_requests = 0  # submitted since the start
        self._refusal: str | None = None  # of every new request
        self._nothing_open = asyncio.Event()
        self._nothing_open.set()

    def attach(self, master: Master) -> None:
        self._master = master

    @property
    def num_open(self) -> int:
        """Requests that are being opened or have not had their last event."""
        return len(self._streams) + self._num_opening

    def unready_reason(self) -> str | None:
        """Why a request sent now would not be served; None if it would."""
        return self._refusal or self._health()

    def retry_after_s(self) -> float:
        """Until half of those that are open will have been served, at the rate measured."""
        return self._rate.time_for(self.num_open / 2, self._clock())

    async def open(self, request: GenerationRequest) -> OutputStream:
        """Submit a request.  Raises InvalidRequest, Overloaded or Unavailable."""
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        self._num_opening += 1
        self._rate.begin(self._clock())
        self._nothing_open.clear()
        try:
            check_text(request)
            if len(request.prompt) < LONG_TEXT:
                prepared = self._admission.prepare(request)
            else:
                prepared = await asyncio.to_thread(self._admission.prepare, request)
            return self._submit(request, *prepared)
        finally:
            self._num_opening -= 1
            self._note_end()

    def answered(self, stream: OutputStream) -> None:
        """The last byte of a whole answer has been handed to the socket."""
        stream.note_sent()
        self._metrics.observe_stages(stream.timings())

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Turn what the master says into events; called once a step.

        Every reader is woken, whatever goes wrong with another's request.
        """
        now_s = self._clock()
        streams: list[OutputStream] = []
        intervals_s: list[float] = []
        num_tokens = 0
        try:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue
                streams.append(stream)
                if (interval_s := self._take(stream, output, now_s)) is not None:
                    intervals_s.append(interval_s)
                num_tokens += output.token_id is not None
                if stream.finish_reason is not None:
                    self._close(stream, output, now_s)
            self._metrics.observe_step(num_tokens, intervals_s)
        finally:
            for stream in streams:
                stream.wake()

    def begin_drain(self) -> None:
        """Take no new requests; those that are open go on."""
        self._refusal = "the server is shutting down"

    async def drained(self) -> None:
        """Wait until no request is open."""
        await self._nothing_open.wait()

    def abort_all(self) -> None:
        """End every open request now, and take no new ones."""
        self.begin_drain()
        master, self._master = self._master, None  # one still being encoded is refused, too
        if master is not None:
            for stream in list(self._streams.values()):
                master.abort(stream.request, FinishReason.ABORT)

    def _submit(
        self, asked: GenerationRequest, request: Request, detokenizer: Detokenizer
    ) -> OutputStream:
        if self._master is None:
            raise Unavailable(self._refusal or "no master is attached yet")
        stream = OutputStream(
            request,
            self.tokenizer,
            detokenizer,
            StopStrings(asked.stop),
            arrived_s=asked.received_s if asked.arrived_s is None else asked.arrived_s,
            received_s=asked.received_s,
            validated_s=asked.received_s if asked.validated_s is None else asked.validated_s,
            trace_id=asked.trace_id,
            clock=self._clock,
            cancel=self._master.abort,
        )
        self._master.submit(request)
        self._streams[request.request_id] = stream
        self.num_requests += 1
        return stream

    def _take(self, stream: OutputStream, output: TokenOutput, now_s: float) -> float | None:
        """As `OutputStream.take`; a stream whose text cannot be made ends with an error."""
        is_first = stream.first_token_s is None
        error = self._error(stream, output) if output.token_id is None else None
        try:
            interval_s = stream.take(output, now_s, error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # a panic of the tokenizers library is no Exception
            stream.fail(self._failed(stream, "its text could not be made", exc), now_s)
            return None
        if is_first and stream.first_token_s is not None:
            self._observe_first_token(stream)
        return interval_s

    def _close(self, stream: OutputStream, output: TokenOutput, now_s: float) -> None:
        """Forget a stream that has had its last event."""
        del self._streams[stream.request.request_id]
        reason = stream.finish_reason or FinishReason.ERROR
        if output.finish_reason is None and self._master is not None:  # it would go on
            self._master.abort(stream.request, reason)
        self._metrics.observe_end(FINISHED_AS[reason])
        if FINISHED_AS[reason] in SERVED:
            self._rate.served(now_s)
        if reason not in UNANSWERED:
            first_s = now_s if stream.first_token_s is None else stream.first_token_s
            self._metrics.observe_answer(e2e_s=now_s - stream.received_s, decode_s=now_s - first_s)
        self._note_end()

    def _observe_first_token(self, stream: OutputStream) -> None:
        stages = stream.timings()
        queue_s, prefill_s = stages["queue"] / 1e3, stages["prefill"] / 1e3
        ttft_s = queue_s + prefill_s + (stages["validate"] + stages["tokenize"]) / 1e3
        self._metrics.observe_first_token(
            stream.prompt_tokens, ttft_s=ttft_s, queue_s=queue_s, prefill_s=prefill_s
        )

    def _error(self, stream: OutputStream, output: TokenOutput) -> ServingError | None:
        """What the reader is told of an end without an id; None if it is an answer."""
        if output.finish_reason is FinishReason.ABORT:
            sentence = self.unready_reason() or "the request was aborted before it had ended"
            return RequestAborted(sentence)
        if output.finish_reason is not FinishReason.ERROR:
            return None
        if self._refusal is None and not self._has_stopped():
            return self._failed(stream, "the model could not compute it")
        return AgentError(self.unready_reason() or "the work on this request was lost")

    def _failed(
        self, stream: OutputStream, why: str, exc: BaseException | None = None
    ) -> RequestFailed:
        """It is the request's own fault: asked again, it would fail again."""
        logger.error("request %s failed: %s", stream.trace_id, why, exc_info=exc)
        return RequestFailed(f"this request failed, and would again: {why}")

    def _note_end(self) -> None:
        if self.num_open == 0:
            self._rate.pause(self._clock())
            self._nothing_open.set()
