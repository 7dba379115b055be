"""A twin of an agent, from the master's side: started, attached, asked, stopped.

See `messages` for what it is asked.  `close` leaves no process and no segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from llm_serving.diagnostics.probes.spawned_peer import accept_from
from llm_serving.errors import ChannelError
from llm_serving.protocol import Command, Execute, Executed, Ping, Reply, Stop
from llm_serving.step_arrays import StepInputs
from llm_serving.transport.address import format_address
from llm_serving.transport.channel import SocketChannel
from llm_serving.transport.listener import Listener
from llm_serving.worker.agent_process import AgentProcess
from llm_serving.worker.segments import Segments
from llm_serving.worker.step_transfer import StepLimits, read_result, write_inputs

__all__ = ["EPOCH", "REPLIES", "Twin"]

EPOCH = 1
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

_NUM_SLOTS = 3
_START_S, _ANSWER_S, _GRACE_S = 20.0, 5.0, 1.0


class Twin:
    """Every method raises AgentError for an answer that is late, or none."""

    def __init__(self, process: AgentProcess, limits: StepLimits) -> None:
        self.process = process
        self._limits = limits
        self._channel: SocketChannel[Command, Reply] | None = None
        self._segments: Segments | None = None

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        listener: Listener[Command, Reply],
        key: bytes,
        limits: StepLimits,
        on_event: Callable[[str], None],
    ) -> Twin:
        """Raises ConfigError if the command cannot run."""
        address = format_address(listener.address)
        process = await AgentProcess.spawn(command, 0, key, on_event, address=address, epoch=EPOCH)
        return cls(process, limits)

    async def shake_hands(self, listener: Listener[Command, Reply]) -> None:
        self._channel = await accept_from(self.process, listener, _START_S)

    async def attach(self) -> str:
        """Attach has no answer, but the ping after it has; the name of the inputs' segment."""
        self._segments = segments = Segments(self._limits, _NUM_SLOTS, 1)
        await self._open.send(segments.attach(0))
        await self.ask(Ping(-1))
        pid = segments.counters[0].read().pid
        if pid != self.process.pid:
            raise ChannelError(f"the step counter is that of pid {pid}, not of the agent")
        return segments.inputs.name

    async def ask(self, command: Command) -> Reply:
        await self._open.send(command)
        return await self.recv()

    async def recv(self) -> Reply:
        return await self._open.recv(_ANSWER_S)

    async def run(self, inputs: StepInputs) -> tuple[Reply, list[int]]:
        """The answer to a step, and the ids that it brought."""
        if self._segments is None:
            raise ChannelError("a step before Attach")
        arena, results = self._segments.inputs, self._segments.results[0]
        slot = arena.begin()
        if slot is None:
            raise ChannelError("no slot is free, though no step is outstanding")
        try:
            reply = await self.ask(Execute(inputs.step_id, *write_inputs(arena, slot, inputs)))
        finally:
            arena.release(slot)
        if not isinstance(reply, Executed):
            return reply, []
        return reply, read_result(results, reply).token_ids.tolist()

    async def stop(self) -> int:
        """Its exit code."""
        await self._open.send(Stop())
        await self.process.end(_ANSWER_S)
        return self.process.exited.result()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        await self.process.end(_GRACE_S)
        if self._segments is not None:
            self._segments.close()

    @property
    def _open(self) -> SocketChannel[Command, Reply]:
        if self._channel is None:
            raise ChannelError("a message before the handshake")
        return self._channel
