"""`llm-serving bare-loop`: the model alone, in a process of its own.

`llm-serving breakdown` starts it after its load, for the model and the threads of the server.
"""

from __future__ import annotations

import pathlib
import signal
from typing import Annotated

import msgspec
import numpy as np
import typer

from llm_serving.agent.bare_loop import BareLoop, BareStep
from llm_serving.agent.processors import num_processors
from llm_serving.commands.kernels_choice import packed_as_served
from llm_serving.commands.options import run_command
from llm_serving.commands.unwinding import end_with_parent
from llm_serving.diagnostics.breakdown.observation import BareFigures
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard
from llm_serving.prepare.cache import find_prepared, load

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Exit code 0; ConfigError says why the model cannot be run."""
    return run_command("bare-loop", bare_loop, argv)


def bare_loop(
    model: Annotated[
        str, typer.Argument(help="as `serve --model`; it must have been prepared")
    ] = "smollm2-135m-instruct",
    prepared: Annotated[
        str | None, typer.Option(help="instead of MODEL: what /info of a server calls so")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    weights: Annotated[str, typer.Option(help="as `serve --weights`")] = "auto",
    kernels: Annotated[str, typer.Option(help="as `serve --kernels`")] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="as `serve --kv-dtype`")] = "auto",
    rows: Annotated[int, typer.Option(min=1, help="sequences side by side")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens of each answer")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="how many answers, one after another")] = 2,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of the CPU kernels [processors]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="figures as one JSON object")] = False,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> int:
    """Time decode steps of a prepared model with nothing around them."""
    if parent is not None:
        end_with_parent(signal.SIGKILL, parent)
    card = _by_name(model, dtype, weights, kernels) if prepared is None else _by_key(prepared)
    num_threads = threads or num_processors(pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup"))
    loop = BareLoop(
        card,
        num_rows=rows,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        num_threads=num_threads,
        device=device,
        kv_dtype=kv_dtype,
    )
    loop.bind_thread()
    steps = [step for _ in range(rounds) for step in loop.decode()]
    figures = _figures(loop, steps, rows, num_threads)
    print(msgspec.json.encode(figures).decode() if as_json else _sentence(card, figures))
    return 0


def _figures(loop: BareLoop, steps: list[BareStep], rows: int, num_threads: int) -> BareFigures:
    step_ms, forward_ms, sample_ms = np.array(steps).mean(0).tolist()
    first, last = loop.contexts[0], loop.contexts[-1]
    return BareFigures(rows, first, last, len(steps), step_ms, forward_ms, sample_ms, num_threads)


def _sentence(card: ModelCard, figures: BareFigures) -> str:
    return (
        f"{card.name}, {card.dtype}: {figures.step_ms:.2f} ms a decode step (forward "
        f"{figures.forward_ms:.2f}, sample {figures.sample_ms:.2f}), mean of {figures.num_steps}; "
        f"rows {figures.rows}, contexts of {figures.first_context} to {figures.last_context} "
        f"tokens, {figures.num_threads} threads"
    )


def _by_name(model: str, dtype: str, weights: str, kernels: str) -> ModelCard:
    card = find_prepared(model, dtype, packed_as_served(dtype, weights, kernels))
    if card is None:
        flags = f"--dtype {dtype} --weights {weights} --kernels {kernels}"
        raise ConfigError(f"{model} is not prepared so: llm-serving prepare {model} {flags}")
    return card


def _by_key(key: str) -> ModelCard:
    if (card := load(key)) is None:
        raise ConfigError(f"no prepared model here is called {key:.40}")
    return card
