"""SIGTERM as Ctrl-C: children are ended and partial folders removed on the way out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["unwind_on_sigterm"]


@contextlib.contextmanager
def unwind_on_sigterm() -> Iterator[None]:
    """Within: SIGTERM raises SystemExit(143) in the main thread."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
