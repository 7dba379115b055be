"""What the start did and how long each phase took, for the person who waits in front of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llm_serving.model_card import ModelCard, served_as
from llm_serving.protocol import Ready

__all__ = ["StartReport"]


class StartReport:
    """Prints a line per phase as it ends; its last line is "ready at <url> ...".

    `examples/start.py` waits for that line.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.phases: dict[str, float] = {}  # seconds, in the order of the start

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._ended(name, time.perf_counter() - start)

    def event(self, what: str) -> None:
        """Something that people should see: a restart, a warning."""
        print(what, flush=True)

    def model(self, card: ModelCard, kv_dtype: str = "auto") -> None:
        config = card.config
        print(
            f"model      {card.name}: {card.architecture}, {config.num_hidden_layers} layers, "
            f"{served_as(card, kv_dtype)}",
            flush=True,
        )

    def agent(self, ready: Ready, agents: list[dict[str, object]], max_model_len: int) -> None:
        """The agent's own phases, where it runs and how far away it is."""
        for name, seconds in ready.phases.items():
            self._ended(f"agent: {name}", seconds)
        kernels = ", ".join(sorted(set(ready.kernels.values())))
        print(f"agent      {ready.device}, {ready.dtype}, {ready.num_threads} threads, {kernels}")
        for agent in agents:
            print(
                f"transport  agent {agent['rank']} (pid {agent['pid']}): {agent['transport']} "
                f"{agent['address']} + shared memory, round trip {agent['round_trip_us']} us"
            )
        tokens = ready.num_blocks * ready.block_size
        print(
            f"KV cache   {ready.num_blocks} blocks of {ready.block_size} tokens: {tokens} tokens"
            f" in {ready.kv_dtype}"
        )
        if tokens < max_model_len:
            self.event(
                f"warning: the KV cache holds {tokens} tokens, less than the context of "
                f"{max_model_len}; longer requests are refused (kv_cache.num_blocks)"
            )

    def ready(self, url: str, names: tuple[str, ...]) -> None:
        seconds = time.perf_counter() - self._began
        print(f"serving    {', '.join(names)}: POST {url}/models/{names[0]}/generate")
        print(f"ready at {url} after {seconds:.2f} s; Ctrl-C ends it", flush=True)

    def timings(self) -> Mapping[str, float]:
        return {name: round(seconds, 3) for name, seconds in self.phases.items()}

    def _ended(self, name: str, seconds: float) -> None:
        self.phases[name] = seconds
        print(f"{seconds:7.2f} s  {name}", flush=True)
