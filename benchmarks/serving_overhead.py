"""What serving adds to the model: time per token at the client against the bare model loop.

    python benchmarks/serving_overhead.py [--dtype bfloat16] [--rounds 7] [--streams 1]

Both run the same model with the same threads on this machine, in turn, round after round: the bare
loop calls the agent's ModelRunner with steps that are already built; the client reads a stream of
`POST /models/llama2/generate`.  The tuning notes that this server grew from had 40 ms against 25,
and reached 27.  Prints each round and the median ratio; the aim is 1.08 for one stream.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llm_serving.agent.bare_loop import BareLoop
from llm_serving.prepare.cache import find_prepared

MODEL, PROMPT, OUTPUT = "smollm2-135m-instruct", 128, 128


def bare_loop(dtype: str, num_rows: int, num_threads: int) -> BareLoop:
    card = find_prepared(MODEL, dtype, "auto") or find_prepared(MODEL, dtype)
    if card is None:
        sys.exit(f"prepare it first: llm-serving prepare {MODEL} --dtype {dtype}")
    return BareLoop(
        card,
        num_rows=num_rows,
        prompt_tokens=PROMPT,
        new_tokens=OUTPUT,
        num_threads=num_threads,
    )


def bare_ms(loop: BareLoop) -> float:
    """Mean over the second half of an answer; building the steps is not counted."""
    return statistics.mean(step.step_ms for step in loop.decode()[OUTPUT // 2 :])


class Server:
    def __init__(self, dtype: str, num_threads: int) -> None:
        flags = ["--dtype", dtype, "--port", "0", "--num-threads", str(num_threads)]
        command = [sys.executable, "-m", "llm_serving", "serve", *flags, "--no-prefix-caching"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        self.address = ""
        for line in self._process.stdout or ():
            if found := re.match(r"ready at http://(\S+)", line):
                self.address = found.group(1)
                return
        sys.exit("the server did not start")

    def ms_per_token(self, num_streams: int) -> float:
        """Mean gap between two events in the second half of an answer, over all streams.

        In the first half of several streams the prompts of the others are still computed.
        """
        with ThreadPoolExecutor(num_streams) as pool:
            return statistics.mean(pool.map(self._stream, range(num_streams)))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _stream(self, i: int) -> float:
        connection = http.client.HTTPConnection(self.address)
        parameters = {"max_new_tokens": OUTPUT, "ignore_eos": True, "truncate": PROMPT}
        prompt = f"{i} " + "the quick brown fox jumps over the lazy dog and " * 20
        body = json.dumps({"inputs": prompt, "parameters": parameters, "stream": True})
        connection.request("POST", "/models/llama2/generate", body)
        times = [
            time.perf_counter() for line in connection.getresponse() if line.startswith(b"data:")
        ]
        connection.close()
        half = times[OUTPUT // 2 :]
        return (half[-1] - half[0]) / (len(half) - 1) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    bare = bare_loop(args.dtype, args.streams, args.threads)
    server = Server(args.dtype, args.threads)
    ratios = []
    try:
        print(f"{args.streams} stream(s), {PROMPT} tokens in, {OUTPUT} out, {args.dtype}")
        for _ in range(args.rounds):
            model_ms, client_ms = bare_ms(bare), server.ms_per_token(args.streams)
            ratios.append(client_ms / model_ms)
            print(f"  model {model_ms:6.2f} ms  client {client_ms:6.2f} ms  {ratios[-1]:.3f}")
    finally:
        server.stop()
    print(f"median ratio {np.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})")


if __name__ == "__main__":
    main()
