"""The scripts and commands around a server: start.py, stop, ports, the 7B configurations."""

from __future__ import annotations

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

from llm_serving.commands import stop
from llm_serving.commands.ports import listen_on
from llm_serving.commands.server_record import ServerRecord, find_server
from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.native import INSTRUCTION_SET
from llm_serving.precision.manifest import read_manifest
from tests.native_kernels import needs_native
from tests.serving import RunningServer, wait_until
from tests.tiny_models import save_misfit
from tests.trained_sentencepiece import train

HOUSE = pathlib.Path(__file__).parents[1]
LLAMA = sorted((HOUSE / "configs/llama").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """LLaMA-2 in small: the same classes, a SentencePiece tokenizer, random weights."""
    folder = tmp_path_factory.mktemp("llama-2-tiny")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    train(folder)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    return folder


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        cwd=HOUSE,
        check=False,
    )


def serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "llm_serving", "serve", *flags, **environment)


@pytest.mark.parametrize("config", LLAMA, ids=lambda path: path.stem)
def test_the_7b_configurations_serve_a_twin(
    tmp_path: pathlib.Path, twin: pathlib.Path, config: pathlib.Path
) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    flags = ("--config", str(config), "--model", str(twin))
    server = RunningServer(tmp_path / "log", *flags, env=cache).wait_ready()
    try:
        info = json.loads(server.get("/info"))
        assert (info["why_not_native"] is None) == (info["kernels"]["linear"] != "reference")
        assert info["max_model_len"] == (512 if "512" in config.name else 4096)
        answer = server.generate("hello world", max_new_tokens=4, ignore_eos=True)
        assert answer["prompt_tokens"] == 1 + len(answer["details"]["prefill"]) + 2
    finally:
        assert server.stop() == 0


def test_without_native_kernels_the_start_says_why_and_the_reference_serves(
    tmp_path: pathlib.Path, twin: pathlib.Path
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), INSTRUCTION_SET: "none"}
    server = RunningServer(tmp_path / "log", "--model", str(twin), env=environment).wait_ready()
    try:
        assert f"\nkernels    reference: {INSTRUCTION_SET} is none\n" in f"\n{server.output}"
        assert re.search(r"^agent .* threads, reference$", server.output, re.M)
        why = json.loads(server.get("/info"))["why_not_native"]
        assert why == f"{INSTRUCTION_SET} is none"
        assert server.generate("hello world", max_new_tokens=4)["generated_text"]
    finally:
        assert server.stop() == 0
    refused = serve("--model", str(twin), "--kernels", "native", "--port", "0", **environment)
    assert refused.returncode == 1
    sentence = f"agent.kernels: native cannot run: {INSTRUCTION_SET} is none"
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr


@needs_native
def test_an_int8_cache_is_told_serves_and_is_named_in_the_dump(
    tmp_path: pathlib.Path, twin: pathlib.Path
) -> None:
    cache, dump = {"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "dump"
    flags = ["--model", str(twin), "--kv-dtype", "int8"]
    given = [*flags, "--dump-dir", str(dump), "--dump-every", "4"]
    server = RunningServer(tmp_path / "log", *given, env=cache).wait_ready()
    try:
        assert re.search(r"^model .* int8 cache$", server.output, re.M)
        assert re.search(r"^KV cache .* tokens in int8$", server.output, re.M)
        assert json.loads(server.get("/info"))["kv_dtype"] == "int8"
        assert server.generate("hello world", max_new_tokens=8)["generated_text"]
    finally:
        assert server.stop() == 0
    labels = {entry.weights for entry in read_manifest(dump).entries}
    assert labels == {"float32, int8 cache"}
    refused = serve(*flags, "--kernels", "reference", "--port", "0", **cache)
    assert refused.returncode == 1
    sentence = "kv_cache.dtype: int8 needs the native kernels, but agent.kernels is reference"
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr


@needs_native
def test_a_model_that_the_native_kernels_cannot_run_is_served_by_the_reference_unless_refused(
    tmp_path: pathlib.Path,
) -> None:
    model = str(save_misfit(tmp_path / "misfit"))
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    problem = "its intermediate_size is 40, not a multiple of 16"
    insisting = (("--kernels", "native"), ("--weights", "int8"))

    def refused() -> None:
        for flags in insisting:
            done = serve("--model", model, *flags, "--port", "0", **cache)
            assert done.returncode == 1
            told = " ".join(done.stderr.split())
            asked = " ".join(flags).removeprefix("--")
            assert f"model.path: {asked.replace(' --', ' ')}: the native kernels" in told
            assert f"{problem}; with kernels auto and weights auto it is served" in told
            assert "Traceback" not in told

    refused()
    server = RunningServer(tmp_path / "log", "--model", model, env=cache).wait_ready()
    try:
        reason = f"kernels    reference: native cannot run this model: {problem}"
        assert reason in server.output.splitlines()
        info = json.loads(server.get("/info"))
        assert set(info["kernels"].values()) == {"reference"}
        assert info["why_not_native"] == problem
    finally:
        assert server.stop() == 0
    refused()  # now that the preparation of `auto` is there
    done = serve("--model", model, "--kv-dtype", "int8", "--port", "0", **cache)
    assert done.returncode == 1
    wanted = f"int8 needs the native kernels, which cannot run this model: {problem}"
    assert wanted in " ".join(done.stderr.split())


@pytest.mark.parametrize("config", LLAMA, ids=lambda path: path.stem)
def test_without_weights_they_end_with_a_sentence_that_names_the_ways(
    tmp_path: pathlib.Path, config: pathlib.Path
) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = serve("--config", str(config), "--port", "0", **offline)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"hub can not be reached.* folder or \.gguf file", done.stderr)


def test_start_returns_when_the_server_is_ready_and_stop_ends_it(
    tmp_path: pathlib.Path, twin: pathlib.Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    flags = ("--config", str(LLAMA[0]), "--model", str(twin), "--port", port)
    started = run("python3", "examples/start.py", "--task", "1", *flags, **cache)
    assert started.returncode == 0, started.stderr + started.stdout
    log = pathlib.Path(re.findall(r"^log: (.+)$", started.stdout, re.M)[0])
    assert "ready at" in log.read_text()
    try:
        again = serve("--port", port, "--model", str(twin), **cache)
        assert again.returncode == 1
        assert re.search(rf"port {port}|:{port}: it is in use", again.stderr)
        assert re.search(r"pid \d+|process \d+", again.stderr)
        record = find_server(int(port))
        assert record is not None
    finally:
        stopped = run(sys.executable, "-m", "llm_serving", "stop", "--port", port)
        log.unlink()
    assert stopped.returncode == 0, stopped.stderr
    assert find_server(int(port)) is None
    assert stop.main(["--port", port]) == 1


def test_start_says_why_the_server_did_not_start(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    failed = run("python3", "examples/start.py", "--log", str(log), "--model", str(tmp_path / "no"))
    assert failed.returncode == 1
    assert "no model" in failed.stdout + failed.stderr


def test_a_port_in_use_names_its_process() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} \(") as caught:
            listen_on("127.0.0.1", port)
        assert "--port" in str(caught.value)


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        listen_on("192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"server.host: 'no.such.invalid'"):
        listen_on("no.such.invalid", 0)


def test_two_servers_cannot_start_on_one_port_side_by_side() -> None:
    first = ServerRecord.claim(1, "127.0.0.1")
    try:
        found = find_server(1)
        assert found is not None
        assert found.pid == os.getpid()
        with pytest.raises(ConfigError, match=rf"\(pid {os.getpid()}\) serves port 1, or"):
            ServerRecord.claim(1, "127.0.0.1")
    finally:
        first.release()
    assert find_server(1) is None
    ServerRecord.claim(1, "127.0.0.1").release()


def test_what_a_killed_server_left_of_its_record_does_not_count(tmp_path: pathlib.Path) -> None:
    code = (
        "import os; from llm_serving.commands.server_record import ServerRecord;"
        "r = ServerRecord.claim(2, '127.0.0.1'); os._exit(9)"
    )
    assert run(sys.executable, "-c", code).returncode == 9
    assert find_server(2) is None
    ServerRecord.claim(2, "127.0.0.1").release()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--help"], 0, "llm-serving COMMAND --help"),
        (["--version"], 0, "llm-serving 0."),
        (["sevre"], 2, "no command 'sevre'"),
        (["serve", "--help"], 0, "--max-num-batched"),
        (["serve", "--nope"], 2, "No such option"),
        (["serve", "--task", "2", "--dump-every", "0"], 1, "precision.every: expected `int` >= 1"),
        (
            ["serve", "--transport-log-methods", "Foo"],
            1,
            "agent.transport_log_methods: the methods",
        ),
        (
            ["serve", "--transport-log-methods", "Ping"],
            1,
            "there is no transport_log to choose for",
        ),
        (["serve", "--task", "3"], 1, "expected 1 (speed) or 2 (precision), found 3"),
        (["serve", "--dtype", "int3"], 1, "model.dtype: expected one of auto, float32"),
        (["stop", "--port", "3"], 1, "no server of yours runs on port 3"),
    ],
)
def test_every_command_explains_itself(words: list[str], code: int, says: str) -> None:
    done = run(sys.executable, "-m", "llm_serving", *words)
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_front_end_loads_no_torch(tmp_path: pathlib.Path) -> None:
    code = "import sys, llm_serving.commands.{}; print([m for m in sys.modules if m in "
    code += "('torch', 'transformers', 'gguf', 'fastapi')])"
    done = run(sys.executable, "-c", code.format("front_end"))
    assert done.stdout.strip() == "['fastapi']", done.stderr
    done = run(sys.executable, "-c", code.format("serve"))  # the agents start before it is there
    assert done.stdout.strip() == "[]", done.stderr


def test_a_process_of_ours_counts_what_it_imported_as_staying() -> None:
    code = "import gc, sys; from llm_serving.cli import main; sys.argv[1:] = ['stop', '-P', '3']; "
    code += "main(); print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    done = run(sys.executable, "-c", code)
    assert done.stdout.splitlines()[-1] == "True True", done.stderr


def test_sigterm_during_the_start_ends_it_with_code_0(
    tmp_path: pathlib.Path, twin: pathlib.Path
) -> None:
    server = RunningServer(tmp_path / "log", "--model", str(twin))
    wait_until(lambda: server.agents() or server.process.poll() is not None, "the agent starts")
    assert server.stop() == 0
    assert server.agents() == []


def test_sigterm_during_the_preparation_ends_that_too(
    tmp_path: pathlib.Path, smollm2: pathlib.Path
) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    server = RunningServer(tmp_path / "log", "--model", str(smollm2), env=cache)
    wait_until(lambda: server.children(b"prepare"), "the preparation starts")
    (child,) = server.children(b"prepare")
    assert server.stop() == 0
    assert not pathlib.Path(f"/proc/{child}").exists()
    assert list((tmp_path / "llm-serving" / "prepared").glob("*.partial")) == []


def test_a_killed_server_takes_its_preparation_with_it(
    tmp_path: pathlib.Path, smollm2: pathlib.Path
) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    server = RunningServer(tmp_path / "log", "--model", str(smollm2), env=cache)
    wait_until(lambda: "prepare" in server.output or server.children(b"prepare"), "it starts")
    wait_until(lambda: list(tmp_path.glob("llm-serving/prepared/*.partial")), "it writes")
    (child,) = server.children(b"prepare")
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not pathlib.Path(f"/proc/{child}").exists(), "the child has gone", 10)
    assert list((tmp_path / "llm-serving" / "prepared").glob("*.partial")) == []
