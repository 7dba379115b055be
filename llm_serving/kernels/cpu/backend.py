"""The native CPU kernels behind the interface of all kernels.

The products of a packed model go through its plan; what is asked for operation by operation falls
back to the reference, but for attention, whose cache has a layout of its own.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.native import instruction_set, native
from llm_serving.kernels.reference import ReferenceKernels

__all__ = ["NativeKernels"]

_ALLOWED = sorted(os.sched_getaffinity(0))  # before a pool binds the thread that asks


class NativeKernels(ReferenceKernels):
    backend: ClassVar[str] = "native"

    def __init__(self, num_threads: int, isa: str | None = None, spin_us: int = 200) -> None:
        """`isa` None: what the environment asks for.  Raises ConfigError where they cannot run."""
        self.module: Any = native()
        try:
            self.kernels: Any = self.module.kernels(isa or instruction_set())
        except ValueError as exc:
            raise ConfigError(f"the native kernels cannot run here: {exc}") from exc
        self._processors = _processors(num_threads)
        self.pool: Any = self.module.Pool(num_threads, spin_us, self._processors)

    def bind_caller(self) -> None:
        """Keep the calling thread, which is the pool's first, on a processor of its own.

        For a process that has nothing else to do: what it starts later inherits that.
        """
        if self._processors:
            os.sched_setaffinity(0, self._processors[:1])

    def backends(self) -> dict[str, str]:
        return dict.fromkeys(super().backends(), f"native ({self.kernels.isa})")


def _processors(num_threads: int) -> list[int]:
    """One for each thread, if they take all that this process may use; else none is reserved."""
    return _ALLOWED if 1 < num_threads == len(_ALLOWED) else []
