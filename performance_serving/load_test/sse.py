"""Where does one server-sent event end and the next begin, whatever the pieces they come in?"""

from __future__ import annotations

__all__ = ["BadEvent", "EventBuffer"]

_FIELDS = (b"event", b"id", b"retry")  # known, and of no interest here


class BadEvent(Exception):
    """The bytes are no server-sent events; the message is a sentence."""


class EventBuffer:
    """Feed bytes, get the data of each event that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises BadEvent for a line that is none of an event."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                self._take(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def flush(self) -> list[bytes]:
        """What is left at the end of a stream whose server has left out the last blank line."""
        return self.feed(b"\n\n")

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name and name not in _FIELDS:
            raise BadEvent(f"not a line of server-sent events: {line[:80]!r}")
