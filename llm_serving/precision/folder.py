"""Which files with logits lie in a folder, and what is known of each?"""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass, field

from llm_serving.precision.manifest import (
    MANIFEST_NAME,
    Labels,
    Manifest,
    ManifestEntry,
    read_manifest,
)
from llm_serving.precision.naming import keys_of, printable, read_name

__all__ = ["Folder", "Saved", "read_folder"]


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """One file with logits, and what is known of the tokens in front of them."""

    path: pathlib.Path
    time: float
    position: int
    key: str  # as its name spells it; "" if only the manifest knows
    ids: bytes | None = None  # of the manifest: all ids up to the position, big-endian int32
    keys: tuple[str, ...] = ()  # what its name may say in either spelling
    labels: Labels | None = None

    @property
    def name(self) -> str:
        return printable(self.path.name)


@dataclass
class Folder:
    path: pathlib.Path
    files: list[Saved] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)  # neither name nor manifest says what it is
    missing: list[str] = field(default_factory=list)  # in the manifest, but not in the folder
    notes: list[str] = field(default_factory=list)
    has_manifest: bool = False


def read_folder(path: pathlib.Path) -> Folder:
    """Raises OSError if the folder cannot be listed, ConfigError if its manifest cannot be read."""
    has_manifest = (path / MANIFEST_NAME).exists()
    manifest = read_manifest(path) if has_manifest else Manifest([], [])
    folder = Folder(path, has_manifest=has_manifest, notes=_notes(path, manifest))
    entries = {entry.file: entry for entry in manifest.entries}
    names = sorted(n for n in os.listdir(path) if n.endswith(".npy") and not n.startswith("."))
    for name in names:
        saved = _saved(path / name, entries.get(name))
        if saved is None:
            folder.nameless.append(name)
        else:
            folder.files.append(saved)
    folder.missing = sorted(entries.keys() - set(names))
    return folder


def _notes(path: pathlib.Path, manifest: Manifest) -> list[str]:
    broken = manifest.broken_lines
    if not broken:
        return []
    where = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
    return [
        f"{path}/{MANIFEST_NAME}: {len(broken)} broken (line {where}); what they described is "
        "paired by its name"
    ]


def _saved(path: pathlib.Path, entry: ManifestEntry | None) -> Saved | None:
    """None if neither its name nor a line of the manifest says what it is."""
    named = read_name(path.name)
    if entry is None:
        if named is None:
            return None
        return Saved(path, named.time_s, named.position, named.key, keys=(named.key,))
    time_s, keys = named.time_s if named else entry.time, keys_of(entry.token_ids)
    key = named.key if named else keys[1]
    ids = entry.token_ids.astype(">i4").tobytes()
    return Saved(path, time_s, entry.position, key, ids, keys, entry.labels)
