"""How every command reads its arguments: one typer function, one exit code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

__all__ = ["run_command"]


def run_command(name: str, command: Callable[..., int], argv: list[str]) -> int:
    """Parse and run; the command's exit code, or 2 and a sentence for wrong arguments."""
    # Without rich: its markup eats "[64]", and its table cuts the names of long flags.
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        raise typer.Exit(command(*args, **options))

    app.command(name)(run)
    try:
        app(argv, prog_name=f"llm-serving {name}")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    return 0
