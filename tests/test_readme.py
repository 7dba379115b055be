"""The documents tell the truth: their commands run, and answer as they say."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from llm_serving.metrics import Metrics
from tests.serving import RunningServer

HOUSE = pathlib.Path(__file__).parents[1]
DOCUMENTS = ["README.md", "docs/http_api.md"]
PAGES = [
    path.relative_to(HOUSE) for pattern in ("*.md", "docs/**/*.md") for path in HOUSE.glob(pattern)
]
CURLS = [
    (command, expected)
    for name in DOCUMENTS
    for command, expected in re.findall(
        r"```console\n\$ (curl .+)\n((?:.*\n)+?)```", (HOUSE / name).read_text()
    )
]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, smollm2: pathlib.Path
) -> Iterator[RunningServer]:
    running = RunningServer(tmp_path_factory.mktemp("readme") / "log").wait_ready()
    yield running
    assert running.stop() == 0


def shape(value: Any) -> Any:
    """Keys and kinds, not numbers; of a list its first entry."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__


def documents(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.strip()]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize(("command", "expected"), CURLS, ids=lambda text: text[:60])
def test_every_curl_answers_in_the_shape_that_is_shown(
    server: RunningServer, command: str, expected: str
) -> None:
    words = shlex.split(command.replace("127.0.0.1:8835", server.url.removeprefix("http://")))
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    got, shown = documents(done.stdout), documents(expected)
    assert [shape(each) for each in got] == [shape(each) for each in shown]
    if "seed" not in expected and "created" not in expected:  # nor a logit: the same everywhere
        assert got == shown


def test_there_are_curls_to_test() -> None:
    assert len(CURLS) >= 8


@pytest.mark.parametrize("name", PAGES, ids=str)
def test_every_link_and_path_leads_somewhere(name: pathlib.Path) -> None:
    text = (HOUSE / name).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (HOUSE / name).parent.joinpath(target).exists(), target
    for path in re.findall(
        r"`((?:llm_serving|benchmarks|configs|examples|tests|docs)/[\w./]+)`", text
    ):
        assert (HOUSE / path).exists(), path


def test_the_make_targets_and_flags_that_are_shown_exist() -> None:
    makefile = (HOUSE / "Makefile").read_text()
    serve = (HOUSE / "llm_serving/commands/serve.py").read_text()
    for name in ("README.md", "CONTRIBUTING.md", "docs/configuration.md", "docs/http_api.md"):
        text = (HOUSE / name).read_text()
        for target in re.findall(r"^make (\w+)|`make (\w+)", text, re.M):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M), target
        for flag in re.findall(r"llm-serving serve .*?(--[\w-]+)", text):
            assert f'"{flag}"' in serve or flag == "--help", flag


def test_every_metric_that_is_named_is_exported() -> None:
    class Idle:
        num_running = num_waiting = num_prefix_queries = num_prefix_hits = num_preemptions = 0
        kv_usage = 0.0

    exported = Metrics("llama2", Idle).render().decode()
    named = set(re.findall(r"`(vllm:\w+)`", (HOUSE / "docs/http_api.md").read_text()))
    assert len(named) >= 15
    for name in named:
        assert re.search(rf"^{name}(_bucket|_count|{{)", exported, re.M), name
