"""Hugging Face folders: whole checkpoints are accepted, damaged ones named, tokenizers agree."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llm_serving.errors import ConfigError
from llm_serving.model_card import DERIVED_TENSORS
from llm_serving.prepare.hf_folder import read_hf_folder
from llm_serving.prepare.hf_tokenizer import build_hf_tokenizer, read_chat_template
from tests.tiny_tokenizer import tiny_tokenizer_path
from tests.trained_sentencepiece import TEXTS, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny model as transformers saves it, in several shards."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=[2, 7],
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="64kB")
    tiny_tokenizer_path(folder)
    return folder


@pytest.fixture
def folder(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: pathlib.Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def shards(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_sharded_checkpoint_is_described(folder: pathlib.Path) -> None:
    found = read_hf_folder(folder)
    assert found.architecture == "LlamaForCausalLM"
    assert found.weights == shards(folder)
    assert len(found.weights) > 1
    assert (found.weights_dtype, found.stated_dtype) == ("bfloat16", "bfloat16")


def test_a_single_file_is_a_checkpoint_too(folder: pathlib.Path) -> None:
    whole = {name: t for path in shards(folder) for name, t in load_file(path).items()}
    for path in shards(folder):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(whole, folder / "model.safetensors")
    assert read_hf_folder(folder).weights == [folder / "model.safetensors"]


def test_generation_config_wins_for_the_ids_it_names(folder: pathlib.Path) -> None:
    (folder / "generation_config.json").unlink()
    assert (read_hf_folder(folder).bos_token_id, read_hf_folder(folder).eos_token_ids) == (
        1,
        [2, 7],
    )
    edit(folder / "generation_config.json", eos_token_id=9, temperature=0.1)
    assert (read_hf_folder(folder).bos_token_id, read_hf_folder(folder).eos_token_ids) == (1, [9])
    edit(folder / "generation_config.json", eos_token_id="two")
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id = 'two'"):
        read_hf_folder(folder)


def test_the_digest_follows_the_content(folder: pathlib.Path) -> None:
    path = shards(folder)[0]
    tensors = load_file(path)
    save_file(tensors, path)
    before = read_hf_folder(folder).digest
    assert read_hf_folder(folder).digest == before
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)  # the same header
    assert read_hf_folder(folder).digest != before


# ---- damaged and foreign checkpoints ----


def test_a_missing_shard_is_named(folder: pathlib.Path) -> None:
    lost = shards(folder)[1]
    lost.unlink()
    with pytest.raises(ConfigError, match=f"lacks the shard {lost.name}"):
        read_hf_folder(folder)


@pytest.mark.parametrize("kept", [0, 4, 60, 1000, -1])
def test_a_truncated_shard_is_named(folder: pathlib.Path, kept: int) -> None:
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=f"{path.name} is truncated"):
        read_hf_folder(folder)


def test_a_header_that_is_not_json_is_named(folder: pathlib.Path) -> None:
    path = shards(folder)[0]
    path.write_bytes((100).to_bytes(8, "little") + b"?" * 200)
    with pytest.raises(ConfigError, match="no valid safetensors header"):
        read_hf_folder(folder)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"intermediate_size": 97}, r"mlp.\w+_proj.weight has shape"),
        ({"num_hidden_layers": 3}, r"no tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, r"tensor model.layers.1.\S+ has no place in LlamaForCausalLM"),
        ({"attention_bias": True}, r"no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"vocab_size": 101}, r"embed_tokens.weight has shape \[100, 64\], .* \[101, 64\]"),
        ({"dtype": "float64"}, "dtype = 'float64' is not supported"),
    ],
)
def test_a_checkpoint_that_contradicts_its_configuration_is_refused(
    folder: pathlib.Path, values: dict[str, Any], complaint: str
) -> None:
    edit(folder / "config.json", **values)
    with pytest.raises(ConfigError, match=complaint):
        read_hf_folder(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_head_beside_tied_embeddings_has_to_be_their_copy(
    folder: pathlib.Path, dtype: torch.dtype
) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    weights = {name: t for path in shards(folder) for name, t in load_file(path).items()}
    copy = weights["model.embed_tokens.weight"].clamp(-0.5, 0.5).bfloat16()
    copy = (copy * 256).round() / 256  # so that float16 holds it, too
    copy[0, 0] = -0.0
    for path in shards(folder):
        names = load_file(path)
        changed = {"model.embed_tokens.weight": copy.abs(), "lm_head.weight": copy.abs().to(dtype)}
        changed["lm_head.weight"][0, 0] = -0.0  # the same number in other bytes
        save_file(names | {k: t for k, t in changed.items() if k in names}, path)
    assert read_hf_folder(folder).config.tie_word_embeddings
    for path in shards(folder):
        names = load_file(path)
        if "lm_head.weight" in names:
            names["lm_head.weight"][-1, -1] += 1
            save_file(names, path)
    complaint = r"lm_head.weight differs from model.embed_tokens.weight, .* tie_word_embeddings"
    with pytest.raises(ConfigError, match=complaint):
        read_hf_folder(folder)


def test_a_head_of_another_shape_beside_tied_embeddings_is_refused(folder: pathlib.Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    for path in shards(folder):
        names = load_file(path)
        if "lm_head.weight" in names:
            save_file(names | {"lm_head.weight": names["lm_head.weight"][1:]}, path)
    with pytest.raises(ConfigError, match=r"lm_head.weight has shape \[99, 64\]"):
        read_hf_folder(folder)


@pytest.mark.parametrize("ending", DERIVED_TENSORS)
def test_tensors_that_follow_from_the_configuration_are_ignored(
    folder: pathlib.Path, ending: str
) -> None:
    path = shards(folder)[0]
    name = f"model.layers.0.self_attn{ending}"
    save_file(load_file(path) | {name: torch.ones(4)}, path)
    assert read_hf_folder(folder).weights == shards(folder)


def test_more_layers_than_tensors_are_refused_before_they_are_counted(
    folder: pathlib.Path,
) -> None:
    edit(folder / "config.json", num_hidden_layers=10**12)
    with pytest.raises(ConfigError, match=r"num_hidden_layers = 1000000000000, but .* tensors"):
        read_hf_folder(folder)


def test_quantised_tensors_are_refused_by_name(folder: pathlib.Path) -> None:
    path = shards(folder)[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path)
    with pytest.raises(ConfigError, match=f"tensor {name} is I8, supported are F32"):
        read_hf_folder(folder)


def test_pickled_weights_are_refused(folder: pathlib.Path) -> None:
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"pytorch_model.bin is a pickle, which is never loaded"):
        read_hf_folder(folder)


def test_an_index_can_not_point_outside(folder: pathlib.Path) -> None:
    edit(folder / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"})
    with pytest.raises(ConfigError, match="lacks the shard"):
        read_hf_folder(folder)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_config_that_is_no_object_is_refused(folder: pathlib.Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json"):
        read_hf_folder(folder)


# ---- tokenizers ----


def assert_as_transformers(folder: pathlib.Path) -> None:
    own, reference = build_hf_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ["the cat", "a€b<s>c", "é"]:
        assert own.encode(text).ids == reference(text)["input_ids"], text


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("setting", [None, True, False])
def test_bos_is_added_exactly_where_transformers_adds_it(
    folder: pathlib.Path, in_file: bool, setting: bool | None
) -> None:
    tiny_tokenizer_path(folder, add_bos=in_file)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    edit(folder / "tokenizer_config.json", **settings)
    if setting is not None:
        edit(folder / "tokenizer_config.json", add_bos_token=setting)
    assert_as_transformers(folder)
    assert (build_hf_tokenizer(folder).encode("a").ids[0] == 1) == in_file


def test_a_prompt_is_never_truncated_or_padded_by_the_file(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(build_hf_tokenizer(folder).encode("the the the the").ids) > 4
    assert len(build_hf_tokenizer(folder).encode("a").ids) < 4


def test_tokens_that_only_the_settings_list_are_added(folder: pathlib.Path) -> None:
    size = build_hf_tokenizer(folder).get_vocab_size()
    listed = {str(size): {"content": "[PAD]", "special": True, "normalized": False}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert size in build_hf_tokenizer(folder).encode("the[PAD]a").ids
    assert_as_transformers(folder)
    listed = {str(size + 5): {"content": "[PAD]"}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    with pytest.raises(ConfigError, match=r"'\[PAD\]' is to be 55, but the vocabulary ends at 50"):
        build_hf_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "front", "end"),
    [
        ({}, [], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_a_sentencepiece_model_gives_its_own_ids(
    tmp_path: pathlib.Path, settings: dict[str, Any], front: list[int], end: list[int]
) -> None:
    reference = train(tmp_path)
    edit(tmp_path / "tokenizer_config.json", **settings)
    own = build_hf_tokenizer(tmp_path)
    for text in TEXTS:
        assert own.encode(text).ids == [*front, *reference.encode(text), *end], text
        assert own.decode(own.encode(text).ids) == text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model_type": "unigram", "vocab_size": 310}, "model_type 1 is not supported, 2"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer 'nmt_nfkc' is not supported"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces = true"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(
    tmp_path: pathlib.Path, options: dict[str, Any], complaint: str
) -> None:
    train(tmp_path, **options)
    with pytest.raises(ConfigError, match=complaint):
        build_hf_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b'{"a": 1}', b"IQ== 0\nIg== 1\n"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(
    tmp_path: pathlib.Path, content: bytes
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer.model"):
        build_hf_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"neither tokenizer.json nor tokenizer.model"):
        build_hf_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer.json"):
        build_hf_tokenizer(tmp_path)


def test_the_chat_template_comes_from_its_file_or_the_settings(tmp_path: pathlib.Path) -> None:
    assert read_chat_template(tmp_path) is None
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    edit(tmp_path / "tokenizer_config.json", chat_template=named)
    assert read_chat_template(tmp_path) == "D"
    edit(tmp_path / "tokenizer_config.json", chat_template="S")
    assert read_chat_template(tmp_path) == "S"
    (tmp_path / "chat_template.jinja").write_text("{{ 'é' }}")
    assert read_chat_template(tmp_path) == "{{ 'é' }}"
