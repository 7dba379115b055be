"""What came out of a model, as digests: two runs agree if theirs do.

A key says what a value may depend on, and on nothing else: the ids up to a position and, for a
token, how it was to be chosen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

__all__ = ["Digests", "Seen", "digest"]


@dataclass(slots=True)
class Digests:
    values: dict[bytes, bytes] = field(default_factory=dict)  # by key
    positions: dict[bytes, int] = field(default_factory=dict)
    conflicts: list[int] = field(default_factory=list)  # positions

    def add(self, key: bytes, value: bytes, position: int) -> None:
        """What has the same key must agree: another value is a conflict."""
        if self.values.setdefault(key, value) != value:
            self.conflicts.append(position)
        self.positions[key] = position

    def differing(self, expected: Digests) -> list[int]:
        """Positions of all that differs or is missing here, and of conflicts; rising."""
        wrong = [
            expected.positions[key]
            for key, value in expected.values.items()
            if self.values.get(key) != value
        ]
        return sorted([*wrong, *self.conflicts])


@dataclass(slots=True)
class Seen:
    logits: Digests = field(default_factory=Digests)  # float32 bytes of a position's
    tokens: Digests = field(default_factory=Digests)  # id, its logprob and the alternatives


def digest(*parts: bytes) -> bytes:
    """Of parts whose sizes do not depend on their contents, but for the first."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
