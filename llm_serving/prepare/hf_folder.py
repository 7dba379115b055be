"""Is this Hugging Face folder a model we can serve, and what is it?

The weights stay where they are.  Their headers are read and compared with what config.json
promises, so that a missing shard, a truncated file or a foreign tensor is named here and not in
the middle of loading.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections import Counter
from typing import Any

import msgspec

from llm_serving.errors import ConfigError
from llm_serving.model_card import Dtype, ModelConfig
from llm_serving.prepare.dtypes import CONTAINER_NAMES
from llm_serving.prepare.hf_config import read_architecture, read_model_config
from llm_serving.prepare.hf_fields import unknown_fields
from llm_serving.prepare.json_file import Fields, read_object
from llm_serving.prepare.safetensors_file import Header, read_header
from llm_serving.prepare.tensors import check_tensors
from llm_serving.prepare.tied_head import check_tied_head

__all__ = ["HfFolder", "read_hf_folder"]

_DTYPES: dict[str, Dtype] = {container: dtype for dtype, container in CONTAINER_NAMES.items()}
_SAMPLES, _SAMPLE_SIZE = 256, 4096  # of a shard's bytes that are looked at for the digest


class HfFolder(msgspec.Struct, frozen=True):
    architecture: str
    config: ModelConfig
    weights: list[pathlib.Path]  # the shards, absolute, in the order of their names
    weights_dtype: Dtype  # what most of the numbers are stored as
    stated_dtype: Dtype | None  # by config.json
    bos_token_id: int | None
    eos_token_ids: list[int]
    unknown_fields: list[str]  # of config.json: nothing is known of what they mean
    digest: str  # of headers, sizes and 1 MiB of evenly spaced samples of every shard


def read_hf_folder(folder: pathlib.Path) -> HfFolder:
    """Raises ConfigError, naming file and field or tensor, for what can not be served."""
    values = read_object(folder / "config.json")
    if values is None:
        raise ConfigError(f"{folder} has no config.json")
    fields = Fields(values, f"{folder}/config.json")
    architecture = read_architecture(fields)
    config = read_model_config(fields, architecture)
    shards = _shards(folder)
    headers = {path: read_header(path) for path in shards}
    _check(folder, headers, config, architecture)
    bos, eos = _ids(folder, fields)
    digest = hashlib.sha256()
    for path, header in headers.items():
        _sample(path, header, digest)
    return HfFolder(
        architecture=architecture,
        config=config,
        weights=shards,
        weights_dtype=_main_dtype(headers),
        stated_dtype=_stated_dtype(fields),
        bos_token_id=bos,
        eos_token_ids=eos,
        unknown_fields=unknown_fields(fields),
        digest=digest.hexdigest(),
    )


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    index = read_object(folder / "model.safetensors.index.json")
    single = folder / "model.safetensors"
    if index is None:
        if single.is_file():
            return [single]
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        why = f": {pickled.name} is a pickle, which is never loaded" if pickled else ""
        raise ConfigError(f"{folder} has no model.safetensors and no index of shards{why}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder}/model.safetensors.index.json has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if pathlib.PurePath(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{folder} lacks the shard {name} that its index names")
    return [folder / name for name in names]


def _check(
    folder: pathlib.Path,
    headers: dict[pathlib.Path, Header],
    config: ModelConfig,
    architecture: str,
) -> None:
    found: dict[str, list[int]] = {}
    for path, header in headers.items():
        for name, info in header.tensors.items():
            if name in found:
                raise ConfigError(f"{path}: tensor {name} is in another shard, too")
            if info.dtype not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise ConfigError(f"{path}: tensor {name} is {info.dtype}, supported are {known}")
            found[name] = info.shape
    check_tensors(found, config, str(folder), architecture)
    if config.tie_word_embeddings:
        check_tied_head(headers)


def _main_dtype(headers: dict[pathlib.Path, Header]) -> Dtype:
    sizes: Counter[str] = Counter()
    for header in headers.values():
        for info in header.tensors.values():
            sizes[info.dtype] += info.data_offsets[1] - info.data_offsets[0]
    return _DTYPES[sizes.most_common(1)[0][0]]


def _stated_dtype(config: Fields) -> Dtype | None:
    """`torch_dtype` of transformers 4, `dtype` of 5."""
    name = "dtype" if config.values.get("dtype") is not None else "torch_dtype"
    value = config.values.get(name)
    if value is None:
        return None
    for dtype in CONTAINER_NAMES:
        if value == dtype:
            return dtype
    raise config.unsupported(name, ", ".join(CONTAINER_NAMES))


def _ids(folder: pathlib.Path, config: Fields) -> tuple[int | None, list[int]]:
    """(BOS, every EOS); generation_config.json wins over config.json, of its kind alone."""
    path = folder / "generation_config.json"
    generation = Fields(read_object(path) or {}, str(path))
    ids = [
        generation.ids(f"{end}_token_id") or config.ids(f"{end}_token_id") for end in ("bos", "eos")
    ]
    bos, eos = (each or [] for each in ids)
    return (bos[0] if bos else None), eos


def _sample(path: pathlib.Path, header: Header, digest: Any) -> None:
    """Feed name-independent facts about the shard's content to `digest`.

    Reading all of a large model would take longer than loading it; two models that differ in
    training differ nearly everywhere, and so in some of the samples.
    """
    digest.update(header.raw)
    digest.update(str(header.size).encode())
    body = header.size - header.data_start
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(header.data_start + index * body // _SAMPLES)
            digest.update(file.read(_SAMPLE_SIZE))
