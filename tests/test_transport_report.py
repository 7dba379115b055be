from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm_serving import cli
from llm_serving.diagnostics.page import Page
from llm_serving.diagnostics.transport_report.advice import Advice, advise, explain_other
from llm_serving.diagnostics.transport_report.comparison import TRANSPORT, compare
from llm_serving.diagnostics.transport_report.log import STAGES, TransportLog
from llm_serving.diagnostics.transport_report.plots import write_plots
from llm_serving.diagnostics.transport_report.report import as_json, print_comparison, print_report
from llm_serving.diagnostics.transport_report.statistics import (
    OTHER,
    Statistics,
    rounded_percent,
    summarise,
)
from llm_serving.errors import ConfigError
from llm_serving.transport.call_log import COLUMNS
from tests.transport_logs import SUMMARY, csv_text, older_text, read


def shares_of(*stages: float, total: float, method: str = "Execute") -> tuple[object, ...]:
    """A call with these stages."""
    return (1, method, *stages, total, 10.0, 10.0, 1.0)


@pytest.fixture
def log(tmp_path: Path) -> TransportLog:
    return read(tmp_path, csv_text())


def printed(log: TransportLog, *, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    page = Page(Console(file=stream, width=width))
    statistics = summarise(log)
    print_report(page, log, statistics, advise(log, statistics), explain_other(log, statistics))
    stream.seek(0)
    return stream.read()


def test_the_figures_are_those_computed_by_hand(log: TransportLog) -> None:
    statistics = summarise(log)
    overall = statistics.overall
    total = overall.columns["Total_ms"]
    assert (total.count, total.total, total.mean, total.median) == (4, 40.0, 10.0, 7.5)
    assert (total.p95, total.p99, total.max) == pytest.approx((22.2, 23.64, 24.0))
    assert overall.columns["Recv_ms"].total == 8.0
    assert overall.columns[OTHER].total == 20.0
    assert overall.columns[OTHER].max == 13.5
    assert overall.columns["Sent_KB"].total == 4500.5625
    assert overall.transport_ms == 5.0
    assert overall.throughput_mbps == pytest.approx(4560.625 / 1024 / 0.020)
    assert overall.shares == dict(zip([*STAGES, OTHER], [0.1, 0.1, 0.2, 0.1, 0.5], strict=True))
    assert statistics.calls_per_request == 1.5  # the ping belongs to nobody
    assert statistics.mean_in_flight == 2.0


def test_methods_come_by_their_time_and_have_figures_of_their_own(log: TransportLog) -> None:
    methods = summarise(log).by_method
    assert list(methods) == ["Execute", "Ping"]
    assert methods["Execute"].num_calls == 3
    assert methods["Execute"].columns["Total_ms"].mean == 13.0
    assert methods["Execute"].shares["Recv_ms"] == pytest.approx(7.5 / 39)
    assert methods["Ping"].shares == {**dict.fromkeys(STAGES[:2], 0.25)} | {
        "Recv_ms": 0.5,
        "Deserialize_ms": 0.0,
        OTHER: 0.0,
    }


def test_hundreds_of_methods_are_summed_up(tmp_path: Path) -> None:
    calls = [shares_of(1, 1, 1, 1, total=n, method=f"m{n}") for n in range(5, 405)]
    methods = summarise(read(tmp_path, csv_text(calls))).by_method
    assert list(methods)[:2] == ["m404", "m403"]
    assert list(methods)[-1] == "(388 others)"
    assert sum(method.num_calls for method in methods.values()) == 400


def test_the_five_slowest_and_the_five_largest_are_found(tmp_path: Path) -> None:
    calls = [(n, "Execute", 1, 1, 1, 1, 100 + n % 7, n, 0, 1) for n in range(1, 21)]
    log = read(tmp_path, csv_text(calls))
    statistics = summarise(log)
    assert log.ids[statistics.slowest].tolist() == [6, 13, 20, 5, 12]
    assert log.ids[statistics.largest].tolist() == [20, 19, 18, 17, 16]


def test_both_formats_give_the_same_figures(tmp_path: Path) -> None:
    ours, older = read(tmp_path, csv_text()), read(tmp_path, older_text())
    assert summarise(older, num_requests=2).overall == summarise(ours).overall
    assert summarise(older, num_requests=2).by_method == summarise(ours).by_method
    assert summarise(older, num_requests=2).slowest == summarise(ours).slowest
    assert summarise(older).num_requests is None
    assert math.isnan(summarise(older).calls_per_request)


@given(st.lists(st.floats(0, 1e12), min_size=5, max_size=5).filter(any))
@example([1, 1, 1, 0, 0])
@example([2, 2, 2, 2, 7])
def test_the_percentages_that_are_shown_add_up_to_100(parts: list[float]) -> None:
    shares = {str(i): part / math.fsum(parts) for i, part in enumerate(parts)}
    percent = rounded_percent(shares)
    assert round(math.fsum(percent.values()), 9) == 100.0
    assert all(abs(percent[name] - 100 * shares[name]) < 0.1001 for name in shares)


def test_stages_that_exceed_the_total_are_said_to(tmp_path: Path) -> None:
    log = read(tmp_path, csv_text([shares_of(2, 2, 2, 2, total=4)]))
    statistics = summarise(log)
    assert statistics.overall.excess == 2.0
    assert list(statistics.overall.shares.values()) == [0.25, 0.25, 0.25, 0.25, 0.0]
    assert "The stages add up to 200.0 % of Total, which cannot be" in " ".join(
        printed(log).split()
    )


def test_rounding_in_the_log_is_no_contradiction(tmp_path: Path) -> None:
    log = read(tmp_path, csv_text([shares_of(0.25, 0.25, 0.25, 0.251, total=1)]))
    assert summarise(log).overall.excess == 0.0


def test_a_missing_total_keeps_its_stages_out_of_the_shares(tmp_path: Path) -> None:
    calls = [shares_of(9, 9, 9, 9, total=math.nan), shares_of(1, 0, 0, 0, total=4)]
    statistics = summarise(read(tmp_path, csv_text(calls)))
    assert statistics.overall.shares["Serialize_ms"] == 0.25
    assert statistics.overall.columns["Serialize_ms"].mean == 5.0


@pytest.mark.parametrize("method", ["Execute", "Ping"])
def test_calls_that_took_no_time_divide_nothing(tmp_path: Path, method: str) -> None:
    log = read(tmp_path, csv_text([shares_of(0, 0, 0, 0, total=0, method=method)]))
    statistics = summarise(log)
    assert all(map(math.isnan, statistics.overall.shares.values()))
    assert advise(log, statistics) == []
    assert "there is nothing to share out" in printed(log)
    assert "nan" not in printed(log)


def advice_for(
    tmp_path: Path, *stages: float, transport: str = "tcp+shm", method: str = "Execute"
) -> list[Advice]:
    """For a log with this much of 100 ms in the stages; as many other calls are pings."""
    calls = [shares_of(*stages, total=100, method=method), shares_of(0, 0, 9, 0, total=9)]
    calls[1] = (2, "Ping", *calls[1][2:])
    log = read(tmp_path, csv_text(calls, transport=transport))
    return advise(log, summarise(log))


@pytest.mark.parametrize(
    ("transport", "sentence"),
    [
        ("tcp+shm", "the arrays are in shared memory already: 16-bit"),
        ("tcp", "put the arrays into shared memory instead of into the message, and send 16-bit"),
    ],
)
def test_much_serialisation_asks_for_shared_memory_and_16_bit(
    tmp_path: Path, transport: str, sentence: str
) -> None:
    [advice] = advice_for(tmp_path, 20, 0, 0, 11, transport=transport)
    figure = "Serialize 20.0 % + Deserialize 11.0 % = 31.0 % of Total without pings, over 30 %"
    assert advice.figure == figure
    assert advice.sentence.startswith(sentence)


@pytest.mark.parametrize(
    ("transport", "sentence"),
    [
        ("tcp+shm", "the frames go over TCP: a Unix socket (agent.transport: unix) is quicker"),
        ("unix+shm", "shared memory and a Unix socket are in use"),
        ("TCP", "TCP carries the arrays where shared memory was meant"),
        ("IPC", "the arrays go through a socket: put them into shared memory"),
    ],
)
def test_much_sending_and_receiving_asks_for_another_medium(
    tmp_path: Path, transport: str, sentence: str
) -> None:
    [advice] = advice_for(tmp_path, 0, 1, 29.5, 0, transport=transport)
    figure = "Send 1.0 % + Recv 29.5 % = 30.5 % of Total without pings, over 30 %"
    assert advice.figure == figure
    assert advice.sentence.startswith(sentence)


def test_at_the_limits_nothing_stands_out(tmp_path: Path) -> None:
    assert advice_for(tmp_path, 15, 15, 15, 15) == []


def test_pings_alone_ask_for_nothing(tmp_path: Path) -> None:
    assert advice_for(tmp_path, 50, 50, 0, 0, method="Ping") == []


@pytest.mark.parametrize(("requests", "figure"), [(1, "51.0 calls a request"), (2, None)])
def test_many_calls_a_request_ask_for_fewer(
    tmp_path: Path, requests: int, figure: str | None
) -> None:
    calls = [shares_of(0, 0, 0, 0, total=1)] * 51
    log = read(tmp_path, csv_text(calls, end=SUMMARY.replace("requests=2", "requests=0")))
    advice = advise(log, summarise(log, requests))
    assert [each.figure.split(",")[0] for each in advice] == ([figure] if figure else [])
    assert advise(log, summarise(log)) == []  # of no request, nothing follows


def test_two_logs_are_compared_by_stage_and_method(tmp_path: Path) -> None:
    first = [shares_of(2, 2, 4, 2, total=20), shares_of(1, 1, 1, 1, total=4, method="Ping")]
    second = [shares_of(1, 2, 2, 0, total=20.5), shares_of(1, 1, 1, 1, total=4, method="Stop")]
    comparison = compare(*(summarise(read(tmp_path, csv_text(c))) for c in (first, second)))
    pairs = comparison.by_method["Execute"]
    assert {name: pair.ratio for name, pair in pairs.items()} == {
        "Serialize_ms": 0.5,
        "Send_ms": 1.0,
        "Recv_ms": 0.5,
        "Deserialize_ms": 0.0,
        TRANSPORT: 0.5,
        OTHER: 1.55,
        "Total_ms": 1.025,
    }
    assert (comparison.only_first, comparison.only_second) == (["Ping"], ["Stop"])
    [verdict] = comparison.verdicts
    assert verdict == (
        "Execute: transport (the four stages): B is 2.00 times as fast; Total: the same within 5 %"
    )


def test_the_other_log_may_be_the_faster_one(tmp_path: Path) -> None:
    slow, fast = ([shares_of(*[ms] * 4, total=9 * ms)] for ms in (3, 1))
    comparison = compare(*(summarise(read(tmp_path, csv_text(c))) for c in (fast, slow)))
    assert comparison.verdicts[0].endswith(
        "A is 3.00 times as fast; Total: A is 3.00 times as fast"
    )


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_report_reads_the_same_in_a_pipe(log: TransportLog, width: int) -> None:
    text = printed(log, width=width)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert not set("│┃┏━┡╇─|\x1b") & set(text)
    rows = [line.split() for line in text.splitlines()]
    assert ["Recv", "████████", "20.0"] in rows
    assert ["all", "100.0"] in rows
    assert ["Total", "40.0", "10.000", "7.5000", "22.200", "23.640", "24.000"] in rows
    assert [
        "ID",
        "2",
        "Execute",
        "24.000",
        *["2.5000", "1.5000", "4.0000", "2.5000", "13.500"],
    ] in rows
    assert "Nothing stands out." in text
    assert "KB: 1024 bytes; MB: 1024 KB" in text


def test_a_terminal_without_unicode_gets_a_report_too(tmp_path: Path) -> None:
    log = read(tmp_path, csv_text(transport="żółw\x07 [bold]").replace("Ping", "P[red]ńg\x1b[2J"))
    text = printed(log, encoding="ascii")
    assert "########" in text
    assert "transport ???w? [bold]" in text
    assert "P[red]?g?[2J" in text


def test_what_a_log_lacks_stands_at_its_head(tmp_path: Path) -> None:
    text = printed(read(tmp_path, csv_text(end="cut\n# summary: calls=4")))
    text = " ".join(text.split())
    assert "Note: 1 of 5 rows could not be read; the first, line 7: 1 fields, not 10" in text
    assert "Note: there is no summary line" in text
    assert "--requests N" in text
    failed = csv_text(end=SUMMARY.replace("normally", "AgentDied"))
    assert "Note: the log ended with AgentDied." in printed(read(tmp_path, failed))


def test_the_command_reports_compares_draws_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, older = tmp_path / "ours.csv", tmp_path / "older.log"
    ours.write_text(csv_text())
    older.write_text(older_text())
    saved, folder = tmp_path / "report.json", tmp_path / "deep" / "plots"
    options = ["--requests", "3", "--json", str(saved), "--plots", str(folder)]
    assert cli.main(["transport-report", str(ours), str(older), *options]) == 0
    out = capsys.readouterr().out
    assert "3 requests" in out
    assert "Execute: transport (the four stages): the same within 5 %" in out
    for name in ("stages.png", "throughput.png"):
        assert f"wrote {folder / name}" in out
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads(saved.read_text())
    assert report["logs"][0]["calls_per_request"] == 1.0
    assert report["logs"][0]["overall"]["shares"][OTHER] == 0.5
    assert report["logs"][0]["slowest"][0]["ID"] == 2
    assert report["logs"][1]["mean_in_flight"] is None
    assert report["comparison"]["by_method"]["Execute"]["Total_ms"]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["absent.csv"], "cannot read absent.csv: No such file or directory"),
        (["good.csv", "empty.csv"], "empty.csv is empty"),
        (["good.csv", "--json", "absent/report.json"], "cannot write absent/report.json: No such"),
        (["good.csv", "--plots", "good.csv"], "cannot write plots into good.csv: File exists"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.csv").write_text(csv_text())
    Path("empty.csv").touch()
    assert cli.main(["transport-report", *options]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llm-serving transport-report: {sentence}")


@pytest.mark.parametrize(
    "call",
    [
        shares_of(0, 0, 0, 0, total=0),
        shares_of(1, 1, 1, 1, total=4),
        shares_of(*[math.nan] * 4, total=math.nan),
        (1, r"$\frac{$ méthode 方法", 1, 1, 1, 1, 9, 9, 9, math.nan),
        (10**15 - 1, "Execute", 1e15, 1e-15, 1, 1, 9, 9, 9, 1e15),
    ],
)
def test_one_strange_call_is_drawn_too(tmp_path: Path, call: tuple[object, ...]) -> None:
    for path in write_plots(
        tmp_path / "plots", [read(tmp_path, csv_text([call], transport="\x1b"))]
    ):
        assert path.stat().st_size > 10_000


def test_long_logs_that_were_put_together_are_drawn_too(tmp_path: Path) -> None:
    calls = [(n, "Execute", 1, 1, 1, 1, 9, 9, 9, n) for n in range(1, 3000)]
    log = read(tmp_path, csv_text(calls) * 2)
    assert all(path.exists() for path in write_plots(tmp_path / "plots", [log, log]))


edits = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 40), st.binary(max_size=12)), max_size=6
)


def edited(text: str, changes: list[tuple[int, int, bytes]]) -> bytes:
    content = text.encode()
    for at, length, new in changes:
        at %= len(content) + 1
        content = content[:at] + new + content[at + length :]
    return content


HEAD = csv_text([], end="")
LOGS = st.tuples(st.sampled_from([csv_text(), older_text(), HEAD]), edits)
NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, 1e-320, 1e15, -1.0, "N/A", "1e400", ""]))
CALL = st.tuples(st.integers(0), st.text(max_size=9), *[NUMBERS] * (len(COLUMNS) - 2))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(
        st.binary(max_size=200),
        LOGS.map(lambda drawn: edited(*drawn)),
        st.lists(CALL, max_size=5).map(lambda calls: csv_text(calls).encode("utf-8", "replace")),
    )
)
@example(HEAD.encode() + b"1" * 400 + b",Execute,1,1,1,1,1,1,1,1\n")
def test_whatever_the_bytes_are_there_is_a_report_or_one_sentence(
    tmp_path: Path, content: bytes
) -> None:
    try:
        log = read(tmp_path, content)
    except ConfigError as exc:
        refusal = str(exc)
    else:
        refusal = ""
        check_report(log, summarise(log))
    assert "\n" not in refusal


def check_report(log: TransportLog, statistics: Statistics) -> None:
    assert len(log) == len(log.methods) > 0
    for column in log.values.values():
        assert column.shape == (len(log),)
        assert not np.any((column < 0) | np.isinf(column))
    shares = math.fsum(statistics.overall.shares.values())
    assert math.isnan(shares) or shares == pytest.approx(1)
    assert "Advice" in printed(log)
    page = Page(Console(file=io.StringIO(), width=80))
    print_comparison(page, log, log, compare(statistics, statistics))
    as_json(log, statistics, [])
