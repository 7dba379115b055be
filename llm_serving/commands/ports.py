"""Who listens on a port of this machine, as far as /proc tells us."""

from __future__ import annotations

import errno
import os
import pathlib
import socket
from contextlib import suppress

from llm_serving.errors import ConfigError

__all__ = ["listen_on"]

_PROC = pathlib.Path("/proc")
_LISTEN = "0A"  # the state of a listening socket in /proc/net/tcp


def listen_on(host: str, port: int) -> socket.socket:
    """Bind the port before anything slow begins; clients are refused until `listen` is called.

    Raises ConfigError that names the process which has the port, where it can be seen.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as exc:
        raise ConfigError(f"server.host: {host!r} is no address of this machine ({exc})") from exc
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as exc:
        bound.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {_why(exc, port)}") from exc
    return bound


def _why(exc: OSError, port: int) -> str:
    if exc.errno != errno.EADDRINUSE:
        return str(exc)
    holder = _holder(port) or "a process that cannot be seen from here"
    return (
        f"it is in use by {holder}; choose another with --port, or end that one "
        "(llm-serving stop --port)"
    )


def _holder(port: int) -> str | None:
    """`process 4711 (its command)`, or None if nobody listens or it cannot be seen."""
    inodes = _inodes(port)
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has gone meanwhile
            if inodes & _sockets(process):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                return f"process {process.name} ({command[:120]})"
    return None


def _inodes(port: int) -> set[str]:
    """The listening sockets of a port; an address is HEX:PORT in /proc/net/tcp."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in (line.split() for line in lines):
            if columns[3] == _LISTEN and columns[1].endswith(f":{port:04X}"):
                found.add(columns[9])
    return found


def _sockets(process: pathlib.Path) -> set[str]:
    found = set()
    with suppress(OSError):  # the process has gone, or it is not ours to look at
        for fd in (process / "fd").iterdir():
            with suppress(OSError):  # closed since
                found.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    return found
