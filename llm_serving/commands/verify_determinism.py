"""`llm-serving verify-determinism`: the same tokens, the same bits, whatever the company."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from llm_serving.agent.model_runner import ModelRunner
from llm_serving.agent.processors import num_processors
from llm_serving.commands.eta_bar import EtaBar
from llm_serving.commands.model_source import prepared_card
from llm_serving.commands.options import run_command
from llm_serving.commands.start_report import StartReport
from llm_serving.config import load_config
from llm_serving.determinism.engine import Counts, Prompt, Seen, run_requests
from llm_serving.determinism.scenarios import BLOCK_SIZE, Scenario, make_prompts, scenarios
from llm_serving.model_card import ModelCard

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Exit code 0 if every logit was the same in every run, 1 if one was not."""
    return run_command("verify-determinism", verify_determinism, argv)


def verify_determinism(
    config: Annotated[
        pathlib.Path | None, typer.Option("--config", "-c", help="a YAML file")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="as `serve --model`")] = None,
    dtype: Annotated[str | None, typer.Option(help="as `serve --dtype`")] = None,
    weights: Annotated[str | None, typer.Option(help="as `serve --weights`")] = None,
    kernels: Annotated[str | None, typer.Option(help="as `serve --kernels`")] = None,
    prompts: Annotated[int, typer.Option(min=3, help="requests")] = 24,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens of each answer")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="threads [processors]")] = None,
    seed: Annotated[int, typer.Option(help="of prompts, lengths and arrivals")] = 0,
) -> int:
    """Prove on this machine that a row's logits depend on its own tokens alone.

    Every request is computed alone, then in random company, in chunks, preempted, from the prefix
    cache and with other numbers of threads; all logits are compared bit for bit.
    """
    given = {"model.path": model, "model.dtype": dtype, "model.weights": weights}
    given["agent.kernels"] = kernels
    settings = load_config(
        config, {key: value for key, value in given.items() if value is not None}
    )
    card = prepared_card(settings, StartReport())
    num_threads = threads or num_processors(pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup"))
    longest = min(512, card.config.longest_context)
    requests = make_prompts(prompts, new_tokens, card.config.vocab_size, longest, seed)
    alone, others = scenarios(requests, new_tokens, num_threads)
    expected, counts = _run(card, alone, requests, longest, new_tokens)
    print(
        f"{alone.name:32} {len(expected.logits)} logits of {prompts} requests, {counts.steps} steps"
    )
    results = [_check(card, each, requests, longest, new_tokens, expected) for each in others]
    if all(results):
        print("every logit was the same in every run, bit for bit")
        return 0
    print("logits depend on their company; only the native kernels promise that they do not")
    return 1


def _check(
    card: ModelCard,
    scenario: Scenario,
    requests: Sequence[Prompt],
    longest: int,
    new_tokens: int,
    expected: Seen,
) -> bool:
    found, counts = _run(card, scenario, requests, longest, new_tokens)
    wrong = sorted(
        found.positions.get(key, expected.positions[key])
        for key, digest in expected.logits.items()
        if found.logits.get(key) != digest
    )
    wrong = sorted([*wrong, *found.conflicts])
    forced = (
        f", {getattr(counts, scenario.forced)} {scenario.forced.replace('_', ' ')}"
        if scenario.forced
        else ""
    )
    is_proof = scenario.has_forced(counts)
    verdict = "same" if not wrong else f"{len(wrong)} DIFFER, the first at position {wrong[0]}"
    if not is_proof:
        verdict = f"proves nothing: no {scenario.forced.replace('_', ' ')}; more --prompts would"
    print(
        f"{scenario.name:32} {verdict}  ({counts.rows / counts.steps:.1f} rows a step{forced})",
        flush=True,
    )
    return is_proof and not wrong


def _run(
    card: ModelCard,
    scenario: Scenario,
    requests: Sequence[Prompt],
    longest: int,
    new_tokens: int,
) -> tuple[Seen, Counts]:
    runner = ModelRunner.load(
        card,
        device="cpu",
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        num_blocks=scenario.num_blocks,
        max_num_seqs=scenario.limits.max_num_seqs,
        max_num_batched_tokens=scenario.limits.max_num_batched_tokens,
        num_threads=scenario.num_threads,
        phase=lambda _: None,
    )
    given = requests
    if not scenario.random_arrivals:
        given = [replace(request, arrives=0) for request in requests]
    done, total = 0, len(requests) * new_tokens
    with EtaBar() as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.show(done, total)

        return run_requests(
            runner, given, scenario.limits, num_blocks=scenario.num_blocks, advance=advance
        )
