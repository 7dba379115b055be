from __future__ import annotations

import os
import pathlib
import stat

import pytest

from llm_serving.errors import ConfigError
from llm_serving.transport.socket_folder import SocketFolder, runtime_folder, sweep_sockets


@pytest.fixture
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_folder_is_this_users_alone(home: pathlib.Path) -> None:
    folder = runtime_folder()
    assert folder == home / f"llm-serving-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert runtime_folder() == folder


def test_without_a_runtime_folder_of_the_system_it_is_a_temporary_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert runtime_folder().parent == tmp_path


def test_a_folder_that_others_may_enter_is_refused(home: pathlib.Path) -> None:
    (home / f"llm-serving-{os.getuid()}").mkdir(mode=0o700)
    (home / f"llm-serving-{os.getuid()}").chmod(0o750)
    with pytest.raises(ConfigError, match="mode 700"):
        runtime_folder()


def test_a_link_to_somewhere_else_is_refused(home: pathlib.Path) -> None:
    (home / "elsewhere").mkdir(mode=0o700)
    (home / f"llm-serving-{os.getuid()}").symlink_to(home / "elsewhere")
    with pytest.raises(ConfigError, match="must be a folder of user"):
        runtime_folder()


def test_a_folder_of_somebody_else_is_refused(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "llm-serving-4711").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ConfigError, match="user 4711"):
        runtime_folder()


def test_no_place_for_the_folder_is_a_config_error(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "not" / "there"))
    with pytest.raises(ConfigError, match="cannot make the folder"):
        runtime_folder()


def test_a_server_has_its_own_folder_and_removes_it(home: pathlib.Path) -> None:
    first, second = SocketFolder.create(home), SocketFolder.create(home)
    assert first.socket_path != second.socket_path
    pathlib.Path(first.socket_path).touch()
    first.close()
    assert [path.name for path in home.iterdir()] == [f"agents-{os.getpid()}-1"]
    second.close()
    assert list(home.iterdir()) == []


def test_the_sweep_takes_what_nobody_holds_and_nothing_else(home: pathlib.Path) -> None:
    mine = SocketFolder.create(home)
    (home / "agents-1-0").mkdir()
    (home / "agents-1-0" / "socket").touch()
    (home / "servers").mkdir()
    assert sweep_sockets(home) == ["agents-1-0"]
    assert sorted(path.name for path in home.iterdir()) == [f"agents-{os.getpid()}-0", "servers"]
    mine.close()


def test_a_path_that_no_socket_can_have_is_refused_with_a_way_out(home: pathlib.Path) -> None:
    deep = home / ("x" * 100)
    deep.mkdir()
    folder = SocketFolder.create(deep)
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        folder.socket_path  # noqa: B018
    folder.close()
