from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llm_serving.diagnostics.transport_report.log import read_transport_log
from llm_serving.errors import ConfigError
from llm_serving.transport.call_log import COLUMNS, TITLE
from tests.transport_logs import CALLS, SUMMARY, csv_text, older_text, read

HEAD = f"{TITLE}tcp+shm\n{','.join(COLUMNS)}\n"
ROW = "7,Execute,1,1,1,1,8,10,10,4.883\n"


def test_both_formats_hold_the_same_calls(tmp_path: Path) -> None:
    ours, older = read(tmp_path, csv_text()), read(tmp_path, older_text())
    assert (ours.transport, older.transport) == ("tcp+shm", "IPC")
    assert (ours.is_older, older.is_older) == (False, True)
    assert ours.remarks == older.remarks == ()
    assert ours.ids.tolist() == older.ids.tolist() == [1, 2, 3, 4]
    assert ours.methods.tolist() == older.methods.tolist() == [call[1] for call in CALLS]
    for i, name in enumerate(COLUMNS[2:], 2):
        assert ours.values[name].tolist() == older.values[name].tolist()
        assert ours.values[name].tolist() == [call[i] for call in CALLS]


def test_the_summary_tells_requests_seconds_and_how_it_ended(tmp_path: Path) -> None:
    log = read(tmp_path, csv_text())
    assert (log.num_requests, log.seconds, log.ended) == (2, 0.02, "normally")


def test_without_a_summary_nothing_is_made_up(tmp_path: Path) -> None:
    log = read(tmp_path, csv_text(end=""))
    assert (log.num_requests, log.seconds, log.ended) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("PK\x03\x04\0\0", "is a binary file"),
        ("model: llama2\nport: 8835\n", r"no transport log: .* begins with 'model: llama2'"),
        ("\n" * 300, "no transport log"),
        ("x" * 1_000_000, r"no transport log: .* begins with 'xxx\w*...'"),
        (f"{TITLE}tcp+shm\n", "ends before the line that names its columns"),
        (f"{TITLE}tcp+shm\nID,Method,Seria", "ends before the line that names its columns"),
        (f"{TITLE}tcp+shm\nID,Method,Serialize_ms,Send_ms", "has no column Recv_ms, Deserialize_"),
        (f"{TITLE.replace('1', '2')}tcp\n{ROW}", "is of format '2,?', and only 1 is known"),
        (f"\ufeff{TITLE.replace('1', '2')}tcp\n{ROW}", "is of format '2,?', and only 1 is known"),
        (HEAD, "no call was logged yet"),
        (HEAD + SUMMARY, "no call was logged and ended normally"),
        (HEAD + "7,Execute,1.0", "is cut within its first call"),
        (HEAD + "a,b\nc\n", r"none of its 2 rows could be read; the first, line 3: 2 fields, not"),
    ],
)
def test_a_file_without_calls_is_one_sentence_that_says_what_it_is(
    tmp_path: Path, text: str, what: str
) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("where", ["absent.log", "."])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read /\S*: \w+"):
        read_transport_log(tmp_path / where)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("9,Execute,1,1,1,1,8,10,10\n", "9 fields, not 10, in '9,Execute,1,1,1,1,8,10,10'"),
        ("one,Execute,1,1,1,1,8,10,10,4\n", "no ID"),
        ("9,Execute,1,fast,1,1,8,10,10,4\n", "no number for Send_ms"),
        ("9,Execute,1,0x1,1,1,8,10,10,4\n", "no number for Send_ms"),
        ("\0\xff[/bold]\n", r"1 fields, not 10, in '\x00ÿ[/bold]'"),
    ],
)
def test_a_row_that_cannot_be_read_is_counted_and_the_first_is_shown(
    tmp_path: Path, row: str, why: str
) -> None:
    log = read(tmp_path, HEAD + ROW + row + row + ROW + SUMMARY)
    [remark] = log.remarks
    assert log.ids.tolist() == [7, 7]
    assert remark.startswith("2 of 4 rows could not be read; the first, line 4: ")
    assert why in remark


def test_a_negative_or_absurd_value_is_left_out_and_named(tmp_path: Path) -> None:
    log = read(tmp_path, HEAD + ROW + "8,Execute,1,-2,1,1,8,10,1e300,1e999\n" + SUMMARY)
    [remark] = log.remarks
    assert remark.startswith("2 values are negative or absurdly large and left out; the first, ")
    assert remark.endswith("line 4: Send_ms = -2")
    assert np.isnan([log.values[name][1] for name in ("Send_ms", "Recv_KB")]).all()


@pytest.mark.parametrize("none", ["", "-", "N/A", "nan", "NaN", "inf", "null"])
def test_a_value_may_be_missing(tmp_path: Path, none: str) -> None:
    log = read(tmp_path, HEAD + f"8,Execute,1,{none},1,1,8,10,10,{none}\n" + SUMMARY)
    assert np.isnan(log.values["Send_ms"]).all()
    assert log.remarks == ("1 values are missing: they count as 0 in the shares, and nowhere else",)


def test_a_last_row_without_its_end_is_cut_and_left_out(tmp_path: Path) -> None:
    log = read(tmp_path, (HEAD + ROW + ROW)[:-2])  # the throughput lacks a digit
    assert len(log) == 1
    [remark] = log.remarks
    assert "the last line is cut" in remark


def test_the_older_format_may_be_cut_anywhere(tmp_path: Path) -> None:
    text = older_text()
    end = text.index("\n4 ") + 60  # within the last row
    log = read(tmp_path, text[:end])
    assert log.ids.tolist() == [1, 2, 3]
    assert "the last line is cut" in log.remarks[0]


@pytest.mark.parametrize(
    "change",
    [
        ("\n", "\r\n"),
        ("Transport: IPC", "transport:    IPC"),
        ("Serialize(ms)", "Serialize (ms)"),
        ("  ", " \t "),
        ("=" * 150, ""),
        ("204.8 ", "N/A"),
        ("Ping ", "Ping of an agent "),
        ("ID ", "\ufeffID "),
    ],
)
def test_the_older_format_is_read_as_people_have_it(
    tmp_path: Path, change: tuple[str, str]
) -> None:
    assert change[0] in older_text()
    log = read(tmp_path, older_text().replace(*change))
    assert log.transport == "IPC"
    assert log.ids.tolist() == [1, 2, 3, 4]
    assert log.methods[2].startswith("Ping")
    assert log.values["Sent_KB"].tolist() == [1500.0, 500.0, 0.0625, 2500.5]
    assert log.remarks == ()


def test_a_comma_is_never_taken_for_a_decimal_point(tmp_path: Path) -> None:
    log = read(tmp_path, older_text().replace(" 0.25 ", " 0,250 "))
    assert log.ids.tolist() == [1, 2]
    assert "2 of 4 rows could not be read" in log.remarks[0]


def test_logs_that_were_put_together_are_one(tmp_path: Path) -> None:
    twice = read(tmp_path, csv_text() + csv_text())
    assert len(twice) == 8
    assert (twice.num_requests, twice.seconds, twice.remarks) == (4, 0.04, ())
    assert read(tmp_path, csv_text() + csv_text(end="")).ended is None
    older = read(tmp_path, older_text() + older_text())
    assert (len(older), older.remarks) == (8, ())


def test_a_log_may_come_through_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(csv_text(),))
    writer.start()
    assert len(read_transport_log(path)) == 4
    writer.join()


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text(HEAD + ROW * 150_000)
    told: list[Sequence[int]] = []
    read_transport_log(path, lambda *done: told.append(done))
    assert len(told) == 1
    done, size = told[0]
    assert 4 << 20 <= done <= size == path.stat().st_size


def test_a_method_has_only_letters_that_can_be_shown(tmp_path: Path) -> None:
    log = read(tmp_path, HEAD + ROW.replace("Execute", "Pi\x1bng" + "g" * 99))
    assert log.methods.tolist() == ["Pi?ng" + "g" * 35]
