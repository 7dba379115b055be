"""How progress looks to a person: a bar where there is a terminal, plain lines where there is none.

Everything goes to stderr; stdout belongs to results.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

__all__ = ["ConsoleProgress"]

_SPEAK_EVERY_S = 5.0  # without a terminal


class ConsoleProgress:
    """Prints each phase with its seconds when it ends; see prepare.progress.Progress."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        console = Console(file=self._stream)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            transient=True,
        )
        self._name: str | None = None
        self._began = self._spoke = 0.0

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end(completed=exc[0] is None)

    def phase(self, name: str) -> None:
        self._end(completed=True)
        self._name = name
        self._began = self._spoke = time.monotonic()
        if name.startswith(("download", "wait")):
            self._print(f"{name} ...")  # it may be long before there is more to tell
        if self._live:
            self._bar.add_task(name, total=None, visible=False)  # until there is a number
            self._bar.start()

    def advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._live:
            self._bar.update(self._bar.task_ids[-1], completed=done, total=total, visible=True)
        elif now - self._spoke >= _SPEAK_EVERY_S and done < total:
            self._spoke = now
            self._print(f"  {done / 1e6:.0f} of {total / 1e6:.0f} MB ({100 * done // total} %)")

    def say(self, sentence: str) -> None:
        self._end(completed=True)
        self._print(sentence)

    def _end(self, *, completed: bool) -> None:
        if self._live:
            self._bar.stop()
            for task in list(self._bar.task_ids):
                self._bar.remove_task(task)
        if self._name is not None and completed:
            self._print(f"{self._name}: {time.monotonic() - self._began:.1f} s")
        self._name = None

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
