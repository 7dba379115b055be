"""A bar with the time that is left; where there is no terminal, a line every few seconds."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["EtaBar"]

_SPEAK_EVERY_S = 5.0  # without a terminal


class EtaBar:
    """Work done and time left on stderr: a bar in a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("  compute"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("compute")
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> EtaBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: float, total: float) -> None:
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not self._live and now - self._spoke >= _SPEAK_EVERY_S:
            self._spoke = now
            left = (now - self._began) * (total - done) / max(done, 1e-9)
            print(
                f"  {done / total:.0%} done, about {left:.0f} s left", file=sys.stderr, flush=True
            )
