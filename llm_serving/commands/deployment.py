"""One running server: everything is built here, in the order of the architecture diagram.

    model card -> agent processes, worker -> scheduler, master -> LLMServer -> HTTP

and taken down in the opposite order, whatever goes wrong.  The port is taken first, so that a
conflict shows at once, but listened on last: until then whoever connects is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import uvloop

from llm_serving.api.app import ApiSettings, create_app
from llm_serving.commands.agents import make_launcher, make_worker
from llm_serving.commands.description import fixed_facts, moving_facts
from llm_serving.commands.evidence import logits_dump, transport_log
from llm_serving.commands.http_server import LAST_EVENTS_S, HttpServer
from llm_serving.commands.model_source import context_length, prepared_card
from llm_serving.commands.ports import listen_on
from llm_serving.commands.server_record import ServerRecord
from llm_serving.commands.start_report import StartReport
from llm_serving.commands.stopping import stop_event, unless
from llm_serving.commands.unwinding import unwind_on_sigterm
from llm_serving.config import ServingConfig
from llm_serving.errors import ServingError
from llm_serving.master.async_master import AsyncMaster
from llm_serving.master.block_pool import BlockPool, prefix_salt
from llm_serving.master.master_stats import MasterStats
from llm_serving.master.scheduler import Limits, Scheduler
from llm_serving.metrics import Metrics, StepMetrics
from llm_serving.model_card import ModelCard
from llm_serving.precision.logits_dump import LogitsDump
from llm_serving.protocol import Ready
from llm_serving.server.llm_server import LLMServer, ServerLimits
from llm_serving.server.tokenizer import Tokenizer
from llm_serving.worker.agent_worker import AgentWorker
from llm_serving.worker.traffic import Traffic

__all__ = ["serve_until_stopped"]

logger = logging.getLogger(__name__)


def serve_until_stopped(config: ServingConfig) -> int:
    """Serve until SIGTERM or Ctrl-C (exit code 0), or until it cannot go on (1)."""
    report = StartReport()
    with listen_on(config.server.host, config.server.port) as listener:
        record = ServerRecord.claim(
            listener.getsockname()[1], config.server.host, config.server.shutdown_grace_s
        )
        try:
            try:
                with unwind_on_sigterm():
                    card, why_not_native = prepared_card(config, report)
            except (SystemExit, KeyboardInterrupt):
                return 0
            house = Deployment(config, card, listener, report, why_not_native)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(house.run())
        finally:
            record.release()


@dataclass(frozen=True)
class _FrontEnd:
    master: AsyncMaster
    server: LLMServer
    http: HttpServer


class Deployment:
    def __init__(
        self,
        config: ServingConfig,
        card: ModelCard,
        listener: socket.socket,
        report: StartReport,
        why_not_native: str,
    ) -> None:
        """`why_not_native`: why the native kernels do not run; empty if they do."""
        self._config = config
        self._card = card
        self._listener = listener
        self._report = report
        self._why_not_native = why_not_native
        self._max_model_len = context_length(card.config, config.model.max_model_len)

    async def run(self) -> int:
        """Start, serve, stop; the exit code."""
        with transport_log(self._config.agent, self._report.event) as log:
            code = await self._run(Traffic(log))
            if log is not None and code:
                log.ended = f"exit code {code}"
            return code

    async def _run(self, traffic: Traffic) -> int:
        stop = stop_event()
        config, card, context = self._config, self._card, self._max_model_len
        launcher = make_launcher(
            config, card, context, on_event=self._report.event, traffic=traffic
        )
        worker = make_worker(config, card, context, launcher)
        try:
            if not await unless(stop, worker.start()):
                return 0
            ready = await worker.ready()
            if config.kv_cache.num_blocks is None:
                launcher.pin("--num-blocks", ready.num_blocks)
            self._report.agent(ready, worker.describe(), context)
            with logits_dump(config.precision, card, ready) as dump:
                front = self._front_end(worker, ready, dump)
                try:
                    return await self._serve(front, stop)
                finally:
                    if traffic.log is not None:
                        traffic.log.num_requests = front.server.num_requests
        finally:
            await worker.close()

    async def _serve(self, front: _FrontEnd, stop: asyncio.Event) -> int:
        running = asyncio.create_task(front.master.run())
        serving = asyncio.create_task(front.http.serve([self._listener]))
        stopping = asyncio.create_task(stop.wait())
        listening = asyncio.create_task(front.http.listens.wait())
        ends = {running, serving, stopping}
        try:
            await asyncio.wait({*ends, listening}, return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                self._report.ready(self._url(), self._config.model.names)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                await self._drain(front.server, stop)
        finally:
            stopping.cancel()
            listening.cancel()
            front.server.abort_all()
            front.http.should_exit = True
            await asyncio.wait({serving}, timeout=2 * LAST_EVENTS_S)
            running.cancel()
            await asyncio.wait({running, serving})
        return _exit_code(running, serving)

    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _drain(self, server: LLMServer, stop: asyncio.Event) -> None:
        """Let running requests end, for as long as is allowed or until a second Ctrl-C."""
        server.begin_drain()
        self._report.event(f"stopping: {server.num_open} requests may end; again to stop at once")
        stop.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.server.shutdown_grace_s):
                await unless(stop, server.drained())

    def _front_end(self, worker: AgentWorker, ready: Ready, dump: LogitsDump | None) -> _FrontEnd:
        config, names = self._config, self._config.model.names
        limits = Limits(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_num_waiting=config.scheduler.max_num_waiting,
            max_step_stretch=config.scheduler.max_step_stretch,
            burst_tokens=config.scheduler.burst_tokens,
            prefix_caching=config.scheduler.prefix_caching,
        )
        scheduler = Scheduler(BlockPool(ready.num_blocks, ready.block_size), limits)
        steps = StepMetrics(worker.traffic)
        metrics = self._metrics(ready, lambda: master.stats(), steps)
        server = LLMServer(
            tokenizer=Tokenizer(self._card.tokenizer),
            limits=self._server_limits(ready),
            eos_token_ids=self._card.eos_token_ids,
            cache_salt=prefix_salt(self._card.digest),
            metrics=metrics,
            health=lambda: master.unhealthy_reason or worker.stalled(),
            has_stopped=lambda: master.has_stopped,
        )
        master = AsyncMaster(
            scheduler,
            worker,
            server.publish,
            depth=config.scheduler.num_steps_in_flight,
            observe=steps.observe,
            logits_sink=dump,
        )
        server.attach(master)
        app = create_app(
            server,
            settings=ApiSettings(names, config.server.max_body_bytes),
            info=lambda: self._about(ready) | moving_facts(worker, dump, self._report.timings()),
            trace=steps.trace,
            metrics=metrics,
            version=version("llm-serving"),
        )
        return _FrontEnd(master, server, HttpServer(app))

    def _metrics(
        self, ready: Ready, read_stats: Callable[[], MasterStats], steps: StepMetrics
    ) -> Metrics:
        build = {"version": version("llm-serving"), "dtype": ready.dtype, "device": ready.device}
        return Metrics(self._config.model.names[0], read_stats, build=build, steps=steps)

    def _about(self, ready: Ready) -> dict[str, object]:
        context = self._server_limits(ready).context
        lengths = (self._max_model_len, context)
        return fixed_facts(self._config, self._card, ready, lengths, self._why_not_native)

    def _server_limits(self, ready: Ready) -> ServerLimits:
        return ServerLimits(
            max_model_len=self._max_model_len,
            num_kv_tokens=ready.num_blocks * ready.block_size,
            block_size=ready.block_size,
            max_timeout_s=self._config.server.request_timeout_s,
        )


def _exit_code(*tasks: asyncio.Task[None]) -> int:
    """0 if every task ended because it was told to; else the reason is logged."""
    code = 0
    for task in tasks:
        if not task.cancelled() and (exc := task.exception()) is not None:
            is_ours = isinstance(exc, ServingError)
            logger.error("the server cannot go on: %r", exc, exc_info=None if is_ours else exc)
            code = 1
    return code
