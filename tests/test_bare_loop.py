from __future__ import annotations

import pathlib
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from llm_serving.agent.bare_loop import BareLoop
from llm_serving.agent.model_runner import ModelRunner, StepColumns
from llm_serving.commands import bare_loop
from llm_serving.diagnostics.breakdown.observation import BareFigures
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard
from llm_serving.prepare.cache import store
from llm_serving.step_arrays import StepInputs
from tests.tiny_models import CONTEXT, VOCAB_SIZE, build_twin


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    made = build_twin(tmp_path_factory.mktemp("model")).card
    return msgspec.structs.replace(made, digest="d" * 64)


@pytest.fixture
def prepared(card: ModelCard, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    """In a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "llm-serving" / "prepared").mkdir(parents=True)
    return store("key", lambda partial, final: card, lambda: None)


def loop_of(card: ModelCard, num_rows: int = 2) -> BareLoop:
    return BareLoop(card, num_rows=num_rows, prompt_tokens=20, new_tokens=15, num_threads=1)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[StepInputs]:
    """The steps that a runner was given."""
    seen: list[StepInputs] = []
    execute = ModelRunner.execute

    def record(self: ModelRunner, inputs: StepInputs, tick: Callable[[], None]) -> StepColumns:
        seen.append(inputs)
        return execute(self, inputs, tick)

    monkeypatch.setattr(ModelRunner, "execute", record)
    return seen


def test_a_loop_decodes_every_context_of_an_answer_once(
    card: ModelCard, executed: list[StepInputs]
) -> None:
    loop = loop_of(card)
    assert executed[-1].context_lens.tolist() == [20, 20]  # the prompts
    assert len(executed[-1].input_ids) == 40
    executed.clear()
    assert len(loop.decode()) == 14  # the first token came from the prompt
    assert [step.context_lens.tolist() for step in executed] == [[n, n] for n in range(21, 35)]
    assert [step.positions.tolist() for step in executed] == [[n, n] for n in range(20, 34)]
    assert list(loop.contexts) == list(range(21, 35))


def test_rows_have_blocks_of_their_own(card: ModelCard, executed: list[StepInputs]) -> None:
    loop = loop_of(card, num_rows=3)
    executed[:-1] = []
    loop.decode()
    tables = executed[0].block_tables
    assert len(np.unique(tables)) == tables.size
    slots = np.stack([step.slots for step in executed[1:]], 1)
    both = np.concatenate([executed[0].slots.reshape(3, -1), slots], 1)
    assert len(np.unique(both)) == both.size  # no token overwrites another's keys
    assert (both // 16 == np.repeat(tables, 16, 1)[:, : both.shape[1]]).all()


def test_a_step_is_timed_with_its_halves_inside(card: ModelCard) -> None:
    for step in loop_of(card).decode():
        assert step.forward_ms > 0
        assert step.sample_ms > 0
        assert step.forward_ms + step.sample_ms < step.step_ms


def test_a_small_vocabulary_is_enough(card: ModelCard, executed: list[StepInputs]) -> None:
    loop_of(card)
    assert executed[-1].input_ids.max() == VOCAB_SIZE - 1


def test_the_command_finds_the_model_that_a_server_names(
    prepared: ModelCard, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--rows 2 --prompt-tokens 5 --new-tokens 4 --threads 1 --device cpu"
    assert bare_loop.main(["--prepared", "key", *flags.split(), "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=BareFigures)
    assert (found.rows, found.first_context, found.last_context) == (2, 6, 8)
    assert (found.num_steps, found.num_threads) == (6, 1)  # two answers of four tokens
    assert found.forward_ms + found.sample_ms < found.step_ms


def test_the_command_tells_people_in_a_sentence(
    prepared: ModelCard, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--prompt-tokens 5 --new-tokens 3 --rounds 1 --threads 1"
    assert bare_loop.main(["--prepared", "key", *flags.split()]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{prepared.name}, float32: ")
    assert said.endswith("mean of 2; rows 1, contexts of 6 to 7 tokens, 1 threads\n")


def test_a_model_that_is_not_here_is_a_sentence(prepared: ModelCard) -> None:
    with pytest.raises(ConfigError, match="no prepared model here is called eeee"):
        bare_loop.main(["--prepared", "e" * 32])
    with pytest.raises(ConfigError, match="is not prepared so: llm-serving prepare no-such-model"):
        bare_loop.main(["no-such-model"])


def test_a_context_that_the_model_has_not_is_a_sentence(prepared: ModelCard) -> None:
    flags = ["--prompt-tokens", str(CONTEXT), "--new-tokens", "2"]
    with pytest.raises(ConfigError, match="max_model_len"):
        bare_loop.main(["--prepared", "key", *flags])
