"""One running server: everything is built here, in the order of the architecture diagram.

    model card -> agent processes, worker -> front end (scheduler, master, LLMServer, HTTP)

and taken down in the opposite order, whatever goes wrong.  The port is taken first, so that a
conflict shows at once, but listened on last: until then whoever connects is refused.  What the
front end is made of is imported while the agents start, side by side.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
from typing import Protocol

import uvloop

from llm_serving.commands.agents import make_launcher, make_worker
from llm_serving.commands.evidence import logits_dump, transport_log
from llm_serving.commands.model_source import context_length, prepared_card
from llm_serving.commands.ports import listen_on
from llm_serving.commands.server_record import ServerRecord
from llm_serving.commands.start_report import StartReport
from llm_serving.commands.stopping import stop_event, unless
from llm_serving.commands.unwinding import unwind_on_sigterm
from llm_serving.config import ServingConfig
from llm_serving.model_card import ModelCard
from llm_serving.precision.logits_dump import LogitsDump
from llm_serving.protocol import Ready
from llm_serving.worker.agent_worker import AgentWorker
from llm_serving.worker.traffic import Traffic

__all__ = ["serve_until_stopped"]

_FRONT_END = "llm_serving.commands.front_end"


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
            house = Deployment(config, card, why_not_native, listener, report)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(house.run())
        finally:
            record.release()


class _FrontEnd(Protocol):
    """`front_end.FrontEnd`, which is not imported yet."""

    def build(self, worker: AgentWorker, ready: Ready, dump: LogitsDump | None) -> None: ...
    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> int: ...
    @property
    def num_requests(self) -> int: ...


class Deployment:
    def __init__(
        self,
        config: ServingConfig,
        card: ModelCard,
        why_not_native: str,
        listener: socket.socket,
        report: StartReport,
    ) -> None:
        """`why_not_native`: why the native kernels do not run; empty if they do."""
        self._config = config
        self._card = card
        self._why_not_native = why_not_native
        self._listener = listener
        self._report = report
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
        loading = asyncio.create_task(asyncio.to_thread(self._load_front_end))
        try:
            if not await unless(stop, worker.start()):
                return 0
            ready = await worker.ready()
            if config.kv_cache.num_blocks is None:
                launcher.pin("--num-blocks", ready.num_blocks)
            self._report.agent(ready, worker.describe(), context)
            front = await loading
            with logits_dump(config.precision, card, ready) as dump:
                front.build(worker, ready, dump)
                try:
                    return await front.serve(self._listener, stop)
                finally:
                    if traffic.log is not None:
                        traffic.log.num_requests = front.num_requests
        finally:
            if not loading.cancel() and not loading.cancelled():
                loading.exception()  # is known then: something else ended the start
            await worker.close()

    def _load_front_end(self) -> _FrontEnd:
        """Called in a thread: as much as can be done without the agents."""
        front: _FrontEnd = importlib.import_module(_FRONT_END).FrontEnd(
            self._config, self._card, self._max_model_len, self._why_not_native, self._report
        )
        return front
