"""The arithmetic of the probes, and what the figures are taken for."""

from __future__ import annotations

import itertools
import sys

import pytest

from llm_serving.diagnostics.findings import Finding
from llm_serving.diagnostics.probes.arrays import WAYS, ArrayTiming, ScalarCosts, scalar_costs
from llm_serving.diagnostics.probes.measure import FULL, QUICK, Measured, Plan, judge, measure
from llm_serving.diagnostics.probes.round_trips import MEMORY, SIZES
from llm_serving.diagnostics.probes.timings import Budget, Timing, nearest_rank, timed
from tests.deployment import segments

MB = 1024 * 1024
SHORT = Plan(SIZES[:1], (), 1 << 20, Budget(0.0, num_warm_up=0))


def test_a_percentile_is_a_value_that_was_measured() -> None:
    hundred = [float(i) for i in range(100, 0, -1)]
    assert [nearest_rank(hundred, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert nearest_rank([3.0, 1.0], 0.5) == 1.0
    assert nearest_rank([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no value"):
        nearest_rank([], 0.5)


def test_a_throughput_counts_both_directions_of_the_round_it_names() -> None:
    timing = Timing.of("way", MB, [0.5] * 98 + [2.0, 4.0])
    assert (timing.p50_us, timing.p99_us) == (500_000, 2_000_000)
    assert (timing.mb_per_s, timing.mb_per_s_p99) == (4.0, 1.0)
    assert timing.num_rounds == 100


async def test_rounds_are_timed_until_the_budget_is_spent_and_warm_up_is_not_counted() -> None:
    ticks = itertools.count()
    num_calls = 0

    async def once() -> None:
        nonlocal num_calls
        num_calls += 1

    budget = Budget(seconds=8, num_warm_up=3, min_rounds=2)
    assert await timed(once, budget, lambda: float(next(ticks))) == [1.0] * 4
    assert num_calls == 7
    least = Budget(seconds=0, num_warm_up=0, min_rounds=5)
    assert len(await timed(once, least, lambda: float(next(ticks)))) == 5
    most = Budget(seconds=1e9, num_warm_up=0, max_rounds=6)
    assert len(await timed(once, most, lambda: float(next(ticks)))) == 6


def test_the_sizes_reach_from_64_bytes_to_64_megabytes() -> None:
    assert (FULL.sizes[0], FULL.sizes[-1]) == (64, 64 * MB)
    assert set(QUICK.sizes) < set(FULL.sizes)


def memory_way(name: str) -> str:
    return f"{MEMORY}{name}"


def judged(measured: Measured) -> dict[str, Finding]:
    return {finding.item: finding for finding in judge(measured)}


def test_a_slow_round_trip_is_slow_by_its_median_or_its_tail() -> None:
    trips = [
        Timing("TCP loopback", 64, 100, 250, 300),
        Timing("TCP loopback", 4096, 100, 9999, 9999),
        Timing("Unix socket", 64, 100, 50, 9000),
    ]
    found = judged(Measured(round_trips=trips))
    assert {f.verdict for f in found.values()} == {"slow"}
    assert list(found) == ["TCP loopback: round trip", "Unix socket: round trip"]
    assert all(f.cure for f in found.values())
    assert "p50 250 us, p99 300 us" in found["TCP loopback: round trip"].found


@pytest.mark.parametrize(
    ("memory_us", "verdict", "words"), [(500, "OK", "4.0"), (4000, "slow", "0.5")]
)
def test_shared_memory_that_gains_nothing_is_slow(
    memory_us: float, verdict: str, words: str
) -> None:
    trips = [
        Timing("TCP loopback", 4 * MB, 9, 2000, 2000),
        Timing(memory_way("TCP loopback"), 4 * MB, 9, memory_us, memory_us),
        Timing(memory_way("Unix socket"), 4 * MB, 9, 1, 1),  # with no socket to compare with
    ]
    finding = judged(Measured(round_trips=trips))["shared memory + TCP loopback"]
    assert finding.verdict == verdict
    assert finding.found.startswith(f"{words} times as fast")


def test_a_slow_copy_is_slow() -> None:
    assert judged(Measured(copy_gb_per_s=1.0))["shared memory: copy"].verdict == "slow"
    assert judged(Measured(copy_gb_per_s=9.0))["shared memory: copy"].verdict == "OK"


def test_arrays_are_compared_at_the_largest_size_that_all_ways_can() -> None:
    arrays = [
        ArrayTiming(WAYS[0], MB, 500, 400, 100),
        ArrayTiming(WAYS[1], MB, 100, 80, 20),
        ArrayTiming(WAYS[2], MB, 30, 15, 5),
        ArrayTiming(WAYS[1], 15 * MB, 1, 1, 1),
        ArrayTiming(WAYS[2], 15 * MB, 9, 9, 9),
    ]
    finding = judged(Measured(arrays=arrays))["arrays in messages"]
    assert finding.values == {"bytes_ratio": 4.0, "numbers_ratio": 20.0}
    assert "takes 50 us in shared memory, 4.0 times that as bytes" in finding.found


def test_half_the_bits_are_told_as_a_ratio() -> None:
    half, full = ArrayTiming(WAYS[2], 2 * MB, 50, 10, 0), ArrayTiming(WAYS[2], 4 * MB, 100, 20, 0)
    finding = judged(Measured(volumes=[half, full]))["bf16 against float32"]
    assert finding.values == {"ratio": 2.0}
    assert finding.found.startswith(f"{MB} values take 60 us with 16 bits, 120 us")


def test_numpy_scalars_are_refused_by_name_and_ints_cost_least() -> None:
    costs = scalar_costs(num_rounds=5)
    assert costs.refusal is not None
    assert "numpy.int64" in costs.refusal
    assert costs.ints_us < costs.one_by_one_us
    assert judged(Measured(scalars=costs))["numpy scalars"].verdict == "OK"
    accepted = Measured(scalars=ScalarCosts(None, 1, 2, 3))
    assert judged(accepted)["numpy scalars"].verdict == "slow"


async def test_what_has_no_room_is_left_out_and_said_so() -> None:
    said: list[str] = []
    measured = await measure(QUICK, shm_bytes=100, memory_bytes=1 << 40, say=said.append)
    (finding,) = measured.findings
    assert finding.verdict == "skipped"
    assert finding.found.startswith("64 B, 16 KB, 4 MB: not measured, for 100 B of shared memory")
    assert said == []
    assert "sizes" in judged(measured)


async def test_a_peer_that_cannot_start_is_broken_in_its_own_words(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = segments()
    command = (sys.executable, "-c", "raise ImportError('no numpy here')")
    room = 1 << 30
    measured = await measure(
        SHORT, shm_bytes=room, memory_bytes=room, say=lambda _: None, command=command
    )
    assert [f.item for f in measured.findings] == ["TCP loopback", "Unix socket"]
    for finding in measured.findings:
        assert finding.verdict == "broken"
        assert "ImportError: no numpy here" in finding.trace
    assert segments() == before
