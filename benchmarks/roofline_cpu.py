"""How near is a bare step to what this machine can do?

    python benchmarks/roofline_cpu.py [--weights native int8 bfloat16 float32] [--rounds 7]

Steps of the agent's ModelRunner over SmolLM2-135M with nothing around them: a decode step of 1 and
of 32 rows at 192 tokens of context, and a prompt of 512 tokens.  The roofline is the sum over
operations of max(bytes / read bandwidth, operations / peak): weights, keys and values are read
once; the peak is that of the instruction that runs (dot products of int8, for 4-bit weights too,
of bfloat16, fused multiply-adds of float32).  Both are measured in every round, next to the steps
of every kind of weights in turn; what is printed are medians over rounds, percentages of each
round's own limits.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict

from bare_model import OPERATIONS, BareModel, Shape, prepared_card
from kernels_cpu import Limits
from servers import Disturbance

WEIGHTS = ("native", "int8", "bfloat16", "float32")
SHAPES = {"1 row": Shape(1, 1, 192), "32 rows": Shape(32, 1, 192), "512 tokens": Shape(1, 512, 512)}
TIMES = {"1 row": 10, "32 rows": 5, "512 tokens": 2}
# Percent of the roofline; of the prompt, percent of the peak of bfloat16.
TARGETS = {
    **{("1 row", weights): 65 for weights in WEIGHTS},
    ("32 rows", "bfloat16"): 50,
    ("32 rows", "int8"): 40,
    ("32 rows", "native"): 40,
    ("512 tokens", "bfloat16"): 65,
    ("512 tokens", "int8"): 65,
    ("512 tokens", "native"): 65,
}


class Case:
    """One kind of weights and one shape of step, over all rounds."""

    def __init__(self, model: BareModel, name: str) -> None:
        self._model, self._shape, self._times = model, SHAPES[name], TIMES[name]
        self._needs = model.needs(self._shape)
        self._steps_ms: list[float] = []
        self._limits_ms: list[float] = []
        self._of_bf16: list[float] = []
        self._parts_ms: dict[str, list[float]] = defaultdict(list)
        self._part_limits_ms: dict[str, list[float]] = defaultdict(list)

    def measure(self, limits: Limits) -> None:
        step_ms, _ = self._model.step_ms(self._shape, self._times)
        needed_ms = {name: need.ms(limits) for name, need in self._needs.items()}
        self._steps_ms.append(step_ms)
        self._limits_ms.append(sum(needed_ms.values()))
        operations = sum(need.operations for need in self._needs.values())
        self._of_bf16.append(operations / (step_ms * 1e6) / limits.peaks["BF16"])
        for name, ms in self._model.operations_ms(self._shape, self._times).items():
            self._parts_ms[name].append(ms)
            self._part_limits_ms[name].append(needed_ms.get(name, 0.0))

    def of_roofline(self) -> float:
        """Percent."""
        return _percent(self._limits_ms, self._steps_ms)

    def of_bf16_peak(self) -> float:
        """Percent."""
        return 100 * statistics.median(self._of_bf16)

    def step(self) -> str:
        step_ms, limit_ms = map(statistics.median, (self._steps_ms, self._limits_ms))
        return f"{step_ms:8.2f} {limit_ms:8.2f} {self.of_roofline():5.0f} %"

    def operation(self, name: str) -> str:
        need, spent, limits = (
            self._needs.get(name),
            self._parts_ms[name],
            self._part_limits_ms[name],
        )
        line = f"{statistics.median(spent):8.2f}"
        if need is None:
            return line
        line += f" {statistics.median(limits):8.2f} {_percent(limits, spent):5.0f} %"
        seconds = statistics.median(spent) / 1e3
        line += f" {need.num_bytes / 1e6:8.1f} {need.num_bytes / seconds / 1e9:7.1f}"
        return f"{line} {need.operations / 1e9:8.2f} {need.operations / seconds / 1e9:7.0f}"


def _percent(limits_ms: list[float], spent_ms: list[float]) -> float:
    pairs = zip(limits_ms, spent_ms, strict=True)
    return 100 * statistics.median(limit / spent for limit, spent in pairs)


def print_case(case: Case, name: str, weights: str) -> None:
    print(f"\n{weights}, {name}")
    print(
        f"  {'':9}{'ms':>8} {'limit ms':>8} {'of it':>7} {'MB':>8} {'GB/s':>7}"
        f" {'Gop':>8} {'Gop/s':>7}"
    )
    for operation in (*OPERATIONS, "sampling", "rest"):
        print(f"  {operation:9}{case.operation(operation)}")
    print(f"  {'step':9}{case.step()}")


def verdict(case: Case, name: str, weights: str) -> str:
    of_roofline, of_bf16 = case.of_roofline(), case.of_bf16_peak()
    is_prompt = name == "512 tokens"
    line = (
        f"| {weights} | {name} | {of_roofline:.0f} % | {of_bf16:.0f} % |"
        if is_prompt
        else (f"| {weights} | {name} | {of_roofline:.0f} % | |")
    )
    target = TARGETS.get((name, weights))
    if target is None:
        return f"{line} | |"
    found = of_bf16 if is_prompt else of_roofline
    of = "the bf16 peak" if is_prompt else "the roofline"
    return f"{line} >= {target} % of {of} | {'met' if found >= target else 'missed'} |"


def median_limits(rounds: list[Limits]) -> Limits:
    peaks = {name: statistics.median(r.peaks[name] for r in rounds) for name in rounds[0].peaks}
    return Limits(statistics.median(r.bandwidth for r in rounds), peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    disturbance = Disturbance()
    cases: dict[tuple[str, str], Case] = {}
    for weights in options.weights:
        asked = ("float32", "auto") if weights == "float32" else ("auto", weights)
        card = prepared_card(*asked)
        model = BareModel(card, num_rows=32, context=512, num_threads=options.threads)
        cases |= {(name, weights): Case(model, name) for name in SHAPES}
    rounds = []
    for _ in range(options.rounds):
        rounds.append(model.limits())
        for case in cases.values():
            case.measure(rounds[-1])
    print(f"{model.card.name}, {model.isa}, {options.threads} threads, {options.rounds} rounds")
    print(median_limits(rounds))
    for (name, weights), case in cases.items():
        print_case(case, name, weights)
    print(
        "\n| weights | step | of the roofline | of the bf16 peak | target | |"
        "\n|---|---|---|---|---|---|"
    )
    for (name, weights), case in cases.items():
        print(verdict(case, name, weights))
    print(disturbance)


if __name__ == "__main__":
    main()
