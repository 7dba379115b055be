"""What does a run look like?  Four pictures, as PNG files or as figures for the report.

    latency      TTFT and E2E of each request over its scheduled time; below, those that ended badly
    percentiles  TTFT, TPOT, ITL and E2E as cumulative shares, with p50, p90 and p99
    tokens       output tokens a second over time
    load         running and waiting over time, by the server's word; else the open requests

Numbers written into a picture come from `figures_of`.  Every picture can be drawn of every run:
what there is nothing of is said where it would have been.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from load_test.figures import Figures, Spread, figures_of
from load_test.picture_data import (
    FloatArray,
    array_of,
    band,
    medians,
    open_requests,
    shares,
    token_rate,
)
from load_test.picture_style import (
    COLOURS,
    amount,
    frame,
    latency_unit,
    legend,
    say,
    span,
    spread_axis,
    time_unit,
)
from load_test.results import RequestRecord, Run

__all__ = ["LATENCIES", "NUM_PICTURES", "draw", "pictures", "stem"]

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "e2e": "end to end",
}
NUM_PICTURES = 4
_DOTS_PER_INCH = 150
_MANY = 2000  # points: beyond, they are drawn as an image even in an SVG
_ENOUGH = 60  # points for a line of medians
_BADLY = {"error": "x", "cancelled": "D", "impossible": "s", "unfinished": "v"}
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def draw(run: Run, folder: Path) -> Iterator[Path]:
    """One PNG each, 1500 pixels wide; the names come from the start of the run."""
    for name, figure in pictures(run).items():
        path = folder / f"{stem(run)}_{name}.png"
        figure.savefig(path, dpi=_DOTS_PER_INCH)
        yield path


def pictures(run: Run) -> dict[str, Figure]:
    figures = figures_of(run)
    return {
        "latency": _latency(run),
        "percentiles": _percentiles(run, figures),
        "tokens": _tokens(run, figures),
        "load": _load(run),
    }


def stem(run: Run) -> str:
    """What the log of the run is called, whatever is written as its start."""
    try:
        return f"test_performance_{datetime.fromisoformat(run.started):%Y-%m-%d-%H_%M}"
    except ValueError:
        return "test_performance_" + re.sub(r"[^0-9A-Za-z]+", "-", run.started)[:32]


def _latency(run: Run) -> Figure:
    states = [state for state in _BADLY if any(r.state == state for r in run.requests)]
    heights = [5.2, *([0.3 + 0.24 * len(states)] if states else [])]
    figure, panels = frame(run, "Latency over time", heights)
    ok = [r for r in run.requests if r.state == "ok"]
    series = {"ttft": array_of(r.ttft_s for r in ok), "e2e": array_of(r.e2e_s for r in ok)}
    every = np.concatenate(list(series.values()))
    every = every[np.isfinite(every)]
    scale, unit = time_unit(run)
    per, latency = latency_unit(every.max(initial=0.0))
    due = array_of(r.scheduled_s for r in ok) / scale
    for (name, seconds), marker in zip(series.items(), "o^", strict=True):
        _draw_requests(panels[0], due, seconds / per, name, marker)
    if every.size:
        spread_axis(panels[0], "y", every / per)
        legend(panels[0])
    else:
        say(panels[0], "no request ended well")
    panels[0].set_ylabel(f"latency ({latency})")
    if states:
        _draw_badly(panels[1], run.requests, states, scale)
    panels[-1].set_xlabel(f"scheduled time ({unit} since the start)")
    span(panels[-1], max((r.scheduled_s for r in run.requests), default=0.0) / scale)
    return figure


def _draw_requests(axes: Axes, due: FloatArray, values: FloatArray, name: str, marker: str) -> None:
    """Each of them, and the medians of neighbours if there are enough."""
    is_dense = due.size >= _ENOUGH
    size, alpha = (5, 0.2) if due.size > _MANY else (14, 0.4) if is_dense else (38, 0.85)
    style: dict[str, Any] = {"s": size, "alpha": alpha, "marker": marker, "lw": 0, "gid": name}
    label = f"{name.upper()}, {LATENCIES[name]}"
    style["label"] = "_points" if is_dense else label
    axes.scatter(due, values, color=COLOURS[name], rasterized=due.size > _MANY, **style)
    if is_dense:
        axes.plot(
            *medians(due, values), color=COLOURS[name], lw=2.2, label=f"{label} (line: median)"
        )


def _draw_badly(
    axes: Axes, requests: Sequence[RequestRecord], states: Sequence[str], scale: float
) -> None:
    """A row of marks for each way to end badly, with the number beside it."""
    names = []
    for row, state in enumerate(states):
        due = array_of(r.scheduled_s for r in requests if r.state == state) / scale
        colour = COLOURS["error" if state == "error" else "faint"]
        style: dict[str, Any] = {"marker": _BADLY[state], "s": 22, "lw": 1.2, "gid": state}
        axes.scatter(due, [row] * due.size, color=colour, rasterized=due.size > _MANY, **style)
        names.append(f"{state}: {due.size:,}")
    axes.set_yticks(range(len(states)), names)
    axes.set_ylim(len(states) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _percentiles(run: Run, figures: Figures) -> Figure:
    figure, panels = frame(run, "How the latencies spread", [3.4, 3.4], columns=2)
    ok = [r for r in run.requests if r.state == "ok"]
    values = {
        "ttft": array_of(r.ttft_s for r in ok),
        "tpot": array_of(r.tpot_s for r in ok),
        "itl": array_of(gap for r in ok for gap in r.itl_s),
        "e2e": array_of(r.e2e_s for r in ok),
    }
    limits = figures.goodput.limits if figures.goodput else {}
    for axes, (name, seconds) in zip(panels, values.items(), strict=True):
        axes.set_title(f"{name.upper()}, {LATENCIES[name]}", loc="left", color=COLOURS["ink"])
        axes.set(ylim=(0, 1.04), xlabel=name.upper())
        axes.set_ylabel("share of gaps" if name == "itl" else "share of requests")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        spread: Spread | None = getattr(figures, name)
        if spread is None:
            say(axes, "no second token" if ok and name != "ttft" else "no request ended well")
        else:
            known = seconds[np.isfinite(seconds)]
            _draw_shares(axes, known, name, spread, limits.get(name))
    return figure


def _draw_shares(
    axes: Axes, seconds: FloatArray, name: str, spread: Spread, limit_ms: float | None
) -> None:
    per, unit = latency_unit(spread.p99 / 1e3)
    curve_s, share_of = shares(seconds)
    axes.plot(curve_s / per, share_of, color=COLOURS[name], lw=2, gid=name)
    axes.set_xlabel(f"{name.upper()} ({unit})")
    spread_axis(axes, "x", seconds / per)
    lines = []
    for label, share in _PERCENTILES.items():
        at = getattr(spread, label) / 1e3 / per
        axes.axhline(share, color=COLOURS["faint"], lw=0.8, ls=(0, (2, 3)))
        style: dict[str, Any] = {"ms": 7, "mec": COLOURS["paper"], "gid": f"{name}-{label}"}
        axes.plot(at, share, "o", color=COLOURS[name], **style)
        lines.append(f"{label}  {amount(at, unit):>9}")
    if limit_ms is not None:
        limit = limit_ms / 1e3 / per
        axes.axvline(limit, color=COLOURS["error"], lw=1.4, ls=(0, (5, 2)), gid=f"{name}-goal")
        lines.append(f"goal {amount(limit, unit):>9}")
    _write_beside(axes, spread.p50 / 1e3 / per, "\n".join(lines))


def _write_beside(axes: Axes, middle: float, text: str) -> None:
    """Below the curve on its right; above it on its left, if it rises late."""
    low, high = axes.get_xlim()
    if axes.get_xscale() == "log":
        low, middle, high = np.log((low, max(low, middle), high))  # gaps can be of zero
    is_late = (middle - low) > 0.55 * (high - low)
    x, y, ha, va = (0.03, 0.86, "left", "top") if is_late else (0.97, 0.07, "right", "bottom")
    box = {"boxstyle": "round,pad=0.45", "fc": COLOURS["paper"], "ec": COLOURS["grid"]}
    style: dict[str, Any] = {"ha": ha, "va": va, "family": "monospace", "bbox": box}
    axes.text(x, y, text, transform=axes.transAxes, color=COLOURS["ink"], **style)


def _tokens(run: Run, figures: Figures) -> Figure:
    figure, (axes,) = frame(run, "Output tokens per second", [5.2])
    scale, unit = time_unit(run)
    axes.set(xlabel=f"time ({unit} since the start)", ylabel="output tokens per second")
    if (rate := token_rate(run.requests)) is None:
        say(axes, "no token came")
        return figure
    edges, counted, lost = rate.edges_s / scale, rate.counted, rate.lost
    label = f"counted, in steps of {rate.step_s:g} s"
    axes.stairs(counted, edges, fill=True, color=COLOURS["ttft"], alpha=0.25)
    axes.stairs(counted, edges, color=COLOURS["ttft"], lw=1.6, label=label, gid="counted")
    if lost.any():
        style: dict[str, Any] = {"label": "on requests that failed later", "gid": "lost"}
        axes.stairs(
            counted + lost, edges, baseline=counted, fill=True, color=COLOURS["error"], **style
        )
    mean = figures.output_tokens_per_s
    label = f"mean from first send to last byte: {mean:,.1f}"
    axes.axhline(mean, color=COLOURS["ink"], lw=1.4, ls=(0, (5, 2)), label=label)
    axes.set_ylim(0, max(float((counted + lost).max()), mean) * 1.08)
    legend(axes)
    span(axes, edges[-1])
    return figure


def _load(run: Run) -> Figure:
    """The server's samples; where it gives none, what the client knows, and the title says so."""
    told = [s for s in run.samples if s.running is not None or s.waiting is not None]
    title = "Running and waiting requests, by the server"
    if not told:
        title = "Open requests, counted by the client (this server does not tell its load)"
    figure, (axes,) = frame(run, title, [5.2])
    scale, unit = time_unit(run)
    axes.set(xlabel=f"time ({unit} since the start)", ylabel="requests")
    at, num_open = open_requests(run.requests)
    colour = COLOURS["faint" if told else "ttft"]
    _draw_count(axes, at, num_open, scale, "open at the client", colour)
    for name, colour in (("running", COLOURS["ttft"]), ("waiting", COLOURS["e2e"])):
        known = [(s.at_s, count) for s in told if (count := getattr(s, name)) is not None]
        times, counts = array_of(at for at, _ in known), array_of(count for _, count in known)
        _draw_count(axes, times, counts, scale, name, colour)
    if at.size or told:
        legend(axes)
    else:
        say(axes, "no request was sent")
    axes.set_ylim(0, max(axes.get_ylim()[1], 1) * 1.05)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    span(axes, max([*at, *(s.at_s for s in told)], default=0.0) / scale)
    return figure


def _draw_count(
    axes: Axes, at: FloatArray, counts: FloatArray, scale: float, name: str, colour: str
) -> None:
    """Every change of it; or, if they are too many, its mean and what it swings between."""
    if not at.size:
        return
    style: dict[str, Any] = {"color": colour, "gid": name.partition(" ")[0]}
    if (pieces := band(at, counts)) is None:
        style["clip_on"] = False  # a line at 0 is as thick as any
        axes.step(at / scale, counts, where="post", lw=1.8, label=name, **style)
        return
    axes.fill_between(pieces.at / scale, pieces.low, pieces.high, color=colour, alpha=0.2, lw=0)
    axes.plot(pieces.at / scale, pieces.mean, lw=1.8, label=name, **style)
    axes.set_ylabel("requests (line: mean, band: least to most)")
