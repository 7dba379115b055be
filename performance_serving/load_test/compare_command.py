"""`compare before.json after.json`: what has become of the figures, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from load_test import results
from load_test.comparison import Comparison, Ratio, compare_runs
from load_test.option_parser import OneSentenceParser
from load_test.screen import Screen

__all__ = ["compare"]


def compare(argv: Sequence[str]) -> int:
    """Exit code 0.  Raises ResultFileError."""
    parser = OneSentenceParser(
        prog="test_serving_performance.py compare",
        description="Ratios of two results, second / first, with 95 % bootstrap intervals.",
    )
    parser.add_argument("first", type=Path, help="the JSON of the run before")
    parser.add_argument("second", type=Path, help="the JSON of the run after")
    given = parser.parse_args(argv)
    screen = Screen()
    made = compare_runs(results.load(given.first), results.load(given.second))
    screen.say(f"first   {given.first}\nsecond  {given.second}")
    screen.show(_table(made))
    how = "in pairs, of those that ended well in both" if made.is_paired else "each on its own"
    screen.say(
        f"95 % intervals: bootstrap over {made.num_first} and {made.num_second} requests, {how}"
    )
    for doubt in made.doubts:
        screen.say(f"warning: {doubt}")
    screen.say(_gain(made))
    return 0


def _table(made: Comparison) -> Table:
    table = Table(box=None)
    table.add_column("")
    for name in ("first", "second", "ratio", "95 % interval"):
        table.add_column(name, justify="right")
    table.add_column("")
    for ratio in made.ratios:
        table.add_row(*_cells(ratio))
    return table


def _cells(row: Ratio) -> tuple[str, ...]:
    ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
    interval = "one value a run"
    if row.low is not None and row.high is not None:
        interval = f"{row.low:.3f} to {row.high:.3f}"
    return row.name, f"{row.first:.3f}", f"{row.second:.3f}", ratio, interval, row.verdict


def _gain(made: Comparison) -> str:
    times = f"Exec Time: {made.first_exec_s:.3f} s, then {made.second_exec_s:.3f} s"
    gain = made.gain_percent
    if gain is None:
        return f"{times}; the first has sent nothing"
    return f"{times}: {abs(gain):.1f} % {'less' if gain >= 0 else 'more'} (gain {gain:+.1f} %)"
