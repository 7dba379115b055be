"""The tables of a run of compare.py with peers.json: every peer, then each target that it decides.

    python benchmarks/peers/table.py RESULTS.json [...]

Figures are medians over the rounds, those of all files together.  A ratio is ours to the best
peer's, by their medians; with several rounds, in brackets, the least and the most of the rounds,
each within its own round.
The other targets come from other scripts of benchmarks/: ITL p99/p50 from mixed_load.py, HTTP
against bare from serving_overhead.py, the roofline from roofline_cpu.py, long contexts from
long_context.py, start and memory from start_memory.py.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = ("1", "8", "16", "32")
FIRST_TOKENS = ("q4_1", "int8", "int8-kv8", "bf16")
BF16 = ("openvino-bf16", "vllm-bf16", "llamacpp-bf16")
SMALL = ("openvino-int8", "llamacpp-q4_1", "llamacpp-q4_0", "llamacpp-q8_0")

Measured = Mapping[str, Any]  # a peer's median or one round of it, as compare.py writes them
Peers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    unit: str
    read: Callable[[Measured], float | None]  # None: not measured
    is_time: bool = False  # less is better


@dataclass(frozen=True, slots=True)
class Target:
    figure: Figure
    ours: str
    peers: tuple[str, ...]  # the best of them counts
    ratio: float  # at least, of a time at most


def rate(level: str) -> Figure:
    def read(measured: Measured) -> float | None:
        closed = measured["closed"].get(level)
        return closed["output_tok_s"] if closed and closed["ok"] else None

    streams = "1 stream" if level == "1" else f"{level} streams"
    return Figure(streams, "tokens/s", read)


def _ttft(measured: Measured) -> float | None:
    alone = measured["prefill_512"]
    return alone["ttft_ms"]["p50"] if alone["ttft_ms"] else None


TTFT = Figure("TTFT of 512 tokens", "ms", _ttft, is_time=True)

TARGETS = (
    Target(rate("1"), "ours-q4_1", ("llamacpp-q4_1",), 2.0),
    Target(rate("1"), "ours-q4_0", ("llamacpp-q4_0",), 1.5),
    Target(rate("1"), "ours-q8_0", ("llamacpp-q8_0",), 1.4),
    Target(rate("1"), "ours-int8", ("llamacpp-q8_0",), 1.4),
    Target(rate("1"), "ours-bf16", ("llamacpp-bf16",), 1.2),
    *(
        Target(rate(level), ours, BF16, 1.8)
        for ours in ("ours-bf16", "ours-bf16-kv8")
        for level in LEVELS[1:]
    ),
    *(
        Target(rate(level), ours, SMALL, 2.5)
        for ours in ("ours-int8", "ours-int8-kv8", "ours-q4_0", "ours-q4_1")
        for level in LEVELS[1:]
    ),
    Target(rate("32"), "ours-q4_1-sampled", ("ours-q4_1",), 0.9),
    *(Target(TTFT, f"ours-{form}", (*SMALL, *BF16), 0.5) for form in FIRST_TOKENS),
)


def peers_rows(peers: Peers) -> list[list[str]]:
    rates = [rate(level) for level in LEVELS]
    names = [*(figure.name for figure in rates), f"{TTFT.name}, {TTFT.unit}", "memory, MiB"]
    rows = [["tokens/s", *names, "start, s"]]
    for name, peer in peers.items():
        if (median := peer.get("median")) is not None:
            figures = [_number(figure.read(median)) for figure in (*rates, TTFT)]
            memory, start = median["peak_rss_mib"], median["startup_s"]
            rows.append([name, *figures, f"{memory:.0f}", f"{start:.1f}"])
        else:
            rows.append([name, *["failed"] * (len(rates) + 3)])
    return rows


def target_rows(peers: Peers) -> list[list[str]]:
    """One row for each target of which both sides were measured."""
    rows = [["target", "ours", "the best peer's", "ratio", "wanted", ""]]
    for target in TARGETS:
        figure = target.figure
        sides = _sides(target, {name: each.get("median") for name, each in peers.items()})
        if sides is not None:
            ours, best, peer = sides
            ratio = ours / best
            met = ratio <= target.ratio if figure.is_time else ratio >= target.ratio
            sign = "<=" if figure.is_time else ">="
            rows.append(
                [
                    f"{figure.name}, {target.ours}, {figure.unit}",
                    _number(ours),
                    f"{_number(best)} ({peer})",
                    f"{ratio:.2f}{_spread(target, peers)}",
                    f"{sign} {target.ratio}",
                    "met" if met else "missed",
                ]
            )
    return rows


def _sides(
    target: Target, measured: Mapping[str, Measured | None]
) -> tuple[float, float, str] | None:
    """Our figure, the best peer's, and whose that is."""

    def value(name: str) -> float | None:
        of = measured.get(name)
        return None if of is None else target.figure.read(of)

    ours = value(target.ours)
    found = [(each, name) for name in target.peers if (each := value(name)) is not None]
    if ours is None or not found:
        return None
    best, peer = min(found) if target.figure.is_time else max(found)
    return ours, best, peer


def _spread(target: Target, peers: Peers) -> str:
    """Of the ratio in the rounds that have both sides; "" for less than two of them."""
    num = max((len(each["rounds"]) for each in peers.values()), default=0)
    ratios = []
    for i in range(num):
        rounds = {
            name: each["rounds"][i] if i < len(each["rounds"]) else None
            for name, each in peers.items()
        }
        if (sides := _sides(target, rounds)) is not None:
            ratios.append(sides[0] / sides[1])
    return f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""


def joined(files: Sequence[Peers]) -> Peers:
    """Peers with the rounds of all files, the n-th of each beside the n-th of the others."""
    if len(files) == 1:
        return files[0]
    peers: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, peer in file.items():
            rounds = peers.setdefault(name, {"rounds": []})["rounds"]
            rounds += peer["rounds"]
    for peer in peers.values():
        if peer["rounds"]:
            peer["median"] = _median(peer["rounds"])
    return peers


def _median(values: Sequence[Any]) -> Any:
    """Of numbers; of objects, of each of their fields.  Of anything else, the first."""
    if all(isinstance(value, dict) for value in values):
        return {key: _median([v[key] for v in values if key in v]) for key in values[0]}
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return statistics.median(numbers) if len(numbers) == len(values) else values[0]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _print(rows: Sequence[Sequence[str]]) -> None:
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("| " + " | ".join(row) + " |")


def main() -> int:
    """Exit code 0; 1 if there is no such file, or it is none of compare.py's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, metavar="RESULTS.json", nargs="+")
    files = []
    try:
        for path in parser.parse_args().results:
            files.append(json.loads(path.read_text())["peers"])
        peers = joined(files)
        tables = peers_rows(peers), target_rows(peers)
    except OSError as exc:
        print(f"table: cannot read {path}: {exc.strerror}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, KeyError, AttributeError):
        print(f"table: {path} is not what compare.py writes with --out", file=sys.stderr)
        return 1
    _print(tables[0])
    print()
    _print(tables[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
