"""One line of a transport log: does it name the columns, or is it a call?

Separated by commas, or by runs of blanks as in the older format; there a method may consist of
several words, a number may have its thousands set apart, and N/A or - stands for none.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from llm_serving.transport.call_log import COLUMNS

__all__ = ["Layout", "Row", "find_layout", "parse_row"]

_MIN_KNOWN = 3  # so many of our columns make a line the one that names them
_OPTIONAL = ("Throughput_MBps",)
_NONE = frozenset({"", "-", "--", "n/a", "na", "none", "null"})
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?", re.ASCII)
_ID = re.compile(r"\d{1,15}", re.ASCII)


class Row(NamedTuple):
    call_id: int
    method: str
    values: tuple[float, ...]  # of COLUMNS without the first two; NaN: none given


@dataclass(frozen=True, slots=True)
class Layout:
    is_csv: bool
    num_columns: int
    where: dict[str, int]  # the place of each of COLUMNS that there is

    @property
    def missing(self) -> list[str]:
        return [name for name in COLUMNS if name not in self.where and name not in _OPTIONAL]


def find_layout(line: str) -> Layout | None:
    """The layout if this line names columns, whatever their spelling: Send_ms or Send(ms)."""
    is_csv = "," in line
    names = line.split(",") if is_csv else re.sub(r"\s+\(", "(", line).replace("|", " ").split()
    where: dict[str, int] = {}
    for i, name in enumerate(names):
        if column := _BY_LETTERS.get(_letters(name)):
            where.setdefault(column, i)
    return Layout(is_csv, len(names), where) if len(where) >= _MIN_KNOWN else None


def parse_row(line: str, layout: Layout) -> Row | str:
    """The call of a line, or why it is none."""
    fields = _split(line, layout)
    if len(fields) != layout.num_columns:
        return f"{len(fields)} fields, not {layout.num_columns},"
    where = layout.where
    call_id = fields[where["ID"]].replace(",", "")
    if not _ID.fullmatch(call_id):
        return "no ID"
    method = "".join(c if c.isprintable() else "?" for c in fields[where["Method"]].strip())
    values = []
    for name in COLUMNS[2:]:
        value = _number(fields[where[name]]) if name in where else math.nan
        if value is None:
            return f"no number for {name}"
        values.append(value)
    return Row(int(call_id), method[:40] or "?", tuple(values))


def _split(line: str, layout: Layout) -> list[str]:
    if layout.is_csv:
        return line.split(",")
    words = line.replace("|", " ").split()
    if (extra := len(words) - layout.num_columns) > 0:  # a method of several words
        at = layout.where["Method"]
        words[at : at + extra + 1] = [" ".join(words[at : at + extra + 1])]
    return words


def _number(text: str) -> float | None:
    """NaN if the text stands for none, None if it is no number."""
    try:
        value = float(text)
        return value if math.isfinite(value) else math.nan
    except ValueError:
        text = text.strip().lower()
    if text in _NONE:
        return math.nan
    return float(text.replace(",", "")) if _THOUSANDS.fullmatch(text) else None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


_BY_LETTERS = {_letters(name): name for name in COLUMNS} | {"throughputmbs": "Throughput_MBps"}
