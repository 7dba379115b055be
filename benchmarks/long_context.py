"""What do long contexts and shared beginnings of prompts cost?

    python benchmarks/long_context.py [--weights native] [--kv-dtype auto] [--rounds 5]

1. Through HTTP: time to the first token of a system prompt of 1,000 tokens with a suffix, whose
   beginning the server has seen, against that of the suffix alone, which it has not; in turn, every
   suffix another one.
2. The same two steps bare, and their rooflines (see roofline_cpu.py): every token of the suffix
   attends to the system prompt, hit or not, so this is the ratio that the arithmetic leaves.  Of
   1,000 tokens 62 blocks of 16 are found; 8 tokens are computed again.
3. Bare decode steps of 1 and of 8 rows at 192 to 8,192 tokens of context: keys and values that are
   read, the time of the attention and its share of the machine's read bandwidth, and how much
   longer the whole step takes than at 192.

All in turn, the limits measured in every round; medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics

from bare_model import BareModel, Shape, prepared_card
from servers import WORDS, Disturbance, Server

from llm_serving.agent.bare_loop import BLOCK_SIZE
from llm_serving.server.tokenizer import Tokenizer

SYSTEM, SUFFIXES = 1000, (32, 128)
CONTEXTS, ROWS = (192, 1024, 4096, 8192), (1, 8)
TARGET = 1.2
TWO_TOKENS: dict[str, object] = {"max_new_tokens": 2, "ignore_eos": True}


class Prompts:
    """Texts of an exact number of tokens that no other text begins with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._rng = random.Random(0)

    def text(self, num_tokens: int) -> str:
        text = "".join(f" {self._rng.choice(WORDS)}" for _ in range(num_tokens))
        if len(self._encode(text)) != num_tokens:
            raise ValueError(f"{text!r} has {len(self._encode(text))} tokens, not {num_tokens}")
        return text


def shared_prompt(flags: list[str], prompts: Prompts, rounds: int) -> None:
    system = prompts.text(SYSTEM)
    print(
        f"\nthrough HTTP, a system prompt of {SYSTEM} tokens; TTFT in ms\n"
        "| suffix tokens | suffix alone | system prompt + suffix | ratio | without a hit | target |"
        " |\n|---|---|---|---|---|---|---|"
    )
    with Server(*flags) as server:

        def ttft_ms(text: str) -> float:
            return server.stream([text], TWO_TOKENS)[0].ttft_ms

        for size in SUFFIXES:
            for _ in range(3):
                ttft_ms(system + prompts.text(size))
            rows = []
            for i in range(3 * rounds):
                alone, shared = prompts.text(size), system + prompts.text(size)
                if i % 2:
                    rows.append((ttft_ms(alone), ttft_ms(shared)))
                else:
                    rows.append((ttft_ms(shared), ttft_ms(alone))[::-1])
            alone_ms, shared_ms = (statistics.median(column) for column in zip(*rows, strict=True))
            ratio = statistics.median(shared / alone for alone, shared in rows)
            cold_ms = statistics.median(ttft_ms(prompts.text(SYSTEM + size)) for _ in range(rounds))
            print(
                f"| {size} | {alone_ms:.1f} | {shared_ms:.1f} | {ratio:.2f} | {cold_ms:.1f}"
                f" | <= {TARGET} | {'met' if ratio <= TARGET else 'missed'} |",
                flush=True,
            )


def bare_prompts(model: BareModel, rounds: int) -> None:
    print(
        "\nbare steps of the same tokens\n"
        "| suffix tokens | suffix alone | with the prompt | ratio | of the rooflines |\n"
        "|---|---|---|---|---|"
    )
    for size in SUFFIXES:
        alone = Shape(1, size, size)
        shared = Shape(1, SYSTEM % BLOCK_SIZE + size, SYSTEM + size)
        rows, ideals = [], []
        for _ in range(rounds):
            limits = model.limits()
            rows.append((model.step_ms(alone, 3)[0], model.step_ms(shared, 3)[0]))
            both = (model.needs(shape).values() for shape in (alone, shared))
            least = [sum(need.ms(limits) for need in needs) for needs in both]
            ideals.append(least[1] / least[0])
        alone_ms, shared_ms = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio, ideal = statistics.median(b / a for a, b in rows), statistics.median(ideals)
        print(f"| {size} | {alone_ms:.1f} | {shared_ms:.1f} | {ratio:.2f} | {ideal:.2f} |")


class Decode:
    """One shape of decode step, over all rounds."""

    def __init__(self, model: BareModel, num_rows: int, context: int) -> None:
        self._model, self._shape = model, Shape(num_rows, 1, context)
        self._num_bytes = model.needs(self._shape)["attend"].num_bytes
        self._steps_ms: list[float] = []
        self._attend_ms: list[float] = []
        self._shares: list[float] = []

    def measure(self, bandwidth: float) -> None:
        """`bandwidth` in GB/s."""
        self._steps_ms.append(self._model.step_ms(self._shape, 3)[0])
        self._attend_ms.append(self._model.operations_ms(self._shape, 3)["attend"])
        self._shares.append(self._num_bytes / bandwidth / 1e6 / self._attend_ms[-1])

    @property
    def step_ms(self) -> float:
        return statistics.median(self._steps_ms)

    def row(self, short_ms: float) -> str:
        attend_ms, megabytes = statistics.median(self._attend_ms), self._num_bytes / 1e6
        share = 100 * statistics.median(self._shares)
        return (
            f"| {self._shape.num_rows} | {self._shape.context} | {megabytes:.0f}"
            f" | {attend_ms:.2f} | {megabytes / attend_ms:.1f} | {share:.0f} %"
            f" | {self.step_ms:.2f} | {self.step_ms / short_ms:.2f} |"
        )


def decode(model: BareModel, rounds: int) -> None:
    cases = {rows: [Decode(model, rows, context) for context in CONTEXTS] for rows in ROWS}
    bandwidths = []
    for _ in range(rounds):
        bandwidths.append(model.limits().bandwidth)
        for some in cases.values():
            for case in some:
                case.measure(bandwidths[-1])
    print(
        f"\nbare decode steps; read bandwidth {statistics.median(bandwidths):.1f} GB/s\n"
        "| rows | context | KV MB | attention ms | GB/s | of the bandwidth | step ms"
        f" | of the step at {CONTEXTS[0]} |\n|---|---|---|---|---|---|---|---|"
    )
    for some in cases.values():
        for case in some:
            print(case.row(some[0].step_ms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", default="native")
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    disturbance = Disturbance()
    card = prepared_card("auto", options.weights)
    flags = ["--weights", options.weights, "--num-threads", str(options.threads)]
    flags += ["--kv-dtype", options.kv_dtype]
    shared_prompt(flags, Prompts(Tokenizer(card.tokenizer)), options.rounds)
    shape = {"num_rows": max(ROWS), "context": max(CONTEXTS)}
    threads, kv_dtype = options.threads, options.kv_dtype
    with BareModel(card, **shape, num_threads=threads, kv_dtype=kv_dtype) as model:
        bare_prompts(model, options.rounds)
        decode(model, options.rounds)
    print(disturbance)


if __name__ == "__main__":
    main()
