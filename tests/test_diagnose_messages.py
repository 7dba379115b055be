"""Every kind of message against a twin, healthy and broken; strangers at a listener."""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from llm_serving.commands.diagnose_twin import FAILING_STEP, TWIN, twin_step
from llm_serving.diagnostics.probes.echo_link import Transport
from llm_serving.diagnostics.server.handshake import check_listener, refusal_ms
from llm_serving.diagnostics.server.messages import KINDS, TwinSettings, check_messages
from llm_serving.diagnostics.server.twin import REPLIES, Twin
from llm_serving.errors import ChannelError
from llm_serving.step_arrays import StepInputs
from llm_serving.transport.address import Address, format_address
from llm_serving.transport.frames import encode
from llm_serving.transport.handshake import Hello
from llm_serving.transport.listener import listen
from llm_serving.worker.step_transfer import StepLimits
from tests.deployment import segments

LIMITS = StepLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=16)
PATIENCE_S = 0.2  # of a test whose peer never answers


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The runtime folder would be made here."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def settings(command: Sequence[str] = TWIN, limits: StepLimits = LIMITS) -> TwinSettings:
    return TwinSettings(command, twin_step, FAILING_STEP, limits)


def twins() -> list[str]:
    """Living processes that this one started as twins."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_text()
            if state != "Z" and int(parent) == os.getpid() and "diagnose_twin" in command:
                found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_a_healthy_installation_passes_every_kind_and_nothing_is_left(
    transport: Transport, folder: pathlib.Path
) -> None:
    before = segments()
    found = await check_messages(transport, settings())
    assert [f.item for f in found] == [f"{transport}: {kind}" for kind in KINDS]
    assert {f.verdict for f in found} <= {"OK", "slow"}, found
    assert segments() == before
    assert os.listdir(folder) == []
    assert twins() == []


async def test_the_first_kind_that_fails_shows_both_tracebacks_and_the_rest_is_skipped() -> None:
    before = segments()
    found = await check_messages("tcp", settings((*TWIN, "--break-at", str(FAILING_STEP - 1))))
    verdicts = {f.item.removeprefix("tcp: "): f.verdict for f in found}
    assert verdicts["Attach"] == "OK"
    assert verdicts["Execute"] == "broken"
    assert [verdicts[kind] for kind in ("Failed", "Execute again", "Stop")] == ["skipped"] * 3
    (broken,) = (f for f in found if f.verdict == "broken")
    ours, _, theirs = broken.trace.partition("--- the agent's side")
    assert "Traceback" in ours
    assert "ChannelError: step 1 failed in the agent" in ours
    assert "Traceback" in theirs
    assert "in execute" in theirs
    assert "RuntimeError: this step was broken by --break-at" in theirs
    assert segments() == before


async def test_a_step_that_must_fail_and_does_not_is_broken() -> None:
    found = await check_messages("tcp", TwinSettings(TWIN, twin_step, FAILING_STEP + 5, LIMITS))
    broken = next(f for f in found if f.verdict == "broken")
    assert broken.item == "tcp: Failed"
    assert "where Failed 7 belongs" in broken.found


async def test_a_mistake_of_our_own_is_shown_with_its_traceback_not_raised() -> None:
    def broken_step(step_id: int) -> StepInputs:
        raise KeyError(f"step {step_id} has no such array")

    found = await check_messages("tcp", TwinSettings(TWIN, broken_step, FAILING_STEP, LIMITS))
    (broken,) = (f for f in found if f.verdict == "broken")
    assert broken.item == "tcp: Execute"
    assert "in broken_step" in broken.trace
    assert twins() == []


async def test_what_goes_wrong_after_the_last_kind_is_broken_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(twin: Twin) -> None:
        await close(twin)
        raise OSError("the socket's folder cannot be removed")

    close = Twin.close
    monkeypatch.setattr(Twin, "close", fail)
    found = await check_messages("tcp", settings())
    assert len(found) == len(KINDS) + 1
    assert {f.verdict for f in found[:-1]} <= {"OK", "slow"}
    assert (found[-1].item, found[-1].verdict) == ("tcp: cleaning up", "broken")
    assert twins() == []


async def test_an_agent_that_dies_at_its_start_says_why_at_once() -> None:
    command = (sys.executable, "-c", "raise ImportError('no numpy here')")
    found = await check_messages("tcp", settings(command))
    broken = next(f for f in found if f.verdict == "broken")
    assert broken.item == "tcp: handshake"
    assert "exited with code 1" in broken.found
    assert "ImportError: no numpy here" in broken.trace


async def test_a_full_shared_memory_breaks_attach_with_its_cure() -> None:
    huge = StepLimits(1 << 20, 1 << 20, 1 << 20, 16)
    found = await check_messages("tcp", settings(limits=huge))
    broken = next(f for f in found if f.verdict == "broken")
    assert broken.item == "tcp: Attach"
    assert "--shm-size" in broken.found
    assert twins() == []


async def test_a_folder_for_sockets_that_is_not_ours_breaks_the_unix_socket(
    folder: pathlib.Path,
) -> None:
    (folder / f"llm-serving-{os.getuid()}").mkdir(mode=0o755)
    found = await check_messages("unix", settings())
    assert (found[0].item, found[0].verdict) == ("unix: listen", "broken")
    assert "remove it" in found[0].found


async def test_a_listener_of_ours_turns_a_wrong_key_away(folder: pathlib.Path) -> None:
    for address in (("127.0.0.1", 0), str(folder / "socket")):
        listener = await listen(address, b"k" * 32, REPLIES)
        try:
            found = await check_listener({"address": format_address(listener.address)})
        finally:
            await listener.close()
        assert found.verdict in ("OK", "slow"), found
        assert "turned a wrong key away" in found.found


@asynccontextmanager
async def peer(*frames: bytes, hang_up: bool) -> AsyncIterator[Address]:
    """Somebody who listens, says that to everybody, and may never hang up."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(frames)
        if not hang_up:
            await ended.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()
    finally:
        ended.set()
        server.close()
        await server.wait_closed()


async def test_a_listener_that_lets_anybody_stay_is_broken() -> None:
    async with peer(encode(Hello.of(-1)), hang_up=False) as address:
        with pytest.raises(ChannelError, match="wrong key was not turned away"):
            await refusal_ms(address, PATIENCE_S)


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (b"", "hung up before it greeted"),
        (b"HTTP/1.1 400 Bad", "bytes where a greeting belongs"),
        (encode({"not": "a Hello"}), "malformed frame"),
    ],
)
async def test_what_is_no_listener_of_ours_is_broken(frame: bytes, match: str) -> None:
    async with peer(frame, hang_up=True) as address:
        found = await check_listener({"address": format_address(address)})
    assert found.verdict == "broken"
    assert match in found.found


async def test_a_listener_that_is_not_open_to_us_is_skipped_with_what_that_means(
    folder: pathlib.Path,
) -> None:
    gone = await check_listener({"address": str(folder / "none")})
    assert gone.verdict == "skipped"
    assert "another container" in gone.found
    async with peer(hang_up=True) as address:
        pass
    closed = await check_listener({"address": format_address(address)})
    assert closed.verdict == "skipped"
    assert "nobody listens" in closed.found
