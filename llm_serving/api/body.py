"""What a request's body says: bytes to JSON values, refusing what no field could be blamed for.

Decisions, where JSON leaves them open:

    NaN, Infinity     are read, so that validation can name the field that holds one (422)
    a repeated key    is refused (422): one of the two values would be silently ignored
    long integers     become floats, so no field has to fear a million digits
    Content-Type      is not looked at: curl says form data by default, the body decides
"""

from __future__ import annotations

import json

import numpy as np

from llm_serving.api.errors import MalformedBody
from llm_serving.errors import InvalidRequest

__all__ = ["MAX_NESTING", "nesting", "parse_json"]

MAX_NESTING = 64
MAX_DIGITS = 64
_QUOTE, _OPEN, _CLOSE, _TO_CURLY = 0x22, 0x7B, 0x7D, 0x20


def parse_json(body: bytes) -> object:
    """The JSON value in `body`.

    Raises MalformedBody (400) for no UTF-8, no JSON, or nesting deeper than MAX_NESTING, and
    InvalidRequest (422) for an object that gives a key twice.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as exc:
        raise MalformedBody(f"the body is not UTF-8: byte {exc.start} cannot be read") from exc
    if body.count(b"[") + body.count(b"{") > MAX_NESTING and nesting(body) > MAX_NESTING:
        raise MalformedBody(f"the body is nested deeper than {MAX_NESTING}")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno}, column {exc.colno}"
        raise MalformedBody(f"the body is not JSON: {exc.msg} at {where}") from exc


def nesting(body: bytes) -> int:
    """How deep arrays and objects lie in each other; brackets inside strings do not count."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    codes = np.frombuffer(unescaped, np.uint8)
    is_outside = ~np.logical_xor.accumulate(codes == _QUOTE)
    brackets = codes | _TO_CURLY  # [ and { are one bit apart, and so are ] and }
    opens = is_outside & (brackets == _OPEN)
    closes = is_outside & (brackets == _CLOSE)
    depth = np.cumsum(opens.astype(np.int8) - closes.astype(np.int8), dtype=np.int32)
    return int(depth.max(initial=0))


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise InvalidRequest(f"the key {twice[:60]!r} is given twice; give it once")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)
