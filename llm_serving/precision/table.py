"""How does the verdict look on a screen?  What was compared, the worst of it, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_serving.precision.comparing import Comparison
from llm_serving.precision.folder import Folder
from llm_serving.precision.manifest import Labels
from llm_serving.precision.naming import printable
from llm_serving.precision.pairing import Tie
from llm_serving.precision.reading import UNPICKLE
from llm_serving.precision.tolerances import Tolerance
from llm_serving.precision.verdict import Result, failing_requests

__all__ = ["print_report"]

_MAX_LISTED = 100
_MIN_NAME = 20  # columns for the name of a file, which is folded on a narrow screen


def print_report(result: Result, base: Folder, worst: int, console: Console) -> None:
    def say(line: str = "") -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for line in [*result.notes, *_tolerance_lines(result.compared)]:
        say(line)
    if result.compared:
        if worst:
            say()
            console.print(_table(result.compared, worst))
        say(_summary(result.compared))
    _say_list(say, "failing requests", _request_lines(result.compared))
    _say_list(say, "ambiguous, paired in the order of their times", _tie_lines(result.ties))
    repeated = sum(tie.same_ids for tie in result.ties)
    if repeated:
        say(f"\n{repeated} prefixes occur more than once in both; paired in the order of time")
    _say_list(say, "new files without a partner", result.alone)
    _say_list(say, "failed", [f"{each.name}: {each.reason}" for each in result.failures])
    for folder in sorted(result.pickled_in):
        say("\n" + UNPICKLE.format(pattern=f"{folder}/*.npy"))
    if not result.num_files:
        say(f"nothing to compare: no .npy file in {printable(str(base.path))}")
    say()
    say(f"{result.num_passed}/{result.num_files} passed")


def _say_list(say: Callable[[str], object], title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    say(f"\n{title} ({len(lines)}):")
    for line in lines[:_MAX_LISTED]:
        say(f"  {line}")
    if len(lines) > _MAX_LISTED:
        say(f"  ... and {len(lines) - _MAX_LISTED} more (--save writes all of them)")


def _tolerance_lines(compared: Sequence[Comparison]) -> list[str]:
    """Which tolerance was used for how many files, and what they are."""
    used: Counter[tuple[Tolerance, str]] = Counter()
    for each in compared:
        sides = (each.pair.base.labels, each.pair.new.labels)
        of = " against ".join("no manifest" if s is None else _describe(s) for s in sides[::-1])
        used[each.tolerance, "" if sides == (None, None) else f" ({of})"] += 1
    return [
        f"tolerance: atol {tolerance.atol:g}, rtol {tolerance.rtol:g}, {tolerance.origin}, "
        f"for {num} files{of}"
        for (tolerance, of), num in used.items()
    ]


def _describe(labels: Labels) -> str:
    known = (labels.source, labels.dtype, labels.weights, labels.kernels)
    return " ".join(filter(None, known)) or "a manifest without labels"


def _table(compared: Sequence[Comparison], worst: int) -> Table:
    title = f"the worst {min(worst, len(compared))} of {len(compared)} files"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("\nbaseline file", overflow="fold", min_width=_MIN_NAME)
    for name in ("max\nerror", "mean\nerror", "\nKL", "\ntop-1", "\nbeyond", "first\nindex", ""):
        table.add_column(name, justify="right", no_wrap=True)
    ranked = sorted(compared, key=lambda each: (each.passed, -each.max_error))
    for each in ranked[:worst]:
        first = "-" if each.first_beyond is None else str(each.first_beyond)
        table.add_row(
            Text(each.pair.base.name),
            f"{each.max_error:.3g}",
            f"{each.mean_error:.3g}",
            f"{each.kl:.3g}",
            "same" if each.same_top1 else "other",
            str(each.num_beyond),
            first,
            "ok" if each.passed else "FAILED",
        )
    return table


def _summary(compared: Sequence[Comparison]) -> str:
    same = sum(each.same_top1 for each in compared)
    count = len(compared)
    return (
        f"{count} pairs compared: max error {max(each.max_error for each in compared):.3g}, "
        f"mean error {sum(each.mean_error for each in compared) / count:.3g}, "
        f"mean KL {sum(each.kl for each in compared) / count:.3g}, "
        f"top-1 the same in {same} of {count}"
    )


def _request_lines(compared: Sequence[Comparison]) -> list[str]:
    return [
        f"{each.key}: first beyond the tolerance at position {each.beyond[0]} "
        f"({len(each.beyond)} of {len(each.positions)} positions, {each.positions[0]} to "
        f"{each.positions[-1]})"
        for each in failing_requests(compared)
    ]


def _tie_lines(ties: Sequence[Tie]) -> list[str]:
    lines = []
    for tie in ties:
        if tie.same_ids:
            continue
        keys = sorted({saved.key for pair in tie.pairs for saved in (pair.base, pair.new)})
        pairs = "; ".join(f"{pair.base.name} with {pair.new.name}" for pair in tie.pairs[:4])
        more = f"; and {len(tie.pairs) - 4} more" if len(tie.pairs) > 4 else ""
        kind = "key" if len(keys) == 1 else "different keys"
        at = tie.pairs[0].base.position
        lines.append(f"{kind} {', '.join(keys[:4])} at position {at}: {pairs}{more}")
    return lines
