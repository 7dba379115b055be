"""The agent's loop, in a thread of the test; its master is the test itself."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.agent.agent_process import AgentSettings, run_agent
from llm_serving.agent.watchdog import KEY_BYTES, read_key
from llm_serving.agent.work_agent import WorkAgent
from llm_serving.errors import AgentDied, AgentError, AgentRefused, ChannelError
from llm_serving.generation import SAMPLING_DTYPE
from llm_serving.protocol import (
    Attach,
    Command,
    Execute,
    Executed,
    Failed,
    InputSizes,
    Ping,
    Pong,
    Reply,
    Stop,
)
from llm_serving.step_arrays import StepInputs, StepResult
from llm_serving.step_packing import (
    INPUT_NAMES,
    pack_result,
    unpack_inputs,
    unpack_result,
)
from llm_serving.transport.arena import Arena, TensorRef
from llm_serving.transport.blocking import BlockingChannel
from llm_serving.transport.step_counter import StepCounter
from llm_serving.worker.step_transfer import StepLimits, read_result, write_inputs
from tests.deployment import sources, step
from tests.scripted_agent import Columns, Script, ScriptedRunner

COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
LIMITS = StepLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, block_size=16)
TIMEOUT_S = 30.0
EPOCH = 3
FIELDS = INPUT_NAMES
RECORD_BYTES = SAMPLING_DTYPE.itemsize


class CuriousRunner(ScriptedRunner):
    """Keeps copies of what it was given."""

    def __init__(self, script: Script) -> None:
        super().__init__(script, 0)
        self.seen: dict[str, np.ndarray] = {}
        self.were_writeable: set[bool] = set()

    def execute(self, inputs: StepInputs, tick: Any) -> Columns:
        for name in FIELDS:
            self.seen[name] = getattr(inputs, name).copy()
            self.were_writeable.add(getattr(inputs, name).flags.writeable)
        return super().execute(inputs, tick)


class Master:
    """The other end of the agent's channel, and the segments."""

    def __init__(self, script: Script, num_slots: int = 2) -> None:
        mine, its = socket.socketpair()
        self.channel = BlockingChannel[Command, Reply](mine, REPLIES)
        self.inputs = Arena.create(num_slots, LIMITS.input_bytes, writes=True)
        self.results = Arena.create(num_slots, LIMITS.result_bytes, writes=False)
        self.counter = StepCounter.create()
        self.runner = CuriousRunner(script)
        self.error: AgentError | None = None
        self._num_slots = num_slots
        agent = WorkAgent(BlockingChannel(its, COMMANDS), self.runner, EPOCH)
        self._thread = threading.Thread(target=self._serve, args=(agent, its))
        self._thread.start()

    def _serve(self, agent: WorkAgent, its: socket.socket) -> None:
        with its:
            try:
                agent.serve()
            except AgentError as exc:
                self.error = exc

    def attach(self, **lies: Any) -> None:
        words = {
            "inputs": self.inputs.name,
            "results": self.results.name,
            "num_slots": self._num_slots,
            "counter": self.counter.name,
        }
        self.channel.send(Attach(**{**words, **lies}))

    def send(self, inputs: StepInputs) -> int:
        slot = self.inputs.begin()
        assert slot is not None
        self.channel.send(Execute(inputs.step_id, *write_inputs(self.inputs, slot, inputs)))
        return slot

    def recv(self) -> Reply:
        return self.channel.recv(TIMEOUT_S)

    def run(self, inputs: StepInputs) -> StepResult:
        slot = self.send(inputs)
        reply = self.recv()
        self.inputs.release(slot)
        assert isinstance(reply, Executed), reply
        return read_result(self.results, reply)

    def ended(self) -> AgentError | None:
        """Why the loop has ended; None if it was told to."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.error

    def close(self) -> None:
        self.channel.close()
        self._thread.join(TIMEOUT_S)
        for segment in (self.inputs, self.results, self.counter):
            segment.close()


@pytest.fixture
def master() -> Iterator[Master]:
    made = Master(Script(fail_at=[13], break_at=[23], odd_results_at=[33]))
    yield made
    made.close()


def test_a_ping_is_answered_before_there_is_any_memory(master: Master) -> None:
    master.channel.send(Ping(5))
    pong = master.recv()
    assert isinstance(pong, Pong)
    assert pong.count == 5
    assert 0 < pong.times.waiting <= pong.times.received <= pong.times.done


def test_it_stops_when_told(master: Master) -> None:
    master.channel.send(Stop())
    assert master.ended() is None


def test_it_ends_when_the_master_is_gone(master: Master) -> None:
    master.channel.close()
    assert isinstance(master.ended(), AgentDied)


def test_a_step_before_any_memory_ends_it(master: Master) -> None:
    master.send(step(1, 1))
    assert "before Attach" in str(master.ended())


@pytest.mark.parametrize("what", ["inputs", "results", "counter"])
def test_memory_that_is_not_there_ends_it(master: Master, what: str) -> None:
    master.attach(**{what: "llm-serving-0-0-none"})
    assert "cannot attach" in str(master.ended())


def test_a_malformed_frame_ends_it(master: Master) -> None:
    master.channel._write(b"\0\0\0\2??")
    assert isinstance(master.ended(), ChannelError)


def test_the_runner_sees_the_arrays_read_only_and_the_counter_moves(master: Master) -> None:
    master.attach()
    inputs = step(1, 4, 5, num_logprobs=2)
    result = master.run(inputs)
    assert result.token_ids.tolist() == [5, 6]
    assert result.agent_epoch == EPOCH
    assert master.runner.were_writeable == {False}
    for name in FIELDS:
        assert np.array_equal(master.runner.seen[name], getattr(inputs, name)), name
    assert master.runner.seen["sampling"].dtype == SAMPLING_DTYPE
    count = master.counter.read()
    assert (count.pid, count.agent_epoch) == (os.getpid(), EPOCH)
    assert (count.begun, count.finished, count.ticks) == (1, 1, 2)


int32s = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries({name: int32s for name in FIELDS if name != "sampling"}),
    st.lists(st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES), max_size=4),
)
def test_any_arrays_arrive_as_they_left(values: dict[str, list[int]], records: list[bytes]) -> None:
    given: dict[str, Any] = {name: np.array(numbers, np.int32) for name, numbers in values.items()}
    given["bias_values"] = given["bias_values"].view(np.float32)
    given["block_tables"] = given["block_tables"].reshape(len(given["block_tables"]), 1)
    given["sampling"] = np.frombuffer(b"".join(records), SAMPLING_DTYPE)
    arena = Arena.create(1, LIMITS.input_bytes, writes=True)
    try:
        slot = arena.begin()
        assert slot is not None
        sizes, words = write_inputs(arena, slot, StepInputs(1, **given))
        seen = unpack_inputs(1, sizes, arena.read(words))
        for name in FIELDS:
            found = getattr(seen, name)
            assert found.dtype == given[name].dtype, name
            assert found.tobytes() == given[name].tobytes(), name
        assert seen.block_tables.ndim == 2
    finally:
        arena.close()


@pytest.mark.parametrize(
    ("step_id", "match"), [(13, "was to fail"), (23, "RuntimeError"), (33, "float64 cannot travel")]
)
def test_a_failed_step_is_told_and_every_follower_refused_until_a_fresh_start(
    master: Master, step_id: int, match: str
) -> None:
    master.attach()
    master.run(step(step_id - 1, 1))
    for _ in range(5):  # more often than there are slots: a failure keeps none
        slot = master.send(step(step_id, 1))
        reply = master.recv()
        master.inputs.release(slot)
        assert isinstance(reply, Failed)
        assert reply.step_id == step_id
        assert match in reply.message
    for follower in (step_id + 1, step_id + 2):
        slot = master.send(step(follower, 1, **sources(0)))
        refusal = master.recv()
        master.inputs.release(slot)
        assert isinstance(refusal, Failed)
        assert (refusal.step_id, refusal.code) == (follower, "channel")
    assert master.run(step(step_id + 3, 1)).token_ids.tolist() == [2]
    assert master.run(step(step_id + 4, 0, **sources(0))).token_ids.tolist() == [3]


def test_the_first_step_of_an_agent_cannot_take_samples(master: Master) -> None:
    master.attach()
    master.send(step(1, 0, **sources(0)))
    reply = master.recv()
    assert isinstance(reply, Failed)
    assert "needs the samples of 0" in reply.message


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("an array less", "17 arrays"),
        ("an array more", "17 arrays"),
        ("a longer array", "17 arrays"),
        ("another width", "cannot reshape"),
        ("no width", "cannot reshape"),
        ("half a record", "divisor"),
        ("another dtype", "not a row of int32"),
        ("two dimensions", "not a row of int32"),
        ("no dimension", "not a row of int32"),
        ("a stale place", "stale"),
    ],
)
def test_a_step_that_is_not_whole_fails_alone(master: Master, change: str, match: str) -> None:
    master.attach()
    slot = master.inputs.begin()
    assert slot is not None
    sizes, words = write_inputs(master.inputs, slot, step(1, 1))
    each = list(sizes.words)
    at = {name: i for i, name in enumerate(INPUT_NAMES)}
    width, place = sizes.table_width, words
    if change == "an array less":
        each[-2:] = [sum(each[-2:])]
    elif change == "an array more":
        each.append(0)
    elif change == "a longer array":
        each[0] += 1
    elif change == "another width":
        width = 5
    elif change == "no width":
        width = 0
    elif change == "half a record":
        each[at["sampling"]] -= 1
        each[at["history_starts"]] += 1
    elif change == "another dtype":
        place = msgspec.structs.replace(words, dtype="float32")
    elif change == "two dimensions":
        place = msgspec.structs.replace(words, shape=(words.shape[0], 1))
    elif change == "no dimension":
        place = msgspec.structs.replace(words, shape=())
    else:
        place = TensorRef(1, 1, 0, "int32", words.shape)
    master.channel.send(Execute(1, InputSizes(tuple(each), width), place))
    reply = master.recv()
    assert isinstance(reply, Failed)
    assert reply.code == "channel"
    assert re.search(match, reply.message), reply.message
    master.inputs.release(slot)
    assert master.run(step(2, 1)).token_ids.tolist() == [2]


@pytest.mark.parametrize("sizes", [InputSizes((-1,) * 17, 1), InputSizes((1,) * 17, 2**63)])
def test_sizes_that_no_array_has_end_it(master: Master, sizes: InputSizes) -> None:
    master.attach()
    master.channel.send(Execute(1, sizes, TensorRef(0, 0, 0, "int32", (1,))))
    assert "malformed frame: Expected `int`" in str(master.ended())


def test_results_that_the_master_does_not_read_fail_the_step_behind_them(master: Master) -> None:
    master.attach()
    kept = []
    for step_id in range(3):
        slot = master.send(step(step_id, 1))
        kept.append(master.recv())
        master.inputs.release(slot)
    assert isinstance(kept[0], Executed)
    assert isinstance(kept[2], Failed)
    assert "has not read the results" in kept[2].message
    for reply in kept[:2]:
        assert isinstance(reply, Executed)
        read_result(master.results, reply)
    assert master.run(step(4, 1)).token_ids.tolist() == [2]


def test_the_times_of_a_step_are_in_order(master: Master) -> None:
    master.attach()
    start = time.monotonic_ns()
    times = master.run(step(1, 1)).times
    own = (times.waiting, times.received, times.forward, times.sample, times.write, times.done)
    stamps = [start, *own[1:], time.monotonic_ns()]
    assert times.waiting <= times.received
    assert stamps == sorted(stamps)


def test_a_result_that_is_not_whole_is_refused(master: Master) -> None:
    master.attach()
    lies: list[dict[str, Any]] = [
        {"num_samples": 2},
        {"num_samples": -1, "num_top": -2},
        {"num_logits": 1},
        {"dtype": "float32"},
    ]
    for step_id, lie in enumerate(lies):
        slot = master.send(step(step_id, 1))
        reply = master.recv()
        master.inputs.release(slot)
        assert isinstance(reply, Executed)
        part = "words" if "dtype" in lie else "sizes"
        changed = msgspec.structs.replace(getattr(reply, part), **lie)
        with pytest.raises(ChannelError, match="a result of"):
            read_result(master.results, msgspec.structs.replace(reply, **{part: changed}))


@pytest.mark.parametrize(
    ("column", "array", "match"),
    [
        ("logprobs", np.zeros(3, np.float32), "shapes"),
        ("finite", np.ones(2, np.int32), "finite: an array of int32 cannot travel"),
        ("top_ids", np.zeros((2, 1), np.int32), "shapes"),
        ("logits", np.zeros(8, np.float32), "shapes"),
        ("logits", np.zeros((1, 8), np.float64), "logits: an array of float64"),
    ],
)
def test_columns_that_do_not_fit_together_do_not_travel(
    column: str, array: np.ndarray, match: str
) -> None:
    none = np.zeros((2, 0), np.int32)
    given: dict[str, Any] = {
        "token_ids": np.array([7, 8], np.int32),
        "logprobs": np.array([-1, -2], np.float32),
        "top_ids": none,
        "top_logprobs": none.astype(np.float32),
        "finite": np.array([True, False]),
        "logits": np.zeros((0, 8), np.float32),
        "forward_ns": 0,
        "sample_ns": 0,
        "sampled_ns": 0,
    }
    sizes, rows = pack_result(Columns(**given))
    seen = unpack_result(sizes, np.concatenate(rows))
    assert [a.tolist() for a in seen[:2]] == [[7, 8], [-1, -2]]
    assert seen[4].tolist() == [True, False]
    with pytest.raises(ChannelError, match=match):
        pack_result(Columns(**{**given, column: array}))


@pytest.mark.parametrize("num_bytes", [0, KEY_BYTES - 1])
def test_a_pipe_without_a_whole_key_is_refused(num_bytes: int) -> None:
    readable, writable = os.pipe()
    os.write(writable, bytes(num_bytes))
    os.close(writable)
    with pytest.raises(AgentRefused, match=f"{num_bytes} bytes of the key"):
        read_key(readable)
    os.close(readable)


def test_an_agent_that_nobody_launched_says_what_it_lacks(
    capfd: pytest.CaptureFixture[str],
) -> None:
    nowhere = os.open("/dev/null", os.O_WRONLY)
    given = AgentSettings(0, 1, "/nowhere", nowhere, 64, 1)
    assert run_agent(given, lambda phase: ScriptedRunner(Script(), 0)) == 1
    os.close(nowhere)
    assert "no pipe with a key" in capfd.readouterr().out
