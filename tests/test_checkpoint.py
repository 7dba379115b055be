"""Does a model get exactly the weights of its checkpoint, and nothing else pass?"""

from __future__ import annotations

import pathlib
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_serving.errors import ConfigError
from llm_serving.model_card import DERIVED_TENSORS, ModelCard
from llm_serving.models.checkpoint import load_weights
from tests.tiny_models import DTYPES, build_twin, load_model

torch.set_num_threads(1)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def rewrite(card: ModelCard, change: Any) -> None:
    """Apply `change` to the dict of a card's tensors."""
    (file,) = card.weights
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


@pytest.fixture
def card(tmp_path: pathlib.Path) -> ModelCard:
    return build_twin(tmp_path).card


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_float_dtype_is_converted_to_the_one_that_is_served(
    card: ModelCard, stored: str, wanted: Any
) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.to(DTYPES[stored]) for name, tensor in tensors.items()}

    rewrite(card, convert)
    expected = load_file(card.weights[0])
    found = load_model(msgspec.structs.replace(card, dtype=wanted)).tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == DTYPES[wanted]
        assert torch.equal(tensor, expected[name].to(DTYPES[wanted])), name


def test_the_parts_of_a_fused_layer_lie_below_each_other(card: ModelCard) -> None:
    stored = load_file(card.weights[0])
    attention = load_model(card).layers[1].attention
    parts = [stored[Q_PROJ.replace("q_proj", f"{part}_proj")] for part in "qkv"]
    assert torch.equal(attention.qkv.weight, torch.cat(parts))  # type: ignore[attr-defined]


def test_several_shards_are_one_model(tmp_path: pathlib.Path) -> None:
    card = build_twin(tmp_path, shard_size="60KB").card
    assert len(card.weights) > 2
    stored = {name: t for file in card.weights for name, t in load_file(file).items()}
    found = load_model(card).tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert found.keys() == stored.keys()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(Q_PROJ), f"lacks {Q_PROJ}"),
        (lambda t: [t.pop(n) for n in list(t) if "mlp" in n], "mlp.down_proj.weight.* and 6 more"),
        (lambda t: t.update({"a.bias": torch.ones(2)}), "a.bias has no place"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}),
            rf"{Q_PROJ} has shape \[47, 48\].*\[48, 48\]",
        ),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)}), f"{Q_PROJ} holds torch.int8"),
    ],
)
def test_a_checkpoint_that_is_not_the_model_is_refused_with_the_tensor_named(
    card: ModelCard, change: Any, problem: str
) -> None:
    rewrite(card, change)
    with pytest.raises(ConfigError, match=problem):
        load_model(card)


@pytest.mark.parametrize("num_bytes", [0, 5, 300, -1])
def test_a_truncated_file_is_refused_by_name(card: ModelCard, num_bytes: int) -> None:
    file = pathlib.Path(card.weights[0])
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ConfigError, match=f"{file} is no complete safetensors file"):
        load_model(card)


def test_a_missing_file_is_refused_by_name(card: ModelCard) -> None:
    pathlib.Path(card.weights[0]).unlink()
    with pytest.raises(ConfigError, match=f"{card.weights[0]}"):
        load_model(card)


def test_a_tensor_that_two_files_hold_is_refused(card: ModelCard, tmp_path: pathlib.Path) -> None:
    again = tmp_path / "again.safetensors"
    save_file({Q_PROJ: load_file(card.weights[0])[Q_PROJ]}, again)
    with pytest.raises(ConfigError, match=f"{Q_PROJ} is also in {card.weights[0]}"):
        load_model(msgspec.structs.replace(card, weights=[*card.weights, str(again)]))


@pytest.mark.parametrize("ending", DERIVED_TENSORS)
def test_buffers_that_follow_from_the_config_are_ignored(card: ModelCard, ending: str) -> None:
    name = f"model.layers.0.self_attn{ending}"
    rewrite(card, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert name not in load_model(card).tensors()


def test_a_tied_head_may_lie_in_the_file_if_it_is_the_embedding(tmp_path: pathlib.Path) -> None:
    card = build_twin(tmp_path, tie_word_embeddings=True).card
    embedding = load_file(card.weights[0])["model.embed_tokens.weight"]
    rewrite(card, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(load_model(card).tensors()["model.embed_tokens.weight"], embedding)
    rewrite(card, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(card)


def test_weights_are_copied_into_memory_that_is_already_there(card: ModelCard) -> None:
    targets = {name: torch.zeros_like(t) for name, t in load_file(card.weights[0]).items()}
    addresses = {name: tensor.data_ptr() for name, tensor in targets.items()}
    load_weights(card.weights, targets)
    assert {name: tensor.data_ptr() for name, tensor in targets.items()} == addresses
    assert all(tensor.any() for tensor in targets.values())
