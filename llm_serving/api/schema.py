"""Which bodies the TGI family takes: every field, its default and what it allows.

The description of a field says what is allowed; the documentation shows it and an error repeats
it.  `read`, which serves every family, makes a model of a JSON value or raises InvalidRequest
naming the first field that is wrong, what came and what is allowed.
"""

from __future__ import annotations

import difflib
import functools
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from llm_serving.api.fields import Flag, Integer, Number, StopStrings, Text, came
from llm_serving.errors import InvalidRequest

__all__ = ["GenerateBody", "Parameters", "read"]

M = TypeVar("M", bound=BaseModel)

Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[Integer, Field(ge=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: Count | None = Field(
        None,
        description="an integer of at least 1, up to the room left in the context; not given: 300, "
        "or that room if it is less",
    )
    do_sample: Flag | None = Field(None, description="true or false")
    temperature: Positive | None = Field(
        None, description="a number above 0; other than 1 it turns sampling on"
    )
    top_k: Count | None = Field(None, description="an integer of at least 1; turns sampling on")
    top_p: Share | None = Field(
        None, description="a number above 0, up to 1; below 1 it turns sampling on"
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1; above 0 it turns sampling on"
    )
    typical_p: Share | None = Field(
        None, description="a number above 0, up to 1; below 1 it turns sampling on"
    )
    repetition_penalty: Positive | None = Field(
        None, description="a number above 0; 1 is no penalty"
    )
    presence_penalty: Penalty | None = Field(
        None, description="a number from -2 to 2; 0 is no penalty"
    )
    frequency_penalty: Penalty | None = Field(
        None, description="a number from -2 to 2; 0 is no penalty"
    )
    seed: Annotated[Integer, Field(ge=0, lt=2**64)] | None = Field(
        None, description="an integer from 0 to 2^64 - 1; not given: drawn, and reported"
    )
    stop: StopStrings | None = Field(
        None, description="a list of up to 16 non-empty strings; they are not part of the answer"
    )
    truncate: Count | None = Field(
        None, description="an integer of at least 1: the last so many prompt tokens are kept"
    )
    return_full_text: Flag | None = Field(None, description="true or false")
    details: Flag | None = Field(None, description="true or false")
    decoder_input_details: Flag | None = Field(None, description="false; true is not supported yet")
    top_n_tokens: Annotated[Integer, Field(ge=0, le=20)] | None = Field(
        None,
        description="an integer from 0 to 20: so many of the likeliest tokens beside each; other "
        "than 0 it needs details or stream, which show them",
    )
    best_of: Annotated[Integer, Field(ge=1, le=8)] | None = Field(
        None, description="1; from 2 to 8, sampling only, is not supported yet"
    )
    ignore_eos: Flag | None = Field(None, description="true or false; true is for benchmarks")
    timeout: Positive | None = Field(
        None,
        description="seconds from arrival, above 0 and up to the server's limit; covers queue "
        "and run",
    )
    grammar: Any = Field(None, description="null; a grammar is not supported yet")
    watermark: Flag | None = Field(None, description="false; watermarks are not supported")
    adapter_id: Any = Field(None, description="null; adapters are not supported yet")


class GenerateBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: Text = Field(description="a non-empty string: the raw prompt, special tokens included")
    parameters: Parameters | None = Field(None, description="an object of parameters")
    stream: Flag | None = Field(None, description="true or false: server-sent events or one answer")

    def given(self) -> Parameters:
        return self.parameters or Parameters.model_validate({})


def read(model: type[M], value: object) -> M:
    """`value` as a `model`.  Raises InvalidRequest, in a sentence of bounded length."""
    _refuse_unknown(model, value, "")
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        wrong = exc.errors(include_url=False, include_context=False)[0]
        raise InvalidRequest(_sentence(model, wrong)) from None


def _refuse_unknown(model: type[BaseModel], value: object, inside: str) -> None:
    """Before validation, which would list every one of them."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{inside or 'the body'}: {came(value)} came; allowed is an object")
    for key in value:
        if key not in model.model_fields:
            raise InvalidRequest(_unknown(key, model, inside))
    for name, part in _parts(model).items():
        if value.get(name) is not None:
            _refuse_unknown(part, value[name], name)


@functools.cache
def _parts(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields that hold an object with fields of its own."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = kind
    return found


def _unknown(key: str, model: type[BaseModel], inside: str) -> str:
    what = f"unknown field {came(key)}" + (f" in {inside}" if inside else "")
    for name, part in _parts(model).items():
        if key in part.model_fields:
            return f"{what}: it belongs in {name!r}"
    near = difflib.get_close_matches(key[:64], model.model_fields, 1, 0.0)
    return f"{what}; the nearest known one is {near[0]!r}" if near else what


def _sentence(model: type[BaseModel], wrong: ErrorDetails) -> str:
    """The field, what came, and what is allowed: the field's description."""
    name, *rest = (str(part) for part in wrong["loc"])
    field = model.model_fields[name]
    if rest and (part := _parts(model).get(name)) is not None:
        name, field = f"{name}.{rest[0]}", part.model_fields[rest[0]]
    what = "nothing" if wrong["type"] == "missing" else came(wrong["input"])
    return f"{name}: {what} came; allowed is {field.description}"
