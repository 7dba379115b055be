"""How near are the native kernels to what this machine can do?

    python benchmarks/kernels_cpu.py [--threads 2] [--isa auto] [--formats BF16 I8]
        [--rows 1 32] [--model smollm2-135m]

Random weights in a model's shapes (its layers and the head).  Each line is all linear layers of
a decode step of some rows, or of a prefill of 512 rows (without the head, which sees one row): the
median ms, the rates, and the percentage of the limit, which is max(bytes / read bandwidth,
operations / peak), both measured in this very run: the best so far, and again at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import numpy as np

from llm_serving.kernels.cpu.native import native

_native = native()
PREFILL = 512
# layers, hidden, rows of query, key and value together, intermediate, vocabulary
MODELS = {
    "smollm2-135m": (30, 576, 960, 1536, 49152),
    "llama-7b-2-layers": (2, 4096, 3 * 4096, 11008, 32000),
}
# Which instruction's peak bounds a format.
PEAK_OF = {"F32": "F32", "BF16": "BF16", "I8": "I8", "Q8_0": "I8", "Q4_0": "I8", "Q4_1": "I8"}


@dataclasses.dataclass
class Limits:
    """GB/s, and 1e9 operations/s by format."""

    bandwidth: float
    peaks: dict[str, float]

    def __str__(self) -> str:
        peaks = ", ".join(f"{name} {rate:.0f} Gop/s" for name, rate in self.peaks.items())
        return f"limits: read {self.bandwidth:.1f} GB/s, {peaks}"

    def best(self, other: Limits) -> Limits:
        """A moment's disturbance only ever makes a limit smaller."""
        peaks = {name: max(rate, other.peaks[name]) for name, rate in self.peaks.items()}
        return Limits(max(self.bandwidth, other.bandwidth), peaks)

    def seconds(self, format: str, num_bytes: int, operations: float) -> float:
        return max(num_bytes / self.bandwidth / 1e9, operations / self.peaks[PEAK_OF[format]] / 1e9)


def measure_limits(kernels: Any, pool: Any, data: np.ndarray) -> Limits:
    peaks = {
        name: _native.peak(kernels, pool, getattr(_native.Format, name))
        for name in ("F32", "BF16", "I8")
    }
    return Limits(_native.read_bandwidth(kernels, pool, data), peaks)


def aligned(size: int) -> np.ndarray:
    """`size` zeros, the first at a multiple of 64."""
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def random_weight(format: str, shape: tuple[int, int], noise: np.ndarray) -> Any:
    """The numbers do not matter for the time, but they must be numbers: bytes below 0x38 are small
    floats, bfloat16s and float16s."""
    kind = getattr(_native.Format, format)
    data = aligned(_native.packed_bytes(kind, *shape))
    data[:] = np.resize(noise, len(data))
    return _native.PackedWeight(kind, *shape, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m", choices=list(MODELS))
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--formats", nargs="+", default=list(PEAK_OF), choices=list(PEAK_OF))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, PREFILL])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    kernels, pool = _native.kernels(options.isa), _native.Pool(options.threads)
    num_layers, hidden, qkv, intermediate, vocabulary = MODELS[options.model]
    shapes = num_layers * [
        (qkv, hidden),
        (hidden, hidden),
        (2 * intermediate, hidden),
        (hidden, intermediate),
    ]
    noise = np.random.default_rng(0).integers(0, 0x38, 1 << 20, np.uint8)
    memory = np.ones(256 << 20, np.uint8)
    print(f"{options.model}, {kernels.isa}, {options.threads} threads")
    limits = Limits(0.0, dict.fromkeys(("F32", "BF16", "I8"), 0.0))
    for format in options.formats:
        limits = limits.best(measure_limits(kernels, pool, memory))
        print(limits)
        layers = [random_weight(format, s, noise) for s in shapes]
        head = random_weight(format, (vocabulary, hidden), noise)
        for rows in options.rows:
            weights = layers if rows >= PREFILL else [*layers, head]
            repeats = max(3, options.repeats // (1 + rows // 32))
            times = _native.time_linears(kernels, pool, weights, rows, repeats + 1)[1:]
            seconds = statistics.median(times)
            num_bytes = sum(_native.packed_bytes(w.format, w.n, w.k) for w in weights)
            operations = 2.0 * rows * sum(w.n * w.k for w in weights)
            percent = 100 * limits.seconds(format, num_bytes, operations) / seconds
            print(
                f"linears {format:5} rows {rows:4} {seconds * 1e3:8.2f} ms"
                f" (best {min(times) * 1e3:.2f}) {num_bytes / seconds / 1e9:6.1f} GB/s"
                f" {operations / seconds / 1e9:7.0f} Gop/s {percent:4.0f} % of the limit",
                flush=True,
            )
    print("at the end,", measure_limits(kernels, pool, memory))


if __name__ == "__main__":
    main()
