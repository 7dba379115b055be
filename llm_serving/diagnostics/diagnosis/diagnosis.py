"""One diagnosis: what is looked at, in which order, and what that depends on.

machine, limits     before anything of ours computes
server              over HTTP: what it says of itself, and whether that is so
shared memory       what lies there, and whether there is room
sockets             the port, the folders, both ends of each agent's channel
messages            every kind, between us and a twin of an agent
speed               bytes and arrays, there and back
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from llm_serving.config import ServingConfig
from llm_serving.diagnostics.findings import Finding
from llm_serving.diagnostics.machine.fitness import (
    check_clock,
    check_load,
    check_memory,
    check_processor,
    check_versions,
)
from llm_serving.diagnostics.machine.limits import check_cgroup_memory, check_cores, check_limits
from llm_serving.diagnostics.machine.shared_memory import (
    check_room,
    check_segments,
    free_bytes,
    room_needed,
)
from llm_serving.diagnostics.machine.sockets import check_channel, check_port, check_socket_folder
from llm_serving.diagnostics.places import Places
from llm_serving.diagnostics.probes.echo_link import Transport
from llm_serving.diagnostics.probes.measure import FULL, QUICK, Measured, judge, measure
from llm_serving.diagnostics.server.answers import ServerReport, agents_of, check_server
from llm_serving.diagnostics.server.handshake import check_listener
from llm_serving.diagnostics.server.messages import TwinSettings, check_messages
from llm_serving.step_arrays import StepInputs
from llm_serving.worker.step_transfer import StepLimits

__all__ = ["Diagnosis", "Settings", "diagnose"]

_CONTEXT = 8192  # of the default model: what a configuration without max_model_len is taken for
_SMALLEST = StepLimits(1, 16, 16, 16)


@dataclass(frozen=True, slots=True)
class Settings:
    url: str  # of the server, without a path
    is_named: bool  # by --url: then it has to answer
    server_pid: int | None  # of this user's server on that port, by its record
    config: ServingConfig  # of a server that is not there
    quick: bool
    num_usable_cores: int
    twin_command: tuple[str, ...]
    make_step: Callable[[int], StepInputs]
    failing_step: int

    @property
    def port(self) -> int:
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)


@dataclass(slots=True)
class Diagnosis:
    sections: dict[str, list[Finding]] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)

    @property
    def findings(self) -> list[Finding]:
        return [finding for section in self.sections.values() for finding in section]


async def diagnose(settings: Settings, places: Places, say: Callable[[str], None]) -> Diagnosis:
    """Look at everything.  `say` is told what comes next."""
    diagnosis = Diagnosis()
    sections = diagnosis.sections
    say("this machine")
    sections["machine"] = _machine(settings, places)
    say(f"the server at {settings.url}")
    report = await _ask_server(settings)
    sections["server"] = report.findings
    is_here = _is_this_machine(settings.url)
    sections["shared memory"], limits = _shared_memory(settings, places, report)
    say("sockets")
    sections["sockets"] = await _sockets(settings, places, report, is_here)
    sections["messages"] = []
    for transport in _transports(settings, report):
        say(f"every kind of message over {transport}")
        twin = TwinSettings(
            settings.twin_command, settings.make_step, settings.failing_step, limits
        )
        sections["messages"] += await check_messages(transport, twin)
    diagnosis.measured = await measure(
        QUICK if settings.quick else FULL,
        shm_bytes=free_bytes(places),
        memory_bytes=_free_memory(sections["machine"]),
        say=say,
    )
    sections["speed"] = judge(diagnosis.measured)
    return diagnosis


def _machine(settings: Settings, places: Places) -> list[Finding]:
    num_cores = os.cpu_count() or 1
    return [
        check_load(places, settings.num_usable_cores),
        check_versions(),
        check_processor(places),
        check_cores(settings.num_usable_cores, num_cores),
        check_memory(places),
        check_cgroup_memory(places),
        check_clock(places),
        *check_limits(),
    ]


async def _ask_server(settings: Settings) -> ServerReport:
    """Of a port that nobody was said to serve, silence is no finding."""
    if settings.server_pid is not None:
        cure = f"pid {settings.server_pid} has the port: wait for its `ready at`, or see its log"
        return await check_server(settings.url, if_silent=cure)
    report = await check_server(settings.url)
    if report.info is None and not settings.is_named:
        words = f"no llm-serving answers at {settings.url}: what needs one is left out"
        cure = "start one (llm-serving serve) and diagnose again"
        return ServerReport([Finding("server", "skipped", words, cure)])
    return report


def _shared_memory(
    settings: Settings, places: Places, report: ServerReport
) -> tuple[list[Finding], StepLimits]:
    """And how large the segments of a twin shall be: a server's, if there is room."""
    limits, num_slots, num_ranks = _step_limits(settings.config, report.info)
    needed = room_needed(limits.input_bytes, limits.result_bytes, num_slots, num_ranks)
    why = "one more server like this one" if report.info else "a server of this configuration"
    room = check_room(places, needed, why, must_fit=report.info is None)
    fits = free_bytes(places) >= needed
    return [room, check_segments(places)], limits if fits else _SMALLEST


async def _sockets(
    settings: Settings, places: Places, report: ServerReport, is_here: bool
) -> list[Finding]:
    folder = check_socket_folder(places)
    if not is_here:
        words = f"{settings.url} is another machine: its port and its channels are not looked at"
        return [folder, Finding(f"port {settings.port}", "skipped", words)]
    port = check_port(
        places,
        settings.port,
        server_pid=settings.server_pid,
        answers_as_ours=report.info is not None,
    )
    agents = agents_of(report.info)
    channels = [check_channel(places, agent) for agent in agents]
    return [port, folder, *channels, *[await check_listener(agent) for agent in agents[:1]]]


def _transports(settings: Settings, report: ServerReport) -> tuple[Transport, ...]:
    """The server's own; without one both, or with --quick the configured one."""
    for agent in agents_of(report.info):
        return ("unix",) if agent.get("transport") == "unix" else ("tcp",)
    return (settings.config.agent.transport,) if settings.quick else ("tcp", "unix")


def _step_limits(
    config: ServingConfig, info: Mapping[str, Any] | None
) -> tuple[StepLimits, int, int]:
    """What its segments are made for, their slots, and how many agents there are."""
    scheduler, known = config.scheduler, info or {}
    if isinstance(known.get("limits"), dict):
        scheduler = msgspec.convert(known["limits"], type(scheduler), strict=False)
    limits = StepLimits(
        scheduler.max_num_seqs,
        scheduler.max_num_batched_tokens,
        int(known.get("max_model_len") or config.model.max_model_len or _CONTEXT),
        int(known.get("block_size") or config.kv_cache.block_size),
    )
    return limits, 2 * scheduler.num_steps_in_flight - 1, max(1, len(agents_of(info)))


def _is_this_machine(url: str) -> bool:
    """Whether its host is an address that could be listened on here."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, 0, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0]) as probe:
            probe.bind(found[0][4])
    except OSError:
        return False
    return True


def _free_memory(machine: list[Finding]) -> int:
    """The least that a check has found; a gigabyte if none could tell."""
    names = ("free_bytes", "left_bytes")
    found = [f.values[name] for f in machine for name in names if name in f.values]
    return min([int(value) for value in found if value is not None], default=1 << 30)
