"""Is our LLaMA the reference library's, however its tokens are cut into steps?"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_serving.errors import ConfigError
from llm_serving.kernels.reference import ReferenceKernels
from llm_serving.models.layers import LinearPart, PlainLinear, PlainLinears
from llm_serving.models.rope import inverse_frequencies, rotary_table
from tests.tiny_models import (
    CONTEXT,
    CPU,
    FAMILIES,
    SMALL,
    VOCAB_SIZE,
    Chunk,
    PagedRunner,
    Twin,
    build_twin,
    load_model,
    model_config,
)

torch.set_num_threads(1)

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all fields": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "no grouping": ("llama", {"num_key_value_heads": 6}),
    "attention bias": ("llama", {"attention_bias": True}),
    "mlp bias": ("llama", {"mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 20}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": False}),
}
VARIANTS |= {f"rope {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Variant -> twin, each built once."""

    @functools.cache
    def twin(variant: str) -> Twin:
        family, changed = VARIANTS[variant]
        rope = {"rope_theta": 500.0} | changed.get("rope_parameters", {})
        return build_twin(
            tmp_path_factory.mktemp("model"), family, **{**changed, "rope_parameters": rope}
        )

    yield twin
    twin.cache_clear()


def random_ids(num: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, num)]


def assert_close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


def run_in_chunks(paged: PagedRunner, ids: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    blocks, parts, start = paged.take_blocks(len(ids)), [], 0
    for size in sizes:
        parts += paged.step([Chunk(ids[start : start + size], start, blocks)])
        start += size
    assert start == len(ids)
    return torch.cat(parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_prompt_and_its_decode_steps_have_the_logits_of_the_reference(
    twins: Any, variant: str
) -> None:
    twin, ids = twins(variant), random_ids(40)
    expected = twin.logits(ids)
    assert expected.std() > 0.1, "logits that all look alike prove nothing"
    found = run_in_chunks(PagedRunner(twin.card), ids, [34] + [1] * 6)
    assert found.dtype == torch.float32
    assert_close(found, expected)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9), block_size=st.integers(1, 9))
def test_a_prompt_cut_anywhere_has_the_same_logits(
    twins: Any, sizes: list[int], block_size: int
) -> None:
    twin, ids = twins("llama"), random_ids(sum(sizes))
    paged = PagedRunner(twin.card, block_size=block_size, num_blocks=120)
    assert_close(run_in_chunks(paged, ids, sizes), twin.logits(ids))


def test_a_chunk_longer_than_a_tile_of_queries_has_the_same_logits(
    twins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_serving.kernels.reference_attention.TILE", 8)
    twin, ids = twins("qwen3"), random_ids(60)
    assert_close(run_in_chunks(PagedRunner(twin.card), ids, [5, 30, 25]), twin.logits(ids))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_of_every_kind_in_one_step_do_not_touch_each_other(
    twins: Any, data: st.DataObject
) -> None:
    twin = twins("llama")
    paged = PagedRunner(twin.card, num_blocks=200)
    lengths = data.draw(st.lists(st.integers(2, 50), min_size=1, max_size=6))
    sequences = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    blocks = [paged.take_blocks(length) for length in lengths]
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        unfinished = [i for i, at in enumerate(done) if at < lengths[i]]
        rows = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        sizes = [data.draw(st.sampled_from([1, 1, 7, 50])) for _ in rows]
        chunks = [
            Chunk(sequences[i][done[i] : done[i] + size], done[i], blocks[i])
            for i, size in zip(rows, sizes, strict=True)
        ]
        for i, chunk, logits in zip(rows, chunks, paged.step(chunks), strict=True):
            found[i].append(logits)
            done[i] += len(chunk.ids)
    for ids, parts in zip(sequences, found, strict=True):
        assert_close(torch.cat(parts), twin.logits(ids))


def test_rows_of_one_step_may_share_the_blocks_that_one_of_them_writes(twins: Any) -> None:
    """Two prompts with the same first 12 tokens arrive together; the second reads the first's."""
    twin = twins("llama")
    paged = PagedRunner(twin.card, block_size=4)
    prefix, left, right = random_ids(12), random_ids(5, 1), random_ids(1, 2)
    shared = paged.take_blocks(12)
    found = paged.step(
        [
            Chunk(right, 12, shared + paged.take_blocks(1)),
            Chunk(prefix + left, 0, shared + paged.take_blocks(5)),
        ]
    )
    assert_close(found[0], twin.logits(prefix + right)[12:])
    assert_close(found[1], twin.logits(prefix + left))


@pytest.mark.parametrize("variant", ["llama", "tied", "qwen2", "qwen3", "rope llama3"])
def test_greedy_generation_is_that_of_the_reference(twins: Any, variant: str) -> None:
    twin, prompts = twins(variant), [random_ids(3 + 5 * i, i) for i in range(4)]
    paged, num_new = PagedRunner(twin.card, num_blocks=100), 12
    sequences = [list(prompt) for prompt in prompts]
    blocks = [paged.take_blocks(len(prompt) + num_new) for prompt in prompts]
    starts = [0] * len(prompts)
    for _ in range(num_new):
        rows = zip(sequences, starts, blocks, strict=True)
        logits = paged.step([Chunk(ids[start:], start, table) for ids, start, table in rows])
        starts = [len(ids) for ids in sequences]
        for ids, last in zip(sequences, logits, strict=True):
            ids.append(int(last[-1].argmax()))
    for prompt, ids in zip(prompts, sequences, strict=True):
        assert ids[len(prompt) :] == twin.generate(prompt, num_new)


@pytest.mark.parametrize(("dtype", "allowed"), [("bfloat16", 0.35), ("float16", 0.05)])
def test_half_precision_is_close_to_single(
    tmp_path: pathlib.Path, dtype: Any, allowed: float
) -> None:
    twin, ids = build_twin(tmp_path, dtype=dtype), random_ids(40)
    paged, expected = PagedRunner(twin.card), twin.logits(ids)
    found = run_in_chunks(paged, ids, [17, 17, 1, 1, 1, 1, 1, 1])
    assert paged.cache.tensor.dtype == getattr(torch, dtype)
    assert (found - expected).abs().max() < allowed * expected.std()


def test_layers_run_in_two_pieces_give_the_same_residual_stream(twins: Any) -> None:
    paged, ids = PagedRunner(twins("llama").card), random_ids(9)
    step = paged.metadata([Chunk(ids, 0, paged.take_blocks(9))])
    with torch.inference_mode():
        embedded = paged.model.embed(torch.tensor(ids))
        whole = paged.model.run_layers(embedded, step, 0, 3)
        first = paged.model.run_layers(embedded, step, 0, 1)
        assert not torch.equal(first, whole)
        assert torch.equal(paged.model.run_layers(first, step, 1, 3), whole)


def test_the_layers_also_run_with_gradients(twins: Any) -> None:
    """Inference mode belongs to the agent: an adapter is trained on the same layers."""
    paged, ids = PagedRunner(twins("llama").card), random_ids(9)
    step = paged.metadata([Chunk(ids, 0, paged.take_blocks(9))])
    wanted = paged.model.embed(torch.tensor(ids)).requires_grad_()
    hidden = paged.model.layers[2].mlp(wanted)
    (gradient,) = torch.autograd.grad(paged.model.logits(hidden).sum(), wanted)
    assert gradient.any()
    assert step.slots.shape == (9,)


class RecordingLinears:
    """A factory that notes what it is asked for, and doubles what one layer gives."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[int, int, list[str]]] = {}
        self._plain = PlainLinears(ReferenceKernels(), torch.float32, CPU)

    def __call__(
        self, name: str, in_features: int, out_features: int, parts: Sequence[LinearPart]
    ) -> PlainLinear:
        self.asked[name] = (in_features, out_features, [part.name for part in parts])
        return self._plain(name, in_features, out_features, parts)


def test_every_linear_layer_comes_from_the_factory_and_knows_its_parts(twins: Any) -> None:
    linears, twin = RecordingLinears(), twins("llama")
    model = load_model(twin.card, linears)
    layer = "model.layers.2"
    assert len(linears.asked) == 3 * 4 + 1
    assert linears.asked[f"{layer}.self_attn.qkv_proj"] == (
        48,
        48 + 2 * 16,
        [f"{layer}.self_attn.{part}_proj" for part in "qkv"],
    )
    assert linears.asked[f"{layer}.self_attn.o_proj"] == (48, 48, [f"{layer}.self_attn.o_proj"])
    assert linears.asked[f"{layer}.mlp.gate_up_proj"] == (
        48,
        160,
        [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
    )
    assert linears.asked[f"{layer}.mlp.down_proj"] == (80, 48, [f"{layer}.mlp.down_proj"])
    assert linears.asked["lm_head"] == (48, VOCAB_SIZE, ["lm_head"])
    ids = random_ids(20)
    paged = PagedRunner(twin.card, model=model)
    assert_close(run_in_chunks(paged, ids, [20]), twin.logits(ids))


def test_a_layer_of_another_factory_is_the_one_that_computes(twins: Any) -> None:
    class Silent:
        """Adds nothing to the residual stream."""

        def __init__(self, out_features: int) -> None:
            self._out_features = out_features

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), self._out_features)

        def tensors(self) -> dict[str, torch.Tensor]:
            return {}

    def silent(name: str, in_features: int, out_features: int, parts: Sequence[LinearPart]) -> Any:
        return Silent(out_features)

    twin, ids = twins("llama"), random_ids(4)
    model = load_model(twin.card)
    quiet = type(model)(twin.card.config, silent, ReferenceKernels(), torch.float32, CPU)
    quiet.tensors()[EMBEDDING].copy_(model.tensors()[EMBEDDING])
    for layer in quiet.layers:
        layer.input_norm.weight.fill_(1)
        layer.post_attention_norm.weight.fill_(1)
    paged = PagedRunner(twin.card, model=quiet)
    step = paged.metadata([Chunk(ids, 0, paged.take_blocks(4))])
    embedded = quiet.embed(torch.tensor(ids))
    assert torch.equal(quiet.run_layers(embedded, step, 0, 3), embedded)


def test_tied_embeddings_are_one_piece_of_memory(twins: Any) -> None:
    model = load_model(twins("tied").card)
    assert isinstance(model.head, PlainLinear)
    assert model.head.weight.data_ptr() == model.tensors()[EMBEDDING].data_ptr()
    assert "lm_head.weight" not in model.tensors()


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_those_of_the_reference(rope: str) -> None:
    config = FAMILIES["llama"][0](**{**SMALL, "rope_parameters": ROPES[rope] | {"rope_theta": 1e4}})
    if ROPES[rope]["rope_type"] == "default":
        expected, factor = 1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[ROPES[rope]["rope_type"]](config, seq_len=CONTEXT)
    found, attention_factor = inverse_frequencies(model_config("llama", config), CONTEXT)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("max_model_len", [64, 128, 200])
def test_dynamic_rope_has_the_factor_of_its_longest_context_from_the_first_token(
    tmp_path: pathlib.Path, max_model_len: int
) -> None:
    """The reference computes its factor from what it has seen, so show it that length at once."""
    twin = build_twin(tmp_path, rope_parameters=ROPES["dynamic"] | {"rope_theta": 500.0})
    ids = random_ids(max_model_len)
    paged = PagedRunner(twin.card, max_model_len=max_model_len, num_blocks=64)
    assert_close(run_in_chunks(paged, ids, [max_model_len - 3, 2, 1]), twin.logits(ids))


def test_the_longest_context_counts_the_stretching_in() -> None:
    def longest(rope: str) -> int:
        config = FAMILIES["llama"][0](
            **{**SMALL, "rope_parameters": dict(ROPES[rope], rope_theta=1e4)}
        )
        return model_config("llama", config).longest_context

    assert [longest(rope) for rope in ("default", "llama3")] == [CONTEXT, CONTEXT]
    assert [longest(rope) for rope in ("linear", "dynamic")] == [4 * CONTEXT, 2 * CONTEXT]
    assert [longest(rope) for rope in ("yarn", "yarn, all fields")] == [CONTEXT, 2 * CONTEXT]


def test_an_odd_head_cannot_be_turned() -> None:
    config = model_config("llama", FAMILIES["llama"][0](**SMALL))
    with pytest.raises(ConfigError, match="head_dim: 7 is odd"):
        rotary_table(msgspec.structs.replace(config, head_dim=7), 16, CPU)
