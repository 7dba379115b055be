"""Who is told how far a preparation has come.

Preparing a model takes seconds to minutes; whoever waits sees named phases, bytes and, now and
then, a sentence.  Nothing here knows a terminal: `commands/` does.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Quiet"]


class Progress(Protocol):
    def phase(self, name: str) -> None:
        """A phase begins; the one before it, if any, has ended."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of this phase are behind us.  May be called very often."""

    def say(self, sentence: str) -> None:
        """Something a person should know."""


class Quiet:
    """Tells nobody."""

    def phase(self, name: str) -> None:
        pass

    def advance(self, done: int, total: int) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass
