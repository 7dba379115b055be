"""The tools on a real model, as a user runs them: load from 16 clients, logits, baseline, verdict.

One server in float32 driven over TGI's API, one in its default weights over OpenAI's; both runs are
then compared.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from llm_serving.precision.manifest import read_manifest
from tests.serving import RunningServer

ROOT = pathlib.Path(__file__).parent.parent
LOAD_TEST = ROOT / "performance_serving" / "test_serving_performance.py"
NUM_REQUESTS, NUM_CLIENTS, EVERY = 24, 16, 16


def run(*command: object, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=280)


@dataclass(frozen=True)
class Loaded:
    folder: pathlib.Path
    said: str  # by the load test
    exit_code: int

    @property
    def result(self) -> pathlib.Path:
        (found,) = self.folder.glob("testLog/*.json")
        return found

    @property
    def dump(self) -> pathlib.Path:
        return self.folder / "file_npy"


def load(folder: pathlib.Path, model: pathlib.Path, api: str, *flags: str) -> Loaded:
    dump = ("--task", "2", "--dump-dir", str(folder / "file_npy"), "--dump-every", str(EVERY))
    server = RunningServer(folder / "log", "--model", str(model), *dump, *flags)
    try:
        server.wait_ready()
        counts = ("--concurrency", NUM_CLIENTS, "-X", 1, "-T", NUM_REQUESTS)
        done = run(
            *(LOAD_TEST, "--task", 2, "--api", api, "--url", server.url, *counts, "-O", folder),
            cwd=folder,
        )
    finally:
        assert server.stop() == 0
    return Loaded(folder, done.stdout + done.stderr, done.returncode)


@pytest.fixture(scope="module")
def loads(smollm2: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    return {
        "float32": load(tmp_path_factory.mktemp("a"), smollm2, "tgi", "--dtype", "float32"),
        "auto": load(tmp_path_factory.mktemp("b"), smollm2, "openai"),
    }


@pytest.fixture(params=["float32", "auto"])
def loaded(request: pytest.FixtureRequest, loads: dict[str, Loaded]) -> Loaded:
    return loads[request.param]


def test_the_load_test_counts_every_request_of_a_real_server(loaded: Loaded) -> None:
    assert loaded.exit_code == 0, loaded.said
    assert re.search(r"^All Tasks Done; Exec Time is \d+\.\d+$", loaded.said, re.M)
    rows = json.loads(loaded.result.read_text())["requests"]
    assert len(rows) == NUM_REQUESTS
    assert not [row for row in rows if row.get("error")]
    assert {path.suffix for path in loaded.result.parent.iterdir()} == {
        *(".json", ".log", ".html", ".png")
    }


def test_logits_under_load_are_the_float32_baselines(loaded: Loaded, smollm2: pathlib.Path) -> None:
    """Every file within the tolerance that is documented for its dtype and weights."""
    base = loaded.folder / "file_npy_base"
    made = run(
        *("-m", "llm_serving", "baseline", "--model", smollm2, "--from", loaded.dump),
        *("--out", base),
        cwd=ROOT,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    written = [entry.file for entry in read_manifest(loaded.dump).entries]
    assert len(written) >= NUM_REQUESTS

    command = (ROOT / "acc_allclose.py", "--base_path", base, "--new_path", loaded.dump)
    verdict = run(*command, cwd=loaded.folder)
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr
    assert verdict.stdout.splitlines()[-1] == f"{len(written)}/{len(written)} passed"
    assert "documented" in verdict.stdout

    spoilt = loaded.dump / written[len(written) // 2]
    logits = np.load(spoilt)
    logits[7] += 5.0
    np.save(spoilt, logits)
    verdict = run(*command, cwd=loaded.folder)
    assert verdict.returncode == 1
    assert verdict.stdout.splitlines()[-1] == f"{len(written) - 1}/{len(written)} passed"


def test_two_runs_are_compared(loads: dict[str, Loaded]) -> None:
    before, after = loads["float32"].result, loads["auto"].result
    done = run(LOAD_TEST, "compare", before, after, cwd=loads["auto"].folder)
    assert done.returncode == 0, done.stderr
    assert "Exec Time" in done.stdout
