"""How far a measurement is: a bar where there is a terminal, a line per phase where there is none.

It is drawn twice a second and no more, for it runs beside what it measures.  To stderr: stdout
belongs to results.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["LoadProgress"]


class LoadProgress:
    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        console = Console(file=self._stream)
        self._is_live = console.is_terminal
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=2,
        )

    def __enter__(self) -> LoadProgress:
        if self._is_live:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._is_live:
            self._bar.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        if not self._is_live:
            print(f"{name} ...", file=self._stream, flush=True)
        for task in list(self._bar.task_ids):
            self._bar.remove_task(task)
        self._bar.add_task(name, total=total)

    def advance(self, amount: int = 1) -> None:
        """From any thread."""
        self._bar.advance(self._bar.task_ids[-1], amount)

    def sleep(self, seconds: float) -> None:
        """A tenth of a second is one of the phase's parts."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            self.advance()
