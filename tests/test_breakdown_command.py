from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from llm_serving import cli
from llm_serving.commands import breakdown
from llm_serving.diagnostics.breakdown import live
from llm_serving.diagnostics.breakdown.observation import BareFigures, load
from llm_serving.diagnostics.breakdown.server import Server
from llm_serving.errors import ConfigError
from llm_serving.step_trace import StepRecord
from tests.breakdown_samples import DECODE, PREFILL, Costs, info, metrics, simulate

SHORT = ["--prompt-tokens", "8", "--new-tokens", "6"]
STEPS_RAN = 'llm_serving:step_period_seconds_count{kind="decode"}'
GENERATED = "vllm:generation_tokens_total"
ENDED = 'llm_serving:request_stage_seconds_count{stage="send"}'


class FakeServer(ThreadingHTTPServer):
    """Says what a server says; a stream leaves the steps of one that ran on a clock of its own."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.lock = threading.Lock()
        self.info: dict[str, Any] = info()
        self.counted = dict.fromkeys((STEPS_RAN, GENERATED, ENDED), 0.0)
        self.records: list[StepRecord] = []
        self.bodies: list[dict[str, Any]] = []
        self.missing: set[str] = set()  # paths that it has not
        self.refusal: tuple[int, str] | None = None  # of every stream but the warm-up's
        self.cut_after: int | None = None  # tokens, then the connection is gone
        self.clock_offset_ns = 0
        self.num_steps_to_watch = 0  # they run when /trace has been asked
        self.metrics_asked = 0
        self.forget_after: int | None = None  # scrapes, then it counts from 0 again

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def metrics(self) -> str:
        self.metrics_asked += 1
        if self.forget_after is not None and self.metrics_asked > self.forget_after:
            return metrics(dict.fromkeys(self.counted, 1.0))
        return metrics(self.counted)

    def trace(self, num_steps: int) -> bytes:
        now_ns = time.monotonic_ns() + self.clock_offset_ns
        steps = self.records[-num_steps:]
        answer = {"now_ns": now_ns, "columns": StepRecord._fields, "steps": steps}
        return msgspec.json.encode(answer)

    def run_steps(self, num_steps: int) -> None:
        """As of now, and over within some microseconds."""
        if not num_steps:
            return
        with self.lock:
            made = simulate(
                num_steps,
                costs=Costs(*(40,) * 13),
                kinds=[PREFILL, *[DECODE] * (num_steps - 1)],
                start=time.monotonic_ns() + self.clock_offset_ns,
                first_id=len(self.records) + 1,
            )
            while time.monotonic_ns() + self.clock_offset_ns <= made[-1].end:
                pass
            self.records += made
            self.counted[STEPS_RAN] += num_steps


class FakeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path in self.server.missing:
            self.answer(404, b'{"error":"no such path","error_type":"not_found"}')
        elif path == "/info":
            self.answer(200, json.dumps(self.server.info).encode())
        elif path == "/metrics":
            self.answer(200, self.server.metrics().encode())
        else:
            said = self.server.trace(int(query.removeprefix("steps=")))
            self.server.run_steps(self.server.num_steps_to_watch)
            self.server.num_steps_to_watch = 0
            self.answer(200, said)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        num_tokens = body["parameters"]["max_new_tokens"]
        is_warm_up = num_tokens == 4
        with self.server.lock:
            self.server.bodies.append(body)
        if self.server.refusal is not None and not is_warm_up:
            status, error = self.server.refusal
            self.answer(status, json.dumps({"error": error}).encode())
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(num_tokens):
            if not is_warm_up and self.server.cut_after == i:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.chunk(self.event(i == num_tokens - 1, body))
        self.server.run_steps(num_tokens)
        with self.server.lock:
            self.server.counted[GENERATED] += num_tokens
            self.server.counted[ENDED] += 1
        self.chunk(b"")

    def event(self, is_last: bool, body: dict[str, Any]) -> bytes:
        details = {"prompt_tokens": body["parameters"]["truncate"], "timing": {"decode": 1.0}}
        said = {"index": 1, "details": details if is_last else None}
        return b"data: " + json.dumps(said).encode() + b"\n\n"

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(live, "_SETTLE_S", 0.1)
    with FakeServer() as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


@pytest.fixture
def bare_process(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """The bare loop as a script, which writes down its arguments; by default it succeeds."""
    script = tmp_path / "bare.py"
    figures = msgspec.json.encode(BareFigures(1, 9, 13, 10, 3.0, 1.0, 1.9, 2)).decode()
    script.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(__file__).with_suffix('.txt').write_text(' '.join(sys.argv[1:]))\n"
        f"print({figures!r})\n"
    )
    monkeypatch.setattr(breakdown, "program", lambda: [sys.executable, str(script)])
    return script


def run(*argv: str) -> int:
    return cli.main(["breakdown", *argv])


def test_a_load_is_made_measured_and_compared(
    server: FakeServer, bare_process: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--url", server.url, *SHORT) == 0
    text, progress = capsys.readouterr()
    assert "own load: 2 requests in 1 stream, 8 tokens in, 6 out" in text
    assert "means of 10 decode steps of 1 row" in text  # not those of the warm-up
    assert "bare model loop 3.00 ms" in text
    assert progress.splitlines() == ["warm up ...", "load ...", "bare model loop ..."]
    asked = bare_process.with_suffix(".txt").read_text()
    assert asked.startswith(
        "bare-loop --prepared abc --device cpu --threads 2 --rows 1 "
        "--prompt-tokens 8 --new-tokens 6 --parent "
    )


def test_the_bare_loop_has_the_cache_of_the_server(
    server: FakeServer, bare_process: pathlib.Path
) -> None:
    server.info["kv_dtype"] = "int8"
    assert run("--url", server.url, *SHORT) == 0
    assert " --kv-dtype int8 " in bare_process.with_suffix(".txt").read_text() + " "


def test_streams_ask_side_by_side_with_prompts_that_no_cache_knows(
    server: FakeServer, bare_process: pathlib.Path
) -> None:
    assert run("--url", server.url, "--streams", "3", *SHORT) == 0
    assert len(server.bodies) == 3 * 3  # a warm-up and two rounds
    prompts = [body["inputs"] for body in server.bodies]
    assert len({prompt[:20] for prompt in prompts}) == 9
    assert all(len(prompt.split()) >= 8 for prompt in prompts)
    assert server.bodies[-1]["parameters"] == {
        "max_new_tokens": 6,
        "truncate": 8,
        "ignore_eos": True,
    }
    assert all(body["stream"] is True for body in server.bodies)


def test_a_saved_observation_prints_what_the_live_one_did(
    server: FakeServer,
    bare_process: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [str(tmp_path / name) for name in ("trace.json", "plot.png", "timeline.json")]
    flags = ["--save", files[0], "--plot", files[1], "--timeline", files[2]]
    assert run("--url", server.url, *SHORT, *flags) == 0
    live = capsys.readouterr().out
    assert run(files[0]) == 0
    assert capsys.readouterr().out == live
    assert pathlib.Path(files[1]).read_bytes().startswith(b"\x89PNG")
    assert json.loads(pathlib.Path(files[2]).read_text())["traceEvents"]


def test_watching_makes_no_request(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.run_steps(5)  # before: not watched
    server.num_steps_to_watch = 30
    assert run("--url", server.url, "--watch", "0.1") == 0
    text = capsys.readouterr().out
    assert "watched for 0.1 s, without a load of its own" in text
    assert "means of 29 decode steps" in text
    assert "only watched; the server's own figure" in text
    assert (server.bodies, server.metrics_asked) == ([], 2)


def test_nothing_while_watching_is_a_sentence(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--url", server.url, "--watch", "0.1") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("llm-serving breakdown: no step ran in the 0.1 s it was watched")


def test_a_server_that_cannot_be_reached_is_a_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert run("--url", url) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"llm-serving breakdown: no server answers at {url}: Connection refused"


def test_a_server_that_goes_away_in_the_middle_is_exit_code_2(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut_after = 3
    assert run("--url", server.url, "--streams", "2", *SHORT) == 2
    assert "no server answers at" in capsys.readouterr().err


def test_a_server_of_another_kind_is_a_sentence(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.missing = {"/trace"}
    assert run("--url", server.url, *SHORT) == 1
    assert "the server has no /trace" in capsys.readouterr().err
    server.info = {}
    assert run("--url", server.url, *SHORT) == 1
    assert "/info names no served model" in capsys.readouterr().err
    server.missing = {"/info"}
    assert run("--url", server.url, *SHORT) == 1
    assert "/info was answered with 404: no such path" in capsys.readouterr().err


def test_a_load_that_is_refused_says_with_what(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusal = (429, "the queue is full")
    assert run("--url", server.url, *SHORT) == 1
    assert (
        "no request of the load was answered: /models/llama2/generate was answered with 429: the "
        "queue is full" in capsys.readouterr().err
    )


def test_a_load_beyond_the_context_is_refused_before_it_begins(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--url", server.url, "--new-tokens", "2000") == 1
    assert (
        "are 2128 together, more than the 2048 of the server's context" in capsys.readouterr().err
    )
    assert server.bodies == []


def test_a_restart_in_between_is_noted(
    server: FakeServer, bare_process: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.counted[GENERATED] = 1000.0
    server.forget_after = 1
    assert run("--url", server.url, *SHORT) == 0
    assert "the server was started again meanwhile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("clock_offset_ns", "running", "flags", "note"),
    [
        (-3600 * 10**9, 0, [], "the server runs on another machine"),
        (0, 2, [], "the server is busy with other requests"),
        (0, 0, ["--no-bare"], "no loop was run (--no-bare)"),
    ],
)
def test_where_no_loop_can_be_run_the_servers_own_figure_serves(
    server: FakeServer,
    bare_process: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    clock_offset_ns: int,
    running: float,
    flags: list[str],
    note: str,
) -> None:
    server.clock_offset_ns = clock_offset_ns
    server.counted |= {"vllm:num_requests_running": running}
    assert run("--url", server.url, *SHORT, *flags) == 0
    assert f"{note}; the server's own figure" in " ".join(capsys.readouterr().out.split())
    assert not bare_process.with_suffix(".txt").exists()


@pytest.mark.parametrize(
    ("script", "note"),
    [
        (
            "import sys; say = sys.stderr.write; say('a warning\\n'); "
            "say('llm-serving bare-loop: no prepared model here is called abc\\n'); "
            "say('another\\n')",
            "the bare loop did not run: no prepared model here is called abc; ",
        ),
        ("import sys; sys.exit(3)", "the bare loop did not run: exit code 3; "),
    ],
)
def test_a_loop_that_fails_says_why(
    server: FakeServer,
    bare_process: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    note: str,
) -> None:
    bare_process.write_text(script)
    assert run("--url", server.url, *SHORT) == 0
    assert note in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["t.json", "--url", "http://127.0.0.1:1"],
            "--url is for a server; the saved trace t.json",
        ),
        (["t.json", "--streams", "2"], "--streams is for a server"),
        (["--watch", "3", "--streams", "2"], "--watch makes no load of its own, and --streams is"),
        (["--plot", "/no/such/folder/a.png"], "there is no folder /no/such/folder to write a.png"),
        (["no-such-file.json"], "cannot read the trace: [Errno 2] No such file or directory"),
        (["--url", "ftp://127.0.0.1"], "--url: expected http://host:port, found 'ftp://127.0.0.1'"),
        (["--url", "http://127.0.0.1:99999"], "--url: expected http://host:port"),
        (["--url", "http://127.0.0.1:8835/v1"], "--url: expected http://host:port"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert run(*argv) == 1
    assert sentence in capsys.readouterr().err


def test_a_url_needs_no_scheme() -> None:
    assert Server("127.0.0.1:8835").url == "http://127.0.0.1:8835"
    with pytest.raises(ConfigError):
        Server("http://")


def test_the_command_never_loads_torch() -> None:
    code = "import sys, llm_serving.commands.breakdown; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_was_seen_is_whole(
    server: FakeServer, bare_process: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "trace.json"
    assert run("--url", server.url, "--streams", "2", *SHORT, "--save", str(path)) == 0
    seen = load(path)
    assert seen.load is not None
    assert [len(request.token_ns) for request in seen.load.requests] == [6] * 4
    assert [request.round_index for request in seen.load.requests] == [0, 0, 1, 1]
    for request in seen.load.requests:
        assert request.sent_ns <= request.token_ns[0] <= request.token_ns[-1] <= request.end_ns
        assert request.timing == {"decode": 1.0}
