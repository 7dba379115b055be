"""How fast does a server start that has started before, and how much memory does it take?

    python benchmarks/start_memory.py [--weights native] [--rounds 5]

Start: seconds from the start of the process until GET /readyz answers 200, and the phases that the
server itself reports; a first start, which prepares the model or reads it from the disk, is not
counted.  Memory: after 32 streams of 256 tokens in and 256 out, first with a KV cache for exactly
these (32 x 512 tokens) and no more than 32 requests at a time, then with every default.  Of each
process, from /proc/PID/smaps_rollup:

    RSS   every page that it has mapped and that is in memory; pages that several processes share
          (libraries, the weights' file, the step's arrays) are in the RSS of each
    PSS   such a page divided among those who share it: summed over the processes each page counts
          once, which is what the server takes of the machine; a page that processes outside of the
          server share as well counts in part
    file  the part of the RSS that is files (libraries, the weights), which the kernel can take
          back and read again; the rest is the server's own (heap, KV cache)
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from urllib.error import URLError

from servers import Disturbance, Server, long_prompt, tokens_per_s

STREAMS, PROMPT, OUTPUT, BLOCK_SIZE = 32, 256, 256, 16
START_TARGET_S, MEMORY_TARGET_GB = 3.0, 0.9
SIZED = (
    *("--num-kv-blocks", str(STREAMS * (PROMPT + OUTPUT) // BLOCK_SIZE)),
    *("--max-num-seqs", str(STREAMS)),
)
FIELDS = ("Rss", "Pss", "Anonymous", "Shmem")


def until_ready(server: Server) -> float:
    """Seconds since the start."""
    while True:
        try:
            server.get("/readyz")
            return time.perf_counter() - server.began_s
        except URLError:
            time.sleep(0.005)


def start(flags: list[str], rounds: int) -> None:
    with Server(*flags):
        pass
    seconds, phases = [], []
    for _ in range(rounds):
        with Server(*flags) as server:
            seconds.append(until_ready(server))
            phases.append(json.loads(server.get("/info"))["start_phases_s"])
    print("\nsecond start\n| phase | s |\n|---|---|")
    for name in phases[-1]:
        print(f"| {name} | {statistics.median(phase[name] for phase in phases):.3f} |")
    median = statistics.median(seconds)
    spread = f"{min(seconds):.2f} .. {max(seconds):.2f}"
    is_met = "met" if median <= START_TARGET_S else "missed"
    print(f"until /readyz: {median:.2f} s ({spread}), target <= {START_TARGET_S:.0f} s: {is_met}")


def memory_of(pid: int) -> dict[str, float]:
    """MB."""
    found = dict.fromkeys((*FIELDS, "File"), 0.0)
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split(":")[0], line.split()[1]
        if name in FIELDS:
            found[name] += int(kilobytes) * 1024 / 1e6
    return found


def memory(flags: list[str], what: str, target_gb: float | None) -> None:
    parameters: dict[str, object] = {
        "max_new_tokens": OUTPUT,
        "truncate": PROMPT,
        "ignore_eos": True,
    }
    prompts = [long_prompt(i) for i in range(STREAMS)]
    with Server(*flags) as server:
        rate = tokens_per_s(server.stream(prompts, parameters))
        found = {f"{name} ({pid})": memory_of(pid) for pid, name in server.processes().items()}
        info = json.loads(server.get("/info"))
    blocks = info["num_kv_blocks"] * info["block_size"]
    print(
        f"\nmemory after {STREAMS} streams of {PROMPT} + {OUTPUT} tokens, {what} "
        f"({blocks} tokens of KV cache; {rate:.0f} tokens/s)"
    )
    print("| process | PSS MB | RSS MB | anonymous MB |\n|---|---|---|---|")
    for name, each in found.items():
        print(f"| {name} | {each['Pss']:.0f} | {each['Rss']:.0f} | {each['Anonymous']:.0f} |")
    total = {name: sum(each[name] for each in found.values()) for name in FIELDS}
    print(f"| together | {total['Pss']:.0f} | {total['Rss']:.0f} | {total['Anonymous']:.0f} |")
    if target_gb is not None:
        is_met = "met" if total["Pss"] <= 1000 * target_gb else "missed"
        print(f"resident memory: {total['Pss'] / 1000:.2f} GB, target <= {target_gb} GB: {is_met}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", default="native")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    disturbance = Disturbance()
    flags = ["--weights", options.weights]
    start(flags, options.rounds)
    memory([*flags, *SIZED], "a KV cache of their size", MEMORY_TARGET_GB)
    memory(flags, "all defaults", None)
    print(disturbance)


if __name__ == "__main__":
    main()
