"""What servers leave in /dev/shm and in the folder for sockets; who has a port and a channel."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llm_serving.diagnostics.machine.kernel_sockets import tcp_sockets
from llm_serving.diagnostics.machine.shared_memory import check_room, check_segments, room_needed
from llm_serving.diagnostics.machine.sockets import check_channel, check_port, check_socket_folder
from llm_serving.diagnostics.places import Places
from llm_serving.transport import shared_memory
from llm_serving.transport.shared_memory import sweep_segments
from llm_serving.transport.socket_folder import sweep_sockets
from tests.deployment import Deployment, until

# A server's process: makes a segment and a folder for a socket, and then does not move.
OWNER = """
import pathlib, sys
from llm_serving.transport import shared_memory
from llm_serving.transport.socket_folder import SocketFolder
shared_memory._FOLDER = pathlib.Path(sys.argv[1])
segment = shared_memory.SharedMemory.create(8192)
folder = SocketFolder.create(pathlib.Path(sys.argv[2]))
print(segment.name, flush=True)
sys.stdin.read()
"""
LISTENER = """
import socket, sys
waiting = socket.create_server(("127.0.0.1", 0))
print(waiting.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def running(code: str, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process and its first line; it is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def places(tmp_path: pathlib.Path) -> Places:
    (tmp_path / "shm").mkdir()
    (tmp_path / "sockets").mkdir(mode=0o700)
    return Places(shm=tmp_path / "shm", sockets=tmp_path / "sockets")


def test_what_a_killed_server_left_is_named_and_neither_removed_nor_kept_from_the_sweep(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(OWNER, str(places.shm), str(places.sockets)) as (owner, name):
        for path in (places.shm / name, places.sockets / f"agents-{owner.pid}-0"):
            os.utime(path, (0, 0))  # they are old: only the lock can say that they are held
        alive, folder = check_segments(places), check_socket_folder(places)
        assert (alive.verdict, folder.verdict) == ("OK", "OK")
        assert f"1 in use by pid {owner.pid} (8 KB)" in alive.found
        assert f"agents-{owner.pid}-0" in folder.found
        owner.kill()
        owner.wait()
        leaked, left = check_segments(places), check_socket_folder(places)
    assert (leaked.verdict, left.verdict) == ("broken", "broken")
    assert f"{name} (of " in leaked.found
    assert f"made by pid {owner.pid}" in leaked.found
    assert leaked.values["orphan_bytes"] == 8192
    assert "next start" in leaked.cure
    assert "next start" in left.cure
    assert (places.shm / name).exists()
    monkeypatch.setattr(shared_memory, "_FOLDER", places.shm)
    assert sweep_segments() == [name]
    assert sweep_sockets(places.sockets) == [f"agents-{owner.pid}-0"]
    assert check_segments(places).verdict == check_socket_folder(places).verdict == "OK"


def test_a_segment_that_is_just_being_made_is_not_called_leaked(places: Places) -> None:
    segment = places.shm / f"llm-serving-{os.getuid()}-{os.getpid()}-0"
    segment.touch()
    assert check_segments(places).verdict == "OK"
    os.utime(segment, (0, 0))
    assert check_segments(places).verdict == "broken"


def test_what_cannot_be_opened_is_not_judged_and_other_names_are_not_ours(places: Places) -> None:
    (places.shm / "llm-serving-0-1-0").symlink_to("nowhere")  # as closed to us as another user's
    (places.shm / "llm-serving-x-y-z").touch()
    finding = check_segments(places)
    assert finding.verdict == "OK"
    assert finding.values["num_not_permitted"] == 1
    assert "not ours to look at" in finding.found


def test_shared_memory_that_is_missing_small_or_no_memory_is_said_so(
    places: Places, tmp_path: pathlib.Path
) -> None:
    missing = check_room(Places(shm=tmp_path / "none"), 1, "a server")
    assert (missing.verdict, "tmpfs" in missing.cure) == ("broken", True)
    (tmp_path / "file").touch(mode=0o777)
    not_writable = check_room(Places(shm=tmp_path / "file"), 1, "a server")
    assert (not_writable.verdict, "not writable" in not_writable.found) == ("broken", True)
    small = check_room(places, 1 << 60, "a server")
    assert (small.verdict, "too little" in small.found) == ("broken", True)
    assert check_room(places, 1 << 60, "one more", must_fit=False).verdict != "broken"
    mounts = tmp_path / "proc/self/mounts"
    mounts.parent.mkdir(parents=True)
    for kind, verdict in (("ext4", "slow"), ("tmpfs", "OK")):
        mounts.write_text(f"/dev/x / {kind} rw 0 0\nnone {tmp_path}x tmpfs rw 0 0\n")
        found = check_room(Places(shm=places.shm, proc=tmp_path / "proc"), 1, "a server")
        assert found.verdict == verdict


def test_the_room_of_a_server_is_its_segments_to_the_page() -> None:
    assert room_needed(4097, 10, num_slots=1, num_ranks=2) == 8192 + 2 * (4096 + 4096)


@pytest.mark.parametrize("what", ["open to others", "a file"])
def test_a_socket_folder_that_others_may_enter_is_broken(places: Places, what: str) -> None:
    if what == "a file":
        places.sockets.rmdir()
        places.sockets.touch(mode=0o600)
    else:
        places.sockets.chmod(0o755)
    finding = check_socket_folder(places)
    assert finding.verdict == "broken"
    assert "mode 700: remove it" in finding.cure


def test_a_socket_folder_that_is_not_there_is_not_made(places: Places) -> None:
    places.sockets.rmdir()
    assert check_socket_folder(places).verdict == "OK"
    assert not places.sockets.exists()


def test_a_port_that_another_process_has_is_broken_with_its_pid(tmp_path: pathlib.Path) -> None:
    with running(LISTENER) as (other, port):
        taken = check_port(Places(), int(port), server_pid=None, answers_as_ours=False)
        unseen = check_port(
            Places(proc=tmp_path), int(port), server_pid=None, answers_as_ours=False
        )
        ours = check_port(Places(), int(port), server_pid=other.pid, answers_as_ours=False)
        another = check_port(Places(), int(port), server_pid=None, answers_as_ours=True)
    assert (taken.verdict, taken.values["pid"]) == ("broken", other.pid)
    assert f"taken by pid {other.pid}" in taken.found
    assert "cannot be seen" in unseen.found
    assert (ours.verdict, another.verdict) == ("OK", "OK")
    assert "not on this user's records" in another.found


def test_a_free_port_is_free_and_one_that_is_forbidden_is_not() -> None:
    def forbidden(port: int) -> OSError:
        return PermissionError(errno.EACCES, "Permission denied")

    free = check_port(Places(), 80, server_pid=None, answers_as_ours=False, bind=lambda _: None)
    assert (free.verdict, free.found) == ("OK", "free")
    closed = check_port(Places(), 80, server_pid=None, answers_as_ours=False, bind=forbidden)
    assert (closed.verdict, closed.cure) == ("broken", "choose a port above 1023")


def test_the_kernels_table_is_read_in_the_order_of_this_machine(tmp_path: pathlib.Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt uid\n"
    four = "   0: 0100007F:2283 00000000:0000 0A 0:0 00:0 0 0 0 4711 1\n"
    six = f"   0: {'0' * 16}FFFF00000100007F:2283 {'0' * 32}:0000 01 0:0 00:0 0 0 0 4712 1\n"
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text(head + four)
    (tmp_path / "net/tcp6").write_text(head + six)
    first, second = tcp_sockets(Places(proc=tmp_path))
    assert (first.local, first.state, first.inode) == (("127.0.0.1", 8835), "listening", "4711")
    assert (second.local, second.state) == (("127.0.0.1", 8835), "established")


@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_both_ends_of_a_living_agents_channel_are_found(
    transport: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    deployed = Deployment(1, {"transport": transport}, {})
    await deployed.worker.start()
    try:
        agent = deployed.worker.describe()[0]
        found = check_channel(Places(), agent)
        assert found.verdict == "OK", found
        assert str(agent["address"]) in str(found.values["server_end"])
        assert f"pid {os.getpid()}" in str(found.values["server_end"])
        assert f"pid {agent['pid']}" in str(found.values["agent_end"])
        with running(LISTENER) as (stranger, _):
            lost = check_channel(Places(), {**agent, "pid": stranger.pid})
        assert lost.verdict == "broken"
        assert "no connection" in lost.found
        os.kill(int(str(agent["pid"])), signal.SIGSTOP)
        await until(lambda: check_channel(Places(), agent).verdict == "broken")
        assert "SIGSTOP" in check_channel(Places(), agent).found
        os.kill(int(str(agent["pid"])), signal.SIGCONT)
        elsewhere = check_channel(Places(), {**agent, "pid": 2**22 + 1})
        assert (elsewhere.verdict, "not visible" in elsewhere.found) == ("skipped", True)
    finally:
        await deployed.worker.close()


@pytest.mark.parametrize(
    ("state", "words", "cure"),
    [("T", "SIGSTOP", "kill -CONT 7"), ("t", "debugger", "debugger"), ("Z", "ended", "restart")],
)
def test_an_agent_that_does_not_run_is_broken_with_what_helps(
    tmp_path: pathlib.Path, state: str, words: str, cure: str
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/stat").write_text(f"7 (llm serving (agent)) {state} 1 7")
    agent = {"rank": 0, "pid": 7, "address": "127.0.0.1:4711"}
    found = check_channel(Places(proc=tmp_path), agent)
    assert (found.verdict, words in found.found, cure in found.cure) == ("broken", True, True)
    assert ("CONT" in found.cure) == (state == "T")


def test_an_agent_without_an_address_is_broken() -> None:
    assert check_channel(Places(), {"rank": 0, "pid": 1}).verdict == "broken"


def test_a_socket_is_bound_only_to_ask(tmp_path: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as waiting:
        port = waiting.getsockname()[1]
    for _ in range(2):
        found = check_port(Places(), port, server_pid=None, answers_as_ours=False)
        assert found.found == "free"
