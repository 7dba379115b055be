"""Which kernels run, and what is refused where the native ones cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from llm_serving.commands.kernels_choice import packed_weights
from llm_serving.config import load_config
from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu import native as module
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.native import INSTRUCTION_SET, native, why_not
from tests.native_kernels import needs_native

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
    with pytest.raises(ImportError, match=reason):
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
