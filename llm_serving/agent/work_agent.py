"""The agent's loop: a command comes, a step runs, an answer goes.  One thing at a time.

It remembers nothing between steps but which one it finished last: a step that takes samples from
any other is refused, and so is, step by step, all that was sent behind a lost one.  An error in a
step is told and the loop goes on; any other error ends it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Protocol

import msgspec

from llm_serving.errors import ChannelError, ServingError
from llm_serving.protocol import (
    Attach,
    Command,
    Execute,
    Executed,
    Failed,
    PeerTimes,
    Ping,
    Pong,
    Reply,
    ResultSizes,
    StepTimes,
    Stop,
)
from llm_serving.step_arrays import StepInputs
from llm_serving.step_cost import StepCost
from llm_serving.step_packing import ResultColumns, pack_result, unpack_inputs
from llm_serving.transport.arena import Arena, TensorRef
from llm_serving.transport.blocking import BlockingChannel
from llm_serving.transport.step_counter import StepCounter

__all__ = ["Columns", "Runner", "WorkAgent", "failed"]


class Columns(ResultColumns, Protocol):
    """What a step gives: the columns of `StepResult`, and when its parts began or ended."""

    @property
    def forward_ns(self) -> int: ...
    @property
    def sample_ns(self) -> int: ...
    @property
    def sampled_ns(self) -> int: ...


class Runner(Protocol):
    """What runs a step: `agent.model_runner.ModelRunner`, or a test's own."""

    num_blocks: int
    block_size: int
    vocab_size: int
    dtype: str
    kv_dtype: str
    device: str
    kernels: dict[str, str]
    bare_decode_ms: dict[int, float]  # rows -> a decode step with nothing around it
    bare_context: int  # tokens that each of those rows could see
    step_cost: StepCost | None

    def execute(self, inputs: StepInputs, tick: Callable[[], None]) -> Columns:
        """Run one step; `inputs` are views of shared memory, read-only and void on return."""


class WorkAgent:
    def __init__(
        self, channel: BlockingChannel[Reply, Command], runner: Runner, agent_epoch: int
    ) -> None:
        self._channel = channel
        self._runner = runner
        self._agent_epoch = agent_epoch
        self._memory: _Memory | None = None
        self._last_step_id: int | None = None

    def serve(self) -> None:
        """Answer commands until Stop.  Raises AgentError when the channel ends or lies."""
        waiting_ns = time.monotonic_ns()
        while not isinstance(command := self._channel.recv(), Stop):
            if isinstance(command, Execute):
                self._channel.send(self._step(command, waiting_ns))
            elif isinstance(command, Ping):
                self._channel.send(self._pong(command, waiting_ns))
            else:
                self._memory = _Memory(command, self._agent_epoch)
            waiting_ns = time.monotonic_ns()

    def _pong(self, ping: Ping, waiting_ns: int) -> Pong:
        return Pong(ping.count, self._peer_times(waiting_ns))

    def _peer_times(self, waiting_ns: int) -> PeerTimes:
        return PeerTimes(waiting_ns, self._channel.received_ns, time.monotonic_ns())

    def _step(self, command: Execute, waiting_ns: int) -> Reply:
        if self._memory is None:
            raise ChannelError("a step before Attach")
        memory, counter = self._memory, self._memory.counter
        counter.begin()
        try:
            inputs = memory.read(command)
            self._check_sources(inputs)
            columns = self._runner.execute(inputs, counter.tick)
            sizes, words = memory.write(columns)
        except Exception as exc:  # the outermost loop: a step may fail in any way
            return msgspec.structs.replace(
                failed(exc, command.step_id), times=self._peer_times(waiting_ns)
            )
        finally:
            counter.finish()
        self._last_step_id = command.step_id
        times = StepTimes(
            waiting_ns,
            self._channel.received_ns,
            time.monotonic_ns(),
            columns.forward_ns,
            columns.sample_ns,
            columns.sampled_ns,
        )
        return Executed(command.step_id, self._agent_epoch, times, sizes, words)

    def _check_sources(self, inputs: StepInputs) -> None:
        wanted = inputs.step_id - 1
        if self._last_step_id != wanted and inputs.sources.max(initial=-1) >= 0:
            raise ChannelError(
                f"step {inputs.step_id} needs the samples of {wanted}, which is lost"
            )


class _Memory:
    """The segments that the master made for one agent."""

    def __init__(self, attach: Attach, agent_epoch: int) -> None:
        self._inputs = Arena.attach(attach.inputs, attach.num_slots, writes=False)
        self._results = Arena.attach(attach.results, attach.num_slots, writes=True)
        self.counter = StepCounter.attach(attach.counter)
        self.counter.restart(agent_epoch)

    def read(self, command: Execute) -> StepInputs:
        """Views, valid until the step is answered: then the master may use the slot again."""
        return unpack_inputs(command.step_id, command.sizes, self._inputs.read(command.words))

    def write(self, columns: Columns) -> tuple[ResultSizes, TensorRef]:
        sizes, words = pack_result(columns)
        slot = self._results.begin()
        if slot is None:
            raise ChannelError("the master has not read the results of the steps before")
        try:
            return sizes, self._results.write_joined(slot, words)
        except ChannelError:
            self._results.release(slot)
            raise


def failed(exc: Exception, step_id: int = -1) -> Failed:
    """The error in words; where nobody foresaw it, stderr gets the traceback."""
    if isinstance(exc, ServingError):
        return Failed(step_id, exc.code, str(exc))
    traceback.print_exception(exc)
    return Failed(step_id, ServingError.code, f"{type(exc).__name__}: {exc}")
