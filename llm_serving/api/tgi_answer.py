"""What the TGI family answers: the objects of an answer and of a stream, and their making.

A stream has one event per generated id.  Where a deadline ended it there is one more for the end,
whose token has the id -1, no text, and counts as special; it is not among the tokens of `details`.
"""

from __future__ import annotations

import msgspec

from llm_serving.server.output_stream import NO_ID, OutputStream, TokenEvent

__all__ = [
    "Answer",
    "Details",
    "StreamDetails",
    "StreamEvent",
    "Token",
    "answer_of",
    "last_event",
    "stream_event",
]


class Token(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None


class Details(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    prompt_tokens: int
    seed: int
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]]
    timing: dict[str, float]  # milliseconds per stage, up to the making of this answer
    best_of_sequences: None = None


class Answer(msgspec.Struct, omit_defaults=True):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    prompt_tokens: int
    seed: int
    details: Details | None = None


class StreamDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    prompt_tokens: int
    input_length: int  # prompt_tokens, by the name TGI's own stream has for it
    seed: int
    timing: dict[str, float]  # milliseconds per stage


class StreamEvent(msgspec.Struct):
    index: int
    token: Token
    top_tokens: list[Token]
    generated_text: str | None = None
    details: StreamDetails | None = None


def stream_event(event: TokenEvent) -> StreamEvent:
    token = Token(event.token_id, event.text, event.logprob, event.special)
    return StreamEvent(event.index, token, [Token(*entry) for entry in event.top])


def last_event(
    event: TokenEvent, stream: OutputStream, prefix: str, timing: dict[str, float]
) -> StreamEvent:
    """The event that ends a stream; `prefix` stands in front of the generated text."""
    last = stream_event(event)
    last.generated_text = prefix + stream.text
    last.details = StreamDetails(
        finish_reason=reason_of(event),
        generated_tokens=stream.generated_tokens,
        prompt_tokens=stream.prompt_tokens,
        input_length=stream.prompt_tokens,
        seed=stream.seed,
        timing=timing,
    )
    return last


def answer_of(
    events: list[TokenEvent], stream: OutputStream, prefix: str, timing: dict[str, float] | None
) -> Answer:
    """The answer that is not streamed; `events` are all of the stream's, the last one included.

    With `timing`, milliseconds per stage, it has details.
    """
    last = events[-1]
    return Answer(
        generated_text=prefix + stream.text,
        finish_reason=reason_of(last),
        generated_tokens=stream.generated_tokens,
        prompt_tokens=stream.prompt_tokens,
        seed=stream.seed,
        details=None if timing is None else _details(events, stream, timing),
    )


def reason_of(last: TokenEvent) -> str:
    """The word for why a stream has ended; "" for an event that does not end one."""
    return last.finish_reason.value if last.finish_reason else ""


def _details(events: list[TokenEvent], stream: OutputStream, timing: dict[str, float]) -> Details:
    with_id = [stream_event(event) for event in events if event.token_id != NO_ID]
    tops = [event.top_tokens for event in with_id]
    return Details(
        finish_reason=reason_of(events[-1]),
        generated_tokens=stream.generated_tokens,
        prompt_tokens=stream.prompt_tokens,
        seed=stream.seed,
        prefill=[],
        tokens=[event.token for event in with_id],
        top_tokens=tops if any(tops) else [],
        timing=timing,
    )
