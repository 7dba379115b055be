"""Which servers of this user run here: one locked file for each port, for `stop` to find.

    <runtime folder>/servers/8835.json      {"pid": 4711, "host": "127.0.0.1", "grace_s": 10.0}

The server holds an flock on its file for as long as it lives, so a file without a lock is left
over, whatever its pid says, and two servers cannot start on one port side by side.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
from contextlib import suppress

import msgspec

from llm_serving.errors import ConfigError
from llm_serving.transport.socket_folder import runtime_folder

__all__ = ["Record", "ServerRecord", "find_server"]


class Record(msgspec.Struct, frozen=True):
    pid: int
    host: str
    grace_s: float  # how long it lets running requests go on after SIGTERM


class ServerRecord:
    """Held by a running server."""

    def __init__(self, path: pathlib.Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def claim(cls, port: int, host: str, grace_s: float = 0.0) -> ServerRecord:
        """Say that this process serves the port.  Raises ConfigError if another one does."""
        path = _path(port)
        while True:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                other = find_server(port)
                who = f" (pid {other.pid})" if other else ""
                raise ConfigError(
                    f"another llm-serving{who} serves port {port}, or is about to"
                ) from None
            if _is_same_file(fd, path):  # not one that its last owner has just unlinked
                break
            os.close(fd)
        os.truncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(Record(os.getpid(), host, grace_s)), 0)
        return cls(path, fd)

    def release(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        os.close(self._fd)


def find_server(port: int) -> Record | None:
    """The living server of a port, if it is this user's."""
    try:
        fd = os.open(_path(port), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        with suppress(msgspec.DecodeError):  # not written yet
            return msgspec.json.decode(os.pread(fd, 4096, 0), type=Record)
        return None
    finally:
        os.close(fd)


def _path(port: int) -> pathlib.Path:
    folder = runtime_folder() / "servers"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{port}.json"


def _is_same_file(fd: int, path: pathlib.Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False
