"""What the scheduler holds now, and has counted since the start, for who watches the server."""

from __future__ import annotations

from dataclasses import dataclass

from llm_serving.master.scheduler import Scheduler

__all__ = ["MasterStats", "count"]


@dataclass(frozen=True, slots=True)
class MasterStats:
    num_running: int
    num_waiting: int
    kv_usage: float  # held / all blocks
    num_prefix_queries: int  # tokens
    num_prefix_hits: int  # tokens
    num_preemptions: int


def count(scheduler: Scheduler) -> MasterStats:
    pool = scheduler.pool
    return MasterStats(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        kv_usage=1 - pool.num_idle / pool.num_blocks,
        num_prefix_queries=scheduler.num_prefix_queries,
        num_prefix_hits=scheduler.num_prefix_hits,
        num_preemptions=scheduler.num_preemptions,
    )
