"""Which names the served model answers to."""

from __future__ import annotations

from collections.abc import Sequence

from llm_serving.api.errors import UnknownModel
from llm_serving.api.fields import came

__all__ = ["check_name"]

MAX_NAMED = 20


def check_name(name: str | None, served_names: Sequence[str]) -> None:
    """Raise UnknownModel, naming the known ones; None is a path or a body that names no model.

    A slash behind a name, as a base address may have it, is not part of it.
    """
    if name is not None and name.removesuffix("/") not in served_names:
        known = ", ".join(repr(served) for served in served_names[:MAX_NAMED])
        raise UnknownModel(f"no model is served as {came(name)}; known: {known}")
