"""What it costs to know where the time went: microseconds a step, against a step of the model.

    python benchmarks/measuring_cost.py [--dtype bfloat16] [--rounds 3]

Everything that a step does only so that it can be measured: stamps of the clock, carrying the
agent's across the process border, the counters of the transport, the step's record, the last 4,096
of them, histograms of every stage; and of a request its stages, spread over its tokens.
The aim is under 1 % of a decode step of one row, the shortest step that there is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import msgspec

from llm_serving.agent.bare_loop import BareLoop
from llm_serving.generation import SamplingParams
from llm_serving.master.request import Request
from llm_serving.master.step import Row, Step
from llm_serving.master.step_recorder import StepRecorder, StepStamps
from llm_serving.metrics import Metrics, StepMetrics
from llm_serving.metrics.registry import REQUEST_STAGES
from llm_serving.prepare.cache import find_prepared
from llm_serving.protocol import StepTimes
from llm_serving.step_arrays import StepResult, TransferTimes
from llm_serving.testing import result_of
from llm_serving.worker.traffic import Call, Traffic

MODEL, PROMPT, OUTPUT, MANY_ROWS, REPEATS = "smollm2-135m-instruct", 128, 128, 32, 20_000
STAMPS = (  # one reading of the clock for each
    *("schedule", "build", "shm_write", "written", "encoded", "sent", "arrived", "read"),
    *("update", "publish", "end"),
    *("waiting", "received", "forward", "sample", "sampled", "done"),
)
START_NS = 10**15


def stamps() -> None:
    for _ in STAMPS:
        time.monotonic_ns()


class Carrying:
    """The agent's stamps in its answer: six numbers more to encode and to decode."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(StepTimes)

    def __call__(self) -> None:
        at = time.monotonic_ns()
        self._decoder.decode(self._encoder.encode(StepTimes(at, at, at, at, at, at)))


class Counting:
    """The transport's counters, without its log."""

    def __init__(self) -> None:
        self._traffic = Traffic()
        self._times = StepTimes()

    def __call__(self) -> None:
        call = Call(START_NS, START_NS, START_NS, START_NS, 1500, 900)
        self._traffic.sent(call, 1)
        self._traffic.answered(
            "Execute", call, self._times, arrived_ns=START_NS, frame_bytes=300, memory_bytes=100
        )


class Recording:
    """The record of a decode step, into the trace and the histograms."""

    def __init__(self, num_rows: int, *, observes: bool) -> None:
        metrics = StepMetrics()
        self._recorder = StepRecorder(metrics.observe if observes else lambda _: None)
        requests = [Request(f"{i}", [1] * PROMPT, SamplingParams()) for i in range(num_rows)]
        rows = [Row(request, PROMPT + 1, 1, 0, True) for request in requests]
        self._step = Step(1, rows, rows)
        self._result = _result(num_rows)

    def __call__(self) -> None:
        stamps = StepStamps(START_NS, START_NS + 200_000, False, START_NS, START_NS)
        self._recorder.record(self._step, stamps, self._result)


class RequestStages:
    """The histograms of a request's stages; once an answer, here for each of its tokens."""

    def __init__(self) -> None:
        self._metrics = Metrics("model", lambda: sys.exit("nobody scrapes"))
        self._stages_ms = {stage: float(i) for i, stage in enumerate(REQUEST_STAGES)}

    def __call__(self) -> None:
        self._metrics.observe_stages(self._stages_ms)


def _result(num_rows: int) -> StepResult:
    times = StepTimes(*(START_NS + i * 500_000 for i in range(6)))
    transfer = TransferTimes(*(START_NS + i * 50_000 for i in range(4)))
    return msgspec.structs.replace(result_of(1, [0] * num_rows), times=times, transfer=transfer)


def microseconds(work: Callable[[], None]) -> float:
    """Of one call: the median of seven runs of many."""
    runs = []
    for _ in range(7):
        began_ns = time.perf_counter_ns()
        for _ in range(REPEATS // 7):
            work()
        runs.append((time.perf_counter_ns() - began_ns) / (REPEATS // 7) / 1e3)
    return statistics.median(runs)


def step_us(dtype: str, num_threads: int, num_rows: int, rounds: int) -> float:
    """Median of the model's decode steps with nothing around them."""
    card = find_prepared(MODEL, dtype, "auto") or find_prepared(MODEL, dtype)
    if card is None:
        sys.exit(f"prepare it first: llm-serving prepare {MODEL} --dtype {dtype}")
    loop = BareLoop(
        card,
        num_rows=num_rows,
        prompt_tokens=PROMPT,
        new_tokens=OUTPUT // 4,
        num_threads=num_threads,
    )
    return statistics.median(s.step_ms for _ in range(rounds) for s in loop.decode()) * 1e3


def report(num_rows: int, model_us: float) -> None:
    record_us = microseconds(Recording(num_rows, observes=False))
    costs = {
        f"{len(STAMPS)} stamps of the clock": microseconds(stamps),
        "carrying the agent's": microseconds(Carrying()),
        "counting calls and bytes": microseconds(Counting()),
        "making the record": record_us,
        "trace and histograms": microseconds(Recording(num_rows, observes=True)) - record_us,
        f"stages of {num_rows} requests / {OUTPUT} tokens": (
            microseconds(RequestStages()) * num_rows / OUTPUT
        ),
    }
    print(
        f"{num_rows} row{'s' * (num_rows > 1)}: "
        f"a decode step of the model is {model_us / 1e3:.2f} ms"
    )
    for what, us in costs.items():
        print(f"  {what:34}{us:8.2f} us")
    total_us = sum(costs.values())
    print(f"  {'together':34}{total_us:8.2f} us, {100 * total_us / model_us:.3f} % of the step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    for num_rows in (1, MANY_ROWS):
        report(num_rows, step_us(args.dtype, args.threads, num_rows, args.rounds))


if __name__ == "__main__":
    main()
