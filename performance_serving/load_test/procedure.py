"""In which order does a load test go?

    reach the server   /info; task 2 wants one that writes its logits
    size the requests  the tokens of the data set's entries, the context of the server
    warm up            uncounted, with a text of its own: the prefix cache learns nothing of the run
    run                requests out, answers in, a sample of /metrics each second
    read the server    what its counters have grown by

Up to the run, everything that is wrong raises NotUsable.  Then nothing is lost: Ctrl-C or SIGTERM
ends the run, and what was measured is returned.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import aiohttp

from load_test.arrivals import due_times
from load_test.client import Client, Clock, open_session
from load_test.dataset import Dataset, read_dataset
from load_test.dialects import make_dialect
from load_test.errors import NotUsable
from load_test.load import Load
from load_test.options import Options
from load_test.output_files import LogFile, request_line
from load_test.plan import Plan
from load_test.progress import RunProgress
from load_test.results import RequestRecord, Run, Sample
from load_test.screen import Screen
from load_test.server_view import (
    Metrics,
    ServerView,
    bare_decode_of,
    dump_between,
    dump_of,
    excerpt_of,
    running_and_waiting,
    work_between,
)
from load_test.token_counts import FileTokens, ServerTokens, TokenCounter, count_sizes

__all__ = ["perform"]

_WARM_UP = RequestRecord(-1, -1, "", 0.0, asked_tokens=8)
_WARM_UP_PROMPT = "Is anybody awake in there?"
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_SAMPLE_S = 1.0
_SETTLE_S = 0.2  # between two looks at a number that should stand still
_MAX_SETTLE_S = 10.0


async def perform(options: Options, started: datetime, screen: Screen, log: LogFile) -> Run:
    """The whole test.  Raises NotUsable, with nothing measured."""
    dataset = read_dataset(options.dataset)
    async with open_session(options.headers) as session:
        server = ServerView(session, options.url)
        info = await server.info()
        if options.task == 2:
            _check_dump(options.url, info)
        run = _new_run(options, started, info, dataset)
        run.max_total_tokens = await server.context(info)
        plan = await _make_plan(options, dataset, session, run, screen)
        client = _client(options, session, started, Clock())
        await _warm_up(options.warmup, client, screen)
        stage = _Stage(options, server, plan, run, screen, log)
        await stage.measure(lambda clock: _client(options, session, started, clock))
    return run


def _check_dump(url: str, info: dict[str, Any] | None) -> None:
    if info is None:
        raise NotUsable(f"task 2 needs a server that writes its logits, and {url} has no /info")
    if dump_of(info) is None:
        raise NotUsable(
            f"task 2 needs a server that writes its logits, and the one at {url} dumps nothing "
            '(its /info says "precision": null); start it with --task 2'
        )


def _new_run(
    options: Options, started: datetime, info: dict[str, Any] | None, dataset: Dataset
) -> Run:
    return Run(
        task=options.task,
        url=options.url,
        api=options.api,
        model=options.model,
        started=started.isoformat(timespec="seconds"),
        options=options.as_json(),
        dataset={
            "path": dataset.path,
            "num_entries": len(dataset.entries),
            "digest": dataset.digest,
        },
        info=excerpt_of(info),
        bare_decode=bare_decode_of(info),
    )


async def _make_plan(
    options: Options, dataset: Dataset, session: aiohttp.ClientSession, run: Run, screen: Screen
) -> Plan:
    counter = await _counter(options, session)
    entries = dataset.entries[: options.num_requests]
    with screen.progress("counting tokens:", None) as show:
        sizes = await count_sizes(
            entries,
            counter,
            with_prompts=run.max_total_tokens is not None,
            on_progress=lambda done, total: show(done, f"of {total} texts"),
        )
    run.tokens_counted_by = counter.name
    # a run that wraps round has counted all entries, another one needs no more than it has
    plan = Plan(entries, sizes, run.max_total_tokens, options.cancel_rate, options.seed)
    if options.num_requests is None and plan.is_impossible:
        raise NotUsable(
            f"nothing can be sent: every prompt of {dataset.path} fills the context of "
            f"{run.max_total_tokens} tokens"
        )
    return plan


async def _counter(options: Options, session: aiohttp.ClientSession) -> TokenCounter:
    if options.tokenizer is not None:
        return FileTokens(options.tokenizer)
    counter = ServerTokens(session, options.url, options.model)
    await counter.find_form()
    return counter


def _client(
    options: Options, session: aiohttp.ClientSession, started: datetime, clock: Clock
) -> Client:
    dialect = make_dialect(options.api, options.model, ignore_eos=options.ignore_eos)
    name = f"load-{started:%H%M%S}"
    return Client(session, options.url, dialect, clock, timeout_s=options.timeout_s, name=name)


async def _warm_up(count: int, client: Client, screen: Screen) -> None:
    if not count:
        screen.say("no warm-up: the first request may find a cold server")
        return
    for _ in range(count):
        record = replace(_WARM_UP, token_s=[])
        await client.send(record, _WARM_UP_PROMPT)
        if record.error is not None:
            raise NotUsable(f"the warm-up request failed: {record.error.sentence}")
    screen.say(f"warm-up: {count} uncounted request{'s' * (count > 1)}")


@dataclass(slots=True)
class _Stage:
    """The run itself, and what is read of the server before, during and after it."""

    options: Options
    server: ServerView
    plan: Plan
    run: Run
    screen: Screen
    log: LogFile

    async def measure(self, make_client: Callable[[Clock], Client]) -> None:
        dump_before = await self._dump() if self.options.task == 2 else None
        before = await self.server.metrics()
        cpu_s, begin_s = time.process_time(), time.perf_counter()
        clock = Clock()
        load = Load(self.plan, make_client(clock), self.run, clock, self._on_end)
        await self._watched(load, clock, before)
        wall_s = time.perf_counter() - begin_s
        self.run.client_cpu_share = (time.process_time() - cpu_s) / wall_s
        self.run.work = work_between(before, await self.server.metrics())
        if dump_before is not None:
            self.run.precision = dump_between(dump_before, await self._dump())

    async def _watched(self, load: Load, clock: Clock, before: Metrics | None) -> None:
        beside = [asyncio.create_task(self._sample(load, clock, has_metrics=before is not None))]
        total = self.options.num_requests
        with self.screen.progress("requests", total) as show:
            beside.append(asyncio.create_task(RunProgress(load, clock, total, show).follow()))
            try:
                await self._until_interrupted(self._loop(load))
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)
        self.run.requests.sort(key=lambda record: record.index)
        self.run.num_planned = len(self.run.requests) if total is None else total

    def _loop(self, load: Load) -> Coroutine[Any, Any, None]:
        o, count = self.options, self.options.num_requests
        if o.concurrency is not None:
            end_s = o.duration_s if o.rate is None else None
            return load.closed_loop(o.concurrency, count, end_s)
        assert o.rate is not None
        assert o.duration_s is not None
        assert count is not None
        unbounded = replace(o, max_requests=None).num_requests or count
        return load.open_loop(due_times(unbounded, o.rate, o.burstiness, o.seed)[:count])

    async def _until_interrupted(self, loop: Coroutine[Any, Any, None]) -> None:
        running = asyncio.create_task(loop)

        def interrupt() -> None:
            self.run.is_interrupted = True
            running.cancel()

        events = asyncio.get_running_loop()
        for number in _INTERRUPTS:
            events.add_signal_handler(number, interrupt)
        try:
            await running
        except asyncio.CancelledError:
            if not self.run.is_interrupted:
                raise
        finally:
            running.cancel()
            for number in _INTERRUPTS:
                events.remove_signal_handler(number)

    async def _sample(self, load: Load, clock: Clock, *, has_metrics: bool) -> None:
        for second in range(10**9):
            await asyncio.sleep(max(0.0, second * _SAMPLE_S - clock()))
            metrics = await self.server.metrics() if has_metrics else None
            running, waiting = running_and_waiting(metrics)
            self.run.samples.append(Sample(clock(), load.num_in_flight, running, waiting))

    async def _dump(self) -> dict[str, Any] | None:
        """What /info says of the dump when no file has come for a moment; None: it is gone."""
        told, end_s = None, time.monotonic() + _MAX_SETTLE_S
        with suppress(NotUsable):
            while time.monotonic() < end_s:
                last, told = told, dump_of(await self.server.info())
                if told is None or told == last:
                    break
                await asyncio.sleep(_SETTLE_S)
        return told

    def _on_end(self, record: RequestRecord) -> None:
        self.log.line(request_line(record))
