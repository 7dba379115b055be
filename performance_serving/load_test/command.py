"""From the command line to the exit code: a load test, or the comparison of two."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from load_test import html_report, plots, results
from load_test.compare_command import compare
from load_test.errors import NotUsable
from load_test.figures import Figures, figures_of
from load_test.options import Options, parse
from load_test.output_files import LogFile, OutputFiles
from load_test.procedure import perform
from load_test.results import ResultFileError, Run
from load_test.screen import Screen, plain_text
from load_test.slo import Verdict, check
from load_test.tables import report_of

__all__ = ["main"]

INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """The exit code: see `--help`."""
    try:
        return compare(argv[1:]) if argv[:1] == ["compare"] else _load_test(parse(argv))
    except (NotUsable, ResultFileError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing more is saved", file=sys.stderr)
        return INTERRUPTED


def _load_test(options: Options) -> int:
    started, screen = datetime.now().astimezone(), Screen()
    files = OutputFiles(options.out_dir, started, options.save)
    log = LogFile(files.log if "log" in options.save else None)
    try:
        log.line(_headline(options, started))
        run = asyncio.run(perform(options, started, screen, log))
        figures = figures_of(run)
        verdicts = check(figures, options.slo)
        last = _last_line(run, figures)
        report = report_of(run, figures, verdicts)
        log.line(f"{plain_text(report)}\n\n{last}")
        screen.show(report)
        is_saved = _save(run, figures, verdicts, files, screen)
        screen.say(last)
    except NotUsable as exc:
        log.line(f"error: {exc}")
        raise
    finally:
        log.close()
    return _exit_code(run, figures, verdicts) or int(not is_saved)


def _headline(options: Options, started: datetime) -> str:
    named = ", ".join(f"{key}={value}" for key, value in options.as_json().items())
    return f"load test of {options.url}, {started.isoformat(timespec='seconds')}\n{named}\n"


def _last_line(run: Run, figures: Figures) -> str:
    if run.is_interrupted:
        ended = figures.num_planned - figures.num_unfinished
        return (
            f"Interrupted after {ended} of {figures.num_planned} requests; "
            f"Exec Time is {figures.exec_s:.6f}"
        )
    return f"All Tasks Done; Exec Time is {figures.exec_s:.6f}"


def _save(
    run: Run,
    figures: Figures,
    verdicts: Sequence[Verdict],
    files: OutputFiles,
    screen: Screen,
) -> bool:
    """The result first: it is what cannot be made again.  False if not all could be written."""
    saved = [files.log] if "log" in files.kinds else []
    try:
        if "json" in files.kinds:
            summary = asdict(figures) | {"slo": [v.sentence for v in verdicts]}
            results.save(run, files.json, summary)
            saved.append(files.json)
        if {"png", "html"} & {*files.kinds}:
            saved += _draw(run, files, screen)
    except OSError as exc:
        screen.say(f"\nnot everything could be saved: {exc.filename}: {exc.strerror}")
        return False
    finally:
        if saved:
            screen.say("\nsaved: " + "\n       ".join(str(path) for path in saved))
    return True


def _draw(run: Run, files: OutputFiles, screen: Screen) -> list[Path]:
    """The pictures and the page, as far as they are wanted."""
    saved: list[Path] = []
    progress = screen.progress("drawing the pictures:", plots.NUM_PICTURES)
    with tempfile.TemporaryDirectory() as folder, progress as show:
        pictures = []
        show(0, "")
        for path in plots.draw(run, Path(folder)):
            pictures.append(path)
            show(len(pictures), "")
        if "png" in files.kinds:
            pictures = [Path(shutil.move(path, files.picture(path))) for path in pictures]
            saved += pictures
        if "html" in files.kinds:
            show(len(pictures), "and the page")
            html_report.write(run, pictures, files.html)
            saved.append(files.html)
    return saved


def _exit_code(run: Run, figures: Figures, verdicts: Sequence[Verdict]) -> int:
    if run.is_interrupted:
        return INTERRUPTED
    lost_logits = run.precision is not None and run.precision.num_failed > 0
    missed = not all(verdict.is_met for verdict in verdicts)
    return int(figures.num_errors > 0 or missed or lost_logits)
