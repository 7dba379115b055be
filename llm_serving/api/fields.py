"""How a single value is read: lenient in its spelling, strict in its meaning.

A boolean may come as "True", a number as "0.5"; nothing else is converted, and NaN and Infinity
are no numbers.  `null` means not given: that is the `| None` of the models.
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, Field

__all__ = ["Flag", "Integer", "Number", "StopStrings", "Text", "TokenIds", "came"]

MAX_STOP_STRINGS = 16
MAX_ECHO = 60  # characters of a value that an error repeats

_FLAGS = {"True": True, "true": True, "False": False, "false": False}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_MAX_NUMBER_TEXT = 64


def came(value: object) -> str:
    """What came, in a few words, whatever its size."""
    match value:
        case str():
            return repr(value[:MAX_ECHO]) + "..." * (len(value) > MAX_ECHO)
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)[:MAX_ECHO]
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _FLAGS:
        return _FLAGS[value]
    raise ValueError("not a boolean")


def _number(value: object) -> int | float:
    if isinstance(value, str):
        value = _parse_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a number")
    return value


def _parse_number(text: str) -> int | float:
    if len(text) > _MAX_NUMBER_TEXT or not _NUMBER.fullmatch(text):
        raise ValueError("not a number")
    return int(text) if _WHOLE.fullmatch(text) else float(text)


def _integer(value: object) -> int:
    number = _number(value)
    if isinstance(number, float) and not number.is_integer():
        raise ValueError("not an integer")
    return int(number)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("not a non-empty string")
    value.encode()  # half of a surrogate pair is no text: a ValueError, too
    return value


def _stop_strings(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_STOP_STRINGS:
        raise ValueError("not a list of a few strings")
    return [_text(entry) for entry in value]


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("not a list of token ids")
    return [_integer(entry) for entry in value]


Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=bool | str)]
Text = Annotated[str, Field(min_length=1), BeforeValidator(_text)]
StopStrings = Annotated[
    list[str], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_stop_strings)
]
TokenIds = Annotated[list[int], BeforeValidator(_token_ids)]
# a bound is given inside: Annotated[Integer, Field(ge=1)] checks what these have read
Integer = Annotated[int, BeforeValidator(_integer, json_schema_input_type=int | str)]
Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float | str)]
