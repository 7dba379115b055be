"""What has been prepared before, and is it still true?

    <cache>/prepared/<key>/          one prepared model; appears whole, by a rename
        card.json                    the ModelCard
        files.json                   name -> [bytes, mtime in ns] of what lies beside it
        tokenizer.json, model.safetensors (of a GGUF only)
    <cache>/prepared/<key>.partial/  one in the making; worthless unless its lock is held
    <cache>/prepared/<key>.lock

The key is drawn over CARD_VERSION, the dtype asked for, and path, size and mtime of every source
file: a source that changed is another key.  No torch, gguf or transformers is imported here, and
`find_prepared` costs a few dozen system calls: the front end calls it at every start.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable

import msgspec

from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.layout import LAYOUT_VERSION
from llm_serving.model_card import CARD_VERSION, ModelCard
from llm_serving.prepare.locking import exclusive, is_held
from llm_serving.prepare.sources import Source, cache_home, find_source

__all__ = ["cache_home", "find_prepared", "load", "prepared_key", "store"]

Build = Callable[[pathlib.Path, pathlib.Path], ModelCard]


def find_prepared(model: str, dtype: str, weights: str | None = None) -> ModelCard | None:
    """The card of `model`, if it was prepared and nothing has changed since; else None.

    `weights`: see `prepare`.
    """
    source = find_source(model)
    return None if source is None else load(prepared_key(source, dtype, weights))


def prepared_key(source: Source, dtype: str, weights: str | None = None) -> str:
    layout = None if weights is None else LAYOUT_VERSION
    parts = (CARD_VERSION, layout, weights, dtype, str(source.path), source.files())
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def load(key: str) -> ModelCard | None:
    """The card at `key`, or None if there is none, or anything beside it is not as it was left."""
    folder = _prepared() / key
    try:
        card = msgspec.json.decode((folder / "card.json").read_bytes(), type=ModelCard)
        left = msgspec.json.decode((folder / "files.json").read_bytes(), type=dict[str, list[int]])
        intact = all(_stamp(folder / name) == stamp for name, stamp in left.items())
    except (OSError, msgspec.DecodeError):
        return None
    return card if intact and card.version == CARD_VERSION else None


def store(key: str, build: Build, waiting: Callable[[], None]) -> ModelCard:
    """The card at `key`, made by `build(partial folder, final folder)` if it is not there.

    Safe at any moment: two at a time wait for each other, an interrupted one leaves nothing that
    is ever read, and its remains are swept by the next.  `build` writes into the partial folder
    and names the final one in its card.
    """
    prepared = _prepared()
    final, partial = prepared / key, prepared / f"{key}.partial"
    try:
        with exclusive(prepared / f"{key}.lock", waiting):
            card = load(key)
            if card is None:
                _sweep(prepared)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    card = build(partial, final)
                    _seal(partial, card)
                    shutil.rmtree(final, ignore_errors=True)
                    partial.rename(final)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            return card
    except OSError as exc:
        raise ConfigError(f"cannot prepare the model in {prepared}: {exc}") from exc


def _prepared() -> pathlib.Path:
    return cache_home() / "prepared"


def _stamp(path: pathlib.Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _seal(partial: pathlib.Path, card: ModelCard) -> None:
    """Write down what was made, and see it on the disk before the rename makes it visible."""
    left = {path.name: _stamp(path) for path in partial.iterdir()}
    (partial / "files.json").write_bytes(msgspec.json.encode(left))
    (partial / "card.json").write_bytes(msgspec.json.encode(card))
    for path in [*partial.iterdir(), partial]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(prepared: pathlib.Path) -> None:
    """Remove what interrupted preparations left, but for those that are still running."""
    for partial in prepared.glob("*.partial"):
        if not is_held(partial.with_suffix(".lock")):
            shutil.rmtree(partial, ignore_errors=True)
