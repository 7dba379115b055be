"""How does a picture of a run look?  Colours, frame, axes and units, the same in all of them.

The colours are also the names by which the report exchanges them in its dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from load_test.results import Run

__all__ = [
    "COLOURS",
    "amount",
    "frame",
    "latency_unit",
    "legend",
    "say",
    "span",
    "spread_axis",
    "time_unit",
]

COLOURS = {  # of the data after Okabe and Ito, who chose them for every kind of eye
    "paper": "#fdfdfc",
    "ink": "#1f2328",
    "faint": "#68707a",
    "grid": "#e3e6ea",
    "ttft": "#0072b2",
    "tpot": "#009e73",
    "itl": "#aa4499",
    "e2e": "#de8f05",
    "error": "#d55e00",
}
_TITLE_IN = 0.75  # inches above the axes for two lines


def frame(
    run: Run, title: str, heights: Sequence[float], *, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A page ten inches wide: title, conditions, and axes row by row (one column shares x)."""
    height = sum(heights) + _TITLE_IN
    figure = Figure(figsize=(10, height), facecolor=COLOURS["paper"])
    rect = (0.005, 0, 0.985, 1 - _TITLE_IN / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=rect, h_pad=0.08, hspace=0.03))
    bold: dict[str, Any] = {"fontsize": 15, "weight": "bold", "color": COLOURS["ink"]}
    plain: dict[str, Any] = {"fontsize": 10, "color": COLOURS["faint"]}
    for text, top, style in ((title, 0.28, bold), (_conditions(run), 0.58, plain)):
        figure.text(0.015, 1 - top / height, text, va="center", parse_math=False, **style)
    grid = figure.subplots(
        len(heights), columns, squeeze=False, sharex=columns == 1, height_ratios=heights
    )
    panels: list[Axes] = [axes for row in grid for axes in row]
    for axes in panels:
        _plain_axes(axes)
    return figure, panels


def amount(value: float, unit: str) -> str:
    """With three digits or more."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(6, max(0, digits))}f} {unit}"


def latency_unit(longest_s: float) -> tuple[float, str]:
    """Seconds in the unit, and its name."""
    return (1e-3, "ms") if longest_s < 2 else (1.0, "s")


def time_unit(run: Run) -> tuple[float, str]:
    """For the time since the start: seconds in the unit, and its name."""
    end_s = max((max(r.last_s or 0.0, r.scheduled_s) for r in run.requests), default=0.0)
    if end_s <= 600:
        return 1.0, "s"
    return (60.0, "min") if end_s <= 5 * 3600 else (3600.0, "h")


def spread_axis(axes: Axes, which: str, values: npt.NDArray[np.float64]) -> None:
    """Logarithmic, with plain numbers, if the values lie more than a factor of 20 apart."""
    low, middle, high = np.percentile(values, (1 if which == "x" else 0, 50, 100))
    low = max(low, middle / 1e4, high / 1e6)  # gaps of zero have no logarithm
    if high <= 20 * low:
        axes.set(**{f"{which}lim": (0, high * 1.08 or 1)})
        return
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.3, high * 1.3)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    is_short = high < (300 if which == "x" else 3000) * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_short else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(NullFormatter())


def span(axes: Axes, end: float) -> None:
    """From zero to the end, and a little air."""
    axes.set_xlim(-0.02 * (end or 1), 1.02 * (end or 1))


def legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    style: dict[str, Any] = {"frameon": False, "borderaxespad": 0.3, "handlelength": 1.6}
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
    axes.legend(labelcolor=COLOURS["ink"], fontsize=10, **style, **place)


def say(axes: Axes, text: str) -> None:
    """In the place of what could not be drawn."""
    axes.grid(visible=False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 13}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, color=COLOURS["faint"], **style)


def _plain_axes(axes: Axes) -> None:
    axes.set_facecolor(COLOURS["paper"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLOURS["faint"])
    axes.tick_params(which="both", colors=COLOURS["faint"], labelcolor=COLOURS["ink"], labelsize=10)
    axes.grid(color=COLOURS["grid"], lw=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=COLOURS["ink"], fontsize=11)


def _conditions(run: Run) -> str:
    """What was measured, in one line of letters that the font has."""
    count = len(run.requests)
    load = [f"{count:,} request{'' if count == 1 else 's'}"]
    if run.options.get("concurrency"):
        load.append(f"{run.options['concurrency']} at a time")
    if run.options.get("rate"):
        load.append(f"{run.options['rate']:g} a second")
    started = run.started[:16].replace("T", " ")
    text = f"{run.model[:60]} at {run.url[:60]}, {', '.join(load)}, {started}"
    return " ".join(text.encode("latin-1", "replace").decode("latin-1").split())
