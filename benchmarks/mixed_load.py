"""Do long prompts make others wait?  Gaps between tokens of closed-loop streams, with and without.

    python benchmarks/mixed_load.py [--stretch 1.5 2 3 off] [--rounds 3] [--serve "--weights int8"]
    python benchmarks/mixed_load.py --url http://127.0.0.1:8000 --model m [--rounds 3]

16 streams ask again when they are answered (128 tokens in, 128 out), and every 2 s somebody sends
a prompt of 512 tokens.  All prompts differ.  Without --url a server of ours is started for each
value of `scheduler.max_step_stretch` in each round, values in turn; with it, any server that knows
OpenAI's /v1/completions is driven.  Prints for each run, and at the end as medians over the rounds:

    ITL        ms between two events with text of the streams: p50, p99, and the one by the other
    tokens/s   of the streams
    TTFT 512   ms to the first token of the long prompts, p50 and p90
    TTFT 128   of the streams, p50

The streams begin with answers of different lengths, as if they had run for long, and the first
seconds are not counted.  `--every 0` leaves the long prompts out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec
import numpy as np

LONG_OUTPUT = 16  # tokens that a long prompt asks for
WORDS = re.findall(  # a token each, in most vocabularies
    r"\w+",
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book",
)


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


@dataclass(slots=True)
class Answer:
    asked_s: float  # on time.perf_counter, as the events
    events_s: list[float] = field(default_factory=list)  # of those with text
    prompt_tokens: int = 0
    output_tokens: int = 0
    ended: bool = False

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


async def ask(load: Load, num_tokens: int, max_tokens: int) -> Answer:
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
    body = msgspec.json.encode(request)
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        head = f"POST {url.path}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        async for line in _lines(reader):
            if line.startswith(b"data:") and not answer.ended:
                _take(line[5:].strip(), answer)
    finally:
        writer.close()
    if not answer.ended or not answer.events_s:
        sys.exit("an answer ended without a token or before its end")
    answer.output_tokens = answer.output_tokens or len(answer.events_s)
    return answer


def _take(payload: bytes, answer: Answer) -> None:
    now_s = time.perf_counter()
    if payload == b"[DONE]":
        answer.ended = True
        return
    event = msgspec.json.decode(payload, type=_Event)
    if bytes(event.error):
        sys.exit(f"the server says {bytes(event.error).decode()}")
    if event.choices and event.choices[0].text:
        answer.events_s.append(now_s)
    if event.usage is not None:
        answer.prompt_tokens = event.usage.prompt_tokens
        answer.output_tokens = event.usage.completion_tokens


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of an answer's body, as they come."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        sys.exit(f"the server answers {head.splitlines()[0].decode()}: {await reader.read(500)!r}")
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    rest = b""
    while data := await (_chunk(reader) if is_chunked else reader.read(65536)):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
    return (await reader.readexactly(size + 2))[:-2]


async def run(load: Load) -> Figures:
    began_s = time.perf_counter()
    first_s = began_s + load.warm_up_s
    last_s = first_s + load.seconds
    answers: list[Answer] = []
    long: list[Answer] = []

    async def stream(i: int) -> None:
        length = load.output * (i + 1) // load.streams
        while time.perf_counter() < last_s:
            answers.append(await ask(load, load.prompt, length))
            length = load.output

    async def probe() -> None:
        long.append(await ask(load, load.long_prompt, LONG_OUTPUT))

    async with asyncio.TaskGroup() as tasks:
        for i in range(load.streams):
            tasks.create_task(stream(i))
        for i in itertools.count(1) if load.every_s else ():
            due_s = began_s + i * load.every_s
            if due_s > last_s:
                break
            await asyncio.sleep(due_s - time.perf_counter())
            tasks.create_task(probe())
    return _figures(load, answers, long, first_s, last_s)


def _figures(
    load: Load, answers: list[Answer], long: list[Answer], first_s: float, last_s: float
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


@contextmanager
def our_server(stretch: str, flags: list[str]) -> Iterator[str]:
    """The URL of one that runs for as long."""
    command = [sys.executable, "-m", "llm_serving", "serve", "--port", "0", *flags]
    command += ["--max-step-stretch", "inf" if stretch == "off" else stretch]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        for line in process.stdout or ():
            if found := re.match(r"ready at (\S+)", line):
                yield found.group(1)
                return
        sys.exit("the server did not start")
    finally:
        process.terminate()
        process.wait()


def median_of(runs: list[Figures]) -> Figures:
    names = Figures.__slots__
    return Figures(**{n: statistics.median(getattr(r, n) for r in runs) for n in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", help="a server that runs already")
    add("--model", default="llama2", help="its name for the model")
    add("--stretch", nargs="+", default=["1.5", "2", "3", "off"])
    add("--serve", default="", help="further flags of our server, as one word")
    add("--rounds", type=int, default=3)
    add("--streams", type=int, default=16)
    add("--every", type=float, default=2.0, help="seconds between two long prompts")
    add("--seconds", type=float, default=20.0, help="that are counted in each run")
    add("--warm-up", type=float, default=5.0, help="seconds before them")
    add("--prompt", type=int, default=128)
    add("--output", type=int, default=128)
    add("--long", type=int, default=512)
    args = parser.parse_args()
    runs: dict[str, list[Figures]] = {}

    def measure(name: str, url: str) -> None:
        load = Load(
            *(url.rstrip("/"), args.model, args.streams, args.every, args.warm_up),
            *(args.seconds, args.prompt, args.output, args.long),
        )
        runs.setdefault(name, []).append(asyncio.run(run(load)))
        print(f"{name:>8}  {runs[name][-1]}", flush=True)

    for _ in range(args.rounds):
        if args.url:
            measure(args.model, args.url)
            continue
        for stretch in args.stretch:
            with our_server(stretch, shlex.split(args.serve)) as url:
                measure(stretch, url)
    print("medians")
    for name, several in runs.items():
        print(f"{name:>8}  {median_of(several)}")


if __name__ == "__main__":
    main()
