"""benchmarks/peers: the tables of a comparison, its spec, and the script that starts ours."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks" / "peers"


def measured(rates: dict[str, float], ttft_ms: float) -> dict[str, Any]:
    """One round of a peer, as far as the tables look at it."""
    return {
        "startup_s": 1.25,
        "peak_rss_mib": 900.4,
        "prefill_512": {"ok": 6, "ttft_ms": {"p50": ttft_ms}},
        "closed": {level: {"ok": 4, "output_tok_s": rate} for level, rate in rates.items()},
    }


def peer(*rounds: dict[str, Any]) -> dict[str, Any]:
    """The middle round of three is given first, and is the median."""
    return {"weights": "any", "env": {}, "rounds": list(rounds), "median": rounds[0]}


def table(tmp_path: pathlib.Path, content: object) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    words = [sys.executable, str(FOLDER / "table.py"), str(path)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_rounds_of_several_files_are_joined(tmp_path: pathlib.Path) -> None:
    for i, (ours, theirs) in enumerate([(200, 80), (180, 90), (190, 70)]):
        peers = {
            "llamacpp-q4_1": peer(measured({"1": theirs}, 1000)),
            "ours-q4_1": peer(measured({"1": ours}, 200)),
        }
        (tmp_path / f"{i}.json").write_text(json.dumps({"peers": peers}))
    words = [sys.executable, str(FOLDER / "table.py"), *(str(p) for p in tmp_path.glob("*.json"))]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "| 190 | 80 (llamacpp-q4_1) | 2.38 (2.00 to 2.71) | >= 2.0 | met |" in told


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    peers = {
        "llamacpp-q4_1": peer(measured({"1": 80, "32": 119}, 1758)),
        "openvino-int8": peer(
            measured({"1": 66, "32": 400}, 360), measured({"1": 60, "32": 380}, 300)
        ),
        "vllm-bf16": {"weights": "any", "env": {}, "rounds": [], "failures": ["not ready"]},
        "ours-q4_1": peer(
            measured({"1": 200, "32": 900}, 200), measured({"1": 200, "32": 950}, 120)
        ),
        "ours-q4_1-sampled": peer(measured({"1": 150, "32": 700}, 200)),
        "ours-bf16": peer(measured({"1": 100, "32": 900}, 170)),
    }
    done = table(tmp_path_factory.mktemp("table"), {"peers": peers})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_peer_has_a_row_and_one_that_never_started_says_so(lines: list[str]) -> None:
    first = lines[: lines.index("")]
    assert cells(first[2]) == ["llamacpp-q4_1", "80", "", "", "119", "1758", "900", "1.2"]
    assert cells(first[4]) == ["vllm-bf16", *["failed"] * 7]
    assert len(first) == 2 + 6


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        ("1 stream, ours-q4_1", ["200", "80 (llamacpp-q4_1)", "2.50", ">= 2.0", "met"]),
        (
            "32 streams, ours-q4_1,",
            ["900", "400 (openvino-int8)", "2.25 (2.25 to 2.50)", ">= 2.5", "missed"],
        ),
        ("32 streams, ours-q4_1-sampled", ["700", "900 (ours-q4_1)", "0.78", ">= 0.9", "missed"]),
        (
            "TTFT of 512 tokens, ours-q4_1",
            ["200", "360 (openvino-int8)", "0.56 (0.40 to 0.56)", "<= 0.5", "missed"],
        ),
        ("TTFT of 512 tokens, ours-bf16", ["170", "360 (openvino-int8)", "0.47", "<= 0.5", "met"]),
    ],
)
def test_a_target_is_judged_against_the_best_peer(
    lines: list[str], target: str, rest: list[str]
) -> None:
    (line,) = [line for line in lines if line.startswith(f"| {target}")]
    assert cells(line.replace("|  |", "| |"))[1:] == rest


def test_a_target_with_one_side_only_is_left_out(lines: list[str]) -> None:
    targets = lines[lines.index("") + 3 :]
    assert len(targets) == 5  # nothing of bf16 peers, of 8 or 16 streams, or of other forms


@pytest.mark.parametrize("content", [[], {}, {"peers": {"x": {"median": {}}}}, {"peers": 1}])
def test_what_is_no_results_file_is_refused_in_one_sentence(
    tmp_path: pathlib.Path, content: object
) -> None:
    done = table(tmp_path, content)
    assert done.returncode == 1
    assert done.stderr == (
        f"table: {tmp_path}/results.json is not what compare.py writes with --out\n"
    )


def test_the_spec_names_whom_the_tables_judge_and_every_variable_is_documented() -> None:
    peers = json.loads((FOLDER / "peers.json").read_text())["peers"]
    judged = set(re.findall(r'"((?:ours|llamacpp|openvino|vllm)-\w[^"{]*)"', _table_source()))
    assert judged <= {each["name"] for each in peers}
    assert len({each["port"] for each in peers}) == len(peers)
    guide = (FOLDER / "README.md").read_text()
    for name in set(re.findall(r"\$([A-Z][A-Z0-9_]*)", json.dumps(peers))):
        assert re.search(rf"\b{name}=", guide), name


def _table_source() -> str:
    return (FOLDER / "table.py").read_text()


def test_the_start_script_serves_this_checkout_as_it_is_told(tmp_path: pathlib.Path) -> None:
    """A python that prints what it was given stands for the venv's."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$PYTHONPATH" "$PYTHONSAFEPATH" "$@"\n')
    fake.chmod(0o755)
    env = os.environ | {"PEER_MODEL": "m.gguf", "PEER_PORT": "7", "PEER_SEQS": "4"}
    env |= {"PEER_ARGS": "--weights int8", "PEER_CTX": "64"}
    words = ["bash", str(FOLDER / "ours.sh"), str(tmp_path)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        f"{FOLDER.parents[1]} 1 -m llm_serving serve --model m.gguf --served-name model --port 7"
        " --max-num-seqs 4 --max-model-len 64 --num-kv-blocks 16 --weights int8\n"
    )
