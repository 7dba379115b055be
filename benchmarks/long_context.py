"""What do long contexts and shared beginnings of prompts cost?

    python benchmarks/long_context.py [--weights native] [--rounds 5]

1. Through HTTP: time to the first token of a system prompt of 1,000 tokens with a suffix, whose
   beginning the server has seen, against that of the suffix alone, which it has not; in turn, every
   suffix another one.
2. Bare decode steps of 1 and of 8 rows at 192 to 8,192 tokens of context: keys and values that are
   read, the time of the attention and its share of the machine's read bandwidth, and how much
   longer the whole step takes than at 192; in turn, with the limits measured in every round.

Medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics

from bare_model import BareModel, Shape, prepared_card
from servers import Disturbance, Server

from llm_serving.server.tokenizer import Tokenizer

SYSTEM, SUFFIXES = 1000, (32, 128)
CONTEXTS, ROWS = (192, 1024, 4096, 8192), (1, 8)
TARGET = 1.2
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book"
).split()


class Prompts:
    """Texts of an exact number of tokens that no other text begins with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._words = [word for word in WORDS if len(tokenizer.encode(f" {word}")) == 1]
        self._rng = random.Random(0)

    def text(self, num_tokens: int) -> str:
        text = "".join(f" {self._rng.choice(self._words)}" for _ in range(num_tokens))
        if len(self._encode(text)) != num_tokens:
            raise ValueError(f"{text!r} has {len(self._encode(text))} tokens, not {num_tokens}")
        return text


def shared_prompt(flags: list[str], prompts: Prompts, rounds: int) -> None:
    one_token: dict[str, object] = {"max_new_tokens": 2, "ignore_eos": True}
    system = prompts.text(SYSTEM)
    print(f"\nthrough HTTP, a system prompt of {SYSTEM} tokens; TTFT in ms")
    print("| suffix tokens | suffix alone | system prompt + suffix | ratio | without a hit | target | |")
    print("|---|---|---|---|---|---|---|")
    with Server(*flags) as server:

        def ttft_ms(text: str) -> float:
            return server.stream([text], one_token)[0].ttft_ms

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
            is_met = "met" if ratio <= TARGET else "missed"
            print(
                f"| {size} | {alone_ms:.1f} | {shared_ms:.1f} | {ratio:.2f} | {cold_ms:.1f}"
                f" | <= {TARGET} | {is_met} |",
                flush=True,
            )


def decode(weights: str, rounds: int, num_threads: int) -> None:
    card = prepared_card("auto", weights)
    longest = max(CONTEXTS)
    shapes = [Shape(rows, 1, context) for rows in ROWS for context in CONTEXTS]
    steps_ms: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    attend_ms: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    of_bandwidth: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    bandwidths = []
    with BareModel(card, num_rows=max(ROWS), context=longest, num_threads=num_threads) as model:
        for _ in range(rounds):
            limits = model.limits()
            bandwidths.append(limits.bandwidth)
            for shape in shapes:
                steps_ms[shape].append(model.step_ms(shape, 3)[0])
                attend_ms[shape].append(model.operations_ms(shape, 3)["attend"])
                ideal_ms = model.needs(shape)["attend"].num_bytes / limits.bandwidth / 1e6
                of_bandwidth[shape].append(ideal_ms / attend_ms[shape][-1])
        needs = {shape: model.needs(shape)["attend"] for shape in shapes}
    print(f"\nbare decode steps; read bandwidth {statistics.median(bandwidths):.1f} GB/s")
    print("| rows | context | KV MB | attention ms | GB/s | of the bandwidth | step ms | of the step at 192 |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        megabytes, ms = needs[shape].num_bytes / 1e6, statistics.median(attend_ms[shape])
        short = statistics.median(steps_ms[Shape(shape.num_rows, 1, CONTEXTS[0])])
        step_ms = statistics.median(steps_ms[shape])
        print(
            f"| {shape.num_rows} | {shape.context} | {megabytes:.0f} | {ms:.2f} | {megabytes / ms:.1f}"
            f" | {100 * statistics.median(of_bandwidth[shape]):.0f} % | {step_ms:.2f}"
            f" | {step_ms / short:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", default="native")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    disturbance = Disturbance()
    card = prepared_card("auto", options.weights)
    flags = ["--weights", options.weights, "--num-threads", str(options.threads)]
    shared_prompt(flags, Prompts(Tokenizer(card.tokenizer)), options.rounds)
    decode(options.weights, options.rounds, options.threads)
    print(disturbance)


if __name__ == "__main__":
    main()
