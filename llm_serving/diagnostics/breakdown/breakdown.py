"""Where did the time go?  An observation in, all figures of the report out.

    observation                  what was seen, as a file
    metrics, trace               what the counters did; overlap: exposed and hidden
    steps, tree, requests, bare  the figures
    advice                       what to look at first
    report, plot, timeline       as text, as a picture, for Perfetto

Live or from a file, the figures are the same: nothing here asks anybody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_serving.diagnostics.breakdown.advice import Facts, advice
from llm_serving.diagnostics.breakdown.bare import Comparison, compare_with_bare
from llm_serving.diagnostics.breakdown.load import decode_ms
from llm_serving.diagnostics.breakdown.metrics import Change
from llm_serving.diagnostics.breakdown.observation import Load, Observation
from llm_serving.diagnostics.breakdown.requests import (
    RequestFigures,
    Transport,
    requests_of,
    transport_of,
)
from llm_serving.diagnostics.breakdown.steps import (
    NS_PER_MS,
    AgentShares,
    KindFigures,
    Spread,
    agent_shares,
    broken_sums,
)
from llm_serving.diagnostics.breakdown.trace import Steps, read_steps
from llm_serving.diagnostics.breakdown.tree import Basis, Node, tree_of
from llm_serving.errors import ServingError

__all__ = ["Breakdown", "break_down"]

_STEPS_METRIC = "llm_serving:step_period_seconds_count"


@dataclass(frozen=True)
class Breakdown:
    observation: Observation
    steps: Steps  # those of the observed time
    num_ran: int  # steps that the server counted; as many as were seen, where it is not known
    basis: Basis
    tree: Node
    bare: Comparison | str  # a string says why there is none
    kinds: list[KindFigures]
    shares: AgentShares
    requests: RequestFigures | None
    transport: Transport | None
    ttft: Spread | None  # the client's, milliseconds
    notes: list[str]  # what else a reader must know
    broken: list[str]  # what must hold and does not
    advice: list[str]


def break_down(observation: Observation) -> Breakdown:
    """Raises ServingError if no step ran, ConfigError if it is no observation of this release."""
    every, out_of_order = read_steps(observation.trace)
    steps = every.where(every.column("done") > observation.since_ns)
    if not len(steps):
        raise ServingError(_nothing(observation))
    change = Change(observation.before, observation.after)
    load = observation.load
    client_ms = None if load is None else decode_ms(load)
    basis = Basis.of(steps, load.streams if load else None)
    if basis.rows is None:
        client_ms = None  # the tokens that the client saw came from other steps, too
    num_ran = max(len(steps), round(change.total(_STEPS_METRIC)))
    bare = compare_with_bare(observation, basis, client_ms)
    kinds = KindFigures.of_all(steps)
    shares = agent_shares(steps)
    requests = requests_of(load, change)
    tree = tree_of(basis, client_ms)
    facts = Facts(tree, bare, kinds, shares, requests, change, observation.info)
    return Breakdown(
        observation,
        steps,
        num_ran,
        basis,
        tree,
        bare,
        kinds,
        shares,
        requests,
        transport_of(change, num_ran),
        _ttft(load),
        _notes(observation, steps, num_ran, change),
        _broken(every, out_of_order),
        advice(facts),
    )


def _nothing(observation: Observation) -> str:
    if observation.seconds and observation.load is None:
        return (
            f"no step ran in the {observation.seconds:g} s it was watched: send requests "
            "meanwhile, or leave --watch out and it makes its own load"
        )
    return "the trace has no steps: nothing has run yet"


def _ttft(load: Load | None) -> Spread | None:
    answered = [r for r in (load.requests if load else ()) if r.error is None and r.token_ns]
    if not answered:
        return None
    return Spread.of(np.array([(r.token_ns[0] - r.sent_ns) / NS_PER_MS for r in answered]))


def _broken(every: Steps, out_of_order: list[int]) -> list[str]:
    broken = broken_sums(every)
    if out_of_order:
        ids = ", ".join(map(str, out_of_order[:5]))
        broken.append(
            f"the stamps of {len(out_of_order)} steps are not in order (step {ids}): left out"
        )
    return broken


def _notes(observation: Observation, steps: Steps, num_ran: int, change: Change) -> list[str]:
    notes = []
    if change.was_restarted:
        notes.append("the server was started again meanwhile: its counters are of the new run only")
    if num_ran > len(steps):
        notes.append(
            f"{num_ran} steps ran, and the trace still had the last {len(steps)} of them: all that "
            "is said of steps is said of those"
        )
    pauses = steps.pauses[steps.pauses > 0]
    if len(pauses):
        notes.append(
            f"pauses without work, {len(pauses)} of them and {pauses.sum() / 1e9:.3g} s together, "
            "are in no period"
        )
    ids = np.sort(steps.column("step_id"))
    if lost := int(np.maximum(np.diff(ids) - 1, 0).sum()):
        notes.append(f"{lost} steps left no record: they failed, or were lost with their agent")
    if observation.load is not None:
        notes += _load_notes(observation.load, change)
        if observation.info.get("precision"):
            notes.append(
                "the server writes logits: those of this load are among its files, and taking them "
                "is part of its steps"
            )
    return notes


def _load_notes(load: Load, change: Change) -> list[str]:
    notes = []
    errors = [request.error for request in load.requests if request.error]
    if errors:
        notes.append(f"{len(errors)} of {len(load.requests)} requests failed: {errors[0]}")
    own = sum(len(request.token_ns) for request in load.requests)
    generated = round(change.total("vllm:generation_tokens_total"))
    if generated > own and not errors:
        notes.append(
            f"others used the server, too: {generated - own} of {generated} generated tokens were "
            "not for this load"
        )
    if hits := round(change.total("vllm:prefix_cache_hits_total")):
        notes.append(f"{hits} prompt tokens came from the prefix cache and were not computed")
    lengths = {request.prompt_tokens for request in load.requests if not request.error}
    if lengths - {load.prompt_tokens}:
        found = ", ".join(map(str, sorted(lengths)))
        notes.append(f"prompts had {found} tokens, not {load.prompt_tokens}")
    return notes
