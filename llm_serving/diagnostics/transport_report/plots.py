"""How do the calls of one or two transport logs look?  Two pictures.

    stages.png       how long each stage took, a box for each method
    throughput.png   how fast each call's bytes travelled, in the order of the calls

Durations span from microseconds to seconds, so their axis is logarithmic; what took no time at
all has no place there and is counted in a note.  Two logs stand side by side, on the same axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.ticker
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llm_serving.diagnostics.transport_report.log import STAGES, FloatArray, TransportLog
from llm_serving.diagnostics.transport_report.statistics import OTHER, other_ms
from llm_serving.errors import ConfigError

__all__ = ["write_plots"]

_COLORS = ("#3465a4", "#e08214", "#4d9a4a", "#a8457c", "#7a7a7a")
_GRAY = "#666666"
_STAGES = (*STAGES, OTHER, "Total_ms")
_MAX_POINTS = 4000  # of a method; drawn by lot from more, so that no rhythm is hidden
_BIN_CALLS = 100  # at least, behind each point of the line
_MAX_BINS = 60
_SMALLEST_MS = 1e-4  # what a log tells apart


def write_plots(folder: Path, logs: Sequence[TransportLog]) -> list[Path]:
    """Both pictures, in a folder that is made if it is absent.  Raises ConfigError."""
    pictures = {"stages.png": _draw_stages(logs), "throughput.png": _draw_throughput(logs)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            figure.savefig(folder / name)
    except OSError as exc:
        raise ConfigError(f"cannot write plots into {folder}: {exc.strerror or exc}") from exc
    return [folder / name for name in pictures]


def _draw_stages(logs: Sequence[TransportLog]) -> Figure:
    methods = _methods(logs)
    figure, axes = _panels(logs, "Time of each stage by method")
    for axis, log in zip(axes, logs, strict=True):
        columns = log.values | {OTHER: other_ms(log)}
        num_zeros = sum(_draw_boxes(axis, log, columns, methods, stage) for stage in _STAGES)
        axis.set_xticks(range(len(_STAGES)), [s.removesuffix("_ms") for s in _STAGES])
        axis.set_xlim(-0.6, len(_STAGES) - 0.4)
        _make_logarithmic(axis)
        if num_zeros:
            note = f"{num_zeros:,} durations under 0.1 us are not drawn"
            axis.text(0.99, 0.01, note, transform=axis.transAxes, ha="right", fontsize=8)
    axes[0].set_ylabel("milliseconds")
    note = "boxes: the middle half of the calls, and the median; whiskers: 1st to 99th percentile"
    _add_legend(figure, methods, note)
    return figure


def _draw_boxes(
    axis: Axes,
    log: TransportLog,
    columns: dict[str, FloatArray],
    methods: list[str],
    stage: str,
) -> int:
    """A box for each method beside each other; how many values are too small to be drawn."""
    num_zeros = 0
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        values = columns[stage][log.methods == method]
        drawn = values[values >= _SMALLEST_MS]
        num_zeros += int((values < _SMALLEST_MS).sum())
        if not len(drawn):
            continue
        box = axis.boxplot(
            [drawn],
            positions=[_STAGES.index(stage) - 0.4 + width * (i + 0.5)],
            widths=width * 0.8,
            whis=(1, 99),
            patch_artist=True,
            manage_ticks=False,
            flierprops={
                "marker": ".",
                "markersize": 3,
                "markeredgecolor": _COLORS[i],
                "alpha": 0.4,
            },
            medianprops={"color": "black", "linewidth": 1.2},
            whiskerprops={"color": _COLORS[i]},  # a box may be too flat to show its colour
            capprops={"color": _COLORS[i]},
        )
        box["boxes"][0].set(facecolor=_COLORS[i], alpha=0.75, edgecolor="none")
    return num_zeros


def _draw_throughput(logs: Sequence[TransportLog]) -> Figure:
    methods = _methods(logs)
    figure, axes = _panels(logs, "Throughput of each call")
    for axis, log in zip(axes, logs, strict=True):
        is_one_run = bool(np.all(np.diff(log.ids) > 0))
        places = log.ids if is_one_run else np.arange(1, len(log) + 1)
        for i, method in enumerate(methods):
            _draw_points(axis, log, method, places, _COLORS[i])
        _make_logarithmic(axis)
        axis.set_xlabel("ID of the call" if is_one_run else "place in the log, whose IDs repeat")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
        axis.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes[0].set_ylabel("MB/s (1 MB = 1024 KB = 1,048,576 bytes)")
    has_lines = any(line.get_linestyle() == "-" for axis in axes for line in axis.lines)
    note = "points: calls" + ("; line: median of neighbouring calls" if has_lines else "")
    _add_legend(figure, methods, note)
    return figure


def _draw_points(
    axis: Axes, log: TransportLog, method: str, places: npt.NDArray[np.int64], color: str
) -> None:
    speed = log.values["Throughput_MBps"]
    which = np.flatnonzero((log.methods == method) & (speed > 0))
    if not len(which):
        return
    shown = which
    if len(which) > _MAX_POINTS:
        shown = np.random.default_rng(0).choice(which, _MAX_POINTS, replace=False)
    size, alpha = (4, 0.35) if len(shown) > 500 else (6, 0.7)
    axis.plot(places[shown], speed[shown], ".", color=color, ms=size, alpha=alpha, mew=0)
    if (num_bins := min(_MAX_BINS, len(which) // _BIN_CALLS)) > 2:
        bins = np.array_split(which, num_bins)
        middles = [float(np.median(places[each])) for each in bins]
        axis.plot(middles, [float(np.median(speed[each])) for each in bins], color=color, lw=1.8)


def _panels(logs: Sequence[TransportLog], title: str) -> tuple[Figure, list[Axes]]:
    """A panel for each log, named when there are two."""
    figure = Figure(figsize=(9 if len(logs) == 1 else 13, 5.4), dpi=120, layout="constrained")
    axes = list(figure.subplots(1, len(logs), sharey=True, squeeze=False)[0])
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for axis, letter, log in zip(axes, "AB", logs, strict=False):
        name = Path(log.name).name
        label = f"{_plain(name)} ({_plain(log.transport)}, {len(log):,} calls)"
        axis.set_title(label if len(logs) == 1 else f"{letter}: {label}", fontsize=9, color=_GRAY)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _make_logarithmic(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:,.9g}"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _add_legend(figure: Figure, methods: list[str], note: str) -> None:
    patches = [Patch(color=_COLORS[i], label=_plain(name)) for i, name in enumerate(methods)]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=len(patches),
        frameon=False,
        title=note,
        title_fontsize=9,
    )


def _methods(logs: Sequence[TransportLog]) -> list[str]:
    """Those with the most time in Total; as many as there are colours."""
    weights: dict[str, float] = {}
    for log in logs:
        names, which = np.unique(log.methods, return_inverse=True)
        sums = np.bincount(which, np.nan_to_num(log.values["Total_ms"]))
        for name, weight in zip(names.tolist(), sums.tolist(), strict=True):
            weights[name] = weights.get(name, 0.0) + weight
    return sorted(weights, key=lambda name: (-weights[name], name))[: len(_COLORS)]


def _plain(text: str) -> str:
    """Without what the text renderer takes for mathematics, and what its font may lack."""
    latin = text.encode("latin-1", "replace").decode("latin-1").replace("$", r"\$")
    return "".join(c if c.isprintable() else "?" for c in latin)
