from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_test.dialects import ErrorEvent, OpenAI, Seen, Tgi
from load_test.sse import BadEvent, EventBuffer

from tests.load_results import request

STREAM = (
    b'data: {"a": 1}\n\n: comment\ndata:two\r\ndata: lines\r\n\r\n'
    b"event: x\nid: 3\n\ndata: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", b"[DONE]"]


def event(value: object) -> bytes:
    return json.dumps(value).encode()


def choice(text: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"text": text, "finish_reason": reason}]})


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_are_whole_whatever_pieces_they_come_in(cuts: list[int]) -> None:
    buffer, found = EventBuffer(), []
    borders = [0, *sorted(cuts), len(STREAM)]
    for start, stop in pairwise(borders):
        found += buffer.feed(STREAM[start:stop])
    assert found == EVENTS


def test_a_last_event_without_its_blank_line_is_not_lost() -> None:
    buffer = EventBuffer()
    assert buffer.feed(b"data: [DONE]") == []
    assert buffer.flush() == [b"[DONE]"]
    assert buffer.flush() == []


def test_what_is_no_event_is_refused_with_the_line() -> None:
    with pytest.raises(BadEvent, match="<html>"):
        EventBuffer().feed(b"<html>\n")


def test_tgi_asks_greedily_for_so_many_tokens() -> None:
    dialect = Tgi("a/b")
    assert dialect.path == "/models/a%2Fb/generate"
    parameters = {"max_new_tokens": 7, "do_sample": False}
    assert json.loads(dialect.body("hé", 7)) == {
        "inputs": "hé",
        "parameters": parameters,
        "stream": True,
    }
    assert json.loads(Tgi("m", ignore_eos=True).body("h", 7))["parameters"]["ignore_eos"] is True


def test_openai_asks_greedily_for_so_many_tokens_and_their_count() -> None:
    dialect = OpenAI("m")
    assert dialect.path == "/v1/completions"
    assert json.loads(dialect.body("h", 7)) == {
        "model": "m",
        "prompt": "h",
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_last_event_of_tgi_tells_counts_reason_and_timing() -> None:
    record = request(0, 0.0, [], output_tokens=0)
    dialect = Tgi("m")
    token: dict[str, Any] = {"token": {"id": 5, "text": "a"}, "details": None}
    assert dialect.read(event(token), record) == Seen(True, False)
    details = {"finish_reason": "eos_token", "generated_tokens": 9, "prompt_tokens": 4}
    timing = {"queue": 1.5, "model": "m", "send": None, "is_last": True}
    last = token | {"generated_text": "a", "details": details | {"timing": timing}}
    assert dialect.read(event(last), record) == Seen(True, True)
    assert (record.output_tokens, record.prompt_tokens) == (9, 4)
    assert (record.finish_reason, record.timing) == ("eos_token", {"queue": 1.5})


def test_the_event_of_a_deadline_is_not_a_token() -> None:
    details = {"finish_reason": "timeout", "generated_tokens": 2, "prompt_tokens": 4}
    last = {"token": {"id": -1, "text": ""}, "generated_text": "a", "details": details}
    assert Tgi("m").read(event(last), request(0, 0.0, [])) == Seen(False, True)


def test_openai_counts_by_usage_and_ends_with_done() -> None:
    record = request(0, 0.0, [], output_tokens=0)
    dialect = OpenAI("m")
    assert dialect.read(choice("a"), record) == Seen(True, False)
    assert dialect.read(choice(""), record) == Seen(True, False)  # half of a character
    record.token_s = [1.0, 2.0]
    assert dialect.read(choice("", "length"), record) == Seen(False, False)
    usage = {"choices": [], "usage": {"completion_tokens": 6, "prompt_tokens": 4}}
    assert dialect.read(event(usage), record) == Seen(False, False)
    assert dialect.read(b"[DONE]", record) == Seen(False, True)
    assert (record.output_tokens, record.prompt_tokens) == (6, 4)
    assert record.finish_reason == "length"


@pytest.mark.parametrize(("num_told", "num_seen"), [(3, 3), (2, 2), (7, 2)])
def test_openai_s_last_token_without_text_is_one_if_the_usage_counts_it(
    num_told: int, num_seen: int
) -> None:
    """llama.cpp's event of the end is no token, vLLM's and ours are."""
    record, dialect = request(0, 0.0, [], output_tokens=0), OpenAI("m")
    events: list[dict[str, Any]] = [
        {"choices": [{"text": text, "finish_reason": reason}]}
        for text, reason in (("a", None), ("b", None), ("", "stop"))
    ]
    events.append({"choices": [], "usage": {"completion_tokens": num_told}})
    for i, value in enumerate(events):
        if dialect.read(event(value), record).has_token:
            record.token_s.append(float(i))
    assert len(record.token_s) == num_seen
    assert record.output_tokens == num_told


def test_an_answer_of_an_end_token_alone_has_a_first_token() -> None:
    record = request(0, 0.0, [], output_tokens=0)
    assert OpenAI("m").read(choice("", "stop"), record) == Seen(True, False)


@pytest.mark.parametrize("dialect", [Tgi("m"), OpenAI("m")])
@pytest.mark.parametrize("data", [b"{", b"[1]", b"{}", b"\xff"])
def test_an_event_that_says_nothing_is_refused(dialect: Tgi | OpenAI, data: bytes) -> None:
    with pytest.raises(BadEvent):
        dialect.read(data, request(0, 0.0, []))


@pytest.mark.parametrize("dialect", [Tgi("m"), OpenAI("m")])
@pytest.mark.parametrize("error", ["it broke", {"message": "it broke", "type": "x"}])
def test_an_error_in_a_stream_is_its_message(dialect: Tgi | OpenAI, error: object) -> None:
    with pytest.raises(ErrorEvent, match=r"^it broke$"):
        dialect.read(event({"error": error}), request(0, 0.0, []))
