from __future__ import annotations

import errno
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llm_serving.errors import ConfigError
from llm_serving.precision.logits_dump import LogitsDump
from llm_serving.precision.manifest import read_manifest
from llm_serving.precision.naming import prefix_digest

LABELS = {
    "model": "m",
    "model_digest": "d",
    "dtype": "bfloat16",
    "weights": "Q4_1",
    "kernels": "reference",
    "source": "server",
}
IDS = np.arange(101, dtype=np.int32)

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Open = Callable[..., LogitsDump]


def logits(value: float = 1.5) -> Logits:
    return np.full(50, value, np.float32)


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Open]:
    dumps = []

    def begin(folder: pathlib.Path | None = None, **settings: int) -> LogitsDump:
        dumps.append(LogitsDump(folder or tmp_path / "out", every=100, labels=LABELS, **settings))
        return dumps[-1]

    yield begin
    for dump in dumps:
        dump.close()


class SlowDisk:
    """Every file waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        save = np.save

        def slowly(*args: Any, **settings: Any) -> None:
            self.reached.release()
            self.gate.acquire()
            save(*args, **settings)

        monkeypatch.setattr(np, "save", slowly)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.npy"), key=lambda path: float(path.name.partition("_")[0]))


def test_what_was_taken_lies_in_a_file_with_its_line(tmp_path: pathlib.Path, start: Open) -> None:
    dump = start()
    dump.take(IDS, 100, logits())
    dump.close()
    (path,) = files(tmp_path / "out")
    saved = np.load(path)
    assert (saved.dtype, saved.shape) == (np.float32, (50,))
    assert (saved == 1.5).all()
    (entry,) = read_manifest(tmp_path / "out").entries
    assert path.name == f"{entry.time:.7f}_{entry.key}_100.npy" == entry.file
    assert (entry.key, entry.position) == ("0.01.02.03.04.05.06.", 100)
    assert entry.token_ids.tolist() == IDS.tolist()
    assert entry.digest == prefix_digest(IDS)
    assert {name: getattr(entry, name) for name in LABELS} == LABELS
    assert (dump.num_written, dump.num_failed, dump.last_error) == (1, 0, None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [path.name, "manifest.jsonl"]


def test_equal_prefixes_never_share_a_name_even_if_the_clock_stands(
    tmp_path: pathlib.Path, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1722435014.25)
    for _ in range(2):  # the second goes on behind the first one's times
        dump = start()
        for i in range(20):
            dump.take(IDS, 100, logits(i))
        dump.close()
    made = files(tmp_path / "out")
    assert len(made) == 40
    assert [np.load(path)[0] for path in made] == [*range(20)] * 2
    entries = read_manifest(tmp_path / "out").entries
    assert [entry.file for entry in entries] == [path.name for path in made]
    assert sorted({entry.time for entry in entries}) == [entry.time for entry in entries]


@pytest.mark.parametrize("time_s", ["1e300", "inf", "nan"])
def test_a_name_of_the_far_future_does_not_stop_the_clock(
    tmp_path: pathlib.Path, start: Open, time_s: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{time_s}_1_1.npy").touch()
    dump = start()
    for _ in range(3):
        dump.take(IDS, 100, logits())
    dump.close()
    assert dump.num_written == 3
    assert len(files(tmp_path / "out")) == 4


def test_a_file_has_its_name_only_when_it_is_whole(
    tmp_path: pathlib.Path, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    dump = start()
    dump.take(IDS, 100, logits())
    disk.reached.acquire()
    assert files(tmp_path / "out") == []
    assert read_manifest(tmp_path / "out").entries == []
    disk.gate.release()
    dump.close()
    assert len(files(tmp_path / "out")) == 1


def test_there_is_no_room_while_too_many_bytes_wait(
    start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    one = logits().nbytes + IDS.nbytes
    dump = start(max_pending_bytes=2 * one)
    told = threading.Semaphore(0)
    seen: list[bool] = []

    def on_room() -> None:
        seen.append(dump.has_room())
        told.release()

    dump.on_room(on_room)
    for has_room in (True, True, False, False):
        dump.take(IDS, 100, logits())
        assert dump.has_room() == has_room
    disk.gate.release()
    disk.reached.acquire()
    disk.reached.acquire()  # the second is being written, so the first is off the list
    assert not dump.has_room()
    assert seen == []
    disk.gate.release()
    told.acquire()
    assert dump.has_room()
    disk.gate.release(2)
    dump.close()
    assert seen == [True]  # once, not for every file
    assert dump.num_written == 4


def test_whoever_waits_in_a_closed_event_loop_does_not_stop_the_writing(start: Open) -> None:
    dump = start(max_pending_bytes=1)

    def on_room() -> None:
        raise RuntimeError("Event loop is closed")

    dump.on_room(on_room)
    for _ in range(3):
        dump.take(IDS, 100, logits())
    dump.close()
    assert dump.num_written == 3


def test_what_cannot_be_written_is_counted_and_said_once(
    tmp_path: pathlib.Path,
    start: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        dump = start()
        for _ in range(3):
            dump.take(IDS, 100, logits())
        dump.close()
    assert (dump.num_written, dump.num_failed) == (0, 3)
    assert dump.last_error is not None
    assert dump.last_error.endswith("_100.npy: No space left on device")
    assert files(tmp_path / "out") == []
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.jsonl"]
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(texts) == 2
    assert "logits cannot be written into" in texts[0]
    assert texts[1] == "3 of 3 files with logits are missing"


def test_it_goes_on_when_the_disk_has_room_again(
    tmp_path: pathlib.Path, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, failing = np.save, iter([True, False])

    def sometimes(*args: Any, **settings: Any) -> None:
        if next(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **settings)

    monkeypatch.setattr(np, "save", sometimes)
    dump = start()
    dump.take(IDS, 100, logits())
    dump.take(IDS, 100, logits())
    dump.close()
    assert (dump.num_written, dump.num_failed) == (1, 1)
    assert len(files(tmp_path / "out")) == 1


def test_a_file_without_its_line_is_not_left(
    tmp_path: pathlib.Path, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("llm_serving.precision.logits_dump.ManifestWriter.append", full)
    dump = start()
    dump.take(IDS, 100, logits())
    dump.close()
    assert (dump.num_written, dump.num_failed) == (0, 1)
    assert files(tmp_path / "out") == []


def test_what_comes_after_the_close_is_counted_as_lost(start: Open) -> None:
    dump = start()
    dump.close()
    dump.take(IDS, 100, logits())
    dump.close()
    assert (dump.num_written, dump.num_failed, dump.last_error) == (0, 1, "the dump is closed")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: pathlib.Path, start: Open) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written into .*file: File exists"):
        start(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot be written into .*/file/x: Not a directory"):
        start(tmp_path / "file" / "x")


def test_a_label_that_no_manifest_has_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        LogitsDump(tmp_path, every=1, labels={"colour": "red"})
