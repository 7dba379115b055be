"""`llm-serving transport-report FILE`: what a transport log says, in tables, plots and advice."""

from __future__ import annotations

import pathlib
from contextlib import nullcontext
from typing import Annotated

import msgspec
import typer

from llm_serving.commands.console import ConsoleProgress
from llm_serving.commands.options import run_command
from llm_serving.diagnostics.page import Page
from llm_serving.diagnostics.transport_report.advice import advise, explain_other
from llm_serving.diagnostics.transport_report.comparison import compare
from llm_serving.diagnostics.transport_report.log import TransportLog, read_transport_log
from llm_serving.diagnostics.transport_report.plots import write_plots
from llm_serving.diagnostics.transport_report.report import as_json, print_comparison, print_report
from llm_serving.diagnostics.transport_report.statistics import summarise
from llm_serving.errors import ConfigError

__all__ = ["main"]

_SHOW_PROGRESS_BYTES = 16 << 20  # what takes more than a second or two


def main(argv: list[str]) -> int:
    """Exit code 0 if there is a report; ConfigError says what is wrong with the log."""
    return run_command("transport-report", transport_report, argv)


def transport_report(
    file: Annotated[
        pathlib.Path,
        typer.Argument(
            help="what --transport-log wrote, or a log in the older fixed-width format",
            show_default=False,
        ),
    ],
    other: Annotated[
        pathlib.Path | None,
        typer.Argument(help="a second log, to be compared with the first", show_default=False),
    ] = None,
    plots: Annotated[
        pathlib.Path | None,
        typer.Option(help="a folder for stages.png and throughput.png", show_default=False),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="how many requests FILE is of (default: what its end says)"),
    ] = None,
    json: Annotated[
        pathlib.Path | None,
        typer.Option(help="a file for all figures, in full precision", show_default=False),
    ] = None,
) -> int:
    """Say where the time of the calls to the agent went, which stand out, and what helps."""
    logs = [_read(path) for path in (file, other) if path is not None]
    counted = [summarise(logs[0], requests), *map(summarise, logs[1:])]
    advice = [advise(log, statistics) for log, statistics in zip(logs, counted, strict=True)]
    page = Page()
    explanations = explain_other(logs[0], counted[0])
    print_report(page, logs[0], counted[0], advice[0], explanations)
    reports = [as_json(*each) for each in zip(logs, counted, advice, strict=True)]
    report: dict[str, object] = {"logs": reports}
    if other is not None:
        comparison = compare(counted[0], counted[1])
        print_comparison(page, logs[0], logs[1], comparison)
        report["comparison"] = comparison
    if json is not None:
        _write(json, msgspec.json.format(msgspec.json.encode(report), indent=2))
    if plots is not None:
        for path in write_plots(plots, logs):
            print(f"wrote {path}")
    return 0


def _read(path: pathlib.Path) -> TransportLog:
    is_long = path.is_file() and path.stat().st_size > _SHOW_PROGRESS_BYTES
    with ConsoleProgress() if is_long else nullcontext() as progress:
        if progress is None:
            return read_transport_log(path)
        progress.phase(f"read {path.name}")
        return read_transport_log(path, progress.advance)


def _write(path: pathlib.Path, content: bytes) -> None:
    try:
        path.write_bytes(content + b"\n")
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror or exc}") from exc
