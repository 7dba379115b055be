"""What a diagnosis says of servers that are well, silent, foreign, or lie: over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from llm_serving.diagnostics.findings import Finding
from llm_serving.diagnostics.server.answers import check_server, transport_calls

PATIENCE_S = 0.2
AGENT = {"rank": 0, "pid": 7, "transport": "tcp", "address": "127.0.0.1:1", "round_trip_us": 50.0}


@dataclass
class FakeServer:
    """Answers as an llm-serving does, but for what a test makes of it."""

    ready: int = 200
    generate: int | None = 200  # None: never
    calls_per_token: int | None = 1  # None: does not tell
    info: dict[str, Any] | str = field(
        default_factory=lambda: {"agents": [AGENT], "served_names": ["a/b"]}
    )
    alive: int = 200
    num_calls: int = 3
    asked: list[Any] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/info", self._info)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/models/{name:.+}/generate", self._generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        try:
            yield f"http://{host}:{port}"
        finally:
            self.ended.set()
            await runner.cleanup()

    async def _livez(self, _: web.Request) -> web.Response:
        return web.Response(status=self.alive, text="{}")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(status=self.ready, text='{"error":"no agent lives"}')

    async def _info(self, _: web.Request) -> web.Response:
        text = self.info if isinstance(self.info, str) else json.dumps(self.info)
        return web.Response(text=text)

    async def _metrics(self, _: web.Request) -> web.Response:
        series = 'llm_serving:transport_calls_total{{method="{}",model_name="m"}} {}\n'
        told = series.format("Execute", float(self.num_calls)) + series.format("Ping", 200.0)
        return web.Response(text="up 1\n" + (told if self.calls_per_token is not None else ""))

    async def _generate(self, request: web.Request) -> web.Response:
        self.asked.append((request.match_info["name"], await request.json()))
        if self.generate is None:
            await self.ended.wait()
        self.num_calls += self.calls_per_token or 0
        return web.json_response({"error": "said the server"}, status=self.generate or 500)


async def diagnosed(server: FakeServer) -> dict[str, Finding]:
    async with server.serve() as url:
        report = await check_server(url, token_s=PATIENCE_S)
    return {finding.item: finding for finding in report.findings}


async def test_a_server_that_keeps_its_word_is_ok_and_one_token_is_asked_for() -> None:
    server = FakeServer()
    found = await diagnosed(server)
    assert list(found) == ["HTTP", "ready", "agent 0", "one token", "calls to agents"]
    assert {f.verdict for f in found.values()} <= {"OK", "slow"}
    ((name, body),) = server.asked
    assert (name, body["parameters"]["max_new_tokens"]) == ("a/b", 1)
    assert "Execute +1" in found["calls to agents"].found


async def test_nobody_there_is_one_sentence() -> None:
    async with FakeServer().serve() as url:
        pass
    report = await check_server(url, if_silent="start one")
    (finding,) = report.findings
    assert (finding.verdict, finding.cure) == ("broken", "start one")
    assert finding.found == f"nobody answers: {url}: Connection refused"


async def test_a_server_that_says_not_ready_is_broken_in_its_own_words_and_not_asked() -> None:
    server = FakeServer(ready=503)
    found = await diagnosed(server)
    assert found["ready"].verdict == "broken"
    assert "no agent lives" in found["ready"].found
    assert found["one token"].verdict == "skipped"
    assert server.asked == []


@pytest.mark.parametrize(("status", "words"), [(500, "said the server"), (None, "said nothing")])
async def test_a_server_that_says_ready_and_is_not_is_found_out(
    status: int | None, words: str
) -> None:
    found = await diagnosed(FakeServer(generate=status))
    assert found["ready"].verdict == "OK"
    assert found["one token"].verdict == "broken"
    assert found["one token"].found.startswith("/readyz says ready, but")
    assert words in found["one token"].found


async def test_a_full_queue_is_slow_not_broken() -> None:
    found = await diagnosed(FakeServer(generate=429))
    assert found["one token"].verdict == "slow"


async def test_tokens_that_no_agent_was_asked_for_are_broken() -> None:
    found = await diagnosed(FakeServer(calls_per_token=0))
    assert found["calls to agents"].verdict == "broken"


async def test_a_server_without_those_counters_is_skipped() -> None:
    found = await diagnosed(FakeServer(calls_per_token=None))
    assert found["calls to agents"].verdict == "skipped"
    assert "not told by this server" in found["calls to agents"].found


@pytest.mark.parametrize("info", ["<html>", "[]", "{}", "7"])
async def test_another_kind_of_server_is_broken(info: str) -> None:
    found = await diagnosed(FakeServer(info=info))
    assert found["info"].verdict == "broken"
    assert "one token" not in found


async def test_something_else_on_that_port_is_broken() -> None:
    found = await diagnosed(FakeServer(alive=404, info="not here"))
    assert found["HTTP"].verdict == found["info"].verdict == "broken"


async def test_an_agent_that_answers_slowly_is_slow() -> None:
    info = {"agents": [{**AGENT, "round_trip_us": 900.0, "restarts": 2}]}
    found = await diagnosed(FakeServer(info=info))
    assert found["agent 0"].verdict == "slow"
    assert "900 us; restarted 2 times" in found["agent 0"].found


async def test_no_token_of_ours_goes_among_the_dumped_logits() -> None:
    server = FakeServer(info={"agents": [AGENT], "precision": {"every": 1}})
    found = await diagnosed(server)
    assert found["one token"].verdict == "skipped"
    assert server.asked == []


def test_calls_are_summed_over_all_series_of_a_method() -> None:
    text = (
        'llm_serving:transport_calls_total{method="Execute",model_name="a"} 2.0\n'
        'llm_serving:transport_calls_total{model_name="b",method="Execute"} 3.0\n'
        'llm_serving:transport_calls_totally{method="Ping"} 9.0\n'
    )
    assert transport_calls(text) == {"Execute": 5.0}
