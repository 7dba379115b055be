"""Which files does a run leave, and where?

    OUT/testLog/test_performance_2025-07-23-14_05.log     every figure, a line per request
                                              .json    the result, see results.py
                                              .html    one page that needs nothing else
                                              _*.png   the pictures

A second run within the same minute gets -2 behind the time; nothing is written over.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

from load_test.errors import NotUsable
from load_test.results import RequestRecord

__all__ = ["LogFile", "OutputFiles", "request_line"]


class OutputFiles:
    def __init__(self, out_dir: Path, started: datetime, kinds: Sequence[str]) -> None:
        """Makes the folder, so that it fails now and not after the run.  Raises NotUsable."""
        folder = out_dir / "testLog"
        self.kinds = kinds
        self._stem = _free(folder / f"test_performance_{started:%Y-%m-%d-%H_%M}")
        if kinds:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = self.json.with_suffix(".partial")
                probe.touch()
                probe.unlink()
            except OSError as exc:
                raise NotUsable(f"cannot write into {folder}: {exc.strerror}") from None

    @property
    def log(self) -> Path:
        return self._named(".log")

    @property
    def json(self) -> Path:
        return self._named(".json")

    @property
    def html(self) -> Path:
        return self._named(".html")

    def picture(self, drawn: Path) -> Path:
        """Where one that is called ..._NAME.png belongs."""
        return self._named(f"_{drawn.stem.rpartition('_')[2]}{drawn.suffix}")

    def _named(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)


class LogFile:
    """Written as the run goes, so that a run that dies leaves its log."""

    def __init__(self, path: Path | None) -> None:
        """None: nothing is written."""
        self._file: TextIO | None = None if path is None else path.open("x", encoding="utf-8")

    def line(self, text: str) -> None:
        if self._file is not None:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def request_line(record: RequestRecord) -> str:
    """One request, for people who read with grep."""
    words = [f"#{record.index}", record.state, f"entry {record.dataset_index}"]
    words.append(f"due {record.scheduled_s:.3f} s")
    for name, value in (
        ("lag", record.lag_s),
        ("TTFT", record.ttft_s),
        ("TPOT", record.tpot_s),
        ("E2E", record.e2e_s),
    ):
        if value is not None:
            words.append(f"{name} {value * 1e3:.1f} ms")
    clipped = " (clipped)" if record.is_clipped else ""
    prompt = "?" if record.prompt_tokens is None else record.prompt_tokens
    words.append(f"{prompt} + {record.output_tokens} of {record.asked_tokens} tokens{clipped}")
    if record.request_id:
        words.append(f"id {record.request_id}")
    if record.error:
        words.append(f"{record.error.kind}: {record.error.sentence}")
    return ", ".join(words)


def _free(stem: Path) -> Path:
    candidate, number = stem, 1
    while any(candidate.parent.glob(f"{candidate.name}[._]*")):
        number += 1
        candidate = stem.with_name(f"{stem.name}-{number}")
    return candidate
