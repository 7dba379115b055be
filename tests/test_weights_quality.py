"""benchmarks/weights_quality.py on a small model, with a stand-in for llama-perplexity."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import msgspec
import pytest

from llm_serving.kernels.cpu.native import INSTRUCTION_SET
from tests import tiny_gguf
from tests.native_kernels import needs_native

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "weights_quality.py"
LLAMA = """#!{python}
# Reads the base file as llama-perplexity does, and says of the reference itself what it finds.
import math, struct, sys
import numpy as np
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
data = open(value("--kl-divergence-base"), "rb").read()
chunk, vocab, num = struct.unpack_from("<Iii", data, 8)
assert data[:8] == b"_logits_" and chunk == int(value("--ctx-size")), (data[:8], chunk)
tokens = np.frombuffer(data, "<i4", num * chunk, 20).reshape(num, chunk)
width, scored = 2 * ((vocab + 1) // 2) + 4, chunk - 1 - chunk // 2
rows = np.frombuffer(data[20 + tokens.nbytes :], "<u2").reshape(num, scored, width)
head = rows[..., :4].copy().view("<f4")
log_probs = head[..., :1] * rows[..., 4 : 4 + vocab] + head[..., 1:]
assert abs(np.exp(log_probs).sum(-1) - 1).max() < 1e-2
after = tokens[:, chunk // 2 + 1 :]
nll = -np.take_along_axis(log_probs, after[..., None], -1).mean()
print(f"Mean PPL(Q)                   : {{math.exp(nll):10.6f}} \\u00b1   0.1")
print("Mean    KLD:   0.001000 \\u00b1   0.000020")
print("Same top p: 97.500 \\u00b1 0.100 %")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    config = msgspec.structs.replace(tiny_gguf.CONFIG, max_position_embeddings=1024)
    tensors = {
        name: weight * (1 if weight.ndim == 1 else 0.06)
        for name, weight in tiny_gguf.random_tensors(config).items()
    }
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    meta = tiny_gguf.metadata(config)
    return tiny_gguf.write_gguf(path, tiny_gguf.from_hf(tensors, config), meta)


def run(tmp_path: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *words, "--threads", "2"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)


@needs_native
def test_forms_of_weights_are_told_apart_and_llama_cpp_gets_the_same_reference(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    llama = tmp_path / "llama-perplexity"
    llama.write_text(LLAMA.format(python=sys.executable))
    llama.chmod(0o755)
    words = ("--weights", "bfloat16", "int8", "--chunks", "2", "--llama-perplexity", str(llama))
    done = run(tmp_path, str(model), *words)
    assert done.returncode == 0, done.stderr
    head, _, _, *table = done.stdout.splitlines()
    assert head == "tiny: 2 chunks of 512 tokens, 510 positions"
    rows = {cells[0]: cells[1:] for cells in (row.strip("| ").split(" | ") for row in table)}
    exact, float32, bfloat16, int8, theirs = rows.values()
    assert list(rows)[1:4] == ["`--dtype float32`", "`--weights bfloat16`", "`--weights int8`"]
    assert float(float32[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    kl = [float(each[1].split()[0]) for each in (exact, float32, bfloat16, int8)]
    assert kl[0] == 0
    assert abs(kl[1]) < 1e-8 < kl[2] < kl[3]
    assert float(theirs[0]) == pytest.approx(float(exact[0]), rel=1e-4)  # 16 bits are enough
    assert theirs[2:] == ["1.00e-03 ± 2e-05", "97.50 %"]


@needs_native
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--text", "short.txt"], "the text has 5 tokens, one chunk takes 512"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--chunks", "1", "--llama-perplexity", "/bin/true"], "/bin/true gave no figures for"),
        (["--chunks", "1", "--llama-perplexity", "/nowhere"], "cannot run /nowhere: No such file"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    done = run(tmp_path, str(model), "--weights", "bfloat16", *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr


def test_without_the_native_kernels_there_is_one_sentence(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INSTRUCTION_SET, "none")
    done = run(tmp_path, str(model))
    assert done.returncode == 1
    reason = f"the native kernels cannot run here: {INSTRUCTION_SET} is none"
    assert done.stderr == f"weights_quality: {reason}\n"
