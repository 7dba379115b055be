"""What a server calls its logits is what the documented tolerances go by."""

from __future__ import annotations

import msgspec
import pytest

from llm_serving.commands.evidence import dump_labels
from llm_serving.model_card import ModelCard
from llm_serving.precision.manifest import Labels
from llm_serving.precision.tolerances import documented
from llm_serving.protocol import Ready


@pytest.mark.parametrize(
    ("dtype", "packed_as", "kv_dtype", "atol"),
    [
        ("float32", "float32", "float32", 5e-4),
        ("float32", "native", "float32", 4.0),
        ("float32", "float32", "int8", 2.0),
        ("float32", "native", "int8", 2.5),
        ("bfloat16", "bfloat16", "bfloat16", 0.75),
        ("bfloat16", "native", "bfloat16", 2.5),
        ("bfloat16", "int8", "bfloat16", 7.0),
        ("bfloat16", "bfloat16", "int8", 1.5),
        ("bfloat16", "native", "int8", 2.5),
        ("bfloat16", "int8", "int8", 7.5),
    ],
)
def test_every_form_of_weights_and_cache_has_its_tolerance(
    smollm2_card: ModelCard, dtype: str, packed_as: str, kv_dtype: str, atol: float
) -> None:
    card = msgspec.structs.replace(smollm2_card, dtype=dtype, packed_as=packed_as)
    kernels = {"linear": "native (avx512)", "attention": "native (avx512)"}
    ready = Ready(0, 0, 1, 16, 49152, 64, dtype, "cpu", kernels, {}, kv_dtype=kv_dtype)
    found = documented(Labels(**dump_labels(card, ready)))
    assert (found.atol, found.origin) == (atol, "documented")
