"""Who listens on a port of this machine, as far as /proc tells us."""

from __future__ import annotations

import os
import pathlib
import socket

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
        if port and _inodes(port):  # SO_REUSEADDR lets two servers bind if neither listens yet
            raise OSError("somebody listens there")
    except OSError as exc:
        bound.close()
        holder = _holder(port)
        by = f" by {holder}" if holder else ""
        raise ConfigError(
            f"cannot listen on {host}:{port}: it is in use{by}; "
            "choose another with --port, or end that one (llm-serving stop --port)"
            if holder or _inodes(port)
            else f"cannot listen on {host}:{port}: {exc}"
        ) from exc
    return bound


def _holder(port: int) -> str | None:
    """ "python3 (pid 4711)", or None if nobody listens or it cannot be seen."""
    inodes = _inodes(port)
    for process in _PROC.glob("[0-9]*"):
        if inodes & _sockets(process):
            words = (process / "cmdline").read_bytes().split(b"\0")
            command = b" ".join(words).decode(errors="replace").strip()
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
    try:
        links = [os.readlink(fd) for fd in (process / "fd").iterdir()]
    except OSError:  # it has gone, or it is not ours to look at
        return set()
    return {link[8:-1] for link in links if link.startswith("socket:[")}
