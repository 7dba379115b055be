"""What a diagnosis says of one item: a verdict, the number, and what to do.

OK       as it should be
slow     works, but beyond a threshold of `thresholds`; alone it fails nothing
broken   does not work, or will not; the exit code is 1
skipped  not looked at, and `found` says why: not permitted, or nothing there to look at
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

__all__ = ["Finding", "Number", "Verdict", "exit_code", "megabytes"]

Verdict = Literal["OK", "slow", "broken", "skipped"]
Number = float | int | str | None

_UNITS = (("GB", 1024**3), ("MB", 1024**2), ("KB", 1024), ("B", 1))


class Finding(msgspec.Struct, frozen=True):
    item: str
    verdict: Verdict
    found: str  # one sentence, with the number
    cure: str = ""  # what to do about it
    values: dict[str, Number] = {}  # the same for programs
    trace: str = ""  # tracebacks, of both sides where there are two


def exit_code(findings: Iterable[Finding]) -> int:
    return int(any(finding.verdict == "broken" for finding in findings))


def megabytes(num_bytes: float) -> str:
    """For people; 1 MB is 1024 KB of 1024 bytes, as everywhere in this project."""
    unit, divisor = next((u, d) for u, d in _UNITS if num_bytes >= d or d == 1)
    size = num_bytes / divisor
    return f"{size:.0f} {unit}" if size >= 100 or size == int(size) else f"{size:.1f} {unit}"
