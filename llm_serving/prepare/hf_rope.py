"""Which rotary scaling does a config.json ask for?

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`.  A key
that no supported type knows is refused; one that another type uses is ignored, as the reference
does.
"""

from __future__ import annotations

from typing import Any

from llm_serving.errors import ConfigError
from llm_serving.model_card import RopeScaling
from llm_serving.prepare.json_file import Fields

__all__ = ["read_rope"]

_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
_ZERO_IS_ABSENT = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}  # to the reference
_OPTIONAL = _ZERO_IS_ABSENT | {"attention_factor"}
_KNOWN = {key for keys in _NUMBERS.values() for key in keys} | {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "truncate",
}


def read_rope(config: Fields, longest: int) -> tuple[float, RopeScaling]:
    """(rope_theta, scaling) of a model for `longest` positions.

    Raises ConfigError naming the key that can not be served.
    """
    given = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise config.unsupported("rope_scaling", "an object")
    rope = Fields(given, f"{config.where}: rope_scaling")
    for key, value in given.items():
        if key not in _KNOWN:
            raise ConfigError(f"{rope.where}: unknown key {key} = {value!r:.60}")
    for fields in (rope, config):
        if fields.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise fields.unsupported("partial_rotary_factor", "1 (the whole head)")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    name = "rope_type" if "rope_type" in given else "type"
    kind = given.get(name) or "default"
    if kind not in _NUMBERS:
        raise rope.unsupported(name, ", ".join(_NUMBERS))
    return theta, _scaling(kind, rope, config, longest)


def _scaling(kind: Any, rope: Fields, config: Fields, longest: int) -> RopeScaling:
    values: dict[str, Any] = {"rope_type": kind}
    if kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"  # beside the scaling it wins, as in the reference
        values[name] = config.integer(name, rope.integer(name, longest))
    if kind == "yarn":
        values["truncate"] = rope.flag("truncate", True)
        if rope.values.get("factor") is None:
            values["factor"] = longest / values["original_max_position_embeddings"]
    for key in _NUMBERS[kind]:
        absent = (None, 0) if key in _ZERO_IS_ABSENT else (None,)
        if key not in values and not (key in _OPTIONAL and rope.values.get(key) in absent):
            values[key] = rope.number(key, None)
    if values.get("factor", 1.0) < 1:
        raise rope.unsupported("factor", "a number >= 1")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise rope.unsupported("high_freq_factor", "a number above low_freq_factor")
    return RopeScaling(**values)
