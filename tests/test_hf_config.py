"""config.json in the words of transformers 4 and 5, and what is refused by the field's name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import transformers

from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelConfig, RopeScaling
from llm_serving.prepare.hf_config import read_architecture, read_model_config
from llm_serving.prepare.hf_fields import unknown_fields
from llm_serving.prepare.json_file import Fields

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}


def read(values: dict[str, Any]) -> ModelConfig:
    fields = Fields(values, "config.json")
    return read_model_config(fields, read_architecture(fields))


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_field_is_as_the_reference_understands_it(
    architecture: str, silent: bool, tmp_path: pathlib.Path
) -> None:
    """`silent`: the file leaves out whatever has a default, which then has to be the same."""
    sizes = {k: v for k, v in MINIMAL.items() if k != "architectures"}
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        sizes |= {"num_attention_heads": 32, "hidden_size": 128}  # 32 key heads are their default
    hf = FAMILIES[architecture](**sizes, architectures=[architecture])
    if architecture == "MistralForCausalLM":
        hf.num_attention_heads = sizes["num_attention_heads"] = 8
        hf.head_dim = 8
    values = sizes | {"architectures": [architecture]}
    if not silent:
        hf.save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
    ours = read(values)
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"""
    for name in names.split():
        assert getattr(ours, name) == getattr(hf, name), name
    assert ours.head_dim == (getattr(hf, "head_dim", None) or 128 // 32)
    assert ours.rope_theta == hf.rope_parameters["rope_theta"]
    assert ours.rope_scaling == RopeScaling()
    assert ours.sliding_window == hf.sliding_window if "Mistral" in architecture else True
    biased = architecture == "Qwen2ForCausalLM"
    assert (ours.qkv_bias, ours.o_bias, ours.mlp_bias) == (biased, False, False)
    assert ours.qk_norm == (architecture == "Qwen3ForCausalLM")


def test_flags_are_read() -> None:
    config = read(MINIMAL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)
    assert config.tie_word_embeddings
    qwen3 = MINIMAL | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}
    assert read(qwen3 | {"attention_bias": True, "head_dim": 16}).o_bias
    assert read(MINIMAL | {"head_dim": 32, "num_key_value_heads": 2}).head_dim == 32


def test_null_means_the_default_of_its_field() -> None:
    nothing = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}
    assert read(MINIMAL | nothing) == read(MINIMAL)
    mistral = MINIMAL | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 4}
    assert read(mistral | {"sliding_window": None}).sliding_window is None
    assert read(mistral | {"sliding_window": 64}).sliding_window == 64


def test_a_file_without_architectures_is_known_by_its_model_type() -> None:
    values = MINIMAL | {"architectures": None, "model_type": "qwen2"}
    assert read_architecture(Fields(values, "config.json")) == "Qwen2ForCausalLM"


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, RopeScaling()),
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        ({"type": "dynamic", "factor": 4.0}, RopeScaling("dynamic", 4.0)),
        (LLAMA3 | {"rope_type": "llama3"}, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            RopeScaling("yarn", 4.0, 512),
        ),
        ({"rope_type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 2048)),
        (YARN | {"mscale": 0, "mscale_all_dim": 0.0}, RopeScaling("yarn", 4.0, 2048)),
        (YARN | {"beta_fast": 0, "beta_slow": 0}, RopeScaling("yarn", 4.0, 2048)),
        (
            {
                "rope_type": "yarn",
                "original_max_position_embeddings": 512,
                "factor": None,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 1.5,
                "mscale_all_dim": 0.5,
                "truncate": False,
                "attention_factor": 1.25,
            },
            RopeScaling(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=512,
                beta_fast=16.0,
                beta_slow=2.0,
                mscale=1.5,
                mscale_all_dim=0.5,
                truncate=False,
                attention_factor=1.25,
            ),
        ),
    ],
)
def test_rope_is_read_in_both_generations_of_the_format(
    scaling: dict[str, Any], expected: RopeScaling
) -> None:
    old = read(MINIMAL | {"rope_theta": 500000.0, "rope_scaling": scaling})
    new = read(MINIMAL | {"rope_parameters": scaling | {"rope_theta": 500000.0}})
    assert old.rope_scaling == new.rope_scaling == expected
    assert old.rope_theta == new.rope_theta == 500000.0


def test_an_original_length_beside_the_scaling_wins() -> None:
    config = read(
        MINIMAL
        | {
            "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
            "original_max_position_embeddings": 1024,
        }
    )
    assert config.rope_scaling.original_max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("architectures", ["GemmaForCausalLM"], r"architectures = \['GemmaForCausalLM'\]"),
        ("architectures", [], r"architectures = \[\] is not supported, one of LlamaForCausalLM"),
        ("hidden_act", "gelu", "hidden_act = 'gelu' is not supported, 'silu'"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config = .*awq"),
        ("pretraining_tp", 2, "pretraining_tp = 2 is not supported"),
        ("use_sliding_window", True, "use_sliding_window = True is not supported"),
        ("num_local_experts", 8, "num_local_experts = 8 is not supported"),
        ("auto_map", {"AutoModelForCausalLM": "x.Y"}, "auto_map = .* is not supported"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50.0 is not supported"),
        ("final_logit_softcap", 30, "final_logit_softcap = 30 is not supported"),
        ("logit_scale", 3, "logit_scale = 3 is not supported, 1 is"),
        ("embedding_multiplier", 12, "embedding_multiplier = 12 is not supported, 1 is"),
        ("residual_multiplier", 0.22, "residual_multiplier = 0.22 is not supported"),
        ("attention_multiplier", 1, "attention_multiplier = 1 is not supported, leaving it out is"),
        ("query_pre_attn_scalar", 256, "query_pre_attn_scalar = 256 is not supported"),
        ("clip_qkv", 8, "clip_qkv = 8 is not supported"),
        ("use_qk_norm", True, "use_qk_norm = True is not supported, False is"),
        ("qk_layernorm", True, "qk_layernorm = True is not supported"),
        ("no_rope_layers", [1, 1, 1, 0], "no_rope_layers = .* is not supported"),
        ("attention_chunk_size", 8192, "attention_chunk_size = 8192 is not supported"),
        ("hidden_activation", "gelu_pytorch_tanh", "hidden_activation = 'gelu_pytorch_tanh'"),
        ("use_sandwich_norm", True, "use_sandwich_norm = True is not supported"),
        ("scale_emb", 12, "scale_emb = 12 is not supported"),
        ("scale_depth", 1.4, "scale_depth = 1.4 is not supported"),
        ("rope_scaling", YARN | {"mscale": -1}, "mscale = -1 is not supported, a number > 0"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5 is not supported"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types = .*sliding"),
        ("rope_scaling", {"rope_type": "longrope"}, "rope_type = 'longrope' is not supported"),
        ("rope_scaling", {"type": "su"}, "type = 'su' is not supported, default, linear"),
        ("rope_scaling", {"mrope_section": [1, 2]}, r"unknown key mrope_section = \[1, 2\]"),
        ("rope_scaling", {"full_attention": {}}, "unknown key full_attention"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling has no factor"),
        ("rope_scaling", {"type": "linear", "factor": 0.5}, "factor = 0.5 is not supported"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "factor = '2' is not supported"),
        ("rope_scaling", LLAMA3 | {"type": "llama3", "high_freq_factor": 1}, "high_freq_factor"),
        ("rope_scaling", "linear", "rope_scaling = 'linear' is not supported, an object is"),
        ("num_key_value_heads", 3, "num_key_value_heads = 3 is not supported, a divisor of 4"),
        ("hidden_size", 66, "hidden_size = 66 is not supported, a multiple of 4"),
        ("head_dim", 15, "head_dim = 15 is not even"),
        ("vocab_size", None, "config.json has no vocab_size"),
        ("num_hidden_layers", 0, "num_hidden_layers = 0 is not supported, a number >= 1"),
        ("hidden_size", "64", "hidden_size = '64' is not supported, an integer is"),
        ("rms_norm_eps", -1, "rms_norm_eps = -1 is not supported, a number > 0"),
        ("attention_bias", "yes", "attention_bias = 'yes' is not supported, true or false"),
    ],
)
def test_what_can_not_be_served_is_refused_by_field_and_value(
    field: str, value: Any, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read(MINIMAL | {field: value})


def test_inert_values_of_those_fields_are_accepted() -> None:
    inert = {
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention", "full_attention"],
        "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0},
        "logit_scale": 1.0,
        "final_logit_softcapping": None,
        "residual_multiplier": 1.0,
        "no_rope_layers": [],
        "use_qk_norm": False,
    }
    assert read(MINIMAL | inert) == read(MINIMAL)
    qwen3 = MINIMAL | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}
    assert read(qwen3 | {"use_qk_norm": True}) == read(qwen3)
    with pytest.raises(ConfigError, match="use_qk_norm = False is not supported, True is"):
        read(qwen3 | {"use_qk_norm": False})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_field_of_the_reference_is_known(architecture: str) -> None:
    hf = FAMILIES[architecture](rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert unknown_fields(Fields(hf.to_dict(), "config.json")) == []


def test_a_field_that_nobody_knows_is_told_and_one_that_is_refused_is_not() -> None:
    values = MINIMAL | {"frobnication": 3, "logit_scale": 1, "top_k": 50, "zeal": None}
    assert unknown_fields(Fields(values, "config.json")) == ["frobnication", "zeal"]
