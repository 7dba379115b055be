"""`llm-serving breakdown`: where every millisecond of a running server goes.

The bare model loop needs torch, so it is a process of its own; this one never loads it.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Annotated, Any

import msgspec
import typer

from llm_serving.commands.breakdown_progress import LoadProgress
from llm_serving.commands.options import run_command
from llm_serving.commands.program import program
from llm_serving.diagnostics.breakdown.breakdown import break_down
from llm_serving.diagnostics.breakdown.live import is_busy, measure, watch
from llm_serving.diagnostics.breakdown.load import Shape
from llm_serving.diagnostics.breakdown.observation import BareFigures, Observation, load, save
from llm_serving.diagnostics.breakdown.plot import plot_breakdown
from llm_serving.diagnostics.breakdown.report import print_breakdown
from llm_serving.diagnostics.breakdown.server import Server
from llm_serving.diagnostics.breakdown.timeline import write_timeline
from llm_serving.errors import ConfigError, Unavailable

__all__ = ["main"]

_UNREACHABLE = 2


def main(argv: list[str]) -> int:
    """Exit code 0, 1 if there is nothing to break down, 2 if the server cannot be reached."""
    return run_command("breakdown", breakdown, argv)


def breakdown(
    file: Annotated[
        pathlib.Path | None,
        typer.Argument(help="a saved trace, instead of a server", show_default=False),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="the server [http://127.0.0.1:8835]", show_default=False)
    ] = None,
    streams: Annotated[
        int | None, typer.Option(min=1, max=512, help="streams side by side [1]")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of each prompt [128]")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="tokens of each answer [128]")
    ] = None,
    watch_s: Annotated[
        float | None,
        typer.Option("--watch", min=0.1, help="make no load: look at what is there, in seconds"),
    ] = None,
    bare: Annotated[
        bool, typer.Option("--bare/--no-bare", help="run the bare model loop after the load")
    ] = True,
    save_to: Annotated[
        pathlib.Path | None, typer.Option("--save", help="keep what was seen, to look at it again")
    ] = None,
    plot: Annotated[pathlib.Path | None, typer.Option(help="a picture: FILE.png")] = None,
    timeline: Annotated[
        pathlib.Path | None, typer.Option(help="the steps for ui.perfetto.dev: FILE.json")
    ] = None,
) -> int:
    """Where the time goes: service against model, in milliseconds per token for every stage.

    Makes a load of its own and compares with the bare model loop, or watches what is there
    (--watch), or looks at a saved trace again.
    """
    given = {"--streams": streams, "--prompt-tokens": prompt_tokens, "--new-tokens": new_tokens}
    _refuse(file, {"--url": url, "--watch": watch_s, "--save": save_to, **given})
    if watch_s is not None:
        _refuse_load(given)
    for path in (save_to, plot, timeline):
        _check_folder(path)
    try:
        if file is not None:
            seen = load(file)
        else:
            shape = Shape(streams or 1, prompt_tokens or 128, new_tokens or 128)
            seen = _observe(Server(url or "http://127.0.0.1:8835"), shape, watch_s, bare)
    except Unavailable as exc:
        print(f"llm-serving breakdown: {exc}", file=sys.stderr)
        return _UNREACHABLE
    if save_to is not None:
        save(seen, save_to)
    found = break_down(seen)
    print_breakdown(found)
    if plot is not None:
        plot_breakdown(found, plot)
    if timeline is not None:
        write_timeline(found.steps, timeline)
    return 0


def _observe(server: Server, shape: Shape, watch_s: float | None, bare: bool) -> Observation:
    with LoadProgress() as progress:
        if watch_s is not None:
            progress.phase("watch", round(10 * watch_s))
            return _with_note(watch(server, watch_s, progress.sleep), "only watched")
        sizes = {"load": shape.num_tokens}
        seen = measure(
            server, shape, lambda name: progress.phase(name, sizes.get(name)), progress.advance
        )
        if not bare:
            return _with_note(seen, "no loop was run (--no-bare)")
        if not server.is_on_this_machine():
            return _with_note(seen, "the server runs on another machine")
        if is_busy(seen):
            return _with_note(seen, "the server is busy with other requests")
        progress.phase("bare model loop")
        return _with_bare(seen, shape)


def _with_bare(seen: Observation, shape: Shape) -> Observation:
    """The loop in a process of its own, as the server runs its model."""
    info = seen.info
    flags = {
        "--prepared": info.get("prepared"),
        "--device": str(info.get("model_device_type", "auto")).partition(":")[0],
        "--threads": info.get("num_threads"),
        "--kv-dtype": "int8" if info.get("kv_dtype") == "int8" else None,
        "--rows": shape.streams,
        "--prompt-tokens": shape.prompt_tokens,
        "--new-tokens": shape.new_tokens,
        "--parent": os.getpid(),
    }
    words = [str(word) for flag in flags.items() if flag[1] is not None for word in flag]
    command = [*program(), "bare-loop", *words, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        figures = msgspec.json.decode(run.stdout, type=BareFigures)
    except msgspec.DecodeError:
        return _with_note(seen, f"the bare loop did not run: {_complaint(run)}")
    return msgspec.structs.replace(seen, bare=figures)


def _complaint(run: subprocess.CompletedProcess[str]) -> str:
    lines = run.stderr.strip().splitlines()
    own = [line for line in lines if line.startswith("llm-serving")]
    return (own or lines or [f"exit code {run.returncode}"])[-1].removeprefix(
        "llm-serving bare-loop: "
    )


def _with_note(seen: Observation, note: str) -> Observation:
    return msgspec.structs.replace(seen, bare_note=note)


def _refuse(file: pathlib.Path | None, given: dict[str, Any]) -> None:
    used = [flag for flag, value in given.items() if value is not None]
    if file is not None and used:
        raise ConfigError(f"{used[0]} is for a server; the saved trace {file} has been measured")


def _refuse_load(given: dict[str, Any]) -> None:
    used = [flag for flag, value in given.items() if value is not None]
    if used:
        raise ConfigError(f"--watch makes no load of its own, and {used[0]} is for one")


def _check_folder(path: pathlib.Path | None) -> None:
    """Before anything is measured for minutes, and then cannot be kept."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {path.absolute().parent} to write {path.name} into")
