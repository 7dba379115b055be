"""`llm-serving verify-determinism` on the real model, and what it says of what differs."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_serving.agent.model_runner import ModelRunner
from llm_serving.commands import verify_determinism
from llm_serving.determinism.engine import Counts, run_requests
from llm_serving.determinism.scenarios import Scenario, scenarios
from llm_serving.determinism.seen import Seen
from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.digest import Digest
from llm_serving.models.packed import NativePlan, NativeStep
from llm_serving.step_arrays import StepInputs
from tests.native_kernels import needs_native

FEW = ["--prompts", "6", "--new-tokens", "4", "--threads", "2"]
RUNS = (
    "alone",
    "in random company",
    "prompts in chunks",
    "preempted and computed again",
    "from the prefix cache",
    "1 thread ",
    "3 threads",
)


@needs_native
@pytest.mark.parametrize(
    ("flags", "num_long"), [([], 2), (["--weights", "int8"], 1), (["--kv-dtype", "int8"], 2)]
)
def test_native_logits_are_the_same_in_any_company(
    smollm2: pathlib.Path,
    flags: list[str],
    num_long: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify_determinism, "LONGEST_PROMPT", 600)  # over 512 they are split
    num_prompts, new_tokens = {2: 16, 1: 12}[num_long], 8
    words = ["--model", str(smollm2), "--prompts", str(num_prompts)]
    words += ["--new-tokens", str(new_tokens)]
    assert verify_determinism.main([*words, "--threads", "2", *flags]) == 0
    told = capsys.readouterr().out
    total_unkept, num_logits = 0, num_prompts * new_tokens
    same = rf" same  \({num_logits} logits, {2 * num_logits} ids, (\d+) from steps without logits"
    num_ahead = num_prompts * (new_tokens - 1)
    for name in RUNS:
        (line,) = [line for line in told.splitlines() if line.startswith(name)]
        found = re.search(same, line)
        assert found, line
        assert (
            new_tokens <= int(found[1]) <= num_prompts // 2 * new_tokens
        )  # plainly greedy are less
        total_unkept += int(found[1])
        assert f" {num_long * 2 * (new_tokens - 1)} long contexts)" in line
        # after a preemption the last id is known
        ahead = re.search(r" (\d+) ahead, ", line)
        assert ahead, line
        assert num_ahead // 2 < int(ahead[1]) <= num_ahead
    assert told.splitlines()[-1] == (
        "every logit, id and logprob was the same, bit for bit: "
        f"{7 * num_logits} logits, {14 * num_logits} ids, {total_unkept} from steps without logits"
    )


@pytest.fixture
def two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in random company and in chunks; no more."""

    def few(*given: object) -> tuple[Scenario, list[Scenario]]:
        alone, others = scenarios(*given)  # type: ignore[arg-type]
        return alone, others[:2]

    monkeypatch.setattr(verify_determinism, "scenarios", few)


@pytest.fixture
def no_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what has nothing to do with them: they take most of the time."""
    monkeypatch.setattr(verify_determinism, "LONGEST_PROMPT", 257)


@needs_native
@pytest.mark.usefixtures("two_runs", "no_long_prompts")
def test_a_logit_that_differs_is_found_with_its_position(
    smollm2: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = verify_determinism._run
    calls: list[object] = []
    positions: list[int] = []

    def spoilt(*given: object) -> tuple[Seen, list[Counts]]:
        seen, counts = run(*given)  # type: ignore[arg-type]
        calls.append(given)
        if len(calls) == 3:
            key = max(seen.logits.positions, key=lambda each: seen.logits.positions[each])
            seen.logits.values[key] = b"another"
            positions.append(seen.logits.positions[key])
        return seen, counts

    monkeypatch.setattr(verify_determinism, "_run", spoilt)
    assert verify_determinism.main([*FEW, "--model", str(smollm2)]) == 1
    told = capsys.readouterr().out
    assert f"1 logits, 0 ids DIFFER, the first at position {positions[0]}" in told


@needs_native
@pytest.mark.usefixtures("two_runs", "no_long_prompts")
@pytest.mark.parametrize("field", ["sum", "arg_max"])
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_head_that_sums_up_wrongly_in_company_is_found(
    smollm2: pathlib.Path,
    is_kept: bool,
    field: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = NativePlan.head

    def spoilt(
        plan: NativePlan,
        hidden: torch.Tensor,
        rows: npt.NDArray[np.int32],
        logits: torch.Tensor | None,
        records: npt.NDArray[np.void] | None = None,
    ) -> Digest:
        digest = head(plan, hidden, rows, logits, records)
        if len(rows) == 2 and is_kept == (logits is not None):
            values = digest.ranges[field]
            values[1] = values[1] * np.float32(1.00001) if field == "sum" else values[1] ^ 1
        return digest

    monkeypatch.setattr(NativePlan, "head", spoilt)
    assert verify_determinism.main([*FEW, "--model", str(smollm2)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (alone,) = [line for line in lines if line.startswith("alone")]
    assert " same " in alone
    differing = [line for line in lines if " DIFFER, the first at position " in line]
    assert any(re.search(r" [1-9]\d* ids DIFFER", line) for line in differing), lines
    if field == "sum":
        assert all(" 0 logits, " in line for line in differing)
    assert lines[-1] == "something differed: the native kernels promise that nothing does"


@needs_native
@pytest.mark.usefixtures("two_runs")
def test_a_long_context_that_differs_in_company_is_found(
    smollm2: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = NativePlan.run

    def spoilt(
        plan: NativePlan, hidden: torch.Tensor, step: NativeStep, first: int, last: int
    ) -> torch.Tensor:
        hidden = run(plan, hidden, step, first, last)
        _, contexts, _ = step._rows
        if len(contexts) > 1 and len(hidden) == len(contexts):
            hidden[torch.from_numpy(contexts > 512)] += 0.01
        return hidden

    monkeypatch.setattr(NativePlan, "run", spoilt)
    assert verify_determinism.main([*FEW, "--model", str(smollm2)]) == 1
    told = capsys.readouterr().out
    assert re.search(r"random company .* [1-9]\d* ids DIFFER, the first at position 11\d\d ", told)


@pytest.mark.usefixtures("two_runs", "no_long_prompts")
@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_native), "reference"])
def test_a_row_that_is_given_the_sample_of_another_is_found(
    smollm2: pathlib.Path,
    kernels: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    input_ids = ModelRunner._input_ids

    def spoilt(runner: ModelRunner, inputs: StepInputs) -> npt.NDArray[np.int64]:
        if len(runner._last_ids) > 1:
            runner._last_ids = np.roll(runner._last_ids, 1)
        return input_ids(runner, inputs)

    monkeypatch.setattr(ModelRunner, "_input_ids", spoilt)
    flags = ["--model", str(smollm2), "--kernels", kernels]
    assert verify_determinism.main([*FEW, *flags]) == 1
    told = capsys.readouterr().out
    if kernels == "native":
        assert re.search(r"random company .* 0 logits, [1-9]\d* ids DIFFER", told), told
    rule = {  # reference may differ without the fault, too
        "native": "the native kernels promise that nothing does",
        "reference": "it may, on the reference kernels",
    }[kernels]
    assert told.splitlines()[-1] == f"something differed: {rule}"


@needs_native
@pytest.mark.usefixtures("two_runs")
def test_a_run_without_long_contexts_or_rows_ahead_proves_nothing(
    smollm2: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_deep(*given: object, **named: object) -> Counts:
        counts = run_requests(*given, **{**named, "depth": 1})  # type: ignore[arg-type]
        counts.long_contexts = 0
        return counts

    monkeypatch.setattr(verify_determinism, "run_requests", one_deep)
    assert verify_determinism.main([*FEW, "--model", str(smollm2)]) == 1
    told = capsys.readouterr().out
    assert (
        "alone                        proves nothing: no long contexts and no rows ahead;" in told
    )
    assert "DIFFER" not in told
    assert told.splitlines()[-1].startswith("not proved, though nothing differed: ")


def test_answers_that_leave_no_room_for_a_prompt_are_refused(smollm2: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="--new-tokens: 8192 leave no room in the model's 8192"):
        verify_determinism.main(["--model", str(smollm2), "--new-tokens", "8192"])


@needs_native
@pytest.mark.usefixtures("two_runs", "no_long_prompts")
def test_a_run_that_always_keeps_logits_proves_nothing(
    smollm2: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "keeps_logits", lambda *_: True)
    assert verify_determinism.main([*FEW, "--model", str(smollm2)]) == 1
    told = capsys.readouterr().out
    assert "proves nothing: no steps without logits; more --prompts would" in told
    assert "DIFFER" not in told
