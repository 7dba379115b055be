"""The breakdown as one picture: what a step of each kind costs, and how master and agent interlock.

Above: the agent's stages stacked to the period; the master's, parted into exposed and hidden.
Below: some steps in a row, and the moment between two of them under a magnifying glass.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llm_serving.diagnostics.breakdown.breakdown import Breakdown
from llm_serving.diagnostics.breakdown.report import heading
from llm_serving.diagnostics.breakdown.steps import KindFigures, StageFigures
from llm_serving.diagnostics.breakdown.timeline import agent_stretches
from llm_serving.diagnostics.breakdown.trace import Steps
from llm_serving.errors import ConfigError
from llm_serving.step_trace import AGENT_STAGES, MASTER_STAGES, MASTER_STAMPS, StepRecord

__all__ = ["plot_breakdown"]

_COLOURS = {
    "idle": "#d1495b",
    "prepare": "#edae49",
    "forward": "#2e6f95",
    "sample": "#66a182",
    "result_write": "#8d6a9f",
}
_EXPOSED, _HIDDEN = "#d1495b", "#b9c4cc"
_NUM_STEPS = 10
_AROUND = 0.35  # of what the magnifying glass is about, left and right of it

Stretch = tuple[float, float, str]  # begin and end in milliseconds, colour


def plot_breakdown(breakdown: Breakdown, path: pathlib.Path) -> None:
    figure = Figure(figsize=(13, 11), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    title, *about = heading(breakdown)
    figure.suptitle(f"{title}\n{'; '.join(about[:2])}", fontsize=11, parse_math=False)
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 0.7, 1.15))
    _agent_bars(figure.add_subplot(grid[0, 0]), breakdown.kinds)
    _master_bars(figure.add_subplot(grid[0, 1]), breakdown.kinds)
    first = _first_of_timeline(breakdown)
    shown = range(first, min(first + _NUM_STEPS, len(breakdown.steps)))
    _timeline(figure.add_subplot(grid[1, :]), breakdown.steps, shown)
    _border(figure.add_subplot(grid[2, :]), breakdown.steps, shown)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot write the picture: {exc}") from exc


def _agent_bars(axes: Axes, kinds: list[KindFigures]) -> None:
    left = np.zeros(len(kinds))
    labels = [f"{kind.name}\n{kind.count} steps\n{kind.rows:.1f} rows" for kind in kinds]
    for stage in AGENT_STAGES:
        width = np.array([kind.mean(stage) for kind in kinds])
        axes.barh(labels, width, left=left, color=_COLOURS[stage], label=stage.replace("_", " "))
        left += width
    for i, kind in enumerate(kinds):
        axes.text(left[i], i, f" {kind.period.mean:.1f}", va="center")
    axes.set_xlim(0, 1.15 * left.max())
    axes.invert_yaxis()
    axes.set_xlabel("ms per step (mean)")
    axes.set_title("The agent: stages of a period")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.36), ncols=5, frameon=False)


def _master_bars(axes: Axes, kinds: list[KindFigures]) -> None:
    """For each stage a pair of stacked parts for each kind, side by side."""
    height = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        stages = _master(kind)
        at = np.arange(len(stages)) + (k - (len(kinds) - 1) / 2) * height
        exposed = np.array([stage.exposed_ms or 0.0 for stage in stages])
        hidden = np.array([stage.hidden_ms or 0.0 for stage in stages])
        axes.barh(at, exposed, height * 0.9, color=_EXPOSED)
        axes.barh(at, hidden, height * 0.9, left=exposed, color=_HIDDEN)
        for y, width in zip(at, exposed + hidden, strict=True):
            axes.text(width, y, f" {kind.name}", va="center", fontsize=7, color="#555555")
    axes.set_yticks(range(len(MASTER_STAGES)), [name.replace("_", " ") for name in MASTER_STAGES])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(stage.spread.mean for k in kinds for stage in _master(k)))
    axes.set_xlabel("ms per step (mean)")
    axes.set_title("The master: what the agent waits for, and what is hidden")
    parts = {"exposed": _EXPOSED, "hidden beside the model": _HIDDEN}
    handles = [Patch(color=colour, label=label) for label, colour in parts.items()]
    axes.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.36), ncols=2, frameon=False
    )


def _master(kind: KindFigures) -> tuple[StageFigures, ...]:
    return kind.stages[len(AGENT_STAGES) :]


def _first_of_timeline(breakdown: Breakdown) -> int:
    """Where so many steps of the tree's kind stand in a row, as near to the middle as can be."""
    wanted = np.isin(breakdown.steps.column("step_id"), breakdown.basis.steps.column("step_id"))
    count = min(_NUM_STEPS, len(wanted))
    matches = np.convolve(wanted, np.ones(count, np.int64), "valid")
    best = np.flatnonzero(matches == matches.max())
    return int(best[len(best) // 2])


def _timeline(axes: Axes, steps: Steps, shown: range) -> None:
    records = _records(steps, shown)
    zero = records[0].previous
    for record in records:
        _draw(axes, 1, list(_agent_parts(record, zero)))
        middle = (record.previous + record.done) / 2
        if record.period < 0.04 * (records[-1].done - zero):
            continue  # no room for a number
        axes.text((middle - zero) / 1e6, 1.45, str(record.step_id), ha="center", fontsize=8)
    for name in MASTER_STAGES:
        row = -0.55 if name == "frame_receive" else 0
        _draw(axes, row, list(_master_parts(steps, shown, name, zero)), height=0.45)
    axes.set_xlim(0, (records[-1].done - zero) / 1e6)
    axes.set_ylim(-1, 1.8)
    axes.set_yticks([1, 0, -0.55], ["agent", "master", "frame receive"])
    axes.set_xlabel("ms")
    axes.set_title(f"{len(records)} steps in a row (numbers: step ids)")


def _border(axes: Axes, steps: Steps, shown: range) -> None:
    """From the end of a step until the next one runs and the master is done, every stage apart."""
    pair = _typical_pair(steps, shown)
    before, after = _records(steps, pair)[0], _records(steps, pair)[-1]
    zero = before.result_write if len(pair) > 1 else after.previous
    length = _moment_end(steps, pair, zero) - zero
    around = _AROUND * max(length, 1)
    rows = ["agent", *MASTER_STAGES]
    near = range(max(0, pair[0] - 3), min(len(steps), pair[-1] + 4))
    for record in _records(steps, near):
        _draw(axes, 0, list(_agent_parts(record, zero)))
    for i, name in enumerate(MASTER_STAGES):
        _draw(axes, i + 1, list(_master_parts(steps, near, name, zero)))
    axes.set_xlim(-around / 1e6, (length + around) / 1e6)
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"ms from when step {before.step_id} was sampled")
    axes.set_title(f"between steps {before.step_id} and {after.step_id}")
    handles = [Patch(color=c, label=name.replace("_", " ")) for name, c in _COLOURS.items()]
    handles += [Patch(color=_EXPOSED, label="exposed"), Patch(color=_HIDDEN, label="hidden")]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=7, frameon=False
    )


def _typical_pair(steps: Steps, shown: range) -> range:
    """Two steps in a row, between which it took neither very long nor very short."""
    pairs = [range(i, i + 2) for i in shown[:-1]]
    gaps = [int(steps.column("forward")[p[1]] - steps.column("result_write")[p[0]]) for p in pairs]
    ordered = sorted(zip(gaps, range(len(pairs)), strict=True))
    return pairs[ordered[len(pairs) // 2][1]] if pairs else shown


def _moment_end(steps: Steps, pair: range, begin: int) -> int:
    """The next step runs, the master has ended this one and, if that is soon, sent another."""
    before, after = _records(steps, pair)[0], _records(steps, pair)[-1]
    end = max(after.forward, before.end)
    following = _records(steps, range(pair[0], min(len(steps), pair[-1] + 4)))
    sent = min((record.sent for record in following if record.schedule >= before.end), default=end)
    return max(end, sent) if sent - end < end - begin else end


def _records(steps: Steps, places: range) -> list[StepRecord]:
    return [StepRecord(*row) for row in steps.table[places.start : places.stop].tolist()]


def _agent_parts(record: StepRecord, zero: int) -> Iterator[Stretch]:
    for name, begin, end in agent_stretches(record):
        yield (begin - zero) / 1e6, (end - zero) / 1e6, _COLOURS[name]


def _master_parts(steps: Steps, places: range, stage: str, zero: int) -> Iterator[Stretch]:
    """Each stretch of a stage as hidden, and what lies within an idle stage on top of it."""
    first, last = MASTER_STAMPS[stage]
    near = range(max(0, places.start - 4), min(len(steps), places.stop + 4))
    idle = [(record.waiting, record.received) for record in _records(steps, near)]
    for record in _records(steps, near):
        begin, end = getattr(record, first), getattr(record, last)
        yield (begin - zero) / 1e6, (end - zero) / 1e6, _HIDDEN
        for start, stop in idle:
            if (low := max(start, begin)) < (high := min(stop, end)):
                yield (low - zero) / 1e6, (high - zero) / 1e6, _EXPOSED


def _draw(axes: Axes, row: float, parts: list[Stretch], height: float = 0.8) -> None:
    stretches = [(begin, end - begin) for begin, end, _ in parts]
    colours = [colour for *_, colour in parts]
    axes.broken_barh(
        stretches,
        (row - height / 2, height),
        facecolors=colours,
        edgecolors=colours,
        linewidth=0.5,  # without, a short one cannot be seen
    )
