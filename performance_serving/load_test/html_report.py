"""How does a run look on one page that needs nothing else?  html_report.html is its form.

All text from the run is escaped: an error sentence can hold anything.  The pictures are SVG in
the colours of the page, so that they follow the reader's light or dark scheme; the PNGs come
along for saving.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from load_test import html_tables
from load_test.figures import Figures, Spread, figures_of
from load_test.html_requests import request_table, rows_note, state_options
from load_test.html_tables import figure
from load_test.picture_style import COLOURS
from load_test.plots import LATENCIES, pictures
from load_test.results import Run
from load_test.slo import check
from load_test.tables import NOT_TOLD

__all__ = ["write"]

_FORM = Path(__file__).with_suffix(".html")
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def write(run: Run, plots: Sequence[Path], path: Path) -> None:
    """`plots`: the PNGs of `plots.draw`, which the reader can save from the page."""
    figures = figures_of(run)
    started = run.started[:19].replace("T", " ")
    parts = {
        "title": escape(f"Load test of {run.model}"),
        "subtitle": escape(f"{run.url}, {started}"),
        "verdict": _verdict(run, figures),
        "cards": "\n".join(_cards(figures)),
        "errors": _errors(run, figures),
        "latencies": _section("Latencies", html_tables.latencies(figures)),
        "tables": "\n".join(_tables(run, figures)),
        "pictures": "\n".join(_pictures(run, plots)),
        "conditions": _section("Conditions", html_tables.conditions(run, figures)),
        "details": "\n".join(html_tables.details(run)),
        "rows_note": rows_note(run),
        "states": state_options(run),
        "requests": request_table(run),
    }
    form = _FORM.read_text(encoding="utf-8")
    page = re.sub(r"\[\[(\w+)\]\]", lambda match: parts[match.group(1)], form)
    path.write_bytes(page.encode("utf-8", "replace"))


def _verdict(run: Run, figures: Figures) -> str:
    verdicts = check(figures, run.options.get("slo") or {})
    lines = [(v.is_met, v.sentence) for v in verdicts]
    if run.precision is not None and run.precision.num_failed:
        sentence = f"{run.precision.num_failed} files of logits could not be written"
        lines.append((False, f"{sentence}: {run.precision.last_error}"))
    planned, is_good = figure("num_planned", figures.num_planned), False
    if run.is_interrupted:
        left = figure("num_unfinished", figures.num_unfinished)
        word, text = "Interrupted", f"{left} of {planned} planned requests have no end."
    elif figures.num_errors:
        failed = figure("num_errors", figures.num_errors)
        word, text = "Failed", f"{failed} of {planned} planned requests ended with an error."
    else:
        is_good = all(is_met for is_met, _ in lines)
        word = "Ended well" if is_good else "Missed an objective"
        well = figure("num_ok", figures.num_ok)
        text = f"{well} of {planned} planned requests ended well, none with an error."
    more = "".join(
        f'<p class="{"met" if is_met else "missed"}">{escape(sentence)}</p>'
        for is_met, sentence in lines
    )
    return f'<div class="verdict{"" if is_good else " bad"}"><b>{word}:</b> {text}{more}</div>'


def _cards(figures: Figures) -> Iterator[str]:
    planned, errors = figures.num_planned, figures.num_errors
    cancelled = figure("num_cancelled", figures.num_cancelled)
    yield _card(
        "requests that ended well",
        f"{figure('num_ok', figures.num_ok)} <small>of {figure('num_planned', planned)}</small>",
        f"{figure('num_errors', errors)} errors, {cancelled} cancelled",
    )
    yield _card(
        "output tokens per second",
        figure("output_tokens_per_s", figures.output_tokens_per_s),
        f"{figure('output_tokens', figures.output_tokens)} tokens",
    )
    for name in ("ttft", "tpot", "e2e"):
        yield _latency_card(name, getattr(figures, name))
    if goodput := figures.goodput:
        limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in goodput.limits.items())
        yield _card(
            "goodput",
            f"{figure('goodput.share', goodput.share, '%')} <small>good</small>",
            f"{figure('goodput.requests_per_s', goodput.requests_per_s)}/s; {escape(limits)}",
        )
    rate = figures.prefix_hit_rate
    note = NOT_TOLD if rate is None else "of the prompt tokens"
    yield _card("prefix-cache hits", figure("prefix_hit_rate", rate, "%"), note)
    yield _card(
        "requests per second",
        figure("requests_per_s", figures.requests_per_s),
        f"{figure('mean_in_flight', figures.mean_in_flight)} in flight, mean",
    )
    exec_s = f"{figure('exec_s', figures.exec_s)} <small>s</small>"
    yield _card("Exec Time", exec_s, "first send to last byte")


def _latency_card(name: str, told: Spread | None) -> str:
    p50, p90, p99 = (figure(f"{name}.{s}", getattr(told, s, None)) for s in ("p50", "p90", "p99"))
    title = f"{name.upper()}, {LATENCIES[name]}"
    return _card(title, f"{p50} <small>ms, p50</small>", f"p90 {p90}, p99 {p99}")


def _card(name: str, value: str, note: str) -> str:
    return (
        f'<div class="card"><div class="name">{name}</div>'
        f'<div class="value">{value}</div><div class="note">{note}</div></div>'
    )


def _section(title: str, table: str) -> str:
    return f'<h2>{title}</h2>\n<div class="scroll">{table}</div>'


def _errors(run: Run, figures: Figures) -> str:
    if not figures.errors:
        return ""
    return _section("Errors by kind", html_tables.errors_by_kind(run, figures))


def _tables(run: Run, figures: Figures) -> Iterator[str]:
    yield f"<div>{_section('Time per output token', html_tables.per_token(figures))}</div>"
    if stages := html_tables.stages(run):
        yield f"<div>{_section('Where a request spent its time in the server', stages)}</div>"


def _pictures(run: Run, plots: Sequence[Path]) -> Iterator[str]:
    files = {path.stem.rpartition("_")[2]: path for path in plots}
    for name, picture in pictures(run).items():
        caption = ""
        if (path := files.get(name)) is not None:
            data = base64.b64encode(path.read_bytes()).decode()
            link = f'<a download="{escape(path.name)}" href="data:image/png;base64,{data}">'
            caption = f"<figcaption>{link}save as PNG</a></figcaption>"
        yield f"<figure>{_svg(name, picture)}{caption}</figure>"


def _svg(name: str, picture: Figure) -> str:
    """For use inside a page: with ids of its own, in the page's colours, as wide as it can be."""
    made = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        picture.savefig(made, format="svg", metadata=_NO_METADATA)
    text = made.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", head)
    text = f'{head} role="img" aria-label="{name}">{rest}'
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, code in COLOURS.items():
        text = text.replace(code, f"var(--{colour})")
    return text
