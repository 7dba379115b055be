from __future__ import annotations

import errno
import pathlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_serving.baseline.dataset import Prompt
from llm_serving.baseline.prefixes import PrefixGroup
from llm_serving.baseline.reference import Reference
from llm_serving.baseline.writing import PatientDump, run_freely, run_prefixes
from llm_serving.errors import ConfigError
from llm_serving.precision.logits_dump import LogitsDump
from llm_serving.precision.manifest import read_manifest
from tests.tiny_models import VOCAB_SIZE, Twin, build_twin

torch.set_num_threads(1)
Shown = list[tuple[float, float]]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return build_twin(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def shown() -> Shown:
    return []


@pytest.fixture
def dump(tmp_path: pathlib.Path) -> Iterator[LogitsDump]:
    made = LogitsDump(tmp_path, every=4, labels={}, max_pending_bytes=1)
    yield made
    made.close()


def random_ids(length: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(length).integers(0, VOCAB_SIZE, length).astype(np.int32)


def check(twin: Twin, folder: pathlib.Path, expected: list[list[int]]) -> None:
    """Exactly these texts are in the manifest, and beside it the logits behind them."""
    entries = read_manifest(folder).entries
    assert [entry.token_ids.tolist() for entry in entries] == expected
    for entry in entries:
        logits = np.load(folder / entry.file)
        theirs = twin.logits(entry.token_ids.tolist())[-1].numpy()
        np.testing.assert_allclose(logits, theirs, atol=1e-4)


def test_free_running_writes_where_a_token_is_taken_at_multiples_of_every(
    twin: Twin, tmp_path: pathlib.Path, dump: LogitsDump, shown: Shown
) -> None:
    """Prompts of 9 and 11 tokens: position 8 is the last of the first prompt, 4 is inside both."""
    prompts = [Prompt(random_ids(9), 5, 1), Prompt(random_ids(11), 7, 2)]
    run_freely(
        Reference(twin.reference),
        prompts,
        [],
        PatientDump(dump),
        lambda done, total: shown.append((done, total)),
    )
    dump.close()
    texts = [[*ids, *twin.generate(ids, 7)] for ids in (p.token_ids.tolist() for p in prompts)]
    expected = [texts[0][:9], texts[0][:13], *[texts[1][:13]] * 2, *[texts[1][:17]] * 2]
    check(twin, tmp_path, expected)
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1]


def test_an_answer_that_ends_early_is_counted_as_done(
    twin: Twin, dump: LogitsDump, shown: Shown
) -> None:
    prompt = random_ids(9)
    (eos,) = twin.generate(prompt.tolist(), 1)
    run_freely(
        Reference(twin.reference),
        [Prompt(prompt, 50, 1)],
        [eos],
        PatientDump(dump),
        lambda done, total: shown.append((done, total)),
    )
    assert len(shown) == 2
    assert shown[-1][0] == shown[-1][1]


def test_teacher_forcing_writes_exactly_the_prefixes_as_often_as_they_are_named(
    twin: Twin, tmp_path: pathlib.Path, dump: LogitsDump, shown: Shown
) -> None:
    ids = random_ids(20)
    groups = [PrefixGroup(ids, {19: 1, 5: 2}), PrefixGroup(ids[:3], {2: 1})]
    run_prefixes(
        Reference(twin.reference),
        groups,
        PatientDump(dump),
        lambda done, total: shown.append((done, total)),
    )
    dump.close()
    texts = [ids[: n + 1].tolist() for n in (5, 5, 19, 2)]
    check(twin, tmp_path, texts)
    assert shown == [(6, 23), (20, 23), (23, 23)]


def test_a_baseline_that_cannot_be_written_ends_at_once(
    twin: Twin, dump: LogitsDump, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    groups = [PrefixGroup(random_ids(20), dict.fromkeys(range(20), 1))]
    with pytest.raises(ConfigError, match=r"cannot be written: .*No space left on device"):
        run_prefixes(Reference(twin.reference), groups, PatientDump(dump), lambda *_: None)
    assert dump.num_failed < 5
