"""What a token's logits must not depend on, as runs that force it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llm_serving.determinism.engine import LONG_CONTEXT, Counts, Prompt
from llm_serving.generation import SamplingParams
from llm_serving.master.scheduler import Limits

__all__ = ["LONGEST_PROMPT", "Scenario", "make_prompts", "plain_first", "scenarios"]

BLOCK_SIZE = 16
# The short ones after the longest fill a pool that has hardly more blocks than that, and then grow.
_MIXED_LENGTHS = (1, 2, 1100, 15, 7, 33, 16, 17, 64, 100, 129, 257, 400)
LONGEST_PROMPT = max(_MIXED_LENGTHS)


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    limits: Limits
    num_blocks: int
    num_threads: int
    forced: tuple[str, ...] = ()  # the fields of `Counts` that must not be 0
    random_arrivals: bool = False

    def not_forced(self, counts: Counts) -> list[str]:
        return [name for name in self.forced if not getattr(counts, name)]


def make_prompts(
    num_prompts: int, new_tokens: int, vocab_size: int, max_model_len: int, seed: int
) -> list[Prompt]:
    """Random ids of mixed lengths; every third begins as one before it.

    Every second draws, with and without a `top_k`; every fifth asks for alternatives.
    """
    rng = np.random.default_rng(seed)
    prompts: list[Prompt] = []
    for i in range(num_prompts):
        length = min(_MIXED_LENGTHS[i % len(_MIXED_LENGTHS)], max_model_len - new_tokens)
        ids = rng.integers(0, vocab_size, length).tolist()
        if i % 3 == 2:
            shared = prompts[int(rng.integers(i))].ids
            ids = [*shared[: max(1, length - 1)], *ids][:length]
        sampling = SamplingParams(max_new_tokens=new_tokens, num_logprobs=3 * (i % 5 == 4))
        if i % 2:
            top_k = 50 * (i % 4 == 1)
            sampling = replace(sampling, temperature=0.8, top_p=0.95, top_k=top_k, seed=1000 + i)
        prompts.append(Prompt(tuple(ids), sampling, int(rng.integers(2 * new_tokens))))
    return prompts


def plain_first(prompts: Sequence[Prompt], new_tokens: int) -> list[Prompt]:
    """Plain ones come closer together, the others later: a step of both keeps logits."""
    return [
        replace(p, arrives=p.arrives // 2 if p.is_plain else p.arrives + new_tokens)
        for p in prompts
    ]


def scenarios(
    prompts: Sequence[Prompt], new_tokens: int, num_threads: int
) -> tuple[Scenario, list[Scenario]]:
    """Each request alone, and everything that must give the same bits.

    Long contexts are forced if the model allows any.
    """
    blocks = [-(-(len(prompt.ids) + new_tokens) // BLOCK_SIZE) for prompt in prompts]
    longest, ample = max(blocks), sum(blocks) + len(blocks)
    whole = Limits(max_num_seqs=len(prompts), max_num_batched_tokens=2048, prefix_caching=False)
    chunks = replace(whole, max_num_batched_tokens=48)
    is_long = any(len(prompt.ids) + new_tokens - 1 > LONG_CONTEXT for prompt in prompts)
    forced = ("long_contexts",) if is_long else ()
    alone = Scenario("alone", replace(whole, max_num_seqs=1), ample, num_threads, forced)
    tight = longest + 1  # the longest fits alone, so all the others must give way
    return alone, [
        Scenario("in random company", whole, ample, num_threads, ("mixed_steps", *forced), True),
        Scenario("prompts in chunks", chunks, ample, num_threads, ("mixed_steps", *forced), True),
        Scenario(
            "preempted and computed again",
            replace(chunks, headroom_blocks=0, reserve_share=0.0),
            tight,
            num_threads,
            ("preemptions", *forced),
        ),
        Scenario(
            "from the prefix cache",
            replace(whole, prefix_caching=True, max_num_seqs=4),
            ample,
            num_threads,
            ("prefix_hits", *forced),
        ),
        *(
            Scenario(f"{threads} thread{'s' * (threads > 1)}", whole, ample, threads, forced, True)
            for threads in sorted({1, 2, 3} - {num_threads})
        ),
    ]
