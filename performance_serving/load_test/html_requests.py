"""How does the table of requests look on the page?  Plain rows; the page's script sorts them."""

from __future__ import annotations

from html import escape

from load_test.results import STATES, RequestRecord, Run

__all__ = ["MAX_ROWS", "request_table", "rows_note", "state_options"]

MAX_ROWS = 2000
_LEFT = {"state", "finish", "id"}


def request_table(run: Run) -> str:
    """At most MAX_ROWS: those that did not end well, then the slowest; in the order of the plan."""
    requests = run.requests
    if len(requests) > MAX_ROWS:
        worst = sorted(requests, key=lambda r: (r.state == "ok", -(r.e2e_s or 0.0)))
        requests = sorted(worst[:MAX_ROWS], key=lambda r: r.index)
    head = "".join(
        f'<th scope="col"{_class(name)}><button type="button">{name}</button></th>'
        for name in _row_of(RequestRecord(0, 0, "", 0.0, 0))
    )
    rows = "\n".join(map(_row, requests))
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def rows_note(run: Run) -> str:
    count = len(run.requests)
    which = "All, in the order of the plan."
    if count > MAX_ROWS:
        which = (
            f"{MAX_ROWS:,} of {count:,}: those that did not end well first, then the slowest. "
            "The JSON file of the run has all of them."
        )
    return f"{which} A click on a heading sorts."


def state_options(run: Run) -> str:
    """For a choice of one state, with their numbers."""
    counts = {state: sum(r.state == state for r in run.requests) for state in STATES}
    options = [f'<option value="{s}">{s} ({n:,})</option>' for s, n in counts.items() if n]
    return f'<option value="">every state</option>{"".join(options)}'


def _row(request: RequestRecord) -> str:
    cells = "".join(
        f"<td{_class(name)}>{escape(text)}</td>" for name, text in _row_of(request).items()
    )
    return f'<tr data-state="{request.state}">{cells}</tr>'


def _class(name: str) -> str:
    if name == "error":
        return ' class="text"'
    return ' class="left"' if name in _LEFT else ""


def _row_of(r: RequestRecord) -> dict[str, str]:
    """Column -> text; '' where there is nothing."""
    return {
        "#": str(r.index),
        "state": f"{r.state}, clipped" if r.is_clipped else r.state,
        "due s": f"{r.scheduled_s:.3f}",
        "lag ms": _ms(r.lag_s),
        "TTFT ms": _ms(r.ttft_s),
        "TPOT ms": _ms(r.tpot_s),
        "E2E ms": _ms(r.e2e_s),
        "prompt": _text(r.prompt_tokens),
        "output": _text(r.output_tokens),
        "asked": _text(r.asked_tokens),
        "finish": _text(r.finish_reason),
        "HTTP": _text(r.status),
        "entry": _text(r.dataset_index),
        "id": _text(r.request_id),
        "error": f"{r.error.kind}: {r.error.sentence}" if r.error else "",
    }


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _text(value: int | str | None) -> str:
    return "" if value is None else str(value)
