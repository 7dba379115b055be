"""`llm-serving stop`: end a server of this machine, gently first."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress

import typer

from llm_serving.commands.options import run_command
from llm_serving.commands.server_record import find_server

__all__ = ["main"]

_KILL_WAIT_S = 5.0
_CLEANUP_S = 20.0  # beside what running requests are allowed


def main(argv: list[str]) -> int:
    """Exit code 0 if the server has ended, 1 if there was none."""
    return run_command("stop", stop, argv)


def stop(
    port: int = typer.Option(8835, "--port", "-P", help="the port of the server to end"),
    timeout: float | None = typer.Option(
        None,
        help="seconds it may take to end by itself before it is killed "
        "(default: its server.shutdown_grace_s and 20 more)",
        show_default=False,
    ),
) -> int:
    """End the server of a port: running requests may finish (server.shutdown_grace_s)."""
    record = find_server(port)
    if record is None:
        print(f"no server of yours runs on port {port}")
        return 1
    timeout_s = record.grace_s + _CLEANUP_S if timeout is None else timeout
    with suppress(ProcessLookupError):
        process = os.pidfd_open(record.pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            how = "stopped"
            if not _has_ended(process, timeout_s):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                _has_ended(process, _KILL_WAIT_S)
                how = f"killed: it had not ended within {timeout_s:g} s"
        finally:
            os.close(process)
        print(f"server on port {port} (pid {record.pid}) {how}")
    return 0


def _has_ended(process: int, timeout_s: float) -> bool:
    ended = select.poll()
    ended.register(process, select.POLLIN)
    return bool(ended.poll(timeout_s * 1000))
