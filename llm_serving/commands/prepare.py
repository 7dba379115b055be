"""`llm-serving prepare MODEL`: convert a model into the cache, as at the first start of `serve`."""

from __future__ import annotations

import signal
from typing import Annotated

import msgspec
import typer

from llm_serving.commands.console import ConsoleProgress
from llm_serving.commands.kernels_choice import packed_as_served
from llm_serving.commands.options import run_command
from llm_serving.commands.unwinding import end_with_parent, unwind_on_sigterm
from llm_serving.errors import ConfigError
from llm_serving.model_card import served_as
from llm_serving.prepare.prepare import prepare as convert

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Exit code 0 when the model is ready; ConfigError says why it can not be served."""
    with unwind_on_sigterm():
        return run_command("prepare", prepare, argv)


def prepare(
    model: Annotated[
        str,
        typer.Argument(
            help="a name `pull` knows or a hub id (organisation/name), which are downloaded if "
            "they are not here; a Hugging Face folder; a .gguf file",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            help="what to compute in: float32, bfloat16, float16, or auto: what the model was "
            "saved in; if it is quantised, bfloat16 where the processor computes in it, else "
            "float32",
        ),
    ] = "auto",
    weights: Annotated[str, typer.Option(help="as `serve --weights`")] = "auto",
    kernels: Annotated[str, typer.Option(help="as `serve --kernels`")] = "auto",
    device: Annotated[str, typer.Option(help="as `serve --device`")] = "auto",
    parent: Annotated[
        int | None, typer.Option(hidden=True, help="the process without which this one is useless")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="print the card, or what is wrong, as one line of JSON")
    ] = False,
) -> int:
    """Make a model ready to be served: check it, build its tokenizer, convert its weights.

    The result lies in ${XDG_CACHE_HOME:-~/.cache}/llm-serving/prepared/ until the source changes.

    Phases and their seconds go to stderr, the result to stdout.
    """
    if parent is not None:
        end_with_parent(signal.SIGTERM, parent)
    try:
        with ConsoleProgress() as progress:
            packed_as = packed_as_served(dtype, weights, kernels, device)
            needs_native = kernels == "native"
            card = convert(model, dtype, progress, packed_as, needs_native=needs_native)
    except ConfigError as exc:
        if not json:
            raise
        print(msgspec.json.encode({"error": str(exc)}).decode())
        return 1
    if json:
        print(msgspec.json.encode(card).decode())
    else:
        print(f"{card.name}: {card.architecture}, {served_as(card)}")
    return 0
