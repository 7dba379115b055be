"""Does a running server keep what it says: does it answer, is it ready, does a token come out?

Only what every client may do is done here, and one token is generated.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp

from llm_serving.diagnostics.findings import Finding
from llm_serving.diagnostics.thresholds import THRESHOLDS, verdict_of
from llm_serving.errors import Unavailable

__all__ = ["ServerReport", "agents_of", "check_server", "transport_calls"]

Info = Mapping[str, Any]

_CALLS = "llm_serving:transport_calls_total"
_SERIES = re.compile(rf'^{re.escape(_CALLS)}\{{[^}}]*method="([^"]+)"[^}}]*\}} (\S+)$', re.M)
_START_ONE = "start one (llm-serving serve), or name another (--url, --port)"
_OVERLOADED = 429
_QUOTED_CHARS = 300


@dataclass(frozen=True, slots=True)
class ServerReport:
    findings: list[Finding]
    info: Info | None = None  # of a server of ours that answered


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    text: str
    ms: float

    @property
    def quoted(self) -> str:
        return f"{self.status}: {self.text.strip()[:_QUOTED_CHARS]}"


async def check_server(
    url: str, *, timeout_s: float = 5.0, token_s: float = 30.0, if_silent: str = _START_ONE
) -> ServerReport:
    """`url` without a path; a token may take longer than any other answer."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        client = _Client(session, url, timeout_s)
        try:
            alive = await client.get("/livez")
        except Unavailable as exc:
            return ServerReport([Finding("HTTP", "broken", f"nobody answers: {exc}", if_silent)])
        findings = [_check_alive(alive)]
        try:
            return await _look_closer(client, findings, token_s)
        except Unavailable as exc:
            cure = "it lives but does not answer: see its log, or restart it"
            return ServerReport([*findings, Finding("HTTP answers", "broken", str(exc), cure)])


def transport_calls(metrics: str) -> dict[str, float]:
    """Calls by method, of all series of that metric; empty if the server does not tell."""
    found: dict[str, float] = {}
    for method, value in _SERIES.findall(metrics):
        found[method] = found.get(method, 0) + float(value)
    return found


def agents_of(info: Info | None) -> list[dict[str, Any]]:
    """The agents that /info names; whatever else it says there is left out."""
    agents = (info or {}).get("agents")
    return [a for a in agents if isinstance(a, dict)] if isinstance(agents, list) else []


class _Client:
    def __init__(self, session: aiohttp.ClientSession, url: str, timeout_s: float) -> None:
        self._session = session
        self._url = url
        self._timeout_s = timeout_s

    async def get(self, path: str) -> _Answer:
        return await self.ask("GET", path, None, self._timeout_s)

    async def ask(self, method: str, path: str, body: object, timeout_s: float) -> _Answer:
        """Raises Unavailable with the reason."""
        began = time.perf_counter()
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self._url + path, json=body, timeout=limit
            ) as answer:
                text = await answer.text(errors="replace")
        except TimeoutError:
            raise Unavailable(f"{self._url}{path} said nothing within {timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as exc:
            number = exc.os_error.errno
            why = os.strerror(number) if number else str(exc.os_error)
            raise Unavailable(f"{self._url}: {why}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise Unavailable(f"{self._url}{path}: {exc}") from exc
        return _Answer(answer.status, text, (time.perf_counter() - began) * 1e3)


async def _look_closer(client: _Client, findings: list[Finding], token_s: float) -> ServerReport:
    ready = await client.get("/readyz")
    findings.append(_check_ready(ready))
    about = await client.get("/info")
    info = _info(about)
    if info is None:
        cure = "name the port of an llm-serving server (--port, --url)"
        words = f"/info is not that of an llm-serving server ({about.quoted})"
        return ServerReport([*findings, Finding("info", "broken", words, cure)])
    findings += [_check_agent(agent) for agent in agents_of(info)]
    if why := _why_no_token(ready, info):
        return ServerReport([*findings, Finding("one token", "skipped", f"not tried: {why}")], info)
    before = transport_calls((await client.get("/metrics")).text)
    findings.append(await _check_token(client, info, token_s))
    after = transport_calls((await client.get("/metrics")).text)
    if findings[-1].verdict in ("OK", "slow"):
        findings.append(_check_calls(before, after))
    return ServerReport(findings, info)


def _check_alive(alive: _Answer) -> Finding:
    if alive.status != 200:
        cure = "something else answers there, or a proxy: name the server itself (--url)"
        return Finding("HTTP", "broken", f"/livez answers {alive.quoted}", cure)
    verdict = verdict_of("HTTP", alive.ms)
    cure = THRESHOLDS["HTTP"].reason if verdict == "slow" else ""
    words = f"/livez answered after {alive.ms:.1f} ms"
    return Finding("HTTP", verdict, words, cure, {"ms": round(alive.ms, 3)})


def _check_ready(ready: _Answer) -> Finding:
    if ready.status == 200:
        return Finding("ready", "OK", f"/readyz answered 200 after {ready.ms:.1f} ms")
    cure = "its own words say what it waits for; if that does not pass, see its log"
    return Finding("ready", "broken", f"/readyz answers {ready.quoted}", cure)


def _info(about: _Answer) -> Info | None:
    try:
        info = json.loads(about.text)
    except ValueError:
        return None
    is_ours = about.status == 200 and isinstance(info, dict) and "agents" in info
    return info if is_ours else None


def _check_agent(agent: Info) -> Finding:
    """What the server measured itself, when that agent started."""
    item = f"agent {agent.get('rank')}"
    round_trip_us = agent.get("round_trip_us")
    words = f"pid {agent.get('pid')}, {agent.get('transport')} at {agent.get('address')}"
    if not isinstance(round_trip_us, int | float):
        return Finding(item, "OK", f"{words}; its round trip is not told by this server")
    verdict = verdict_of("ping p50", round_trip_us)
    cure = THRESHOLDS["ping p50"].reason if verdict == "slow" else ""
    words = f"{words}; at its start a round trip took {round_trip_us:.0f} us"
    restarts = agent.get("restarts")
    words += f"; restarted {restarts} times" if restarts else ""
    return Finding(item, verdict, words, cure, {"round_trip_us": round_trip_us})


def _why_no_token(ready: _Answer, info: Info) -> str:
    if ready.status != 200:
        return "the server says that it is not ready"
    if info.get("precision"):
        return "the server writes logits, and those of our token would be among its files"
    return ""


async def _check_token(client: _Client, info: Info, token_s: float) -> Finding:
    names = info.get("served_names") or ["llama2"]
    path = f"/models/{quote(str(names[0]), safe='/:')}/generate"
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 1, "timeout": token_s}}
    cure = "what /readyz says is not true: see the server's log, or restart it"
    try:
        answer = await client.ask("POST", path, body, token_s + 1)
    except Unavailable as exc:
        return Finding("one token", "broken", f"/readyz says ready, but {exc}", cure)
    if answer.status == _OVERLOADED:
        words = f"the queue is full, no request is let in ({answer.quoted})"
        return Finding("one token", "slow", words, "send less, or raise scheduler.max_num_waiting")
    if answer.status != 200:
        words = f"/readyz says ready, but {path} answers {answer.quoted}"
        return Finding("one token", "broken", words, cure)
    verdict = verdict_of("one token", answer.ms)
    cure = THRESHOLDS["one token"].reason if verdict == "slow" else ""
    words = f"POST {path} gave one after {answer.ms:.0f} ms"
    return Finding("one token", verdict, words, cure, {"ms": round(answer.ms, 3)})


def _check_calls(before: Mapping[str, float], after: Mapping[str, float]) -> Finding:
    item = "calls to agents"
    if "Execute" not in after:
        words = f"not told by this server: {_CALLS} is not in its /metrics"
        return Finding(item, "skipped", words)
    moved = {method: after[method] - before.get(method, 0) for method in after}
    words = ", ".join(f"{method} {count:+g}" for method, count in sorted(moved.items()))
    if moved["Execute"] < 1:
        cure = "tokens come out, but no agent was asked: what serves there is not this server"
        return Finding(item, "broken", f"one token has moved no counter ({words})", cure)
    return Finding(item, "OK", f"one token has moved {_CALLS}: {words}", values={**moved})
