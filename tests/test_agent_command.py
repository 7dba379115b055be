"""`llm-serving agent` itself, up to the point where a model is needed."""

from __future__ import annotations

import sys

import pytest

from llm_serving.commands import agent
from llm_serving.config import AgentConfig
from llm_serving.errors import ConfigError
from llm_serving.worker.launcher import Launcher
from tests.deployment import Events

COMMAND = [sys.executable, "-m", "llm_serving", "agent"]
GIVEN = ["--rank", "0", "--key-fd", "9", "--max-model-len", "64", "--card", "{}"]


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(["--help"]) == 0
    told = capsys.readouterr().out
    for option in ("rank", "key-fd", "address", "epoch", "card", "device", "max-model-len"):
        assert f"--{option}" in told
    for option in (
        "block-size",
        "num-blocks",
        "max-num-seqs",
        "max-num-batched",
        "num-threads",
        "kv-dtype",
    ):
        assert f"--{option}" in told


def test_an_address_that_is_none_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert agent.main([*GIVEN, "--address", "nowhere"]) == 2
    assert "host:port" in capsys.readouterr().err


def test_arguments_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main([*GIVEN, "--address", "/x", "--block-size", "0"]) == 2
    assert "block-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ("/nowhere/card.json", "cannot read the model's card"),
        ('{"version": 1}', "is not a model's card: .* missing required field"),
    ],
)
async def test_a_card_that_is_none_is_the_reason_why_there_is_no_start(
    card: str, reason: str
) -> None:
    events = Events()
    command = [*COMMAND, "--card", card, "--max-model-len", "64"]
    launcher = Launcher(command, AgentConfig(), on_event=events)
    with pytest.raises(ConfigError, match=f"--card: .*{reason}"):
        await launcher.start()
    await launcher.close()
    assert not any("Traceback" in line for line in events.lines)
