"""Does the process that made this file still live?

An owner holds an flock on its file, or folder, for as long as it lives; the kernel takes the lock
away when the process is gone, however it went.  So whoever comes later asks the lock.  Names and
pids could not tell: the same pid means another process in another pid namespace, or tomorrow.
The descriptors are not inheritable (the default of `os.open`), so no child holds a lock by chance.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
from collections.abc import Callable

__all__ = ["hold", "remove_orphan"]


def hold(fd: int, path: pathlib.Path) -> bool:
    """Own the file until `fd` is closed; False if a sweep took it away before it was locked."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def remove_orphan(path: pathlib.Path, remove: Callable[[pathlib.Path], object]) -> bool:
    """Remove the file if nobody holds it; whether that was so.

    A file of another user, or one that is just going away, is left alone.
    """
    try:
        # Not blocking: a FIFO under this name must not stop us.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
