from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from llm_serving.errors import ConfigError
from llm_serving.transport.call_log import COLUMNS, TITLE, CallLog

MS = 1_000_000
STAMPS = {  # of a call of 10 ms, with 1, 2, 0.5 + 1.5 and 1 ms in the stages and 4 in the peer
    "begin_ns": 5 * MS,
    "encoded_ns": 6 * MS,
    "sent_ns": 8 * MS,
    "peer_waiting_ns": 0,
    "peer_received_ns": 8 * MS + MS // 2,
    "peer_done_ns": 12 * MS + MS // 2,
    "arrived_ns": 14 * MS,
    "decoded_ns": 15 * MS,
}


def add(log: CallLog, method: str = "Execute", /, **changes: int) -> None:
    sizes = {"sent_bytes": 3 * 1024 * 1024, "received_bytes": 512}
    log.add(method, **(STAMPS | sizes | changes))


def rows(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, comment="#")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "transport.csv"


def test_the_head_is_there_before_the_first_call(path: Path) -> None:
    log = CallLog(path, transport="tcp+shm")
    assert path.read_text().splitlines() == [TITLE + "tcp+shm", ",".join(COLUMNS)]
    log.close()


def test_pandas_reads_every_stage_of_a_call(path: Path) -> None:
    with CallLog(path, transport="tcp+shm") as log:
        add(log)
    [row] = rows(path).to_dict("records")
    assert row == {
        "ID": 1,
        "Method": "Execute",
        "Serialize_ms": 1.0,
        "Send_ms": 2.0,
        "Recv_ms": 2.0,
        "Deserialize_ms": 1.0,
        "Total_ms": 10.0,
        "Sent_KB": 3072.0,
        "Recv_KB": 0.5,
        "Throughput_MBps": pytest.approx((3 + 0.5 / 1024) / 0.006, abs=1e-3),
    }


def test_waiting_in_line_at_the_peer_is_not_transport(path: Path) -> None:
    with CallLog(path, transport="tcp+shm") as log:
        add(log, peer_waiting_ns=8 * MS + MS // 4)
        add(log, peer_waiting_ns=9 * MS)  # it had read the frame beside an earlier one
    assert rows(path)["Recv_ms"].tolist() == [1.75, 1.5]


def test_what_the_peer_has_already_is_not_being_sent_any_more(path: Path) -> None:
    with CallLog(path, transport="tcp+shm") as log:
        add(log, peer_received_ns=7 * MS)  # before our own call of send returned
    assert rows(path)[["Send_ms", "Recv_ms"]].values.tolist() == [[1.0, 1.5]]


def test_a_reader_that_follows_the_file_sees_whole_rows_after_each_flush(path: Path) -> None:
    log = CallLog(path, transport="unix+shm")
    with path.open() as reader:
        assert len(reader.readlines()) == 2
        add(log)
        assert reader.readlines() == []
        log.flush()
        [line] = reader.readlines()
        assert line.startswith("1,Execute,1.0000,")
        assert line.endswith("\n")
        add(log)
        add(log)
        log.flush()
        assert [line[:2] for line in reader.readlines()] == ["2,", "3,"]
    log.close()


def test_the_summary_counts_calls_requests_and_seconds(path: Path) -> None:
    times = iter([10.0, 12.5])
    log = CallLog(path, transport="tcp+shm", clock=lambda: next(times))
    add(log)
    log.num_requests = 7
    log.close()
    last = path.read_text().splitlines()[-1]
    assert last == "# summary: calls=1 requests=7 seconds=2.500 ended=normally"


def test_the_summary_is_written_after_an_exception_too(path: Path) -> None:
    with suppress(ZeroDivisionError), CallLog(path, transport="tcp+shm") as log:
        add(log)
        raise ZeroDivisionError
    lines = path.read_text().splitlines()
    assert lines[-2].startswith("1,Execute,")
    assert lines[-1].endswith("ended=ZeroDivisionError")


def test_how_it_ended_never_takes_more_than_one_line(path: Path) -> None:
    log = CallLog(path, transport="tcp\n+shm")
    log.ended = "AgentDied:\nwhy"
    log.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert lines[0] == TITLE + "tcp +shm"
    assert lines[-1].endswith("ended=AgentDied: why")


def test_closing_again_and_calls_after_it_change_nothing(path: Path) -> None:
    log = CallLog(path, transport="tcp+shm")
    log.close()
    written = path.read_bytes()
    add(log)
    log.flush()
    log.close()
    assert path.read_bytes() == written


def test_only_the_methods_that_were_asked_for_are_written(path: Path) -> None:
    with CallLog(path, transport="tcp+shm", methods=["Ping"]) as log:
        add(log, "Execute")
        add(log, "Ping")
    assert rows(path)[["ID", "Method"]].values.tolist() == [[1, "Ping"]]


def test_a_call_without_duration_has_no_throughput(path: Path) -> None:
    with CallLog(path, transport="tcp+shm") as log:
        add(log, **dict.fromkeys(STAMPS, 0))
    assert math.isnan(rows(path)["Throughput_MBps"][0])


@pytest.mark.parametrize(("methods", "named"), [(["Execute", "Stop"], "Stop"), ([], "none")])
def test_an_unknown_method_is_named(path: Path, methods: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"the methods are Execute, Ping; {named}"):
        CallLog(path, transport="tcp+shm", methods=methods)
    assert not path.exists()


def test_an_old_log_is_replaced_but_no_other_file(path: Path) -> None:
    with CallLog(path, transport="tcp+shm") as log:
        add(log)
    CallLog(path, transport="unix+shm").close()
    assert len(rows(path)) == 0
    path.write_text("model: {path: important}\n")
    with pytest.raises(ConfigError, match="another file of that name"):
        CallLog(path, transport="tcp+shm")
    assert path.read_text() == "model: {path: important}\n"


@pytest.mark.parametrize("where", ["absent/log", ".", "/proc/log", "/dev/full"])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_served(
    tmp_path: Path, where: str
) -> None:
    with pytest.raises(ConfigError, match=r"transport log .*: \w+"):
        CallLog(tmp_path / where, transport="tcp+shm")


def test_a_log_that_can_no_longer_be_written_ends_and_its_caller_goes_on(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    told: list[str] = []
    log = CallLog(path, transport="tcp+shm", on_failure=told.append)
    os.close(reader)
    add(log)
    log.flush()
    assert told == [f"transport log {path}: Broken pipe; it ends here"]
    add(log)
    log.flush()
    log.close()
    assert len(told) == 1
