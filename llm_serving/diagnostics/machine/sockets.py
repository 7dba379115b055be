"""Are the sockets of our servers in order: their folders, the HTTP port, the agents' channels?"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Mapping
from typing import Any

from llm_serving.diagnostics.findings import Finding, Number
from llm_serving.diagnostics.machine.kernel_sockets import owners, tcp_sockets, unix_sockets
from llm_serving.diagnostics.machine.leftovers import find_leftovers, user_name
from llm_serving.diagnostics.places import Places, read
from llm_serving.errors import ConfigError
from llm_serving.transport.address import parse_address

__all__ = ["check_channel", "check_port", "check_socket_folder", "try_to_bind"]

_HALTED = {  # the letter of `ps`, in words, and what helps
    "T": ("it is stopped (SIGSTOP)", "kill -CONT {pid}, or restart the server"),
    "t": ("a debugger holds it", "let it go on in the debugger, or restart the server"),
    "Z": ("it has ended", "the server starts another one; if it does not, restart the server"),
}
_UNSEEN = "a process that cannot be seen from here"


def check_socket_folder(places: Places) -> Finding:
    """The folder for Unix sockets: this user's alone, and what lies in it."""
    root = places.sockets
    try:
        found = root.lstat()
    except FileNotFoundError:
        words = f"{root} is not there yet: the first start makes it"
        return Finding("socket folder", "OK", words)
    except OSError as exc:
        return Finding("socket folder", "skipped", f"{root}: {exc.strerror}: not permitted")
    mode, owner = stat.S_IMODE(found.st_mode), user_name(found.st_uid)
    words = f"{root} (of {owner}, mode {mode:o})"
    values: dict[str, Number] = {"path": str(root), "owner": owner, "mode": f"{mode:o}"}
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != places.uid or mode & 0o077:
        cure = f"it must be a folder of user {user_name(places.uid)} with mode 700: remove it"
        return Finding("socket folder", "broken", words, cure, values)
    folders = find_leftovers(root, "agents-*-*", places)
    orphans = [folder for folder in folders if folder.state == "orphan"]
    living = [f"{folder.words}, {_socket_in(folder.path)}" for folder in folders]
    values |= {"num_folders": len(folders), "num_orphans": len(orphans)}
    if orphans:
        words += "; left by dead servers: " + ", ".join(folder.words for folder in orphans)
        cure = "the next start with agent.transport unix sweeps them, and says so"
        return Finding("socket folder", "broken", words, cure, values)
    words += "; " + ("; ".join(living) or "no socket in it")
    return Finding("socket folder", "OK", words, values=values)


def try_to_bind(port: int) -> OSError | None:
    """Why the port of this machine could not be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            return exc
    return None


def check_port(
    places: Places,
    port: int,
    *,
    server_pid: int | None,
    answers_as_ours: bool,
    bind: Callable[[int], OSError | None] = try_to_bind,
) -> Finding:
    """Free, ours (`server_pid` is what the server's record says), or somebody else's."""
    item = f"port {port}"
    if server_pid is not None:
        words = f"ours: the server with pid {server_pid}"
        return Finding(item, "OK", words, values={"state": "ours", "pid": server_pid})
    problem = bind(port)
    if problem is None:
        return Finding(item, "OK", "free", values={"state": "free"})
    if problem.errno != errno.EADDRINUSE:
        cure = "choose a port above 1023"
        return Finding(item, "broken", f"cannot be listened on: {problem.strerror}", cure)
    inodes = [s.inode for s in tcp_sockets(places) if s.local[1] == port and s.state == "listening"]
    holders = list(owners(places, inodes).values())
    who = holders[0].words if holders else _UNSEEN
    values: dict[str, Number] = {"state": "taken", "pid": holders[0].pid if holders else None}
    if answers_as_ours:
        words = f"an llm-serving that is not on this user's records: {who}"
        return Finding(item, "OK", words, values=values)
    cure = "choose another port (--port), or end that process"
    return Finding(item, "broken", f"taken by {who}", cure, values)


def check_channel(places: Places, agent: Mapping[str, Any]) -> Finding:
    """Both ends of the control channel of an agent that /info shows, as the kernel sees them."""
    item = f"channel of agent {agent.get('rank')}"
    try:
        address = parse_address(str(agent.get("address")))
    except ConfigError as exc:
        return Finding(item, "broken", f"/info shows no address: {exc}", "update the server")
    pid = int(agent.get("pid") or 0)
    ends = (
        _unix_ends(places, address, pid)
        if isinstance(address, str)
        else _tcp_ends(places, address, pid)
    )
    if (state := _state(places, pid)) in _HALTED:
        words, cure = _HALTED[state]
        return Finding(
            item, "broken", f"agent pid {pid} does not run: {words}", cure.format(pid=pid)
        )
    if len(ends) == 2:
        words = f"{ends[0]} <-> {ends[1]}"
        return Finding(item, "OK", words, values={"server_end": ends[0], "agent_end": ends[1]})
    if not (places.proc / str(pid)).exists():
        words = f"agent pid {pid} is not visible here: another container, or another machine"
        return Finding(item, "skipped", words)
    if not os.access(places.proc / str(pid) / "fd", os.R_OK):
        return Finding(item, "skipped", f"pid {pid} is not this user's: not permitted to look")
    cure = "end the server and start it again; its log says why the agent is gone"
    words = f"no connection to {agent.get('address')}, though /info names it"
    return Finding(item, "broken", words, cure)


def _state(places: Places, pid: int) -> str:
    """One letter, as `ps` shows it; empty if it cannot be seen."""
    stat = read(places.proc / str(pid) / "stat") or ""
    return stat.rpartition(")")[2].strip()[:1]


def _tcp_ends(places: Places, address: tuple[str, int], agent_pid: int) -> list[str]:
    """The server's end and the agent's, or fewer."""
    sockets = [
        s
        for s in tcp_sockets(places)
        if s.state == "established" and address[1] in (s.local[1], s.remote[1])
    ]
    holders = owners(places, [s.inode for s in sockets])
    for ours in sockets:
        other = next((s for s in sockets if s.local == ours.remote), None)
        if other is None or ours.local[1] != address[1]:
            continue
        agent, server = holders.get(other.inode), holders.get(ours.inode)
        if agent is not None and agent.pid == agent_pid:
            who = f"pid {server.pid}" if server else _UNSEEN
            return [f"{_joined(ours.local)} ({who})", f"{_joined(other.local)} (pid {agent.pid})"]
    return []


def _unix_ends(places: Places, path: str, agent_pid: int) -> list[str]:
    """The end that connected has no path: it is known by its process."""
    sockets = [s for s in unix_sockets(places) if s.is_connected and s.path in ("", path)]
    holders = owners(places, [s.inode for s in sockets])
    server = [s for s in sockets if s.path == path]
    agent = [s for s in sockets if not s.path and _pid(holders.get(s.inode)) == agent_pid]
    if not server or not agent:
        return []
    who = holders.get(server[0].inode)
    return [
        f"{path} ({f'pid {who.pid}' if who else _UNSEEN})",
        f"inode {agent[0].inode} (pid {agent_pid})",
    ]


def _pid(process: Any) -> int | None:
    return None if process is None else int(process.pid)


def _joined(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"


def _socket_in(folder: os.PathLike[str]) -> str:
    try:
        found = os.lstat(os.path.join(folder, "socket"))
    except OSError as exc:
        return f"its socket: {exc.strerror}"
    return f"its socket of mode {stat.S_IMODE(found.st_mode):o}"
