"""What the HTTP edge has to be told: names, and how much of a client it puts up with."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ApiSettings"]


@dataclass(frozen=True, slots=True)
class ApiSettings:
    served_names: tuple[str, ...]  # all of them name the one model; the first labels the metrics
    max_body_bytes: int = 2 * 1024 * 1024
    max_drain_bytes: int = 64 * 1024 * 1024  # read and dropped before a 413, so that it is seen
    drain_timeout_s: float = 10.0
    body_timeout_s: float = 60.0  # from the head of a request to the end of its body
    send_timeout_s: float = 60.0  # a client that reads nothing for so long is gone

    def __post_init__(self) -> None:
        if not self.served_names:
            raise ValueError("served_names: a model needs at least one name")
