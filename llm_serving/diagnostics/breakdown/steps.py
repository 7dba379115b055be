"""What steps cost, in milliseconds: by kind, as shares of the agent's time, and do they add up?

All figures are means per step.  A decode step gives each of its rows one token, so for decoding
milliseconds per step are milliseconds per token, as each of the clients sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_serving.diagnostics.breakdown.trace import Steps
from llm_serving.step_trace import AGENT_STAGES, KINDS, MASTER_STAGES

__all__ = ["AgentShares", "KindFigures", "Spread", "StageFigures", "agent_shares", "broken_sums"]

NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, ms: npt.NDArray[Any]) -> Spread:
        p50, p99 = np.percentile(ms, (50, 99))
        return cls(float(ms.mean()), float(p50), float(p99))


@dataclass(frozen=True, slots=True)
class StageFigures:
    name: str
    spread: Spread
    exposed_ms: float | None = None  # None: a stage of the agent, which is always in the period
    hidden_ms: float | None = None


@dataclass(frozen=True, slots=True)
class KindFigures:
    name: str
    count: int
    rows: float
    tokens: float
    period: Spread
    stages: tuple[StageFigures, ...]  # the agent's, which add up to the period, then the master's

    @classmethod
    def of(cls, name: str, steps: Steps) -> KindFigures:
        agent = [
            StageFigures(stage, Spread.of(steps.agent[:, i] / NS_PER_MS))
            for i, stage in enumerate(AGENT_STAGES)
        ]
        exposed = (steps.exposed.mean(0) / NS_PER_MS).tolist()
        hidden = ((steps.master - steps.exposed).mean(0) / NS_PER_MS).tolist()
        master = [
            StageFigures(stage, Spread.of(steps.master[:, i] / NS_PER_MS), exposed[i], hidden[i])
            for i, stage in enumerate(MASTER_STAGES)
        ]
        rows, tokens = steps.column("num_rows").mean(), steps.column("num_tokens").mean()
        period = Spread.of(steps.period / NS_PER_MS)
        return cls(name, len(steps), float(rows), float(tokens), period, (*agent, *master))

    @classmethod
    def of_all(cls, steps: Steps) -> list[KindFigures]:
        """Of every kind that there is."""
        kinds = [(name, steps.kind(name)) for name in KINDS]
        return [cls.of(name, those) for name, those in kinds if len(those)]

    def mean(self, stage: str) -> float:
        return next(s.spread.mean for s in self.stages if s.name == stage)


@dataclass(frozen=True, slots=True)
class AgentShares:
    """Of the time from the first step's beginning to the end of the last; together 1."""

    seconds: float
    forward: float
    other: float  # preparation, sampling, writing results
    idle: float  # there was work, but not here yet
    no_work: float


def agent_shares(steps: Steps) -> AgentShares:
    wall = int(steps.column("done")[-1] - steps.column("previous")[0])
    idle, prepare, forward, sample, result_write = steps.agent.sum(0).tolist()
    total = max(wall, 1)
    return AgentShares(
        seconds=wall / 1e9,
        forward=forward / total,
        other=(prepare + sample + result_write) / total,
        idle=idle / total,
        no_work=int(steps.pauses.sum()) / total,
    )


def broken_sums(steps: Steps) -> list[str]:
    """What does not add up though it must, a sentence each; nothing if all is well."""
    ids, broken = steps.column("step_id"), []
    if (wrong := steps.agent.sum(1) != steps.period).any():
        broken.append(f"the agent's stages are not the period of step {ids[wrong][0]}")
    if (wrong := steps.pauses < 0).any():
        broken.append(f"step {ids[1:][wrong][0]} began before the one ahead of it had ended")
    wall = steps.column("done")[-1] - steps.column("previous")[0]
    if steps.period.sum() + steps.pauses.sum() != wall:
        broken.append("periods and pauses do not add up to the time from the first to the last")
    if ((steps.exposed < 0) | (steps.exposed > steps.master)).any():
        broken.append("a stage is exposed for longer than it lasts")
    idle = steps.agent[:, 0]
    if ((steps.on_the_way < 0) | (steps.on_the_way > idle) | (steps.at_once < 0)).any():
        broken.append("the stages that cover an idle stage do not add up to it")
    return broken
