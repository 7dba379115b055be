"""Where the time of a real run went: the stages are the client's wall time, and nothing is lost."""

from __future__ import annotations

import http.client
import itertools
import json
import pathlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_serving.metrics import REQUEST_STAGES
from llm_serving.step_trace import AGENT_STAGES, KINDS, StepRecord
from tests.serving import RunningServer, wait_until

NUM_NEW = 32
SHARE = 0.02  # of the wall time may lie outside of the stages


@dataclass(frozen=True)
class Streamed:
    wall_ms: float  # from before the request is sent to after its last byte
    first_ms: float  # to the head of the answer
    server_timing: dict[str, float]
    timing: dict[str, float]  # of the last event
    generated_tokens: int


def stream(server: RunningServer, prompt: str) -> Streamed:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    connection.connect()
    parameters = {"max_new_tokens": NUM_NEW, "ignore_eos": True}
    body = json.dumps({"inputs": prompt, "parameters": parameters, "stream": True})
    began = time.perf_counter()
    connection.request("POST", "/models/llama2/generate", body)
    answer = connection.getresponse()
    first_ms = (time.perf_counter() - began) * 1e3
    events = [line for line in answer if line.startswith(b"data:")]
    wall_ms = (time.perf_counter() - began) * 1e3
    connection.close()
    header = answer.headers["server-timing"]
    details = json.loads(events[-1][5:])["details"]
    return Streamed(
        wall_ms,
        first_ms,
        {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", header)},
        details["timing"],
        details["generated_tokens"],
    )


@dataclass(frozen=True)
class Run:
    server: RunningServer
    calls: pathlib.Path
    alone: Streamed
    together: list[Streamed]


@pytest.fixture(scope="module")
def run(smollm2: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("timing")
    calls = folder / "calls.csv"
    flags = ("--model", str(smollm2), "--transport-log", str(calls))
    server = RunningServer(folder / "log", *flags, "--transport-log-methods", "Execute")
    try:
        server.wait_ready()
        alone = stream(server, "The capital of France is")
        with ThreadPoolExecutor(4) as pool:
            prompts = [f"{i} " + "apples and pears " * 40 for i in range(4)]
            together = list(pool.map(lambda prompt: stream(server, prompt), prompts))
        yield Run(server, calls, alone, together)
    finally:
        server.stop()


def sums(server: RunningServer, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a name by their labels but the model's, in the order of the labels' names."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            if sample.name == name:
                labels = sorted(set(sample.labels) - {"model_name"})
                found[tuple(sample.labels[label] for label in labels)] = sample.value
    return found


def records(server: RunningServer) -> list[StepRecord]:
    trace: dict[str, Any] = json.loads(server.get("/trace"))
    assert trace["columns"] == list(StepRecord._fields)
    return [StepRecord(*step) for step in trace["steps"]]


def test_the_stages_of_a_request_are_the_clients_wall_time(run: Run) -> None:
    for one in (run.alone, *run.together):
        assert one.generated_tokens == NUM_NEW
        assert list(one.timing) == list(REQUEST_STAGES)
        assert min(one.timing.values()) >= 0
    # A busy machine lets one of the clients wait, which is not the server's time.
    lost = [1 - sum(one.timing.values()) / one.wall_ms for one in (run.alone, *run.together)]
    assert min(lost) >= 0
    assert sorted(lost)[-2] <= SHARE


def test_the_head_of_a_stream_has_the_stages_up_to_the_first_byte(run: Run) -> None:
    for one in (run.alone, *run.together):
        stages = dict(one.server_timing)
        total = stages.pop("total")
        assert list(stages) == list(REQUEST_STAGES)
        assert sum(stages.values()) == pytest.approx(total, rel=SHARE)
        assert total <= one.first_ms
        for stage in ("read", "validate", "tokenize", "queue", "prefill"):
            assert stages[stage] == pytest.approx(one.timing[stage], abs=0.002)


def test_the_metrics_hold_the_stages_of_all_requests(run: Run) -> None:
    wait_until(
        lambda: sums(run.server, "llm_serving:request_stage_seconds_count")[("send",)] == 5,
        "the last answer is counted",
    )
    found = sums(run.server, "llm_serving:request_stage_seconds_sum")
    for stage in REQUEST_STAGES[:-2]:
        told = sum(one.timing[stage] for one in (run.alone, *run.together)) / 1e3
        assert found[(stage,)] == pytest.approx(told, abs=1e-4)


def test_the_agents_stages_are_the_periods_and_the_periods_the_time(run: Run) -> None:
    steps = records(run.server)
    assert {KINDS[step.kind] for step in steps} >= {"prefill", "decode"}
    assert len(steps) >= 2 * NUM_NEW
    for step in steps:
        assert min(step.agent_stages()) >= 0
        assert min(step.master_stages()) >= 0
        assert sum(step.agent_stages()) == step.period
    pauses = 0
    for before, after in itertools.pairwise(steps):
        assert after.previous >= before.done
        pauses += after.previous - before.done
    span = steps[-1].done - steps[0].previous
    assert sum(step.period for step in steps) + pauses == span
    counted = sums(run.server, "llm_serving:step_stage_seconds_sum")
    periods = sums(run.server, "llm_serving:step_period_seconds_sum")
    for kind in KINDS:
        stages = sum(counted[kind, stage] for stage in AGENT_STAGES)
        assert stages == pytest.approx(periods[(kind,)], abs=1e-6)
    assert sum(periods.values()) == pytest.approx(sum(s.period for s in steps) / 1e9, abs=1e-6)


def test_rows_and_tokens_are_those_that_were_asked_for(run: Run) -> None:
    steps = records(run.server)
    tokens = sums(run.server, "llm_serving:step_tokens_total")
    assert sum(tokens.values()) == sum(step.num_tokens for step in steps)
    samples = sum(step.num_samples for step in steps)
    assert samples == 5 * NUM_NEW == run.server.metric("vllm:generation_tokens_total")
    prompts = run.server.metric("vllm:prompt_tokens_total")
    cached = run.server.metric("vllm:prefix_cache_hits_total")
    assert sum(tokens.values()) == prompts - cached + 5 * (NUM_NEW - 1)


def test_every_step_is_a_call_in_the_counters_and_in_the_log(run: Run) -> None:
    num_steps = len(records(run.server))
    assert sums(run.server, "llm_serving:transport_calls_total")[("Execute",)] == num_steps
    wait_until(lambda: len(run.calls.read_text().splitlines()) == num_steps + 2, "all lines")
    frame = pd.read_csv(run.calls, comment="#")
    assert frame["ID"].tolist() == list(range(1, num_steps + 1))
    assert set(frame["Method"]) == {"Execute"}
    stages = frame[["Serialize_ms", "Send_ms", "Recv_ms", "Deserialize_ms"]]
    assert (stages.to_numpy() >= 0).all()
    assert (stages.sum(axis=1) <= frame["Total_ms"] + 0.001).all()
    assert run.server.stop() == 0
    summary = run.calls.read_text().splitlines()[-1]
    assert re.fullmatch(
        rf"# summary: calls={num_steps} requests=5 seconds=[\d.]+ ended=normally", summary
    )
