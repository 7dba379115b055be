from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import pytest

from llm_serving.errors import ConfigError
from llm_serving.precision.manifest import MANIFEST_NAME, ManifestEntry, read_manifest
from llm_serving.precision.manifest_writer import ManifestWriter
from llm_serving.precision.naming import prefix_digest


def entry(position: int) -> ManifestEntry:
    ids = np.arange(position + 1, dtype=np.int32)
    digest = prefix_digest(ids)
    return ManifestEntry(f"{position}.npy", "key", position, ids, digest, 1.5, model="m")


def write(folder: pathlib.Path, *positions: int) -> None:
    writer = ManifestWriter(folder)
    for position in positions:
        writer.append(entry(position))
    writer.close()


def test_what_was_appended_is_read_back(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 3, 5)
    manifest = read_manifest(tmp_path)
    assert manifest.broken_lines == []
    assert [e.token_ids.tolist() for e in manifest.entries] == [[*range(4)], [*range(6)]]
    assert {e.token_ids.dtype for e in manifest.entries} == {np.dtype(np.int32)}
    assert (manifest.entries[1].file, manifest.entries[1].model) == ("5.npy", "m")
    assert manifest.entries[0].dtype == ""


def test_every_line_is_an_object_with_all_fields(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 1)
    (line,) = (tmp_path / MANIFEST_NAME).read_text().splitlines()
    assert json.loads(line) == {
        "file": "1.npy",
        "key": "key",
        "position": 1,
        "token_ids": [0, 1],
        "digest": prefix_digest(np.arange(2, dtype=np.int32)),
        "time": 1.5,
        "model": "m",
        "model_digest": "",
        "dtype": "",
        "weights": "",
        "kernels": "",
        "source": "",
    }


def test_a_manifest_that_is_there_is_appended_to(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert [e.position for e in read_manifest(tmp_path).entries] == [1, 2]


def test_a_half_line_spoils_nothing_that_is_appended_to_it(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path, 3)
    manifest = read_manifest(path)
    assert [e.position for e in manifest.entries] == [1, 3]
    assert manifest.broken_lines == [2]


def test_a_line_that_the_disk_cut_spoils_nothing_behind_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ManifestWriter(tmp_path)
    module = "llm_serving.precision.manifest_writer.os.write"
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(module, lambda file, data: write(file, data[:30]))
        with pytest.raises(OSError, match="only 30 of"):
            writer.append(entry(1))
    writer.append(entry(2))
    writer.close()
    manifest = read_manifest(tmp_path)
    assert ([e.position for e in manifest.entries], manifest.broken_lines) == ([2], [1])


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '"x"',
        "[" * 5000,
        '{"file": "x"}',
        '{"position": 0, "token_ids": [1]}',
        '{"file": 5, "position": 0, "token_ids": [1]}',
        '{"file": "x", "position": 1, "token_ids": [1]}',
        '{"file": "x", "position": -1, "token_ids": []}',
        '{"file": "x", "position": 0, "token_ids": [1.5]}',
        '{"file": "x", "position": 0, "token_ids": [true]}',
        '{"file": "x", "position": 0, "token_ids": [-1]}',
        '{"file": "x", "position": 0, "token_ids": 5}',
        '{"file": "x", "position": 0, "token_ids": [99999999999]}',
        '{"file": "x", "position": 0, "token_ids": [1], "time": "now"}',
        '{"file": "x", "position": 0, "token_ids": [1], "time": NaN}',
        '{"file": "x", "position": 0, "token_ids": [1], "digest": "00"}',
    ],
)
def test_a_line_that_makes_no_sense_is_counted(tmp_path: pathlib.Path, line: str) -> None:
    write(tmp_path, 1)
    with (tmp_path / MANIFEST_NAME).open("a") as file:
        file.write(f"\n{line}\n")
    manifest = read_manifest(tmp_path)
    assert (len(manifest.entries), manifest.broken_lines) == (1, [3])


def test_a_line_needs_a_file_its_ids_and_the_position(tmp_path: pathlib.Path) -> None:
    """Of another tool's manifest."""
    text = '{"file": "x.npy", "position": 1, "token_ids": [7, 8], "colour": "red"}\n'
    (tmp_path / MANIFEST_NAME).write_text(text)
    (read,) = read_manifest(tmp_path).entries
    assert (read.file, read.key, read.time, read.dtype) == ("x.npy", "7.08.0", 0.0, "")
    assert read.digest == prefix_digest(np.array([7, 8], np.int32))


def test_a_manifest_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the manifest .*x\.jsonl: No such file"):
        read_manifest(tmp_path / "x.jsonl")
