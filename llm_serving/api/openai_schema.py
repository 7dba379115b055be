"""Which body `/v1/completions` takes: every field, its default and what it allows.

Unlike in the TGI family a value has its own JSON type: "true" is no boolean and "1" no number.
`null` means not given.  Behind OpenAI's own fields stand those that vLLM has added to them.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

from llm_serving.api.fields import StopStrings, Text

__all__ = ["MAX_LOGIT_BIASES", "CompletionBody", "StreamOptions"]

MAX_LOGIT_BIASES = 1024  # so many have room in a step, for every one of its requests
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _only_prompt(value: object) -> object:
    """The prompt of a list that holds one; anything else is for `Text` to judge."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIASES:
        raise ValueError("not an object of a few token ids")
    return {_token_id(key): _bias(bias) for key, bias in value.items()}


def _token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise ValueError("not a token id")
    return int(key)


def _bias(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    if not math.isfinite(value) or abs(value) > 100:
        raise ValueError("out of range")
    return float(value)


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
One = Annotated[StrictInt, Field(ge=1, le=1)]
Prompt = Annotated[Text, BeforeValidator(_only_prompt, json_schema_input_type=str | list[str])]
Stop = Annotated[StopStrings, BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
LogitBias = Annotated[
    dict[int, float], BeforeValidator(_biases, json_schema_input_type=dict[str, float])
]
_PENALTY = "a number from -2 to 2; 0, the default, is no penalty"


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: StrictBool | None = Field(
        None, description="true or false: one more chunk before the end, with the usage"
    )
    continuous_usage_stats: StrictBool | None = Field(
        None, description="true or false: the usage so far in every chunk (vLLM)"
    )
    include_obfuscation: Literal[False] | None = Field(
        None, description="false; padding that hides the lengths of chunks is not supported"
    )


class CompletionBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Text = Field(description="a name the model is served under")
    prompt: Prompt = Field(
        description="a non-empty string, or a list of one: the raw prompt, special tokens "
        "included; token ids and several prompts are not supported yet"
    )
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None,
        description="an integer of at least 1, up to the room left in the context; not given: 16",
    )
    temperature: Annotated[Number, Field(ge=0)] | None = Field(
        None, description="a number of at least 0; 0 is greedy; not given: 1, which samples"
    )
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1; 1, the default, keeps every token"
    )
    n: One | None = Field(None, description="1; more answers to one prompt are not supported yet")
    best_of: One | None = Field(None, description="1; more is not supported yet")
    stream: StrictBool | None = Field(
        None, description="true or false: server-sent events or one answer"
    )
    stream_options: StreamOptions | None = Field(
        None, description="an object of options; only with stream"
    )
    stop: Stop | None = Field(
        None,
        description="a non-empty string or a list of up to 16; they are not part of the answer",
    )
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = Field(
        None, description="an integer from -2^63 to 2^64 - 1; not given: drawn"
    )
    presence_penalty: Penalty | None = Field(None, description=_PENALTY)
    frequency_penalty: Penalty | None = Field(None, description=_PENALTY)
    logit_bias: LogitBias | None = Field(
        None,
        description="an object of up to 1024 token ids, as strings, with a number from -100 to 100 "
        "for each: it is added to the logit",
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = Field(
        None,
        description="null, or an integer from 0 to 5: the log-probability of each token, and of so "
        "many of the likeliest beside it",
    )
    echo: StrictBool | None = Field(
        None, description="true or false: the prompt in front of the text; not with logprobs yet"
    )
    suffix: None = Field(None, description="null; inserting text before a suffix is not supported")
    user: str | None = Field(None, description="a string; by definition it has no effect")

    ignore_eos: StrictBool | None = Field(
        None, description="true or false; true is for benchmarks (vLLM)"
    )
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None,
        description="an integer of at least 0, up to max_tokens: before so many tokens an EOS does "
        "not end the text (vLLM)",
    )
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = Field(
        None, description="an integer of at least 1; 0 and -1 keep every token (vLLM)"
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1; 0 keeps every token (vLLM)"
    )
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="a number above 0; 1 is no penalty (vLLM)"
    )
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="an integer of at least 1: the last so many prompt tokens are kept (vLLM)"
    )
