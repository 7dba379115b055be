"""How does text for people reach a terminal, or a pipe, so that it reads the same in both?

Tables have no frames.  A figure has about five digits, for microseconds and minutes stand beside
each other, and is a dash if it is not known.  Names that came from outside are neither markup nor
control characters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Page", "figure", "figures", "trimmed"]

_MAX_WIDTH = 100
_PLAIN = str.maketrans("├└─│█", "++-|#")  # lines and bars, where there is no Unicode


@contextlib.contextmanager
def trimmed(console: Console) -> Iterator[None]:
    """What is printed within has no blanks at the ends of lines, and only what can be encoded."""
    with console.capture() as capture:
        yield
    text = "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())
    encoding = console.encoding
    if not encoding.lower().startswith("utf"):
        text = text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    console.file.write(text)
    console.file.flush()


class Page:
    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._width = min(self._console.width, _MAX_WIDTH)

    def heading(self, text: str) -> None:
        self._print()
        self._print(self._clean(text), style="bold underline")

    def space(self) -> None:
        self._print()

    def say(self, text: str) -> None:
        self._print(self._clean(text))

    def table(self, head: Sequence[str], columns: Iterable[Sequence[str]], left: int = 1) -> None:
        """Column by column; the first `left` ones are words, the others end at the right."""
        rows = [*zip(*columns, strict=True)]
        needed = sum(max(map(len, column)) for column in zip(head, *rows, strict=True))
        gap = 2 if needed + 2 * len(head) <= self._width else 1
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
        for i, name in enumerate(head):
            table.add_column(self._clean(name), overflow="fold")
            table.columns[i].justify = "left" if i < left else "right"
        for row in rows:
            table.add_row(*map(self._clean, row))
        self._print()
        self._print(table)

    def _print(self, what: str | Table = "", style: str | None = None) -> None:
        with trimmed(self._console):
            self._console.print(what, style=style, highlight=False, width=self._width)

    def _clean(self, text: str) -> str:
        return escape("".join(c if c.isprintable() else "?" for c in text))


def figures(values: Iterable[float]) -> list[str]:
    return [figure(value) for value in values]


def figure(value: float, decimals: int | None = None) -> str:
    """By default as many decimals as its size leaves room for."""
    if math.isnan(value):
        return "-"
    if decimals is None:
        decimals = next((4 - i for i in range(3) if abs(value) < 10 ** (i + 1)), 1)
    return f"{value:.3g}" if abs(value) >= 1e9 else f"{value:,.{decimals}f}"
