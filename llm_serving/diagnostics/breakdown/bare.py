"""What serving adds to the bare model loop; never compared over other rows, never silently over
other contexts.

The bare loop that was run after the load has its rows and its contexts.  Where there is none, the
server's own figure from its start (/info, `bare_decode_ms`) serves, if it has one for these rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import msgspec

from llm_serving.diagnostics.breakdown.observation import BareFigures, Load, Observation
from llm_serving.diagnostics.breakdown.steps import NS_PER_MS
from llm_serving.diagnostics.breakdown.trace import Steps
from llm_serving.diagnostics.breakdown.tree import Basis

__all__ = ["Comparison", "compare_with_bare", "own_figures"]


@dataclass(frozen=True, slots=True)
class Comparison:
    bare_ms: float
    served_ms: float  # of the same rows
    how: str  # what was compared with what
    served_model_ms: float  # forward and sample in service
    bare_model_ms: float | None  # None: the server's own figure knows only the whole

    @property
    def overhead_ms(self) -> float:
        return self.served_ms - self.bare_ms

    @property
    def overhead(self) -> float:
        return self.served_ms / self.bare_ms - 1


class _OwnFigures(msgspec.Struct):
    context: int
    rows: dict[int, float]  # decode rows of a step -> its milliseconds


def own_figures(info: dict[str, object]) -> tuple[int, dict[int, float]]:
    """Context and milliseconds by rows that the server measured at its start; nothing: (0, {})."""
    try:
        found = msgspec.convert(info.get("bare_decode_ms"), _OwnFigures, str_keys=True)
    except msgspec.ValidationError:
        return 0, {}
    return found.context, {rows: ms for rows, ms in found.rows.items() if ms > 0}


def compare_with_bare(
    observation: Observation, basis: Basis, client_ms: float | None
) -> Comparison | str:
    """The comparison, or the sentence that says why there is none."""
    if basis.kind != "decode":
        return "there is no decode step to compare with the bare model loop"
    load, bare = observation.load, observation.bare
    if bare is not None and load is not None:
        return _with_loop(bare, load, basis, client_ms)
    note = f"{observation.bare_note}; " if observation.bare_note else ""
    context, figures = own_figures(observation.info)
    if not figures:
        return f"{note}the server has no figure of its own (/info, bare_decode_ms)"
    rows, steps = basis.rows, basis.steps
    if rows is None:
        rows, steps = _commonest(steps, figures)
    if rows not in figures or not len(steps):
        known = ", ".join(map(str, sorted(figures)))
        return f"{note}the server's own figures are for {known} rows, and no step had as many"
    served = float(steps.period.mean()) / NS_PER_MS
    if client_ms is not None and basis.rows is not None:
        served = client_ms
    how = (
        f"{note}the server's own figure, timed at its start: {_rows(rows)} at a context of "
        f"{context} tokens; in service {_served_contexts(load)}"
    )
    return Comparison(figures[rows], served, how, _model_ms(steps), None)


def _with_loop(
    bare: BareFigures, load: Load, basis: Basis, client_ms: float | None
) -> Comparison | str:
    if basis.rows is None:
        return f"no decode step had {_rows(load.streams)}, as the bare loop has"
    contexts = (load.prompt_tokens + 1, load.prompt_tokens + load.new_tokens - 1)
    if bare.rows != basis.rows or (bare.first_context, bare.last_context) != contexts:
        return (
            f"the bare loop ran {_rows(bare.rows)} at contexts of {bare.first_context} to "
            f"{bare.last_context} tokens, the load {_rows(basis.rows)} at {contexts[0]} to "
            f"{contexts[1]}: they cannot be compared"
        )
    served = float(basis.steps.period.mean()) / NS_PER_MS if client_ms is None else client_ms
    how = (
        f"{_rows(bare.rows)}, contexts of {bare.first_context} to {bare.last_context} tokens, "
        f"{bare.num_threads} threads, as in service; {bare.num_steps} steps, after the load"
    )
    model_ms = bare.forward_ms + bare.sample_ms
    return Comparison(bare.step_ms, served, how, _model_ms(basis.steps), model_ms)


def _commonest(steps: Steps, figures: dict[int, float]) -> tuple[int, Steps]:
    """Of the numbers of rows that there is a figure for, the one that most steps had."""
    counts = Counter(steps.column("num_rows").tolist())
    rows = max(figures, key=lambda n: counts.get(n, 0))
    return rows, steps.where(steps.column("num_rows") == rows)


def _model_ms(steps: Steps) -> float:
    return float(steps.agent[:, 2:4].sum(1).mean()) / NS_PER_MS


def _rows(num_rows: int) -> str:
    return f"{num_rows} row" if num_rows == 1 else f"{num_rows} rows"


def _served_contexts(load: Load | None) -> str:
    if load is None:
        return "the contexts are not known"
    return f"they are {load.prompt_tokens + 1} to {load.prompt_tokens + load.new_tokens - 1}"
