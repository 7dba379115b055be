"""Which requests are in a data set?  By the same rule as in the load test, which imports nothing.

A JSON list of {"instruction", "input", "output"}: the prompt is the instruction, or instruction +
":" + input where there is an input; max_new_tokens is the number of tokens of the output, clipped
to the context.  Taken in order, and from the start again when it is used up.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ConfigError

__all__ = ["Entry", "Plan", "Prompt", "read_dataset"]

_FORM = 'a JSON list of {"instruction": "...", "input": "...", "output": "..."}'


@dataclass(frozen=True, slots=True)
class Entry:
    prompt: str
    output: str


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: npt.NDArray[np.int32]
    max_new_tokens: int
    num_times: int  # how often it is sent; what comes out is always the same


@dataclass(frozen=True, slots=True)
class Plan:
    prompts: list[Prompt]
    num_requests: int
    num_clipped: int  # to what is left of the context behind the prompt
    num_impossible: int  # nothing is left of it

    @classmethod
    def of(
        cls,
        entries: Sequence[Entry],
        *,
        encode: Callable[[str, bool], Sequence[int]],
        max_total_tokens: int,
        max_requests: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Plan:
        """`encode` gets a text and whether special tokens are to be added, as for a prompt."""
        num_requests = len(entries) if max_requests is None else max_requests
        prompts, num_clipped, num_impossible = [], 0, 0
        for i, entry in enumerate(entries[:num_requests]):
            num_times = len(range(i, num_requests, len(entries)))
            ids = np.array(encode(entry.prompt, True), np.int32)
            wanted = max_new_tokens or max(1, len(encode(entry.output, False)))
            room = max_total_tokens - len(ids)
            num_clipped += num_times * (0 < room < wanted)
            num_impossible += num_times * (room < 1)
            if room >= 1:
                prompts.append(Prompt(ids, min(wanted, room), num_times))
        return cls(prompts, num_requests, num_clipped, num_impossible)


def read_dataset(path: pathlib.Path) -> list[Entry]:
    """Raises ConfigError, which names the file, the entry and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ConfigError(f"cannot read the data set {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the data set {path} is not UTF-8") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"the data set {path} is not JSON: {exc}; it should be {_FORM}") from exc
    if not isinstance(value, list) or not value:
        raise ConfigError(f"the data set {path} is not {_FORM}, or it is empty")
    return [_entry(entry, f"{path}, entry {i}") for i, entry in enumerate(value)]


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is a {type(value).__name__}; the file should be {_FORM}")
    optional = [] if value.get("input") is None else ["input"]
    instruction, output, *more = _texts(value, ["instruction", "output", *optional], where)
    prompt = f"{instruction}:{more[0]}" if more and more[0] else instruction
    if not prompt:
        raise ConfigError(f"{where} has an empty prompt")
    return Entry(prompt, output)


def _texts(value: dict[str, Any], names: Iterable[str], where: str) -> list[str]:
    texts = []
    for name in names:
        text = value.get(name)
        if not isinstance(text, str):
            what = f"a {type(text).__name__}" if name in value else "missing"
            raise ConfigError(f"{where}: {name!r} is {what}; it should be a text")
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise ConfigError(f"{where}: {name!r} holds half a character (a surrogate)") from exc
        texts.append(text)
    return texts
