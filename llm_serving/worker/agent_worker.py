"""The Worker of real agents: a step's arrays into shared memory, one frame out, one frame in.

Every rank gets the same frame and answers it (`answers`); the step's slot of the segments is not
written again before all have.  When an agent is lost, or lies, the worker is dead first and the
outstanding steps are told afterwards; then the launcher brings the next epoch, which starts on
the same segments, all slots free.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from llm_serving.errors import AgentDied, AgentError, AgentTimeout, ChannelError, Unavailable
from llm_serving.protocol import Execute, Ready
from llm_serving.step_arrays import StepInputs, StepResult
from llm_serving.transport import frames
from llm_serving.transport.shared_memory import sweep_segments
from llm_serving.worker.agent_group import Agent, AgentGroup
from llm_serving.worker.answers import Answers
from llm_serving.worker.flights import Flight, Flights
from llm_serving.worker.launcher import Launcher
from llm_serving.worker.segments import Segments
from llm_serving.worker.step_transfer import StepLimits, write_inputs
from llm_serving.worker.traffic import Call

__all__ = ["AgentWorker"]


class AgentWorker:
    def __init__(
        self,
        launcher: Launcher,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        num_slots: int = 3,
        vocab_size: int = 0,
    ) -> None:
        """The limits are those of one step; `num_slots` is how many may be outstanding.

        `vocab_size` is that of the logits which steps may ask for; 0: none will.
        A master with n steps in flight needs 2 n - 1: the first may be lost while the agent has
        still to refuse the others.
        """
        self._launcher = launcher
        self._config = launcher.config
        self._limits = StepLimits(
            max_num_seqs, max_num_batched_tokens, max_model_len, block_size, vocab_size
        )
        self.traffic = launcher.traffic
        self._num_slots = num_slots
        self._segments: Segments | None = None
        self._group: AgentGroup | None = None  # None: no agent lives
        self._why_dead = "the agents have not been started"
        self._next: asyncio.Future[Ready] | None = None  # the living epoch's, or the next one's
        self._supervising: asyncio.Task[None] | None = None
        self._flights = Flights(launcher.num_ranks)
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Sweep what dead servers left, reserve memory, and wait for ready agents.

        Raises ConfigError or AgentError with the reason; then nothing is left behind.
        """
        try:
            for name in sweep_segments():
                self._launcher.on_event(f"swept what a dead server left: /dev/shm/{name}")
            self._segments = Segments(self._limits, self._num_slots, self._launcher.num_ranks)
            self._next = asyncio.get_running_loop().create_future()
            group = await self._launcher.start()
        except BaseException:
            await self.close()
            raise
        self._adopt(group)
        self._supervising = asyncio.create_task(self._supervise(group))

    async def ready(self) -> Ready:
        """Wait for a live epoch.  Raises Unavailable when there will never be one again."""
        if self._next is None:
            raise Unavailable(self._why_dead)
        return await asyncio.shield(self._next)

    async def lost(self) -> AgentError:
        if self._group is None:
            return AgentDied(self._why_dead)
        return await asyncio.shield(self._group.lost)

    def submit(self, inputs: StepInputs) -> asyncio.Future[StepResult]:
        group, segments = self._group, self._segments
        if group is None or segments is None:
            raise AgentDied(self._why_dead)
        call = Call(time.monotonic_ns())
        arena = segments.inputs
        slot = arena.begin()
        if slot is None:
            raise ChannelError("more steps are outstanding than the segments have slots")
        try:
            sizes, words = write_inputs(arena, slot, inputs)
            call.written_ns, call.memory_bytes = time.monotonic_ns(), arena.used_bytes(slot)
            frame = frames.encode(Execute(inputs.step_id, sizes, words))
            call.encoded_ns, call.frame_bytes = time.monotonic_ns(), len(frame)
        except ChannelError:
            arena.release(slot)
            raise
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._flights.add(Flight(inputs.step_id, slot, future, call))
        if self._timer is None:
            self._set_timer(self._config.step_timeout_s)
        for agent in group.agents:
            _post(group, agent, frame)
        call.sent_ns = time.monotonic_ns()
        self.traffic.sent(call, len(group.agents))
        return future

    def stalled(self) -> str | None:
        """Why a step would not get on: no agent lives, or one has work and does not move."""
        if self._group is None or self._segments is None:
            return self._why_dead
        for rank, counter in enumerate(self._segments.counters):
            moved = max(self._flights.first_since, counter.read().moved_ns / 1e9)
            idle_s = time.monotonic() - moved
            if self._flights.owed_by(rank) and idle_s > self._config.stall_s:
                return f"agent {rank} has work, and finished no layer for {idle_s:.0f} s"
        return None

    def describe(self) -> list[dict[str, object]]:
        """Each rank of the living epoch, for people."""
        if self._group is None or self._segments is None:
            return []
        return [
            {
                "rank": agent.rank,
                "pid": agent.pid,
                "transport": self._config.transport,
                "address": self._launcher.address,
                "round_trip_us": round(agent.round_trip_us, 1),
                "agent_epoch": agent.ready.agent_epoch,
                "restarts": self._launcher.num_restarts,
                "steps_begun": count.begun,
                "steps_finished": count.finished,
                "layers_finished": count.ticks,
            }
            for agent in self._group.agents
            for count in [self._segments.counters[agent.rank].read()]
        ]

    async def close(self) -> None:
        """Stop the agents and free everything; outstanding steps are lost.  Again: no effect."""
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
            self._supervising = None
        self._on_lost(AgentDied("the worker is closed"))
        self._give_up(Unavailable("the worker is closed"))
        await self._launcher.close()
        if self._segments is not None:
            self._segments.close()
            self._segments = None

    async def _supervise(self, group: AgentGroup) -> None:
        """One epoch after the other, until it cannot go on."""
        try:
            while True:
                group = await self._launcher.restart(await group.lost)
                self._adopt(group)
        except Unavailable as exc:
            self._launcher.on_event(str(exc))
            self._give_up(exc)
        except BaseException as exc:
            self._give_up(Unavailable(f"agents cannot be restarted: {exc!r}"))
            raise

    def _adopt(self, group: AgentGroup) -> None:
        """Begin an epoch: nothing is outstanding, every slot is free."""
        if self._segments is None or self._next is None:
            raise Unavailable(self._why_dead)
        self._segments.reset()
        self._group = group
        group.watch(self._on_lost)
        answers = Answers(group, self._segments, self._flights, self.traffic)
        for agent in group.agents:
            _post(group, agent, frames.encode(self._segments.attach(agent.rank)))
            agent.channel.subscribe(partial(answers.take, agent.rank), group.lose)
        if self._group is not None:  # not lost again
            self._next.set_result(group.ready)

    def _set_timer(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._check_deadline)

    def _check_deadline(self) -> None:
        """A step has its whole time from when it is the first; one timer serves them all."""
        self._timer = None
        if not self._flights or self._group is None:
            return
        limit_s = self._config.step_timeout_s
        left_s = self._flights.first_since + limit_s - time.monotonic()
        if left_s > 0:
            self._set_timer(left_s)
            return
        step_id = self._flights.first.step_id
        self._group.lose(
            AgentTimeout(f"step {step_id} took more than {limit_s:g} s (agent.step_timeout_s)")
        )

    def _on_lost(self, reason: AgentError) -> None:
        """Dead first; then every outstanding step is told."""
        if self._group is None:
            return
        self._group = None
        self._why_dead = f"agents lost: {reason}"
        if self._next is not None and self._next.done():
            self._next = asyncio.get_running_loop().create_future()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for flight in self._flights.take_all():
            flight.lose(reason)

    def _give_up(self, exc: Unavailable) -> None:
        """No epoch will ever follow."""
        self._why_dead = str(exc)
        if self._next is None:
            return
        if self._next.done():
            self._next = asyncio.get_running_loop().create_future()
        self._next.set_exception(exc)
        self._next.exception()  # whoever asks is told; if nobody does, that is no mistake


def _post(group: AgentGroup, agent: Agent, frame: bytes) -> None:
    try:
        agent.channel.post(frame)
    except AgentError as exc:
        group.lose(exc)
