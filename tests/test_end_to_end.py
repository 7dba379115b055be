"""Real processes, the real model, real clients: what a user of the server would see."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import random
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

from tests.serving import RunningServer, segments, wait_until

pytestmark = pytest.mark.usefixtures("smollm2_card")
STORY = "Once upon a time there was a small server that"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    running = RunningServer(log, "--dtype", "float32").wait_ready()
    yield running
    assert running.stop() == 0
    assert segments(running.pid) == []
    assert running.agents() == []


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as made:
        yield made


async def stream(client: httpx.AsyncClient, prompt: str, **parameters: object) -> list[Any]:
    """Every event of one stream, decoded."""
    body = {"inputs": prompt, "parameters": parameters, "stream": True}
    events = []
    async with client.stream("POST", "/models/llama2/generate", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line:
                events.append(json.loads(line.removeprefix("data: ")))
    return events


def is_idle(server: RunningServer) -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(server.metric(f"vllm:{name}") == 0 for name in names)


def test_the_curl_of_the_readme_answers(server: RunningServer) -> None:
    body: dict[str, Any] = {
        "inputs": " I love Beijing, because",
        "parameters": {"max_new_tokens": 10, "do_sample": "True", "return_full_text": "True"},
        "stream": "True",
    }
    url = f"{server.url}/models/llama2/generate"
    curl = ["curl", "-sS", url, "-X", "POST", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*curl, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True
    )
    events = [json.loads(line[5:]) for line in done.stdout.split("\n\n") if line]
    assert 1 <= len(events) <= 10
    whole = events[-1]["generated_text"]
    assert whole == body["inputs"] + "".join(e["token"]["text"] for e in events)
    assert events[-1]["details"]["prompt_tokens"] == 5


async def test_32_streams_side_by_side_are_each_as_alone(
    server: RunningServer, client: httpx.AsyncClient
) -> None:
    prompts = [f"{STORY} had {i} friends and" for i in range(32)]
    together = await asyncio.gather(
        *(stream(client, p, max_new_tokens=24, ignore_eos=True) for p in prompts)
    )
    for prompt, events in list(zip(prompts, together, strict=True))[::8]:
        alone = await stream(client, prompt, max_new_tokens=24, ignore_eos=True)
        assert events[-1]["generated_text"] == alone[-1]["generated_text"]
    for events in together:
        assert [e["index"] for e in events] == list(range(1, 25))
        text = "".join(e["token"]["text"] for e in events)
        assert events[-1]["generated_text"] == text
        assert events[-1]["details"]["finish_reason"] == "length"
    wait_until(lambda: is_idle(server), "nothing is held")


async def test_a_seed_gives_the_same_tokens_in_any_company(
    server: RunningServer, client: httpx.AsyncClient
) -> None:
    seeded: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    alone = await stream(client, STORY, max_new_tokens=20, ignore_eos=True, **seeded)
    crowd = (
        stream(client, f"{i} {STORY}", max_new_tokens=30, do_sample=True, seed=i, ignore_eos=True)
        for i in range(12)
    )
    same, *_ = await asyncio.gather(
        stream(client, STORY, max_new_tokens=20, ignore_eos=True, **seeded), *crowd
    )
    assert [e["token"]["id"] for e in same] == [e["token"]["id"] for e in alone]
    other = await stream(client, STORY, max_new_tokens=20, ignore_eos=True, **{**seeded, "seed": 8})
    assert [e["token"]["id"] for e in other] != [e["token"]["id"] for e in alone]


async def test_clients_that_go_away_leave_nothing_behind(server: RunningServer) -> None:
    rnd = random.Random(0)

    async def leave(i: int) -> None:
        body = {"inputs": f"{i} {STORY}", "parameters": {"max_new_tokens": 500}, "stream": True}
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            streamed = client.stream(
                "POST", "/models/llama2/generate", json=body | {"stream": i % 3 > 0}
            )
            try:
                async with asyncio.timeout(rnd.uniform(0.01, 2)), streamed as answer:
                    async for _ in answer.aiter_bytes():
                        if rnd.random() < 0.05:
                            return
            except TimeoutError:
                pass

    await asyncio.gather(*(leave(i) for i in range(80)))
    wait_until(lambda: is_idle(server), "nothing is held", 30)
    assert server.generate(STORY, max_new_tokens=3)["generated_tokens"] == 3


@pytest.mark.filterwarnings(
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)  # the client's own
def test_the_unchanged_clients_of_others_work(server: RunningServer, text_generation: Any) -> None:
    base = f"{server.url}/models/llama2"
    expected = server.generate(STORY, max_new_tokens=12)["generated_text"]
    hub = InferenceClient(model=base, timeout=60)
    assert hub.text_generation(STORY, max_new_tokens=12) == expected
    details = hub.text_generation(STORY, max_new_tokens=12, details=True)
    assert details.generated_text == expected
    assert details.details is not None
    assert details.details.generated_tokens == 12
    pieces = hub.text_generation(STORY, max_new_tokens=12, stream=True, details=True)
    assert "".join(p.token.text for p in pieces) == expected
    tgi = text_generation.Client(base, timeout=60)
    whole = tgi.generate(STORY, max_new_tokens=12)
    assert whole.generated_text == expected
    assert [t.text for t in whole.details.tokens] == [
        r.token.text for r in tgi.generate_stream(STORY, max_new_tokens=12)
    ]


def test_an_agent_killed_in_mid_step_is_replaced_and_nothing_is_lost(
    server: RunningServer,
) -> None:
    expected = server.generate(STORY, max_new_tokens=60, ignore_eos=True)
    (victim,) = server.agents()
    url = f"{server.url}/models/llama2/generate_stream"
    body = {"inputs": STORY, "parameters": {"max_new_tokens": 60, "ignore_eos": True}}
    with httpx.stream("POST", url, json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        seen = [next(lines) for _ in range(20)]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: server.status("/readyz") == 503, "/readyz is 503", 10)
        seen += list(lines)
    events = [json.loads(line[5:]) for line in seen if line]
    assert "".join(e["token"]["text"] for e in events) == expected["generated_text"]
    wait_until(lambda: server.status("/readyz") == 200, "/readyz is 200 again", 60)
    (successor,) = server.agents()
    assert successor != victim
    assert b"--num-blocks" in pathlib.Path(f"/proc/{successor}/cmdline").read_bytes()
    again = server.generate(STORY, max_new_tokens=60, ignore_eos=True)
    assert again["generated_text"] == expected["generated_text"]


def test_ps_shows_the_agent_and_info_its_transport(server: RunningServer) -> None:
    (agent,) = server.agents()
    words = pathlib.Path(f"/proc/{agent}/cmdline").read_bytes().split(b"\0")
    assert b"agent" in words
    assert b"--rank" in words
    info = json.loads(server.get("/info"))
    (described,) = info["agents"]
    assert described["pid"] == agent
    assert described["round_trip_us"] > 0
    assert "round trip" in server.output


@pytest.mark.parametrize("state", ["waits", "is stopped"])
def test_a_killed_server_takes_its_agents_with_it_and_the_next_start_sweeps(
    tmp_path: pathlib.Path, state: str
) -> None:
    first = RunningServer(tmp_path / "first").wait_ready()
    agents = first.agents()
    assert segments(first.pid)
    if state == "is stopped":  # it runs nothing then, no watchdog either
        os.kill(agents[0], signal.SIGSTOP)
    first.process.kill()
    first.process.wait()
    wait_until(lambda: not any(map(_is_alive, agents)), "the agents are gone", 5)
    second = RunningServer(tmp_path / "second").wait_ready()
    assert segments(first.pid) == []
    assert second.stop() == 0
    assert segments(second.pid) == []
    assert not any(map(_is_alive, second.agents()))


def test_ctrl_c_ends_with_code_0_and_running_requests_may_finish(tmp_path: pathlib.Path) -> None:
    (tmp_path / "patient.yaml").write_text("server: {shutdown_grace_s: 120}")
    server = RunningServer(tmp_path / "log", "--config", str(tmp_path / "patient.yaml"))
    url = f"{server.wait_ready().url}/generate_stream"
    body = {"inputs": STORY, "parameters": {"max_new_tokens": 30, "ignore_eos": True}}
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        events = [json.loads(line[5:]) for line in lines if line]
    assert events[-1]["details"]["generated_tokens"] == 30
    assert server.process.wait(30) == 0
    assert segments(server.pid) == []


def test_a_server_that_cannot_go_on_says_so_in_the_last_line_of_its_transport_log(
    tmp_path: pathlib.Path,
) -> None:
    calls = tmp_path / "calls.csv"
    (tmp_path / "once.yaml").write_text(f"agent: {{max_restarts: 0, transport_log: {calls}}}")
    server = RunningServer(tmp_path / "log", "--config", str(tmp_path / "once.yaml")).wait_ready()
    server.generate(STORY, max_new_tokens=2)
    os.kill(server.agents()[0], signal.SIGKILL)
    assert server.process.wait(30) == 1
    rows, summary = calls.read_text().splitlines()[2:-1], calls.read_text().splitlines()[-1]
    assert {row.split(",")[1] for row in rows} == {"Ping", "Execute"}
    assert re.fullmatch(
        rf"# summary: calls={len(rows)} requests=1 seconds=[\d.]+ ended=exit code 1", summary
    )


def _is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
