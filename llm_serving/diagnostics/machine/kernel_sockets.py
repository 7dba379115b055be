"""What the kernel says of the sockets of this machine: /proc/net, and whose descriptors they are.

/proc/net/tcp    sl local_address rem_address st ... uid timeout inode     0100007F:2283
/proc/net/unix   Num RefCount Protocol Flags Type St Inode Path
"""

from __future__ import annotations

import os
import pathlib
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from llm_serving.diagnostics.places import Places, read

__all__ = ["Process", "TcpSocket", "UnixSocket", "owners", "tcp_sockets", "unix_sockets"]

_TCP_STATES = {"01": "established", "0A": "listening"}
_COMMAND_CHARS = 80


@dataclass(frozen=True, slots=True)
class TcpSocket:
    local: tuple[str, int]
    remote: tuple[str, int]
    state: str
    inode: str


@dataclass(frozen=True, slots=True)
class UnixSocket:
    path: str  # empty: the end that connected has none
    is_connected: bool
    inode: str


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    command: str

    @property
    def words(self) -> str:
        return f"pid {self.pid} ({self.command})"


def tcp_sockets(places: Places) -> list[TcpSocket]:
    return [
        TcpSocket(_address(words[1]), _address(words[2]), _TCP_STATES.get(words[3], ""), words[9])
        for table in ("tcp", "tcp6")
        for words in _rows(places.proc / "net" / table)
        if len(words) >= 10
    ]


def unix_sockets(places: Places) -> list[UnixSocket]:
    return [
        UnixSocket(words[7] if len(words) > 7 else "", words[5] == "03", words[6])
        for words in _rows(places.proc / "net/unix")
        if len(words) >= 7
    ]


def owners(places: Places, inodes: Collection[str]) -> dict[str, Process]:
    """Which process holds each socket; a process that is not ours to look at is missing."""
    wanted, found = set(inodes), dict[str, Process]()
    for folder in places.proc.glob("[0-9]*"):
        for inode in wanted.intersection(_sockets_of(folder)):
            command = (read(folder / "cmdline") or "?").replace("\0", " ").strip()
            found[inode] = Process(int(folder.name), command[:_COMMAND_CHARS])
    return found


def _rows(path: pathlib.Path) -> list[list[str]]:
    return [line.split() for line in (read(path) or "").splitlines()[1:]]


def _address(text: str) -> tuple[str, int]:
    """Words of four bytes, each in the order of this machine."""
    digits, _, port = text.partition(":")
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    host = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
    return host.removeprefix("::ffff:"), int(port, 16)


def _sockets_of(folder: pathlib.Path) -> Iterator[str]:
    with suppress(OSError):  # the process has gone, or it is not ours to look at
        for fd in (folder / "fd").iterdir():
            with suppress(OSError):  # closed since
                yield os.readlink(fd).removeprefix("socket:[").removesuffix("]")
