"""Whatever is sent, the answer is one of the documented ones, and nothing stays open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_serving.api.app import ApiSettings
from llm_serving.api.openai_schema import CompletionBody
from llm_serving.api.schema import Parameters
from tests.front_end import FrontEnd, RawCall, events_of, front_end, until

COMPLETIONS = "/v1/completions"
GENERATE = ["/generate", "/generate_stream", "/", "/models/llama2"]
PATHS = [*GENERATE, "/tokenize", "/detokenize", COMPLETIONS]
SMALL = ApiSettings(served_names=("llama2",), max_body_bytes=4000)
STATUSES = {200, 400, 413, 422}
COMPLETIONS_STATUSES = {200, 400, 404, 413}
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Post = Callable[[str, bytes], Any]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["True", "false", "0.5", "7", "1e400", "nan", "\ud800", "the cat", "<s>"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)
names = st.sampled_from(sorted(Parameters.model_fields)) | st.text(max_size=5)
parameters = st.dictionaries(names, values, max_size=4)
likely = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 12) | st.just("5")},
    optional={
        "do_sample": st.booleans() | st.just("True"),
        "temperature": st.floats(0, 5, exclude_min=True) | st.just("1e-30"),
        "top_k": st.integers(1, 2**70),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "typical_p": st.floats(0, 1, exclude_min=True),
        "repetition_penalty": st.floats(1e-300, 1e300),
        "frequency_penalty": st.floats(-2, 2),
        "seed": st.integers(0, 2**64 - 1),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=16),
        "truncate": st.integers(1, 2**70),
        "top_n_tokens": st.integers(0, 20),
        "details": st.booleans(),
        "return_full_text": st.booleans(),
        "timeout": st.floats(100, 600),
    },
).map(lambda given: given | {"details": True} if given.get("top_n_tokens") else given)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.text(max_size=12) | st.just("the cat") | values,
        "prompt": values,
        "tokens": st.lists(st.integers(-1, 60), max_size=5) | values,
        "parameters": parameters | likely | values,
        "stream": st.booleans() | values,
    },
)
completion_names = st.sampled_from(sorted(CompletionBody.model_fields)) | st.text(max_size=5)
completions = st.builds(
    lambda likely, more: likely | more,
    st.fixed_dictionaries(
        {"prompt": st.just("the cat") | values}, optional={"model": st.just("llama2") | values}
    ),
    st.dictionaries(completion_names, values, max_size=4),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
valid = st.builds(lambda inputs, given: {"inputs": inputs, "parameters": given}, texts, likely)
likely_completions = st.fixed_dictionaries(
    {"model": st.just("llama2"), "prompt": texts | st.lists(texts, min_size=1, max_size=1)},
    optional={
        "max_tokens": st.integers(12, 16),
        "temperature": st.floats(0, 5),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(-1, 2**70),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(1e-300, 1e300),
        "frequency_penalty": st.floats(-2, 2),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1), max_size=16),
        "logit_bias": st.dictionaries(st.integers(0, 49).map(str), st.floats(-100, 100)),
        "truncate_prompt_tokens": st.integers(1, 2**70),
        "min_tokens": st.integers(0, 12),
        "ignore_eos": st.booleans(),
        "user": st.text(),
    },
)
more_completions = st.sampled_from(
    [
        {"stream": False},
        {"echo": True},
        {"logprobs": 5},
        {"stream": True, "logprobs": 0},
        {"stream": True, "echo": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
    ]
)
valid_completions = st.builds(
    lambda given, more: given | more, likely_completions, more_completions
)
calls = st.tuples(st.sampled_from(GENERATE), valid) | st.tuples(
    st.just(COMPLETIONS), valid_completions
)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def front(runner: asyncio.Runner, tmp_path: pathlib.Path) -> Iterator[FrontEnd]:
    stack = contextlib.AsyncExitStack()
    yield runner.run(stack.enter_async_context(front_end(tmp_path, settings=SMALL)))
    runner.run(stack.aclose())


def check(runner: asyncio.Runner, front: FrontEnd, path: str, content: bytes) -> int:
    answer = runner.run(front.client.post(path, content=content))
    assert front.server.num_open == 0
    assert front.master.unhealthy_reason is None
    allowed = COMPLETIONS_STATUSES if path == COMPLETIONS else STATUSES
    assert answer.status_code in allowed
    if answer.status_code != 200:
        keys = ["error"] if path == COMPLETIONS else ["error", "error_type"]
        assert list(answer.json()) == keys
        assert len(answer.content) < 3000
    elif answer.headers["content-type"] != "text/event-stream":
        answer.json()
    elif path == COMPLETIONS:
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert events_of(answer.text)[-1]["details"] is not None
    return answer.status_code


@FUZZ
@given(path=st.sampled_from(PATHS), body=bodies | values)
def test_any_json_gets_a_documented_answer(
    runner: asyncio.Runner, front: FrontEnd, path: str, body: object
) -> None:
    check(runner, front, path, json.dumps(body).encode())


@FUZZ
@given(body=completions)
def test_any_completion_gets_a_documented_answer(
    runner: asyncio.Runner, front: FrontEnd, body: object
) -> None:
    check(runner, front, COMPLETIONS, json.dumps(body).encode())


@FUZZ
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=60) | st.text().map(str.encode))
def test_any_bytes_get_a_documented_answer(
    runner: asyncio.Runner, front: FrontEnd, path: str, content: bytes
) -> None:
    assert check(runner, front, path, content) != 200


@FUZZ
@given(call=calls)
def test_what_the_table_allows_is_served(
    runner: asyncio.Runner, front: FrontEnd, call: tuple[str, dict[str, Any]]
) -> None:
    path, body = call
    assert check(runner, front, path, json.dumps(body).encode()) == 200


@FUZZ
@given(call=calls, num_events=st.integers(0, 6))
def test_a_client_that_goes_away_at_any_time_leaves_nothing_open(
    runner: asyncio.Runner, front: FrontEnd, call: tuple[str, dict[str, Any]], num_events: int
) -> None:
    path, body = call

    async def scenario() -> None:
        raw = RawCall(front.app, path, body)
        await until(lambda: raw.task.done() or len(raw.pieces) >= num_events)
        raw.is_gone.set()
        await raw.task
        assert front.server.num_open == 0
        assert front.master.stats().num_running == 0

    runner.run(scenario())
