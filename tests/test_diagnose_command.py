"""`llm-serving diagnose` from end to end, with a runtime folder and a /dev/shm of its own."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from llm_serving import cli
from llm_serving.commands import diagnose
from llm_serving.commands.diagnose_twin import TWIN
from llm_serving.diagnostics.diagnosis import diagnosis
from llm_serving.diagnostics.places import Places
from llm_serving.diagnostics.probes.measure import Plan
from llm_serving.diagnostics.probes.round_trips import MEMORY, NAMES, SIZES
from llm_serving.diagnostics.probes.timings import Budget
from llm_serving.diagnostics.server.messages import KINDS
from tests.serving import RunningServer, segments


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """What others left in the real /dev/shm is not this test's."""
    (tmp_path / "shm").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(diagnose, "Places", lambda: Places(shm=tmp_path / "shm"))
    return tmp_path


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures hardly anything."""
    plan = Plan(SIZES[:1], (), 1 << 20, Budget(0.0, num_warm_up=0))
    monkeypatch.setattr(diagnosis, "QUICK", plan)


@pytest.fixture
def port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as waiting:
        return str(waiting.getsockname()[1])


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The JSON, and its findings by item."""
    written = json.loads(path.read_text())
    items = {f["item"]: f for found in written["sections"].values() for f in found}
    return written, items


def test_a_quick_run_without_a_server_ends_with_0_tells_all_and_leaves_nothing(
    machine: pathlib.Path, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = machine / "all.json"
    assert cli.main(["diagnose", "--quick", "--port", port, "--json", str(sink)]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert max(map(len, lines)) <= 120
    assert all(line == line.rstrip() for line in lines)
    assert re.search(r"0 broken, 1 skipped; exit code 0", lines[-1])
    assert re.search(rf"^OK +port {port} +free$", told.out, re.M)
    assert "looking at: every kind of message over tcp" in told.err
    written, items = read(sink)
    assert (written["exit_code"], written["quick"]) == (0, True)
    assert items["server"]["verdict"] == "skipped"
    assert {"TCP loopback: round trip", "numpy scalars", "bf16 against float32"} < set(items)
    ways = {trip["way"] for trip in written["round_trips"]}
    assert ways == {p + n for p in ("", MEMORY) for n in NAMES.values()}
    assert {trip["num_bytes"] for trip in written["round_trips"]} == {64, 16384, 4 * 1024 * 1024}
    assert all(trip["p99_us"] >= trip["p50_us"] > 0 for trip in written["round_trips"])
    assert {f"tcp: {kind}" for kind in KINDS} < set(items)
    assert os.listdir(machine / "run") == os.listdir(machine / "shm") == []
    assert segments(os.getpid()) == []


@pytest.mark.usefixtures("hasty")
def test_a_broken_kind_of_message_is_exit_code_1_with_the_tracebacks_of_both_sides(
    machine: pathlib.Path,
    port: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnose, "TWIN", (*TWIN, "--break-at", "1"))
    assert cli.main(["diagnose", "--quick", "--port", port]) == 1
    told = capsys.readouterr().out
    assert re.search(r"^broken +tcp: Execute ", told, re.M)
    assert told.count("Traceback (most recent call last)") == 2
    assert told.index("--- this side") < told.index("--- the agent's side")
    assert told.splitlines()[-1].endswith("exit code 1")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--url", "localhost:8835"], "expected http://host:port, found 'localhost:8835'"),
        (["--url", "http://h:port"], "expected http://host:port"),
        (["--url", "http://h:1", "--port", "2"], "give --url or --port, not both"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json cannot be a file"),
        (["--port", "0"], "Invalid value for '--port'"),
        (["--config", "/nowhere.yaml"], "cannot read the configuration"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    flags: list[str], sentence: str, machine: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["diagnose", *flags]) in (1, 2)
    told = capsys.readouterr()
    assert sentence in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


@pytest.mark.usefixtures("hasty")
def test_a_named_server_that_is_not_there_is_exit_code_1(
    machine: pathlib.Path, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["diagnose", "--quick", "--url", f"http://127.0.0.1:{port}/models"]) == 1
    told = capsys.readouterr().out
    assert f"nobody answers: http://127.0.0.1:{port}: Connection refused" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_leaves_nothing(machine: pathlib.Path, number: int) -> None:
    command = [sys.executable, "-m", "llm_serving", "diagnose"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "TCP loopback: frames" in line:
                break
        assert len(segments(process.pid)) == 2
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert "nothing is left behind" in rest
    assert segments(process.pid) == []
    assert os.listdir(machine / "run") == []
    assert b"echo_peer" not in b"".join(commands())


def commands() -> list[bytes]:
    """Of all processes that share this test's runtime folder."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.environ["XDG_RUNTIME_DIR"].encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.usefixtures("hasty")
def test_a_running_server_is_found_well(
    machine: pathlib.Path, smollm2: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--num-kv-blocks", "64", "--max-model-len", "256", "--max-num-seqs", "4")
    server = RunningServer(machine / "log", "--transport", "unix", *small).wait_ready()
    try:
        sink = machine / "all.json"
        flags = ["--quick", "--port", str(server.port), "--json", str(sink)]
        assert cli.main(["diagnose", *flags]) == 0
    finally:
        assert server.stop() == 0
    _, items = read(sink)
    agent = items["channel of agent 0"]["values"]
    assert f"pid {server.pid}" in agent["server_end"]
    assert items[f"port {server.port}"]["found"] == f"ours: the server with pid {server.pid}"
    assert "turned a wrong key away" in items["agents' listener"]["found"]
    assert items["calls to agents"]["values"]["Execute"] == 1
    assert {f"unix: {kind}" for kind in KINDS} < set(items)
    assert "tcp: listen" not in items
