"""The front end of a running server: everything in front of the worker, while agents come and go.

    scheduler, master -> LLMServer -> HTTP

`deployment` loads this file in a thread while the agents start: FastAPI and the tokenizer take
about as long as half of what an agent takes, and are needed by nobody before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from importlib.metadata import version

from llm_serving.api.app import ApiSettings, create_app
from llm_serving.commands.description import fixed_facts, moving_facts
from llm_serving.commands.http_server import LAST_EVENTS_S, HttpServer
from llm_serving.commands.start_report import StartReport
from llm_serving.commands.stopping import unless
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

__all__ = ["FrontEnd"]

logger = logging.getLogger(__name__)


class FrontEnd:
    def __init__(
        self,
        config: ServingConfig,
        card: ModelCard,
        max_model_len: int,
        why_not_native: str,
        report: StartReport,
    ) -> None:
        """`why_not_native`: why the native kernels do not run; empty if they do."""
        self._config = config
        self._card = card
        self._max_model_len = max_model_len
        self._why_not_native = why_not_native
        self._report = report
        self._tokenizer = Tokenizer(card.tokenizer)

    def build(self, worker: AgentWorker, ready: Ready, dump: LogitsDump | None) -> None:
        """Everything in front of a worker whose agents are ready; on the event loop."""
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
            tokenizer=self._tokenizer,
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
        self._master, self._server, self._http = master, server, HttpServer(app)

    @property
    def num_requests(self) -> int:
        """Submitted since the start."""
        return self._server.num_requests

    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> int:
        """Serve what was built until `stop`, or until it cannot go on; the exit code."""
        running = asyncio.create_task(self._master.run())
        serving = asyncio.create_task(self._http.serve([listener]))
        stopping = asyncio.create_task(stop.wait())
        listening = asyncio.create_task(self._http.listens.wait())
        ends = {running, serving, stopping}
        try:
            await asyncio.wait({*ends, listening}, return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                self._report.ready(_url(listener), self._config.model.names)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                await self._drain(stop)
        finally:
            stopping.cancel()
            listening.cancel()
            self._server.abort_all()
            self._http.should_exit = True
            await asyncio.wait({serving}, timeout=2 * LAST_EVENTS_S)
            running.cancel()
            await asyncio.wait({running, serving})
        return _exit_code(running, serving)

    async def _drain(self, stop: asyncio.Event) -> None:
        """Let running requests end, for as long as is allowed or until a second Ctrl-C."""
        self._server.begin_drain()
        self._report.event(
            f"stopping: {self._server.num_open} requests may end; again to stop at once"
        )
        stop.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.server.shutdown_grace_s):
                await unless(stop, self._server.drained())

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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _exit_code(*tasks: asyncio.Task[None]) -> int:
    """0 if every task ended because it was told to; else the reason is logged."""
    code = 0
    for task in tasks:
        if not task.cancelled() and (exc := task.exception()) is not None:
            is_ours = isinstance(exc, ServingError)
            logger.error("the server cannot go on: %r", exc, exc_info=None if is_ours else exc)
            code = 1
    return code
