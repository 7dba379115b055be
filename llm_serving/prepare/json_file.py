"""JSON objects that came with a model: read, and asked for fields with their types checked."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import msgspec

from llm_serving.errors import ConfigError

__all__ = ["Fields", "read_object"]


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in `path`, None if there is no such file; ConfigError if it is something else."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {value!r:.60}")
    return value


class Fields:
    """An object with the name of the file it came from; every complaint names file and field."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None = None) -> int:
        """A number >= 1.  Missing or null: `default`; ConfigError if there is none."""
        value = self.optional_integer(name, default)
        if value is None:
            raise ConfigError(f"{self.where} has no {name}")
        if value < 1:
            raise self.unsupported(name, "a number >= 1")
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.unsupported(name, "an integer")
        return value

    def number(self, name: str, default: float | None) -> float:
        """A finite number > 0.  Missing or null: `default`; ConfigError if there is none."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where} has no {name}")
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not 0 < value < math.inf:
            raise self.unsupported(name, "a number > 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.unsupported(name, "true or false")
        return value

    def ids(self, name: str) -> list[int] | None:
        """One token id or a list of them, as a list; None if missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.unsupported(name, "a token id or a list of them")
        return ids

    def unsupported(self, name: str, supported: str) -> ConfigError:
        value = self.values.get(name)
        return ConfigError(
            f"{self.where}: {name} = {value!r:.100} is not supported, {supported} is"
        )
