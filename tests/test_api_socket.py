"""The front end on a real socket: uvicorn, uvloop and httptools, and the clients people have."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import httpx2
import pytest
import uvloop
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError

from llm_serving.api.app import ApiSettings
from llm_serving.master.scheduler import Limits
from llm_serving.testing import FakeWorker
from tests.front_end import (
    AlternativesWorker,
    FrontEnd,
    PausedWorker,
    events_of,
    front_end,
    socket_of,
    until,
)

PROMPT = "the cat"
SMALL = ApiSettings(
    served_names=("llama2",), max_body_bytes=1000, max_drain_bytes=400_000, body_timeout_s=0.05
)


@pytest.fixture
def run() -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Runs a coroutine in the event loop that the server uses; one that hangs fails."""

    async def bounded(scenario: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(15):
            await scenario

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield lambda scenario: runner.run(bounded(scenario))


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def head_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), headers


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    status, headers = await head_of(reader)
    return status, headers, await reader.readexactly(int(headers["content-length"]))


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("num_steps", [None, 0, 4])
def test_a_closed_connection_frees_everything(
    run: Any, tmp_path: pathlib.Path, path: str, num_steps: int | None
) -> None:
    async def scenario() -> None:
        worker = PausedWorker(64)
        if num_steps is None:
            worker.alive.clear()  # the request waits in the queue
        async with front_end(tmp_path, worker=worker) as front, socket_of(front.app) as port:
            async with connection(port) as (_, writer):
                writer.write(post(path, b'{"inputs": "the cat"}'))
                await until(lambda: front.server.num_open == 1)
                await worker.step(num_steps or 0)
            await until(lambda: front.server.num_open == 0)
            stats = front.master.stats()
            assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)

    run(scenario())


def test_each_step_of_a_stream_is_one_chunk(run: Any, tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        worker = PausedWorker(64)
        async with (
            front_end(tmp_path, worker=worker) as front,
            socket_of(front.app) as port,
            connection(port) as (reader, writer),
        ):
            body = b'{"inputs": "z", "parameters": {"max_new_tokens": 3}, "stream": true}'
            writer.write(post("/", body))
            events = []
            for step in range(3):
                await worker.step()
                if step == 0:
                    assert (await head_of(reader))[1]["transfer-encoding"] == "chunked"
                size = int(await reader.readline(), 16)
                events.append(await reader.readexactly(size))
                assert await reader.readexactly(2) == b"\r\n"
            assert await reader.readexactly(5) == b"0\r\n\r\n"
            assert [len(events_of(event.decode())) for event in events] == [1, 1, 1]

    run(scenario())


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_is_drained_so_that_413_can_be_read(
    run: Any, tmp_path: pathlib.Path, is_chunked: bool
) -> None:
    async def scenario() -> None:
        async with (
            front_end(tmp_path, settings=SMALL) as front,
            socket_of(front.app) as port,
            connection(port) as (reader, writer),
        ):
            body = b"x" * 300_000
            if is_chunked:
                request = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
                writer.write(request + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            else:
                writer.write(post("/generate", body))
            await writer.drain()
            status, headers, content = await answer_of(reader)
            assert (status, headers["connection"]) == (413, "close")
            assert b'"error_type":"body_too_large"' in content
            assert await reader.read() == b""

    run(scenario())


def test_a_client_that_asks_before_sending_is_told_at_once(
    run: Any, tmp_path: pathlib.Path
) -> None:
    async def scenario() -> None:
        async with (
            front_end(tmp_path, settings=SMALL) as front,
            socket_of(front.app) as port,
            connection(port) as (reader, writer),
        ):
            writer.write(post("/generate", b"", "expect: 100-continue", length=2000))
            assert (await head_of(reader))[0] == 413

    run(scenario())


def test_more_than_anybody_would_drain_is_refused_all_the_same(
    run: Any, tmp_path: pathlib.Path
) -> None:
    async def scenario() -> None:
        async with (
            front_end(tmp_path, settings=SMALL) as front,
            socket_of(front.app) as port,
            connection(port) as (reader, writer),
        ):
            writer.write(post("/generate", b"x" * 500_000, length=10**12))
            assert (await head_of(reader))[0] == 413

    run(scenario())


def test_a_body_that_never_ends_has_a_deadline(run: Any, tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with (
            front_end(tmp_path, settings=SMALL) as front,
            socket_of(front.app) as port,
            connection(port) as (reader, writer),
        ):
            writer.write(post("/generate", b'{"inputs', length=100))
            status, headers, content = await answer_of(reader)
            assert (status, headers["connection"]) == (504, "close")
            assert b'"error_type":"deadline"' in content

    run(scenario())


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_shutdown_answers_what_waits_in_the_envelope(
    run: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], is_whole: bool
) -> None:
    async def scenario() -> None:
        worker = FakeWorker(64, 4)
        worker.alive.clear()
        async with front_end(tmp_path, worker=worker) as front:
            async with connection_to_one_that_shuts_down(front, is_whole) as (reader, _):
                status, headers, content = await answer_of(reader)
            assert (status, headers["connection"]) == (503, "close")
            assert b'"error_type":"unavailable"' in content
            assert headers["x-request-id"] == "cut"
            assert int(headers["retry-after"]) >= 1
            await until(lambda: front.server.num_open == 0)

    run(scenario())
    assert capsys.readouterr().err.count("\n") == 1  # that tasks were cancelled


@contextlib.asynccontextmanager
async def connection_to_one_that_shuts_down(
    front: FrontEnd, is_whole: bool
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A body is half there, or its request waits, when the server gives up."""
    body = b'{"inputs": "the cat"}'
    async with contextlib.AsyncExitStack() as stack:
        async with socket_of(front.app) as port:
            ends = await stack.enter_async_context(connection(port))
            num_tasks = len(asyncio.all_tasks())
            sent = body if is_whole else body[:9]
            ends[1].write(post("/generate", sent, "x-request-id: cut", length=len(body)))
            await until(lambda: len(asyncio.all_tasks()) > num_tasks)
            await until(lambda: front.server.num_open == is_whole)
        yield ends


def test_a_connection_serves_one_request_after_another(run: Any, tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with (
            front_end(tmp_path) as front,
            socket_of(front.app) as port,
            connection(port) as (reader, writer),
        ):
            for body, wanted in ((b'{"inputs": "a"}', 200), (b"{", 400), (b'{"inputs": "b"}', 200)):
                writer.write(post("/generate", body))
                assert (await answer_of(reader))[0] == wanted

    run(scenario())


def test_many_streams_at_once_get_each_its_own_text(run: Any, tmp_path: pathlib.Path) -> None:
    prompts = [f"{'abc'[i % 3]} the {'xyz'[i % 7 % 3]}" for i in range(32)]

    async def scenario() -> None:
        limits = Limits(max_num_seqs=8)
        async with front_end(tmp_path, limits=limits) as front, socket_of(front.app) as port:
            wanted = {
                p: (await front.generate(p, max_new_tokens=20))["generated_text"] for p in prompts
            }
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

                async def text_of(prompt: str) -> str:
                    body = {"inputs": prompt, "parameters": {"max_new_tokens": 20}}
                    answer = await client.post("/generate_stream", json=body)
                    last: dict[str, Any] = events_of(answer.text)[-1]
                    return str(last["generated_text"])

                texts = await asyncio.gather(*map(text_of, prompts))
            assert texts == [wanted[prompt] for prompt in prompts]
            assert front.server.num_open == 0

    run(scenario())


def with_client(run: Any, folder: pathlib.Path, use: Callable[[str], None], **options: Any) -> None:
    """Call `use` with the address of a server, in a thread as a client has one."""

    async def scenario() -> None:
        async with front_end(folder, **options) as front, socket_of(front.app) as port:
            await asyncio.to_thread(use, f"http://127.0.0.1:{port}")
            assert front.server.num_open == 0

    run(scenario())


@pytest.mark.parametrize("path", ["", "/", "/models/llama2", "/models/llama2/generate"])
def test_inference_client_generates(run: Any, tmp_path: pathlib.Path, path: str) -> None:
    def use(url: str) -> None:
        client = InferenceClient(model=url + path)
        text = client.text_generation(PROMPT, max_new_tokens=9)
        full = client.text_generation(
            PROMPT, max_new_tokens=9, details=True, return_full_text=True, top_n_tokens=2, seed=3
        )
        assert full.generated_text == PROMPT + text
        assert full.details is not None
        assert (full.details.finish_reason, full.details.generated_tokens) == ("length", 9)
        assert (full.details.seed, full.details.prefill) == (3, [])
        assert "".join(token.text for token in full.details.tokens) == text
        assert [len(top) for top in full.details.top_tokens or []] == [2] * 9

    with_client(run, tmp_path, use, worker=AlternativesWorker(64, 4))


@pytest.mark.parametrize("path", ["", "/models/llama2", "/models/llama2/generate_stream"])
def test_inference_client_streams(run: Any, tmp_path: pathlib.Path, path: str) -> None:
    def use(url: str) -> None:
        client = InferenceClient(model=url + path)
        given: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "stop": ["qq"]}
        pieces = list(client.text_generation(PROMPT, stream=True, **given))
        events = list(client.text_generation(PROMPT, stream=True, details=True, **given))
        assert [event.index for event in events] == list(range(1, 21))
        last = events[-1]
        assert last.generated_text == "".join(pieces)
        assert last.details is not None
        assert (last.details.finish_reason, last.details.input_length) == ("length", 6)

    with_client(run, tmp_path, use)


def test_inference_client_understands_errors_and_the_operation_routes(
    run: Any, tmp_path: pathlib.Path
) -> None:
    def use(url: str) -> None:
        client = InferenceClient(model=f"{url}/models/llama2", provider="hf-inference")
        with pytest.raises(ValidationError, match=r"parameters\.temperature: -1"):
            client.text_generation(PROMPT, temperature=-1)
        assert client.health_check()
        assert client.get_endpoint_info()["model_id"] == "llama2"

    with_client(run, tmp_path, use)


def test_inference_client_knows_when_the_queue_is_full(run: Any, tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        worker = FakeWorker(64, 4)
        worker.alive.clear()
        limits = Limits(max_num_waiting=1)
        async with (
            front_end(tmp_path, worker=worker, limits=limits) as front,
            socket_of(front.app) as port,
        ):
            waiting = asyncio.create_task(front.post("/generate", PROMPT))
            await until(lambda: front.server.num_open == 1)
            client = InferenceClient(model=f"http://127.0.0.1:{port}")
            with pytest.raises(OverloadedError):
                await asyncio.to_thread(client.text_generation, PROMPT)
            front.server.abort_all()
            assert (await waiting).status_code == 503

    run(scenario())


@pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")  # the client's own
def test_text_generation_client_works_unchanged(
    run: Any, tmp_path: pathlib.Path, text_generation: Any
) -> None:
    def use(url: str) -> None:
        client = text_generation.Client(f"{url}/models/llama2")
        answer = client.generate(PROMPT, max_new_tokens=9, top_n_tokens=2, seed=5)
        assert answer.details.finish_reason == "length"
        assert (answer.details.generated_tokens, answer.details.seed) == (9, 5)
        assert "".join(token.text for token in answer.details.tokens) == answer.generated_text
        events = list(client.generate_stream(PROMPT, max_new_tokens=9, truncate=99, typical_p=0.5))
        texts = [event.token.text for event in events if not event.token.special]
        assert "".join(texts) == events[-1].generated_text
        assert events[-1].details.generated_tokens == 9
        stopped = client.generate(PROMPT, max_new_tokens=9, stop_sequences=[answer.generated_text])
        assert stopped.details.finish_reason == "stop_sequence"
        with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens: 0"):
            client.generate(PROMPT, max_new_tokens=0)
        with pytest.raises(text_generation.errors.NotFoundError, match="llama2"):
            text_generation.Client(f"{url}/models/other").generate(PROMPT)

    with_client(run, tmp_path, use, worker=AlternativesWorker(64, 4))
