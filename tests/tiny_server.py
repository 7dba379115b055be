"""A whole front end without processes: the real LLMServer and master over a fake agent.

The fake agent's token i is a checksum of everything before it (see `llm_serving.testing`), so
what a request must be answered with is known: `expected_tokens(prompt ids, sampling)`.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from llm_serving.generation import SamplingParams
from llm_serving.master.async_master import AsyncMaster
from llm_serving.master.block_pool import BlockPool, prefix_salt
from llm_serving.master.scheduler import Limits, Scheduler
from llm_serving.metrics import Metrics
from llm_serving.server.llm_server import GenerationRequest, LLMServer, ServerLimits
from llm_serving.server.output_stream import OutputStream, TokenEvent
from llm_serving.server.tokenizer import Tokenizer
from llm_serving.testing import FakeWorker
from tests.tiny_tokenizer import EOS, tiny_tokenizer_path

__all__ = ["TinyServer", "read_all", "serving"]


class TinyServer:
    def __init__(
        self,
        folder: pathlib.Path,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 200,
        limits: Limits | None = None,
        eos_token_ids: Collection[int] = (EOS,),
        faults: dict[int, Exception | str] | None = None,
    ) -> None:
        self.tokenizer = Tokenizer(tiny_tokenizer_path(folder))
        self.worker = FakeWorker(num_blocks, block_size, faults)
        self.pool = BlockPool(num_blocks, block_size)
        scheduler = Scheduler(self.pool, limits or Limits())
        self.metrics = Metrics("tiny", lambda: self.master.stats(), build={"version": "0"})
        self.server = LLMServer(
            tokenizer=self.tokenizer,
            limits=ServerLimits(max_model_len, num_blocks * block_size, block_size),
            eos_token_ids=eos_token_ids,
            cache_salt=prefix_salt("tiny"),
            metrics=self.metrics,
            health=lambda: self.master.unhealthy_reason,
            has_stopped=lambda: self.master.has_stopped,
        )
        self.master = AsyncMaster(scheduler, self.worker, self.server.publish)
        self.server.attach(self.master)

    def request(
        self, prompt: str, sampling: SamplingParams | None = None, **fields: object
    ) -> GenerationRequest:
        now = asyncio.get_running_loop().time()
        known = {"received_s": now, "sampling": sampling or SamplingParams(ignore_eos=True)}
        return GenerationRequest(prompt, **{**known, **fields})  # type: ignore[arg-type]

    async def answer(
        self, prompt: str, sampling: SamplingParams | None = None, **fields: object
    ) -> tuple[OutputStream, list[TokenEvent]]:
        """A request and all of its events."""
        stream = await self.server.open(self.request(prompt, sampling, **fields))
        return stream, await read_all(stream)


@asynccontextmanager
async def serving(house: TinyServer) -> AsyncIterator[asyncio.Task[None]]:
    """The master at work; afterwards nothing is open and no block is held."""
    running = asyncio.create_task(house.master.run())
    await asyncio.sleep(0)
    yield running
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert house.server.num_open == 0
    assert house.pool.num_idle == house.pool.num_blocks


async def read_all(stream: OutputStream) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    async with asyncio.timeout(20):
        while not events or events[-1].finish_reason is None:
            events += await stream.next()
    return events
