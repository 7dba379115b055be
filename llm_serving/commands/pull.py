"""`llm-serving pull NAME`: fetch a model by its short name, check it, keep it in the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_serving.commands.console import ConsoleProgress
from llm_serving.commands.options import run_command
from llm_serving.commands.unwinding import unwind_on_sigterm
from llm_serving.errors import ConfigError
from llm_serving.prepare.catalog import CATALOG
from llm_serving.prepare.download import pull as download

__all__ = ["main"]

_KNOWN = "; ".join(f"{entry.name}: {entry.about}" for entry in CATALOG.values())


def main(argv: list[str]) -> int:
    """Exit code 0 when the file is in the cache; ConfigError says why it can not be."""
    with unwind_on_sigterm():
        return run_command("pull", pull, argv)


def pull(
    name: Annotated[str, typer.Argument(help=f"which model. {_KNOWN}", show_default=False)],
) -> int:
    """Fetch a model by name into ${XDG_CACHE_HOME:-~/.cache}/llm-serving/ and print its path.

    Safe to repeat, to interrupt and to run twice at a time; what is there already is verified.
    """
    entry = CATALOG.get(name)
    if entry is None:
        raise ConfigError(f"no model {name!r} to pull; known: {', '.join(CATALOG)}")
    with ConsoleProgress() as progress:
        path = download(entry, progress)
    print(path)
    return 0
