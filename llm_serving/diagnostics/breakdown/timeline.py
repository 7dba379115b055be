"""The steps as trace events, for Perfetto (ui.perfetto.dev) or chrome://tracing.

One lane for the agent, one for the master.  The way of a frame lies beside what the master does
meanwhile, so it is an event of its own that may overlap.  "Trace Event Format", Google, 2016;
times are microseconds from the first stamp.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import msgspec

from llm_serving.diagnostics.breakdown.trace import COLUMNS, Steps
from llm_serving.errors import ConfigError
from llm_serving.step_trace import KINDS, MASTER_STAMPS, StepRecord

__all__ = ["agent_stretches", "timeline_events", "write_timeline"]

_PID = 1
_LANES = {"agent": 1, "master": 2}
ON_THE_WAY = "frame_receive"  # the only stage in which the master may do something else


def write_timeline(steps: Steps, path: pathlib.Path) -> None:
    document = {"traceEvents": list(timeline_events(steps)), "displayTimeUnit": "ms"}
    try:
        path.write_bytes(msgspec.json.encode(document))
    except OSError as exc:
        raise ConfigError(f"cannot write the timeline: {exc}") from exc


def timeline_events(steps: Steps) -> Iterator[dict[str, Any]]:
    for lane, number in _LANES.items():
        yield {"ph": "M", "pid": _PID, "tid": number, "name": "thread_name", "args": {"name": lane}}
    stamps = steps.table[:, COLUMNS.index("schedule") :]
    start = int(stamps.min()) if len(steps) else 0
    for i, row in enumerate(steps.table.tolist()):
        record = StepRecord(*row)
        what = {"step": record.step_id, "kind": KINDS[record.kind], "rows": record.num_rows}
        what |= {"tokens": record.num_tokens}
        for name, begin, end in agent_stretches(record):
            yield _event(name, "agent", begin - start, end - begin, what)
        for j, (name, (first, last)) in enumerate(MASTER_STAMPS.items()):
            begin, end = getattr(record, first), getattr(record, last)
            exposed = {"exposed_us": float(steps.exposed[i, j]) / 1e3}
            if name == ON_THE_WAY:
                yield from _way(record.step_id, begin - start, end - start, what | exposed)
            else:
                yield _event(name, "master", begin - start, end - begin, what | exposed)


def agent_stretches(record: StepRecord) -> list[tuple[str, int, int]]:
    """Name, begin and end of each of the agent's stages, one after the other."""
    return [
        ("result_write", record.previous, record.waiting),  # its end: the answer goes away
        ("idle", record.waiting, record.received),
        ("prepare", record.received, record.forward),
        ("forward", record.forward, record.sample),
        ("sample", record.sample, record.result_write),
        ("result_write", record.result_write, record.done),
    ]


def _event(name: str, lane: str, begin: int, length: int, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": _PID,
        "tid": _LANES[lane],
        "cat": lane,
        "name": name,
        "ts": begin / 1e3,
        "dur": length / 1e3,
        "args": args,
    }


def _way(step_id: int, begin: int, end: int, args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An asynchronous event: two of them, with an id of their own."""
    both = {"pid": _PID, "tid": _LANES["master"], "cat": "frames", "id": step_id}
    both["name"] = ON_THE_WAY
    yield {**both, "ph": "b", "ts": begin / 1e3, "args": args}
    yield {**both, "ph": "e", "ts": end / 1e3}
