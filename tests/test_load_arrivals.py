from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_test.arrivals import due_times, num_requests


def gaps(
    count: int, rate: float, burstiness: float = 1.0, seed: int = 0
) -> npt.NDArray[np.float64]:
    return np.diff(due_times(count, rate, burstiness, seed))


@pytest.mark.parametrize(
    ("rate", "duration_s", "count"),
    [
        (0.625, 2400, 1500),
        (0.1, 5000, 500),
        (0.4, 1250, 500),
        (0.29, 100, 29),  # in binary it is 28.999999999999996
        (0.3, 11, 3),  # 3.3
        (7, 0.1, 0),
    ],
)
def test_rate_times_duration_is_the_number_of_requests(
    rate: float, duration_s: float, count: int
) -> None:
    assert num_requests(rate, duration_s) == count


@given(
    count=st.integers(0, 300),
    rate=st.floats(0.01, 1e4),
    burstiness=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**40),
)
def test_requests_are_due_in_order_from_0_to_the_end_of_the_run(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    due = due_times(count, rate, burstiness, seed)
    assert len(due) == count
    assert due[:1] == [0.0] * bool(count)
    assert due == sorted(due)
    assert all(at <= count / rate * (1 + 1e-9) for at in due)


@pytest.mark.parametrize("rate", [0.1, 2.0, 500.0])
def test_the_offered_rate_is_the_one_asked_for_and_not_the_dice_s(rate: float) -> None:
    for seed in range(20):
        assert gaps(2000, rate, seed=seed).mean() == pytest.approx(1 / rate, rel=0.01)


def test_gaps_are_exponential_by_default() -> None:
    found = gaps(20_000, 4.0) * 4.0
    assert found.std() == pytest.approx(1.0, abs=0.03)
    for quantile in (0.1, 0.5, 0.9, 0.99):  # of the exponential distribution: -log(1 - q)
        assert np.quantile(found, quantile) == pytest.approx(-np.log(1 - quantile), rel=0.06)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03  # they do not know of each other


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, 100.0])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float) -> None:
    found = gaps(20_000, 4.0, burstiness) * 4.0
    assert found.std() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_seed_gives_the_same_arrivals_and_another_seed_others() -> None:
    assert due_times(50, 3.0, seed=7) == due_times(50, 3.0, seed=7)
    assert due_times(50, 3.0, seed=7) != due_times(50, 3.0, seed=8)


def test_another_rate_stretches_the_same_arrivals() -> None:
    slow, fast = due_times(500, 0.1, seed=3), due_times(500, 0.4, seed=3)
    assert np.array(slow) == pytest.approx(np.array(fast) * 4)
