from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.baseline.prefixes import group_prefixes, read_prefixes
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard
from llm_serving.precision.manifest import ManifestEntry
from llm_serving.precision.manifest_writer import ManifestWriter
from llm_serving.precision.naming import prefix_digest
from tests.tiny_gguf import CONFIG
from tests.tiny_models import make_card

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12)


def entry(ids: Sequence[int], **labels: str) -> ManifestEntry:
    array = np.array(ids, np.int32)
    name, digest = f"{len(ids)}.npy", prefix_digest(array)
    return ManifestEntry(name, "", len(ids) - 1, array, digest, 0.0, **labels)


@settings(derandomize=True, deadline=None)
@given(TEXTS)
def test_every_prefix_is_computed_as_often_as_it_is_named(texts: list[list[int]]) -> None:
    groups = group_prefixes([entry(ids) for ids in texts])
    made: Counter[tuple[int, ...]] = Counter()
    for group in groups:
        for position, num_times in group.num_times.items():
            made[tuple(group.token_ids[: position + 1].tolist())] += num_times
    assert made == Counter(map(tuple, texts))


@settings(derandomize=True, deadline=None)
@given(TEXTS)
def test_no_text_is_read_that_begins_another(texts: list[list[int]]) -> None:
    read = [group.token_ids.tolist() for group in group_prefixes([entry(ids) for ids in texts])]
    for i, one in enumerate(read):
        assert not any(other[: len(one)] == one for j, other in enumerate(read) if i != j)


def test_ids_are_kept_apart_however_their_bytes_look() -> None:
    """256 is 00 01 in little-endian bytes, and 1 begins nothing of it."""
    assert len(group_prefixes([entry([1]), entry([256]), entry([1, 256])])) == 2


@pytest.fixture
def card(tmp_path: pathlib.Path) -> ModelCard:
    return msgspec.structs.replace(make_card(tmp_path, CONFIG), digest="a" * 64, name="tiny")


def write(folder: pathlib.Path, *entries: ManifestEntry) -> pathlib.Path:
    writer = ManifestWriter(folder)
    for each in entries:
        writer.append(each)
    writer.close()
    return folder


def test_a_manifest_of_this_model_is_read(tmp_path: pathlib.Path, card: ModelCard) -> None:
    write(tmp_path, entry([1, 2], model_digest="a" * 64), entry([1]))
    assert len(read_prefixes(tmp_path, card).entries) == 2
    assert len(read_prefixes(tmp_path / "manifest.jsonl", card).entries) == 2


def test_a_manifest_of_another_model_is_refused_by_both_names(
    tmp_path: pathlib.Path, card: ModelCard
) -> None:
    write(tmp_path, entry([1, 2], model="other", model_digest="b" * 64))
    said = r"2\.npy is of the model other \(b{12}\), the model here is tiny \(a{12}\)"
    with pytest.raises(ConfigError, match=said):
        read_prefixes(tmp_path, card)
    assert len(read_prefixes(tmp_path, card, allow_other_model=True).entries) == 1


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: pathlib.Path, card: ModelCard) -> None:
    write(tmp_path, entry([299]), entry([1, 300]))
    with pytest.raises(ConfigError, match=r"2\.npy has the id 300, the vocabulary of tiny ends at"):
        read_prefixes(tmp_path, card)


def test_a_manifest_that_names_nothing_is_refused(tmp_path: pathlib.Path, card: ModelCard) -> None:
    (tmp_path / "manifest.jsonl").write_text("{half a line")
    with pytest.raises(ConfigError, match="names no prefix"):
        read_prefixes(tmp_path, card)
