"""Do long prompts make others wait?  Gaps between tokens of closed-loop streams, with and without.

    python benchmarks/mixed_load.py [--stretch 1.5 2 2.2 2.5 3 off] [--serve "--weights int8"]
    python benchmarks/mixed_load.py --url http://127.0.0.1:8000 --model m
    both: [--rounds 3] [--peer-ttft MS] [--together]

16 streams ask again when they are answered (128 tokens in, 128 out), and every 2 s somebody sends
a prompt of 512 tokens.  All prompts differ.  Without --url a server of ours is started for each
value of `scheduler.max_step_stretch` in each round, values in turn; with it, any server that knows
OpenAI's /v1/completions is driven.  Prints for each run, and at the end as medians over the rounds:

    ITL        ms between two events with text of the streams: p50, p99, and the one by the other
    tokens/s   of the streams
    TTFT 512   ms to the first token of the long prompts, p50 and p90
    TTFT 128   of the streams, p50

The streams begin with answers of different lengths, as if they had run for long, and the first
seconds are not counted.  With --together all are alike and counted from the first: they begin, and
if nothing tears them apart end and begin again, as one burst (see `scheduler.burst_tokens`, of
which --burst-tokens tries several).  `--every 0` leaves the long prompts out.  Last come the
targets: ITL p99/p50, and with --peer-ttft, what a peer's TTFT p50 of the long prompts is, ours
under it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
import numpy as np
from servers import WORDS, Call, Client, Server

LONG_OUTPUT = 16  # tokens that a long prompt asks for
RATIO = 2.5  # the target: ITL p99 / p50, at most
ABOUT = 0.1  # the share by which a long prompt may miss its number of tokens


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


@dataclass(frozen=True, slots=True)
class Completion:
    asked_s: float  # on time.perf_counter, as the events
    events_s: list[float]  # of those with text
    prompt_tokens: int
    output_tokens: int

    @property
    def ttft_ms(self) -> float:
        return (self.events_s[0] - self.asked_s) * 1e3


@dataclass(frozen=True, slots=True)
class Load:
    url: str
    model: str
    streams: int
    every_s: float
    warm_up_s: float
    seconds: float
    prompt: int
    output: int
    long_prompt: int
    together: bool


@dataclass(frozen=True, slots=True)
class Figures:
    itl_p50: float
    itl_p99: float
    tokens_s: float
    long_p50: float
    long_p90: float
    short_p50: float

    @property
    def ratio(self) -> float:
        return self.itl_p99 / self.itl_p50

    def __str__(self) -> str:
        return (
            f"ITL p50 {self.itl_p50:6.2f} p99 {self.itl_p99:7.2f} ratio {self.ratio:5.2f}   "
            f"{self.tokens_s:7.1f} tokens/s   "
            f"TTFT 512 p50 {self.long_p50:6.0f} p90 {self.long_p90:6.0f}   "
            f"TTFT 128 p50 {self.short_p50:6.0f}"
        )


def ask(load: Load, num_tokens: int, max_tokens: int) -> Call:
    """One streamed answer to a prompt that nobody sent before."""
    url = urlsplit(load.url)
    request = {
        "model": load.model,
        "prompt": " ".join(random.choices(WORDS, k=num_tokens)),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Call(url.hostname or "", url.port or 80, f"{url.path}/v1/completions", request)


def completion(call: Call) -> Completion:
    """What a call that has ended was answered."""
    *payloads, last = call.payloads() or [b""]
    if last != b"[DONE]":
        sys.exit("an answer ended before its end")
    events_s, usage = [], _Usage()
    for at_s, payload in zip(call.answer.times_s, payloads, strict=False):
        event = msgspec.json.decode(payload, type=_Event)
        if bytes(event.error):
            sys.exit(f"the server says {bytes(event.error).decode()}")
        if event.choices and event.choices[0].text:
            events_s.append(at_s)
        usage = event.usage or usage
    if not events_s:
        sys.exit("an answer has no token")
    num_tokens = usage.completion_tokens or len(events_s)
    return Completion(call.answer.began_s, events_s, usage.prompt_tokens, num_tokens)


def run(load: Load) -> Figures:
    began_s = time.perf_counter()
    first_s = began_s + load.warm_up_s
    last_s = first_s + load.seconds
    client = Client()
    calls: list[Call] = []
    long: list[Call] = []

    def stream(length: int) -> None:
        if time.perf_counter() < last_s:
            calls.append(ask(load, load.prompt, length))
            client.begin(calls[-1], lambda: stream(load.output))

    for i in range(load.streams):
        stream(load.output if load.together else load.output * (i + 1) // load.streams)
    for i in itertools.count(1) if load.every_s else ():
        due_s = began_s + i * load.every_s
        if due_s > last_s:
            break
        client.read(due_s)
        long.append(ask(load, load.long_prompt, LONG_OUTPUT))
        client.begin(long[-1])
    client.read()
    probes = [completion(call) for call in long]
    _check_length(load, probes)
    return _figures(load, [completion(call) for call in calls], probes, first_s, last_s)


def _check_length(load: Load, long: list[Completion]) -> None:
    for found in (probe.prompt_tokens for probe in long):
        if abs(found - load.long_prompt) > ABOUT * load.long_prompt:
            sys.exit(
                f"a long prompt has {found} tokens by the server's usage, not about "
                f"{load.long_prompt}: --long counts words, a token each in most vocabularies"
            )


def _figures(
    load: Load, answers: list[Completion], long: list[Completion], first_s: float, last_s: float
) -> Figures:
    gaps_ms, events = [], 0.0
    for answer in answers:
        at = np.array(answer.events_s)
        is_counted = (first_s <= at) & (at < last_s)
        events += int(is_counted.sum()) * answer.output_tokens / len(at)
        gaps_ms.append(np.diff(at)[is_counted[1:]] * 1e3)
    itl = np.percentile(np.concatenate(gaps_ms), [50, 99])
    short = [a.ttft_ms for a in answers if a.asked_s >= first_s]
    probes = [a.ttft_ms for a in long if first_s <= a.asked_s < last_s] or [float("nan")]
    return Figures(
        itl_p50=float(itl[0]),
        itl_p99=float(itl[1]),
        tokens_s=events / load.seconds,
        long_p50=float(np.percentile(probes, 50)),
        long_p90=float(np.percentile(probes, 90)),
        short_p50=statistics.median(short),
    )


def median_of(runs: list[Figures]) -> Figures:
    names = Figures.__slots__
    return Figures(**{n: statistics.median(getattr(r, n) for r in runs) for n in names})


def verdicts(figures: Figures, peer_ttft: float | None) -> list[str]:
    """One for each target that these figures decide."""
    found = [("ITL p99/p50", figures.ratio, "<=", RATIO, figures.ratio <= RATIO)]
    if peer_ttft is not None:
        is_met = figures.long_p50 < peer_ttft
        found.append(("TTFT p50 of long prompts, ms", figures.long_p50, "<", peer_ttft, is_met))
    return [
        f"{name} {value:.2f}, target {sign} {target:g}: {'met' if is_met else 'missed'}"
        for name, value, sign, target, is_met in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", help="a server that runs already")
    add("--model", default="llama2", help="its name for the model")
    add("--stretch", nargs="+", default=["1.5", "2", "2.2", "2.5", "3", "off"])
    add("--burst-tokens", nargs="+", default=["8"])
    add("--together", action="store_true", help="streams of equal lengths, counted from the first")
    add("--serve", default="", help="further flags of our server, as one word")
    add("--rounds", type=int, default=3)
    add("--peer-ttft", type=float, metavar="MS", help="TTFT p50 of long prompts at a peer")
    add("--streams", type=int, default=16)
    add("--every", type=float, default=2.0, help="seconds between two long prompts")
    add("--seconds", type=float, default=20.0, help="that are counted in each run")
    add("--warm-up", type=float, default=5.0, help="seconds before them")
    add("--prompt", type=int, default=128)
    add("--output", type=int, default=128)
    add("--long", type=int, default=512)
    args = parser.parse_args()
    if args.peer_ttft is not None and not args.every:
        parser.error("--peer-ttft needs long prompts: leave out --every 0")
    runs: dict[str, list[Figures]] = {}

    def measure(name: str, url: str) -> None:
        load = Load(
            *(url.rstrip("/"), args.model, args.streams, args.every),
            *(0.0 if args.together else args.warm_up, args.seconds),
            *(args.prompt, args.output, args.long, args.together),
        )
        runs.setdefault(name, []).append(run(load))
        print(f"{name:>8}  {runs[name][-1]}", flush=True)

    for _ in range(args.rounds):
        if args.url:
            measure(args.model, args.url)
            continue
        for stretch, burst in itertools.product(args.stretch, args.burst_tokens):
            flags = ["--max-step-stretch", "inf" if stretch == "off" else stretch]
            flags += ["--burst-tokens", burst]
            with Server(*shlex.split(args.serve), *flags) as server:
                measure(f"{stretch}, {burst}", f"http://{server.host}:{server.port}")
    print("medians")
    for name, several in runs.items():
        print(f"{name:>8}  {median_of(several)}")
    print("targets")
    for name, several in runs.items():
        for line in verdicts(median_of(several), args.peer_ttft):
            print(f"{name:>8}  {line}")


if __name__ == "__main__":
    main()
