"""From the name of a model to its card: the one way through this room.

name -> Source (sources, download, hub) -> what it is (hf_folder | gguf_*) -> card (cache)
"""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from collections.abc import Callable

from llm_serving.errors import ConfigError
from llm_serving.model_card import CARD_VERSION, Dtype, ModelCard, ModelConfig
from llm_serving.prepare.cache import load, prepared_key, store
from llm_serving.prepare.catalog import CATALOG
from llm_serving.prepare.download import pull
from llm_serving.prepare.dtypes import DTYPES, cpu_has_bfloat16
from llm_serving.prepare.gguf_file import GgufFile
from llm_serving.prepare.gguf_model import main_type, read_gguf_model
from llm_serving.prepare.gguf_rows import GgufRows
from llm_serving.prepare.gguf_tokenizer import bos_and_eos_ids, build_gguf_tokenizer
from llm_serving.prepare.gguf_weights import PLAIN, convert_weights
from llm_serving.prepare.hf_folder import read_hf_folder
from llm_serving.prepare.hf_rows import HfRows
from llm_serving.prepare.hf_tokenizer import build_hf_tokenizer, read_chat_template
from llm_serving.prepare.hub import download_snapshot
from llm_serving.prepare.packing import PACKED, pack_model
from llm_serving.prepare.packing_choice import (
    Packing,
    choose_packing,
    misfit_error,
    why_misfit,
)
from llm_serving.prepare.progress import Progress
from llm_serving.prepare.sources import Source, find_source, is_hub_id

__all__ = ["prepare"]

Choose = Callable[[str, ModelConfig], Packing | None]  # what the file's numbers are, and the model


def prepare(
    model: str,
    dtype: str,
    progress: Progress,
    weights: str | None = None,
    *,
    needs_native: bool = False,
) -> ModelCard:
    """The card of `model`, converted into the cache if it is not there yet.

    `weights`: how the native kernels shall find them (auto, float32, bfloat16, int8 or native), if
    the model is one that they can run; None: it is for the reference kernels.  `needs_native`: one
    that they cannot run is refused.

    Raises ConfigError, in one sentence, for whatever keeps the model from being served.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; known: auto, {', '.join(DTYPES)}")
    source = _fetch(model, progress)
    key = prepared_key(source, dtype, weights)
    card = load(key)
    if card is not None:
        if needs_native and card.packed is None:
            raise misfit_error(why_misfit(card.config, weights or "auto"), weights or "auto")
        progress.say(f"{source.name} is prepared already")
        return card

    def choose(kind: str, config: ModelConfig) -> Packing | None:
        return choose_packing(weights, dtype, needs_native, kind, config, progress)

    def build(partial: pathlib.Path, final: pathlib.Path) -> ModelCard:
        make = _prepare_gguf if source.is_gguf else _prepare_folder
        made = make(source, dtype, choose, partial, final, progress)
        if prepared_key(source, dtype, weights) != key:
            raise ConfigError(f"{source.path} changed while it was read; try again")
        return made

    return store(key, build, lambda: progress.phase("wait for another process preparing this"))


def _fetch(model: str, progress: Progress) -> Source:
    if model in CATALOG:
        pull(CATALOG[model], progress)
    elif is_hub_id(model) and not pathlib.Path(model).exists():
        progress.phase(f"download {model} from the Hugging Face hub")
        download_snapshot(model)
    source = find_source(model)
    if source is None:
        raise ConfigError(
            f"no model {model!r}: it is neither a folder or .gguf file on this machine, nor a "
            f"hub id (organisation/name), nor one of {', '.join(CATALOG)}"
        )
    return source


def _prepare_gguf(
    source: Source,
    dtype: str,
    choose: Choose,
    partial: pathlib.Path,
    final: pathlib.Path,
    progress: Progress,
) -> ModelCard:
    progress.phase("read the file")
    file = GgufFile(source.path)
    architecture, config = read_gguf_model(file)
    kind = main_type(file)
    target = _gguf_dtype(dtype, kind)
    _check_room(
        partial,
        sum(t.num_elements for t in file.tensors.values()) * 4 // (1 if target == "float32" else 2),
    )
    bos, eos = bos_and_eos_ids(file)
    progress.phase("build the tokenizer")
    tokenizer = build_gguf_tokenizer(file)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ConfigError(
            f"{source.path}: {tokenizer.get_vocab_size()} tokens, but token_embd.weight has "
            f"{config.vocab_size} rows"
        )
    tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
    packing = choose(kind, config)
    if packing is not None:
        target = packing.dtype
        progress.phase(f"pack the weights, {kind}, as {packing.weights}")
        rows = GgufRows(file, architecture, config)
        pack_model(rows, config, packing.weights, partial / PACKED, progress)
    else:
        progress.phase(f"convert the weights from {kind} to {target}")
        convert_weights(file, architecture, config, target, partial / "model.safetensors", progress)
    template = file.metadata.get("tokenizer.chat_template")
    progress.phase("fingerprint the file")
    with source.path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return ModelCard(
        version=CARD_VERSION,
        name=source.name,
        source=str(source.path),
        architecture=architecture,
        config=config,
        dtype=target,
        weights=[] if packing else [str(final / "model.safetensors")],
        packed=str(final / PACKED) if packing else None,
        packed_as=packing.weights if packing else None,
        weights_kind=kind,
        tokenizer=str(final / "tokenizer.json"),
        digest=digest,
        bos_token_id=bos,
        eos_token_ids=eos,
        chat_template=template if isinstance(template, str) else None,
    )


def _gguf_dtype(dtype: str, kind: str) -> Dtype:
    """auto: what the file has; quantised, bfloat16 where the processor computes in it."""
    for known in DTYPES:
        if dtype == known:
            return known
    for quant, plain in PLAIN.items():
        if kind == quant.name:
            return plain
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def _check_room(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"not enough room in {folder.parent}: the converted weights take {needed >> 20} MiB, "
            f"{free >> 20} MiB are free (XDG_CACHE_HOME moves the cache)"
        )


def _prepare_folder(
    source: Source,
    dtype: str,
    choose: Choose,
    partial: pathlib.Path,
    final: pathlib.Path,
    progress: Progress,
) -> ModelCard:
    progress.phase("check the checkpoint")
    found = read_hf_folder(source.path)
    if found.unknown_fields:
        progress.say(
            f"{source.path}/config.json: nothing is known of {', '.join(found.unknown_fields)}; "
            "the model is served as if they were not there"
        )
    progress.phase("build the tokenizer")
    build_hf_tokenizer(source.path).save(str(partial / "tokenizer.json"), pretty=False)
    tokenizer_digest = hashlib.sha256((partial / "tokenizer.json").read_bytes()).hexdigest()
    automatic = found.stated_dtype or found.weights_dtype
    packing = choose(found.weights_dtype, found.config)
    if packing is not None:
        progress.phase(f"pack the weights, {found.weights_dtype}, as {packing.weights}")
        pack_model(HfRows(found.weights), found.config, packing.weights, partial / PACKED, progress)
        automatic = packing.dtype
    return ModelCard(
        version=CARD_VERSION,
        name=source.name,
        source=str(source.path),
        architecture=found.architecture,
        config=found.config,
        dtype=next((known for known in DTYPES if known == dtype), automatic),
        weights=[] if packing else [str(path) for path in found.weights],
        packed=str(final / PACKED) if packing else None,
        packed_as=packing.weights if packing else None,
        weights_kind=found.weights_dtype,
        tokenizer=str(final / "tokenizer.json"),
        digest=hashlib.sha256((found.digest + tokenizer_digest).encode()).hexdigest(),
        bos_token_id=found.bos_token_id,
        eos_token_ids=found.eos_token_ids,
        chat_template=read_chat_template(source.path),
    )
