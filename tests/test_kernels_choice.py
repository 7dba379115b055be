"""Which kernels run, and what is refused where the native ones cannot."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Mapping

import msgspec
import pytest

from llm_serving.cli import main
from llm_serving.commands import kernels_choice, model_source
from llm_serving.commands.kernels_choice import packed_weights
from llm_serving.commands.start_report import StartReport
from llm_serving.config import load_config
from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu import native as module
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.native import INSTRUCTION_SET, native, why_not
from llm_serving.prepare.packing_choice import why_misfit
from llm_serving.prepare.prepare import prepare
from llm_serving.prepare.progress import Quiet
from tests.native_kernels import needs_native
from tests.tiny_gguf import CONFIG, from_hf, metadata, random_tensors, write_gguf
from tests.tiny_models import save_misfit

CPU = {"agent.device": "cpu"}


@pytest.fixture
def no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INSTRUCTION_SET, raising=False)
    monkeypatch.setattr(module, "_module", None)
    monkeypatch.setattr(module, "_reason", "it was not built")


def chosen(given: Mapping[str, str]) -> tuple[str | None, str]:
    return packed_weights(load_config(None, {**CPU, **given}))


def refused(given: Mapping[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        chosen(given)


@needs_native
def test_who_prepares_is_told_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Else, beside a GPU that is not to be used, it would prepare for `reference`."""
    monkeypatch.setattr(kernels_choice, "_GPU", tmp_path)
    assert kernels_choice.packed_as_served("bfloat16", "auto", "auto") is None
    assert kernels_choice.packed_as_served("bfloat16", "auto", "native", "cpu") == "auto"
    told = "import json, sys; print(json.dumps({'error': ' '.join(sys.argv[1:])}))"
    monkeypatch.setattr(model_source, "program", lambda: [sys.executable, "-c", told])
    config = load_config(None, {**CPU, "model.path": str(tmp_path), "agent.kernels": "native"})
    flags = "prepare .* --kernels native --device cpu --weights auto"
    with pytest.raises(ConfigError, match=flags):
        model_source.prepared_card(config, StartReport())


def test_none_switches_the_native_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reason", "")
    monkeypatch.setenv(INSTRUCTION_SET, "none")
    reason = f"{INSTRUCTION_SET} is none"
    assert why_not() == reason
    assert chosen({}) == (None, reason)
    assert chosen({"agent.kernels": "reference"}) == (None, "agent.kernels is reference")
    refused({"agent.kernels": "native"}, f"agent.kernels: native cannot run: {reason}")
    refused(
        {"model.weights": "int8"}, f"model.weights: int8 needs the native kernels, but {reason}"
    )
    refused(
        {"kv_cache.dtype": "int8"}, f"kv_cache.dtype: int8 needs the native kernels, but {reason}"
    )
    with pytest.raises(ConfigError, match=f"native kernels cannot run here: {reason}"):
        native()
    with pytest.raises(ConfigError, match=f"the native kernels cannot run here: {reason}"):
        NativeKernels(1, "avx2")


@pytest.mark.usefixtures("no_module")
def test_without_the_module_the_reference_runs_unless_an_instruction_set_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen({}) == (None, "it was not built")
    refused({"agent.kernels": "native"}, "agent.kernels: native cannot run: it was not built")
    monkeypatch.setenv(INSTRUCTION_SET, "auto")
    assert chosen({}) == (None, "it was not built")
    monkeypatch.setenv(INSTRUCTION_SET, "avx512")
    refused({}, f"{INSTRUCTION_SET}: avx512 needs the native kernels, but it was not built")
    assert chosen({"agent.kernels": "reference"}) == (None, "agent.kernels is reference")


@needs_native
def test_an_instruction_set_is_not_ignored_where_the_configuration_excludes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = {"model.dtype": "float16"}
    assert chosen(half) == (None, "they have no float16")
    monkeypatch.setenv(INSTRUCTION_SET, "avx2")
    assert chosen({}) == ("auto", "")
    refused(half, f"{INSTRUCTION_SET}: avx2 needs the native kernels, but they have no float16")
    assert chosen({**half, "agent.kernels": "reference"}) == (None, "agent.kernels is reference")
    monkeypatch.setenv(INSTRUCTION_SET, "sse")
    there = ", ".join(["auto", "none", *native().supported(), *native().on_request()])
    sentence = f"{INSTRUCTION_SET}: expected one of {there} here, found 'sse'"
    refused({"agent.kernels": "reference"}, sentence)
    refused(half, sentence)


# ---- models that do not fit ----

ALL_THE_SAME = "with kernels auto and weights auto it is served all the same"
PROBLEM = "its intermediate_size is 40, not a multiple of 16"


@pytest.fixture(params=["folder", "gguf"])
def misfit(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A model that the native kernels cannot run, in either form."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "folder":
        return str(save_misfit(tmp_path / "misfit"))
    config = msgspec.structs.replace(CONFIG, intermediate_size=40)
    tensors = from_hf(random_tensors(config), config)
    return str(write_gguf(tmp_path / "misfit.gguf", tensors, metadata(config)))


@needs_native
@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--kernels", "native"], "kernels native"),
        (["--weights", "int8"], "weights int8"),
        (["--weights", "native"], "weights native"),
        (["--weights", "float32", "--kernels", "native"], "weights float32"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_to_who_insists(
    misfit: str, flags: list[str], asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = f"{asked}: the native kernels cannot run this model: {PROBLEM}; {ALL_THE_SAME}"
    for _ in ("new", "after it was prepared for the reference"):
        assert main(["prepare", misfit, *flags]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert sentence in told
        assert "Traceback" not in told
        assert main(["prepare", misfit]) == 0
        capsys.readouterr()


@needs_native
def test_a_model_that_does_not_fit_is_prepared_for_the_reference(misfit: str) -> None:
    class Listening(Quiet):
        told = ""

        def say(self, sentence: str) -> None:
            self.told += sentence

    progress = Listening()
    assert prepare(misfit, "auto", progress, "auto").packed is None
    assert progress.told == (
        f"the native kernels cannot run this model: {PROBLEM}; it runs on reference"
    )


@pytest.mark.parametrize(
    ("weights", "sizes", "problem"),
    [
        ("auto", {}, ""),
        ("auto", {"head_dim": 1024}, ""),
        ("auto", {"head_dim": 1026}, "its head_dim is 1026, more than 1024"),
        ("auto", {"intermediate_size": 65536 + 16}, ""),
        ("int8", {"intermediate_size": 65536}, ""),
        (
            "int8",
            {"intermediate_size": 65536 + 16},
            "its intermediate_size is 65552, more than 65536",
        ),
        (
            "int8",
            {"num_attention_heads": 80, "head_dim": 1024},
            "its num_attention_heads * head_dim is 81920, more than 65536",
        ),
    ],
)
def test_what_does_not_fit_is_named(weights: str, sizes: dict[str, int], problem: str) -> None:
    assert why_misfit(msgspec.structs.replace(CONFIG, **sizes), weights) == problem
