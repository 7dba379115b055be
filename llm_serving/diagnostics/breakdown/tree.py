"""The tree of the tuning notes: time per token at the client, service against model, part by part.

The children of a node add up to it, but for those that say that they are not in the sum: what the
master does beside the model.  What the agent waits for is listed by what the master did meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm_serving.diagnostics.breakdown.steps import NS_PER_MS
from llm_serving.diagnostics.breakdown.trace import Ns, Steps
from llm_serving.step_trace import AGENT_STAGES, MASTER_STAGES

__all__ = ["Basis", "Node", "tree_of"]


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    ms: float
    children: tuple[Node, ...] = ()
    in_sum: bool = True

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


@dataclass(frozen=True, slots=True)
class Basis:
    """The steps that a tree is about."""

    steps: Steps
    kind: str
    rows: int | None  # None: steps of any number of rows

    @classmethod
    def of(cls, steps: Steps, streams: int | None) -> Basis:
        """Decode steps, of all `streams` where there are such; without any, the commonest kind."""
        decode = steps.kind("decode")
        if not len(decode):
            kind = max(("prefill", "mixed"), key=lambda name: len(steps.kind(name)))
            return cls(steps.kind(kind), kind, None)
        full = decode.where(decode.column("num_rows") == (streams or 0))
        return cls(full, "decode", streams) if len(full) else cls(decode, "decode", None)


def tree_of(basis: Basis, client_ms: float | None) -> Node:
    """Of the time between two tokens at the client; without one, of the steps' mean period."""
    steps = basis.steps
    stages = dict(zip(AGENT_STAGES, _means(steps.agent), strict=True))
    period = _mean(steps.period)
    total = period if client_ms is None else client_ms
    model = [Node(name, stages[name]) for name in ("forward", "sample")]
    service = [
        Node("exposed: the agent waits", stages["idle"], tuple(_waits(steps))),
        Node("agent: prepare", stages["prepare"]),
        Node("agent: result write", stages["result_write"], tuple(_writing(steps))),
    ]
    if client_ms is not None:
        service.append(Node("client's beyond the step's", client_ms - period))
    model_ms = sum(node.ms for node in model)
    return Node(
        f"{basis.kind} step" if client_ms is None else "client",
        total,
        (
            Node("service (all that is not the model)", total - model_ms, tuple(service)),
            Node("model", model_ms, tuple(model)),
            _hidden(steps),
        ),
    )


def _waits(steps: Steps) -> list[Node]:
    """Of the agent's idle stage: what the master did meanwhile."""
    nodes = [
        Node(name.replace("_", " "), ms)
        for name, ms in zip(MASTER_STAGES, _means(steps.waits), strict=True)
    ]
    nodes.append(Node("on the way (wake-ups, socket)", _mean(steps.on_the_way)))
    if twice := _mean(steps.at_once):
        nodes.append(Node("two of these at once", -twice))
    return nodes


def _writing(steps: Steps) -> list[Node]:
    """A master that works while the agent sends has been given the core it sends from."""
    sending, beside = _mean(steps.sending), _mean(steps.beside_sending)
    return [
        Node("into shared memory", _mean(steps.agent[:, -1] - steps.sending)),
        Node("answer sent, the master at work", beside),
        Node("answer sent, otherwise", sending - beside),
    ]


def _hidden(steps: Steps) -> Node:
    means = _means(steps.master - steps.exposed)
    nodes = [
        Node(name.replace("_", " "), ms, in_sum=False)
        for name, ms in zip(MASTER_STAGES, means, strict=True)
    ]
    return Node("hidden beside the model (not in the sum)", sum(means), tuple(nodes), in_sum=False)


def _mean(column: Ns) -> float:
    return float(column.mean()) / NS_PER_MS


def _means(table: Ns) -> list[float]:
    means: list[float] = (np.asarray(table).mean(0) / NS_PER_MS).tolist()
    return means
