"""Our tokens are the reference library's: transformers, float32, the same dequantised weights."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from llm_serving.agent.model_runner import ModelRunner
from llm_serving.generation import SamplingParams
from llm_serving.master.request import Request
from llm_serving.master.step import Row, Step
from llm_serving.master.step_inputs import StepInputBuilder
from llm_serving.model_card import ModelCard
from llm_serving.prepare.prepare import prepare
from llm_serving.prepare.progress import Quiet
from tests.native_kernels import needs_native
from tests.serving import RunningServer

NUM_NEW = 12
NUM_NEW_LONG = 40  # of the prompts in the middle: they grow until the small pool is full
NEAR_TIE = 2e-3  # two best logits so close may change places
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 64, 65, 100, 150, 200, 256, 400, 700, 1000)
MIDDLE = range(16, 66)
HOUSE = pathlib.Path(__file__).parents[1]


@dataclass(frozen=True)
class Answer:
    prompt: str
    ids: list[int]
    margins: list[float]  # between the two best logits of each step


def texts(tokenizer: Tokenizer) -> list[str]:
    """Pieces of a licence, of so many tokens, cut where the tokenizer ends one."""
    licence = (HOUSE / "LICENSE").read_text()
    offsets = tokenizer.encode(licence).offsets
    return [
        licence[offsets[40 * i][0] : offsets[40 * i + length - 1][1]]
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(smollm2: pathlib.Path) -> Any:
    torch.set_num_threads(2)
    model: Any = AutoModelForCausalLM.from_pretrained(
        smollm2.parent,
        gguf_file=smollm2.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model.eval()


def generated(
    reference: Any, prompts: list[list[int]], num_new: int
) -> list[tuple[list[int], list[float]]]:
    """Ids, and their margins, of greedy generation in one batch, padded on the left."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    out = reference.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=num_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack([step.topk(2).values for step in out.logits], dim=1)
    margins = (best[..., 0] - best[..., 1]).tolist()
    return list(zip(out.sequences[:, longest:].tolist(), margins, strict=True))


@pytest.fixture(scope="module")
def answers(reference: Any, smollm2_card: ModelCard) -> list[Answer]:
    """What greedy generation of the reference says to 20 prompts of 1 to 1,000 tokens."""
    tokenizer = Tokenizer.from_file(smollm2_card.tokenizer)

    ids = [tokenizer.encode(text).ids for text in texts(tokenizer)]
    long = [each for each, length in zip(ids, LENGTHS, strict=True) if length in MIDDLE]
    answered = {
        len(each): answer
        for each, answer in zip(long, generated(reference, long, NUM_NEW_LONG), strict=True)
    }
    made = []
    for text, each in zip(texts(tokenizer), ids, strict=True):
        out, margins = answered.get(len(each)) or generated(reference, [each], NUM_NEW)[0]
        made.append(Answer(text, out, margins))
    return made


def assert_equal(expected: Answer, got: Sequence[int]) -> None:
    """Equal up to the first near-tie of the reference, behind which anything may follow."""
    for i, (theirs, margin) in enumerate(zip(expected.ids, expected.margins, strict=True)):
        if i >= len(got) or got[i] != theirs:
            assert margin < NEAR_TIE, f"token {i} of {expected.prompt[:40]!r}: {got} {expected.ids}"
            return
    assert len(got) == len(expected.ids)


def check(server: RunningServer, expected: Answer) -> None:
    answer = server.generate(expected.prompt, max_new_tokens=len(expected.ids))
    assert_equal(expected, [token["id"] for token in answer["details"]["tokens"]])


def check_all_at_once(server: RunningServer, answers: list[Answer]) -> None:
    with ThreadPoolExecutor(len(answers)) as pool:
        list(pool.map(lambda answer: check(server, answer), answers))


def test_alone_all_at_once_and_from_the_prefix_cache(
    tmp_path: pathlib.Path, answers: list[Answer], kernels: str
) -> None:
    server = RunningServer(
        tmp_path / "log", "--dtype", "float32", "--kernels", kernels
    ).wait_ready()
    try:
        for answer in answers if kernels == "native" else answers[1::2]:  # half are slow enough
            check(server, answer)
        hits = server.metric("vllm:prefix_cache_hits_total")
        check_all_at_once(server, answers)
        assert server.metric("vllm:prefix_cache_hits_total") > hits + 1500
    finally:
        assert server.stop() == 0


def test_all_at_once_in_small_chunks_without_prefix_hits(
    tmp_path: pathlib.Path, answers: list[Answer], kernels: str
) -> None:
    flags = (
        "--dtype",
        "float32",
        "--kernels",
        kernels,
        "--max-num-batched-tokens",
        "64",
        "--no-prefix-caching",
    )
    server = RunningServer(tmp_path / "log", *flags).wait_ready()
    try:
        check_all_at_once(server, answers)
        assert server.metric("vllm:prefix_cache_hits_total") == 0
    finally:
        assert server.stop() == 0


def test_in_a_pool_so_small_that_requests_are_preempted(
    tmp_path: pathlib.Path, answers: list[Answer], kernels: str
) -> None:
    # without the share of prompts, so that as many as fit run at once
    flags = ("--dtype", "float32", "--kernels", kernels, "--num-kv-blocks", "24")
    small_steps = ("--max-num-batched-tokens", "64", "--max-step-stretch", "inf")
    server = RunningServer(tmp_path / "log", *flags, *small_steps).wait_ready()
    try:
        assert "warning: the KV cache holds 384 tokens" in server.output
        fitting = [a for a, length in zip(answers, LENGTHS, strict=True) if length <= 256]
        for _ in range(5):  # who comes so late that another has ended need not be preempted
            check_all_at_once(server, fitting)
            if server.metric("vllm:num_preemptions_total") > 0:
                break
        assert server.metric("vllm:num_preemptions_total") > 0
    finally:
        assert server.stop() == 0


def test_logits_of_the_real_model_are_the_references(
    reference: Any, smollm2: pathlib.Path, kernels: str
) -> None:
    ids = np.random.default_rng(0).integers(0, 49152, 300).tolist()
    with torch.inference_mode():
        theirs = reference(torch.tensor([ids])).logits[0]
    weights = "auto" if kernels == "native" else None
    card = prepare(str(smollm2), "float32", Quiet(), weights)
    runner = ModelRunner.load(
        card,
        device="cpu",
        max_model_len=512,
        block_size=16,
        num_blocks=40,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        num_threads=2,
        phase=lambda _: None,
    )
    request = Request("r", ids, SamplingParams())
    request.block_table.extend(list(range(39, 19, -1)))
    builder, start = StepInputBuilder(16, logits_every=1), 0
    for step_id, num_tokens in enumerate((1, 64, 100, 134, 1)):
        row = Row(request, start, num_tokens, 0, True)
        inputs = builder.build(Step(step_id, [row], [row]))
        ours = torch.from_numpy(runner.execute(inputs, lambda: None).logits)
        start += num_tokens
        assert (ours[0] - theirs[start - 1]).abs().max() < 5e-4  # as is documented
