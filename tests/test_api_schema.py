"""What a body may say, and the sentence that refuses it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serving.api.body import MAX_NESTING, nesting, parse_json
from llm_serving.api.errors import MalformedBody
from llm_serving.api.schema import GenerateBody, Parameters, read
from llm_serving.api.tgi_request import is_sampled, to_request
from llm_serving.errors import InvalidRequest
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.server.llm_server import GenerationRequest

NUMBERS = ["temperature", "top_p", "min_p", "typical_p", "repetition_penalty"]
COUNTS = ["max_new_tokens", "top_k", "seed", "truncate", "top_n_tokens", "best_of"]
FLAGS = ["do_sample", "return_full_text", "details", "ignore_eos", "watermark"]
NO_NUMBERS = [True, "", " 1", "1 ", "0x1", "1_0", "nan", "inf", "1,5", "\u0661", [1], {}, "9" * 99]


AROUND: dict[str, Any] = {
    "is_streamed": True,
    "trace_id": "",
    "arrived_s": 0.0,
    "received_s": 0.0,
    "max_timeout_s": 600.0,
}


def body_of(**parameters: Any) -> GenerateBody:
    return read(GenerateBody, {"inputs": "x", "parameters": parameters})


def request_of(**parameters: Any) -> GenerationRequest:
    return to_request(body_of(**parameters), **AROUND)


def refusal(value: object) -> str:
    with pytest.raises(InvalidRequest) as caught:
        to_request(read(GenerateBody, value), **AROUND)
    return str(caught.value)


def refusal_of(**parameters: Any) -> str:
    return refusal({"inputs": "x", "parameters": parameters})


@pytest.mark.parametrize("spelling", [True, "True", "true"])
@pytest.mark.parametrize("name", ["do_sample", "return_full_text", "details", "ignore_eos"])
def test_a_boolean_may_come_as_text(name: str, spelling: object) -> None:
    assert getattr(body_of(**{name: spelling}).given(), name) is True


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, "TRUE", "yes", "", " true", [True], {"a": 1}, 1.0])
def test_anything_else_is_no_boolean(name: str, value: object) -> None:
    sentence = refusal_of(**{name: value})
    assert sentence.startswith(f"parameters.{name}: ")
    assert "false" in sentence


@pytest.mark.parametrize("name", [*NUMBERS, *COUNTS])
@pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_by_name(name: str, value: object) -> None:
    sentence = refusal_of(**{name: value})
    assert sentence.startswith(f"parameters.{name}: ")
    assert "allowed is " in sentence


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("temperature", "0.5", 0.5),
        ("temperature", ".5", 0.5),
        ("temperature", 2, 2.0),
        ("temperature", "1e-1", 0.1),
        ("top_k", "40", 40),
        ("top_k", 40.0, 40),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("presence_penalty", "-2", -2.0),
    ],
)
def test_a_number_may_come_as_text(name: str, value: object, meant: float) -> None:
    assert getattr(body_of(**{name: value}).given(), name) == meant


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("max_new_tokens", [1, 10**9], [0, -1, 1.5]),
        ("temperature", [1e-300, 1e300], [0, -1]),
        ("top_k", [1, 10**12], [0, -1, 0.5]),
        ("top_p", [1e-9, 1, "1.0"], [0, 1.0001, -0.1]),
        ("typical_p", [1e-9, 1], [0, 1.0001]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("repetition_penalty", [1e-9, 5], [0, -1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("seed", [0, 2**64 - 1], [-1, 2**64]),
        ("truncate", [1], [0, -5]),
        ("top_n_tokens", [0, 20], [-1, 21]),
        ("best_of", [1], [0, 9]),
        ("timeout", [0.001, 600], [0, -1, 600.1]),
        ("stop", [[], ["a"] * 16], ["a", ["a"] * 17, [""], [1], [None], {"a": "b"}, ["\ud800"]]),
    ],
)
def test_the_table_of_parameters_holds_at_its_bounds(
    name: str, inside: list[object], outside: list[object]
) -> None:
    for value in inside:
        request_of(**{name: value})
    for value in outside:
        assert refusal_of(**{name: value}).startswith(f"parameters.{name}: "), value


@pytest.mark.parametrize("name", sorted(Parameters.model_fields))
def test_null_means_not_given(name: str) -> None:
    drawn = "seed"
    given, absent = request_of(**{name: None}), request_of()
    assert type(given.sampling) is SamplingParams
    for field in SamplingParams.__slots__:
        if field != drawn:
            assert getattr(given.sampling, field) == getattr(absent.sampling, field)
    assert (given.max_new_tokens, given.stop, given.truncate, given.timeout_s) == (
        None,
        (),
        None,
        None,
    )


def test_a_seed_is_drawn_where_every_json_reader_keeps_it() -> None:
    seeds = {request_of().sampling.seed for _ in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**53 for seed in seeds)


@pytest.mark.parametrize(
    ("parameters", "is_on"),
    [
        ({}, False),
        ({"do_sample": False}, False),
        ({"do_sample": True}, True),
        ({"temperature": 1}, False),
        ({"temperature": 0.7, "do_sample": False}, True),
        ({"temperature": 1.5}, True),
        ({"top_k": 5, "do_sample": False}, True),
        ({"top_p": 1.0}, False),
        ({"top_p": 0.9}, True),
        ({"typical_p": 1.0}, False),
        ({"typical_p": 0.9}, True),
        ({"min_p": 0.0}, False),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.2}, False),
        ({"seed": 3}, False),
    ],
)
def test_parameters_imply_sampling_as_in_tgi(parameters: dict[str, Any], is_on: bool) -> None:
    sampling = request_of(**parameters).sampling
    assert is_sampled(body_of(**parameters).given()) is is_on
    wanted = float(parameters.get("temperature", 1.0)) if is_on else 0.0
    assert sampling.temperature == wanted


def test_every_parameter_of_sampling_arrives() -> None:
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.25,
        "min_p": 0.125,
        "typical_p": 0.75,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "seed": 2**63,
    }
    more = {"top_n_tokens": 3, "ignore_eos": True, "stop": ["a", "b"], "truncate": 9, "timeout": 2}
    request = request_of(**given, **more, max_new_tokens=11)
    assert {name: getattr(request.sampling, name) for name in given} == given
    assert (request.sampling.num_logprobs, request.sampling.ignore_eos) == (3, True)
    assert (request.stop, request.truncate, request.timeout_s) == (("a", "b"), 9, 2.0)
    assert request.max_new_tokens == 11


@pytest.mark.parametrize("name", ["temperature", "top_p", "typical_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e-300, 5e-324, 1.0])
def test_a_small_positive_number_stays_one_in_a_step_record(name: str, value: float) -> None:
    record = np.frombuffer(
        request_of(do_sample=True, **{name: value}).sampling.record(), SAMPLING_DTYPE
    )
    assert 0 < record[name][0] <= 1.0


@pytest.mark.parametrize(("name", "value"), [("temperature", 1e300), ("top_k", 2**40)])
def test_a_huge_number_fits_a_step_record(name: str, value: float) -> None:
    record = np.frombuffer(request_of(**{name: value}).sampling.record(), SAMPLING_DTYPE)
    assert 0 < record[name][0] < math.inf


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"grammar": {"type": "json", "value": {}}}, "grammar is not supported yet"),
        ({"decoder_input_details": True}, "decoder_input_details: true is not supported yet"),
        ({"best_of": 2, "do_sample": True}, "best_of: more than 1 is not supported yet"),
        ({"best_of": 2}, "best_of: more than 1 needs sampling"),
        ({"watermark": True}, "watermark: true is not supported"),
        ({"adapter_id": "a"}, "adapter_id is not supported yet"),
    ],
)
def test_what_is_not_supported_says_so(parameters: dict[str, Any], words: str) -> None:
    assert words in refusal_of(**parameters)


def test_inert_values_of_what_is_not_supported_pass() -> None:
    inert = {"grammar": None, "decoder_input_details": False, "best_of": 1, "watermark": "False"}
    assert request_of(**inert, adapter_id=None).sampling.temperature == 0.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"inputs": "x", "parameters": {"temprature": 1}},
            "the nearest known one is 'temperature'",
        ),
        ({"inputs": "x", "max_new_tokens": 5}, "'max_new_tokens': it belongs in 'parameters'"),
        ({"input": "x"}, "unknown field 'input'; the nearest known one is 'inputs'"),
        ({"inputs": "x", "": 1}, "unknown field ''"),
        ({"inputs": "x", "parameters": []}, "parameters: a list of 0 came; allowed is an object"),
        ({"inputs": "x", "parameters": "a"}, "parameters: 'a' came"),
        ({"inputs": ""}, "inputs: '' came; allowed is a non-empty string"),
        ({"inputs": None}, "inputs: null came"),
        ({"inputs": ["x"]}, "inputs: a list of 1 came"),
        ({"inputs": "\ud800"}, r"inputs: '\ud800' came"),
        ({}, "inputs: nothing came"),
        ({"inputs": "x", "stream": "yes"}, "stream: 'yes' came; allowed is true or false"),
        ([], "the body: a list of 0 came; allowed is an object"),
        ("x", "the body: 'x' came; allowed is an object"),
        (None, "the body: null came"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_allowed(value: object, words: str) -> None:
    assert words in refusal(value)


def test_a_refusal_never_repeats_a_large_value() -> None:
    large = "x" * 1_000_000
    for value in (
        {"inputs": "x", "parameters": {"temperature": large}},
        {"inputs": "x", "parameters": {large: 1}},
        {"inputs": "x", "parameters": {"stop": [large] * 17}},
        {"inputs": "x", "parameters": {"seed": [large]}},
        {"inputs": "x", large: 1},
        {"inputs": "x", "parameters": dict.fromkeys(map(str, range(100_000)))},
    ):
        assert len(refusal(value)) < 300


@given(depth=st.integers(1, 200), filler=st.sampled_from(["", '"[[[["', r'"\"[{"', r'"\\"']))
def test_nesting_is_counted_outside_strings_only(depth: int, filler: str) -> None:
    inner = f"[{filler}]"
    text = "[" * (depth - 1) + inner + "]" * (depth - 1)
    assert nesting(text.encode()) == depth
    if depth <= MAX_NESTING:
        assert parse_json(text.encode()) is not None
    else:
        with pytest.raises(MalformedBody, match="deeper than 64"):
            parse_json(text.encode())


@given(
    value=st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_nesting_is_that_of_the_value(value: object) -> None:
    def depth(value: object) -> int:
        match value:
            case dict():
                return 1 + max(map(depth, value.values()), default=0)
            case list():
                return 1 + max(map(depth, value), default=0)
        return 0

    assert nesting(json.dumps(value).encode()) == depth(value)


def test_brackets_in_a_long_string_are_no_nesting() -> None:
    body = json.dumps({"inputs": '[{\\"' * 1000}).encode()
    assert parse_json(body) == json.loads(body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{'a': 1}", b"\xff", b"\xef\xbb\xbf{}", b"[1,]", b"nul", b"1 2", b"[" * 99]
)
def test_what_is_no_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse_json(body)


def test_a_key_given_twice_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="'a' is given twice"):
        parse_json(b'{"b": [{"a": 1, "c": 2, "a": 1}]}')


def test_a_number_of_a_million_digits_is_read_without_harm() -> None:
    value = parse_json(b'{"inputs": "x", "parameters": {"seed": ' + b"1" * 1_000_000 + b"}}")
    assert refusal(value).startswith("parameters.seed: inf came")
