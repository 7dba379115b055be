"""What does the user see?  A live line on a terminal, a plain one every few seconds elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

__all__ = ["Screen", "plain_text"]

_REDRAW_S = 0.25
_SPEAK_S = 5.0
_PLAIN_WIDTH = 100  # where there is no terminal that has one


class Screen:
    def __init__(self, console: Console | None = None) -> None:
        """By default on stdout."""
        self._console = console or Console(highlight=False)

    def say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        if self._console.is_terminal:
            self._console.print(renderable)
        else:
            self.say(plain_text(renderable))

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        """Call what it yields with the number done and a text, as often as you like."""
        if self._console.is_terminal:
            with Progress(
                TextColumn(what),
                BarColumn(30),
                TextColumn("{task.completed}/{task.total}" if total else "{task.completed}"),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                auto_refresh=False,
                transient=True,
            ) as bar:
                task = bar.add_task(what, total=total, text="")

                def draw(done: int, text: str) -> None:
                    bar.update(task, completed=done, text=text, refresh=True)

                yield _at_most_every(_REDRAW_S, draw)
        else:
            of = f" of {total}" if total else ""
            yield _at_most_every(
                _SPEAK_S, lambda done, text: self.say(f"{what} {done}{of}  {text}".rstrip())
            )


def plain_text(renderable: RenderableType) -> str:
    """As it looks in a file: no colours, and nothing but words at the end of a line."""
    sink = io.StringIO()
    Console(file=sink, width=_PLAIN_WIDTH, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def _at_most_every(seconds: float, call: Callable[[int, str], None]) -> Callable[[int, str], None]:
    last_s = time.monotonic() if seconds == _SPEAK_S else 0.0  # what is quick needs no line

    def limited(done: int, text: str) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= seconds:
            last_s = now_s
            call(done, text)

    return limited
