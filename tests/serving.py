"""Real servers for tests: `llm-serving serve` in a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

__all__ = ["RunningServer", "segments", "wait_until"]

SHM = pathlib.Path("/dev/shm")


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Poll; the only place where a test sleeps, because a process has no event to wait for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def segments(pid: int) -> list[str]:
    """The shared-memory segments that a process made."""
    return [path.name for path in SHM.glob(f"llm-serving-{os.getuid()}-{pid}-*")]


class RunningServer:
    """A server that is ready, or the reason why it did not start."""

    def __init__(self, log: pathlib.Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        self.flags = flags
        command = [sys.executable, "-m", "llm_serving", "serve", "--port", "0", *flags]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=environment
            )
        self.url = ""

    def wait_ready(self, timeout_s: float = 120.0) -> RunningServer:
        wait_until(
            lambda: self.process.poll() is not None or self._address(), "server starts", timeout_s
        )
        assert self.process.poll() is None, f"it ended at its start:\n{self.output}"
        self.url = self._address()
        wait_until(lambda: self.status("/readyz") == 200, "/readyz is 200")
        return self

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def agents(self) -> list[int]:
        """Pids of its living agent processes."""
        return self.children(b"agent")

    def children(self, command: bytes) -> list[int]:
        """Pids of its living child processes that run a command of ours, as `ps` sees them."""
        found = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                words = (stat.parent / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if state != "Z" and int(parent) == self.pid and command in words:
                found.append(int(stat.parent.name))
        return found

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as exc:
            return exc.code
        except OSError:
            return 0

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        line = re.search(
            rf"^{re.escape(name)}(?:{{[^}}]*}})? ([-+.\de]+)$", self.get("/metrics"), re.M
        )
        assert line is not None, f"no metric {name}"
        return float(line.group(1))

    def generate(self, prompt: str, timeout_s: float = 300, **parameters: object) -> dict[str, Any]:
        """One answer of POST /generate with its details."""
        body = {"inputs": prompt, "parameters": {"details": True, **parameters}}
        request = urllib.request.Request(
            f"{self.url}/models/llama2/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            made: dict[str, Any] = json.loads(answer.read())
        return made

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _address(self) -> str:
        found = re.search(r"^ready at (http://\S+)", self.output, re.M)
        return found.group(1) if found else ""
