"""Weights from safetensors files into a model's memory.

Files are mapped, not read: each tensor is converted and copied straight from the page cache to
where it belongs, so there is never a second copy of the model.  A checkpoint must hold exactly the
tensors that the model has, under Hugging Face's names; anything else is a ConfigError that names
the tensor or the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open

from llm_serving.errors import ConfigError
from llm_serving.model_card import DERIVED_TENSORS

__all__ = ["load_weights"]


def load_weights(
    files: Sequence[str], into: Mapping[str, torch.Tensor], *, tied: Mapping[str, str] | None = None
) -> None:
    """Fill every tensor of `into` from the files, in its own dtype.

    `tied`: names that share another's memory; if a file holds one, its values must be the same.
    """
    aliases = tied or {}
    came_from: dict[str, str] = {}
    for file in files:
        for name, tensor in _tensors(file):
            if name.endswith(DERIVED_TENSORS):
                continue
            if name in came_from:
                raise ConfigError(f"{file}: tensor {name} is also in {came_from[name]}")
            came_from[name] = file
            if name not in aliases:
                _fill(file, name, tensor, into)
    missing = sorted(set(into) - set(came_from))
    if missing:
        raise ConfigError(f"the checkpoint lacks {_listed(missing)}; its files: {_listed(files)}")
    for alias in aliases.keys() & came_from.keys():
        _check_alias(came_from[alias], alias, aliases[alias], into)


def _tensors(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a file, as views of the mapping."""
    try:
        with safe_open(file, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, shard.get_tensor(name)
    except SafetensorError as exc:
        raise ConfigError(f"{file} is no complete safetensors file: {exc}") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read weights {file}: {exc}") from exc


def _fill(file: str, name: str, tensor: torch.Tensor, into: Mapping[str, torch.Tensor]) -> None:
    target = into.get(name)
    if target is None:
        raise ConfigError(f"{file}: tensor {name} has no place in this model; check the config")
    if tensor.shape != target.shape:
        found, right = list(tensor.shape), list(target.shape)
        raise ConfigError(f"{file}: tensor {name} has shape {found}, the config says {right}")
    if not tensor.is_floating_point():
        raise ConfigError(f"{file}: tensor {name} holds {tensor.dtype}, not floating-point numbers")
    target.copy_(tensor)


def _check_alias(file: str, alias: str, name: str, into: Mapping[str, torch.Tensor]) -> None:
    copies = (tensor for found, tensor in _tensors(file) if found == alias)
    target = into[name]
    if any(
        copy.shape != target.shape or not torch.equal(copy.to(target), target) for copy in copies
    ):
        raise ConfigError(
            f"{file}: {alias} differs from {name}, though tie_word_embeddings makes them one"
        )


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
