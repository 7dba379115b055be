"""What the TGI family answers, streamed and not, and what it answers when something is wrong."""

from __future__ import annotations

import asyncio
import json
import pathlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from llm_serving.api.app import ApiSettings
from llm_serving.api.sse import encode_event
from llm_serving.api.tgi_answer import Token
from llm_serving.errors import AgentDied, Unavailable
from llm_serving.generation import FinishReason
from llm_serving.master.scheduler import Limits
from llm_serving.metrics import REQUEST_STAGES
from llm_serving.server.llm_server import GenerationRequest
from llm_serving.step_arrays import StepInputs, StepResult
from llm_serving.testing import FakeWorker
from tests.front_end import (
    AlternativesWorker,
    FrontEnd,
    PausedWorker,
    RawCall,
    events_of,
    front_end,
    until,
)

PROMPT = "the cat"
GENERATE = ["/generate", "/models/llama2/generate", "/models/org/tiny/generate"]
ROOTS = ["/", "/models/llama2", "/models/llama2/", "/models/org/tiny"]
STREAMS = ["/generate_stream", "/models/llama2/generate_stream", "/models/org/tiny/generate_stream"]


@pytest.fixture
async def front(tmp_path: pathlib.Path) -> AsyncIterator[FrontEnd]:
    async with front_end(tmp_path) as front:
        yield front
        assert front.server.num_open == 0


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def reason_of(sent: dict[str, Any]) -> tuple[str, str]:
    assert set(sent) == {"error", "error_type"}
    return sent["error_type"], sent["error"]


async def test_an_answer_has_exactly_the_documented_fields(front: FrontEnd) -> None:
    answer = await front.generate(PROMPT, max_new_tokens=5, seed=7)
    assert without(answer, "generated_text") == {
        "finish_reason": "length",
        "generated_tokens": 5,
        "prompt_tokens": 6,
        "seed": 7,
    }


async def test_details_hold_every_token(front: FrontEnd) -> None:
    answer = await front.generate(PROMPT, max_new_tokens=9, seed=7, details="True")
    details = answer["details"]
    assert list(details["timing"]) == list(REQUEST_STAGES)
    assert without(details, "tokens", "timing") == {
        "finish_reason": "length",
        "generated_tokens": 9,
        "prompt_tokens": 6,
        "seed": 7,
        "prefill": [],
        "top_tokens": [],
        "best_of_sequences": None,
    }
    assert all(set(token) == {"id", "text", "logprob", "special"} for token in details["tokens"])
    assert len(details["tokens"]) == 9
    assert "".join(token["text"] for token in details["tokens"]) == answer["generated_text"]


@pytest.mark.parametrize("path", GENERATE)
async def test_generate_answers_one_object(front: FrontEnd, path: str) -> None:
    answer = await front.post(path, PROMPT, max_new_tokens=3)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["generated_tokens"] == 3


@pytest.mark.parametrize("path", ROOTS)
async def test_the_root_answers_an_array_of_one(front: FrontEnd, path: str) -> None:
    (answer,) = (await front.post(path, PROMPT, max_new_tokens=3)).json()
    assert answer["generated_tokens"] == 3


@pytest.mark.parametrize("path", [*GENERATE, *ROOTS])
@pytest.mark.parametrize("spelling", [True, "True"])
async def test_stream_turns_any_of_them_into_events(
    front: FrontEnd, path: str, spelling: object
) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}, "stream": spelling}
    answer = await front.post(path, body)
    assert answer.headers["content-type"] == "text/event-stream"
    assert [event["index"] for event in events_of(answer.text)] == [1, 2, 3]


@pytest.mark.parametrize("path", STREAMS)
async def test_generate_stream_always_streams(front: FrontEnd, path: str) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}, "stream": False}
    assert len(events_of((await front.post(path, body)).text)) == 2


async def test_a_stream_says_what_the_answer_says(front: FrontEnd) -> None:
    wanted = await front.generate(PROMPT, max_new_tokens=20, seed=7, details=True)
    answer = await front.post("/generate_stream", PROMPT, max_new_tokens=20, seed=7)
    *events, last = events_of(answer.text)
    names = ["index", "token", "top_tokens", "generated_text", "details"]
    assert all(list(event) == names for event in [*events, last])
    assert [event["token"] for event in [*events, last]] == wanted["details"]["tokens"]
    assert {(event["generated_text"], event["details"]) for event in events} == {(None, None)}
    assert last["generated_text"] == wanted["generated_text"]
    details = without(last["details"], "timing", "input_length")
    assert details == without(wanted, "generated_text", "details")
    assert last["details"]["input_length"] == last["details"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_the_full_text_is_the_inputs_verbatim_in_front(front: FrontEnd, path: str) -> None:
    inputs = "  the <s> cat  "
    bare = await front.generate(inputs, max_new_tokens=8)
    answer = await front.post(path, inputs, max_new_tokens=8, return_full_text="True", truncate=99)
    body = answer.json() if path == "/generate" else events_of(answer.text)[-1]
    assert body["generated_text"] == inputs + bare["generated_text"]


async def test_alternatives_come_with_every_token(tmp_path: pathlib.Path) -> None:
    async with front_end(tmp_path, worker=AlternativesWorker(64, 4)) as front:
        answer = await front.generate(PROMPT, max_new_tokens=4, top_n_tokens=2, details=True)
        stream = await front.post("/generate_stream", PROMPT, max_new_tokens=4, top_n_tokens=2)
    tops = answer["details"]["top_tokens"]
    assert [event["top_tokens"] for event in events_of(stream.text)] == tops
    for token, top in zip(answer["details"]["tokens"], tops, strict=True):
        assert [entry["id"] for entry in top] == [token["id"], (token["id"] + 1) % 50]
        assert [entry["logprob"] for entry in top] == [-0.5, -1.5]


@pytest.mark.parametrize("path", ["/generate", "/"])
async def test_alternatives_that_nobody_would_see_are_refused(front: FrontEnd, path: str) -> None:
    answer = await front.post(path, PROMPT, top_n_tokens=2)
    assert answer.status_code == 422
    assert "parameters.top_n_tokens: 2 came; it needs details or stream" in answer.json()["error"]
    for given in ({"top_n_tokens": 0}, {"top_n_tokens": None}):
        assert (await front.post(path, PROMPT, max_new_tokens=1, **given)).status_code == 200
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1, "top_n_tokens": 2}}
    assert (await front.post(path, {**body, "stream": True})).status_code == 200


async def test_the_eos_token_is_listed_counted_and_without_text(tmp_path: pathlib.Path) -> None:
    async with front_end(tmp_path) as front:
        ids = [
            token["id"]
            for token in (await front.generate(PROMPT, max_new_tokens=6, details=True))["details"][
                "tokens"
            ]
        ]
    async with front_end(tmp_path, eos_token_ids=frozenset(ids[3:4])) as front:
        answer = await front.generate(PROMPT, max_new_tokens=6, details=True)
        ignored = await front.generate(PROMPT, max_new_tokens=6, ignore_eos=True)
    expected = ids.index(ids[3]) + 1
    assert (answer["finish_reason"], answer["generated_tokens"]) == ("eos_token", expected)
    last = answer["details"]["tokens"][-1]
    assert (last["id"], last["text"], last["special"]) == (ids[3], "", True)
    assert (ignored["finish_reason"], ignored["generated_tokens"]) == ("length", 6)


async def test_a_stop_string_ends_the_text_before_itself(front: FrontEnd) -> None:
    text = (await front.generate(PROMPT, max_new_tokens=30))["generated_text"]
    stop = text[4:7]
    answer = await front.generate(PROMPT, max_new_tokens=30, stop=[stop])
    assert answer["finish_reason"] == "stop_sequence"
    assert answer["generated_text"] == text[: text.index(stop)]


@pytest.mark.parametrize("path", ["/models/nope/generate", "/models/nope", "/models/nope/info"])
async def test_an_unknown_model_is_404_and_names_the_known_ones(front: FrontEnd, path: str) -> None:
    method = "GET" if path.endswith("info") else "POST"
    answer = await front.client.request(method, path, content=b'{"inputs": "x"}')
    assert answer.status_code == 404
    kind, sentence = reason_of(answer.json())
    assert kind == "model_not_found"
    assert all(word in sentence for word in ("'nope'", "'llama2'", "'org/tiny'"))


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/models/llama2"])
async def test_what_is_not_valid_is_422_and_opens_nothing(front: FrontEnd, path: str) -> None:
    answer = await front.post(path, PROMPT, max_new_tokens=0)
    kind, sentence = reason_of(answer.json())
    assert (answer.status_code, kind) == (422, "validation")
    assert sentence.startswith("parameters.max_new_tokens: 0 came; allowed is an integer")


async def test_more_than_the_room_left_is_422(front: FrontEnd) -> None:
    answer = await front.post("/generate", PROMPT, max_new_tokens=123)
    assert answer.status_code == 422
    assert "1 .. 122" in answer.json()["error"]


async def test_without_max_new_tokens_the_room_is_used(front: FrontEnd) -> None:
    assert (await front.generate(PROMPT))["generated_tokens"] == 122


async def test_no_content_type_is_needed_and_none_is_in_the_way(front: FrontEnd) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json"):
        content = b'{"inputs": "the cat", "parameters": {"max_new_tokens": 1}}'
        answer = await front.client.post(
            "/generate", content=content, headers={"content-type": kind}
        )
        assert answer.status_code == 200


async def test_a_deadline_before_the_first_token_is_504(tmp_path: pathlib.Path) -> None:
    worker = FakeWorker(64, 4)
    worker.alive.clear()  # so everything waits
    async with front_end(tmp_path, worker=worker) as front:
        for path in ("/generate", "/generate_stream"):
            answer = await front.post(path, PROMPT, timeout=0.001)
            assert (answer.status_code, answer.json()["error_type"]) == (504, "deadline")
        assert front.server.num_open == 0


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_deadline_after_the_first_token_is_the_text_so_far(
    tmp_path: pathlib.Path, path: str
) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        whole = RawCall(front.app, path, {"inputs": PROMPT, "parameters": {"details": True}})
        await worker.step(5)
        (request,) = front.scheduler.open_requests
        await until(lambda: request.num_new_tokens == 5)
        front.master.abort(request, FinishReason.TIMEOUT)
        await whole.task
    assert whole.sent[0]["status"] == 200
    content = b"".join(whole.pieces).decode()
    if path == "/generate":
        answer = json.loads(content)
        tokens = answer["details"]["tokens"]
    else:
        *events, answer = events_of(content)
        assert answer["token"] == {"id": -1, "text": "", "logprob": 0.0, "special": True}
        tokens = [event["token"] for event in events]
    assert answer["details"]["finish_reason"] == "timeout"
    assert answer["details"]["generated_tokens"] == len(tokens) == 5
    assert "".join(token["text"] for token in tokens) == answer["generated_text"]


async def test_a_deadline_counts_from_the_head_of_the_request(
    front: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps: list[float] = []

    async def open_(request: GenerationRequest) -> None:
        stamps.append(request.arrived_s or 0.0)
        stamps.extend((middle_s, request.received_s, request.validated_s or 0.0))
        raise Unavailable("it is enough")

    monkeypatch.setattr(front.server, "open", open_)
    body = json.dumps({"inputs": PROMPT, "parameters": {"timeout": 5}}).encode()
    now_s, has_begun, go_on = time.monotonic(), asyncio.Event(), asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:9]
        has_begun.set()
        await go_on.wait()
        yield body[9:]

    answering = asyncio.create_task(front.client.post("/generate", content=pieces()))
    await has_begun.wait()
    middle_s = time.monotonic()
    go_on.set()
    await answering
    assert stamps == sorted({now_s, *stamps})[1:]


async def test_a_timeout_above_the_limit_of_the_server_is_refused(front: FrontEnd) -> None:
    answer = await front.post("/generate", PROMPT, timeout=601)
    assert (answer.status_code, "up to 600" in answer.text) == (422, True)


async def test_a_full_queue_is_429_and_says_when_to_come_back(tmp_path: pathlib.Path) -> None:
    worker = FakeWorker(64, 4)
    worker.alive.clear()
    async with front_end(tmp_path, worker=worker, limits=Limits(max_num_waiting=1)) as front:
        waiting = asyncio.create_task(front.post("/generate", PROMPT, max_new_tokens=2))
        await until(lambda: front.server.num_open == 1)
        answer = await front.post("/generate_stream", PROMPT)
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        worker.restart()
        assert (await waiting).status_code == 200


async def test_a_server_that_drains_is_503(front: FrontEnd) -> None:
    front.server.begin_drain()
    answer = await front.post("/generate", PROMPT)
    assert (answer.status_code, answer.json()["error_type"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_requests_that_a_shutdown_ends_are_told(tmp_path: pathlib.Path, path: str) -> None:
    async with front_end(tmp_path, worker=PausedWorker(64)) as front:
        asked = asyncio.create_task(front.post(path, PROMPT))
        await until(lambda: front.server.num_open == 1)
        front.server.abort_all()
        answer = await asked
    assert (answer.status_code, answer.json()["error_type"]) == (503, "aborted")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize(
    ("path", "status"), [("/generate", 503), ("/generate_stream", 200), ("/", 503)]
)
async def test_an_error_after_the_first_byte_is_the_last_event(
    tmp_path: pathlib.Path, path: str, status: int
) -> None:
    worker = FakeWorker(64, 4, faults={6: "refuse"})
    async with front_end(tmp_path, worker=worker) as front:
        answer = await front.post(path, PROMPT)
        assert front.server.num_open == 0
    assert answer.status_code == status
    last = events_of(answer.text)[-1] if status == 200 else answer.json()
    assert reason_of(last)[0] == "agent"


async def test_tokens_that_come_together_with_an_error_are_sent_before_it(
    tmp_path: pathlib.Path,
) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        call = RawCall(front.app, "/generate_stream", {"inputs": PROMPT})
        await worker.step(1)
        await until(lambda: call.pieces)
        call.may_send.clear()
        await worker.step(4)
        (request,) = front.scheduler.open_requests
        await until(lambda: request.num_new_tokens == 5)
        front.server.abort_all()
        call.may_send.set()
        await call.task
    *events, last = events_of(b"".join(call.pieces).decode())
    assert [event["index"] for event in events] == [1, 2, 3, 4, 5]
    assert reason_of(last)[0] == "aborted"


async def test_an_error_before_the_first_byte_has_its_own_status(tmp_path: pathlib.Path) -> None:
    worker = FakeWorker(64, 4, faults={1: "refuse"})
    async with front_end(tmp_path, worker=worker) as front:
        answer = await front.post("/generate_stream", PROMPT)
    assert (answer.status_code, answer.json()["error_type"]) == (503, "agent")


async def test_an_agent_that_comes_back_is_not_the_clients_concern(tmp_path: pathlib.Path) -> None:
    worker = FakeWorker(64, 4, faults={4: AgentDied("killed")})
    async with front_end(tmp_path) as front:
        wanted = await front.generate(PROMPT, max_new_tokens=9, seed=7)
    async with front_end(tmp_path, worker=worker) as front:
        asked = asyncio.create_task(front.generate(PROMPT, max_new_tokens=9, seed=7))
        await worker.missed.wait()
        worker.restart()
        assert await asked == wanted


class NanWorker(FakeWorker):
    """Computes no number that could be sampled from."""

    def _outcome(self, inputs: StepInputs, fault: Exception | str | None) -> StepResult | Exception:
        outcome = super()._outcome(inputs, fault)
        assert isinstance(outcome, StepResult)
        return msgspec.structs.replace(outcome, finite=np.zeros_like(outcome.finite))


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_request_that_would_fail_again_is_not_asked_back(
    tmp_path: pathlib.Path, path: str
) -> None:
    async with front_end(tmp_path, worker=NanWorker(64, 4)) as front:
        answer = await front.post(path, PROMPT)
    assert (answer.status_code, answer.json()["error_type"]) == (500, "request_failed")
    assert "retry-after" not in answer.headers


async def test_a_bug_is_500_without_its_words(
    front: FrontEnd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(front.server, "open", broken)
    answer = await front.post("/generate", PROMPT)
    kind, sentence = reason_of(answer.json())
    assert (answer.status_code, kind) == (500, "internal")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in sentence
    assert answer.headers["x-request-id"] in caplog.text
    assert "a secret" in caplog.text


async def test_nothing_is_sent_before_the_first_event(tmp_path: pathlib.Path) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        call = RawCall(front.app, "/generate_stream", {"inputs": PROMPT})
        await until(lambda: front.master.stats().num_running == 1)
        assert call.sent == []
        await worker.step(3)
        await until(lambda: len(call.sent) >= 2)
        assert call.sent[0]["type"] == "http.response.start"
        call.is_gone.set()
        await call.task
        assert front.server.num_open == 0


async def test_events_that_are_ready_together_are_one_write(tmp_path: pathlib.Path) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 9}}
        call = RawCall(front.app, "/generate_stream", body)
        call.may_send.clear()
        await worker.step(9)
        await until(lambda: front.server.num_open == 0)
        call.may_send.set()
        await call.task
    first, rest = call.pieces
    assert len(events_of(first.decode())) + len(events_of(rest.decode())) == 9
    assert [message.get("more_body") for message in call.sent] == [None, True, False]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("num_steps", [0, 3])
async def test_a_client_that_goes_away_cancels_its_request(
    tmp_path: pathlib.Path, path: str, num_steps: int
) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        call = RawCall(front.app, path, {"inputs": PROMPT})
        await until(lambda: front.master.stats().num_running == 1)
        await worker.step(num_steps)
        call.is_gone.set()
        await call.task
        assert front.server.num_open == 0
        assert front.master.stats().num_running == 0


async def test_a_client_that_stops_reading_is_given_up(tmp_path: pathlib.Path) -> None:
    settings = ApiSettings(served_names=("llama2",), send_timeout_s=0.01)
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker, settings=settings) as front:
        call = RawCall(front.app, "/generate_stream", {"inputs": PROMPT})
        await worker.step(1)
        await until(lambda: call.sent)
        call.may_send.clear()
        await worker.step(4)
        await call.task
        assert front.server.num_open == 0


def test_a_line_separator_in_the_text_does_not_break_an_event() -> None:
    text = "a\u0085b\u2028c\u2029d\x0be\u00e9\U0001f600"
    event = encode_event(Token(1, text, None, False)).decode()
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: "))["text"] == text
