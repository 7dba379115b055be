"""Which files does the name of a model stand for?

In this order: a name of the catalogue, a path that exists, an id on the Hugging Face hub.  Only
what is on this machine is looked at, in a few system calls.  A hub id stands for the snapshot
that was last downloaded for it, which `remember_snapshot` wrote down.
"""

from __future__ import annotations

import os
import pathlib
import re

import msgspec

from llm_serving.errors import ConfigError
from llm_serving.prepare.catalog import CATALOG

__all__ = ["Source", "cache_home", "find_source", "is_hub_id", "remember_snapshot"]

# Everything in a folder that can change what is served
_FOLDER_FILES = {".json", ".safetensors", ".model", ".jinja"}


class Source(msgspec.Struct, frozen=True):
    name: str  # for people
    path: pathlib.Path  # absolute; a .gguf file, or a folder in the Hugging Face layout

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    def files(self) -> list[tuple[str, int, int]]:
        """(absolute path, bytes, mtime in ns) of every file it consists of."""
        if self.is_gguf:
            found = [self.path]
        else:
            found = [path for path in self.path.iterdir() if path.suffix in _FOLDER_FILES]
        stats = [(str(path), path.stat()) for path in sorted(found)]
        return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def cache_home() -> pathlib.Path:
    """${XDG_CACHE_HOME:-~/.cache}/llm-serving; a relative XDG_CACHE_HOME counts as unset (XDG)."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else pathlib.Path.home() / ".cache") / "llm-serving"


def find_source(model: str) -> Source | None:
    """What `model` names, or None if it is not on this machine (yet).

    Raises ConfigError for a path that exists and can not be a model.
    """
    if model in CATALOG:
        path = cache_home() / CATALOG[model].file
        return Source(path.stem, path) if path.is_file() else None
    path = pathlib.Path(model).expanduser().absolute()
    if model and path.exists():
        return _local(path)
    if is_hub_id(model) and _note(model).is_file():
        snapshot = pathlib.Path(_note(model).read_text())
        return Source(model, snapshot) if snapshot.is_dir() else None
    return None


def is_hub_id(model: str) -> bool:
    """Could `model` be organisation/name on the hub?"""
    parts = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(f"{parts}/{parts}", model) is not None and not model.endswith(".gguf")


def remember_snapshot(model: str, folder: pathlib.Path) -> None:
    note = _note(model)
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f"{note.name}.{os.getpid()}.partial")
    fresh.write_text(str(folder.absolute()))
    fresh.replace(note)


def _note(model: str) -> pathlib.Path:
    return cache_home() / "hub" / model.replace("/", "--")


def _local(path: pathlib.Path) -> Source:
    if path.is_dir():
        return Source(path.resolve().name, path)
    if path.suffix == ".gguf" and path.is_file():
        return Source(path.stem, path)
    raise ConfigError(
        f"{path} is neither a folder with config.json and .safetensors files nor a .gguf file"
    )
