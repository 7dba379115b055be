"""Runs to be drawn and reported: of everything something, of nothing anything, very many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from load_test.results import (
    BareDecode,
    RequestError,
    RequestRecord,
    Run,
    Sample,
    ServerWork,
    StepWork,
)

from tests.load_results import failed, request, run_of

__all__ = ["NASTY", "RUNS", "STEM", "eventful", "lost", "many", "well"]

STEM = "test_performance_2025-07-23-14_05"
TIMING = {"queue": 2.0, "prefill": 48.0, "decode": 100.0}
NASTY = "<script>alert('1')</script><img src=http://evil.example/x> & \"quoted\" $x_1$ 模型"


def well(
    index: int, scheduled_s: float, ttft_s: float, tpot_s: float, tokens: int
) -> RequestRecord:
    at = [scheduled_s + ttft_s + i * tpot_s for i in range(tokens)]
    sent_s = scheduled_s + 0.001
    return request(index, scheduled_s, at, sent_s=sent_s, timing=TIMING, request_id=f"id-{index}")


def eventful() -> Run:
    """Of everything something: each way to end, what the server told, goals kept and missed."""
    broken = request(6, 6.0, [6.2, 6.4], end_s=7.0, error=RequestError("cut_stream", NASTY))
    return run_of(
        *(well(i, float(i), 0.1 + 0.02 * i, 0.03, 5 + i) for i in range(6)),
        broken,
        request(7, 7.0, [7.1], is_cancelled=True, cancel_after=1),
        RequestRecord(8, 8, "digest 8", 8.0, 4, is_impossible=True),
        request(9, 9.0, [9.1], is_clipped=True),
        RequestRecord(10, 10, "digest 10", 10.0, 4, sent_s=10.0),
        failed(11, 11.0),
        options={
            "goodput": {"ttft": 150.0, "e2e": 400.0},
            "slo": {"errors": 0, "ttft_p99": 900},
            "dataset": NASTY,
        },
        info={"model_id": NASTY, "limits": {"max_num_seqs": 16}},
        samples=[Sample(float(t), 1, t % 3, t % 2) for t in range(12)],
        work=ServerWork(
            prefix_queries=200.0, prefix_hits=50.0, steps={"decode": StepWork(100, 2.5, 250)}
        ),
        bare_decode=BareDecode(512, {1: 10.0, 4: 16.0}),
        client_cpu_share=0.25,
    )


def lost() -> Run:
    return run_of(*(failed(i, float(i), "connect") for i in range(3)))


def many(count: int) -> Run:
    rng = np.random.default_rng(0)
    due = np.cumsum(rng.exponential(0.1, count))
    requests = [
        well(i, float(at), 0.05 * float(rng.lognormal(0, 1)), 0.02, 4) for i, at in enumerate(due)
    ]
    requests[count // 2] = failed(count // 2, float(due[count // 2]))
    return run_of(*requests)


RUNS: dict[str, Callable[[], Run]] = {
    "eventful": eventful,
    "everything failed": lost,
    "one request": lambda: run_of(well(0, 0.0, 0.1, 0.02, 3)),
    "one token": lambda: run_of(well(0, 0.0, 0.1, 0.02, 1)),
    "nothing sent": lambda: run_of(num_planned=5, is_interrupted=True),
}
