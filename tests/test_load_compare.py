from __future__ import annotations

import pathlib
from dataclasses import replace

import numpy as np
import pytest
from load_test.command import main
from load_test.comparison import Comparison, Ratio, compare_runs
from load_test.results import RequestRecord, Run, save

from tests.load_results import failed, request, run_of

NUM = 200


def a_run(factor: float = 1.0, *, seed: int = 0, spread: float = 0.2, **more: object) -> Run:
    """Requests of a second each, more or less, all of their times multiplied by `factor`."""
    dice = np.random.default_rng(seed)
    requests = []
    for i in range(NUM):
        ttft, gap = dice.uniform(0.5 - spread, 0.5 + spread, 2) * factor
        requests.append(request(i, i * 0.01, [i * 0.01 + ttft + gap * k for k in range(3)]))
    return run_of(*requests, **more)


def row(made: Comparison, name: str) -> Ratio:
    return next(ratio for ratio in made.ratios if ratio.name.startswith(name))


def test_a_server_that_takes_half_the_time_is_half_in_every_latency() -> None:
    made = compare_runs(a_run(), a_run(0.5))
    assert made.is_paired
    for name in ("TTFT mean", "TTFT p99", "TPOT p50", "E2E p90", "ITL mean"):
        ratio = row(made, name)
        assert ratio.ratio == pytest.approx(0.5, rel=1e-6)
        assert [ratio.low, ratio.high] == pytest.approx([0.5, 0.5])  # pair by pair
        assert ratio.verdict == "better"
    assert row(made, "output tokens/s").ratio == pytest.approx(
        made.first_exec_s / made.second_exec_s
    )


def test_the_gain_is_the_share_of_the_exec_time_that_is_saved() -> None:
    first = run_of(request(0, 0.0, [100.0]))
    assert compare_runs(first, run_of(request(0, 0.0, [80.0]))).gain_percent == pytest.approx(20)
    assert compare_runs(first, run_of(request(0, 0.0, [150.0]))).gain_percent == pytest.approx(-50)
    assert compare_runs(run_of(), first).gain_percent is None


def test_two_runs_of_the_same_server_show_no_difference() -> None:
    made = compare_runs(a_run(seed=1), a_run(seed=2))
    ratio = row(made, "TTFT mean")
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < 1 < ratio.high
    assert ratio.verdict == "no difference shown"


def test_the_interval_is_as_wide_as_theory_says() -> None:
    """Of a ratio of two means of n uniform values: about 1.96 x sqrt(2 / n) x deviation / mean."""
    made = compare_runs(a_run(seed=1), a_run(1.1, seed=2))
    ratio = row(made, "TTFT mean")
    assert ratio.low is not None
    assert ratio.high is not None
    deviation = 0.4 / 12**0.5 / 0.5
    assert ratio.high - ratio.low == pytest.approx(
        2 * 1.96 * (2 / NUM) ** 0.5 * deviation * 1.1, rel=0.2
    )
    assert ratio.low < 1.1 < ratio.high


def test_more_of_a_rate_is_better_and_more_of_a_latency_worse() -> None:
    assert Ratio("x", 1.0, 2.0, 1.5, 2.5).verdict == "worse"
    assert Ratio("x", 1.0, 2.0, 1.5, 2.5, is_more_better=True).verdict == "better"
    assert Ratio("x", 1.0, 2.0).verdict == ""


def test_only_requests_that_ended_well_in_both_are_paired() -> None:
    first, second = a_run(), a_run()
    broken = failed(5, 0.05)
    broken.prompt_digest, broken.asked_tokens = "digest 5", 3
    second.requests[5] = broken
    made = compare_runs(first, second)
    assert made.is_paired
    assert made.num_first == made.num_second == NUM - 1
    assert row(made, "E2E mean").ratio == pytest.approx(1.0)
    assert "1 request of the second run failed" in made.doubts


def changed(run: Run, index: int, **fields: object) -> Run:
    requests: list[RequestRecord] = list(run.requests)
    requests[index] = replace(requests[index], **fields)  # type: ignore[arg-type]
    return replace(run, requests=requests)


@pytest.mark.parametrize(
    ("second", "doubt"),
    [
        (changed(a_run(), 7, prompt_digest="other"), "from request 7 on the prompt differs"),
        (changed(a_run(), 9, asked_tokens=99), "from request 9 on the number of tokens asked for"),
        (replace(a_run(), requests=a_run().requests[:50]), "200 and 50 of them"),
    ],
)
def test_runs_that_did_not_send_the_same_are_compared_with_a_warning(
    second: Run, doubt: str
) -> None:
    made = compare_runs(a_run(), second)
    assert not made.is_paired
    assert f"the two runs did not send the same requests: {doubt}" in made.doubts[0]
    ratio = row(made, "E2E mean")
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < 1 < ratio.high


def test_other_reasons_for_doubt_are_named() -> None:
    first = a_run(options={"rate": 2.0, "concurrency": 4})
    second = a_run(options={"rate": 3.0, "concurrency": 4}, is_interrupted=True)
    assert compare_runs(first, second).doubts == [
        "rate is not the same: 2.0 and 3.0",
        "the second run was interrupted",
    ]
    assert compare_runs(first, first).doubts == []


def test_another_model_or_task_is_a_doubt() -> None:
    first = replace(a_run(), info={"model_id": "m", "weights": "Q4_1"}, task=1)
    info = {"model_id": "m", "weights": "bfloat16", "model_dtype": "float32"}
    second = replace(a_run(), info=info, task=2)
    assert compare_runs(first, second).doubts == [
        "weights is not the same at both servers: Q4_1 and bfloat16",
        "the task is not the same: 1 and 2",
    ]
    assert compare_runs(first, replace(a_run(), info=None)).doubts == []


def test_an_exec_time_that_is_the_schedule_s_is_called_so() -> None:
    bound = run_of(request(0, 0.0, [0.5]), request(1, 99.0, [100.0]))
    (doubt,) = compare_runs(bound, bound).doubts
    assert "an Exec Time is about that of the schedule" in doubt
    closed = replace(bound, options={"concurrency": 1})
    assert compare_runs(closed, closed).doubts == []


def test_runs_without_a_good_request_are_compared_without_a_crash() -> None:
    made = compare_runs(run_of(failed(0, 0.0)), run_of())
    assert made.ratios[0].name == "Exec Time, s"


def test_tokens_that_all_came_at_once_are_compared_without_a_crash() -> None:
    at_once = run_of(*(request(i, 0.0, [1.0 + i] * 3) for i in range(3)))
    ratio = row(compare_runs(at_once, at_once), "TPOT mean")
    assert (ratio.first, ratio.ratio, ratio.low, ratio.verdict) == (0.0, None, None, "")


def test_the_command_prints_both_exec_times_and_the_gain(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, end_s in zip(paths, (100.0, 80.0), strict=True):
        save(run_of(request(0, 0.0, [1.0, end_s])), path)
    assert main(["compare", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    assert last == "Exec Time: 100.000 s, then 80.000 s: 20.0 % less (gain +20.0 %)"
    assert "TPOT mean, ms" in out


def test_a_file_that_cannot_be_compared_is_one_sentence_and_exit_code_2(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_of(), good := tmp_path / "a.json")
    assert main(["compare", str(good), str(tmp_path / "none.json")]) == 2
    err = capsys.readouterr().err
    assert err == f"error: cannot read {tmp_path}/none.json: No such file or directory\n"
