"""What one step leaves behind: when each of its parts began, on one monotonic clock.

    master   schedule build shm_write frame_send ┐           ┌ frame_receive shm_read update publish
    agent                           idle prepare forward sample result_write

A record is a few numbers and a stamp for each border, in nanoseconds of CLOCK_MONOTONIC, which
all processes of a machine share.  The agent's stages follow each other without a gap, from the end
of the step before to the end of this one: they add up to the step's period.  The master's stages
of a step stand beside them, most of them beside the forward of another step.  The part of them that
lies within an idle stage is exposed, for the agent has to wait for it; the rest is hidden.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "AGENT_STAGES",
    "KINDS",
    "MASTER_STAGES",
    "MASTER_STAMPS",
    "StepRecord",
    "kind_of",
]

KINDS = ("prefill", "decode", "mixed")  # of prompts, of one new token for each row, or both
AGENT_STAGES = ("idle", "prepare", "forward", "sample", "result_write")
MASTER_STAMPS = {  # a stage of the master and the columns where it begins and ends
    "schedule": ("schedule", "build"),
    "build": ("build", "shm_write"),
    "shm_write": ("shm_write", "frame_send"),
    "frame_send": ("frame_send", "sent"),
    "frame_receive": ("done", "shm_read"),
    "shm_read": ("shm_read", "update"),
    "update": ("update", "publish"),
    "publish": ("publish", "end"),
}
MASTER_STAGES = tuple(MASTER_STAMPS)


class StepRecord(NamedTuple):
    step_id: int
    kind: int  # index into KINDS
    num_rows: int
    num_tokens: int  # computed
    num_samples: int
    schedule: int  # the master begins to decide what runs
    build: int
    shm_write: int
    frame_send: int
    sent: int
    previous: int  # the agent was done with the step before, or the first work came after a pause
    waiting: int  # the answer to the step before is away: the agent reads its socket
    received: int  # the frame is there; decoding it, reading the arrays and checking them
    forward: int
    sample: int
    result_write: int
    done: int  # the result is written; the answer is encoded and sent
    shm_read: int  # the master has the answer's frame, decoded
    update: int
    publish: int  # texts and events
    end: int

    @property
    def period(self) -> int:
        """Nanoseconds from the end of the step before; a pause without work is not in it."""
        return self.done - self.previous

    def agent_stages(self) -> tuple[int, ...]:
        """Nanoseconds of each of AGENT_STAGES; together they are the period.

        Sending the answer counts as writing the result, of the period in which it happens.
        """
        return (
            self.received - self.waiting,
            self.forward - self.received,
            self.sample - self.forward,
            self.result_write - self.sample,
            self.done - self.result_write + self.waiting - self.previous,
        )

    def master_stages(self) -> tuple[int, ...]:
        """Nanoseconds of each of MASTER_STAGES."""
        return (
            self.build - self.schedule,
            self.shm_write - self.build,
            self.frame_send - self.shm_write,
            self.sent - self.frame_send,
            self.shm_read - self.done,
            self.update - self.shm_read,
            self.publish - self.update,
            self.end - self.publish,
        )


def kind_of(num_rows: int, num_decode_rows: int) -> int:
    """Index into KINDS; a row decodes if it computes the one token that was sampled last."""
    if num_decode_rows == num_rows:
        return 1
    return 2 if num_decode_rows else 0
