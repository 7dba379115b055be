"""One running server: everything is built here, in the order of the architecture diagram.

    model card -> agent processes, worker -> scheduler, master -> LLMServer -> HTTP

and taken down in the opposite order, whatever goes wrong.  The port is taken first, so that a
conflict shows at once, but listened on last: until then whoever connects is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import signal
import socket
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import msgspec
import uvicorn
import uvloop

from llm_serving.api.app import ApiSettings, create_app
from llm_serving.commands.model_source import context_length, prepared_card
from llm_serving.commands.ports import listen_on
from llm_serving.commands.program import program
from llm_serving.commands.server_record import ServerRecord
from llm_serving.commands.start_report import StartReport
from llm_serving.commands.unwinding import unwind_on_sigterm
from llm_serving.config import ServingConfig
from llm_serving.errors import ServingError
from llm_serving.master.async_master import AsyncMaster
from llm_serving.master.block_pool import BlockPool, prefix_salt
from llm_serving.master.scheduler import Limits, Scheduler
from llm_serving.metrics import Metrics
from llm_serving.model_card import ModelCard
from llm_serving.protocol import Ready
from llm_serving.server.llm_server import LLMServer, ServerLimits
from llm_serving.server.tokenizer import Tokenizer
from llm_serving.worker.agent_worker import AgentWorker
from llm_serving.worker.launcher import Launcher

__all__ = ["serve_until_stopped"]

logger = logging.getLogger(__name__)

_LAST_EVENTS_S = 5.0  # for clients to take what ends their streams


def serve_until_stopped(config: ServingConfig) -> int:
    """Serve until SIGTERM or Ctrl-C (exit code 0), or until it cannot go on (1)."""
    report = StartReport()
    with listen_on(config.server.host, config.server.port) as listener:
        record = ServerRecord.claim(
            listener.getsockname()[1], config.server.host, config.server.shutdown_grace_s
        )
        try:
            with unwind_on_sigterm():
                card = prepared_card(config.model, report)
            house = Deployment(config, card, listener, report)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(house.run())
        except (SystemExit, KeyboardInterrupt):  # before the event loop took the signals over
            return 0
        finally:
            record.release()


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: it re-raises SIGTERM, so the exit code would be -15."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class _FrontEnd:
    master: AsyncMaster
    server: LLMServer
    http: _HttpServer


class Deployment:
    def __init__(
        self,
        config: ServingConfig,
        card: ModelCard,
        listener: socket.socket,
        report: StartReport,
    ) -> None:
        self._config = config
        self._card = card
        self._listener = listener
        self._report = report
        self._max_model_len = context_length(card.config, config.model.max_model_len)

    async def run(self) -> int:
        """Start, serve, stop; the exit code."""
        stop = _stop_event()
        launcher = self._launcher()
        worker = self._worker(launcher)
        try:
            if not await _unless(stop, worker.start()):
                return 0
            ready = await worker.ready()
            if self._config.kv_cache.num_blocks is None:
                launcher.pin("--num-blocks", ready.num_blocks)
            self._report.agent(ready, worker.describe(), self._max_model_len)
            return await self._serve(self._front_end(worker, ready), stop)
        finally:
            await worker.close()

    async def _serve(self, front: _FrontEnd, stop: asyncio.Event) -> int:
        running = asyncio.create_task(front.master.run())
        serving = asyncio.create_task(front.http.serve([self._listener]))
        stopping = asyncio.create_task(stop.wait())
        try:
            if await _unless(stop, front.http.listens.wait()):
                self._report.ready(self._url(), self._config.model.names)
            await asyncio.wait({running, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                await self._drain(front.server, stop)
        finally:
            stopping.cancel()
            front.server.abort_all()
            front.http.should_exit = True
            await asyncio.wait({serving}, timeout=2 * _LAST_EVENTS_S)
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
                await _unless(stop, server.drained())

    def _launcher(self) -> Launcher:
        config = self._config
        options = {
            "--card": pathlib.Path(self._card.tokenizer).with_name("card.json"),
            "--device": config.agent.device,
            "--max-model-len": self._max_model_len,
            "--block-size": config.kv_cache.block_size,
            "--num-blocks": config.kv_cache.num_blocks,
            "--max-num-seqs": config.scheduler.max_num_seqs,
            "--max-num-batched-tokens": config.scheduler.max_num_batched_tokens,
            "--num-threads": config.agent.num_threads,
        }
        given = [
            str(word)
            for name, value in options.items()
            if value is not None
            for word in (name, value)
        ]
        command = [*program(), "agent", *given]
        return Launcher(command, config.agent, on_event=self._report.event)

    def _worker(self, launcher: Launcher) -> AgentWorker:
        config = self._config
        return AgentWorker(
            launcher,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=self._max_model_len,
            block_size=config.kv_cache.block_size,
            num_slots=2 * config.scheduler.num_steps_in_flight - 1,
        )

    def _front_end(self, worker: AgentWorker, ready: Ready) -> _FrontEnd:
        config, names = self._config, self._config.model.names
        limits = Limits(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_num_waiting=config.scheduler.max_num_waiting,
            prefix_caching=config.scheduler.prefix_caching,
        )
        scheduler = Scheduler(BlockPool(ready.num_blocks, ready.block_size), limits)
        server = LLMServer(
            tokenizer=Tokenizer(self._card.tokenizer),
            limits=self._server_limits(ready),
            eos_token_ids=self._card.eos_token_ids,
            cache_salt=prefix_salt(self._card.digest),
            metrics=(metrics := Metrics(names[0], lambda: master.stats())),
            health=lambda: master.unhealthy_reason or worker.stalled(),
        )
        master = AsyncMaster(
            scheduler, worker, server.publish, depth=config.scheduler.num_steps_in_flight
        )
        server.attach(master)
        app = create_app(
            server,
            settings=ApiSettings(names, config.server.max_body_bytes),
            info=lambda: self._info(worker, ready),
            metrics=metrics,
            version=version("llm-serving"),
        )
        settings = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=65,  # longer than what a load balancer usually keeps
            timeout_graceful_shutdown=int(_LAST_EVENTS_S),
        )
        return _FrontEnd(master, server, _HttpServer(settings))

    def _server_limits(self, ready: Ready) -> ServerLimits:
        return ServerLimits(
            max_model_len=self._max_model_len,
            num_kv_tokens=ready.num_blocks * ready.block_size,
            block_size=ready.block_size,
            max_timeout_s=self._config.server.request_timeout_s,
        )

    def _info(self, worker: AgentWorker, ready: Ready) -> dict[str, object]:
        """What is served, and how: the body of /info."""
        card, config = self._card, self._config
        return {
            "model_id": card.name,
            "served_names": list(config.model.names),
            "model_type": card.architecture,
            "model_digest": card.digest,
            "model_dtype": ready.dtype,
            "weights": card.weights_kind,
            "model_device_type": ready.device,
            "num_threads": ready.num_threads,
            "kernels": ready.kernels,
            "agents": worker.describe(),
            "max_model_len": self._max_model_len,
            "max_total_tokens": self._server_limits(ready).context,
            "num_kv_blocks": ready.num_blocks,
            "block_size": ready.block_size,
            "limits": msgspec.to_builtins(config.scheduler),
            "start_phases_s": self._report.timings(),
            "versions": ready.versions,
            "version": version("llm-serving"),
            "task": 1,
        }


def _stop_event() -> asyncio.Event:
    """Set by SIGTERM and Ctrl-C."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _unless(stop: asyncio.Event, work: Coroutine[object, object, object]) -> bool:
    """Do the work, and whether it was done before `stop` was set.  Raises what it raises."""
    working, stopping = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def _exit_code(*tasks: asyncio.Task[None]) -> int:
    """0 if every task ended because it was told to; else the reason is logged."""
    code = 0
    for task in tasks:
        if not task.cancelled() and (exc := task.exception()) is not None:
            is_ours = isinstance(exc, ServingError)
            logger.error("the server cannot go on: %r", exc, exc_info=None if is_ours else exc)
            code = 1
    return code
