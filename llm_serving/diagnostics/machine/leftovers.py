"""Whose is a file that a server made, and does that process still live?

The kernel's lock says whether an owner lives (see `transport.ownership`), /proc/locks says who
holds it.  The pid in a name is only who made the file, once.  Nothing is removed here: the next
start of a server sweeps.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import pwd
import stat
import time
from dataclasses import dataclass
from typing import Literal

from llm_serving.diagnostics.places import Places, read

__all__ = ["Leftover", "State", "find_leftovers", "user_name"]

State = Literal["alive", "orphan", "not permitted"]

_FileKey = tuple[int, int, int]  # major and minor number of the device, inode

_BIRTH_S = 1.0  # between making a file and locking it


@dataclass(frozen=True, slots=True)
class Leftover:
    path: pathlib.Path
    state: State
    uid: int
    mode: int
    num_bytes: int
    made_by: int  # the pid in its name
    holder: int | None  # who holds the lock, if that can be seen

    @property
    def words(self) -> str:
        """`agents-7-0 (of root, mode 700, made by pid 7)`."""
        return f"{self.path.name} (of {user_name(self.uid)}, mode {self.mode:o}, {self._who})"

    @property
    def _who(self) -> str:
        if self.state == "alive" and self.holder is not None:
            return f"held by pid {self.holder}"
        return f"made by pid {self.made_by}"


def find_leftovers(folder: pathlib.Path, pattern: str, places: Places) -> list[Leftover]:
    """Files or folders called `<anything>-<pid>-<n>`; none if `folder` cannot be read."""
    holders = _lock_holders(places)
    found = (_look_at(path, holders, places) for path in sorted(folder.glob(pattern)))
    return [leftover for leftover in found if leftover is not None]


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _look_at(path: pathlib.Path, holders: dict[_FileKey, int], places: Places) -> Leftover | None:
    words = path.name.split("-")
    try:
        known = path.lstat()
        made_by = int(words[-2])
    except (FileNotFoundError, ValueError, IndexError):  # gone meanwhile, or no name of ours
        return None
    return Leftover(
        path,
        _state(path, known, made_by, places),
        known.st_uid,
        stat.S_IMODE(known.st_mode),
        known.st_size,
        made_by,
        holders.get(_file_key(known)),
    )


def _state(path: pathlib.Path, known: os.stat_result, made_by: int, places: Places) -> State:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return "not permitted"
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return "alive"
    finally:
        os.close(fd)
    is_new = time.time() - known.st_mtime < _BIRTH_S and (places.proc / str(made_by)).exists()
    return "alive" if is_new else "orphan"


def _lock_holders(places: Places) -> dict[_FileKey, int]:
    """Who holds a lock, from lines like `1: FLOCK  ADVISORY  WRITE 4711 00:1a:12345 0 EOF`."""
    found = {}
    for line in (read(places.proc / "locks") or "").splitlines():
        words = line.split()
        if len(words) >= 6 and words[1] == "FLOCK" and int(words[4]) > 0:
            major, minor, inode = words[5].split(":")
            found[int(major, 16), int(minor, 16), int(inode)] = int(words[4])
    return found


def _file_key(known: os.stat_result) -> _FileKey:
    return os.major(known.st_dev), os.minor(known.st_dev), known.st_ino
