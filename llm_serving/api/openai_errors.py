"""How an error is told under `/v1`: OpenAI's envelope around what every route says.

    {"error": {"message": "<sentence>", "type": ..., "param": "<field>" or null, "code": ...}}

`type` is OpenAI's word for the kind of error, and `code` our own stable word (`error_type`
elsewhere).  A body that is not valid is 400, as with OpenAI, not 422; all other statuses are the
same.  Every sentence about a field begins with its name, so `param` is read from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from llm_serving.api.errors import Problem

__all__ = ["Envelope", "OpenAIError", "OpenAIErrorBody", "envelope_of"]

Envelope = Callable[[Problem], tuple[int, msgspec.Struct]]  # the status, and the whole body

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_FIELD = re.compile(r"(?:unknown field '([^']{1,60})'|([\w.]+): )")


class OpenAIError(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    error: OpenAIError


def envelope_of(path: str) -> Envelope:
    """The envelope of the family that `path` belongs to, whether or not there is such a route."""
    return _openai if path == "/v1" or path.startswith("/v1/") else _plain


def _plain(problem: Problem) -> tuple[int, msgspec.Struct]:
    return problem.status, problem.body


def _openai(problem: Problem) -> tuple[int, msgspec.Struct]:
    status = 400 if problem.status == 422 else problem.status
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message, code = problem.body.error, problem.body.error_type
    param = _param_of(message) if status == 400 else None
    return status, OpenAIErrorBody(OpenAIError(message, kind, param, code))


def _param_of(message: str) -> str | None:
    found = _FIELD.match(message)
    return None if found is None else found[1] or found[2]
