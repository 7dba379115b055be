"""All agents of one epoch: they start together, and when one is lost, all are.

spawn -> let in (handshake) -> Ready -> pings -> steps ... -> lost or stopped -> ended
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from llm_serving.errors import AgentDied, AgentError, AgentTimeout, ChannelError, ConfigError
from llm_serving.protocol import Command, Failed, Ping, Pong, Ready, Reply, Stop
from llm_serving.transport import frames
from llm_serving.transport.address import format_address
from llm_serving.transport.channel import SocketChannel
from llm_serving.transport.listener import Listener
from llm_serving.worker.agent_process import AgentProcess
from llm_serving.worker.traffic import Call, Traffic

__all__ = ["Agent", "AgentGroup"]

_NUM_PINGS = 200
_PING_TIMEOUT_S = 5.0
_LAST_WORDS_S = 0.5  # between the end of a channel and that of its process, or the reverse
_STOP = frames.encode(Stop())


@dataclass(frozen=True, slots=True)
class Agent:
    rank: int
    pid: int
    channel: SocketChannel[Command, Reply]
    ready: Ready
    round_trip_us: float  # median of a ping


class AgentGroup:
    def __init__(self, agent_epoch: int, on_event: Callable[[str], None], traffic: Traffic) -> None:
        self.agent_epoch = agent_epoch
        self.agents: list[Agent] = []  # in the order of their ranks, when all are ready
        self.lost: asyncio.Future[AgentError] = asyncio.get_running_loop().create_future()
        self._on_event = on_event
        self._traffic = traffic
        self._on_lost: Callable[[AgentError], None] | None = None
        self._processes: dict[int, AgentProcess] = {}  # by rank, like the channels
        self._channels: dict[int, SocketChannel[Command, Reply]] = {}

    @property
    def ready(self) -> Ready:
        """What rank 0 said; of the KV blocks, what all have."""
        num_blocks = min(agent.ready.num_blocks for agent in self.agents)
        return msgspec.structs.replace(self.agents[0].ready, num_blocks=num_blocks)

    async def start(
        self,
        command: Sequence[str],
        num_ranks: int,
        key: bytes,
        listener: Listener[Command, Reply],
        timeout_s: float,
    ) -> None:
        """Until all are ready.  Raises ConfigError or AgentError, with the agent's own reason."""
        address = format_address(listener.address)
        began = time.monotonic()
        for rank in range(num_ranks):
            self._processes[rank] = await AgentProcess.spawn(
                command, rank, key, self._on_event, address=address, epoch=self.agent_epoch
            )
        self.agents = await self._unless_one_ends(self._welcome(listener, began), timeout_s)
        for process in self._processes.values():
            process.exited.add_done_callback(partial(self._ended, process))

    def watch(self, on_lost: Callable[[AgentError], None]) -> None:
        """Call `on_lost` in the moment of the loss, at once if that has passed."""
        self._on_lost = on_lost
        if self.lost.done():
            on_lost(self.lost.result())

    def lose(self, reason: AgentError) -> None:
        """Nothing more is expected of these agents; only the first reason counts."""
        if not self.lost.done():
            self.lost.set_result(reason)
            if self._on_lost is not None:
                self._on_lost(reason)

    async def tell_losses(self) -> None:
        """Say of each agent that ended by itself, or does so very soon, how it ended."""
        exits = [process.exited for process in self._processes.values()]
        await asyncio.wait(exits, timeout=_LAST_WORDS_S, return_when=asyncio.FIRST_COMPLETED)
        for process in self._processes.values():
            if process.exited.done():
                self._on_event(await process.how_it_ended())

    async def end(self, grace_s: float) -> None:
        """Stop, then SIGTERM, then SIGKILL, with so much time between them; no process is left."""
        for channel in self._channels.values():
            try:
                channel.post(_STOP)
            except AgentError:  # it is going, or gone
                continue
        await asyncio.gather(*(process.end(grace_s) for process in self._processes.values()))
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _unless_one_ends(
        self, work: Coroutine[Any, Any, list[Agent]], timeout_s: float
    ) -> list[Agent]:
        """Its result, within the time, and as long as every process lives."""
        exits = {process.exited: process for process in self._processes.values()}
        task = asyncio.create_task(work)
        try:
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait({task, *exits}, timeout=timeout_s, return_when=first)
            if not done:
                raise AgentTimeout(
                    f"the agents were not ready within {timeout_s:g} s (agent.start_timeout_s)"
                )
            await asyncio.wait({task}, timeout=_LAST_WORDS_S)
            if task.done() and not isinstance(task.exception(), AgentDied):
                return task.result()
            # The end of a process says more than the end of its channel.
            ended, _ = await asyncio.wait(exits, timeout=_LAST_WORDS_S, return_when=first)
            for exited in ended:
                raise AgentDied(f"an agent did not start: {await exits[exited].how_it_ended()}")
            return task.result()
        finally:
            task.cancel()

    async def _welcome(self, listener: Listener[Command, Reply], began: float) -> list[Agent]:
        """Let exactly our processes in, and wait until each is ready."""
        started_s: dict[int, float] = {}
        while len(self._channels) < len(self._processes):
            channel, hello = await listener.accept()
            process = self._processes.get(hello.rank)
            if process is None or process.pid != hello.pid or hello.rank in self._channels:
                self._on_event(f"turned away pid {hello.pid}, which came as rank {hello.rank}")
                await channel.close()
                continue
            self._channels[hello.rank] = channel
            started_s[hello.rank] = time.monotonic() - began
        ranks = sorted(self._processes)
        return await asyncio.gather(*(self._one_ready(rank, started_s[rank]) for rank in ranks))

    async def _one_ready(self, rank: int, started_s: float) -> Agent:
        channel = self._channels[rank]
        ready = await channel.recv()
        if isinstance(ready, Failed):
            if ready.code == ConfigError.code:
                raise ConfigError(ready.message)
            raise AgentError(f"agent {rank} did not start: {ready.message}")
        if not isinstance(ready, Ready) or (ready.rank, ready.agent_epoch) != (
            rank,
            self.agent_epoch,
        ):
            raise ChannelError(f"agent {rank} said {ready!r:.200} where Ready belongs")
        phases = {"start process": started_s, **ready.phases}
        ready = msgspec.structs.replace(ready, phases=phases)
        round_trip_us = await _measure_round_trip(channel, self._traffic)
        return Agent(rank, self._processes[rank].pid, channel, ready, round_trip_us)

    def _ended(self, process: AgentProcess, _: object) -> None:
        self.lose(AgentDied(f"agent {process.rank} (pid {process.pid}) ended"))


async def _measure_round_trip(channel: SocketChannel[Command, Reply], traffic: Traffic) -> float:
    """Median microseconds."""
    spent = []
    for count in range(_NUM_PINGS):
        call = Call(time.monotonic_ns())
        frame = frames.encode(Ping(count))
        call.encoded_ns, call.frame_bytes = time.monotonic_ns(), len(frame)
        channel.post(frame)
        call.sent_ns = time.monotonic_ns()
        traffic.sent(call, 1)
        pong = await channel.recv(_PING_TIMEOUT_S)
        if not isinstance(pong, Pong) or pong.count != count:
            raise ChannelError("a ping was answered by something else")
        spent.append(time.monotonic_ns() - call.begin_ns)
        arrived_ns, frame_bytes = channel.arrived_ns, channel.frame_bytes
        traffic.answered("Ping", call, pong.times, arrived_ns=arrived_ns, frame_bytes=frame_bytes)
    return statistics.median(spent) / 1e3
