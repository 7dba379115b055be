"""What ends a load test before it has begun: a message of one sentence, and exit code 2."""

from __future__ import annotations

__all__ = ["NotUsable"]


class NotUsable(Exception):
    """The server, the data set or an option cannot be used; the message says what would be."""
