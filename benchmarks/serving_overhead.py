"""What serving adds to the model: time per token at the client against the bare model loop.

    python benchmarks/serving_overhead.py [--weights native bfloat16] [--streams 1 32] [--rounds 5]

Both run the same model with the same threads on this machine, in turn, round after round: the bare
loop calls the agent's ModelRunner with steps that are already built; the client, on the same
processors, reads streams of `POST /models/llama2/generate`.  Milliseconds per token over the second
half of the answers, 128 tokens in and 128 out.  The tuning notes that this server grew from had
40 ms against 25, and reached 27.  Prints each round and the median: the model's time over the
client's is the share of the bare model's speed that is left through HTTP.
"""

from __future__ import annotations

import argparse
import os
import statistics

from bare_model import prepared_card
from servers import Disturbance, Server, long_prompt

from llm_serving.agent.bare_loop import BareLoop

PROMPT, OUTPUT = 128, 128
PARAMETERS: dict[str, object] = {
    "max_new_tokens": OUTPUT,
    "ignore_eos": True,
    "truncate": PROMPT,
}
TARGETS = {("bfloat16", 1): 95, ("native", 1): 85}  # percent
TARGET_OF_MANY = 90


def bare_loop(dtype: str, weights: str, num_rows: int, num_threads: int) -> BareLoop:
    return BareLoop(
        prepared_card(dtype, weights),
        num_rows=num_rows,
        prompt_tokens=PROMPT,
        new_tokens=OUTPUT,
        num_threads=num_threads,
    )


def bare_ms(loop: BareLoop, processors: set[int]) -> float:
    """Mean over the second half of an answer; building the steps is not counted."""
    loop.bind_thread()  # as the agent does, but only now: the client below goes where it likes
    try:
        return statistics.mean(step.step_ms for step in loop.decode()[OUTPUT // 2 :])
    finally:
        os.sched_setaffinity(0, processors)


def client_ms(server: Server, num_streams: int) -> float:
    """Mean over all streams."""
    answers = server.stream([long_prompt(i) for i in range(num_streams)], PARAMETERS)
    return statistics.mean(answer.ms_per_token() for answer in answers)


def report(dtype: str, weights: str, num_streams: int, options: argparse.Namespace) -> None:
    processors = os.sched_getaffinity(0)
    loop = bare_loop(dtype, weights, num_streams, options.threads)
    flags = ["--dtype", dtype, "--weights", weights, "--num-threads", str(options.threads)]
    shares = []
    print(f"{num_streams} stream(s), {PROMPT} tokens in, {OUTPUT} out, {dtype}, weights {weights}")
    with Server(*flags, "--no-prefix-caching") as server:
        client_ms(server, num_streams)
        for _ in range(options.rounds):
            model, client = bare_ms(loop, processors), client_ms(server, num_streams)
            shares.append(100 * model / client)
            print(f"  model {model:6.2f} ms  client {client:6.2f} ms  {shares[-1]:.1f} %")
    share = statistics.median(shares)
    spread = f"{min(shares):.1f} .. {max(shares):.1f}"
    target = TARGETS.get((weights, num_streams), TARGET_OF_MANY)
    is_met = "met" if share >= target else "missed"
    print(f"median {share:.1f} % ({spread}), target >= {target} %: {is_met}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", nargs="+", default=["native", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    disturbance = Disturbance()
    for weights in options.weights:
        for num_streams in options.streams:
            report(options.dtype, weights, num_streams, options)
    print(disturbance)


if __name__ == "__main__":
    main()
