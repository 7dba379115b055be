"""`llm-serving baseline` as a user runs it, and acc_allclose.py behind it."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

import acc_allclose
from llm_serving.cli import main
from llm_serving.commands import baseline as module
from llm_serving.commands.eta_bar import EtaBar
from llm_serving.precision.manifest import MANIFEST_NAME, read_manifest
from tests.tiny_models import Twin, build_twin
from tests.tiny_tokenizer import make_tiny_tokenizer, tiny_tokenizer_path

torch.set_num_threads(2)
ROWS = [
    {"instruction": "the cat sat", "input": "on the mat", "output": "and saw a bird, the end."},
    {"instruction": "count from 0 to 1", "output": "0, 1"},
    {"instruction": "the " * 30, "output": "x" * 200},
    {"instruction": "the " * 200, "output": "too long"},
]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """A folder as `save_pretrained` leaves it, whose answers have no EOS among them."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    twin = build_twin(folder, vocab_size=50, eos_token_id=2, bos_token_id=1)
    tiny_tokenizer_path(folder, add_bos=True)
    return twin


@pytest.fixture
def dataset(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def tiny(twin: Twin, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`llm-serving baseline` with the tiny model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *flags: main(["baseline", "--model", twin.card.source, *map(str, flags)])


def expected_prefixes(twin: Twin, every: int) -> list[list[int]]:
    """Of the first three rows; the third is clipped to the context of 128."""
    tokenizer = make_tiny_tokenizer(add_bos=True)
    found = []
    for prompt, output in (
        ("the cat sat:on the mat", ROWS[0]["output"]),
        (ROWS[1]["instruction"], ROWS[1]["output"]),
        (ROWS[2]["instruction"], ROWS[2]["output"]),
    ):
        ids = tokenizer.encode(prompt).ids
        num_new = min(len(tokenizer.encode(output, add_special_tokens=False).ids), 128 - len(ids))
        answer = twin.generate(ids, num_new)
        if 2 in answer:
            answer = answer[: answer.index(2) + 1]
        last = len(ids) + len(answer) - 2  # the last token of all has been seen by nobody
        text = ids + answer
        positions = range(len(ids) - 1, last + 1)
        found += [text[: at + 1] for at in positions if at % every == 0]
    return found


def test_a_data_set_is_answered_freely(
    twin: Twin,
    tiny: Callable[..., int],
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    assert tiny("--dataset", dataset, "--out", base, "--every", 5) == 0
    printed = capsys.readouterr()
    expected = expected_prefixes(twin, 5)
    assert len(expected) > 10
    assert printed.out.startswith(f"{len(expected)} files in {base} after ")
    assert f"--base_path {base} --new_path file_npy" in printed.out
    assert "4 requests, 3 different ones; 1 clipped to the context, 1 too long" in printed.err
    entries = read_manifest(base).entries
    assert [entry.token_ids.tolist() for entry in entries] == expected
    for entry in entries:
        theirs = twin.logits(entry.token_ids.tolist())[-1].numpy()
        np.testing.assert_allclose(np.load(base / entry.file), theirs, atol=1e-4)
    (labels,) = {(e.model, e.dtype, e.weights, e.kernels, e.source) for e in entries}
    name = pathlib.Path(twin.card.source).name
    assert labels == (name, "float32", "float32", "torch", "transformers")


def test_prefixes_of_a_manifest_are_computed_again(
    tiny: Callable[..., int],
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, again = tmp_path / "base", tmp_path / "again"
    flags = ("--max-requests", 5, "--max-new-tokens", 12)  # the first one twice
    assert tiny("--dataset", dataset, "--out", base, "--every", 1, *flags) == 0
    with (base / MANIFEST_NAME).open("a") as file:
        file.write('{"half a')
    assert tiny("--from", base, "--out", again) == 0
    assert f"{base}: 1 broken lines are left out: 49" in capsys.readouterr().err
    code = acc_allclose.main(["--base_path", str(base), "--new_path", str(again)])
    assert (code, capsys.readouterr().out.splitlines()[-1]) == (0, "48/48 passed")


def test_a_configuration_says_model_context_and_positions(
    twin: Twin, tiny: Callable[..., int], dataset: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(
        f"model: {{path: {twin.card.source}, max_model_len: 32}}\nprecision: {{every: 7}}\n"
    )
    flags = ["--dataset", str(dataset), "--out", str(tmp_path / "base")]
    assert main(["baseline", "--config", str(config), *flags]) == 0
    positions = [entry.position for entry in read_manifest(tmp_path / "base").entries]
    assert {position % 7 for position in positions} == {0}
    assert max(positions) <= 30


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "give either --dataset FILE or --from MANIFEST"),
        (("--dataset", "x.json", "--from", "y"), "give either --dataset FILE or --from MANIFEST"),
        (("--dataset", "nowhere.json"), "cannot read the data set nowhere.json: No such file"),
        (("--from", "nowhere"), "cannot read the manifest nowhere: No such file"),
        (("--dataset", "dataset.json", "--every", "5000"), "no answer reaches a position that is"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tiny: Callable[..., int],
    dataset: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: Sequence[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(dataset.parent)
    assert tiny(*flags) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("llm-serving baseline: ")
    assert sentence in last


def test_files_of_an_earlier_run_are_not_mixed_with_new_ones(
    tiny: Callable[..., int],
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "1.5_12_100.npy").touch()
    assert tiny("--dataset", dataset, "--out", tmp_path / "base") == 1
    assert "base holds 1 files of an earlier run; remove the folder" in capsys.readouterr().err


def test_half_a_baseline_is_called_so(
    tiny: Callable[..., int],
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_freely", interrupted)
    assert tiny("--dataset", dataset, "--out", tmp_path / "base") == 130
    told = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'base'} holds only a part of the baseline: remove it" in told


def test_time_that_is_left_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 3.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    bar = EtaBar()
    for done in (10, 20, 30, 40):
        bar.show(done, 80)
    assert capsys.readouterr().err == ("  25% done, about 18 s left\n  50% done, about 12 s left\n")
