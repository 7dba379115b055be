from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from load_test.figures import figures_of
from load_test.picture_data import band, open_requests
from load_test.picture_style import amount
from load_test.plots import draw, pictures
from load_test.results import Sample
from matplotlib.artist import Artist
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch

from tests.load_results import request, run_of
from tests.load_runs import RUNS, STEM, eventful, many, well

NAMES = ("latency", "percentiles", "tokens", "load")


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return pictures(eventful())


def named(figure: Figure, name: str) -> Artist:
    """The one artist of this name in a picture."""
    (found,) = (artist for artist in figure.findobj() if artist.get_gid() == name)
    return found


def line(figure: Figure, name: str) -> tuple[Any, Any]:
    found = named(figure, name)
    assert isinstance(found, Line2D)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def points(figure: Figure, name: str) -> Any:
    found = named(figure, name)
    assert isinstance(found, PathCollection)
    return np.asarray(found.get_offsets())


def steps(figure: Figure, name: str) -> tuple[Any, Any]:
    found = named(figure, name)
    assert isinstance(found, StepPatch)
    values, edges, baseline = found.get_data()
    return values - baseline, edges


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_any_kind_becomes_four_pngs_named_after_its_start(
    name: str, tmp_path: Path
) -> None:
    paths = list(draw(RUNS[name](), tmp_path))
    assert [path.name for path in paths] == [f"{STEM}_{part}.png" for part in NAMES]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(data[16:20], "big") == 1500


@pytest.mark.filterwarnings("error")
def test_any_model_name_and_start_can_be_drawn(tmp_path: Path) -> None:
    run = eventful()
    run.model, run.started, run.url = "$2^{$ 模型\n", "../../yesterday", "http://$host$:1"
    for path in draw(run, tmp_path):
        assert path.parent == tmp_path
        assert path.name.startswith("test_performance_-yesterday_")


def test_latencies_stand_over_the_scheduled_times_of_the_requests_that_ended_well(
    drawn: dict[str, Figure],
) -> None:
    ok = [r for r in eventful().requests if r.state == "ok"]
    figure = drawn["latency"]
    assert figure.axes[0].get_ylabel() == "latency (ms)"
    for name in ("ttft", "e2e"):
        expected = [(r.scheduled_s, getattr(r, f"{name}_s") * 1e3) for r in ok]
        np.testing.assert_allclose(points(figure, name), expected)


def test_each_way_to_end_badly_has_a_row_with_its_marks_and_its_number(
    drawn: dict[str, Figure],
) -> None:
    figure = drawn["latency"]
    strip = figure.axes[1]
    rows = [label.get_text() for label in strip.get_yticklabels()]
    assert rows == ["error: 2", "cancelled: 1", "impossible: 1", "unfinished: 1"]
    for row, (state, due) in enumerate(
        {"error": [6, 11], "cancelled": [7], "impossible": [8], "unfinished": [10]}.items()
    ):
        np.testing.assert_allclose(points(figure, state), [(at, row) for at in due])


def test_a_run_without_errors_has_no_row_of_marks() -> None:
    assert len(pictures(run_of(well(0, 0.0, 0.1, 0.02, 3)))["latency"].axes) == 1


@pytest.mark.parametrize("name", ["ttft", "tpot", "itl", "e2e"])
def test_the_marked_percentiles_are_those_of_the_summary_and_lie_on_the_curve(
    name: str, drawn: dict[str, Figure]
) -> None:
    figure = drawn["percentiles"]
    spread = getattr(figures_of(eventful()), name)
    curve_at, curve_shares = line(figure, name)
    for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        (at,), (height,) = line(figure, f"{name}-{label}")
        assert at == pytest.approx(getattr(spread, label))
        assert height == share
        assert np.interp(share, curve_shares, curve_at) == pytest.approx(at)


def test_a_goal_is_drawn_where_it_was_set(drawn: dict[str, Figure]) -> None:
    figure = drawn["percentiles"]
    assert list(line(figure, "ttft-goal")[0]) == [150, 150]
    assert list(line(figure, "e2e-goal")[0]) == [400, 400]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (0.0489, "0.0489 s"), (7.256, "7.26 s"), (48.94, "48.9 s"), (1234.5, "1,234 s")],
)
def test_an_amount_has_three_digits_or_more(value: float, text: str) -> None:
    assert amount(value, "s") == text


@pytest.mark.parametrize(("longest_s", "scale"), [(0.15, "linear"), (15.0, "log")])
def test_an_axis_is_logarithmic_if_the_latencies_ask_for_it(longest_s: float, scale: str) -> None:
    run = run_of(well(0, 0.0, 0.1, 0.01, 2), well(1, 1.0, longest_s, 0.01, 2))
    figures = pictures(run)
    assert figures["latency"].axes[0].get_yscale() == scale
    assert figures["percentiles"].axes[0].get_xscale() == scale


def test_gaps_of_which_most_are_zero_are_drawn() -> None:
    """Tokens that came in one piece; on a logarithmic axis, for the others are far apart."""
    run = run_of(*(request(i, i, [i + 0.1] * 5 + [i + 0.101, i + 0.9]) for i in range(3)))
    axes = pictures(run)["percentiles"].axes[2]
    assert axes.get_xscale() == "log"
    assert "p50" in axes.texts[0].get_text()


def test_no_point_falls_out_of_a_logarithmic_axis() -> None:
    run = many(300)
    run.requests[5].token_s[:] = [run.requests[5].scheduled_s + 0.001] * 4  # and gaps of zero
    figure = pictures(run)["latency"]
    low, high = figure.axes[0].get_ylim()
    for name in ("ttft", "e2e"):
        heights = points(figure, name)[:, 1]
        assert low < heights.min() < heights.max() < high


def test_the_area_below_the_token_rate_is_the_tokens_of_the_summary() -> None:
    run = eventful()
    run.requests[0].output_tokens *= 3  # three tokens an event
    figure = pictures(run)["tokens"]
    counted, edges = steps(figure, "counted")
    assert float(np.sum(counted * np.diff(edges))) == pytest.approx(figures_of(run).output_tokens)
    lost_rate, edges = steps(figure, "lost")
    assert float(np.sum(lost_rate * np.diff(edges))) == pytest.approx(2)  # of the cut stream


def test_running_and_waiting_are_the_samples_of_the_server(drawn: dict[str, Figure]) -> None:
    figure = drawn["load"]
    for name in ("running", "waiting"):
        expected = [(s.at_s, getattr(s, name)) for s in eventful().samples]
        np.testing.assert_allclose(np.transpose(line(figure, name)), expected)
    assert "by the server" in figure.texts[0].get_text()


def test_without_samples_the_open_requests_are_counted_and_the_title_says_so() -> None:
    run = run_of(request(0, 0.0, [2.0]), request(1, 1.0, [3.0]))
    run.samples = [Sample(1.0, 2)]
    figure = pictures(run)["load"]
    assert "counted by the client" in figure.texts[0].get_text()
    at, counts = line(figure, "open")
    assert list(at) == [0, 0, 1, 2, 3]
    assert list(counts) == [0, 1, 2, 1, 0]


def test_a_band_keeps_peaks_and_means_of_what_it_stands_for() -> None:
    run = many(1000)
    at, counts = open_requests(run.requests)
    made = band(at, counts)
    assert made is not None
    assert made.high.max() == counts.max()
    assert np.all((made.low <= made.mean) & (made.mean <= made.high))
    held = np.sum(counts[:-1] * np.diff(at)) / (at[-1] - at[0])
    assert float(made.mean.mean()) == pytest.approx(float(held))


def test_ten_thousand_requests_are_drawn_as_an_image_and_short_curves() -> None:
    run = many(10_000)
    figures = pictures(run)
    assert named(figures["latency"], "e2e").get_rasterized()
    assert len(points(figures["latency"], "e2e")) == 9999
    for figure in figures.values():
        for found in figure.findobj(Line2D):
            assert np.size(found.get_xdata()) < 1000
