"""What to look at first: sentences computed from the figures, the largest loss in front.

Every rule looks at one thing, is silent below its threshold, and shows the figure that it is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_serving.diagnostics.breakdown.bare import Comparison
from llm_serving.diagnostics.breakdown.metrics import Change
from llm_serving.diagnostics.breakdown.requests import RequestFigures
from llm_serving.diagnostics.breakdown.steps import AgentShares, KindFigures
from llm_serving.diagnostics.breakdown.tree import Node

__all__ = ["Facts", "advice"]

_IDLE, _SAMPLE, _AROUND, _ANSWER, _QUEUE, _TEXT, _CONTENTION = (
    0.05,
    0.1,
    0.05,
    0.02,
    0.2,
    0.05,
    0.05,
)
_MIXED, _NOISE = 1.5, 3.0  # times a decode step, times the median
_WHAT_HELPS = {
    "schedule": "it decides too late: num_steps_in_flight is below 2, or requests are very many",
    "build": "arrays of long block tables: a larger block_size makes them shorter",
    "shm write": "long block tables or penalties' histories; `diagnose` measures /dev/shm",
    "frame send": "the socket: `diagnose` measures the transport, a Unix socket may be faster",
    "frame receive": "the master was busy when the answer came: look at publish, or at its cores",
    "shm read": "top_n_tokens and logits make results large; `diagnose` measures /dev/shm",
    "update": "many requests end or begin in a step, or prefixes are long",
    "publish": "detokenising and writing events takes the master's time: many streams at once",
    "on the way (wake-ups, socket)": "processes wake late: cores shared with something else; see "
    "`diagnose`",
}


@dataclass(frozen=True, slots=True)
class Facts:
    tree: Node
    bare: Comparison | str
    kinds: list[KindFigures]
    shares: AgentShares
    requests: RequestFigures | None
    change: Change
    info: dict[str, Any]

    def kind(self, name: str) -> KindFigures | None:
        return next((kind for kind in self.kinds if kind.name == name), None)

    def limit(self, name: str) -> str:
        """A limit of the scheduler's, as it is now, in brackets."""
        value = (self.info.get("limits") or {}).get(name)
        return f"{name} (now {value})" if value is not None else name


def advice(facts: Facts) -> list[str]:
    """Sentences, the most important first: at least one."""
    rules = (
        *(_noise, _idle, _sample, _around, _answer, _mixed),
        *(_queue, _text, _contention, _preemption),
    )
    found = [hint for rule in rules if (hint := rule(facts)) is not None]
    found.sort(key=lambda hint: -hint[0])
    if found:
        return [sentence for _, sentence in found]
    service, model = facts.tree.children[:2]
    return [
        f"nothing stands out: the model is {_percent(model.ms / facts.tree.ms)} of a step and all "
        f"the rest {service.ms:.2f} ms; what is left to gain is in the model itself (kernels, "
        "weights, threads)"
    ]


_Hint = tuple[float, str] | None  # the share of time it is about, the sentence


def _idle(facts: Facts) -> _Hint:
    waits = facts.tree.children[0].children[0]
    share = waits.ms / facts.tree.ms
    if share <= _IDLE:
        return None
    most = max(waits.children, key=lambda node: node.ms)
    return share, (
        f"the agent waits for {_percent(share)} of a step ({waits.ms:.2f} ms), most of it for "
        f"{most.name} ({most.ms:.2f} ms): {_WHAT_HELPS.get(most.name, '')}"
    )


def _sample(facts: Facts) -> _Hint:
    sample = facts.tree.children[1].children[1]
    share = sample.ms / facts.tree.ms
    if share <= _SAMPLE:
        return None
    return share, (
        f"sampling is {_percent(share)} of a step ({sample.ms:.2f} ms): greedy requests cost "
        "least, top_p, typical_p and penalties over a large vocabulary most"
    )


def _around(facts: Facts) -> _Hint:
    prepare, write = facts.tree.children[0].children[1:3]
    share = (prepare.ms + write.ms) / facts.tree.ms
    if share <= _AROUND:
        return None
    return share, (
        f"the agent's own work around the model is {_percent(share)} of a step: preparation "
        f"{prepare.ms:.2f} ms, results {write.ms:.2f} ms"
    )


def _answer(facts: Facts) -> _Hint:
    _, beside, otherwise = facts.tree.children[0].children[2].children
    share = (beside.ms + otherwise.ms) / facts.tree.ms
    if share <= _ANSWER or beside.ms <= otherwise.ms:
        return None
    return share, (
        f"the agent needs {beside.ms + otherwise.ms:.2f} ms ({_percent(share)} of a step) to send "
        f"an answer, and for {beside.ms:.2f} ms of it the master is at work: it has been given the "
        "agent's core. Try agent.num_threads one lower, or GOMP_SPINCOUNT=1000 for the server"
    )


def _noise(facts: Facts) -> _Hint:
    decode = facts.kind("decode")
    if decode is None:
        return None
    forward = next(stage.spread for stage in decode.stages if stage.name == "forward")
    if forward.p99 <= _NOISE * forward.p50:
        return None
    return 1.0, (
        f"the forward of decode steps varies from {forward.p50:.1f} ms (p50) to {forward.p99:.1f} "
        "(p99): either numbers of rows differ much, or something else ran on these cores, and then "
        "measure again when it has ended"
    )


def _mixed(facts: Facts) -> _Hint:
    mixed, decode = facts.kind("mixed"), facts.kind("decode")
    if mixed is None or decode is None or mixed.period.mean <= _MIXED * decode.period.mean:
        return None
    steps_ms = sum(kind.count * kind.period.mean for kind in facts.kinds)
    share = mixed.count * (mixed.period.mean - decode.period.mean) / steps_ms
    if share <= 0.05:
        return None
    return share, (
        f"prompts delay decoding: a mixed step takes {mixed.period.mean:.1f} ms, a decode step "
        f"{decode.period.mean:.1f}; {mixed.count} mixed steps cost {_percent(share)} of all step "
        f"time. A smaller {facts.limit('max_step_stretch')} evens the gaps out, at the price of "
        "later first tokens"
    )


def _queue(facts: Facts) -> _Hint:
    if facts.requests is None or (share := facts.requests.share("queue")) <= _QUEUE:
        return None
    queue_ms = facts.requests.stages["queue"].mean
    return share, (
        f"requests wait in the queue for {_percent(share)} of their time ({queue_ms:.0f} ms): a "
        f"larger {facts.limit('max_num_seqs')} lets more run side by side, if the KV cache has room"
    )


def _text(facts: Facts) -> _Hint:
    stages = ("read", "validate", "tokenize", "detokenize", "send")
    if facts.requests is None or (share := facts.requests.share(*stages)) <= _TEXT:
        return None
    known = {
        name: facts.requests.stages[name].mean for name in stages if name in facts.requests.stages
    }
    most = max(known, key=lambda name: known[name])
    return share, (
        f"the front end's own stages are {_percent(share)} of a request, most of it {most} "
        f"({known[most]:.2f} ms): a slow reader at the other end, or too few cores here"
    )


def _contention(facts: Facts) -> _Hint:
    bare = facts.bare
    if isinstance(bare, str):
        return None
    bare_ms = bare.bare_ms if bare.bare_model_ms is None else bare.bare_model_ms
    share = (bare.served_model_ms - bare_ms) / bare.served_ms
    if share > _CONTENTION:
        return share, (
            f"the model itself is slower in service: {bare.served_model_ms:.2f} ms against "
            f"{bare_ms:.2f} in the bare loop ({_percent(share)} of a step): the front end, the "
            f"clients and the agent's {facts.info.get('num_threads', '')} threads share the cores; "
            "try agent.num_threads one lower, or clients on another machine"
        )
    if share < -_CONTENTION:
        return -share, (
            f"the bare loop was slower ({bare_ms:.2f} ms) than the model in service "
            f"({bare.served_model_ms:.2f} ms): the machine's speed has changed in between, measure "
            "again"
        )
    return None


def _preemption(facts: Facts) -> _Hint:
    count = round(facts.change.total("vllm:num_preemptions_total"))
    if not count:
        return None
    return 0.0, (
        f"{count} preemptions: requests were put back and computed again because the KV cache was "
        "full; kv_cache.num_blocks is too small for so many at once"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
