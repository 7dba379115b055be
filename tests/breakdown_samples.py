"""Traces of servers that never ran: a master and an agent on a clock of whole nanoseconds.

`simulate` is a small server: the master does one thing at a time, takes results before it
schedules, and has at most `depth` steps outstanding; the agent takes steps in order.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_serving.diagnostics.breakdown.observation import (
    ClientRequest,
    Load,
    Observation,
    TraceAnswer,
)
from llm_serving.step_trace import KINDS, StepRecord

__all__ = [
    "DECODE",
    "MIXED",
    "MS",
    "PREFILL",
    "Costs",
    "answer_of",
    "client_load",
    "info",
    "metrics",
    "observation",
    "simulate",
]

MS = 1_000_000
PREFILL, DECODE, MIXED = range(len(KINDS))


@dataclass(frozen=True)
class Costs:
    """Nanoseconds."""

    schedule: int = 200_000
    build: int = 100_000
    shm_write: int = 50_000
    frame_send: int = 30_000
    way: int = 40_000  # until the agent has the frame, and until the master has the answer
    prepare: int = 150_000
    forward: int = 40 * MS
    sample: int = 2 * MS
    result_write: int = 60_000
    answer_send: int = 20_000
    shm_read: int = 25_000
    update: int = 80_000
    publish: int = 300_000

    def shaken(self, draw: random.Random) -> Costs:
        """Each of them anything up to twice as much."""
        return Costs(*(draw.randint(0, 2 * cost) for cost in vars(self).values()))


def simulate(
    num_steps: int,
    *,
    depth: int = 2,
    costs: Costs | None = None,
    kinds: Sequence[int] = (DECODE,),
    rows: int = 1,
    pauses: Sequence[int] = (),
    seed: int | None = None,
    start: int = 1_000 * MS,
    first_id: int = 1,
) -> list[StepRecord]:
    """`pauses` are the steps before which there was no work for a second."""
    usual, draw = costs or Costs(), random.Random(seed)
    records: list[StepRecord] = []
    sent: deque[dict[str, int]] = deque()
    master = agent = previous = start
    waiting = start
    i = 0
    while len(records) < num_steps:
        cost = usual if seed is None else usual.shaken(draw)
        may_send = i < num_steps and len(sent) < depth and not (i in pauses and sent)
        if sent and (sent[0]["arrived"] <= master or not may_send):
            step = sent.popleft()
            step["shm_read"] = max(master, step["arrived"])
            step["update"] = step["shm_read"] + cost.shm_read
            step["publish"] = step["update"] + cost.update
            master = step["end"] = step["publish"] + cost.publish
            records.append(StepRecord(**step_fields(step)))
            continue
        if i in pauses:
            master += 1_000 * MS
            previous = waiting = max(master, agent)
            master = previous
        kind = kinds[i % len(kinds)]
        step = {"step_id": first_id + i, "kind": kind, "num_rows": rows, "num_samples": rows}
        step["num_tokens"] = rows if kind == DECODE else 128 * rows
        step["schedule"] = master
        step["build"] = step["schedule"] + cost.schedule
        step["shm_write"] = step["build"] + cost.build
        step["frame_send"] = step["shm_write"] + cost.shm_write
        master = step["sent"] = step["frame_send"] + cost.frame_send
        step["previous"], step["waiting"] = previous, waiting
        step["received"] = max(waiting, step["frame_send"] + cost.way)
        step["forward"] = step["received"] + cost.prepare
        step["sample"] = step["forward"] + cost.forward * (1 if kind == DECODE else 4)
        step["result_write"] = step["sample"] + cost.sample
        previous = step["done"] = step["result_write"] + cost.result_write
        agent = waiting = step["done"] + cost.answer_send
        step["arrived"] = agent + cost.way
        sent.append(step)
        i += 1
    return records


def step_fields(step: dict[str, int]) -> dict[str, int]:
    return {name: step[name] for name in StepRecord._fields}


def answer_of(records: Sequence[StepRecord], now_ns: int | None = None) -> TraceAnswer:
    """As GET /trace would say it."""
    end = max((record.end for record in records), default=0)
    steps = [list(record) for record in records]
    return TraceAnswer(end + 1 if now_ns is None else now_ns, list(StepRecord._fields), steps)


def info(**changed: Any) -> dict[str, Any]:
    return {
        "model_id": "Tiny",
        "served_names": ["llama2", "tiny"],
        "model_dtype": "bfloat16",
        "model_device_type": "cpu",
        "model_digest": "abc",
        "prepared": "abc",
        "num_threads": 2,
        "max_total_tokens": 2048,
        "limits": {"max_num_seqs": 64, "max_step_stretch": 2.5},
        "bare_decode_ms": {"context": 192, "rows": {"1": 42.0, "8": 60.0}},
        **changed,
    }


def metrics(series: dict[str, float]) -> str:
    """Lines of the text format; labels belong to the name."""
    return "".join(f"{name} {value}\n" for name, value in series.items())


def observation(
    records: Sequence[StepRecord],
    *,
    load: Load | None = None,
    series: dict[str, float] | None = None,
    **fields: Any,
) -> Observation:
    """`series` are what the counters rose by."""
    after = {f"{name}": value for name, value in (series or {}).items()}
    return Observation(
        answer_of(records),
        seconds=10.0,
        url="http://127.0.0.1:8835",
        info=fields.pop("info", info()),
        before=metrics(dict.fromkeys(after, 0.0)),
        after=metrics(after),
        load=load,
        **fields,
    )


def client_load(records: Sequence[StepRecord], streams: int = 1, late_ns: int = 500_000) -> Load:
    """Two rounds of clients who see every token `late_ns` after its step's end."""
    half = len(records) // 2
    requests = [
        _client_request(part, i, late_ns)
        for i, part in enumerate((records[:half], records[half:]))
        for _ in range(streams)
    ]
    return Load(streams, 128, half, requests)


def _client_request(records: Sequence[StepRecord], i: int, late_ns: int) -> ClientRequest:
    tokens = [record.end + late_ns for record in records]
    wall_ms = (tokens[-1] - records[0].schedule) / MS
    timing = {"read": 0.1, "queue": 0.2, "prefill": 0.1 * wall_ms, "decode": 0.9 * wall_ms - 0.5}
    return ClientRequest(i, records[0].schedule, tokens, tokens[-1], 128, timing | {"send": 0.2})
