"""Both ways to a baseline: free-running from prompts, or for exactly the prefixes of a manifest.

The work that is left is told in units of one decode step; a token of a prompt costs far less.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from llm_serving.baseline.dataset import Prompt
from llm_serving.baseline.prefixes import PrefixGroup
from llm_serving.baseline.reference import Reference
from llm_serving.errors import ConfigError
from llm_serving.precision.logits_dump import LogitsDump

__all__ = ["PatientDump", "run_freely", "run_prefixes"]

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Progress = Callable[[float, float], None]  # work done, and in all

_PREFILL_COST = 1 / 16  # of a token, in decode steps


class PatientDump:
    """A dump for whoever has the time to wait for the disk, and no use for half a baseline."""

    def __init__(self, dump: LogitsDump) -> None:
        self._dump = dump
        self._room = threading.Event()
        dump.on_room(self._room.set)

    @property
    def every(self) -> int:
        return self._dump.every

    def write(self, ids: Ids, logits: Logits, num_times: int) -> None:
        """The logits behind `ids`.  Raises ConfigError as soon as one could not be written."""
        for _ in range(num_times):
            self._dump.take(ids, len(ids) - 1, logits)
            self._wait_for_room()
            if self._dump.last_error is not None:
                raise ConfigError(f"the baseline cannot be written: {self._dump.last_error}")

    def _wait_for_room(self) -> None:
        while not self._dump.has_room():
            self._room.wait()
            self._room.clear()


def run_freely(
    reference: Reference,
    prompts: Sequence[Prompt],
    eos_token_ids: Sequence[int],
    dump: PatientDump,
    progress: Progress,
) -> None:
    """Greedy answers; logits where a token is taken and the position is a multiple of `every`."""
    costs = [p.max_new_tokens + len(p.token_ids) * _PREFILL_COST for p in prompts]
    done = 0.0
    for prompt, cost in zip(prompts, costs, strict=True):
        ids = prompt.token_ids.tolist()
        for token_id, logits in reference.greedy(
            prompt.token_ids, prompt.max_new_tokens, eos_token_ids
        ):
            if (len(ids) - 1) % dump.every == 0:
                dump.write(np.array(ids, np.int32), logits, prompt.num_times)
            ids.append(token_id)
            progress(done + len(ids) - len(prompt.token_ids), sum(costs))
        done += cost
        progress(done, sum(costs))


def run_prefixes(
    reference: Reference, groups: Sequence[PrefixGroup], dump: PatientDump, progress: Progress
) -> None:
    """Logits behind exactly these prefixes (teacher forcing)."""
    total, done = sum(len(group.token_ids) for group in groups), 0
    for group in groups:
        for position, logits in reference.logits_at(group.token_ids, list(group.num_times)):
            ids = group.token_ids[: position + 1]
            dump.write(ids, logits, group.num_times[position])
            progress(done + position + 1, total)
        done += len(group.token_ids)
