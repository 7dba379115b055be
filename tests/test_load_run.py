from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from load_test import html_report, results, screen
from load_test.command import main
from load_test.figures import figures_of
from load_test.results import Run

from tests.fake_llm_server import INFO, FakeLlmServer, Fate

FAST = ("-X", "400", "-T", "0.05")  # 20 requests
EXEC_TIME = re.compile(r"All Tasks Done; Exec Time is (\d+\.\d+)")


class Shell:
    """Runs the load test as a user does, and keeps what it left."""

    def __init__(self, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        entries = [
            {"instruction": f"one two {i}", "input": "", "output": "word " * (3 + i)}
            for i in range(3)
        ]
        self.dataset = folder / "set.json"
        self.dataset.write_text(json.dumps(entries))
        self.out = self.err = ""

    def __call__(
        self, server: FakeLlmServer, *flags: str, load: tuple[str, ...] = FAST, save: str = "json"
    ) -> int:
        url = ("--url", server.url) if "--url" not in flags else ()
        files = ("-O", str(self.folder), "--dataset", str(self.dataset), "--save", save)
        code = main([*load, *url, *files, *flags])
        self.out, self.err = self._capsys.readouterr()
        return code

    @property
    def run(self) -> Run:
        return results.load(self.file(".json"))

    def file(self, suffix: str) -> pathlib.Path:
        (path,) = (self.folder / "testLog").glob(f"*{suffix}")
        return path

    def row(self, name: str) -> str:
        """What the table says of it."""
        found = re.search(rf"^ +{re.escape(name)}  +(.*)$", self.out, re.M)
        assert found is not None, self.out
        return found.group(1).strip()


@pytest.fixture
def load_test(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


@pytest.fixture
def server() -> Iterator[FakeLlmServer]:
    with FakeLlmServer() as running:
        yield running


def test_a_run_sends_the_requests_of_the_plan_and_leaves_its_figures(
    server: FakeLlmServer, load_test: Shell
) -> None:
    assert load_test(server) == 0
    run = load_test.run
    assert sorted(body["inputs"] for body in server.bodies) == sorted(
        f"one two {i % 3}" for i in range(20)
    )
    asked = [3, 4, 5] * 6 + [3, 4]
    assert [r.asked_tokens for r in run.requests] == asked
    assert [r.output_tokens for r in run.requests] == asked
    assert all(r.state == "ok" and r.prompt_tokens == 3 for r in run.requests)
    assert run.requests[0].timing == {"queue": 1.0, "decode": 2.0}
    assert [r.request_id for r in run.requests] == [h["x-request-id"] for h in _in_order(server)]
    assert load_test.row("ended well") == "20"
    assert load_test.row("output tokens") == str(sum(asked))
    # of the server: hits are a quarter, a decode step is 10 ms and has 2 rows, bare 4 to 8 ms
    assert load_test.row("prefix-cache hits") == "25.0% of the prompt tokens"
    assert load_test.row("ms per token, the server's own").startswith("10.000 ")
    assert load_test.row("ms per token, the bare model's").startswith("6.000 (2.00 rows")


def test_the_last_line_is_the_exec_time_from_first_send_to_last_byte(
    server: FakeLlmServer, load_test: Shell
) -> None:
    load_test(server)
    requests = load_test.run.requests
    last = EXEC_TIME.fullmatch(load_test.out.splitlines()[-1])
    assert last is not None
    first_sent = min(r.sent_s for r in requests if r.sent_s is not None)
    last_end = max(r.end_s for r in requests if r.end_s is not None)
    assert float(last.group(1)) == pytest.approx(last_end - first_sent, abs=3e-6)


def test_all_four_kinds_of_file_are_written_by_default(load_test: Shell) -> None:
    with FakeLlmServer(lambda i: Fate(gap_s=0.002)) as server:
        assert load_test(server, "--save") == 0
    log, page = load_test.file(".log"), load_test.file(".html")
    assert re.fullmatch(r"test_performance_\d{4}-\d\d-\d\d-\d\d_\d\d\.log", log.name)
    assert load_test.file(".json").stem == page.stem == log.stem
    pictures = list(log.parent.glob("*.png"))
    assert len(pictures) == 4
    assert all(path.name.startswith(f"{log.stem}_") for path in pictures)
    text = log.read_text()
    for line in (load_test.row("ended well"), load_test.out.splitlines()[-1]):
        assert line in text
    assert len(re.findall(r"^#\d+, ok, entry \d, due .* TTFT .* E2E .* tokens", text, re.M)) == 20


def test_a_file_that_cannot_be_written_takes_nothing_of_the_report(
    server: FakeLlmServer, load_test: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.html")

    monkeypatch.setattr(html_report, "write", no_room)
    assert load_test(server, save="json,html") == 1
    assert "not everything could be saved: x.html: No space left on device" in load_test.out
    assert EXEC_TIME.fullmatch(load_test.out.splitlines()[-1])
    assert len(load_test.run.requests) == 20


def test_the_user_of_the_url_is_sent_and_stands_in_no_file(
    server: FakeLlmServer, load_test: Shell
) -> None:
    url = server.url.replace("http://", "http://ann:se%2Fcret@")
    assert load_test(server, "--url", url, save="log,json,html") == 0
    assert {h["authorization"] for h in server.headers} == {"Basic YW5uOnNlL2NyZXQ="}
    for path in (load_test.folder / "testLog").iterdir():
        text = path.read_text()
        assert server.url in text
        assert not any(word in text for word in ("cret", "ann:", "YW5uOnNlL2NyZXQ"))


def test_drawing_is_told_where_it_takes_long(
    server: FakeLlmServer, load_test: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_SPEAK_S", 0.0)
    assert load_test(server, save="png") == 0
    told = re.findall(r"^drawing the pictures: .*$", load_test.out, re.M)
    assert told == [f"drawing the pictures: {done} of 4" for done in range(5)]


def test_a_second_run_in_the_same_minute_writes_over_nothing(
    server: FakeLlmServer, load_test: Shell
) -> None:
    for _ in range(2):
        load_test(server, save="log,json")
    assert len(list((load_test.folder / "testLog").iterdir())) == 4


def test_an_open_loop_does_not_wait_for_a_server_that_stalls(load_test: Shell) -> None:
    """No request is answered before all have come: the first waits longest, and that counts."""
    with FakeLlmServer(gate_at=20) as server:
        assert load_test(server) == 0
    requests = load_test.run.requests
    last_due_s = requests[-1].scheduled_s
    for record in requests:
        assert record.first_token_s is not None
        assert record.first_token_s > last_due_s
        assert record.ttft_s == pytest.approx(record.first_token_s - record.scheduled_s)
    assert requests[0].ttft_s is not None
    assert requests[0].ttft_s > last_due_s


def test_a_closed_loop_has_no_more_in_flight_than_it_has_clients(load_test: Shell) -> None:
    with FakeLlmServer(gate_at=4) as server:  # it takes four at once
        code = load_test(server, load=("--concurrency", "4", "--max-requests", "10"))
    assert code == 0
    run = load_test.run
    borders = sorted(
        [(r.sent_s or 0.0, 1) for r in run.requests] + [(r.end_s or 0.0, -1) for r in run.requests]
    )
    in_flight = [sum(step for _, step in borders[: i + 1]) for i in range(len(borders))]
    assert max(in_flight) == 4
    assert len(run.requests) == 10
    assert all(r.sent_s == pytest.approx(r.scheduled_s, abs=0.01) for r in run.requests)


def test_a_closed_loop_for_a_time_needs_a_request_that_fits(load_test: Shell) -> None:
    """Else its clients would skip one after the other until the time is up, as fast as they can."""
    with FakeLlmServer(info=INFO | {"max_total_tokens": 3}) as server:
        assert load_test(server, load=("--concurrency", "2", "-T", "5")) == 2
    assert "nothing can be sent: every prompt of" in load_test.err
    assert "fills the context of 3 tokens" in load_test.err


def test_a_closed_loop_can_run_for_a_time(server: FakeLlmServer, load_test: Shell) -> None:
    assert load_test(server, load=("--concurrency", "2", "-T", "0.1")) == 0
    run = load_test.run
    assert run.num_planned == len(run.requests) == len(server.bodies) > 2
    assert all(r.scheduled_s < 0.1 for r in run.requests)


FATES = {
    2: (Fate(status=503), "http_503", "HTTP 503: .*scripted"),
    4: (Fate(end="reset", num_tokens=2), "reset", ""),
    6: (Fate(end="cut", num_tokens=2), "cut_stream", "the stream ended without its last event"),
    8: (Fate(end="error", num_tokens=2), "error_event", "scripted end"),
    10: (Fate(end="garbage", num_tokens=2), "bad_stream", "not JSON"),
    12: (Fate(end="page"), "bad_stream", "no event stream but text/html"),
    14: (Fate(end="deadline"), "deadline", "the server's own deadline"),
    16: (Fate(hang=True, num_tokens=1), "timeout", "no end within 0.5 s"),
    18: (Fate(status=429), "http_429", "HTTP 429"),
    19: (Fate(status=307), "http_307", "HTTP 307"),  # where it leads to is another server
}


@pytest.mark.parametrize("api", ["tgi", "openai"])
def test_a_request_that_is_lost_is_an_error_by_its_kind(load_test: Shell, api: str) -> None:
    fates = {i: fate for i, fate in FATES.items() if api == "tgi" or fate[0].end != "deadline"}
    with FakeLlmServer(lambda i: fates[i][0] if i in fates else Fate()) as server:
        assert load_test(server, "--timeout", "0.5", "--api", api) == 1
    requests = load_test.run.requests
    assert len(requests) == 20
    for i, record in enumerate(requests):
        assert record.output_tokens == len(record.token_s)
        if i not in fates:
            assert record.state == "ok"
            continue
        assert record.error is not None
        assert record.error.kind == fates[i][1]
        assert re.search(fates[i][2], record.error.sentence)
    assert load_test.row("errors") == str(len(fates))
    assert load_test.row("bad_stream").startswith("2")
    assert load_test.out.splitlines()[-1].startswith("All Tasks Done")


def test_a_server_that_goes_away_leaves_refused_connections(load_test: Shell) -> None:
    """The sixth request closes its port; whoever has connected by then is still served."""
    with FakeLlmServer(lambda i: Fate(end="closed_port" if i == 5 else "whole")) as server:
        assert load_test(server, load=("--concurrency", "1", "--max-requests", "9")) == 1
    run = load_test.run
    assert [r.error.kind if r.error else "" for r in run.requests] == [""] * 5 + ["cut_stream"] + [
        "connect"
    ] * 3
    assert run.work is None
    assert load_test.row("prefix-cache hits") == "not told by this server"


def test_what_the_client_cuts_off_is_counted_apart_and_is_no_error(load_test: Shell) -> None:
    with FakeLlmServer(lambda i: Fate(hang=True)) as server:  # only a cut ends a stream
        assert load_test(server, "--cancel-rate", "1", "--warmup", "0") == 0
    run = load_test.run
    assert all(r.state == "cancelled" for r in run.requests)
    assert [r.output_tokens for r in run.requests] == [r.cancel_after for r in run.requests]
    assert server.num_hung_up == 20
    assert load_test.row("cancelled by the client") == "20"
    assert load_test.row("errors") == "0"


def test_requests_are_clipped_to_the_context_and_those_that_cannot_be_are_not_sent(
    load_test: Shell,
) -> None:
    for context, asked, num_sent in ((7, [3, 4, 4], 20), (3, [0, 0, 0], 0)):
        with FakeLlmServer(info=INFO | {"max_total_tokens": context}) as server:
            assert load_test(server) == 0
        run = load_test.run
        assert [r.asked_tokens for r in run.requests[:3]] == asked
        assert len(server.bodies) == num_sent
        assert load_test.row("clipped to the context") == ("6" if num_sent else "0")
        assert load_test.row("impossible, not sent").startswith("0" if num_sent else "20")
        load_test.file(".json").unlink()


def test_the_warm_up_is_not_counted_and_asks_nothing_of_the_data_set(
    server: FakeLlmServer, load_test: Shell
) -> None:
    load_test(server, "--warmup", "3")
    assert len(server.warm_ups) == 3
    assert len(load_test.run.requests) == len(server.bodies) == 20
    assert not {body["inputs"] for body in server.warm_ups} & {b["inputs"] for b in server.bodies}
    assert "warm-up: 3 uncounted requests" in load_test.out
    # the difference of the server's counters begins after it
    assert load_test.run.work is not None
    assert load_test.run.work.prompt_tokens == 60


def test_no_warm_up_says_so(server: FakeLlmServer, load_test: Shell) -> None:
    load_test(server, "--warmup", "0")
    assert server.warm_ups == []
    assert "no warm-up" in load_test.out


def test_each_text_of_the_data_set_is_tokenized_once(
    server: FakeLlmServer, load_test: Shell
) -> None:
    load_test(server)
    assert server.num_tokenized == 1 + 3 + 3  # the form, three prompts, three outputs


@pytest.mark.parametrize(
    ("key", "api"), [("prompt", "openai"), ("content", "openai"), ("inputs", "openai")]
)
def test_an_openai_server_without_info_is_driven_and_says_less(
    load_test: Shell, key: str, api: str
) -> None:
    with FakeLlmServer(info=None, tokenize=key, has_metrics=False) as server:
        assert load_test(server, "--api", api) == 0
    assert {body["max_tokens"] for body in server.bodies} == {3, 4, 5}
    assert all(r.prompt_tokens == 3 for r in load_test.run.requests)
    for name in ("prefix-cache hits", "ms per token, the server's own", "overhead over the bare "
                 "model"):  # fmt: skip
        assert load_test.row(name) == "not told by this server"


def test_a_promise_that_is_missed_is_named_and_exit_code_1(
    server: FakeLlmServer, load_test: Shell
) -> None:
    assert load_test(server, "--slo", "ttft_p99:60000", "errors:0") == 0
    assert load_test(server, "--slo", "ttft_p99:60000", "tokens_per_s:1e9") == 1
    assert "ttft_p99 <= 60000: met" in load_test.out
    assert "tokens_per_s >= 1e+09: MISSED, it is " in load_test.out


def test_goodput_is_in_the_report(server: FakeLlmServer, load_test: Shell) -> None:
    load_test(server, "--goodput", "ttft:60000", "e2e:60000")
    assert "20, 100.0% (ttft <= 60000 ms, e2e <= 60000 ms)" in load_test.row("goodput")
    goodput = figures_of(load_test.run).goodput
    assert goodput is not None
    assert goodput.num_good == 20


DUMP = {"dump_dir": "/srv/file_npy", "every": 100, "num_written": 7, "num_failed": 0}


def test_task_2_refuses_a_server_that_dumps_nothing(
    server: FakeLlmServer, load_test: Shell
) -> None:
    assert load_test(server, "--task", "2") == 2
    assert "the one at" in load_test.err
    assert 'dumps nothing (its /info says "precision": null); start it with --task 2' in (
        load_test.err
    )
    assert load_test.err.count("\n") == 1
    assert server.warm_ups == []


def test_task_2_refuses_a_server_that_has_no_info(load_test: Shell) -> None:
    with FakeLlmServer(info=None) as server:
        assert load_test(server, "--task", "2") == 2
    assert "has no /info" in load_test.err


def test_task_2_without_a_file_says_why(load_test: Shell) -> None:
    with FakeLlmServer(info=INFO | {"task": 2, "precision": dict(DUMP)}) as server:
        load_test(server, "--task", "2")
    told = " ".join(load_test.out.split())
    assert "0 files in /srv/file_npy (as the server sees it); no answer has reached a" in told


@pytest.mark.parametrize(("num_failed", "code"), [(0, 0), (2, 1)])
def test_task_2_says_how_many_files_the_server_has_written(
    load_test: Shell, num_failed: int, code: int
) -> None:
    info: dict[str, Any] = INFO | {"task": 2, "precision": dict(DUMP)}

    def write(index: int) -> None:
        if index < 0:
            return
        info["precision"]["num_written"] += 3
        info["precision"] |= {"num_failed": num_failed, "last_error": "disk full"}

    with FakeLlmServer(info=info, on_request=write) as server:
        assert load_test(server, "--task", "2") == code
    row = load_test.row("logits written")
    assert row.startswith("60 files in /srv/file_npy")
    assert ("2 FAILED: disk" in row) is bool(num_failed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_cannot_be_reached_is_one_sentence_and_exit_code_2(
    load_test: Shell, server: FakeLlmServer
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert load_test(server, "--url", url) == 2
    assert load_test.err.startswith(f"error: no server answers at {url}: ")
    assert load_test.err.count("\n") == 1
    assert not list((load_test.folder / "testLog").iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--model", "other"), "the warm-up request failed: HTTP 404"),
        (("--dataset", "/none.json"), "cannot read the data set /none.json"),
        (("--tokenizer", "/none.json"), "cannot read the tokenizer /none.json"),
        (("-O", "/proc/none"), "cannot write into /proc/none/testLog"),
        (("--url", "http://no.such.host.invalid:1"), "no server answers at http://no.such.host"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_exit_code_2(
    load_test: Shell, server: FakeLlmServer, flags: tuple[str, ...], sentence: str
) -> None:
    assert load_test(server, *flags) == 2
    assert sentence in load_test.err
    assert load_test.err.count("\n") == 1


def test_nobody_who_counts_tokens_is_one_sentence(load_test: Shell) -> None:
    with FakeLlmServer(tokenize="") as server:
        assert load_test(server) == 2
    assert "nobody can count tokens" in load_test.err
    assert "--tokenizer FILE" in load_test.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_and_saves_what_was_measured(
    load_test: Shell, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def interrupt(index: int) -> None:
        if index == 9:
            os.kill(os.getpid(), number)

    fates = {8: Fate(hang=True, num_tokens=2), 9: Fate(hang=True, num_tokens=0)}
    with FakeLlmServer(lambda i: fates.get(i, Fate()), on_request=interrupt) as server:
        flags = ("--concurrency", "2", "--max-requests", "30")
        assert load_test(server, load=flags, save="log,json") == 130
    run = load_test.run
    assert run.is_interrupted
    assert run.num_planned == 30
    assert {r.state for r in run.requests[:8]} == {"ok"}
    assert [r.state for r in run.requests[8:]] == ["unfinished"] * 2
    assert load_test.row("unfinished") == "22 (interrupted)"
    assert load_test.out.splitlines()[-1].startswith("Interrupted after 8 of 30 requests; Exec Ti")
    assert signal.getsignal(number) is before


def test_ctrl_c_before_the_first_request_is_one_sentence(load_test: Shell) -> None:
    def interrupt(index: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with FakeLlmServer(lambda i: Fate(hang=True), on_request=interrupt) as server:
        assert load_test(server) == 130
    assert load_test.err == "interrupted: nothing more is saved\n"
    assert not list((load_test.folder / "testLog").iterdir())


def _in_order(server: FakeLlmServer) -> list[dict[str, str]]:
    return sorted(server.headers, key=lambda h: int(h["x-request-id"].rpartition("-")[2]))
