"""A server in a process of its own, and a client of many streams at the cost of few microseconds.

The client shares the processors with the server that it measures, so it is one thread over plain
sockets: an event is a line that begins with `data:`, its time is when its bytes were read, and what
is in it is looked at after the measurement, if at all.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from urllib.request import urlopen

_EVENT = b"\ndata:"  # JSON has no raw line break, so this is never part of one
_TIMEOUT_S = 120.0
_TEXT = "the quick brown fox jumps over the lazy dog and "
WORDS = re.findall(  # a token each with a space before it, in most vocabularies
    r"\w+",
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book",
)


@dataclass(slots=True)
class Answer:
    """Of one request: when it was sent, when each event came (time.perf_counter)."""

    began_s: float
    times_s: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        return (self.times_s[0] - self.began_s) * 1e3

    def ms_per_token(self) -> float:
        """Mean gap in the second half: in the first, prompts of others are still computed."""
        half = self.times_s[len(self.times_s) // 2 :]
        return (half[-1] - half[0]) / (len(half) - 1) * 1e3


class Server:
    """`llm-serving serve` with these flags, from its start until the `with` ends."""

    def __init__(self, *flags: str) -> None:
        self.began_s = time.perf_counter()
        command = [sys.executable, "-m", "llm_serving", "serve", "--port", "0", *flags]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        self.said: list[str] = []
        for line in self._process.stdout or ():
            self.said.append(line.rstrip())
            if found := re.match(r"ready at http://(\S+):(\d+)", line):
                self.host, self.port = found.group(1), int(found.group(2))
                return
        sys.exit("the server did not start:\n" + "\n".join(self.said))

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def get(self, path: str) -> bytes:
        with urlopen(f"http://{self.host}:{self.port}{path}", timeout=_TIMEOUT_S) as answer:
            body: bytes = answer.read()
            return body

    def processes(self) -> dict[int, str]:
        """Ids of all processes of the server, the front end first, and what each is."""
        found = {self._process.pid: "front end"}
        for entry in sorted(pathlib.Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:  # it has ended
                continue
            if parent in found:
                found[int(entry.name)] = (
                    "agent" if "agent" in words else pathlib.Path(words[0]).name
                )
        return found

    def stream(self, prompts: Sequence[str], parameters: Mapping[str, object]) -> list[Answer]:
        """One request for each prompt, all at once, `max_new_tokens` events from each."""
        bodies = [{"inputs": p, "parameters": {**parameters}, "stream": True} for p in prompts]
        path = "/models/llama2/generate"
        calls = [Call(self.host, self.port, path, body) for body in bodies]
        client = Client()
        for call in calls:
            client.begin(call)
        client.read()
        for call in calls:
            call.check(int(str(parameters["max_new_tokens"])))
        return [call.answer for call in calls]


class Client:
    """Reads many calls in one thread, each until its end."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def begin(self, call: Call, then: Callable[[], None] | None = None) -> None:
        """Send it; at its end call `then`, which may begin others."""
        call.send()
        self._selector.register(call.socket, selectors.EVENT_READ, (call, then))

    def read(self, until_s: float = math.inf) -> None:
        """Until all have ended, or until that time on time.perf_counter."""
        while self._selector.get_map() and (left_s := until_s - time.perf_counter()) > 0:
            ready = self._selector.select(min(_TIMEOUT_S, left_s))
            if not ready and left_s > _TIMEOUT_S:
                sys.exit(f"no event in {_TIMEOUT_S:.0f} s")
            for key, _ in ready:
                call, then = key.data
                if not call.read():
                    self._selector.unregister(key.fileobj)
                    call.close()
                    if then is not None:
                        then()


class Call:
    """One request, whose answer is a stream of events; it ends the program if it is refused."""

    def __init__(self, host: str, port: int, path: str, body: Mapping[str, object]) -> None:
        text = json.dumps(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        self._request = (head + text).encode()
        self.socket = socket.create_connection((host, port), _TIMEOUT_S)
        self.answer = Answer(0.0)
        self._received: list[bytes] = []
        self._tail = b""

    def send(self) -> None:
        self.answer.began_s = time.perf_counter()
        self.socket.sendall(self._request)

    def read(self) -> bool:
        """False at the end."""
        data = self.socket.recv(1 << 16)
        now = time.perf_counter()
        self._received.append(data)
        seen = self._tail + data
        self.answer.times_s += [now] * seen.count(_EVENT)
        self._tail = seen[1 - len(_EVENT) :]
        return bool(data)

    def close(self) -> None:
        self.socket.close()
        if not self._received[0].startswith(b"HTTP/1.1 200 "):
            sys.exit(f"a request failed: {self._received[0][:500]!r}")

    def check(self, num_events: int) -> None:
        if len(self.answer.times_s) != num_events:
            sys.exit(f"{len(self.answer.times_s)} events came instead of {num_events}")

    def payloads(self) -> list[bytes]:
        """What stands behind `data:`, of each event that has a time."""
        head, _, body = b"".join(self._received).partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            body = b"".join(_chunks(body))
        found = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
        self.check(len(found))
        return found


def _chunks(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        yield rest[:length]
        body = rest[length + 2 :] if length else b""


def long_prompt(number: int) -> str:
    """More than 256 tokens that begin like no other prompt's; cut it with `truncate`."""
    return f"{number} " + _TEXT * 60


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """Of all streams together, from the first request to the last event."""
    num_tokens = sum(len(answer.times_s) for answer in answers)
    began_s = min(answer.began_s for answer in answers)
    return num_tokens / (max(answer.times_s[-1] for answer in answers) - began_s)


def busy_s() -> float:
    """Seconds that all processors of this machine have worked, or were taken away, so far."""
    fields = [int(n) for n in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, soft, steal = fields[:8]
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class Disturbance:
    """What of this machine's processors other work takes, from the construction on.

    All processes that this one started must have ended by the time of `__str__`, or be servers'.
    """

    def __init__(self) -> None:
        self._began_s, self._busy_s, self._own_s = time.perf_counter(), busy_s(), _own_s()

    def __str__(self) -> str:
        spent_s = (time.perf_counter() - self._began_s) * (os.cpu_count() or 1)
        others_s = busy_s() - self._busy_s - (_own_s() - self._own_s)
        return f"other work took {max(0.0, 100 * others_s / spent_s):.0f} % of the processors"


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
