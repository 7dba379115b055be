"""How agents are let in, started, given up and ended: real processes, and their masters."""

from __future__ import annotations

import asyncio
import os
import pathlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from llm_serving.config import AgentConfig
from llm_serving.errors import (
    AgentDied,
    AgentError,
    AgentRefused,
    AgentTimeout,
    ConfigError,
    ServingError,
    Unavailable,
)
from llm_serving.protocol import Command
from llm_serving.transport.address import format_address, parse_address
from llm_serving.transport.channel import connect
from llm_serving.transport.handshake import Hello
from llm_serving.transport.listener import listen
from llm_serving.transport.shared_memory import sweep_segments
from llm_serving.transport.socket_folder import runtime_folder, sweep_sockets
from llm_serving.worker.agent_process import AgentProcess
from llm_serving.worker.launcher import Launcher
from tests.deployment import SCRIPTED, START_S, Deployment, Events, lives, segments

MASTER = pathlib.Path(__file__).with_name("scripted_master.py")
COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
MASTER_IS_GONE_WITHIN_S = 5.0
# Never says a word to its master, but ends with it, as an agent does: by the pipe of its key.
SILENT = """
import os, sys
print("here", flush=True)
key_fd = int(sys.argv[sys.argv.index("--key-fd") + 1])
while os.read(key_fd, 64):
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The runtime folder is this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return runtime_folder()


@pytest_asyncio.fixture
async def events() -> Events:
    return Events()


async def failed_start(error: type[ServingError], **script: Any) -> tuple[str, Deployment]:
    """What a start that must fail has said; nothing may be left of it."""
    config = script.pop("config", {})
    deployed = Deployment(1, config, script)
    with pytest.raises(error) as caught:
        await deployed.worker.start()
    assert segments() == deployed.segments_before
    assert children() == []
    return str(caught.value), deployed


def children() -> list[int]:
    """Living processes of the scripted agent that this process started."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            words = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if state != "Z" and int(parent) == os.getpid() and b"scripted_agent" in words:
            found.append(int(stat.parent.name))
    return found


async def test_a_model_that_cannot_be_served_is_the_reason_in_its_own_words() -> None:
    reason, _ = await failed_start(ConfigError, refuse_start="rope_scaling: no such type 'su'")
    assert reason == "rope_scaling: no such type 'su'"


async def test_a_bug_in_the_start_is_told_with_its_traceback_for_people() -> None:
    reason, deployed = await failed_start(AgentError, break_start="out of luck")
    assert reason == "agent 0 did not start: RuntimeError: out of luck"
    assert any("Traceback" in line for line in deployed.events.lines)


async def test_a_crash_in_the_start_is_told_with_the_last_lines_of_the_agent() -> None:
    reason, _ = await failed_start(AgentDied, exit_at_start=3)
    assert "exited with code 3" in reason
    assert "these weights are not mine" in reason


@pytest.mark.parametrize(
    "command", [["/nowhere/llm-serving", "agent"], [str(pathlib.Path(__file__).parent)]]
)
async def test_a_command_that_cannot_run_is_a_config_error(
    command: list[str], events: Events
) -> None:
    launcher = Launcher(command, AgentConfig(), on_event=events)
    with pytest.raises(ConfigError, match="cannot start an agent"):
        await launcher.start()
    await launcher.close()


async def test_a_command_that_is_no_agent_is_told_as_such(events: Events) -> None:
    command = [sys.executable, "-c", "print('hello')"]
    launcher = Launcher(command, AgentConfig(start_timeout_s=START_S), on_event=events)
    with pytest.raises(AgentDied, match="exited with code 0, having said:\n  hello"):
        await launcher.start()
    await launcher.close()
    assert events.lines == ["agent 0: hello"]


async def test_an_agent_that_never_gets_ready_is_not_waited_for_for_ever() -> None:
    config = {"start_timeout_s": 0.5}
    reason, _ = await failed_start(AgentTimeout, hang_at_start=True, config=config)
    assert "not ready within 0.5 s (agent.start_timeout_s)" in reason


async def test_a_start_that_fails_ends_its_processes_at_once(events: Events) -> None:
    silent = [sys.executable, "-c", SILENT, "scripted_agent"]
    launcher = Launcher(silent, AgentConfig(start_timeout_s=0.2), num_ranks=2, on_event=events)
    with pytest.raises(AgentTimeout):
        await launcher.start()
    assert children() == []
    await launcher.close()


@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_a_start_and_a_stop_leave_nothing(
    transport: str, folder: pathlib.Path, events: Events
) -> None:
    deployed = Deployment(2, {"transport": transport}, {})
    await deployed.worker.start()
    described = deployed.worker.describe()
    pids = deployed.pids
    assert [agent["transport"] for agent in described] == [transport] * 2
    assert all(float(str(agent["round_trip_us"])) > 0 for agent in described)
    assert len(names_in(folder)) == (transport == "unix")
    assert len(segments() - deployed.segments_before) == 1 + 2 * 2
    await deployed.worker.close()
    await deployed.worker.close()
    assert not [pid for pid in pids if lives(pid)]
    assert names_in(folder) == []
    assert segments() == deployed.segments_before
    assert children() == []


async def test_an_agent_that_ignores_everything_is_killed_in_the_end() -> None:
    deployed = Deployment(1, {}, {"hang_at_start": False, "ignore_term": True, "hang_at": [1]})
    await deployed.worker.start()
    pid = deployed.pids[0]
    os.kill(pid, signal.SIGSTOP)
    await deployed.worker.close()
    assert not lives(pid)


async def test_an_agent_shows_what_it_is_and_nothing_secret() -> None:
    deployed = Deployment(1, {}, {})
    await deployed.worker.start()
    process = pathlib.Path(f"/proc/{deployed.pids[0]}")
    words = (process / "cmdline").read_bytes().split(b"\0")
    where = words.index(SCRIPTED[1].encode())
    assert words[where + 1 : where + 4] == [b"--rank", b"0", b"--key-fd"]
    for secret in (deployed.launcher._key, deployed.launcher._key.hex().encode()):
        assert secret not in b"".join(words)
        assert secret not in (process / "environ").read_bytes()
    assert os.getsid(deployed.pids[0]) == deployed.pids[0]  # Ctrl-C is not for it
    await deployed.worker.close()


async def test_only_the_processes_that_were_started_are_let_in(events: Events) -> None:
    launcher = Launcher([sys.executable, "-c", SILENT], AgentConfig(), on_event=events)
    starting = asyncio.create_task(launcher.start())
    await events.has("here")
    address = parse_address(launcher.address)
    with pytest.raises(AgentRefused, match="key"):
        await connect(address, b"another key", Hello.of(0), COMMANDS)
    for rank in (0, 5):  # the key alone is not enough
        stranger = await connect(address, launcher._key, Hello.of(rank), COMMANDS)
        await events.has(f"turned away pid {os.getpid()}, which came as rank {rank}")
        with pytest.raises(AgentDied):
            await stranger.recv(START_S)
        await stranger.close()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await launcher.close()


async def test_an_agent_with_another_key_is_refused_and_says_so(events: Events) -> None:
    listener = await listen(("127.0.0.1", 0), b"k" * 32, COMMANDS)
    address = format_address(listener.address)
    agent = await AgentProcess.spawn(SCRIPTED, 0, b"x" * 32, events, address=address, epoch=1)
    ended = await agent.how_it_ended()
    assert "exited with code 1" in ended
    assert "agent_refused: the peer does not have this run's key" in ended
    await agent.end(0)
    await listener.close()


async def test_a_restart_that_fails_counts_and_says_why(events: Events) -> None:
    deployed = Deployment(1, {"max_restarts": 2}, {"exit_at": [1], "epochs": [1]})
    await deployed.worker.start()
    deployed.launcher._command = ["/nowhere/agent"]
    os.kill(deployed.pids[0], signal.SIGKILL)
    await deployed.events.has("agents lost")
    with pytest.raises(Unavailable, match=r"gave up after 2 restarts.*/nowhere/agent"):
        await deployed.worker.ready()
    said = [line for line in deployed.events.lines if line.startswith("no restart: cannot start")]
    assert len(said) == 2
    await deployed.worker.close()


async def test_the_pauses_between_restarts_grow_and_old_restarts_are_forgotten(
    events: Events,
) -> None:
    now = [1000.0]
    config = AgentConfig(max_restarts=8)
    launcher = Launcher(SCRIPTED, config, on_event=events, clock=lambda: now[0])
    reason = AgentDied("gone")
    pauses = [launcher._pause_s(reason) for _ in range(8)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    with pytest.raises(Unavailable):
        launcher._pause_s(reason)
    now[0] += 601
    assert launcher._pause_s(reason) == 0.1


def names_in(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture(params=[("tcp", "hang_at"), ("unix", "spin_at")])
def killed(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A master that was killed in the middle of a step: its pid, and a pidfd of its agent."""
    transport, script = request.param
    config, deeds = f'{{"transport": "{transport}"}}', f'{{"{script}": [1]}}'
    master = subprocess.Popen([sys.executable, str(MASTER), config, deeds], stdout=-1, text=True)
    with master:
        assert master.stdout is not None
        agent = os.pidfd_open(int(master.stdout.readline()))
        master.kill()
    yield master.pid, agent
    os.close(agent)


async def test_an_agent_ends_with_its_master_also_in_the_middle_of_a_step(
    killed: tuple[int, int], folder: pathlib.Path
) -> None:
    master, agent = killed
    ended = select.poll()
    ended.register(agent, select.POLLIN)
    assert ended.poll(MASTER_IS_GONE_WITHIN_S * 1000)
    sweep_segments()
    assert segments_of(master) == []
    left = names_in(folder)
    assert sweep_sockets(folder) == left
    assert names_in(folder) == []


def segments_of(pid: int) -> list[pathlib.Path]:
    return list(pathlib.Path("/dev/shm").glob(f"llm-serving-{os.getuid()}-{pid}-*"))


async def test_what_a_killed_server_left_is_swept_at_the_next_start(
    killed: tuple[int, int], folder: pathlib.Path
) -> None:
    master, _ = killed
    deployed = Deployment(1, {"transport": "unix"}, {})
    await deployed.worker.start()
    assert segments_of(master) == []
    assert [name.split("-")[1] for name in names_in(folder)] == [str(os.getpid())]
    assert any("swept what a dead server left" in line for line in deployed.events.lines)
    await deployed.worker.close()
