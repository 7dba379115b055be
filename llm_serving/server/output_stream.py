"""What does the reader of one request see, and when?

One event per generated id, in order; all texts together are the decoded text up to the stop
string, and the text of a special token is always "".  So text that is held back must end up in
an event of an id that is not special, even if the request ends before another comes: while text
is held back the latest such event stays here, with the special ones after it, until the next id
or the end.  An end without an id (a deadline, an abort, an error) is one more event, with NO_ID and
no text; it, or the event of the last id, carries finish_reason, and is the only one that does.

There is no bound on the events that wait for a slow reader but that of the request itself,
max_new_tokens; more could only be had by stopping the whole batch for one reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from llm_serving.errors import ServingError
from llm_serving.generation import FinishReason, TokenOutput
from llm_serving.master.request import Request
from llm_serving.metrics import REQUEST_STAGES
from llm_serving.server.detokenizer import Detokenizer
from llm_serving.server.stop_strings import StopStrings
from llm_serving.server.tokenizer import Tokenizer

__all__ = ["NO_ID", "OutputStream", "TokenEvent"]

NO_ID = -1

TopToken = tuple[int, str, float, bool]  # id, text, logprob, special


class TokenEvent(msgspec.Struct, frozen=True):
    index: int  # 1 for the first generated id
    token_id: int
    text: str
    logprob: float
    special: bool
    top: tuple[TopToken, ...] = ()
    finish_reason: FinishReason | None = None
    error: ServingError | None = None  # why there is no answer; only beside ABORT and ERROR


class OutputStream:
    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        detokenizer: Detokenizer,
        stops: StopStrings,
        *,
        arrived_s: float,
        received_s: float,
        validated_s: float,
        trace_id: str,
        clock: Callable[[], float],
        cancel: Callable[[Request], None],
    ) -> None:
        self.request = request
        self.prompt_tokens = request.num_prompt_tokens
        self.seed = request.sampling.seed
        self.generated_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.first_token_s: float | None = None
        self.received_s = received_s
        self.trace_id = trace_id
        self.ended_s: float | None = None  # the step of its last event was there
        self._arrived_s = arrived_s
        self._validated_s = validated_s
        self._last_token_s = 0.0
        self._detokenized_s = 0.0  # the first text, later the last, was ready
        self._sent_s: float | None = None  # the last byte was handed to the socket
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._stops = stops
        self._clock = clock
        self._cancel = cancel
        self._held: list[TokenEvent] = []  # see above; the first is not special
        self._queue: list[TokenEvent] = []
        self._texts: list[str] = []
        self._arrived = asyncio.Event()

    async def next(self) -> list[TokenEvent]:
        """All events since the last call, at least one.

        The last event of a request has finish_reason set; nothing may be asked for after it.
        """
        if self.finish_reason is not None and not self._queue:
            raise RuntimeError(f"request {self.request.request_id}: its last event has been taken")
        await self._arrived.wait()
        self._arrived.clear()
        events, self._queue = self._queue, []
        return events

    def cancel(self) -> None:
        """Nobody reads this any more; no effect on a request that has ended."""
        if self.finish_reason is None:
            self._cancel(self.request)

    @property
    def text(self) -> str:
        """The generated text so far, without the prompt."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def timings(self) -> dict[str, float]:
        """Milliseconds in each stage so far; together they are the time since the first byte.

        Texts that are made and sent beside the decoding of later tokens are in `decode`.
        """
        end = self._clock() if self._sent_s is None else self._sent_s
        last = self.ended_s or self._last_token_s or end
        first = last if self.first_token_s is None else self.first_token_s
        started = first if self.request.started_s is None else self.request.started_s
        stamps = (
            *(self._arrived_s, self.received_s, self._validated_s, self.request.arrival),
            *(started, first, last, self._detokenized_s, end),
        )
        spent, before = {}, self._arrived_s
        for name, stamp in zip(REQUEST_STAGES, stamps[1:], strict=True):
            after = min(max(stamp, before), end)
            spent[name] = (after - before) * 1e3
            before = after
        return spent

    def note_sent(self) -> None:
        """The last byte of its answer has been handed to the socket."""
        self._sent_s = self._clock()

    def take(
        self, output: TokenOutput, now_s: float, error: ServingError | None = None
    ) -> float | None:
        """Make the events of one output; for the LLMServer.

        Returns the seconds since the token before; None without one.  `error` is what the reader
        is told if this output is an end that is no answer.  Raises whatever making text raises;
        then the stream is as it was before, but for text, and only `fail` may follow.
        """
        if output.token_id is None:
            self._end_without_id(output.finish_reason or FinishReason.ERROR, now_s, error)
            return None
        self._take_token(output.token_id, output, now_s)
        interval_s = None if self.first_token_s is None else now_s - self._last_token_s
        if self.first_token_s is None:
            self.first_token_s = now_s
        self._last_token_s = now_s
        return interval_s

    def fail(self, error: ServingError, now_s: float) -> None:
        """End it without asking for text, which may be what is broken; for the LLMServer."""
        event = self._event_without_id(FinishReason.ERROR, error)
        self._end(event, now_s)

    def wake(self) -> None:
        """Let the reader have what is there; once a step is enough."""
        if self.finish_reason is not None or self.generated_tokens == 1:
            self._detokenized_s = self._clock()
        if self._queue:
            self._arrived.set()

    def _take_token(self, token_id: int, output: TokenOutput, now_s: float) -> None:
        reason, text = output.finish_reason, ""
        special = reason is FinishReason.EOS or self._tokenizer.is_special(token_id)
        if not special:  # it is skipped in the decoded text
            text = self._stops.push(self._detokenizer.push(token_id))
        if reason is not None and special:
            self._release(self._flush())
        elif reason is not None:
            text += self._flush()
        if self._stops.found is not None:
            reason = FinishReason.STOP_STRING
        top = tuple(map(self._top_token, output.top)) if output.top else ()
        logprob = 0.0 if output.logprob is None else output.logprob
        self.generated_tokens += 1
        event = TokenEvent(self.generated_tokens, token_id, text, logprob, special, top, reason)
        if text:
            self._texts.append(text)
        if reason is not None:
            self._end(event, now_s)
        else:
            self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        """Queue an event that is not the last, or hold it while it may have to take text."""
        is_holding = self._stops.is_holding() or self._detokenizer.is_holding()
        if self._held and not (is_holding and event.special):
            self._release()
        (self._held if is_holding else self._queue).append(event)

    def _release(self, rest: str = "") -> None:
        """Queue the events that were held; the first of them takes the rest of the text."""
        if rest:
            self._texts.append(rest)
            self._held[0] = msgspec.structs.replace(self._held[0], text=self._held[0].text + rest)
        self._queue += self._held
        self._held.clear()

    def _flush(self) -> str:
        """What was held back, up to a stop string that only the end has made certain."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()

    def _end_without_id(
        self, reason: FinishReason, now_s: float, error: ServingError | None
    ) -> None:
        self._release(self._flush())
        if error is None and self._stops.found is not None:
            reason = FinishReason.STOP_STRING
        self._end(self._event_without_id(reason, error), now_s)

    def _event_without_id(self, reason: FinishReason, error: ServingError | None) -> TokenEvent:
        return TokenEvent(self.generated_tokens + 1, NO_ID, "", 0.0, True, (), reason, error)

    def _end(self, event: TokenEvent, now_s: float) -> None:
        self._release()
        self._queue.append(event)
        self.finish_reason = event.finish_reason
        self.ended_s = now_s

    def _top_token(self, entry: tuple[int, float]) -> TopToken:
        token_id, logprob = entry
        text = self._tokenizer.token_text(token_id)
        return token_id, text, logprob, self._tokenizer.is_special(token_id)
