"""Which status and which words an error becomes: the one mapping from the error tree to HTTP.

Every envelope is `{"error": "<sentence>", "error_type": "<stable word>"}`, and bounded: it never
holds more than MAX_SENTENCE characters, whatever came in (`openai_errors` says the same in
OpenAI's form).  What nobody expected is 500 "internal" with the request id and nothing else; the
traceback stays in the log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from llm_serving.errors import (
    AgentError,
    InvalidRequest,
    Overloaded,
    RequestAborted,
    RequestFailed,
    ServingError,
    Unavailable,
)

__all__ = [
    "BodyTooLarge",
    "ClientGone",
    "DeadlineExceeded",
    "ErrorBody",
    "MalformedBody",
    "Problem",
    "UnknownModel",
    "problem_of",
    "problem_of_status",
]

MAX_SENTENCE = 1000


class MalformedBody(ServingError):
    """No JSON at all, so no field of it can be named."""

    code = "validation"


class UnknownModel(ServingError):
    code = "model_not_found"


class BodyTooLarge(ServingError):
    code = "body_too_large"


class DeadlineExceeded(ServingError):
    code = "deadline"


class ClientGone(Exception):
    """Nobody is left to answer; never becomes an answer, and is no fault of anybody."""


_STATUS: dict[type[ServingError], int] = {
    MalformedBody: 400,
    UnknownModel: 404,
    BodyTooLarge: 413,
    InvalidRequest: 422,
    Overloaded: 429,
    RequestFailed: 500,  # it would fail again, so no client should come back with it
    Unavailable: 503,
    AgentError: 503,  # the work was lost, not the request's fault: it may come again
    RequestAborted: 503,  # by us: a client that went away reads no status
    DeadlineExceeded: 504,
}
_COMES_BACK = {429, 503}
_WORD = {400: "validation", 404: "not_found", 405: "method_not_allowed", 422: "validation"}


class ErrorBody(msgspec.Struct, frozen=True):
    error: str
    error_type: str


@dataclass(frozen=True, slots=True)
class Problem:
    status: int
    body: ErrorBody
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


def problem_of(exc: Exception, request_id: str, retry_after_s: float = 1.0) -> Problem:
    """How to answer `exc`; 500 without its words unless the error tree says otherwise."""
    status = next((_STATUS[kind] for kind in type(exc).__mro__ if kind in _STATUS), None)
    if status is None or not isinstance(exc, ServingError):
        sentence = f"internal error; the log tells more under request id {request_id}"
        return Problem(500, ErrorBody(sentence, ServingError.code))
    body = ErrorBody(_bounded(str(exc) or exc.code), exc.code)
    seconds = str(max(1, math.ceil(retry_after_s))).encode()
    return Problem(status, body, [(b"retry-after", seconds)] if status in _COMES_BACK else [])


def problem_of_status(status: int, sentence: str) -> Problem:
    """An answer that the web framework found on its own: no such path, no such method."""
    return Problem(status, ErrorBody(_bounded(sentence), _WORD.get(status, ServingError.code)))


def _bounded(sentence: str) -> str:
    if len(sentence) > MAX_SENTENCE:
        sentence = sentence[: MAX_SENTENCE - 3] + "..."
    return sentence.encode(errors="backslashreplace").decode()  # half a surrogate pair is no text
