"""What was seen of a server: everything that a breakdown is computed from, as one JSON file.

A live breakdown and that of its saved file are the same, because both are computed from this.  A
bare answer of `GET /trace` is an observation, too, of steps only.
"""

from __future__ import annotations

import pathlib
from typing import Any

import msgspec

from llm_serving.errors import ConfigError

__all__ = ["BareFigures", "ClientRequest", "Load", "Observation", "TraceAnswer", "load", "save"]

_FORMAT = "llm-serving breakdown 1"


class TraceAnswer(msgspec.Struct, frozen=True):
    """GET /trace"""

    now_ns: int
    columns: list[str]
    steps: list[list[int]]


class ClientRequest(msgspec.Struct, frozen=True):
    """One request as its client saw it; CLOCK_MONOTONIC nanoseconds of the client's machine."""

    round_index: int
    sent_ns: int
    token_ns: list[int]  # when each token's event was read
    end_ns: int
    prompt_tokens: int = 0
    timing: dict[str, float] = {}  # milliseconds, the server's own: details.timing
    error: str | None = None


class Load(msgspec.Struct, frozen=True):
    """What was asked, by streams that begin every round together."""

    streams: int
    prompt_tokens: int
    new_tokens: int
    requests: list[ClientRequest]


class BareFigures(msgspec.Struct, frozen=True):
    """Decode steps of the model with nothing around them, means in milliseconds."""

    rows: int
    first_context: int  # tokens that a row of the first step and of the last one can see
    last_context: int
    num_steps: int
    step_ms: float
    forward_ms: float
    sample_ms: float
    num_threads: int


class Observation(msgspec.Struct, frozen=True):
    trace: TraceAnswer
    since_ns: int = 0  # of the server's clock; steps that ended before are only there for overlap
    seconds: float = 0.0
    url: str = ""
    info: dict[str, Any] = {}  # GET /info
    before: str = ""  # GET /metrics
    after: str = ""
    load: Load | None = None  # None: it only watched
    bare: BareFigures | None = None
    bare_note: str = ""  # why there is no bare loop, or why it is the server's own
    format: str = _FORMAT


def save(observation: Observation, path: pathlib.Path) -> None:
    try:
        path.write_bytes(msgspec.json.encode(observation))
    except OSError as exc:
        raise ConfigError(f"cannot save the trace: {exc}") from exc


def load(path: pathlib.Path) -> Observation:
    """Raises ConfigError, naming the file, if it holds neither an observation nor a trace."""
    try:
        data = path.read_bytes()
        fields = msgspec.json.decode(data)
        if isinstance(fields, dict) and "steps" in fields:
            return Observation(msgspec.json.decode(data, type=TraceAnswer))
        found = msgspec.json.decode(data, type=Observation)
    except OSError as exc:
        raise ConfigError(f"cannot read the trace: {exc}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"{path} is neither a file of `breakdown --save` nor an answer of GET /trace: {exc}"
        ) from exc
    if found.format != _FORMAT:
        raise ConfigError(f"{path} is of format {found.format!r:.60}, this release reads {_FORMAT}")
    return found
