"""What does sampling cost against greedy decoding, with 32 streams through HTTP?

    python benchmarks/sampling_cost.py [--weights native] [--rounds 7] [--streams 32]

One server, the same prompts of 128 tokens and answers of 128, in turn greedy and with temperature
0.8 and top_p 0.95: tokens per second of all streams, prompts included, and milliseconds between two
tokens of a stream in the second half of its answer; the ratio of each round, and the median.
Then the bare steps of the same number of rows at 192 tokens of context, in this process: how long
the sampler works in each, on the logits of tokens drawn at random.
"""

from __future__ import annotations

import argparse
import os
import statistics

from bare_model import BareModel, Shape, prepared_card
from servers import Answer, Disturbance, Server, long_prompt, tokens_per_s

from llm_serving.generation import SamplingParams

PROMPT, OUTPUT = 128, 128
GREEDY: dict[str, object] = {"max_new_tokens": OUTPUT, "truncate": PROMPT, "ignore_eos": True}
SAMPLED: dict[str, object] = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
BARE = {
    "greedy": SamplingParams(),
    "temperature 0.8": SamplingParams(temperature=0.8, seed=1),
    "temperature 0.8, top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    "temperature 0.8, top_k 50": SamplingParams(temperature=0.8, top_k=50, seed=1),
    "greedy, 5 alternatives": SamplingParams(num_logprobs=5),
}
TARGET = 0.9


def mean_ms(answers: list[Answer]) -> float:
    return statistics.mean(answer.ms_per_token() for answer in answers)


def through_http(flags: list[str], num_streams: int, rounds: int) -> None:
    prompts = [long_prompt(i) for i in range(num_streams)]
    print(f"\n{num_streams} streams through HTTP, {PROMPT} tokens in, {OUTPUT} out")
    print(
        "| greedy tokens/s | sampled tokens/s | ratio | greedy ms/token | sampled ms/token"
        " | ratio |\n|---|---|---|---|---|---|"
    )
    rows: list[list[float]] = []
    with Server(*flags, "--no-prefix-caching") as server:
        server.stream(prompts, GREEDY)
        for i in range(rounds):
            both = [(GREEDY, 0), (SAMPLED, 1)][:: -1 if i % 2 else 1]
            found = {k: server.stream(prompts, parameters) for parameters, k in both}
            rates = [tokens_per_s(found[k]) for k in (0, 1)]
            gaps_ms = [mean_ms(found[k]) for k in (0, 1)]
            rows.append([*rates, rates[1] / rates[0], *gaps_ms, gaps_ms[0] / gaps_ms[1]])
            print(_line(rows[-1]), flush=True)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(_line(medians), "median")
    is_met = "met" if medians[2] >= TARGET else "missed"
    print(f"sampled rate / greedy rate: {medians[2]:.3f}, target >= {TARGET:.2f}: {is_met}")


def _line(row: list[float]) -> str:
    greedy, sampled, ratio, greedy_ms, sampled_ms, gap_ratio = row
    rates, gaps = (
        f"{greedy:.0f} | {sampled:.0f} | {ratio:.3f}",
        f"{greedy_ms:.2f} | {sampled_ms:.2f}",
    )
    return f"| {rates} | {gaps} | {gap_ratio:.3f} |"


def bare(weights: str, num_rows: int, rounds: int, num_threads: int) -> None:
    card = prepared_card("auto", weights)
    shape = Shape(num_rows, 1, 192)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in BARE}
    with BareModel(card, num_rows=num_rows, context=192, num_threads=num_threads) as model:
        for _ in range(rounds):
            for name, sampling in BARE.items():
                spent[name].append(model.step_ms(shape, 5, sampling))
    print(
        f"\na bare step of {num_rows} rows\n| | step ms | sampling ms | of the step |"
        "\n|---|---|---|---|"
    )
    for name, times in spent.items():
        step_ms, sample_ms = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {step_ms:.2f} | {sample_ms:.2f} | {100 * sample_ms / step_ms:.0f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", default="native")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    disturbance = Disturbance()
    flags = ["--weights", options.weights, "--num-threads", str(options.threads)]
    through_http(flags, options.streams, options.rounds)
    bare(options.weights, options.streams, options.rounds, options.threads)
    print(disturbance)


if __name__ == "__main__":
    main()
