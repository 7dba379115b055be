"""A packed model is the reference library's: every family, form of weights and way through it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from gguf import dequantize, quantize

from llm_serving.agent.kv_cache import KvCache
from llm_serving.errors import ConfigError
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.packed_file import PackedFile
from llm_serving.model_card import ModelCard, Weights
from llm_serving.models.layers import LinearPart, PlainLinears
from llm_serving.models.packed import (
    NativePlan,
    NativeSteps,
    PackedLinears,
    load_packed,
)
from llm_serving.models.rope import rotary_table
from llm_serving.prepare.gguf_file import GgufFile
from llm_serving.prepare.gguf_rows import GgufRows
from llm_serving.prepare.gguf_weights import gguf_name
from llm_serving.prepare.hf_rows import HfRows
from llm_serving.prepare.packing import pack_model
from llm_serving.prepare.progress import Quiet
from tests.native_kernels import native_or_skip
from tests.test_cpu_sampling import digest_of
from tests.tiny_gguf import metadata, stored, write_gguf
from tests.tiny_models import CONTEXT, CPU, Twin, build_twin

native = native_or_skip()
ISAS = [*native.supported(), *native.on_request()]

BLOCK_SIZE, NUM_BLOCKS = 16, 12
SIZES = {"hidden_size": 48, "intermediate_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
}
ATOL = {"float32": 1e-4, "bfloat16": 0.5, "int8": 2.0}


BLOCKS = [Quant.Q8_0, Quant.Q4_0, Quant.Q4_1]
BLOCKS_ATOL = 0.8  # of logits up to 6: activations are 8 bits


def pack(twin: Twin, weights: Weights, folder: pathlib.Path) -> PackedFile:
    path = folder / f"{weights}.packed"
    shards = [pathlib.Path(shard) for shard in twin.card.weights]
    pack_model(HfRows(shards), twin.card.config, weights, path, Quiet())
    return PackedFile(path)


def pack_blocks(kind: Quant, folder: pathlib.Path) -> tuple[Twin, PackedFile]:
    """A twin whose matrices are what blocks of a GGUF file stand for, and those blocks packed."""
    twin = build_twin(folder, "llama", hidden_size=96, intermediate_size=128)
    config, tensors = twin.card.config, {}
    for name, weight in twin.reference.state_dict().items():
        if weight.ndim == 1:
            tensors[gguf_name(name)] = weight.numpy(), Quant.F32
        else:
            blocks = quantize(weight.numpy(), kind)
            weight.copy_(torch.from_numpy(dequantize(blocks, kind)))
            tensors[gguf_name(name)] = stored(name, blocks, config), kind
    file = GgufFile(write_gguf(folder / "blocks.gguf", tensors, metadata(config)))
    path = folder / "blocks.packed"
    pack_model(GgufRows(file, "LlamaForCausalLM", config), config, "native", path, Quiet())
    return twin, PackedFile(path)


class Runner:
    """One sequence over a cache that is full of NaN, in blocks in scrambled order."""

    def __init__(
        self,
        card: ModelCard,
        file: PackedFile,
        *,
        dtype: torch.dtype = torch.float32,
        unpacked: str = "no layer",
        num_threads: int = 2,
        isa: str = "auto",
    ) -> None:
        kernels = NativeKernels(num_threads, isa)
        packed, plain = PackedLinears(kernels, file), PlainLinears(kernels, torch.float32, CPU)

        def linears(
            name: str, in_features: int, out_features: int, parts: Sequence[LinearPart]
        ) -> Any:
            make = plain if unpacked in name else packed
            return make(name, in_features, out_features, parts)

        self.model = load_packed(file, card.config, kernels, linears)
        cache = KvCache(card.config, NUM_BLOCKS, BLOCK_SIZE, dtype, CPU)
        cache.tensor.fill_(-1 if dtype is torch.int8 else torch.nan)  # scales: NaN in all bits
        table = rotary_table(card.config, CONTEXT, CPU)
        self.plan = NativePlan(self.model, card.config, kernels, table, cache.layers, BLOCK_SIZE)
        self.model.plan = self.plan
        self._steps = NativeSteps(kernels, self.plan, table, cache.layers, BLOCK_SIZE)
        self._blocks = np.random.default_rng(1).permutation(NUM_BLOCKS).astype(np.int32)
        self._num_layers = card.config.num_hidden_layers

    def logits(
        self, ids: Sequence[int], chunks: Sequence[int], lasting: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Of every position, `chunks[i]` tokens at a time; of a chunk, only of `lasting`."""
        found, start = [], 0
        for count in chunks:
            positions = np.arange(start, start + count, dtype=np.int32)
            slots = self._blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            step = self._steps.build(
                positions,
                slots.astype(np.int32),
                np.array([0, count], np.int32),
                np.array([start + count], np.int32),
                self._blocks[None],
                None if lasting is None else np.array(lasting, np.int32),
            )
            hidden = self.model.embed(torch.tensor(ids[start : start + count]))
            hidden = self.model.run_layers(hidden, step, 0, self._num_layers)
            found.append(self.model.logits(hidden))
            start += count
        return torch.cat(found)


IDS = np.random.default_rng(0).integers(0, 97, 70).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    family = request.param if request.param in ("qwen2", "qwen3") else "llama"
    folder = tmp_path_factory.mktemp(request.param)
    settings = {**SIZES, **FAMILIES[request.param]}
    return build_twin(folder, family, **settings)


@pytest.mark.parametrize("weights", ATOL)
def test_logits_are_the_reference_librarys(
    twin: Twin, weights: Weights, tmp_path: pathlib.Path
) -> None:
    runner = Runner(twin.card, pack(twin, weights, tmp_path))
    torch.testing.assert_close(
        runner.logits(IDS, [70]), twin.logits(IDS), atol=ATOL[weights], rtol=0
    )


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("lasting", [[], [0], [34], [0, 1, 17, 34], list(range(1, 35))])
def test_the_last_layer_follows_only_tokens_that_last_and_gives_them_the_same_bits(
    twin: Twin, lasting: list[int], dtype: torch.dtype, num_threads: int, tmp_path: pathlib.Path
) -> None:
    file = pack(twin, "int8", tmp_path)
    whole = Runner(twin.card, file, dtype=dtype).logits(IDS, [35, 35])
    runner = Runner(twin.card, file, dtype=dtype, num_threads=num_threads)
    some = runner.logits(IDS, [35, 35], lasting)
    at = [*lasting, *(35 + i for i in lasting)]
    assert torch.equal(some[at], whole[at])
    others = [i for i in range(70) if i not in at]
    assert not others or not torch.equal(some[others], whole[others])


@pytest.mark.parametrize("lasting", [[35], [-1], [3, 3], [4, 2]])
def test_tokens_that_are_not_of_the_step_cannot_last(
    twin: Twin, lasting: list[int], tmp_path: pathlib.Path
) -> None:
    runner = Runner(twin.card, pack(twin, "float32", tmp_path))
    with pytest.raises(ValueError, match="lasting must rise within the step's tokens"):
        runner.logits(IDS, [35, 35], lasting)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("vocab_size", [97, 2048, 5003])
def test_the_head_says_what_logits_amount_to_also_where_it_does_not_keep_them(
    vocab_size: int, num_threads: int, tmp_path: pathlib.Path
) -> None:
    sizes: dict[str, Any] = {**SIZES, "vocab_size": vocab_size}
    twin = build_twin(tmp_path, "llama", **sizes)
    runner = Runner(twin.card, pack(twin, "float32", tmp_path), num_threads=num_threads)
    hidden = torch.randn(7, twin.card.config.hidden_size)
    rows = np.array([6, 0, 3], np.int32)
    logits = torch.empty(3, vocab_size)
    params = [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=0.7, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.5),
    ]
    records = np.frombuffer(b"".join(p.record() for p in params), SAMPLING_DTYPE)
    digest = runner.plan.head(hidden, rows, logits, records)
    unkept = runner.plan.head(hidden, rows, None, records)
    assert digest.ranges.tobytes() == unkept.ranges.tobytes()
    assert unkept.maxima is None
    assert torch.equal(logits, runner.model.logits(hidden)[rows])
    expected = digest_of(logits.numpy(), params)
    for field in ("max", "arg_max"):
        np.testing.assert_array_equal(digest.ranges[field], expected.ranges[field])
    for field in ("sum", "heated"):
        np.testing.assert_allclose(digest.ranges[field], expected.ranges[field], rtol=1e-5)
    assert (digest.ranges["heated"] > 0).all(1).tolist() == [True, False, True]
    assert not runner.plan.head(hidden, rows, None).ranges["heated"].any()
    np.testing.assert_array_equal(digest.maxima, expected.maxima)
    for room in (None, logits[:0], torch.empty(0, vocab_size)):  # of a prompt's first chunks
        nothing = runner.plan.head(hidden, rows[:0], room, records[:0])
        assert nothing.columns().shape == (0, -(-vocab_size // 2048), 4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("weights", ATOL)
def test_chunks_and_threads_do_not_change_a_bit(
    twin: Twin, weights: Weights, dtype: torch.dtype, isa: str, tmp_path: pathlib.Path
) -> None:
    file = pack(twin, weights, tmp_path)
    whole = Runner(twin.card, file, dtype=dtype, isa=isa).logits(IDS, [70])
    chunks = Runner(twin.card, file, dtype=dtype, isa=isa).logits(IDS, [1, 2, 13, 1, 31, 15, 7])
    alone = Runner(twin.card, file, dtype=dtype, isa=isa, num_threads=1)
    assert whole.isfinite().all()
    assert torch.equal(whole, chunks)
    assert torch.equal(whole, alone.logits(IDS, [3, 1] * 17 + [2]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_of_a_gguf_file_are_multiplied_as_they_stand(
    kind: Quant, dtype: torch.dtype, isa: str, tmp_path: pathlib.Path
) -> None:
    twin, file = pack_blocks(kind, tmp_path)
    runner = Runner(twin.card, file, dtype=dtype, isa=isa)
    whole = runner.logits(IDS, [70])
    assert runner.plan.covers(0, 3) == 3
    torch.testing.assert_close(whole, twin.logits(IDS), atol=BLOCKS_ATOL, rtol=0)
    chunks = Runner(twin.card, file, dtype=dtype, isa=isa).logits(IDS, [1, 2, 13, 1, 31, 15, 7])
    assert torch.equal(whole, chunks)
    alone = Runner(twin.card, file, dtype=dtype, isa=isa, num_threads=1)
    assert torch.equal(whole, alone.logits(IDS, [3, 1] * 17 + [2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_what_the_cache_rounds_changes_little(
    twin: Twin, dtype: torch.dtype, tmp_path: pathlib.Path
) -> None:
    runner = Runner(twin.card, pack(twin, "float32", tmp_path), dtype=dtype)
    found, expected = runner.logits(IDS, [40, 1, 29]), twin.logits(IDS)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    assert not torch.allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("unpacked", ["layers.1.mlp.down", "layers.0.self_attn.qkv", "lm_head"])
def test_a_layer_with_another_linear_runs_operation_by_operation(
    twin: Twin, unpacked: str, tmp_path: pathlib.Path
) -> None:
    runner = Runner(twin.card, pack(twin, "float32", tmp_path), unpacked=unpacked)
    fill_plain(runner, twin)
    planned = [runner.plan.covers(i, 3) for i in range(3)]
    expected = {"layers.1.mlp.down": [1, 0, 1], "layers.0.self_attn.qkv": [0, 2, 1]}
    assert planned == expected.get(unpacked, [3, 2, 1])
    assert runner.plan.has_head == (unpacked != "lm_head")
    torch.testing.assert_close(runner.logits(IDS, [5, 1, 64]), twin.logits(IDS), atol=1e-4, rtol=0)


def fill_plain(runner: Runner, twin: Twin) -> None:
    weights = twin.reference.state_dict()
    for name, tensor in runner.model.tensors().items():
        tensor.copy_(weights[name])


def test_a_file_of_another_layout_or_cut_short_is_a_sentence(
    twin: Twin, tmp_path: pathlib.Path
) -> None:
    file = pack(twin, "bfloat16", tmp_path)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"bfloat16.packed is truncated; prepare the model again"):
        PackedFile(file.path)
    file.path.write_bytes(whole.replace(b'"layout":1', b'"layout":7', 1))
    with pytest.raises(ConfigError, match="has layout 7, this release reads 1; prepare"):
        PackedFile(file.path)
    file.path.write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot read the packed weights"):
        PackedFile(file.path)


def test_a_file_of_another_model_is_a_sentence(twin: Twin, tmp_path: pathlib.Path) -> None:
    file = pack(twin, "bfloat16", tmp_path)
    other = msgspec.structs.replace(twin.card.config, intermediate_size=160)
    with pytest.raises(ConfigError, match=r"mlp.gate_up_proj has shape \[192, 48\], the config"):
        load_packed(file, other, NativeKernels(1))
