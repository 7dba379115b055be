"""What the OpenAI family answers, streamed and not, and what it answers when something is wrong."""

from __future__ import annotations

import asyncio
import json
import math
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from llm_serving.api.app import ApiSettings
from llm_serving.api.body import parse_json
from llm_serving.api.openai_request import to_request
from llm_serving.api.openai_schema import CompletionBody
from llm_serving.api.schema import read
from llm_serving.errors import InvalidRequest, RequestFailed
from llm_serving.generation import FinishReason
from llm_serving.master.scheduler import Limits
from llm_serving.server.llm_server import GenerationRequest
from llm_serving.server.service_rate import ServiceRate
from llm_serving.server.tokenizer import Tokenizer
from llm_serving.testing import FakeWorker
from tests.front_end import (
    AlternativesWorker,
    FrontEnd,
    PausedWorker,
    RawCall,
    events_of,
    front_end,
    socket_of,
    until,
)

PATH = "/v1/completions"
PROMPT = "the cat"
DONE = "data: [DONE]\n\n"
BODY = {"model": "llama2", "prompt": PROMPT}
BOTH = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture
async def front(tmp_path: pathlib.Path) -> AsyncIterator[FrontEnd]:
    async with front_end(tmp_path) as front:
        yield front
        assert front.server.num_open == 0


async def complete(front: FrontEnd, **fields: Any) -> dict[str, Any]:
    answer = await front.post(PATH, BODY | fields)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def chunks(front: FrontEnd, **fields: Any) -> list[dict[str, Any]]:
    answer = await front.post(PATH, BODY | fields | {"stream": True})
    assert answer.headers["content-type"] == "text/event-stream", answer.text
    return chunks_of(answer.text)


def chunks_of(text: str) -> list[dict[str, Any]]:
    assert text.endswith(DONE)
    return events_of(text.removesuffix(DONE))


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def error_of(answer: httpx.Response) -> dict[str, Any]:
    return envelope(answer.json())


def envelope(sent: dict[str, Any]) -> dict[str, Any]:
    assert list(sent) == ["error"]
    error: dict[str, Any] = sent["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def request_of(**fields: Any) -> GenerationRequest:
    value = parse_json(json.dumps(BODY | fields).encode())
    body = read(CompletionBody, value)
    return to_request(body, vocab_size=50, trace_id="", arrived_s=0.0, received_s=0.0)


def refusal_of(**fields: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        request_of(**fields)
    return str(caught.value)


async def test_an_answer_has_exactly_the_documented_fields(front: FrontEnd) -> None:
    answer = await front.post(PATH, BODY | {"max_tokens": 5})
    made = answer.json()
    text, created = made["choices"][0].pop("text"), made.pop("created")
    assert len(text) > 0
    assert isinstance(created, int)
    assert made == {
        "id": "cmpl-" + answer.headers["x-request-id"],
        "object": "text_completion",
        "model": "llama2",
        "choices": [
            {"index": 0, "logprobs": None, "finish_reason": "length", "ended_by": "length"}
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 5,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert "decode;dur=" in answer.headers["server-timing"]


@BOTH
async def test_the_text_is_that_of_the_tgi_family(front: FrontEnd, stream: bool) -> None:
    wanted = await front.generate(PROMPT, max_new_tokens=40)
    given = {"max_tokens": 40, "temperature": 0}
    if stream:
        text = text_of(await chunks(front, **given))
    else:
        text = (await complete(front, **given))["choices"][0]["text"]
    assert text == wanted["generated_text"]


async def test_a_stream_is_one_chunk_a_token_and_only_the_last_says_why_it_ended(
    front: FrontEnd,
) -> None:
    wanted = await complete(front, max_tokens=20)
    *earlier, last = await chunks(front, max_tokens=20)
    assert len(earlier) == 19
    names = ["id", "object", "created", "model", "choices"]
    assert all(list(chunk) == names for chunk in [*earlier, last])
    assert len({chunk["id"] for chunk in [*earlier, last]}) == 1
    assert all(
        list(chunk["choices"][0]) == ["index", "text", "logprobs", "finish_reason"]
        and chunk["choices"][0]["finish_reason"] is None
        for chunk in earlier
    )
    (choice,) = last["choices"]
    assert (choice["finish_reason"], choice["ended_by"]) == ("length", "length")
    assert text_of([*earlier, last]) == wanted["choices"][0]["text"]


async def test_the_usage_of_a_stream_comes_in_one_more_chunk_if_it_is_asked_for(
    front: FrontEnd,
) -> None:
    made = await chunks(front, max_tokens=3, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in made[:-1]] == [None] * 3
    assert made[-1]["choices"] == []
    assert made[-1]["usage"]["completion_tokens"] == 3
    assert made[-1]["usage"]["total_tokens"] == 9
    for options in ({"include_usage": False, "include_obfuscation": False}, {}, None):
        made = await chunks(front, max_tokens=3, stream_options=options)
        assert [len(chunk["choices"]) for chunk in made] == [1, 1, 1]
        assert not any("usage" in chunk for chunk in made)


async def test_the_usage_may_come_in_every_chunk(front: FrontEnd) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    made = await chunks(front, max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in made] == [1, 2, 3, 3]
    assert [chunk["usage"]["total_tokens"] for chunk in made] == [7, 8, 9, 9]


async def test_the_usage_says_what_the_cache_has_spared(front: FrontEnd) -> None:
    cached = [
        (await complete(front))["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)
    ]
    assert cached == [0, 4]


async def test_without_max_tokens_there_are_sixteen(front: FrontEnd) -> None:
    for given in ({}, {"max_tokens": None}):
        assert (await complete(front, **given))["usage"]["completion_tokens"] == 16


async def test_a_prompt_may_come_in_a_list_of_one(front: FrontEnd) -> None:
    plain, listed = await complete(front), await complete(front, prompt=[PROMPT])
    assert plain["choices"] == listed["choices"]


async def test_special_tokens_of_the_prompt_are_recognised(front: FrontEnd) -> None:
    made = await complete(front, prompt="the <s> cat")
    ids = front.server.tokenizer.encode("the <s> cat")
    assert 1 in ids
    assert made["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("as_list", [False, True])
async def test_a_stop_string_ends_the_text_before_itself(front: FrontEnd, as_list: bool) -> None:
    text = (await complete(front, max_tokens=30))["choices"][0]["text"]
    stop = text[4:7]
    made = await complete(front, max_tokens=30, stop=[stop] if as_list else stop)
    (choice,) = made["choices"]
    assert (choice["finish_reason"], choice["ended_by"]) == ("stop", "stop_sequence")
    assert choice["text"] == text[: text.index(stop)]
    assert text_of(await chunks(front, max_tokens=30, stop=stop)) == choice["text"]


async def test_the_eos_token_counts_and_has_no_text(tmp_path: pathlib.Path) -> None:
    async with front_end(tmp_path) as front:
        details = (await front.generate(PROMPT, max_new_tokens=6, details=True))["details"]
        ids = [token["id"] for token in details["tokens"]]
    expected = ids.index(ids[3]) + 1
    async with front_end(tmp_path, eos_token_ids=frozenset(ids[3:4])) as front:
        made = await complete(front, max_tokens=6)
        events = await chunks(front, max_tokens=6)
        ignored = await complete(front, max_tokens=6, ignore_eos=True)
        passed = await complete(front, max_tokens=6, min_tokens=expected + 1)
    assert made["usage"]["completion_tokens"] == len(events) == expected
    (choice,) = events[-1]["choices"]
    assert (choice["text"], choice["finish_reason"], choice["ended_by"]) == (
        "",
        "stop",
        "eos_token",
    )
    assert made["choices"][0]["text"] == text_of(events)
    for more in (ignored, passed):
        assert more["usage"]["completion_tokens"] > expected


@BOTH
async def test_an_echo_is_the_prompt_verbatim_in_front(front: FrontEnd, stream: bool) -> None:
    prompt = "  the <s> cat  "
    bare = (await complete(front, prompt=prompt))["choices"][0]["text"]
    if stream:
        text = text_of(await chunks(front, prompt=prompt, echo=True))
    else:
        text = (await complete(front, prompt=prompt, echo=True))["choices"][0]["text"]
    assert text == prompt + bare


async def test_logprobs_name_every_token_and_the_likeliest(tmp_path: pathlib.Path) -> None:
    async with front_end(tmp_path, worker=AlternativesWorker(64, 4)) as front:
        tgi = await front.generate(PROMPT, max_new_tokens=12, top_n_tokens=2, details=True)
        made = (await complete(front, max_tokens=12, logprobs=2))["choices"][0]
        streamed = await chunks(front, max_tokens=12, logprobs=2)
        bare = (await complete(front, max_tokens=12, logprobs=0))["choices"][0]["logprobs"]
        tokenizer = front.server.tokenizer

    def name(token_id: int) -> str:
        text = tokenizer.token_text(token_id) or tokenizer.decode([token_id], False)
        return f"token_id:{token_id}" if "\ufffd" in text else text

    tokens, logprobs = tgi["details"]["tokens"], made["logprobs"]
    names = [name(token["id"]) for token in tokens]
    assert logprobs["tokens"] == names
    assert any(name.startswith("token_id:") for name in names)
    assert logprobs["token_logprobs"] == [token["logprob"] for token in tokens]
    assert logprobs["top_logprobs"] == [
        {name(entry["id"]): entry["logprob"] for entry in top}
        for top in tgi["details"]["top_tokens"]
    ]
    starts = [sum(len(t["text"]) for t in tokens[:i]) for i in range(len(tokens))]
    assert logprobs["text_offset"] == starts
    for key, values in logprobs.items():
        sent = [value for chunk in streamed for value in chunk["choices"][0]["logprobs"][key]]
        assert sent == values
    assert bare["top_logprobs"] == [{name(t["id"]): t["logprob"]} for t in tokens]


async def test_no_name_stands_for_two_tokens(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "token_text", lambda *_: "same")
    async with front_end(tmp_path, worker=AlternativesWorker(64, 4)) as front:
        ids = (await front.generate(PROMPT, max_new_tokens=3, details=True))["details"]["tokens"]
        made = (await complete(front, max_tokens=3, logprobs=2))["choices"][0]["logprobs"]
    assert made["tokens"] == ["same"] * 3
    assert made["top_logprobs"] == [
        {"same": -0.5, f"token_id:{(token['id'] + 1) % 50}": -1.5} for token in ids
    ]


@BOTH
async def test_a_deadline_after_the_first_token_is_a_length_that_says_so(
    tmp_path: pathlib.Path, stream: bool
) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        call = RawCall(front.app, PATH, BODY | {"stream": stream, "logprobs": 1})
        await worker.step(5)
        (request,) = front.scheduler.open_requests
        await until(lambda: request.num_new_tokens == 5)
        front.master.abort(request, FinishReason.TIMEOUT)
        await call.task
    content = b"".join(call.pieces).decode()
    if stream:
        made = chunks_of(content)
        assert len(made) == 6
        last = made[-1]
        assert last["choices"][0]["logprobs"]["tokens"] == []
    else:
        last = json.loads(content)
        assert len(last["choices"][0]["logprobs"]["tokens"]) == 5
        assert last["usage"]["completion_tokens"] == 5
    (choice,) = last["choices"]
    assert (choice["finish_reason"], choice["ended_by"]) == ("length", "timeout")


@BOTH
async def test_a_deadline_before_the_first_token_is_504(
    tmp_path: pathlib.Path, stream: bool
) -> None:
    async with front_end(tmp_path, worker=PausedWorker(64)) as front:
        asked = asyncio.create_task(front.post(PATH, BODY | {"stream": stream}))
        await until(lambda: front.scheduler.open_requests)
        (request,) = front.scheduler.open_requests
        front.master.abort(request, FinishReason.TIMEOUT)
        answer = await asked
    assert answer.status_code == 504
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "deadline")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "0 came; allowed is an integer of at least 1"),
        ({"max_tokens": 123}, "max_tokens", "the context holds 128, so 1 .. 122"),
        ({"prompt": "a" * 200}, "prompt", "(truncate_prompt_tokens keeps the last ones)"),
        ({"prompt": [1, 2, 3]}, "prompt", "token ids and several prompts are not supported yet"),
        ({"n": 2}, "n", "2 came; allowed is 1; more"),
        ({"max_token": 5}, "max_token", "the nearest known one is 'max_tokens'"),
        ({"include_usage": True}, "include_usage", "it belongs in 'stream_options'"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "usage",
            "in stream_options; the nearest known one is 'include_usage'",
        ),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "1 came; allowed is true or false",
        ),
        ({"logit_bias": {"50": 1}}, "logit_bias", "token id 50 came; allowed is 0 to 49"),
    ],
)
async def test_what_is_not_valid_is_400_and_names_the_field(
    front: FrontEnd, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = await front.post(PATH, BODY | fields)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", "validation")
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 99, "nested deeper"),
        (b"[]", "the body: a list of 0 came; allowed is an object"),
        (b'{"model": "llama2", "model": "llama2"}', "'model' is given twice"),
    ],
)
async def test_what_is_no_object_is_400(front: FrontEnd, content: bytes, words: str) -> None:
    answer = await front.client.post(PATH, content=content)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert words in error["message"]


async def test_an_unknown_model_is_404_and_names_the_known_ones(front: FrontEnd) -> None:
    for answer in (
        await front.post(PATH, BODY | {"model": "nope"}),
        await front.client.get("/v1/models/nope"),
    ):
        assert answer.status_code == 404
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("invalid_request_error", "model_not_found")
        assert all(word in error["message"] for word in ("'nope'", "'llama2'", "'org/tiny'"))


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", PATH, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completion", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/", 404, "not_found"),
    ],
)
async def test_what_the_router_refuses_under_v1_has_the_envelope(
    front: FrontEnd, method: str, path: str, status: int, code: str
) -> None:
    answer = await front.client.request(method, path)
    assert answer.status_code == status
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert ("allow" in answer.headers) is (status == 405)
    assert "x-request-id" in answer.headers


async def test_a_path_that_only_looks_like_v1_has_the_other_envelope(front: FrontEnd) -> None:
    answer = await front.client.get("/v1beta/models")
    assert list(answer.json()) == ["error", "error_type"]


async def test_a_body_that_is_too_large_is_413(tmp_path: pathlib.Path) -> None:
    settings = ApiSettings(served_names=("llama2",), max_body_bytes=100)
    async with front_end(tmp_path, settings=settings) as front:
        answer = await front.post(PATH, BODY | {"prompt": "x" * 100})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")


@BOTH
async def test_a_full_queue_is_429_and_says_when_to_come_back(
    tmp_path: pathlib.Path, stream: bool
) -> None:
    worker = FakeWorker(64, 4)
    worker.alive.clear()
    async with front_end(tmp_path, worker=worker, limits=Limits(max_num_waiting=1)) as front:
        waiting = asyncio.create_task(front.post(PATH, BODY))
        await until(lambda: front.server.num_open == 1)
        answer = await front.post(PATH, BODY | {"stream": stream})
        assert answer.status_code == 429
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        worker.restart()
        assert (await waiting).status_code == 200


async def test_a_server_that_drains_is_503_and_says_when_to_come_back(
    front: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServiceRate, "time_for", lambda *_: 16.5)
    front.server.begin_drain()
    answer = await front.post(PATH, BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "17")
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "unavailable")


async def test_a_bug_is_500_without_its_words(
    front: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(front.server, "open", broken)
    answer = await front.post(PATH, BODY)
    assert answer.status_code == 500
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "internal")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]


async def test_a_request_that_would_fail_again_says_so(
    front: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: object) -> None:
        raise RequestFailed("it failed")

    monkeypatch.setattr(front.server, "open", failing)
    answer = await front.post(PATH, BODY)
    assert (answer.status_code, error_of(answer)["code"]) == (500, "request_failed")


@pytest.mark.parametrize(("stream", "status"), [(False, 503), (True, 200)])
async def test_an_error_after_the_first_byte_is_the_last_event(
    tmp_path: pathlib.Path, stream: bool, status: int
) -> None:
    worker = FakeWorker(64, 4, faults={6: "refuse"})
    async with front_end(tmp_path, worker=worker) as front:
        answer = await front.post(PATH, BODY | {"stream": stream})
        assert front.server.num_open == 0
    assert answer.status_code == status
    assert "[DONE]" not in answer.text
    *chunks, last = events_of(answer.text) if stream else [answer.json()]
    assert bool(chunks) is stream
    error = envelope(last)
    assert (error["type"], error["code"]) == ("server_error", "agent")


@BOTH
@pytest.mark.parametrize("num_steps", [0, 3])
async def test_a_client_that_goes_away_cancels_its_request(
    tmp_path: pathlib.Path, stream: bool, num_steps: int
) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        call = RawCall(front.app, PATH, BODY | {"stream": stream})
        await until(lambda: front.master.stats().num_running == 1)
        await worker.step(num_steps)
        call.is_gone.set()
        await call.task
        assert front.server.num_open == 0
        assert front.master.stats().num_running == 0


async def test_chunks_that_are_ready_together_are_one_write(tmp_path: pathlib.Path) -> None:
    worker = PausedWorker(64)
    async with front_end(tmp_path, worker=worker) as front:
        call = RawCall(front.app, PATH, BODY | {"stream": True, "max_tokens": 9})
        call.may_send.clear()
        await worker.step(9)
        await until(lambda: front.server.num_open == 0)
        call.may_send.set()
        await call.task
    first, rest = call.pieces
    assert len(events_of(first.decode())) + len(chunks_of(rest.decode())) == 9


async def test_a_client_of_lines_reads_a_stream_from_a_socket(front: FrontEnd) -> None:
    """As OpenAI's own client does: lines that begin with `data:`, up to [DONE]."""
    body = BODY | {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    wanted = await complete(front, temperature=0)
    texts, usage, is_done = [], None, False
    async with socket_of(front.app) as port, httpx.AsyncClient() as client:
        address = f"http://127.0.0.1:{port}{PATH}"
        async with client.stream("POST", address, json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if not line:
                    continue
                assert not is_done
                assert line.startswith("data: ")
                if is_done := line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                texts += [choice["text"] for choice in chunk["choices"]]
                usage = chunk["usage"] or usage
    assert is_done
    assert "".join(texts) == wanted["choices"][0]["text"]
    assert usage is not None
    assert usage["completion_tokens"] == len(texts) == 16


async def test_the_models_are_the_served_names(front: FrontEnd) -> None:
    models = (await front.client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["llama2", "org/tiny"]
    for model in models["data"]:
        names = ["id", "object", "created", "owned_by", "max_model_len", "max_total_tokens"]
        assert list(model) == names
        assert (model["object"], model["max_model_len"]) == ("model", 128)
        assert (await front.client.get(f"/v1/models/{model['id']}")).json() == model
        assert (await complete(front, model=model["id"]))["model"] == model["id"]


async def test_the_documentation_shows_the_routes_with_their_own_envelope(front: FrontEnd) -> None:
    document = (await front.client.get("/openapi.json")).json()
    operation = document["paths"][PATH]["post"]
    assert set(operation["responses"]["200"]["content"]) == {
        "application/json",
        "text/event-stream",
    }
    assert "422" not in operation["responses"]
    for status in ("400", "404", "429", "503"):
        schema = operation["responses"][status]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("/OpenAIErrorBody")
    assert "/v1/models/{model}" in document["paths"]
    for name in ("CompletionBody", "StreamOptions"):
        fields = document["components"]["schemas"][name]["properties"].values()
        assert all("description" in field for field in fields)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("model", ["llama2"], ["", 5, None, ["llama2"]]),
        ("prompt", ["x", ["x"]], ["", [], [""], ["a", "b"], [1, 2], [[1, 2]], 5, None, "\ud800"]),
        ("max_tokens", [1, 10**9], [0, -1, 1.5, "5", True]),
        ("temperature", [0, 0.0, 1e-300, 2, 1e300], [-1, "0.5", True, math.nan, math.inf]),
        ("top_p", [0, 1e-9, 1], [1.0001, -0.1, "1", True]),
        ("n", [1], [0, 2, "1", True]),
        ("best_of", [1], [0, 2]),
        ("stream", [True, False], ["true", "True", 1, 0]),
        ("stop", ["a", [], ["a"] * 16], ["", ["a"] * 17, [""], [1], [None], {"a": "b"}]),
        ("seed", [-(2**63), 0, 2**64 - 1], [-(2**63) - 1, 2**64, 1.5, "7"]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1, "1"]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1, True]),
        (
            "logit_bias",
            [{}, {"0": -100, "49": 100.0}],
            [
                *({"x": 1}, {"01": 1}, {"-1": 1}, {"50": 1}, {"1": 101}, {"1": "5"}, {"1": True}),
                *({"1": math.nan}, [], 5),
            ],
        ),
        ("logprobs", [0, 5], [-1, 6, True, "2"]),
        ("echo", [True, False], ["true", 1]),
        ("suffix", [None], ["", "x"]),
        ("user", ["somebody", ""], [5]),
        ("ignore_eos", [True, False], ["true"]),
        ("min_tokens", [0, 16], [-1, 17, "1"]),
        ("top_k", [-1, 0, 1, 10**12], [-2, 1.5, "5"]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("repetition_penalty", [1e-9, 5], [0, -1]),
        ("truncate_prompt_tokens", [1], [0, -1]),
    ],
)
def test_the_table_of_fields_holds_at_its_bounds(
    name: str, inside: list[object], outside: list[object]
) -> None:
    for value in inside:
        request_of(**{name: value})
    for value in outside:
        sentence = refusal_of(**{name: value})
        assert sentence.startswith(f"{name}: "), value
        assert "allowed is " in sentence
        assert len(sentence) < 300


@pytest.mark.parametrize("name", sorted(set(CompletionBody.model_fields) - set(BODY)))
def test_null_means_not_given(name: str) -> None:
    given, absent = request_of(**{name: None, "seed": 1}), request_of(seed=1)
    assert given.sampling == absent.sampling or name == "seed"
    assert (given.max_new_tokens, given.stop, given.truncate) == (16, (), None)


def test_sampling_is_on_unless_the_temperature_is_zero() -> None:
    assert request_of().sampling.temperature == 1.0
    assert request_of(temperature=0).sampling.temperature == 0.0
    assert request_of(temperature=0.0, top_k=5).sampling.temperature == 0.0
    assert request_of(temperature=1e-300).sampling.temperature > 0.0


def test_a_top_k_that_keeps_every_token_is_none() -> None:
    assert {request_of(top_k=k).sampling.top_k for k in (-1, 0, None)} == {0}


def test_more_biases_than_a_step_has_room_for_are_refused() -> None:
    sentence = refusal_of(logit_bias=dict.fromkeys(map(str, range(1025)), 0))
    assert "an object came; allowed is an object of up to 1024 token ids" in sentence


def test_a_seed_is_drawn_unless_one_is_given() -> None:
    assert len({request_of().sampling.seed for _ in range(50)}) == 50
    assert request_of(seed=7).sampling.seed == 7
    assert request_of(seed=-1).sampling.seed == 2**64 - 1


def test_every_field_of_sampling_arrives() -> None:
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.25,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "seed": 2**63,
        "min_tokens": 3,
        "ignore_eos": True,
    }
    more = {"logit_bias": {"7": -100, "3": 1.5}, "truncate_prompt_tokens": 9, "stop": "a"}
    request = request_of(**given, **more, logprobs=4, max_tokens=11)
    assert {name: getattr(request.sampling, name) for name in given} == given
    assert request.sampling.logit_bias == ((7, -100.0), (3, 1.5))
    assert request.sampling.num_logprobs == 4
    assert (request.max_new_tokens, request.truncate, request.stop) == (11, 9, ("a",))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stream_options": {}}, "stream_options: it came without stream"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "came without stream"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "allowed is false"),
        ({"echo": True, "logprobs": 0}, "echo: true came with logprobs"),
        (
            {"min_tokens": 5, "max_tokens": 4},
            "min_tokens: 5 came; allowed is up to max_tokens, here 4",
        ),
    ],
)
def test_what_does_not_go_together_says_so(fields: dict[str, Any], words: str) -> None:
    assert words in refusal_of(**fields)
