"""What is known of every file with logits: one JSON object a line, beside the files.

    file, position, token_ids              which file, and all ids that it stands for, 0 .. position
    digest                                 of the ids; a line whose ids have another one is broken
    key, time                              as in the name of the file
    model, model_digest, dtype, weights, kernels, source     how the logits were made

Who reads counts what is broken: a server that is killed leaves a half line.  `manifest_writer` has
the other side; this one needs numpy alone.
"""

from __future__ import annotations

import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ConfigError
from llm_serving.precision.naming import key_of, prefix_digest

__all__ = ["MANIFEST_NAME", "Labels", "Manifest", "ManifestEntry", "read_manifest"]

MANIFEST_NAME = "manifest.jsonl"
_BROKEN = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Labels:
    """How logits were made, as the entry says; "" where it does not."""

    model: str = ""
    model_digest: str = ""
    dtype: str = ""
    weights: str = ""
    kernels: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ManifestEntry:
    file: str
    key: str
    position: int  # of the last token seen
    token_ids: npt.NDArray[np.int32]  # all of them, 0 .. position
    digest: str  # of token_ids; see naming.prefix_digest
    time: float
    model: str = ""
    model_digest: str = ""  # as the model card has it
    dtype: str = ""  # what the logits were computed in
    weights: str = ""  # what the weights were in their file: "Q4_1", "bfloat16"
    kernels: str = ""  # backends, joined by "+"
    source: str = ""  # server | transformers

    @property
    def labels(self) -> Labels:
        return Labels(*(getattr(self, name) for name in Labels.__slots__))


@dataclass(frozen=True, slots=True)
class Manifest:
    entries: list[ManifestEntry]
    broken_lines: list[int]  # counted from 1


def read_manifest(path: pathlib.Path) -> Manifest:
    """Of a manifest file, or of the folder it lies in.  Raises ConfigError if there is none."""
    entries, broken = [], []
    try:
        with (path / MANIFEST_NAME if path.is_dir() else path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entries.append(_entry(json.loads(line)))
                except _BROKEN:
                    broken += [number] if line.strip() else []
    except OSError as exc:
        raise ConfigError(f"cannot read the manifest {path}: {exc.strerror}") from exc
    return Manifest(entries, broken)


def _entry(value: Any) -> ManifestEntry:
    """Raises one of _BROKEN for anything that is no line of a manifest.

    Only file, position and token_ids have to be there: others write manifests, too.
    """
    file, position, ids = value["file"], value["position"], _ids(value["token_ids"])
    if not isinstance(file, str) or position != len(ids) - 1:
        raise ValueError("file, or position")
    digest = prefix_digest(ids)
    if value.get("digest", digest) != digest:
        raise ValueError("digest")
    time_s = float(value.get("time", 0.0))
    if not math.isfinite(time_s):
        raise ValueError("time")
    labels = {name: str(value.get(name, "")) for name in Labels.__slots__}
    key = str(value.get("key", key_of(ids)))
    return ManifestEntry(file, key, position, ids, digest, time_s, **labels)


def _ids(value: Any) -> npt.NDArray[np.int32]:
    if not isinstance(value, list) or {type(i) for i in value} != {int} or min(value) < 0:
        raise ValueError("token_ids")
    return np.array(value, np.int32)
