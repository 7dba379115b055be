"""A load of its own: streams side by side, each of which asks again when it has been answered.

All streams begin a round together, with prompts that no cache knows, so that for most of a round
every one of them gets a token from every step: these tokens are what decoding is measured by.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llm_serving.diagnostics.breakdown.observation import ClientRequest, Load
from llm_serving.diagnostics.breakdown.server import Server, StreamOutcome
from llm_serving.errors import ConfigError, ServingError, Unavailable

__all__ = ["NUM_ROUNDS", "Shape", "check_shape", "decode_ms", "run_load", "warm_up"]

NUM_ROUNDS = 2
_WARM_UP_TOKENS = 4
_WORDS = """
    time way year work day part place case week point hand group fact eye life line word book
    home room side water month road night power hour door house paper music river letter light
    story north south summer winter morning garden window table glass bread stone field green
"""


@dataclass(frozen=True, slots=True)
class Shape:
    streams: int
    prompt_tokens: int
    new_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole load generates, the warm-up apart."""
        return NUM_ROUNDS * self.streams * self.new_tokens


def check_shape(shape: Shape, info: dict[str, Any]) -> None:
    """Raises ConfigError for a load that the server of this /info cannot take."""
    context = info.get("max_total_tokens")
    asked = shape.prompt_tokens + shape.new_tokens
    if isinstance(context, int) and asked > context:
        raise ConfigError(
            f"--prompt-tokens {shape.prompt_tokens} and --new-tokens {shape.new_tokens} are "
            f"{asked} together, more than the {context} of the server's context"
        )


class _Stopped(Exception):
    """The user has had enough."""


def run_load(server: Server, model: str, shape: Shape, on_tokens: Callable[[int], None]) -> Load:
    """All rounds.  Raises Unavailable if the server goes away, ServingError if nothing is answered.

    `on_tokens` is called from the threads of the streams.
    """
    stopping = threading.Event()

    def ask(round_index: int, stream: int) -> ClientRequest:
        def count(num_tokens: int) -> None:
            if stopping.is_set():
                raise _Stopped
            on_tokens(num_tokens)

        return _ask(server, model, shape, round_index, stream, count)

    with ThreadPoolExecutor(shape.streams) as pool:
        try:
            requests = [
                request
                for i in range(NUM_ROUNDS)
                for request in pool.map(ask, [i] * shape.streams, range(shape.streams))
            ]
        finally:
            stopping.set()
    errors = [request.error for request in requests if request.error is not None]
    if len(errors) == len(requests):
        raise ServingError(f"no request of the load was answered: {errors[0]}")
    return Load(shape.streams, shape.prompt_tokens, shape.new_tokens, requests)


def warm_up(server: Server, model: str, shape: Shape) -> None:
    """A short answer for every stream, so that no counted one pays for what happens only once."""
    short = Shape(shape.streams, shape.prompt_tokens, min(_WARM_UP_TOKENS, shape.new_tokens))
    with ThreadPoolExecutor(shape.streams) as pool:
        for _ in pool.map(
            lambda i: server.stream(model, _body(short, i), lambda _: None), range(shape.streams)
        ):
            pass


def decode_ms(load: Load) -> float | None:
    """Mean milliseconds between two tokens of a stream while all streams get tokens.

    None if there is no such time: a stream failed, or answers are too short.
    """
    total_ns = num_gaps = 0
    for i in range(NUM_ROUNDS):
        tokens = [r.token_ns for r in load.requests if r.round_index == i and not r.error]
        if len(tokens) < load.streams or not all(tokens):
            continue
        begin, end = max(t[0] for t in tokens), min(t[-1] for t in tokens)
        for stream in tokens:
            inside = [at for at in stream if begin <= at <= end]
            total_ns += inside[-1] - inside[0] if inside else 0
            num_gaps += max(0, len(inside) - 1)
    return total_ns / num_gaps / 1e6 if num_gaps else None


def _ask(
    server: Server,
    model: str,
    shape: Shape,
    round_index: int,
    stream: int,
    on_tokens: Callable[[int], None],
) -> ClientRequest:
    began_ns = time.monotonic_ns()
    try:
        outcome = server.stream(model, _body(shape, stream), on_tokens)
    except Unavailable:
        raise
    except ServingError as exc:
        now_ns = time.monotonic_ns()
        return ClientRequest(round_index, began_ns, [], now_ns, error=str(exc))
    return _answered(round_index, outcome)


def _answered(round_index: int, outcome: StreamOutcome) -> ClientRequest:
    timing, num_prompt = outcome.details.get("timing"), outcome.details.get("prompt_tokens")
    return ClientRequest(
        round_index,
        outcome.sent_ns,
        outcome.token_ns,
        outcome.end_ns,
        num_prompt if isinstance(num_prompt, int) else 0,
        {k: float(v) for k, v in timing.items()} if isinstance(timing, dict) else {},
    )


def _body(shape: Shape, stream: int) -> dict[str, Any]:
    """At least as many words as tokens are wanted; `truncate` leaves exactly so many tokens."""
    draw = random.Random(f"{time.time_ns()} {stream}")
    words = " ".join(draw.choices(_WORDS.split(), k=shape.prompt_tokens + 8))
    parameters = {
        "max_new_tokens": shape.new_tokens,
        "truncate": shape.prompt_tokens,
        "ignore_eos": True,
    }
    return {"inputs": words, "parameters": parameters}
