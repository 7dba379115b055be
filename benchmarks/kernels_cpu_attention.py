"""How near are native attention, cache writes and sampling to what this machine can do?

    python benchmarks/kernels_cpu_attention.py [--threads 2] [--isa auto] [--only decode prefill]

Attention of all layers of a step.  A decode step's limit is reading its keys and values once; a
prefill's is its operations (of the causal half) at the peak of bfloat16 or float32.  Limits are
measured in this very run and printed again at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from kernels_cpu import Limits, measure_limits

from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.kernels.cpu.native import native

_native = native()
SMOLLM2_135M = ("SmolLM2-135M", 30, 9, 3, 64)
LLAMA_7B = ("LLaMA-7B, 4 layers", 4, 32, 32, 128)
VOCABULARY = 49152
BLOCK_SIZE = 16


class Bench:
    def __init__(self, kernels: Any, pool: Any, repeats: int) -> None:
        self.kernels, self.pool, self.repeats = kernels, pool, repeats
        self.memory = np.ones(256 << 20, np.uint8)
        self.limits: Limits = measure_limits(kernels, pool, self.memory)

    def attention(
        self, model: tuple[str, int, int, int, int], count: int, rows: int, context: int, dtype: str
    ) -> None:
        name, num_layers, heads, kv_heads, d = model
        blocks = -(-context // BLOCK_SIZE)
        noise = _noise(dtype, d)
        shape = (rows * blocks, kv_heads, noise.shape[1])
        layers = [(np.resize(noise, shape), np.resize(noise, shape)) for _ in range(num_layers)]
        tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
        starts = np.arange(0, rows * count + 1, count, dtype=np.int32)
        step = _native.AttentionStep(starts, np.full(rows, context, np.int32), tables)
        query = np.random.default_rng(1).standard_normal((rows * count, heads, d), np.float32)
        times = _native.time_attention(
            self.kernels, self.pool, step, layers, BLOCK_SIZE, d, query, query.copy(),
            self.repeats + 1,
        )[1:]  # fmt: skip
        seconds = statistics.median(times)
        pairs = rows * (count * context - count * (count - 1) / 2)  # (query, position)
        operations = num_layers * heads * d * 4.0 * pairs
        num_bytes = sum(keys.nbytes + values.nbytes for keys, values in layers)
        # words, as which int8 is multiplied, have the rate of bfloat16
        limit = self.limits.seconds("F32" if dtype == "f32" else "BF16", num_bytes, operations)
        print(
            f"attention {dtype:4} {name}: {rows:2} rows of {count:3} at {context:4}"
            f" {seconds * 1e3:8.2f} ms (best {min(times) * 1e3:.2f})"
            f" {num_bytes / seconds / 1e9:6.1f} GB/s {operations / seconds / 1e9:6.0f} Gop/s"
            f" {100 * limit / seconds:4.0f} % of the limit",
            flush=True,
        )

    def cache_writes(self, model: tuple[str, int, int, int, int], tokens: int) -> None:
        name, num_layers, heads, kv_heads, d = model
        tiles = -(-tokens // 16)
        keys = np.zeros((tiles, kv_heads, 16 * d), np.uint16)
        values = keys.copy()
        projected = np.random.default_rng(0).standard_normal(
            (tokens, (heads + 2 * kv_heads) * d), np.float32
        )
        table = np.ones((tokens, d), np.float32)
        places = np.arange(tokens, dtype=np.int32)
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            for _ in range(num_layers):
                _native.write_cache(
                    self.kernels, self.pool, keys, values, 16, projected, heads, table, table * 0,
                    places, places,
                )  # fmt: skip
            times.append(time.perf_counter() - start)
        milliseconds = statistics.median(times) * 1e3
        print(f"rotary and cache write {name}: {tokens} tokens {milliseconds:.2f} ms", flush=True)

    def sampling(self, what: str, rows: int, scale: float, **options: float) -> None:
        rng = np.random.default_rng(0)
        logits = (rng.standard_normal((rows, VOCABULARY)) * scale).astype(np.float32)
        params = [SamplingParams(seed=i, **options).record() for i in range(rows)]  # type: ignore[arg-type]
        records = np.frombuffer(b"".join(params), np.uint8).reshape(rows, SAMPLING_DTYPE.itemsize)
        sampler = _native.RowSampler(self.kernels, self.pool, VOCABULARY)
        ids, logprobs = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        tops = np.zeros((rows, 20), np.int32), np.zeros((rows, 20), np.float32)
        positions, finite = np.zeros(rows, np.int32), np.zeros(rows, np.uint8)
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            sampler.sample(
                logits, None, None, records, positions, None, None, ids, logprobs, finite, *tops
            )
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        print(
            f"sampling {what}, logits of spread {scale}: {rows} rows {seconds * 1e3:.2f} ms"
            f" ({seconds / rows * 1e6:.0f} us a row)",
            flush=True,
        )


def _noise(dtype: str, d: int) -> npt.NDArray[Any]:
    """Tiles of one head, [tiles, numbers of a tile]; those of int8 end with their scales."""
    rng, tiles = np.random.default_rng(0), (1 << 16) // d
    if dtype == "i8":
        scales = np.full((tiles, 16), 0.3 / 40, np.float32).view(np.int8)
        return np.concatenate([rng.integers(-127, 128, (tiles, 16 * d), np.int8), scales], 1)
    noise = (rng.standard_normal((tiles, 16 * d)) * 0.3).astype(np.float32)
    return (noise.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    parts = ["decode", "prefill", "write", "sampling"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    options = parser.parse_args()
    bench = Bench(_native.kernels(options.isa), _native.Pool(options.threads), options.repeats)
    print(f"{bench.kernels.isa}, {options.threads} threads\n{bench.limits}")
    for dtype in ("bf16", "i8", "f32"):
        if "decode" in options.only:
            for rows, context in [(1, 192), (1, 256), (8, 256), (32, 256), (1, 2048), (1, 8000)]:
                bench.attention(SMOLLM2_135M, 1, rows, context, dtype)
            bench.attention(LLAMA_7B, 1, 8, 512, dtype)
        if "prefill" in options.only:
            for count, context in [(128, 128), (512, 512), (512, 2048)]:
                bench.attention(SMOLLM2_135M, count, 1, context, dtype)
            bench.attention(LLAMA_7B, 512, 1, 512, dtype)
    if "write" in options.only:
        for tokens in (1, 32, 512):
            bench.cache_writes(SMOLLM2_135M, tokens)
    if "sampling" in options.only:
        for rows in (1, 32):
            bench.sampling("greedy", rows, 3)
        for scale in (1, 3):
            bench.sampling("temperature 0.8", 32, scale, temperature=0.8)
            bench.sampling("temperature 0.8, top_p 0.95", 32, scale, temperature=0.8, top_p=0.95)
            bench.sampling("temperature 0.8, top_k 50", 32, scale, temperature=0.8, top_k=50)
            bench.sampling("temperature 0.8, min_p 0.1", 32, scale, temperature=0.8, min_p=0.1)
            bench.sampling(
                "temperature 0.8, typical_p 0.9", 32, scale, temperature=0.8, typical_p=0.9
            )
        bench.sampling("greedy with 20 alternatives", 32, 3, num_logprobs=20)
    print(measure_limits(bench.kernels, bench.pool, bench.memory))


if __name__ == "__main__":
    main()
