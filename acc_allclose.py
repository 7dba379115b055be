"""Are our logits the baseline's?  Compares two folders of .npy files, pair by pair.

    python acc_allclose.py --base_path file_npy_base --new_path file_npy

A file is called <time>_<key>_<position>.npy and holds the logits behind one token; a manifest.jsonl
beside it says which token ids it stands for.  The last line is `213/214 passed`.

Exit code: 0 if every baseline file passed, 1 if one did not or there was nothing to compare, 2 for
wrong arguments.  The work is in llm_serving/precision; of that it needs what numpy and rich are
enough for, so it runs from a checkout, without the package or its other libraries installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm_serving.errors import ConfigError
from llm_serving.precision.folder import read_folder
from llm_serving.precision.table import print_report
from llm_serving.precision.tolerances import DEFAULT, Asked
from llm_serving.precision.verdict import as_json, compare_folders

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    base, new = options.base_path, options.new_path
    if (wrong := _wrong(base, new)) is not None:
        print(f"acc_allclose: {wrong}", file=sys.stderr)
        return 2
    try:
        folders = read_folder(base), read_folder(new)
        asked = Asked(options.atol, options.rtol)
        with Bar(Console(stderr=True)) as bar:
            result = compare_folders(*folders, asked, bar.show)
        if options.save is not None:
            options.save.write_text(json.dumps(as_json(result), indent=1) + "\n")
    except ConfigError as exc:
        print(f"acc_allclose: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:
        print(f"acc_allclose: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    print_report(result, folders[0], options.worst, console)
    return 0 if result.passed else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneSentenceParser(
        prog="acc_allclose.py",
        description="Compare the logits in two folders of .npy files; exit code 0 if all pass.",
        allow_abbrev=False,
    )
    for name, what in (("base", "the baseline"), ("new", "what is checked")):
        flags = f"--{name}_path", f"--{name}-path"
        parser.add_argument(*flags, type=pathlib.Path, required=True, metavar="FOLDER", help=what)
    for name, what in (("atol", "absolute"), ("rtol", "relative")):
        parser.add_argument(
            f"--{name}",
            type=_tolerance,
            help=f"{what} tolerance (default {getattr(DEFAULT, name):g}; with a manifest what is "
            "documented of its dtype, weights and kernels)",
        )
    parser.add_argument(
        "--worst", type=_count, default=10, metavar="N", help="rows of the table (default 10)"
    )
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="write a JSON report")
    return parser.parse_args(argv)


def _wrong(base: pathlib.Path, new: pathlib.Path) -> str | None:
    for flag, path in (("--base_path", base), ("--new_path", new)):
        if not path.is_dir():
            return f"{flag}: {path} is not a folder"
    if base.samefile(new):
        return f"--base_path and --new_path are the same folder, {base}: that proves nothing"
    return None


class OneSentenceParser(argparse.ArgumentParser):
    """A user's mistake is one sentence, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"acc_allclose: {message}; --help shows every option\n")


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} came; it must be a number from 0 on")
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} came; it must be a whole number from 0 on")
    return int(text)


class Bar:
    """Shows itself on stderr once the comparison has taken two seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("compared"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._next = time.monotonic() + 2.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.task_ids:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        if not self._console.is_terminal:
            self._next = now + 5.0
            self._console.print(f"compared {done} of {total}", highlight=False)
            return
        if not self._bar.task_ids:
            self._bar.add_task("compared")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
