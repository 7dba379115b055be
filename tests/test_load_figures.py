from __future__ import annotations

from dataclasses import astuple

import pytest
from load_test.figures import Spread, bare_decode_ms, figures_of, meets, spread
from load_test.results import BareDecode, ServerWork, StepWork
from load_test.slo import check

from tests.load_results import failed, request, run_of

# Two good requests and one lost, by hand:
#            due   first  last   tokens   TTFT  TPOT                E2E
#   0        0.0   0.5    1.5    3        0.5   1.0 / 2 = 0.5       1.5
#   1        1.0   2.5    3.5    2        1.5   1.0 / 1 = 1.0       2.5
#   2        2.0   lost at 2.5
# first send 0.1, last byte 3.5: Exec Time 3.4
RUN = run_of(
    request(0, 0.0, [0.5, 1.0, 1.5], sent_s=0.1),
    request(1, 1.0, [2.5, 3.5], sent_s=1.2),
    failed(2, 2.0),
)


def test_every_figure_is_what_a_hand_comes_to() -> None:
    figures = figures_of(RUN)
    assert figures.exec_s == pytest.approx(3.4)
    assert (figures.num_planned, figures.num_sent, figures.num_ok) == (3, 3, 2)
    assert figures.errors == {"reset": 1}
    assert figures.output_tokens == 5
    assert figures.prompt_tokens == 20
    assert figures.requests_per_s == pytest.approx(2 / 3.4)
    assert figures.output_tokens_per_s == pytest.approx(5 / 3.4)
    # in flight: 0.1 to 1.5, 1.2 to 3.5, 2.0 to 2.5
    assert figures.mean_in_flight == pytest.approx((1.4 + 2.3 + 0.5) / 3.4)
    assert figures.ttft is not None
    assert figures.ttft.mean == pytest.approx(1000)
    assert figures.ttft.p50 == pytest.approx(1000)
    assert figures.ttft.p90 == pytest.approx(1400)  # 500 + 0.9 x (1500 - 500)
    assert figures.ttft.p99 == pytest.approx(1490)
    assert figures.ttft.max == pytest.approx(1500)
    assert figures.tpot is not None
    assert figures.tpot.mean == pytest.approx(750)
    assert figures.e2e is not None
    assert figures.e2e.mean == pytest.approx(2000)
    assert figures.itl is not None
    assert figures.itl.count == 3  # 500, 500, 1000
    assert figures.itl.p50 == pytest.approx(500)
    assert figures.lag is not None
    assert figures.lag.max == pytest.approx(200)
    assert figures.lag.count == 3  # of all that were sent


def test_a_percentile_interpolates_between_the_closest_ranks() -> None:
    made = spread([0.004, 0.001, 0.003, 0.002])
    assert made is not None
    assert list(astuple(made)) == pytest.approx([4, 2.5, 2.5, 3.7, 3.97, 4.0])
    assert spread([None, 0.001, None]) == Spread(1, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert spread([None]) is None


def test_latency_counts_from_when_a_request_was_due_and_not_from_when_it_was_sent() -> None:
    late = request(0, 1.0, [3.0, 3.5], sent_s=2.5)
    assert late.ttft_s == 2.0
    assert late.e2e_s == 2.5
    assert late.lag_s == 1.5


def test_tokens_that_come_several_in_an_event_are_all_counted() -> None:
    record = request(0, 0.0, [1.0, 2.0], output_tokens=5, asked_tokens=5)
    assert record.tpot_s == 0.25  # one second for the four behind the first
    assert record.itl_s == [1.0]


def test_what_the_client_cut_off_is_no_error_and_no_latency_but_its_tokens_count() -> None:
    cut = request(1, 0.0, [9.0, 10.0], is_cancelled=True, cancel_after=2, asked_tokens=9)
    figures = figures_of(run_of(request(0, 0.0, [0.5, 1.0]), cut))
    assert (figures.num_cancelled, figures.num_errors, figures.num_ok) == (1, 0, 1)
    assert figures.e2e is not None
    assert (figures.e2e.count, figures.e2e.max) == (1, 1000)
    assert figures.output_tokens == 4


def test_tokens_of_a_request_that_failed_later_do_not_count() -> None:
    lost = failed(1, 0.0)
    lost.token_s, lost.output_tokens = [0.1, 0.2], 2
    assert figures_of(run_of(request(0, 0.0, [0.5]), lost)).output_tokens == 1


def test_clipped_impossible_short_and_unfinished_are_counted() -> None:
    figures = figures_of(
        run_of(
            request(0, 0.0, [1.0], is_clipped=True),
            request(1, 0.0, [], is_impossible=True, asked_tokens=0, sent_s=None),
            request(2, 0.0, [1.0], asked_tokens=9, finish_reason="eos_token"),
            request(3, 0.0, []),
            num_planned=6,
        )
    )
    assert (figures.num_clipped, figures.num_impossible, figures.num_short) == (1, 1, 1)
    assert figures.num_unfinished == 3  # one was sent, two were not
    assert figures.num_errors == 0


def test_goodput_counts_the_requests_within_every_limit() -> None:
    figures = figures_of(RUN, {"ttft": 1500, "tpot": 600})
    assert figures.goodput is not None
    assert figures.goodput.num_good == 1
    assert figures.goodput.share == pytest.approx(1 / 3)  # the lost one is in it
    assert figures.goodput.requests_per_s == pytest.approx(1 / 3.4)
    assert figures_of(RUN).goodput is None


def test_a_single_token_has_no_tpot_that_could_miss_a_limit() -> None:
    assert meets(request(0, 0.0, [1.0]), {"tpot": 0.001})
    assert not meets(request(0, 0.0, [1.0]), {"e2e": 999})
    assert not meets(failed(0, 0.0), {"tpot": 1e9})


def test_the_time_of_a_token_stands_beside_the_server_s_and_the_bare_model_s() -> None:
    run = run_of(
        *RUN.requests,
        work=ServerWork(
            prefix_queries=40, prefix_hits=10, steps={"decode": StepWork(4, 2.0, num_rows=10)}
        ),
        bare_decode=BareDecode(128, {1: 100.0, 4: 400.0}),
    )
    figures = figures_of(run)
    assert figures.prefix_hit_rate == 0.25
    told = figures.per_token
    assert told.run_ms == pytest.approx(750)
    assert told.server_ms == pytest.approx(500)  # 2 s in 4 steps
    assert told.rows == 2.5
    assert told.max_bare_rows == 4
    assert told.bare_ms == pytest.approx(250)  # half way from 1 row to 4
    # (750 - 250) ms x 5 tokens / 2.5 rows = 1000 ms
    assert told.overhead_min == pytest.approx(1 / 60)


def test_what_the_server_does_not_tell_is_none() -> None:
    figures = figures_of(RUN)
    assert figures.prefix_hit_rate is None
    assert figures.per_token.run_ms == pytest.approx(750)
    assert figures.per_token.server_ms is figures.per_token.overhead_min is None
    idle = run_of(*RUN.requests, work=ServerWork(prefix_queries=0, prefix_hits=0))
    assert figures_of(idle).prefix_hit_rate is None


@pytest.mark.parametrize(("rows", "ms"), [(0.5, 4), (1, 4), (2, 6), (3, 8), (10, 8)])
def test_beyond_the_measured_rows_the_nearest_measured_one_is_taken(rows: float, ms: float) -> None:
    assert bare_decode_ms(BareDecode(128, {3: 8.0, 1: 4.0}), rows) == ms


def test_a_run_in_which_nothing_went_well_has_figures_too() -> None:
    figures = figures_of(run_of(failed(0, 0.0), options={"goodput": {"ttft": 1}}))
    assert figures.ttft is figures.tpot is figures.e2e is None
    assert figures.exec_s == 0.5
    assert figures_of(run_of()).exec_s == 0.0


@pytest.mark.parametrize(
    ("name", "limit", "is_met"),
    [
        ("ttft_p90", 1400.001, True),
        ("ttft_p90", 1399, False),
        ("lag_max", 150, False),
        ("errors", 1, True),
        ("errors", 0, False),
        ("error_rate", 0.34, True),
        ("error_rate", 0.33, False),
        ("exec_s", 3.5, True),
        ("tokens_per_s", 1.4, True),
        ("tokens_per_s", 1.5, False),
        ("requests_per_s", 0.6, False),
        ("goodput", 0.5, True),
        ("goodput", 0.6, False),
    ],
)
def test_a_promise_is_met_or_missed(name: str, limit: float, is_met: bool) -> None:
    (verdict,) = check(figures_of(RUN, {"e2e": 9999}), {name: limit})
    assert verdict.is_met is is_met
    assert ("MISSED" in verdict.sentence) is not is_met


def test_what_was_not_measured_is_a_missed_promise() -> None:
    (verdict,) = check(figures_of(run_of(failed(0, 0.0))), {"ttft_p99": 1e9})
    assert not verdict.is_met
    assert verdict.sentence == "ttft_p99 <= 1e+09: MISSED, it is not measured"
