"""SIGTERM as Ctrl-C: children are ended and partial folders removed on the way out.

A child that must not outlive its parent, however that goes, asks the kernel for a signal then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

__all__ = ["end_with_parent", "unwind_on_sigterm"]

_PR_SET_PDEATHSIG = 1  # prctl(2)


@contextlib.contextmanager
def unwind_on_sigterm() -> Iterator[None]:
    """Within: SIGTERM raises SystemExit(143) in the main thread."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent(number: signal.Signals, parent_pid: int | None = None) -> None:
    """Get the signal when the thread that started this process ends; at once if it has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), number)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
