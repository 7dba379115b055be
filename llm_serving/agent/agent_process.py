"""The life of an agent process: key, connection, model, Ready, steps, end.

What goes wrong before Ready is told to the master as the reason why there will be none.  The exit
code says it once more:

    0  told to stop        1  an error        2  cannot be configured so        3  no master
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from llm_serving.agent.watchdog import MASTER_IS_GONE, end_with_master, read_key
from llm_serving.agent.work_agent import Runner, WorkAgent, failed
from llm_serving.errors import AgentDied, AgentError, ConfigError
from llm_serving.protocol import Command, Ready, Reply
from llm_serving.transport.address import Address
from llm_serving.transport.blocking import BlockingChannel
from llm_serving.transport.handshake import Hello

__all__ = ["AgentSettings", "Load", "run_agent"]

Load = Callable[[Callable[[str], None]], Runner]  # is given what to call as each phase begins

_STOPPED, _FAILED, _BAD_CONFIG = 0, 1, 2
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


@dataclass(frozen=True, slots=True)
class AgentSettings:
    rank: int
    agent_epoch: int
    address: Address
    key_fd: int
    max_model_len: int
    num_threads: int
    versions: dict[str, str] = field(default_factory=dict)


def run_agent(settings: AgentSettings, load: Load) -> int:
    """Serve until told to stop; the exit code.  Ends the process when the master is gone."""
    try:
        key = read_key(settings.key_fd)
        end_with_master(settings.key_fd)
        me = Hello.of(settings.rank)
        channel = BlockingChannel[Reply, Command].connect(settings.address, key, me, _COMMANDS)
    except AgentError as exc:
        print(f"{exc.code}: {exc}", flush=True)
        return _FAILED
    try:
        return _serve(channel, settings, load)
    finally:
        channel.close()


def _serve(channel: BlockingChannel[Reply, Command], settings: AgentSettings, load: Load) -> int:
    try:
        phases = _Phases()
        runner = load(phases.begin)
        channel.send(_ready(settings, runner, phases.end()))
        WorkAgent(channel, runner, settings.agent_epoch).serve()
        return _STOPPED
    except AgentDied:
        return MASTER_IS_GONE
    except Exception as exc:  # the outermost loop: whatever it is, the master is to know
        with suppress(AgentError):
            channel.send(failed(exc))
        return _BAD_CONFIG if isinstance(exc, ConfigError) else _FAILED


def _ready(settings: AgentSettings, runner: Runner, phases: dict[str, float]) -> Ready:
    return Ready(
        rank=settings.rank,
        agent_epoch=settings.agent_epoch,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        vocab_size=runner.vocab_size,
        max_model_len=settings.max_model_len,
        dtype=runner.dtype,
        kv_dtype=runner.kv_dtype,
        device=runner.device,
        kernels=runner.kernels,
        versions=settings.versions,
        phases=phases,
        num_threads=settings.num_threads,
        bare_decode_ms=runner.bare_decode_ms,
        bare_context=runner.bare_context,
        step_cost=runner.step_cost,
    )


class _Phases:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._current: str | None = None
        self._began = time.monotonic()

    def begin(self, name: str) -> None:
        self.end()
        self._current = name

    def end(self) -> dict[str, float]:
        now = time.monotonic()
        if self._current is not None:
            self._seconds[self._current] = now - self._began
        self._current, self._began = None, now
        return self._seconds
