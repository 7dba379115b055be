"""Which instruction set runs: the best that is tested, or the one that the environment names."""

from __future__ import annotations

import re

import pytest
import torch

from llm_serving.commands.kernels_choice import packed_as_served
from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.native import INSTRUCTION_SET
from llm_serving.kernels.selection import select_kernels
from tests.native_kernels import native_or_skip

native = native_or_skip()
SUPPORTED, ON_REQUEST = native.supported(), native.on_request()


def selected() -> str:
    return select_kernels(torch.device("cpu"), 1).backends()["paged_attention"]


def test_auto_takes_the_best_that_is_supported_and_nothing_untested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert native.kernels("auto").isa == SUPPORTED[0]
    assert not {"amx", "amx_emulated"} & {*SUPPORTED}
    monkeypatch.delenv(INSTRUCTION_SET, raising=False)
    assert selected() == f"native ({SUPPORTED[0]})"
    monkeypatch.setenv(INSTRUCTION_SET, "")
    assert selected() == f"native ({SUPPORTED[0]})"


@pytest.mark.parametrize("isa", [*SUPPORTED, *ON_REQUEST])
def test_the_environment_chooses(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSTRUCTION_SET, isa)
    assert packed_as_served("bfloat16", "auto", "auto") == "auto"
    assert selected() == f"native ({isa})"


@pytest.mark.parametrize("wanted", ["sse", "AVX2", *{"avx512", "amx"} - {*SUPPORTED, *ON_REQUEST}])
def test_what_is_not_there_is_refused_by_name(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSTRUCTION_SET, wanted)
    there = ", ".join(["auto", "none", *SUPPORTED, *ON_REQUEST])
    sentence = f"{INSTRUCTION_SET}: expected one of {there} here, found {wanted!r}"
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        selected()
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        packed_as_served("bfloat16", "auto", "native")
    with pytest.raises(ConfigError, match=f"isa must be one of auto, {SUPPORTED[0]}.* {wanted}$"):
        NativeKernels(1, wanted)
