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
from llm_serving.determinism.engine import Counts, Prompt, run_requests
from llm_serving.determinism.scenarios import (
    BLOCK_SIZE,
    LONGEST_PROMPT,
    Scenario,
    make_prompts,
    plain_first,
    scenarios,
)
from llm_serving.determinism.seen import Seen
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard

__all__ = ["main"]

# What comes of a run: it proved what its name says, it did not come to that, something differed.
SAME, NOTHING, DIFFERENT = "same", "nothing", "different"


def main(argv: list[str]) -> int:
    """Exit code 0 if every run proved what its name says, else 1."""
    return run_command("verify-determinism", verify_determinism, argv)


def verify_determinism(
    config: Annotated[
        pathlib.Path | None, typer.Option("--config", "-c", help="a YAML file")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="as `serve --model`")] = None,
    dtype: Annotated[str | None, typer.Option(help="as `serve --dtype`")] = None,
    weights: Annotated[str | None, typer.Option(help="as `serve --weights`")] = None,
    kernels: Annotated[str | None, typer.Option(help="as `serve --kernels`")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="as `serve --kv-dtype`")] = None,
    prompts: Annotated[int, typer.Option(min=3, help="requests")] = 24,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens of each answer")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="threads [processors]")] = None,
    seed: Annotated[int, typer.Option(help="of prompts, lengths and arrivals")] = 0,
) -> int:
    """Prove on this machine that a row's logits depend on its own tokens alone, and so do ids.

    Every request is computed alone, then in random company, in chunks, preempted, from the prefix
    cache and with other numbers of threads, each time twice: with its logits, and as it is served,
    where nobody wants them.  All logits, ids and logprobs are compared bit for bit.
    """
    given = {"model.path": model, "model.dtype": dtype, "model.weights": weights}
    given |= {"agent.kernels": kernels, "kv_cache.dtype": kv_dtype}
    settings = load_config(
        config, {key: value for key, value in given.items() if value is not None}
    )
    card, _ = prepared_card(settings, StartReport())
    num_threads = threads or num_processors(pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup"))
    longest = min(
        LONGEST_PROMPT + new_tokens,
        card.config.longest_context,
        card.config.sliding_window or card.config.longest_context,
    )
    if new_tokens >= longest:
        raise ConfigError(f"--new-tokens: {new_tokens} leave no room in the model's {longest}")
    requests = make_prompts(prompts, new_tokens, card.config.vocab_size, longest, seed)
    alone, others = scenarios(requests, new_tokens, num_threads)
    expected, counts = _run(card, settings.kv_cache.dtype, alone, requests, longest, new_tokens)
    is_native = card.packed is not None
    results = [_report(alone, expected, counts, expected, is_native)]
    for scenario in others:
        found, each = _run(card, settings.kv_cache.dtype, scenario, requests, longest, new_tokens)
        results.append(_report(scenario, found, each, expected, is_native))
        counts += each
    if DIFFERENT in results:
        promise = "the native kernels promise that nothing does"
        print(f"something differed: {promise if is_native else 'it may, on the reference kernels'}")
        return 1
    if NOTHING in results:
        print("not proved, though nothing differed: not every run did what its name says")
        return 1
    print(f"every logit, id and logprob was the same, bit for bit: {_compared(counts)}")
    return 0


def _report(
    scenario: Scenario,
    found: Seen,
    counts: Sequence[Counts],
    expected: Seen,
    is_native: bool,
) -> str:
    """Print a line about a run: SAME, NOTHING or DIFFERENT, of what its name says."""
    logits, tokens = (
        found.logits.differing(expected.logits),
        found.tokens.differing(expected.tokens),
    )
    not_forced = {name: None for each in counts for name in scenario.not_forced(each)}
    missing = [_words(name) for name in not_forced]
    if not _total(counts, "ahead"):
        missing.append("rows ahead")
    if is_native and not _total(counts, "unkept"):
        missing.append("steps without logits")
    verdict, told = SAME, "same"
    if missing:
        verdict = NOTHING
        told = f"proves nothing: no {' and no '.join(missing)}; more --prompts would"
    if logits or tokens:
        verdict = DIFFERENT
        first = min(logits + tokens)
        told = f"{len(logits)} logits, {len(tokens)} ids DIFFER, the first at position {first}"
    rows = sum(each.rows for each in counts) / sum(each.steps for each in counts)
    shape = [f"{rows:.1f} rows a step", f"{_total(counts, 'ahead')} ahead"]
    shape += [f"{_total(counts, name)} {_words(name)}" for name in scenario.forced]
    print(f"{scenario.name:28} {told}  ({_compared(counts)}; {', '.join(shape)})", flush=True)
    return verdict


def _words(name: str) -> str:
    return name.replace("_", " ")


def _compared(counts: Sequence[Counts]) -> str:
    numbers = [_total(counts, name) for name in ("logits", "tokens", "unkept")]
    return "{} logits, {} ids, {} from steps without logits".format(*numbers)


def _total(counts: Sequence[Counts], name: str) -> int:
    return sum(getattr(each, name) for each in counts)


def _run(
    card: ModelCard,
    kv_dtype: str,
    scenario: Scenario,
    requests: Sequence[Prompt],
    longest: int,
    new_tokens: int,
) -> tuple[Seen, list[Counts]]:
    """With logits, step after step; and as users are served, a step ahead."""
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
        kv_dtype=kv_dtype,
    )
    given = requests
    if not scenario.random_arrivals:
        given = [replace(request, arrives=0) for request in requests]
    seen, done, total = Seen(), 0, 2 * len(requests) * new_tokens
    with EtaBar() as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.show(done, total)

        counts = [
            run_requests(
                runner,
                prompts,
                scenario.limits,
                seen,
                num_blocks=scenario.num_blocks,
                depth=1 if wants_logits else 2,
                wants_logits=wants_logits,
                advance=advance,
            )
            for prompts, wants_logits in ((given, True), (plain_first(given, new_tokens), False))
        ]
    return seen, counts
