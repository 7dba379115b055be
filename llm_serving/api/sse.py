"""How an object becomes one server-sent event: `data: {...}` and a blank line.

JSON leaves U+0085, U+2028 and U+2029 as they are, but clients that split lines the way Python's
`str.splitlines` does (httpx among them) would cut an event there, so these three are escaped.
"""

from __future__ import annotations

import msgspec

__all__ = ["encode_event"]

_encode = msgspec.json.Encoder().encode
# each sequence begins with a lead byte of UTF-8, so it never matches in the middle of another
_LINE_BREAKS = (
    (b"\xc2\x85", b"\\u0085"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)


def encode_event(event: msgspec.Struct) -> bytes:
    data = _encode(event)
    if not data.isascii():
        for raw, escaped in _LINE_BREAKS:
            data = data.replace(raw, escaped)
    return b"data: " + data + b"\n\n"
