"""`llm-serving verify-determinism` on the real model, and what it says of a logit that differs."""

from __future__ import annotations

import pathlib

import pytest

from llm_serving.commands import verify_determinism
from llm_serving.determinism.engine import Counts, Seen
from llm_serving.determinism.scenarios import make_prompts, scenarios

FORCED = (
    "in random company",
    "prompts in chunks",
    "preempted and computed again",
    "from the prefix cache",
    "1 thread ",
)


@pytest.mark.parametrize("flags", [[], ["--weights", "int8"]])
def test_native_logits_are_the_same_in_any_company(
    smollm2: pathlib.Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(smollm2), "--prompts", "24", "--new-tokens", "12", "--threads", "2"]
    assert verify_determinism.main([*words, *flags]) == 0
    told = capsys.readouterr().out
    for name in FORCED:
        (line,) = [line for line in told.splitlines() if line.startswith(name)]
        assert " same " in line, line
    assert told.splitlines()[-1] == "every logit was the same in every run, bit for bit"


def test_a_logit_that_differs_is_found_with_its_position(
    smollm2: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = verify_determinism._run
    calls: list[object] = []
    positions: list[int] = []

    def spoilt(*given: object) -> tuple[Seen, Counts]:
        seen, counts = run(*given)  # type: ignore[arg-type]
        calls.append(given)
        if len(calls) == 3:
            key = max(seen.positions, key=lambda each: seen.positions[each])
            seen.logits[key] = b"another"
            positions.append(seen.positions[key])
        return seen, counts

    monkeypatch.setattr(verify_determinism, "_run", spoilt)
    words = ["--model", str(smollm2), "--prompts", "6", "--new-tokens", "2", "--threads", "2"]
    assert verify_determinism.main(words) == 1
    told = capsys.readouterr().out
    assert f"1 DIFFER, the first at position {positions[0]}" in told


def test_prompts_share_beginnings_and_half_of_them_are_sampled() -> None:
    prompts = make_prompts(12, 4, 100, 512, seed=0)
    assert [prompt.sampling.temperature > 0 for prompt in prompts] == [False, True] * 6
    shared = sum(
        a.ids[: min(len(a.ids), len(b.ids)) - 1] == b.ids[: min(len(a.ids), len(b.ids)) - 1]
        for i, a in enumerate(prompts)
        for b in prompts[:i]
        if min(len(a.ids), len(b.ids)) > 16
    )
    assert shared >= 1
    alone, others = scenarios(prompts, 4, 2)
    assert alone.limits.max_num_seqs == 1
    assert {scenario.num_threads for scenario in others} == {1, 2, 3}
