"""One agent process, from the outside: started, tied to us, listened to, ended.

It runs in a session of its own, so that Ctrl-C in the terminal reaches only the master, which
then stops it in order.  The key goes in through a pipe whose other end stays open here: when this
process is gone, the agent reads the end of the pipe and goes, too.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from llm_serving.errors import ConfigError

__all__ = ["AgentProcess"]

_TAIL_LINES = 20
_CHUNK_BYTES = 64 * 1024
_KILL_TIMEOUT_S = 10.0
_OUTPUT_TIMEOUT_S = 1.0  # for the rest; a child of its own may hold the other end open


class AgentProcess:
    def __init__(
        self,
        rank: int,
        process: asyncio.subprocess.Process,
        key_fd: int,
        on_event: Callable[[str], None],
    ) -> None:
        self.rank = rank
        self.pid = process.pid
        self.exited = asyncio.create_task(process.wait())
        self._process = process
        self._key_fd: int | None = key_fd
        self._on_event = on_event
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._forwarding = asyncio.create_task(self._forward())

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        rank: int,
        key: bytes,
        on_event: Callable[[str], None],
        **options: object,
    ) -> AgentProcess:
        """Start `command`; `options` go ahead of its own.  Raises ConfigError if it cannot run."""
        read_fd, write_fd = os.pipe()
        words = {"rank": rank, "key-fd": read_fd, **options}
        try:
            os.write(write_fd, key)
            process = await asyncio.create_subprocess_exec(
                *_with_options(command, words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(read_fd,),
                start_new_session=True,
            )
        except BaseException as exc:
            os.close(write_fd)
            if isinstance(exc, OSError):
                raise ConfigError(f"cannot start an agent: {command[0]}: {exc}") from exc
            raise
        finally:
            os.close(read_fd)
        return cls(rank, process, write_fd, on_event)

    async def how_it_ended(self) -> str:
        """Waits for that: "agent 0 (pid 7) was killed by SIGKILL", and what it printed last."""
        code = await self.exited
        await asyncio.wait({self._forwarding}, timeout=_OUTPUT_TIMEOUT_S)
        how = f"exited with code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
        last = "".join(f"\n  {line}" for line in self._tail)
        return f"agent {self.rank} (pid {self.pid}) {how}" + (
            f", having said:{last}" if last else ""
        )

    async def end(self, grace_s: float) -> None:
        """Let it end by itself, then SIGTERM, then SIGKILL, `grace_s` after each other.

        Again has no effect.
        """
        for insist in (self._process.terminate, self._process.kill):
            await asyncio.wait({self.exited}, timeout=grace_s)
            if not self.exited.done():
                with suppress(ProcessLookupError):
                    insist()
        await asyncio.wait({self.exited}, timeout=_KILL_TIMEOUT_S)
        await asyncio.wait({self._forwarding}, timeout=_OUTPUT_TIMEOUT_S)
        self._forwarding.cancel()
        if self._key_fd is not None:
            os.close(self._key_fd)
            self._key_fd = None

    async def _forward(self) -> None:
        """Every line that it prints, to people and into the tail."""
        output = self._process.stdout
        if output is None:
            return
        rest = b""
        while data := await output.read(_CHUNK_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._say(line)
        if rest:
            self._say(rest)

    def _say(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self._tail.append(text)
        self._on_event(f"agent {self.rank}: {text}")


def _with_options(command: Sequence[str], options: Mapping[str, object]) -> list[str]:
    """`options` ahead of the command's own, where `ps` shows them first."""
    own = next((i for i, word in enumerate(command) if word.startswith("--")), len(command))
    words = [w for name, value in options.items() for w in (f"--{name}", str(value))]
    return [*command[:own], *words, *command[own:]]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
