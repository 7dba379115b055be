"""The front desk: from a prompt to a stream of events, and every stream to its one last event.

    open      check, encode, submit       (a long prompt in a thread: the loop is never stopped)
    publish   once a step: text, stop strings, events and metrics of all its requests

A request is in `_streams` from its submission to its last event and at no other time; what the
master says of one that is not there is late and dropped.  The master owns the request's life,
this file its text.  Everything but `Admission.prepare` runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Protocol

from llm_serving.errors import Overloaded, Unavailable
from llm_serving.generation import FinishReason, TokenOutput
from llm_serving.master.request import Request
from llm_serving.metrics import Metrics
from llm_serving.server.admission import (
    Admission,
    GenerationRequest,
    ServerLimits,
    check_text,
    check_unicode,
)
from llm_serving.server.detokenizer import Detokenizer
from llm_serving.server.output_stream import OutputStream
from llm_serving.server.service_rate import ServiceRate
from llm_serving.server.stop_strings import StopStrings
from llm_serving.server.tokenizer import Tokenizer

__all__ = ["GenerationRequest", "LLMServer", "Master", "ServerLimits"]

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` must be that of the event loop, or finer with the same zero."""
        self.tokenizer = tokenizer
        self.limits = limits
        self._admission = Admission(tokenizer, limits, eos_token_ids, cache_salt, clock)
        self._metrics = metrics
        self._health = health
        self._clock = clock
        self._rate = ServiceRate(clock())
        self._master: Master | None = None
        self._streams: dict[str, OutputStream] = {}
        self._num_opening = 0
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

    async def encode(self, text: str) -> list[int]:
        """As `Tokenizer.encode`; in a thread when long.  Raises InvalidRequest if not Unicode."""
        check_unicode("inputs", text)
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def open(self, request: GenerationRequest) -> OutputStream:
        """Submit a request.  Raises InvalidRequest, Overloaded or Unavailable."""
        if self._refusal is not None:
            raise self._unavailable(self._refusal)
        self._num_opening += 1
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

    def publish(self, outputs: list[TokenOutput]) -> None:
        """Turn what the master says into events; called once a step."""
        now_s = self._clock()
        streams: list[OutputStream] = []
        intervals_s: list[float] = []
        num_tokens = 0
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            failure = self._failure(output.finish_reason)
            is_first = stream.first_token_s is None
            if (interval_s := stream.take(output, now_s, failure)) is not None:
                intervals_s.append(interval_s)
            num_tokens += output.token_id is not None
            if is_first and stream.first_token_s is not None:
                self._observe_first_token(stream)
            if stream.finish_reason is not None:
                self._close(stream, output, now_s)
            streams.append(stream)
        self._metrics.observe_step(num_tokens, intervals_s)
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
            raise self._unavailable(self._refusal or "no master is attached yet")
        stream = OutputStream(
            request,
            self.tokenizer,
            detokenizer,
            StopStrings(asked.stop),
            received_s=asked.received_s,
            clock=self._clock,
            cancel=self._master.abort,
        )
        try:
            self._master.submit(request)
        except (Overloaded, Unavailable) as exc:
            exc.retry_after_s = self._retry_after_s()
            raise
        self._streams[request.request_id] = stream
        return stream

    def _close(self, stream: OutputStream, output: TokenOutput, now_s: float) -> None:
        """Forget a stream that has had its last event."""
        del self._streams[stream.request.request_id]
        reason = stream.finish_reason or FinishReason.ERROR
        if output.finish_reason is None and self._master is not None:  # it would go on
            self._master.abort(stream.request, reason)
        self._metrics.observe_end(FINISHED_AS[reason])
        if reason not in UNANSWERED:
            self._rate.finished(now_s)
            first_s = now_s if stream.first_token_s is None else stream.first_token_s
            self._metrics.observe_answer(e2e_s=now_s - stream.received_s, decode_s=now_s - first_s)
        self._note_end()

    def _observe_first_token(self, stream: OutputStream) -> None:
        stages = stream.timings()
        queue_s, prefill_s = stages["queue"] / 1e3, stages["prefill"] / 1e3
        ttft_s = queue_s + prefill_s + stages["tokenize"] / 1e3
        self._metrics.observe_first_token(
            stream.prompt_tokens, ttft_s=ttft_s, queue_s=queue_s, prefill_s=prefill_s
        )

    def _failure(self, reason: FinishReason | None) -> str | None:
        """What is wrong with the server, for a request that ends because of it."""
        return self.unready_reason() if reason in UNANSWERED else None

    def _note_end(self) -> None:
        if self.num_open == 0:
            self._nothing_open.set()

    def _unavailable(self, reason: str) -> Unavailable:
        exc = Unavailable(reason)
        exc.retry_after_s = self._retry_after_s()
        return exc

    def _retry_after_s(self) -> float:
        """Until half of those that are open will have been served, at the rate measured."""
        return self._rate.time_for(self.num_open / 2, self._clock())
