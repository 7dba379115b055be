"""Real agent processes around a scripted runner: steps, losses, restarts, and what is left."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from llm_serving.config import AgentConfig
from llm_serving.errors import (
    AgentDied,
    AgentError,
    AgentTimeout,
    ChannelError,
    ConfigError,
    Unavailable,
)
from llm_serving.protocol import Executed, Failed, Pong, ResultSizes, StepTimes
from llm_serving.transport.arena import TensorRef
from llm_serving.transport.call_log import CallLog
from llm_serving.transport.shared_memory import SharedMemory
from llm_serving.worker.agent_worker import AgentWorker
from llm_serving.worker.answers import Answers
from llm_serving.worker.launcher import Launcher
from llm_serving.worker.segments import Segments
from llm_serving.worker.step_transfer import StepLimits
from llm_serving.worker.traffic import Traffic
from tests.deployment import SCRIPTED, Deployment, lives, segments, sources, step, until
from tests.scripted_agent import NUM_LOGITS

NOTHING, NOWHERE = ResultSizes(0, 0, 0, 0), TensorRef(0, 0, 0, "int32", (0,))
Deploy = Callable[..., Coroutine[Any, Any, Deployment]]


@pytest_asyncio.fixture
async def deploy() -> AsyncIterator[Deploy]:
    """Start a worker; at the end nothing of it may be left."""
    started: list[Deployment] = []

    async def start(
        num_ranks: int = 1,
        config: dict[str, Any] | None = None,
        traffic: Traffic | None = None,
        **script: Any,
    ) -> Deployment:
        started.append(Deployment(num_ranks, config or {}, script, traffic))
        await started[-1].worker.start()
        return started[-1]

    yield start
    for one in started:
        pids = one.pids
        await one.worker.close()
        assert not [pid for pid in pids if lives(pid)]
        assert segments() <= one.segments_before


async def test_a_step_goes_there_and_back_with_all_its_columns(deploy: Deploy) -> None:
    deployed = await deploy(config={"transport": "unix"})
    result = await deployed.worker.submit(step(7, 10, 20, num_logprobs=3))
    assert (result.step_id, result.agent_epoch) == (7, 1)
    assert result.token_ids.tolist() == [11, 21]
    assert result.logprobs.tolist() == [-11, -21]
    assert result.top_ids.tolist() == [[0, 1, 2]] * 2
    assert result.top_logprobs.dtype == np.float32
    assert result.finite.tolist() == [True, True]
    assert result.has_size(2)
    times, transfer = result.times, result.transfer
    stamps = [
        *(transfer.shm_write, transfer.frame_send, transfer.sent, times.received),
        *(times.forward, times.sample, times.write, times.done, transfer.shm_read),
    ]
    assert stamps[0] > 0
    assert [s for s in stamps if s != transfer.sent] == sorted({*stamps} - {transfer.sent})
    assert transfer.frame_send <= transfer.sent <= time.monotonic_ns()
    assert times.waiting <= times.received
    assert result.logits.shape == (0, NUM_LOGITS)


async def test_the_logits_that_were_asked_for_come_back_in_their_order(deploy: Deploy) -> None:
    deployed = await deploy()
    wanted = np.array([2, 0], np.int32)
    result = await deployed.worker.submit(step(1, 10, 20, 30, wanted_logits=wanted))
    assert result.logits.dtype == np.float32
    assert result.logits.tolist() == [[31.0] * NUM_LOGITS, [11.0] * NUM_LOGITS]


async def test_calls_and_bytes_are_counted_as_they_travel(deploy: Deploy) -> None:
    deployed = await deploy()
    traffic = deployed.worker.traffic
    num_pings, before = traffic.num_calls["Ping"], dataclasses.replace(traffic)
    assert num_pings == 200
    assert (before.memory_bytes_sent, before.memory_bytes_received) == (0, 0)
    assert before.frame_bytes_sent > 10 * num_pings < before.frame_bytes_received
    await deployed.run(1, 2, step_id=1)
    await deployed.run(1, 2, step_id=2, wanted_logits=np.zeros(1, np.int32))
    assert traffic.num_calls == {"Execute": 2, "Ping": num_pings}
    small = 2 * (3 * 4 + 1)  # ids, logprobs and nothing of tops for each of two samples; finite
    assert 2 * NUM_LOGITS < traffic.memory_bytes_received <= 2 * small + 4 * NUM_LOGITS
    assert traffic.memory_bytes_sent > 2 * len(step(1, 1).__struct_fields__) * 4
    assert traffic.frame_bytes_sent > before.frame_bytes_sent + 2 * 50
    assert traffic.frame_bytes_received > before.frame_bytes_received + 2 * 50


async def test_a_step_that_failed_is_a_call_in_the_counters_and_in_the_log(
    deploy: Deploy, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "calls.csv"
    log = CallLog(path, transport="tcp+shm", methods=["Execute"])
    deployed = await deploy(traffic=Traffic(log), fail_at=[2])
    await deployed.run(1, step_id=1)
    before = dataclasses.replace(deployed.worker.traffic)
    with pytest.raises(AgentError, match="was to fail"):
        await deployed.worker.submit(step(2))
    traffic = deployed.worker.traffic
    assert traffic.num_calls["Execute"] == 2
    assert traffic.frame_bytes_received > before.frame_bytes_received + 20
    assert traffic.memory_bytes_received == before.memory_bytes_received
    log.close()
    *_, first, failed, summary = path.read_text().splitlines()
    assert summary.startswith("# summary: calls=2 ")
    serialize, send, recv, deserialize, total = map(float, failed.split(",")[2:7])
    assert min(serialize, send, recv) > 0
    assert serialize + send + recv + deserialize <= total + 0.001
    assert float(first.split(",")[8]) > float(failed.split(",")[8]) > 0  # KB that came back


async def test_each_call_has_a_line_in_the_log_while_the_worker_runs(
    deploy: Deploy, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "calls.csv"
    log = CallLog(path, transport="tcp+shm", methods=["Execute"])
    deployed = await deploy(traffic=Traffic(log))
    await deployed.run(1, 2, step_id=1)
    await deployed.run(3, step_id=2)
    await until(lambda: len(path.read_text().splitlines()) == 4)
    title, header, first, second = path.read_text().splitlines()
    assert title.endswith("transport: tcp+shm")
    names = header.split(",")
    for line, row in ((first, "1"), (second, "2")):
        call = dict(zip(names, line.split(","), strict=True))
        assert (call["ID"], call["Method"]) == (row, "Execute")
        stages = [
            float(call[f"{name}_ms"]) for name in ("Serialize", "Send", "Recv", "Deserialize")
        ]
        assert min(stages) > 0
        assert sum(stages) <= float(call["Total_ms"]) + 0.001
    log.close()


async def test_steps_side_by_side_resolve_in_order_and_never_mix(deploy: Deploy) -> None:
    deployed = await deploy()
    order: list[int] = []
    buffer = np.zeros(2, np.int32)
    for first in range(0, 300, 3):
        futures = []
        for step_id in range(first, first + 3):
            buffer[:] = step_id, 2 * step_id  # `inputs` may be overwritten on return
            futures.append(deployed.worker.submit(step(step_id, 0, 0, input_ids=buffer)))
            futures[-1].add_done_callback(lambda f: order.append(f.result().step_id))
        for future in futures:
            result = await future
            assert result.token_ids.tolist() == [result.step_id + 1, 2 * result.step_id + 1]
    await asyncio.sleep(0)  # the callbacks of the last futures
    assert order == list(range(300))


async def test_results_stay_when_their_slots_are_written_again(deploy: Deploy) -> None:
    deployed = await deploy()
    results = [await deployed.worker.submit(step(i, i)) for i in range(12)]
    assert [result.token_ids.tolist() for result in results] == [[i + 1] for i in range(12)]


async def test_more_steps_than_slots_are_refused_and_nothing_is_lost(deploy: Deploy) -> None:
    deployed = await deploy()
    futures = [deployed.worker.submit(step(i, i)) for i in range(3)]
    with pytest.raises(ChannelError, match="more steps are outstanding"):
        deployed.worker.submit(step(3, 3))
    assert [(await future).token_ids.tolist() for future in futures] == [[1], [2], [3]]


async def test_a_step_beyond_the_limits_is_refused_and_the_next_one_runs(deploy: Deploy) -> None:
    deployed = await deploy()
    with pytest.raises(ChannelError, match="slot is full"):
        deployed.worker.submit(step(1, 1, history_ids=np.zeros(1_000_000, np.int32)))
    assert await deployed.run(1, step_id=2) == [2]


async def test_the_largest_step_within_the_limits_fits(deploy: Deploy) -> None:
    deployed = await deploy()
    largest = step(
        1,
        *range(4),
        num_logprobs=32,
        input_ids=np.zeros(64, np.int32),
        positions=np.zeros(64, np.int32),
        slots=np.zeros(64, np.int32),
        block_tables=np.zeros((4, 5), np.int32),
        history_ids=np.zeros(4 * 64, np.int32),
        bias_rows=np.zeros(4 * 1024, np.int32),
        bias_ids=np.zeros(4 * 1024, np.int32),
        bias_values=np.zeros(4 * 1024, np.float32),
    )
    assert (await deployed.worker.submit(largest)).top_ids.shape == (4, 32)


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ({"fail_at": [2]}, "step 2 failed on agent 0: step 2 was to fail"),
        ({"break_at": [2]}, "step 2 failed on agent 0: RuntimeError: step 2 was to break"),
    ],
)
async def test_a_failed_step_is_told_its_followers_refused_and_the_agent_goes_on(
    deploy: Deploy, script: dict[str, Any], match: str
) -> None:
    deployed = await deploy(**script)
    assert await deployed.run(5) == [6]
    lost = deployed.worker.submit(step(2, 0, **sources(0)))
    follower = deployed.worker.submit(step(3, 0, **sources(0)))
    with pytest.raises(AgentError, match=match):
        await lost
    with pytest.raises(ChannelError, match="needs the samples of 2, which is lost"):
        await follower
    assert await deployed.run(8, step_id=4) == [9]
    assert await deployed.run(0, step_id=5, **sources(0)) == [10]
    assert (await deployed.worker.ready()).agent_epoch == 1


async def test_an_agent_that_fails_every_step_is_replaced(deploy: Deploy) -> None:
    deployed = await deploy(fail_at=list(range(1, 40)))
    worker = deployed.worker
    before = await worker.ready()
    for step_id in range(1, 16):
        with pytest.raises(AgentError, match="was to fail"):
            await worker.submit(step(step_id))
    with pytest.raises(AgentError, match=r"16 steps failed in a row: .*step 16 was to fail"):
        await worker.submit(step(16))
    assert "16 steps failed in a row" in str(await worker.lost())
    assert (await worker.ready()).agent_epoch == before.agent_epoch + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": np.zeros(1, np.float32)},
        {"bias_values": np.zeros(0, np.int32)},
    ],
)
async def test_an_array_of_the_wrong_kind_does_not_travel(
    deploy: Deploy, fields: dict[str, Any]
) -> None:
    deployed = await deploy()
    with pytest.raises(ChannelError, match="cannot travel"):
        await deployed.worker.submit(step(1, 1, **fields))
    assert await deployed.run(1, step_id=2) == [2]


async def test_an_agent_that_dies_is_dead_before_its_steps_are_told_and_comes_again(
    deploy: Deploy,
) -> None:
    deployed = await deploy(hang_at=[1], epochs=[1])
    worker = deployed.worker
    futures = [worker.submit(step(1, 1)), worker.submit(step(2, 2))]
    seen: list[str | None] = []
    futures[0].add_done_callback(lambda _: seen.append(worker.stalled()))
    await deployed.events.has("in step 1")
    old = deployed.pids[0]
    os.kill(old, signal.SIGKILL)
    for future in futures:
        with pytest.raises(AgentDied):
            await future
    assert "agents lost" in str(seen[0])
    with pytest.raises(AgentDied, match="agents lost"):
        worker.submit(step(3, 3))
    ready = await worker.ready()
    assert ready.agent_epoch == 2
    assert worker.stalled() is None
    assert deployed.pids != [old]
    assert not lives(old)
    await deployed.events.has(f"agent 0 (pid {old}) was killed by SIGKILL")
    futures = [worker.submit(step(i, i)) for i in range(3)]  # as many as there are slots
    assert [(await future).token_ids.tolist() for future in futures] == [[1], [2], [3]]
    assert worker.describe()[0]["restarts"] == 1


async def test_an_agent_that_leaves_by_itself_says_what_it_printed_last(deploy: Deploy) -> None:
    deployed = await deploy(exit_at=[1], epochs=[1])
    with pytest.raises(AgentDied):
        await deployed.run(1)
    assert "leaving at step 1" in await deployed.events.has("exited with code 7, having said")
    assert (await deployed.worker.ready()).agent_epoch == 2


async def test_results_half_written_by_the_dead_keep_no_slot_from_the_living(
    deploy: Deploy,
) -> None:
    deployed = await deploy(exit_in_results_at=[1], epochs=[1, 2, 3])
    for _ in range(3):  # as many as there are slots
        with pytest.raises(AgentDied):
            await deployed.run(1)
        await deployed.worker.ready()
    assert await deployed.run(1) == [2]


async def test_an_answer_for_another_epoch_or_to_no_question_is_refused(deploy: Deploy) -> None:
    deployed = await deploy(hang_at=[1])
    worker = deployed.worker
    worker.submit(step(1, 1)).cancel()
    assert worker._group is not None
    assert worker._segments is not None
    answers = Answers(worker._group, worker._segments, worker._flights, worker.traffic)
    for reply, match in (
        (Executed(2, 1, StepTimes(), NOTHING, NOWHERE), "step 2 out of turn"),
        (Failed(2, "internal", ""), "step 2 out of turn"),
        (Pong(1), "nobody had asked"),
        (Executed(1, 9, StepTimes(), NOTHING, NOWHERE), "epoch 9"),
    ):
        with pytest.raises(ChannelError, match=match):
            answers.take(0, reply)


async def test_futures_that_nobody_wants_any_more_do_not_disturb(deploy: Deploy) -> None:
    deployed = await deploy(fail_at=[1])
    for future in (deployed.worker.submit(step(1, 1)), deployed.worker.submit(step(2, 2))):
        future.cancel()
    assert await deployed.run(3, step_id=3) == [4]


async def test_a_step_that_takes_too_long_costs_the_agent_its_life(deploy: Deploy) -> None:
    deployed = await deploy(config={"step_timeout_s": 0.2}, spin_at=[2], epochs=[1])
    assert await deployed.run(1) == [2]
    old = deployed.pids[0]
    futures = [deployed.worker.submit(step(i, i)) for i in (2, 3)]
    for future in futures:
        with pytest.raises(AgentTimeout, match="step 2 took more than"):
            await future
    assert (await deployed.worker.ready()).agent_epoch == 2
    assert not lives(old)


async def test_a_step_has_its_whole_time_from_when_it_is_the_first(deploy: Deploy) -> None:
    deployed = await deploy(hang_at=[2])
    assert await deployed.run(1) == [2]  # its timer goes on
    deployed.worker.submit(step(2, 2)).cancel()
    deployed.worker._check_deadline()
    assert deployed.worker.stalled() is None
    assert deployed.worker._timer is not None


async def test_work_that_does_not_move_is_called_a_stall(deploy: Deploy) -> None:
    deployed = await deploy(config={"stall_s": 1e-6}, hang_at=[2])
    assert await deployed.run(1) == [2]
    assert deployed.worker.stalled() is None  # idle for longer than that
    deployed.worker.submit(step(2, 2)).cancel()
    await deployed.events.has("in step 2")
    assert "agent 0 has work" in str(deployed.worker.stalled())
    described = deployed.worker.describe()[0]
    assert (described["steps_begun"], described["steps_finished"]) == (2, 1)
    assert described["layers_finished"] == 3


async def test_a_step_that_has_just_begun_is_no_stall(deploy: Deploy) -> None:
    deployed = await deploy(hang_at=[1])
    deployed.worker.submit(step(1, 1)).cancel()
    assert deployed.worker.stalled() is None
    await deployed.events.has("in step 1")
    assert deployed.worker.stalled() is None


async def test_every_rank_answers_before_a_slot_is_used_again_and_rank_0_counts(
    deploy: Deploy,
) -> None:
    deployed = await deploy(num_ranks=2)
    ready = await deployed.worker.ready()
    assert ready.num_blocks == 63  # of the two, the one with less
    assert [agent["rank"] for agent in deployed.worker.describe()] == [0, 1]
    for first in range(0, 60, 3):
        futures = [deployed.worker.submit(step(i, i)) for i in range(first, first + 3)]
        assert [(await f).token_ids.tolist() for f in futures] == [
            [i + 1] for i in range(first, first + 3)
        ]
    assert {agent["steps_finished"] for agent in deployed.worker.describe()} == {60}


async def test_of_two_ranks_the_loss_of_one_ends_both(deploy: Deploy) -> None:
    deployed = await deploy(num_ranks=2)
    pids = deployed.pids
    os.kill(pids[1], signal.SIGKILL)
    await deployed.events.has(f"agent 1 (pid {pids[1]}) was killed by SIGKILL")
    assert (await deployed.worker.ready()).agent_epoch == 2
    assert not [pid for pid in pids if lives(pid)]
    assert await deployed.run(1) == [2]


async def test_too_many_restarts_are_the_end_and_everybody_who_waits_is_told(
    deploy: Deploy,
) -> None:
    deployed = await deploy(config={"max_restarts": 1}, exit_at=[1])
    for _ in range(2):
        await deployed.worker.ready()
        with pytest.raises(AgentDied):
            await deployed.run(1)
    for _ in range(2):
        with pytest.raises(Unavailable, match="gave up after 1 restarts"):
            await deployed.worker.ready()
    assert "gave up" in str(deployed.worker.stalled())
    with pytest.raises(AgentDied, match="gave up"):
        deployed.worker.submit(step(1, 1))


async def test_a_closed_worker_loses_what_is_outstanding_and_serves_nobody(deploy: Deploy) -> None:
    deployed = await deploy(hang_at=[1], ignore_term=True)
    future = deployed.worker.submit(step(1, 1))
    await deployed.events.has("in step 1")
    closing = asyncio.create_task(deployed.worker.close())
    with pytest.raises(AgentDied, match="closed"):
        await future
    await closing
    with pytest.raises(Unavailable, match="closed"):
        await deployed.worker.ready()
    with pytest.raises(AgentDied, match="closed"):
        deployed.worker.submit(step(2, 2))


@pytest.mark.parametrize("num_fitting", [0, 1, 2])
async def test_segments_of_which_one_finds_no_room_are_all_given_back(
    monkeypatch: pytest.MonkeyPatch, num_fitting: int
) -> None:
    before, create = segments(), SharedMemory.create
    made: list[SharedMemory] = []

    def create_some(num_bytes: int) -> SharedMemory:
        if len(made) == num_fitting:
            raise ConfigError("no room")
        made.append(create(num_bytes))
        return made[-1]

    monkeypatch.setattr(SharedMemory, "create", create_some)
    with pytest.raises(ConfigError, match="no room"):
        Segments(StepLimits(1, 1, 1, 1), num_slots=2, num_ranks=1)
    assert len(made) == num_fitting
    assert segments() == before


async def test_no_room_for_the_segments_is_an_error_at_the_start_that_leaves_nothing() -> None:
    before = segments()
    launcher = Launcher(SCRIPTED, AgentConfig(), on_event=print)
    worker = AgentWorker(
        launcher, max_num_seqs=1 << 30, max_num_batched_tokens=1, max_model_len=4096, block_size=1
    )
    with pytest.raises(ConfigError, match="no room"):
        await worker.start()
    assert segments() == before
    assert worker.describe() == []
