"""How is a server asked, and what do its events say?  TGI's and OpenAI's streams, side by side.

Both ask greedily.  A dialect writes what an event tells into the request's record, and says
whether a token came with it and whether it was the last.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from load_test.results import RequestRecord
from load_test.sse import BadEvent

__all__ = ["Dialect", "ErrorEvent", "OpenAI", "Seen", "Tgi", "make_dialect"]


class ErrorEvent(Exception):
    """The server ended a stream with an error; the message is what it said."""


class Seen(NamedTuple):
    has_token: bool
    is_last: bool


class Dialect(Protocol):
    path: str

    def body(self, prompt: str, max_new_tokens: int) -> bytes: ...

    def read(self, data: bytes, record: RequestRecord) -> Seen: ...


class Tgi:
    def __init__(self, model: str, *, ignore_eos: bool = False) -> None:
        self.path = f"/models/{quote(model, safe='')}/generate"
        self._more = {"ignore_eos": True} if ignore_eos else {}

    def body(self, prompt: str, max_new_tokens: int) -> bytes:
        parameters = {"max_new_tokens": max_new_tokens, "do_sample": False, **self._more}
        return _encode({"inputs": prompt, "parameters": parameters, "stream": True})

    def read(self, data: bytes, record: RequestRecord) -> Seen:
        event = _decode(data)
        token, details = event.get("token"), event.get("details")
        is_last = isinstance(details, dict) or event.get("generated_text") is not None
        if isinstance(details, dict):
            record.output_tokens = _count(details, "generated_tokens") or record.output_tokens
            record.prompt_tokens = _count(details, "prompt_tokens")
            if record.prompt_tokens is None:
                record.prompt_tokens = _count(details, "input_length")
            record.finish_reason = _word(details.get("finish_reason"))
            record.timing = _durations(details.get("timing")) or record.timing
        elif not isinstance(token, dict) and not is_last:
            raise BadEvent(f"an event without a token came: {data[:200]!r}")
        return Seen(isinstance(token, dict) and token.get("id") != -1, is_last)


class OpenAI:
    def __init__(self, model: str, *, ignore_eos: bool = False) -> None:
        self.path = "/v1/completions"
        self._more: dict[str, object] = {"model": model, "temperature": 0, "stream": True}
        self._more["stream_options"] = {"include_usage": True}
        if ignore_eos:
            self._more["ignore_eos"] = True

    def body(self, prompt: str, max_new_tokens: int) -> bytes:
        return _encode({"prompt": prompt, "max_tokens": max_new_tokens, **self._more})

    def read(self, data: bytes, record: RequestRecord) -> Seen:
        """Not every server sends an event for each token: `usage` has the right count.

        A token can have no text (part of a character, EOS).  In the event of the end that is not
        to be told from no token at all, until `usage`, right behind it, counts one more.
        """
        if data.strip() == b"[DONE]":
            return Seen(False, True)
        event, is_one_more = _decode(data), False
        if isinstance(usage := event.get("usage"), dict):
            record.output_tokens = _count(usage, "completion_tokens") or record.output_tokens
            record.prompt_tokens = _count(usage, "prompt_tokens")
            is_one_more = record.output_tokens == len(record.token_s) + 1
        choices = event.get("choices")
        if not isinstance(choices, list):
            raise BadEvent(f"an event without choices came: {data[:200]!r}")
        if not choices or not isinstance(choices[0], dict):
            return Seen(is_one_more and record.finish_reason is not None, False)
        reason = _word(choices[0].get("finish_reason"))
        record.finish_reason = reason or record.finish_reason
        is_only = reason is not None and not record.token_s
        return Seen(bool(choices[0].get("text")) or reason is None or is_only, False)


def make_dialect(api: str, model: str, *, ignore_eos: bool = False) -> Dialect:
    """`api` is tgi or openai."""
    return (Tgi if api == "tgi" else OpenAI)(model, ignore_eos=ignore_eos)


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _decode(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise BadEvent(f"an event that is not JSON came: {data[:200]!r}") from None
    if not isinstance(event, dict):
        raise BadEvent(f"an event that is not an object came: {data[:200]!r}")
    if (error := event.get("error")) is not None:
        raise ErrorEvent(_message(error))
    return event


def _message(error: object) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])[:500]
    return str(error)[:500]


def _count(value: dict[str, Any], name: str) -> int | None:
    count = value.get(name)
    return count if isinstance(count, int) and count >= 0 else None


def _durations(value: object) -> dict[str, float] | None:
    """Stage -> milliseconds; what is no number is left out."""
    if not isinstance(value, dict):
        return None
    return {name: ms for name, ms in value.items() if type(ms) in (int, float)}


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None
