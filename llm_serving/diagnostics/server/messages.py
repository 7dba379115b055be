"""Does every kind of message do what it should?

A living agent's channel has exactly one peer, so the messages go to a twin: a process with the
agent's own loop, the server's transport, handshake and segments, and a model whose tokens are
known.  The kinds are tried in the order of a life; after the first that fails the twin is not what
it was, and the rest is skipped.
"""

from __future__ import annotations

import contextlib
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llm_serving.diagnostics.findings import Finding, Verdict
from llm_serving.diagnostics.probes.echo_link import Transport, own_address
from llm_serving.diagnostics.probes.timings import nearest_rank
from llm_serving.diagnostics.server.handshake import refusal_ms
from llm_serving.diagnostics.server.twin import EPOCH, REPLIES, Twin
from llm_serving.diagnostics.thresholds import THRESHOLDS, verdict_of
from llm_serving.errors import ChannelError
from llm_serving.protocol import Executed, Failed, Ping, Pong, Ready, Reply
from llm_serving.step_arrays import StepInputs
from llm_serving.testing import next_token
from llm_serving.transport.address import format_address
from llm_serving.transport.listener import listen
from llm_serving.worker.step_transfer import StepLimits

__all__ = ["KINDS", "TwinSettings", "check_messages"]

KINDS = (
    "listen",
    "wrong key",
    "handshake",
    "Ready",
    "Ping",
    "Attach",
    "Execute",
    "Failed",
    "Execute again",
    "Stop",
)
_NUM_PINGS = 300


@dataclass(frozen=True, slots=True)
class TwinSettings:
    command: Sequence[str]  # the argv of a twin
    make_step: Callable[[int], StepInputs]
    failing_step: int  # which step the twin fails on purpose
    limits: StepLimits  # the size of the segments


async def check_messages(transport: Transport, settings: TwinSettings) -> list[Finding]:
    """A finding for each of KINDS.  Leaves no process, socket or segment, whatever happens."""
    trials, said = _Trials(transport), list[str]()
    try:
        async with contextlib.AsyncExitStack() as stack:
            twin = await _meet(transport, settings, trials, stack, said)
            await _talk(twin, settings, trials)
    except Exception as exc:  # our own code is what is looked at: it may fail in any way
        trials.fail(exc, said)  # now that the twin has ended, it has said all
    return trials.findings


@dataclass(slots=True)
class _Told:
    words: str = ""
    verdict: Verdict = "OK"


class _Trials:
    """One finding after the other, in the order of KINDS."""

    def __init__(self, transport: str) -> None:
        self.findings: list[Finding] = []
        self._transport = transport

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[_Told]:
        told, began = _Told(), time.perf_counter()
        yield told
        ms = round((time.perf_counter() - began) * 1e3, 3)
        cure = THRESHOLDS["ping p50"].reason if told.verdict == "slow" else ""
        item = f"{self._transport}: {kind}"
        self.findings.append(Finding(item, told.verdict, told.words, cure, {"ms": ms}))

    def fail(self, exc: Exception, said: Sequence[str]) -> None:
        """The kind that was being tried is broken, those behind it are skipped."""
        broken, *rest = KINDS[len(self.findings) :] or ("cleaning up",)
        ours = "".join(traceback.format_exception(exc)).rstrip()
        theirs = "\n".join(said) or "(it has printed nothing)"
        self.findings.append(
            Finding(
                f"{self._transport}: {broken}",
                "broken",
                f"{type(exc).__name__}: {exc}",
                "a server of this installation would fail as its twin did: see the tracebacks",
                trace=f"--- this side\n{ours}\n--- the agent's side\n{theirs}",
            )
        )
        for kind in rest:
            words = f"not tried: {broken} failed before it"
            self.findings.append(Finding(f"{self._transport}: {kind}", "skipped", words))


async def _meet(
    transport: Transport,
    settings: TwinSettings,
    trials: _Trials,
    stack: contextlib.AsyncExitStack,
    said: list[str],
) -> Twin:
    """A twin that has proved the key; what was made for it ends with the stack."""
    key = secrets.token_bytes(32)
    with trials.of("listen") as told:
        listener = await listen(stack.enter_context(own_address(transport)), key, REPLIES)
        stack.push_async_callback(listener.close)
        told.words = f"at {format_address(listener.address)}"
    with trials.of("wrong key") as told:
        ms = await refusal_ms(listener.address)
        told.words = f"turned away after {ms:.1f} ms"
        told.verdict = verdict_of("refusal", ms)
    with trials.of("handshake") as told:
        twin = await Twin.spawn(settings.command, listener, key, settings.limits, said.append)
        stack.push_async_callback(twin.close)
        await twin.shake_hands(listener)
        told.words = f"pid {twin.process.pid} has proved the key, and so have we"
    return twin


async def _talk(twin: Twin, settings: TwinSettings, trials: _Trials) -> None:
    with trials.of("Ready") as told:
        ready = await twin.recv()
        if not isinstance(ready, Ready) or ready.agent_epoch != EPOCH:
            raise _strange(ready, "Ready")
        told.words = f"{ready.num_blocks} blocks of {ready.block_size} tokens"
    with trials.of("Ping") as told:
        p50, p99 = await _ping(twin)
        told.words = f"round trip {p50:.0f} us (p99 {p99:.0f} us)"
        told.verdict = verdict_of("ping p50", p50)
    with trials.of("Attach") as told:
        told.words = f"{await twin.attach()} and two more are mapped, the step counter answers"
    with trials.of("Execute") as told:
        told.words = await _execute(twin, settings.make_step(settings.failing_step - 1))
    with trials.of("Failed") as told:
        told.words = await _fail(twin, settings.make_step(settings.failing_step))
    with trials.of("Execute again") as told:
        words = await _execute(twin, settings.make_step(settings.failing_step + 1))
        told.words = f"{words}: the failed step has cost nothing else"
    with trials.of("Stop") as told:
        if (code := await twin.stop()) != 0:
            raise ChannelError(f"told to stop, it ended with exit code {code}")
        told.words = "it has ended with exit code 0"


async def _ping(twin: Twin) -> tuple[float, float]:
    """Microseconds, median and 99 %."""
    spent = []
    for count in range(_NUM_PINGS):
        began = time.perf_counter()
        pong = await twin.ask(Ping(count))
        spent.append((time.perf_counter() - began) * 1e6)
        if not isinstance(pong, Pong) or pong.count != count:
            raise _strange(pong, f"Pong {count}")
    return nearest_rank(spent, 0.5), nearest_rank(spent, 0.99)


async def _execute(twin: Twin, inputs: StepInputs) -> str:
    began = time.perf_counter()
    reply, token_ids = await twin.run(inputs)
    us = (time.perf_counter() - began) * 1e6
    if isinstance(reply, Failed):
        raise ChannelError(f"step {inputs.step_id} failed in the agent: {reply.message}")
    if not isinstance(reply, Executed) or reply.step_id != inputs.step_id:
        raise _strange(reply, f"Executed {inputs.step_id}")
    if token_ids != [next_token(inputs.input_ids)]:
        raise ChannelError(f"not what was sent has arrived: the step gave {token_ids}")
    return f"the result came back with the right token, {us:.0f} us"


async def _fail(twin: Twin, inputs: StepInputs) -> str:
    reply, _ = await twin.run(inputs)
    if not isinstance(reply, Failed) or reply.step_id != inputs.step_id:
        raise _strange(reply, f"Failed {inputs.step_id}")
    return f"a step that was told to fail says so: {reply.message}"


def _strange(reply: Reply, wanted: str) -> ChannelError:
    return ChannelError(f"the agent said {reply!r:.200} where {wanted} belongs")
