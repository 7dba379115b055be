"""How many of the processors should be the agent's?  Tokens a second at the client.

    python benchmarks/thread_split.py [--num-threads 1 2] [--weights native bfloat16] [--rounds 3]

One server for each number of threads, all up at once and asked in turn, round after round; the
front end and the client run on the same processors.  Greedy streams of `POST
/models/llama2/generate`, 128 tokens in and 128 out, from the first request to the last event.
Prints each round and the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
from contextlib import ExitStack

from servers import Disturbance, Server, long_prompt, tokens_per_s

PARAMETERS: dict[str, object] = {"max_new_tokens": 128, "ignore_eos": True, "truncate": 128}


def rate(server: Server, num_streams: int) -> float:
    prompts = [long_prompt(i) for i in range(num_streams)]
    return tokens_per_s(server.stream(prompts, PARAMETERS))


def report(servers: dict[int, Server], num_streams: int, num_rounds: int) -> None:
    for server in servers.values():
        rate(server, num_streams)
    found: dict[int, list[float]] = {threads: [] for threads in servers}
    for _ in range(num_rounds):
        for threads, server in servers.items():
            found[threads].append(rate(server, num_streams))
    print(f"{num_streams} stream(s), tokens/s")
    for threads, rates in found.items():
        rounds = "  ".join(f"{each:7.1f}" for each in rates)
        print(
            f"  {threads} thread(s)  {rounds}  median {statistics.median(rates):7.1f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--num-threads", nargs="+", type=int, default=range(1, processors + 1))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", nargs="+", default=["native", "int8", "bfloat16"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    disturbance = Disturbance()
    for weights in options.weights:
        flags = ["--dtype", options.dtype, "--weights", weights, "--no-prefix-caching"]
        print(f"weights {weights}")
        with ExitStack() as stack:
            servers = {
                threads: stack.enter_context(Server(*flags, "--num-threads", str(threads)))
                for threads in options.num_threads
            }
            for num_streams in options.streams:
                report(servers, num_streams, options.rounds)
    print(disturbance)


if __name__ == "__main__":
    main()
