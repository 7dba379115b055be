from __future__ import annotations

import pathlib

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_serving.baseline import reference as module
from llm_serving.baseline.reference import Reference
from llm_serving.errors import ConfigError
from tests.tiny_gguf import CONFIG, from_hf, random_tensors, write_gguf
from tests.tiny_models import FAMILIES, VOCAB_SIZE, Twin, build_twin, load_model, make_card

torch.set_num_threads(1)


def random_ids(length: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(length).integers(0, VOCAB_SIZE, length).astype(np.int32)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return build_twin(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [7, 256])
def test_logits_in_chunks_are_those_of_the_whole_text(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, family: str, chunk: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    twin = build_twin(tmp_path, family)
    ids = random_ids(40)
    expected = twin.logits(ids.tolist()).numpy()
    wanted = [39, 0, 6, 7, 20, 21]
    made = list(Reference.load(twin.card).logits_at(ids, wanted))
    assert [position for position, _ in made] == sorted(wanted)
    for position, logits in made:
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[position], atol=1e-4)


def test_nothing_behind_the_last_wanted_position_is_read(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 8)
    model = Reference(twin.reference)
    lengths = []
    twin.reference.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    list(model.logits_at(random_ids(40), [9]))
    assert lengths == [8, 2]


@pytest.mark.parametrize("length", [1, 7, 8, 20])
def test_a_greedy_answer_is_that_of_the_whole_texts(
    twin: Twin, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    prompt = random_ids(length)
    made = list(Reference(twin.reference).greedy(prompt, 6, []))
    new = [token_id for token_id, _ in made]
    assert new == twin.generate(prompt.tolist(), 6)
    expected = twin.logits([*prompt.tolist(), *new]).numpy()
    for i, (_, logits) in enumerate(made):
        np.testing.assert_allclose(logits, expected[length - 1 + i], atol=1e-4)


def test_an_answer_ends_with_the_first_eos(twin: Twin) -> None:
    prompt = random_ids(5)
    expected = twin.generate(prompt.tolist(), 6)
    first = next(i for i in range(1, 6) if expected[i] not in expected[:i])
    made = Reference(twin.reference).greedy(prompt, 6, [VOCAB_SIZE - 1, expected[first]])
    assert [token_id for token_id, _ in made] == expected[: first + 1]


def test_a_gguf_file_is_dequantised_by_transformers_itself(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors()
    path = write_gguf(tmp_path / "tiny.gguf", from_hf(tensors))
    card = msgspec.structs.replace(make_card(tmp_path, CONFIG), source=str(path))
    model = Reference.load(card, quiet=True)
    assert capfd.readouterr().err == ""
    weights = model._model.state_dict()
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(weights[name], torch.from_numpy(tensors[name]))
        assert weights[name].dtype == torch.float32


def test_a_model_that_was_saved_in_16_bits_is_computed_in_32(tmp_path: pathlib.Path) -> None:
    twin = build_twin(tmp_path)
    twin.reference.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = Reference.load(twin.card)._model
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    ids = random_ids(10)
    ours = load_model(twin.card)  # float32, too
    assert torch.equal(
        ours.tensors()["model.norm.weight"], loaded.state_dict()["model.norm.weight"]
    )
    ((_, logits),) = Reference(loaded).logits_at(ids, [9])
    assert logits.dtype == np.float32


def test_what_transformers_cannot_load_is_one_sentence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_card(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=rf"^transformers [\d.]+ cannot load {tmp_path}: [^\n]+$"):
        Reference.load(card)
    path = write_gguf(tmp_path / "tiny.gguf", from_hf(random_tensors()))
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: False)
    card = msgspec.structs.replace(card, source=str(path))
    with pytest.raises(ConfigError, match="accelerate is required when loading a GGUF file"):
        Reference.load(card)


def test_the_number_of_threads_is_that_of_the_agent(twin: Twin) -> None:
    before = torch.get_num_threads()
    Reference.load(twin.card, num_threads=2)
    try:
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
