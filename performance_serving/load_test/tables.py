"""How do the figures look on a screen of 100 columns, and in the log?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from load_test.figures import Figures, Goodput, PerToken, Spread
from load_test.results import PrecisionDump, Run
from load_test.slo import Verdict

__all__ = ["report_of"]

NOT_TOLD = "not told by this server"

Row = tuple[str, str]


def report_of(run: Run, figures: Figures, verdicts: Sequence[Verdict]) -> RenderableType:
    """Everything that a run has to say."""
    parts: list[RenderableType] = [
        _pairs("requests", list(_request_rows(figures))),
        _latencies(figures),
        _pairs("the run", list(_run_rows(run, figures))),
    ]
    if verdicts:
        parts.append(_pairs("service level objectives", []))
        styles = {True: "green", False: "bold red"}
        parts += [Text(f"  {v.sentence}", style=styles[v.is_met]) for v in verdicts]
    if examples := list(_error_examples(run)):
        parts.append(_pairs("an example of each error", examples))
    return Group(*parts)


def _pairs(title: str, rows: Sequence[Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = f"\n{title}", "left", "bold"
    table.add_column(min_width=32)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", Text(value))
    return table


def _request_rows(figures: Figures) -> Iterator[Row]:
    yield "planned", str(figures.num_planned)
    yield "sent", str(figures.num_sent)
    yield "ended well", str(figures.num_ok)
    yield "errors", str(figures.num_errors)
    for kind, count in figures.errors.items():
        yield f"  {kind}", str(count)
    yield "cancelled by the client", str(figures.num_cancelled)
    yield "clipped to the context", str(figures.num_clipped)
    why = " (the prompt fills the context)" if figures.num_impossible else ""
    yield "impossible, not sent", f"{figures.num_impossible}{why}"
    why = " (the model ended them)" if figures.num_short else ""
    yield "shorter than asked", f"{figures.num_short}{why}"
    if figures.num_unfinished:
        yield "unfinished", f"{figures.num_unfinished} (interrupted)"


def _latencies(figures: Figures) -> Table:
    table = Table(title="\nlatency in ms", title_justify="left", title_style="bold", box=None)
    table.add_column("", no_wrap=True, min_width=22)
    for name in ("mean", "p50", "p90", "p99", "max", "of"):
        table.add_column(name, justify="right", min_width=7)
    for name, spread in (
        ("TTFT, first token", figures.ttft),
        ("TPOT, per token", figures.tpot),
        ("ITL, between events", figures.itl),
        ("E2E, last byte", figures.e2e),
        ("lag of this client", figures.lag),
    ):
        table.add_row(f" {name}", *_cells(spread))
    return table


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 5 + ["0"]
    values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    return [*(f"{value:.2f}" for value in values), str(spread.count)]


def _run_rows(run: Run, figures: Figures) -> Iterator[Row]:
    yield "Exec Time", f"{figures.exec_s:.3f} s, first send to last byte"
    yield "requests/s", f"{figures.requests_per_s:.4g}"
    yield "output tokens/s", f"{figures.output_tokens_per_s:.2f}"
    yield "output tokens", str(figures.output_tokens)
    prompt = NOT_TOLD if figures.prompt_tokens is None else str(figures.prompt_tokens)
    yield "prompt tokens", prompt
    yield "in flight, mean", f"{figures.mean_in_flight:.2f} requests"
    if figures.goodput:
        yield _goodput_row(figures.goodput)
    rate = figures.prefix_hit_rate
    yield "prefix-cache hits", NOT_TOLD if rate is None else f"{rate:.1%} of the prompt tokens"
    yield from _per_token_rows(figures.per_token)
    if run.precision:
        yield "logits written", _dump(run.precision)
    if run.client_cpu_share is not None:
        yield "CPU of this client", f"{run.client_cpu_share:.1%} of one core"


def _goodput_row(goodput: Goodput) -> Row:
    limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in goodput.limits.items())
    good = f"{goodput.requests_per_s:.4g} requests/s"
    return "goodput", f"{good}: {goodput.num_good}, {goodput.share:.1%} ({limits})"


def _per_token_rows(told: PerToken) -> Iterator[Row]:
    yield "ms per token, this run", "-" if told.run_ms is None else f"{told.run_ms:.3f} (mean TPOT)"
    server = NOT_TOLD
    if told.server_ms is not None:
        server = f"{told.server_ms:.3f} (mean decode step)"
    yield "ms per token, the server's own", server
    bare, overhead = NOT_TOLD, NOT_TOLD
    if told.bare_ms is not None and told.rows is not None:
        rows = f"{told.rows:.2f} rows, as in a step of this run; context {told.context}"
        if told.max_bare_rows is not None and told.rows > told.max_bare_rows:
            rows += f"; measured for up to {told.max_bare_rows} only, so it is more"
        bare = f"{told.bare_ms:.3f} ({rows})"
    if told.overhead_min is not None:
        overhead = f"{told.overhead_min:.3f} minutes of the run"
    yield "ms per token, the bare model's", bare
    yield "overhead over the bare model", overhead


def _dump(dump: PrecisionDump) -> str:
    text = f"{dump.num_written} files in {dump.folder} (as the server sees it)"
    if not dump.num_written:
        text += "; no answer has reached a position whose logits it writes"
    if dump.num_failed:
        text += f"; {dump.num_failed} FAILED: {dump.last_error}"
    return text


def _error_examples(run: Run) -> Iterator[Row]:
    seen = set()
    for record in run.requests:
        if record.error and record.error.kind not in seen:
            seen.add(record.error.kind)
            yield record.error.kind, f"#{record.index}: {record.error.sentence}"
