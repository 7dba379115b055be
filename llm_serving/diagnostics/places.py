"""Where does the machine tell about itself?  Every check is given these places, tests fake ones.

`read` never fails: what is not there, or not permitted, is None, and a check says so.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from dataclasses import dataclass, field

__all__ = ["Places", "read", "socket_root"]


@dataclass(frozen=True, slots=True)
class Places:
    shm: pathlib.Path = pathlib.Path("/dev/shm")
    proc: pathlib.Path = pathlib.Path("/proc")
    cgroups: pathlib.Path = pathlib.Path("/sys/fs/cgroup")
    clocks: pathlib.Path = pathlib.Path("/sys/devices/system/clocksource/clocksource0")
    sockets: pathlib.Path = field(default_factory=lambda: socket_root())
    uid: int = field(default_factory=os.getuid)


def socket_root() -> pathlib.Path:
    """What `transport.socket_folder.runtime_folder` returns, without making it."""
    home = pathlib.Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return home / f"llm-serving-{os.getuid()}"


def read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
