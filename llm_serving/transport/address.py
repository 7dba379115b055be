"""Where does a listener wait, as a value, as words on a command line, and as a socket?"""

from __future__ import annotations

import socket

from llm_serving.errors import ConfigError

__all__ = ["Address", "format_address", "new_socket", "parse_address"]

Address = tuple[str, int] | str  # IPv4 host and port, or the path of a Unix socket


def format_address(address: Address) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def parse_address(text: str) -> Address:
    """The inverse of `format_address`: an absolute path, or host:port.  Raises ConfigError."""
    if text.startswith("/"):
        return text
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"an address is host:port or the path of a Unix socket, not {text!r}")
    return host, int(port)


def new_socket(address: Address) -> socket.socket:
    """A socket that can be bound or connected to it."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)
