"""GGUF files: what is read from them, how they are converted, and what is refused by name."""

from __future__ import annotations

import math
import os
import pathlib
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from gguf import GGML_QUANT_SIZES, dequantize, quantize
from gguf import GGMLQuantizationType as Quant
from safetensors.torch import load_file

from llm_serving.errors import ConfigError
from llm_serving.model_card import Dtype, ModelConfig, RopeScaling
from llm_serving.prepare.dtypes import cast
from llm_serving.prepare.gguf_file import GgufFile
from llm_serving.prepare.gguf_model import main_type, read_gguf_model
from llm_serving.prepare.gguf_rope import llama3_divisors
from llm_serving.prepare.gguf_tokenizer import bos_and_eos_ids, build_gguf_tokenizer
from llm_serving.prepare.gguf_weights import convert_weights, gguf_name
from llm_serving.prepare.progress import Quiet
from tests.tiny_gguf import (
    CONFIG,
    TOKENS,
    Array,
    from_hf,
    metadata,
    random_tensors,
    stored,
    write_gguf,
)

torch.set_num_threads(1)
TORCH: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.scores": [-float(index) for index in range(len(TOKENS))],
    "tokenizer.ggml.add_bos_token": True,
}


def convert(path: pathlib.Path, dtype: Dtype = "float32") -> dict[str, torch.Tensor]:
    file = GgufFile(path)
    architecture, config = read_gguf_model(file)
    out = path.with_suffix(".safetensors")
    convert_weights(file, architecture, config, dtype, out, Quiet())
    return load_file(out)


def config_of(path: pathlib.Path) -> ModelConfig:
    return read_gguf_model(GgufFile(path))[1]


def raw_blocks(kind: Quant, weight: Array) -> Array:
    """`weight` quantised; for the K types, which the package can not write, random blocks."""
    if not kind.name.endswith("_K"):
        return np.asarray(quantize(weight, kind))
    block, width = GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    random = np.random.default_rng(rows * columns)
    raw = random.integers(0, 256, (rows, columns // block, width), np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    where = [slice(width - 2, width)] if kind == Quant.Q6_K else [slice(0, 2), slice(2, 4)]
    for each in where:
        raw[..., each] = scale  # any bytes are valid but those of an infinite scale
    return raw.reshape(rows, -1)


QUANTS = [Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_1]
QUANTS += [Quant.Q4_K, Quant.Q5_K, Quant.Q6_K]


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("kind", QUANTS, ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_the_gguf_package_does(
    tmp_path: pathlib.Path, kind: Quant, dtype: Dtype
) -> None:
    config = msgspec.structs.replace(CONFIG, num_hidden_layers=1)
    tensors, expected = {}, {}
    for name, weight in random_tensors(config).items():
        packed = weight if weight.ndim == 1 else raw_blocks(kind, stored(name, weight, config))
        tensors[gguf_name(name)] = (packed, Quant.F32 if weight.ndim == 1 else kind)
        plain = dequantize(packed, tensors[gguf_name(name)][1])
        expected[name] = torch.from_numpy(unstored(name, plain, config)).to(TORCH[dtype])
    path = write_gguf(tmp_path / "m.gguf", tensors, metadata(config))
    found = convert(path, dtype)
    assert main_type(GgufFile(path)) == kind.name
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def unstored(name: str, weight: Array, config: ModelConfig) -> Array:
    """The inverse of `stored`, found by moving row numbers there."""
    numbers = np.arange(len(weight), dtype=np.float32)
    back = np.argsort(stored(name, numbers, config))
    return np.ascontiguousarray(weight[back])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_model_of_the_reference_library_comes_back_exactly(
    tmp_path: pathlib.Path, arch: str
) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    if arch == "llama":
        hf: Any = transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
    elif arch == "qwen2":
        hf = transformers.Qwen2Config(**sizes, tie_word_embeddings=True)
    else:
        hf = transformers.Qwen3Config(**sizes, head_dim=32)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(hf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # biases, too
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    config = ModelConfig(
        **sizes,
        head_dim=32 if arch == "qwen3" else 16,
        rms_norm_eps=1e-6,
        tie_word_embeddings=arch == "qwen2",
        qkv_bias=arch != "qwen3",
        o_bias=arch == "llama",
        mlp_bias=arch == "llama",
        qk_norm=arch == "qwen3",
    )
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    path = write_gguf(
        tmp_path / "m.gguf", from_hf(arrays, config, arch), metadata(config, arch), arch=arch
    )
    assert read_gguf_model(GgufFile(path)) == (type(model).__name__, config)
    found = convert(path)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def test_one_and_zero_and_everything_between_round_to_nearest_even() -> None:
    bits = np.arange(0, 1 << 32, 997, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    found = torch.frombuffer(bytearray(cast(values, "bfloat16", "w")), dtype=torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_a_value_beyond_float16_is_named_not_made_infinite(tmp_path: pathlib.Path) -> None:
    tensors = from_hf(random_tensors())
    tensors["blk.1.ffn_up.weight"][0][3, 5] = 1e6
    path = write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(
        ConfigError, match=r"layers.1.mlp.up_proj.weight holds values beyond float16"
    ):
        convert(path, "float16")


# ---- rotary scaling ----


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, RopeScaling()),
        ({"rope.scaling.type": "none"}, RopeScaling()),
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
            RopeScaling("linear", 2.0),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            RopeScaling("yarn", 4.0, 32),
        ),
    ],
)
def test_rope_scaling_is_read_from_the_keys(
    tmp_path: pathlib.Path, keys: dict[str, Any], scaling: RopeScaling
) -> None:
    meta = metadata() | {f"llama.{key}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "m.gguf", from_hf(random_tensors()), meta)
    assert config_of(path).rope_scaling == scaling


def test_llama3_scaling_is_found_again_in_the_divisors(tmp_path: pathlib.Path) -> None:
    scaling = RopeScaling("llama3", 32.0, 8192)
    path = write_with_divisors(tmp_path, llama3_divisors(scaling, 500000.0, 64))
    assert config_of(path).rope_scaling == scaling
    assert convert(path).keys() == random_tensors().keys()


def test_the_divisors_are_those_of_the_reference_library() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](hf)
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    divisors = llama3_divisors(RopeScaling("llama3", 8.0, 8192), 500000.0, 64)
    np.testing.assert_allclose(plain / divisors, scaled.numpy(), rtol=1e-5)


def test_other_divisors_are_refused(tmp_path: pathlib.Path) -> None:
    path = write_with_divisors(tmp_path, np.linspace(1, 8, 32))
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is not supported"):
        config_of(path)


def write_with_divisors(folder: pathlib.Path, divisors: Array) -> pathlib.Path:
    tensors = from_hf(random_tensors())
    tensors["rope_freqs.weight"] = (divisors.astype(np.float32), Quant.F32)
    return write_gguf(folder / "m.gguf", tensors, metadata() | {"llama.rope.freq_base": 500000.0})


# ---- refusals ----


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("general.architecture", "gemma2", "general.architecture = 'gemma2' is not supported"),
        ("llama.expert_count", 8, "expert_count = 8 is not supported"),
        ("llama.logit_scale", 0.5, r"key llama.logit_scale = 0.5 is not supported"),
        ("llama.rope.dimension_count", 32, "rope.dimension_count = 32 is not supported, 64"),
        ("llama.attention.value_length", 32, "attention.value_length = 32 is not supported, 64"),
        ("llama.rope.scaling.type", "longrope", "rope.scaling.type = 'longrope' is not supported"),
        ("llama.attention.head_count_kv", [2, 2], "attention.head_count_kv = .* is not supported"),
        ("llama.context_length", None, "has no context_length"),
        ("llama.block_count", 3, r"no tensor model.layers.2.input_layernorm.weight"),
        ("llama.block_count", 1, r"tensor blk.1.attn_norm.weight has no place"),
        ("llama.feed_forward_length", 256, r"mlp.gate_proj.weight has shape \[512, 256\]"),
        ("split.count", 2, "split.count = 2 is not supported"),
        ("general.alignment", 0, "general.alignment = 0 is not supported"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    tmp_path: pathlib.Path, key: str, value: Any, complaint: str
) -> None:
    arch = value if key == "general.architecture" else "llama"
    meta = metadata() | ({} if key == "general.architecture" else {key: value})
    path = write_gguf(tmp_path / "m.gguf", from_hf(random_tensors()), meta, arch=arch)
    with pytest.raises(ConfigError, match=complaint):
        convert(path)


def test_an_unsupported_tensor_type_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    tensors = from_hf(random_tensors())
    weight = tensors["blk.0.ffn_up.weight"][0]
    tensors["blk.0.ffn_up.weight"] = (np.asarray(quantize(weight, Quant.Q5_0)), Quant.Q5_0)
    path = write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(ConfigError, match=r"blk.0.ffn_up.weight has type Q5_0, supported are"):
        convert(path)


@pytest.mark.parametrize("missing", ["token_embd.weight", "blk.1.attn_v.weight"])
def test_a_missing_tensor_is_named(tmp_path: pathlib.Path, missing: str) -> None:
    tensors = from_hf(random_tensors())
    del tensors[missing]
    path = write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(ConfigError, match="no tensor"):
        convert(path)


@pytest.mark.parametrize("kept", [0, 3, 30, 500, 5000, -1])
def test_a_truncated_file_is_refused(tmp_path: pathlib.Path, kept: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", from_hf(random_tensors()))
    size = path.stat().st_size
    os.truncate(path, size - 100 if kept < 0 else kept)
    with pytest.raises(ConfigError, match=r"truncated|cannot read|not a GGUF"):
        GgufFile(path)


def test_a_file_of_another_kind_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        GgufFile(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    with pytest.raises(ConfigError, match="version 0x3000000 is not supported"):
        GgufFile(path)


# ---- damaged headers ----

TINY = msgspec.structs.replace(
    CONFIG,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
ARRAY, UINT8, FLOAT32 = 9, 0, 0  # the last: a tensor type


def counted(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(keys: list[bytes], tensors: list[bytes]) -> bytes:
    counts = struct.pack("<IQQ", 3, len(tensors), len(keys))
    return b"GGUF" + counts + b"".join(keys) + b"".join(tensors)


def tensor_header(name: str, *dims: int) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return counted(name) + sizes + struct.pack("<IQ", FLOAT32, 0)


def nested(key: str, depth: int) -> bytes:
    """`key`, an array of one array of one array ... of no bytes."""
    inner = struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQ", UINT8, 0)
    return counted(key) + struct.pack("<I", ARRAY) + inner


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (header([], [tensor_header("a.weight", 4)] * 2), "two tensors a.weight"),
        (header([], [tensor_header("a.weight", 0)]), r"a.weight \[0\] has a dimension of 0"),
        (header([], [tensor_header("a.weight", 4, 0)]), r"a.weight \[4, 0\] has a dimension of 0"),
        (header([], [tensor_header("a.weight", *[1 << 63] * 300)]), "a.weight has 300 dimensions"),
        (header([nested("a.key", 9)], []), "key a.key is arrays in arrays, over 8 deep"),
        (header([nested("a.key", 100_000)], []), "key a.key is arrays in arrays, over 8 deep"),
        (header([counted("a.key") + struct.pack("<I", 99)], []), "a.key has the unknown type 99"),
        (
            header([counted("a.key") + struct.pack("<IIQ", ARRAY, 99, 8)], []),
            "a.key has the unknown type 99",
        ),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_by_the_name_in_it(
    tmp_path: pathlib.Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content + bytes(64))
    with pytest.raises(ConfigError, match=complaint):
        GgufFile(path)


def test_arrays_of_arrays_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header([nested("a.key", 3)], []))
    assert GgufFile(path).metadata == {"a.key": [[[]]]}


@pytest.mark.parametrize("value", [1 << 20, (1 << 32) - 1])
def test_more_layers_than_tensors_are_refused_before_they_are_counted(
    tmp_path: pathlib.Path, value: int
) -> None:
    meta = metadata() | {"llama.block_count": value}
    path = write_gguf(tmp_path / "m.gguf", from_hf(random_tensors()), meta)
    with pytest.raises(ConfigError, match=f"block_count = {value} is not supported"):
        config_of(path)


@pytest.mark.parametrize("layout", [metadata(TINY), metadata(TINY) | SENTENCEPIECE])
@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_the_header_is_an_error_or_harmless(
    tmp_path: pathlib.Path, layout: dict[str, Any], seed: int
) -> None:
    path = write_gguf(tmp_path / "m.gguf", from_hf(random_tensors(TINY), TINY), layout)
    whole = path.read_bytes()
    names = [name.encode() for name in [*layout, *GgufFile(path).tensors]]
    random = np.random.default_rng(seed)
    for _ in range(150):
        damaged = bytearray(whole)
        name = names[random.integers(len(names))]
        at = whole.index(struct.pack("<Q", len(name)) + name) + 8
        at += int(random.choice([-8, 0, len(name), len(name) + int(random.integers(40))]))
        width = int(random.choice([1, 4, 8]))
        value = int(random.choice([0, 1, 4, 6, 8, 9, 10, 12, 255, 1 << 31, 1 << 62]))
        damaged[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        path.write_bytes(damaged)
        try:
            prepare_all(GgufFile(path))
        except ConfigError:
            continue


ODD: list[Any] = ["text", "", 1.5, math.nan, math.inf, True, 0, (1 << 32) - 1]
ODD += [[7], ["text"], [1.5], [7] * 300, ["text"] * 300, [1.5] * 300]
OPTIONAL = ["split.count", "general.alignment", "general.architecture", "tokenizer.chat_template"]
OPTIONAL += ["tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"]
OPTIONAL += ["tokenizer.ggml.eot_token_id", "llama.rope.scaling.type", "llama.rope.scaling.factor"]
OPTIONAL += ["llama.rope.scaling.attn_factor", "llama.attention.sliding_window", "llama.vocab_size"]


@pytest.mark.parametrize("layout", [metadata(TINY), metadata(TINY) | SENTENCEPIECE])
@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{value!r:.12}")
def test_any_odd_value_of_a_key_is_an_error_or_harmless(
    tmp_path: pathlib.Path, layout: dict[str, Any], value: Any
) -> None:
    tensors = from_hf(random_tensors(TINY), TINY)
    path = write_gguf(tmp_path / "m.gguf", tensors, layout)
    for key in [*layout, *OPTIONAL]:
        file = GgufFile(path)
        file.metadata[key] = value
        try:
            prepare_all(file)
        except ConfigError:
            continue


def prepare_all(file: GgufFile) -> None:
    """Everything that preparation asks a file for."""
    architecture, config = read_gguf_model(file)
    main_type(file)
    bos_and_eos_ids(file)
    build_gguf_tokenizer(file)
    out = file.path.with_suffix(".safetensors")
    convert_weights(file, architecture, config, "float32", out, Quiet())
