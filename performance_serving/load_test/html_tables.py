"""Which tables does the page have, beside that of the requests?  Each is a string of HTML.

A figure of `figures_of` stands in an element that names it: data-figure="ttft.p99".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape

from load_test.figures import Figures, spread
from load_test.plots import LATENCIES
from load_test.results import Run
from load_test.tables import NOT_TOLD

__all__ = [
    "conditions",
    "details",
    "errors_by_kind",
    "figure",
    "latencies",
    "per_token",
    "stages",
]

_STATISTICS = ("mean", "p50", "p90", "p99", "max")
_CLASSES = {"r": "", "l": ' class="left"', "t": ' class="text"'}


def figure(name: str, value: float | None, ending: str = "") -> str:
    """An element that says which figure it holds; a share if the ending is %."""
    if value is None:
        return "–"
    shown = _number(value * 100 if ending == "%" else value)
    return f'<span data-figure="{escape(name)}">{shown}</span>{ending}'


def latencies(figures: Figures) -> str:
    rows = []
    names = {name: f"{name.upper()}, {title}" for name, title in LATENCIES.items()}
    for name, title in (names | {"lag": "lag of the client itself"}).items():
        told = getattr(figures, name)
        columns = (*_STATISTICS, "count")
        rows.append([title, *(figure(f"{name}.{c}", getattr(told, c, None)) for c in columns)])
    return _table("lrrrrrr", rows, ["milliseconds", *_STATISTICS, "of"])


def per_token(figures: Figures) -> str:
    """Milliseconds of the run, the server and the bare model, side by side."""
    told = figures.per_token
    step = (
        f"ms, with {figure('per_token.rows', told.rows)} rows a step as in this run, "
        f"context {figure('per_token.context', told.context)}"
    )
    missing = "no request had two tokens"
    rows = [
        ("of this run", "run_ms", "ms, mean TPOT", missing),
        ("of the server", "server_ms", "ms, mean decode step", NOT_TOLD),
        ("of the bare model", "bare_ms", step, NOT_TOLD),
        ("overhead over it", "overhead_min", "minutes of the run", NOT_TOLD),
    ]
    cells = []
    for title, name, note, without in rows:
        value = getattr(told, name)
        shown = figure(f"per_token.{name}", value)
        cells.append([title, shown, without if value is None else note])
    return _table("lrt", cells)


def stages(run: Run) -> str:
    """In the order in which the server names them; '' if it names none."""
    timings = [r.timing for r in run.requests if r.state == "ok" and r.timing]
    rows = []
    for stage in dict.fromkeys(name for timing in timings for name in timing):
        if (told := spread(t[stage] / 1e3 for t in timings if stage in t)) is not None:
            values = (told.mean, told.p50, told.p90, told.p99, told.max)
            rows.append([escape(stage), *map(_number, values)])
    return _table("lrrrrr", rows, ["milliseconds", *_STATISTICS]) if rows else ""


def errors_by_kind(run: Run, figures: Figures) -> str:
    examples: dict[str, str] = {}
    for r in run.requests:
        if r.error:
            examples.setdefault(r.error.kind, f"#{r.index}: {r.error.sentence}")
    rows = [
        [escape(kind), figure(f"errors.{kind}", count), escape(examples[kind])]
        for kind, count in figures.errors.items()
    ]
    return _table("lrt", rows, ["kind", "requests", "an example"])


def conditions(run: Run, figures: Figures) -> str:
    """What was asked of whom."""
    data = "{}, {} entries, digest {}".format(
        *(run.dataset.get(key, "?") for key in ("path", "num_entries", "digest"))
    )
    texts = {
        "server": f"{run.url}, model {run.model}, API {run.api}",
        "started": run.started,
        "task": f"{run.task} ({'precision' if run.task == 2 else 'speed'})",
        "data set": data,
        "tokens counted by": run.tokens_counted_by,
    }
    if run.client_cpu_share is not None:
        texts["CPU of the client"] = f"{run.client_cpu_share:.1%} of one core"
    if run.precision is not None:
        told = run.precision
        texts["logits"] = f"{told.num_written} files in {told.folder}, {told.num_failed} failed"
    rows = [[name, escape(text or NOT_TOLD)] for name, text in texts.items()]
    context = NOT_TOLD if run.max_total_tokens is None else f"{run.max_total_tokens:,} tokens"
    prompt = NOT_TOLD if figures.prompt_tokens is None else None
    rows += [
        ["context of the server", context],
        ["prompt tokens", prompt or figure("prompt_tokens", figures.prompt_tokens)],
        ["clipped to the context", figure("num_clipped", figures.num_clipped)],
        ["impossible, not sent", figure("num_impossible", figures.num_impossible)],
        ["shorter than asked, ended by the model", figure("num_short", figures.num_short)],
        ["unfinished", figure("num_unfinished", figures.num_unfinished)],
    ]
    return _table("lt", rows)


def details(run: Run) -> Iterator[str]:
    """Options and /info, as JSON."""
    for title, value in {"/info of the server": run.info, "Options": run.options}.items():
        if value:
            text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
            yield f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"


def _table(kinds: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """`kinds`: of each column l(eft), r(ight), or t(ext), which may take several lines."""
    classes = [_CLASSES[kind] for kind in kinds]
    top = "".join(f'<th scope="col"{c}>{h}</th>' for c, h in zip(classes, head, strict=False))
    lines = []
    for name, *cells in rows:
        tds = "".join(f"<td{c}>{cell}</td>" for c, cell in zip(classes[1:], cells, strict=True))
        lines.append(f'<tr><th scope="row">{name}</th>{tds}</tr>')
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"<table>{thead}<tbody>{''.join(lines)}</tbody></table>"


def _number(value: float) -> str:
    """Three digits or more; counts in full."""
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    digits = min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{digits}f}"
