"""Logits on their way to the disk, written by a thread of its own.

    take()  ->  pending, bounded by has_room()  ->  <file>.npy, whole  ->  its line of the manifest

Nobody who hands something in ever waits for the disk.  What cannot be written is counted, kept in
`last_error`, and said once in the log; it is never lost without a word.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ConfigError
from llm_serving.precision.manifest import ManifestEntry
from llm_serving.precision.manifest_writer import ManifestWriter
from llm_serving.precision.naming import file_name, key_of, prefix_digest, read_name

__all__ = ["LogitsDump"]

logger = logging.getLogger(__name__)

_TICK_S = 1e-6  # between two files; a float of today's seconds resolves a quarter of it
_FUTURE_S = 1e8  # what a clock may have been ahead; later times are no times


@dataclasses.dataclass(frozen=True, slots=True)
class _Pending:
    time_s: float
    token_ids: npt.NDArray[np.int32]
    position: int
    logits: npt.NDArray[np.float32]

    @property
    def num_bytes(self) -> int:
        return self.token_ids.nbytes + self.logits.nbytes


class LogitsDump:
    def __init__(
        self,
        folder: pathlib.Path,
        *,
        every: int,
        labels: Mapping[str, str],
        max_pending_bytes: int = 256 << 20,
    ) -> None:
        """`labels` are the manifest's: model, model_digest, dtype, weights, kernels, source.

        The folder is made if it is not there; what it holds stays.  Raises ConfigError if it cannot
        be written.
        """
        self.every = every
        self.num_written = 0
        self.num_failed = 0
        self.last_error: str | None = None
        self.folder = folder
        self._template = ManifestEntry("", "", 0, np.empty(0, np.int32), "", 0.0, **labels)
        self._max_pending_bytes = max_pending_bytes
        self._partial = folder / f".{os.getpid()}-{id(self):x}.partial"
        self._manifest, self._last_time = self._open()
        self._changed = threading.Condition()
        self._pending: deque[_Pending] = deque()
        self._num_pending_bytes = 0
        self._is_closing = False
        self._on_room: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="logits-dump", daemon=True)
        self._thread.start()

    def take(
        self, token_ids: npt.NDArray[np.int32], position: int, logits: npt.NDArray[np.float32]
    ) -> None:
        """Have the logits behind `token_ids`, which are 0 .. position, written; never blocks.

        The arrays belong to the dump from now on.
        """
        with self._changed:
            if self._is_closing:
                self._failed("the dump is closed")
                return
            self._last_time = max(time.time(), self._last_time + _TICK_S)
            pending = _Pending(self._last_time, token_ids, position, logits)
            self._pending.append(pending)
            self._num_pending_bytes += pending.num_bytes
            self._changed.notify()

    def has_room(self) -> bool:
        """False while more bytes wait for the disk than may."""
        return self._num_pending_bytes <= self._max_pending_bytes

    def on_room(self, call: Callable[[], None]) -> None:
        """Have `call` called, from the dump's thread, each time that `has_room` turns true."""
        self._on_room.append(call)

    def close(self) -> None:
        """Everything that was taken is written, or has failed, when this returns."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self._manifest.close()
        with suppress(OSError):
            self._partial.unlink()
        if self.num_failed:
            total = self.num_written + self.num_failed
            logger.error("%d of %d files with logits are missing", self.num_failed, total)

    def _open(self) -> tuple[ManifestWriter, float]:
        """The manifest, and the time of the newest file that is there already."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._partial.write_bytes(b"")
            names = (read_name(path.name) for path in self.folder.glob("*.npy"))
            latest = time.time() + _FUTURE_S
            times = (name.time_s for name in names if name is not None)
            newest = max((time_s for time_s in times if time_s < latest), default=0.0)
            return ManifestWriter(self.folder), newest
        except OSError as exc:
            raise ConfigError(
                f"logits cannot be written into {self.folder}: {exc.strerror or exc}"
            ) from exc

    def _run(self) -> None:
        while (pending := self._next()) is not None:
            self._write(pending)
            with self._changed:
                was_full = not self.has_room()
                self._num_pending_bytes -= pending.num_bytes
                has_room_again = was_full and self.has_room()
            if has_room_again:
                for call in self._on_room:
                    with suppress(RuntimeError):  # the event loop it wakes has been closed
                        call()

    def _next(self) -> _Pending | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_closing)
            return self._pending.popleft() if self._pending else None

    def _write(self, pending: _Pending) -> None:
        key = key_of(pending.token_ids)
        path = self.folder / file_name(pending.time_s, key, pending.position)
        entry = dataclasses.replace(
            self._template,
            file=path.name,
            key=key,
            position=pending.position,
            token_ids=pending.token_ids,
            digest=prefix_digest(pending.token_ids),
            time=round(pending.time_s, 7),
        )
        try:
            with self._partial.open("wb") as file:
                np.save(file, pending.logits, allow_pickle=False)
            self._partial.rename(path)
            try:
                self._manifest.append(entry)
            except OSError:
                path.unlink()  # a file is there with its line or not at all
                raise
        except OSError as exc:
            with self._changed:
                self._failed(f"{path.name}: {exc.strerror or exc}")
        else:
            self.num_written += 1

    def _failed(self, why: str) -> None:
        if self.num_failed == 0:
            logger.error("logits cannot be written into %s: %s", self.folder, why)
        self.num_failed += 1
        self.last_error = why
