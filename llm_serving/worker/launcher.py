"""Who starts the agents, and starts them again?

An epoch begins when an agent process of every rank is ready and ends with the loss of any.  Then
the rest is killed, and after a short pause the next one begins, but not more than `max_restarts`
times within ten minutes.  Whoever started a launcher must `close` it: no process and no socket
file is left behind.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from llm_serving.config import AgentConfig
from llm_serving.errors import AgentDied, AgentError, ConfigError, Unavailable
from llm_serving.protocol import Command, Reply
from llm_serving.transport.address import Address, format_address
from llm_serving.transport.listener import Listener, listen
from llm_serving.transport.socket_folder import SocketFolder, runtime_folder, sweep_sockets
from llm_serving.worker.agent_group import AgentGroup
from llm_serving.worker.traffic import Traffic

__all__ = ["Launcher"]

_KEY_BYTES = 32
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_WINDOW_S = 600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class Launcher:
    def __init__(
        self,
        command: Sequence[str],
        config: AgentConfig,
        *,
        num_ranks: int = 1,
        on_event: Callable[[str], None],
        traffic: Traffic | None = None,
        stop_grace_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`command` is the argv of an agent; what only one agent is told goes ahead of its options.

        `on_event` is given sentences for people: what agents print, losses, restarts.
        `traffic` counts what travels; None: a new one.
        `stop_grace_s` is how long an agent may take to stop, and again to obey SIGTERM.
        """
        self.config = config
        self.num_ranks = num_ranks
        self.num_restarts = 0
        self.traffic = traffic or Traffic()
        self._command = command
        self.on_event = on_event
        self._stop_grace_s = stop_grace_s
        self._clock = clock
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._agent_epoch = 0
        self._restarts: deque[float] = deque()  # when, within the window
        self._group: AgentGroup | None = None
        self._folder: SocketFolder | None = None
        self._listener: Listener[Command, Reply] | None = None

    @property
    def address(self) -> str:
        """Where the agents connect to; empty before the start."""
        return "" if self._listener is None else format_address(self._listener.address)

    async def start(self) -> AgentGroup:
        """The first epoch.  Raises ConfigError or AgentError with the agent's own reason."""
        try:
            self._listener = await listen(self._new_address(), self._key, _REPLIES)
        except OSError as exc:
            raise ConfigError(f"cannot listen for agents: {exc}") from exc
        return await self._start_group(self._listener)

    def pin(self, option: str, value: object) -> None:
        """Give it to every later agent: what the first one measured has to stay true."""
        self._command = [*self._command, option, str(value)]

    async def restart(self, reason: AgentError) -> AgentGroup:
        """The next epoch after a loss.  Raises Unavailable when there were too many."""
        if self._group is None or self._listener is None:
            raise Unavailable("the launcher is closed")
        why: AgentError | ConfigError = reason
        self.on_event(f"agents lost: {reason}")
        if isinstance(reason, AgentDied):
            await self._group.tell_losses()
        await self._group.end(grace_s=0)
        while True:
            await asyncio.sleep(self._pause_s(why))
            self.num_restarts += 1
            self.on_event(f"starting the agents again, restart {self.num_restarts}")
            try:
                return await self._start_group(self._listener)
            except (AgentError, ConfigError) as exc:
                why = exc
                self.on_event(f"no restart: {exc}")

    async def close(self) -> None:
        """Stop all agents, gently first; again and again has no effect."""
        if self._group is not None:
            await self._group.end(self._stop_grace_s)
            self._group = None
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    async def _start_group(self, listener: Listener[Command, Reply]) -> AgentGroup:
        self._agent_epoch += 1
        self._group = group = AgentGroup(self._agent_epoch, self.on_event, self.traffic)
        try:
            await group.start(
                self._command, self.num_ranks, self._key, listener, self.config.start_timeout_s
            )
        except BaseException:
            await group.end(grace_s=0)
            self._group = None
            raise
        return group

    def _new_address(self) -> Address:
        if self.config.transport == "tcp":
            return "127.0.0.1", 0
        root = runtime_folder()
        for name in sweep_sockets(root):
            self.on_event(f"swept what a dead server left: {root / name}")
        self._folder = SocketFolder.create(root)
        return self._folder.socket_path

    def _pause_s(self, why: Exception) -> float:
        """How long to wait before the next start, longer each time; or Unavailable."""
        now = self._clock()
        while self._restarts and now - self._restarts[0] > _WINDOW_S:
            self._restarts.popleft()
        num = len(self._restarts)
        if num >= self.config.max_restarts:
            raise Unavailable(
                f"gave up after {num} restarts within ten minutes (agent.max_restarts): {why}"
            )
        self._restarts.append(now)
        return min(_FIRST_PAUSE_S * 2.0**num, _LONGEST_PAUSE_S)
