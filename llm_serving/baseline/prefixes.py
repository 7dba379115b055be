"""Which prefixes does a manifest name, and which of them does one pass over a text serve?

A prefix that begins another needs no pass of its own: the logits behind all positions of a text
come out of one.  In sorted order whatever begins others stands right in front of them.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard
from llm_serving.precision.manifest import Manifest, ManifestEntry, read_manifest

__all__ = ["PrefixGroup", "group_prefixes", "read_prefixes"]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    token_ids: npt.NDArray[np.int32]  # the longest of the prefixes
    num_times: dict[int, int]  # by position: so often does the manifest name this prefix


def read_prefixes(
    path: pathlib.Path, card: ModelCard, *, allow_other_model: bool = False
) -> Manifest:
    """A manifest of this model.  Raises ConfigError if it names nothing, or is another model's."""
    manifest = read_manifest(path)
    if not manifest.entries:
        raise ConfigError(f"the manifest {path} names no prefix")
    for entry in manifest.entries:
        if not allow_other_model and entry.model_digest not in ("", card.digest):
            raise ConfigError(
                f"{path}: {entry.file} is of the model {entry.model} ({entry.model_digest[:12]}), "
                f"the model here is {card.name} ({card.digest[:12]}); --allow-other-model compares "
                "them nevertheless, by their token ids"
            )
        if entry.token_ids.max() >= card.config.vocab_size:
            raise ConfigError(
                f"{path}: {entry.file} has the id {entry.token_ids.max()}, the vocabulary of "
                f"{card.name} ends at {card.config.vocab_size - 1}"
            )
    return manifest


def group_prefixes(entries: list[ManifestEntry]) -> list[PrefixGroup]:
    """Every prefix is in exactly one group."""
    named = Counter(entry.token_ids.astype(">i4").tobytes() for entry in entries)
    groups: list[PrefixGroup] = []
    following = b""
    for prefix in sorted(named, reverse=True):
        if not following.startswith(prefix):
            groups.append(PrefixGroup(np.frombuffer(prefix, ">i4").astype(np.int32), {}))
        groups[-1].num_times[len(prefix) // 4 - 1] = named[prefix]
        following = prefix
    return groups
