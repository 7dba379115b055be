"""What is asked, and how much of an answer: a JSON list of {"instruction", "input", "output"}.

The prompt is the instruction, or instruction + ":" + input where there is an input.  The output
is never sent: its length in tokens is what a request asks for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from load_test.errors import NotUsable

__all__ = ["Dataset", "Entry", "digest_of", "read_dataset"]

_FORM = 'a JSON list of {"instruction": "...", "input": "...", "output": "..."}'


@dataclass(frozen=True, slots=True)
class Entry:
    prompt: str
    output: str


@dataclass(frozen=True, slots=True)
class Dataset:
    path: str
    entries: Sequence[Entry]
    digest: str  # of all prompts and outputs


def digest_of(*texts: str) -> str:
    """A short name for texts that tells them from others."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:12]


def read_dataset(path: Path) -> Dataset:
    """Raises NotUsable, which names the file, the entry and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise NotUsable(f"cannot read the data set {path}: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise NotUsable(f"the data set {path} is not UTF-8") from None
    except (ValueError, RecursionError) as exc:
        raise NotUsable(f"the data set {path} is not JSON: {exc}; it should be {_FORM}") from None
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise NotUsable(f"the data set {path} is {what}; it should be {_FORM}")
    entries = [_entry(entry, f"{path}, entry {i}") for i, entry in enumerate(value)]
    texts = [text for entry in entries for text in (entry.prompt, entry.output)]
    return Dataset(str(path), entries, digest_of(*texts))


def _entry(value: object, where: str) -> Entry:
    if not isinstance(value, dict):
        raise NotUsable(f"{where} is a {type(value).__name__}; the file should be {_FORM}")
    instruction = _text(value, "instruction", where)
    more = _text(value, "input", where) if value.get("input") is not None else ""
    if not instruction and not more:
        raise NotUsable(f"{where} has an empty prompt")
    output = _text(value, "output", where)
    return Entry(f"{instruction}:{more}" if more else instruction, output)


def _text(value: dict[str, object], name: str, where: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        what = f"a {type(text).__name__}" if name in value else "missing"
        raise NotUsable(f"{where}: {name!r} is {what}; it should be a text")
    return text
