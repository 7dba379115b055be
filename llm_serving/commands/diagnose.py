"""`llm-serving diagnose`: is this machine fit, is the transport fast, is the server what it says?

Tables go to stdout, progress to stderr.  Only wiring is here; see `diagnostics/diagnosis`.
"""

from __future__ import annotations

import asyncio
import datetime
import pathlib
import sys
import time
from importlib.metadata import version
from urllib.parse import urlsplit

import msgspec
import typer
import uvloop
from rich.console import Console

from llm_serving.agent.processors import num_processors
from llm_serving.commands.diagnose_twin import FAILING_STEP, TWIN, twin_step
from llm_serving.commands.options import run_command
from llm_serving.commands.server_record import Record, find_server
from llm_serving.commands.stopping import stop_event, unless
from llm_serving.config import load_config
from llm_serving.diagnostics.diagnosis.diagnosis import Diagnosis, Settings
from llm_serving.diagnostics.diagnosis.diagnosis import diagnose as look_at_everything
from llm_serving.diagnostics.diagnosis.tables import as_json, print_diagnosis
from llm_serving.diagnostics.findings import exit_code
from llm_serving.diagnostics.places import Places
from llm_serving.errors import ConfigError

__all__ = ["main"]

_STOPPED = 130
_PORT = 8835
_PIPE_WIDTH = 120  # where nobody tells how wide the paper is
_ANY_HOST = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def main(argv: list[str]) -> int:
    """Exit code 0, or 1 if anything is broken; what is slow alone fails nothing."""
    return run_command("diagnose", diagnose, argv)


def diagnose(
    url: str | None = typer.Option(
        None, help="the server to look at, http://host:port; it has to answer", show_default=False
    ),
    port: int | None = typer.Option(
        None,
        "--port",
        "-P",
        min=1,
        max=65535,
        help="a port of this machine, with or without a server (default: server.port, 8835)",
        show_default=False,
    ),
    config: str | None = typer.Option(
        None, help="YAML file of a server that is still to be started", show_default=False
    ),
    quick: bool = typer.Option(False, "--quick", help="a few seconds: fewer sizes, fewer rounds"),
    json_file: str | None = typer.Option(
        None, "--json", help="write all findings and figures to this file", show_default=False
    ),
) -> int:
    """Check and measure what the transport needs on this machine, and a running server."""
    sink = _sink(json_file)
    if url is not None and port is not None:
        raise typer.BadParameter("give --url or --port, not both", param_hint="--port")
    settings = _settings(
        _checked(url) if url else None, port, pathlib.Path(config) if config else None, quick
    )
    began = time.monotonic()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        diagnosis = runner.run(_unless_stopped(settings))
    if diagnosis is None:
        print("stopped; nothing is left behind", file=sys.stderr)
        return _STOPPED
    _print(diagnosis)
    if sink is not None:
        _write(sink, diagnosis, settings, time.monotonic() - began)
    return exit_code(diagnosis.findings)


def _settings(
    url: str | None, port: int | None, config_path: pathlib.Path | None, quick: bool
) -> Settings:
    config, places = load_config(config_path), Places()
    number = (urlsplit(url).port or 80) if url else port or config.server.port or _PORT
    record = _record(number, places)
    return Settings(
        url=url or _url(record.host if record else "", number),
        is_named=url is not None,
        server_pid=record.pid if record else None,
        config=config,
        quick=quick,
        num_usable_cores=num_processors(places.proc, places.cgroups),
        twin_command=TWIN,
        make_step=twin_step,
        failing_step=FAILING_STEP,
    )


async def _unless_stopped(settings: Settings) -> Diagnosis | None:
    """None after Ctrl-C or SIGTERM, with everything removed."""
    made: list[Diagnosis] = []

    async def work() -> None:
        with _Progress() as progress:
            made.append(await look_at_everything(settings, Places(), progress.say))

    return made[0] if await unless(stop_event(), work()) else None


class _Progress:
    """What is looked at, on stderr: a line that moves, or one line each in a pipe."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("", spinner="dots")

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._status.stop()

    def say(self, what: str) -> None:
        if self._console.is_terminal:
            self._status.update(f"looking at: {what}")
        else:
            print(f"looking at: {what}", file=sys.stderr, flush=True)


def _print(diagnosis: Diagnosis) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    print_diagnosis(diagnosis, console)


def _write(path: pathlib.Path, diagnosis: Diagnosis, settings: Settings, seconds: float) -> None:
    about = {
        "version": version("llm-serving"),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "quick": settings.quick,
        "server": settings.url,
    }
    text = msgspec.json.format(msgspec.json.encode(as_json(diagnosis, about)), indent=2)
    try:
        path.write_bytes(text + b"\n")
    except OSError as exc:
        raise ConfigError(f"--json: {path}: {exc.strerror}") from exc


def _sink(json_file: str | None) -> pathlib.Path | None:
    """Raises BadParameter before anything takes time."""
    if json_file is None:
        return None
    path = pathlib.Path(json_file).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise typer.BadParameter(f"{path} cannot be a file", param_hint="--json")
    return path


def _checked(url: str) -> str:
    """Without a path.  Raises BadParameter."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc}"
    except ValueError:  # a port that is none
        pass
    raise typer.BadParameter(f"expected http://host:port, found {url!r:.100}", param_hint="--url")


def _record(port: int, places: Places) -> Record | None:
    """Of this user's server; nothing is made to look for it."""
    try:
        return find_server(port) if places.sockets.is_dir() else None
    except (ConfigError, OSError):  # a folder that is not ours, which is a finding
        return None


def _url(host: str, port: int) -> str:
    known = _ANY_HOST.get(host, host)
    return f"http://[{known}]:{port}" if ":" in known else f"http://{known}:{port}"
