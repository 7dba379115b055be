"""The agent's tie to its master: an inherited pipe.

The key of this run comes through it, and nothing more.  The master holds the other end open for
as long as it lives, so the end of the pipe is the end of the master, however it went, and a
thread that waits for it needs no time-out and no pid.
"""

from __future__ import annotations

import os
import threading

from llm_serving.errors import AgentRefused

__all__ = ["KEY_BYTES", "MASTER_IS_GONE", "end_with_master", "read_key"]

KEY_BYTES = 32
MASTER_IS_GONE = 3  # exit code


def read_key(fd: int) -> bytes:
    """This run's key.  Raises AgentRefused if there is none in the pipe."""
    key = b""
    try:
        while len(key) < KEY_BYTES and (more := os.read(fd, KEY_BYTES - len(key))):
            key += more
    except OSError as exc:
        raise AgentRefused(f"no pipe with a key is open at descriptor {fd}: {exc}") from exc
    if len(key) < KEY_BYTES:
        raise AgentRefused(f"the pipe held {len(key)} bytes of the key, not {KEY_BYTES}")
    return key


def end_with_master(fd: int) -> None:
    """From now on this process ends when the pipe does, also in the middle of a forward pass."""
    threading.Thread(target=_wait_and_end, args=(fd,), name="watchdog", daemon=True).start()


def _wait_and_end(fd: int) -> None:
    while os.read(fd, 1):
        pass
    os._exit(MASTER_IS_GONE)
