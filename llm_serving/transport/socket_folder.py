"""Where do the Unix sockets of this server lie, and who may enter?

    ${XDG_RUNTIME_DIR, or the folder for temporary files}/llm-serving-<uid>/agents-<pid>-<n>/socket

The outer folder is this user's alone.  The inner one belongs to one server, which holds a lock on
it while it lives (see `ownership`); what a killed server left is swept by the next.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
import stat
import tempfile

from llm_serving.errors import ConfigError
from llm_serving.transport.ownership import hold, remove_orphan

__all__ = ["SocketFolder", "runtime_folder", "sweep_sockets"]

_MAX_PATH_BYTES = 107  # sun_path of Linux, less its final zero


class SocketFolder:
    def __init__(self, path: pathlib.Path, owner_fd: int) -> None:
        self._path = path
        self._owner_fd = owner_fd

    @classmethod
    def create(cls, root: pathlib.Path) -> SocketFolder:
        """A new folder in `root`, ours until `close`."""
        for n in itertools.count():
            path = root / f"agents-{os.getpid()}-{n}"
            try:
                path.mkdir(mode=0o700)
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except (FileExistsError, FileNotFoundError):  # taken, or swept as we came
                continue
            if hold(fd, path):
                break
            os.close(fd)
        return cls(path, fd)

    @property
    def socket_path(self) -> str:
        """Raises ConfigError if the system cannot bind a socket to so long a path."""
        path = str(self._path / "socket")
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise ConfigError(
                f"the path of the socket, {path}, is longer than {_MAX_PATH_BYTES} bytes: set "
                "XDG_RUNTIME_DIR to a shorter folder, or agent.transport to tcp"
            )
        return path

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._owner_fd)


def runtime_folder() -> pathlib.Path:
    """This user's folder for sockets, made if it is absent.  Raises ConfigError if not ours."""
    home = pathlib.Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    path = home / f"llm-serving-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as exc:
        raise ConfigError(f"cannot make the folder for sockets: {exc}") from exc
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or found.st_mode & 0o077:
        raise ConfigError(f"{path} must be a folder of user {os.getuid()} with mode 700: remove it")
    return path


def sweep_sockets(root: pathlib.Path) -> list[str]:
    """Remove the folders in `root` whose servers are gone; their names."""
    return [path.name for path in root.glob("agents-*") if remove_orphan(path, shutil.rmtree)]
