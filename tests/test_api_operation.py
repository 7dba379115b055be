"""What operators, probes and dashboards are told, and what every answer has in common."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI

from llm_serving.api.docs_page import documentation_page
from llm_serving.api.errors import problem_of, problem_of_status
from llm_serving.api.openapi import openapi_document
from llm_serving.errors import (
    AgentDied,
    ConfigError,
    InvalidRequest,
    Overloaded,
    RequestAborted,
    RequestFailed,
    ServingError,
    Unavailable,
)
from llm_serving.metrics import REQUEST_STAGES
from llm_serving.server.service_rate import ServiceRate
from llm_serving.step_trace import KINDS, StepRecord
from llm_serving.testing import FakeWorker
from tests.front_end import SETTINGS, FrontEnd, RawCall, front_end

SANE_ID = re.compile(r"[0-9a-f]{32}")
GET = ["/livez", "/readyz", "/health", "/info", "/metrics", "/models/llama2/info"]
TEXT = "the cat <s>"


@pytest.fixture
async def front(tmp_path: pathlib.Path) -> AsyncIterator[FrontEnd]:
    async with front_end(tmp_path) as front:
        yield front


@pytest.mark.parametrize("path", [*GET, "/models/org/tiny/health"])
async def test_every_operation_route_answers_get_and_head(front: FrontEnd, path: str) -> None:
    answer = await front.client.get(path)
    head = await front.client.head(path)
    assert (answer.status_code, head.status_code) == (200, 200)
    assert answer.content
    assert head.content == b""
    assert head.headers["content-type"] == answer.headers["content-type"]


async def test_head_sends_the_length_but_no_body(front: FrontEnd) -> None:
    call = RawCall(front.app, "/livez", None, "HEAD")
    await call.task
    assert dict(call.sent[0]["headers"])[b"content-length"] == b"18"
    assert call.pieces == [b""]


@pytest.mark.parametrize("path", ["/readyz", "/health", "/models/llama2/health"])
async def test_readiness_names_what_is_wrong(tmp_path: pathlib.Path, path: str) -> None:
    worker = FakeWorker(64, 4)
    worker.alive.clear()
    async with front_end(tmp_path, worker=worker) as front:
        early = await front.client.get(path)
        assert (await front.client.get("/livez")).json() == {"status": "alive"}
        worker.restart()
        await front.generate("the cat", max_new_tokens=1)
        ready = await front.client.get(path)
        front.server.begin_drain()
        late = await front.client.get(path)
    assert (early.status_code, ready.status_code, late.status_code) == (503, 200, 503)
    assert ready.json() == {"status": "ready"}
    assert early.json()["error"] == "not ready: no agent is ready yet"
    assert late.json()["error"] == "not ready: the server is shutting down"
    assert late.json()["error_type"] == "unavailable"
    assert int(late.headers["retry-after"]) >= 1


async def test_info_is_what_the_deployment_says(front: FrontEnd) -> None:
    answer = await front.client.get("/info")
    assert answer.json() == {"model_id": "llama2", "max_total_tokens": 128}


async def test_metrics_are_prometheus_text_under_the_first_name(front: FrontEnd) -> None:
    await front.generate("the cat", max_new_tokens=4)
    answer = await front.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'vllm:generation_tokens_total{model_name="llama2"} 4.0' in answer.text
    assert 'vllm:num_requests_running{model_name="llama2"} 0.0' in answer.text


@pytest.mark.parametrize("path", [*GET, "/docs", "/openapi.json", "/nowhere", "/generate"])
async def test_every_answer_has_an_id_and_its_time(front: FrontEnd, path: str) -> None:
    answer = await front.client.get(path)
    assert SANE_ID.fullmatch(answer.headers["x-request-id"])
    assert re.search(r"total;dur=\d+\.\d+$", answer.headers["server-timing"])


@pytest.mark.parametrize("given", ["abc-123", "x" * 128, "with space", "~!@"])
async def test_a_sane_id_of_the_client_is_echoed(front: FrontEnd, given: str) -> None:
    for path in ("/livez", "/nowhere"):
        answer = await front.client.get(path, headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"caf\xc3\xa9", b"a\tb"])
async def test_any_other_id_is_replaced(front: FrontEnd, given: bytes) -> None:
    answer = await front.client.get("/livez", headers=[(b"x-request-id", given)])
    assert SANE_ID.fullmatch(answer.headers["x-request-id"])


async def test_two_requests_may_have_one_id(front: FrontEnd) -> None:
    content = json.dumps({"inputs": "the cat", "parameters": {"max_new_tokens": 3}})
    headers = {"x-request-id": "same"}
    first = await front.client.post("/generate", content=content, headers=headers)
    second = await front.client.post("/generate", content=content, headers=headers)
    assert first.json()["generated_text"] == second.json()["generated_text"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_the_stages_of_a_request_add_up_to_its_time(front: FrontEnd, path: str) -> None:
    answer = await front.post(path, "the cat", max_new_tokens=5)
    timing = answer.headers["server-timing"]
    stages = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", timing)}
    assert list(stages) == [*REQUEST_STAGES, "total"]
    total = stages.pop("total")
    assert sum(stages.values()) <= total + 0.01


async def test_the_last_event_has_the_rest_of_the_stages(front: FrontEnd) -> None:
    answer = await front.post("/generate_stream", "the cat", max_new_tokens=5)
    last = json.loads(answer.text.strip().rpartition("data: ")[2])
    assert list(last["details"]["timing"]) == list(REQUEST_STAGES)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/models", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("POST", "/livez", 405, "method_not_allowed"),
        ("DELETE", "/models/llama2", 405, "method_not_allowed"),
    ],
)
async def test_what_the_router_refuses_has_the_envelope(
    front: FrontEnd, method: str, path: str, status: int, kind: str
) -> None:
    answer = await front.client.request(method, path)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert path in answer.json()["error"]
    assert ("allow" in answer.headers) is (status == 405)


@pytest.mark.parametrize(
    ("exc", "status", "kind"),
    [
        (InvalidRequest("a"), 422, "validation"),
        (Overloaded("a"), 429, "overloaded"),
        (Unavailable("a"), 503, "unavailable"),
        (RequestAborted("a"), 503, "aborted"),
        (AgentDied("a"), 503, "agent_died"),
        (RequestFailed("a"), 500, "request_failed"),
        (ConfigError("a"), 500, "internal"),
        (ServingError("a"), 500, "internal"),
        (KeyError("a"), 500, "internal"),
    ],
)
def test_each_error_has_one_status_and_one_word(exc: Exception, status: int, kind: str) -> None:
    problem = problem_of(exc, "an-id")
    assert (problem.status, problem.body.error_type) == (status, kind)
    assert (problem.body.error == "a") is (kind != "internal")
    assert ("an-id" in problem.body.error) is (kind == "internal")
    assert (b"retry-after" in dict(problem.headers)) is (status in (429, 503))


@pytest.mark.parametrize(("measured", "told"), [(0.01, b"1"), (1.0, b"1"), (2.2, b"3")])
def test_retry_after_is_what_was_measured_in_whole_seconds(measured: float, told: bytes) -> None:
    problem = problem_of(Overloaded("full"), "", measured)
    assert dict(problem.headers)[b"retry-after"] == told


@pytest.mark.parametrize("path", ["/readyz", "/health", "/generate", "/generate_stream"])
async def test_every_503_says_when_to_come_back_at_the_rate_measured(
    front: FrontEnd, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(ServiceRate, "time_for", lambda *_: 16.5)
    front.server.begin_drain()
    is_post = path.startswith("/generate")
    answer = await (front.post(path, "the cat") if is_post else front.client.get(path))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "17")


def test_an_envelope_is_bounded_and_always_text() -> None:
    problem = problem_of(InvalidRequest("\ud800" + "x" * 100_000), "")
    assert len(problem.body.error) < 1100
    assert problem.body.error.startswith(r"\ud800x")
    assert problem_of_status(422, "y" * 100_000).body.error.endswith("...")


async def test_tokenize_in_tgis_words(front: FrontEnd) -> None:
    answer = await front.post("/tokenize", {"inputs": TEXT})
    tokens = answer.json()
    assert [token["id"] for token in tokens] == front.server.tokenizer.encode(TEXT)
    assert all(token["text"] == TEXT[token["start"] : token["stop"]] for token in tokens)
    assert tokens[-1] == {"id": 1, "text": "<s>", "start": 8, "stop": 11}


async def test_tokenize_in_vllms_words_and_back(front: FrontEnd) -> None:
    ids = front.server.tokenizer.encode(TEXT)
    body = {"model": "llama2", "prompt": TEXT, "add_special_tokens": True}
    answer = (await front.post("/tokenize", body)).json()
    assert answer == {"count": len(ids), "max_model_len": 128, "tokens": ids, "token_strs": None}
    texts = (await front.post("/tokenize", {"prompt": TEXT, "return_token_strs": "True"})).json()
    assert len(texts["token_strs"]) == len(ids)
    for given in ({"model": "llama2", "tokens": ids}, {"tokens": ids}, {"ids": ids}):
        assert (await front.post("/detokenize", given)).json() == {"prompt": TEXT}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 422, "prompt: nothing came"),
        ("/tokenize", {"inputs": 5}, 422, "inputs: 5 came"),
        ("/tokenize", {"messages": []}, 422, "unknown field 'messages'"),
        ("/tokenize", {"prompt": "a", "model": "b"}, 404, "'llama2'"),
        ("/detokenize", {"tokens": [50]}, 422, "token id 50 came; allowed is 0 to 49"),
        ("/detokenize", {"tokens": [-1]}, 422, "token id -1 came"),
        ("/detokenize", {"ids": [1.5]}, 422, "ids: a list of 1 came"),
        ("/detokenize", {"ids": "1"}, 422, "ids: '1' came"),
    ],
)
async def test_tokens_that_cannot_be_are_refused(
    front: FrontEnd, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await front.post(path, body)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


class Page(HTMLParser):
    """What a browser would see of it, and fetch for it."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.open_tags: list[str] = []
        self.addresses: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses |= {value or "" for name, value in attrs if name in ("href", "src")}
        if tag not in ("meta", "br"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_documentation_is_valid_and_complete(front: FrontEnd) -> None:
    document = (await front.client.get("/openapi.json")).json()
    OpenAPI.model_validate(document)
    schemas = document["components"]["schemas"]
    assert {ref.removeprefix("#/components/schemas/") for ref in references(document)} == set(
        schemas
    )
    paths = document["paths"]
    operations = [operation for path in paths.values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    generate = paths["/models/{model}/generate"]["post"]
    assert generate["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("Body")
    assert set(generate["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "429" in generate["responses"]
    assert len(schemas["Parameters"]["properties"]) == 23
    assert all("description" in field for field in schemas["Parameters"]["properties"].values())


async def test_the_documentation_page_says_what_the_document_says(front: FrontEnd) -> None:
    document = (await front.client.get("/openapi.json")).json()
    answer = await front.client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Page()
    page.feed(answer.text)
    page.close()
    assert not page.open_tags
    for path, operations in document["paths"].items():
        assert path in page.text
        assert all(operation["summary"] in page.text for operation in operations.values())
    for schema in document["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            assert name in page.text
            assert field.get("description", "") in page.text


async def test_the_documentation_page_loads_nothing_from_anywhere(front: FrontEnd) -> None:
    page = Page()
    page.feed((await front.client.get("/docs")).text)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert page.addresses <= {"/openapi.json"} | {a for a in page.addresses if a.startswith("#")}


def test_what_a_description_says_is_no_markup() -> None:
    document = openapi_document([], "<script>", "1 & 2")
    page = documentation_page(document)
    assert "<script>" not in page
    assert "1 &amp; 2" in page


def test_a_model_needs_a_name() -> None:
    with pytest.raises(ValueError, match="at least one name"):
        type(SETTINGS)(served_names=())


async def test_the_trace_has_a_row_for_every_step(front: FrontEnd) -> None:
    await front.post("/generate", "the cat", max_new_tokens=5)
    trace = (await front.client.get("/trace")).json()
    assert trace["columns"] == list(StepRecord._fields)
    records = [StepRecord(*step) for step in trace["steps"]]
    assert [KINDS[record.kind] for record in records] == ["prefill", *(["decode"] * 4)]
    assert all(record.end <= trace["now_ns"] for record in records)
    last = (await front.client.get("/trace?steps=2")).json()
    assert last["steps"] == trace["steps"][-2:]


@pytest.mark.parametrize("steps", ["0", "-1", "x", "1.5", "99999999999", "\u0663"])
async def test_a_number_of_steps_that_is_none_is_refused(front: FrontEnd, steps: str) -> None:
    answer = await front.client.get("/trace", params={"steps": steps})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("steps: expected 1 or more, found")
