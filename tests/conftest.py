"""What several test files need: the default model, its reference, and running servers."""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from llm_serving.commands import prepare, pull
from llm_serving.model_card import ModelCard
from llm_serving.prepare.cache import cache_home, find_prepared
from llm_serving.prepare.catalog import CATALOG

DEFAULT_MODEL = "smollm2-135m-instruct"
CLIENTS = pathlib.Path(sys.prefix) / "clients"  # see the Makefile: installed apart


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The GGUF file of the default model, pulled if it is not in the cache yet."""
    path = cache_home() / CATALOG[DEFAULT_MODEL].file
    if not path.exists():
        assert pull.main([DEFAULT_MODEL]) == 0
    return path


@pytest.fixture(scope="session")
def smollm2_card(smollm2: pathlib.Path) -> ModelCard:
    """The default model, prepared in float32."""
    if find_prepared(DEFAULT_MODEL, "float32") is None:
        assert prepare.main([DEFAULT_MODEL, "--dtype", "float32", "--kernels", "reference"]) == 0
    card = find_prepared(DEFAULT_MODEL, "float32")
    assert card is not None
    return card


@pytest.fixture(scope="session")
def smollm2_tokenizer_path(smollm2_card: ModelCard) -> pathlib.Path:
    return pathlib.Path(smollm2_card.tokenizer)


@pytest.fixture(scope="session")
def text_generation() -> Iterator[Any]:
    """The `text-generation` client, which wants an older huggingface-hub than transformers."""
    sys.path.append(str(CLIENTS))
    try:
        yield importlib.import_module("text_generation")
    finally:
        sys.path.remove(str(CLIENTS))
