"""`llm-serving baseline`: the logits that transformers computes in float32, to compare with."""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from llm_serving.baseline.dataset import Plan, read_dataset
from llm_serving.baseline.prefixes import group_prefixes, read_prefixes
from llm_serving.baseline.reference import Reference
from llm_serving.baseline.writing import PatientDump, run_freely, run_prefixes
from llm_serving.commands.console import ConsoleProgress
from llm_serving.commands.eta_bar import EtaBar
from llm_serving.commands.model_source import context_length
from llm_serving.commands.options import run_command
from llm_serving.commands.unwinding import unwind_on_sigterm
from llm_serving.config import ServingConfig, load_config
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard
from llm_serving.precision.logits_dump import LogitsDump
from llm_serving.precision.manifest import MANIFEST_NAME
from llm_serving.prepare.prepare import prepare
from llm_serving.server.tokenizer import Tokenizer

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Exit code 0 when the whole baseline is written; ConfigError says why it is not."""
    with unwind_on_sigterm():
        return run_command("baseline", baseline, argv)


def baseline(
    config: Annotated[
        pathlib.Path | None,
        typer.Option("--config", "-c", help="the server's YAML file", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="a name `pull` knows, a folder, a .gguf file or a hub id",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        pathlib.Path | None,
        typer.Option(
            help='prompts to answer: a JSON list of {"instruction", "input", "output"}',
            show_default=False,
        ),
    ] = None,
    manifest: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--from",
            help="instead of a data set: a manifest.jsonl, or the folder it lies in; exactly its "
            "prefixes are computed",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        pathlib.Path, typer.Option(help="the folder to write, which must hold no such files yet")
    ] = pathlib.Path("file_npy_base"),
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="write at positions that are multiples of it [precision.every: 100]",
            show_default=False,
        ),
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="so many requests, the data set from its start again where it ends "
            "[each entry once]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="of every answer, instead of the tokens of the entry's output",
            show_default=False,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="tokens of prompt and output [the model's context]", show_default=False),
    ] = None,
    allow_other_model: Annotated[
        bool,
        typer.Option("--allow-other-model", help="--from a manifest of another model"),
    ] = False,
) -> int:
    """Write the logits that transformers computes in float32, for acc_allclose.py.

    From a data set: greedy answers, logits at every multiple of --every.

    --from a manifest: logits behind exactly the token ids that a server has seen.
    """
    given = {"model.path": model, "model.max_model_len": max_model_len, "precision.every": every}
    overrides = {key: value for key, value in given.items() if value is not None}
    settings = load_config(config, overrides)
    _refuse_used(out)
    began = time.monotonic()
    with ConsoleProgress() as progress:
        card = prepare(settings.model.path, settings.model.dtype, progress)
        if manifest is not None and dataset is None:
            job = _forced(manifest, card, progress, allow_other_model=allow_other_model)
        elif dataset is not None and manifest is None:
            job = _free(dataset, settings, card, progress, max_requests, max_new_tokens)
        else:
            raise ConfigError("give either --dataset FILE or --from MANIFEST")
        progress.say(f"loading {card.source} into transformers, in float32 ...")
        reference = Reference.load(
            card, num_threads=settings.agent.num_threads, quiet=not sys.stderr.isatty()
        )
    dump = LogitsDump(out, every=settings.precision.every, labels=_labels(card))
    try:
        with EtaBar() as bar:
            job(reference, PatientDump(dump), bar.show)
    except BaseException:  # Ctrl-C, too: half a baseline passes as a whole one
        print(f"{out} holds only a part of the baseline: remove it", file=sys.stderr)
        raise
    finally:
        dump.close()
    _report(dump, out, _compared_folder(manifest), time.monotonic() - began)
    return 0


Job = Callable[[Reference, PatientDump, Callable[[float, float], None]], None]


def _forced(
    path: pathlib.Path, card: ModelCard, progress: ConsoleProgress, *, allow_other_model: bool
) -> Job:
    manifest = read_prefixes(path, card, allow_other_model=allow_other_model)
    if manifest.broken_lines:
        where = ", ".join(map(str, manifest.broken_lines[:5]))
        progress.say(f"{path}: {len(manifest.broken_lines)} broken lines are left out: {where}")
    groups = group_prefixes(manifest.entries)
    progress.say(f"{len(manifest.entries)} prefixes in {len(groups)} texts")
    return lambda reference, dump, show: run_prefixes(reference, groups, dump, show)


def _free(
    path: pathlib.Path,
    settings: ServingConfig,
    card: ModelCard,
    progress: ConsoleProgress,
    max_requests: int | None,
    max_new_tokens: int | None,
) -> Job:
    tokenizer = Tokenizer(card.tokenizer)
    plan = Plan.of(
        read_dataset(path),
        encode=lambda text, special: [i for i, *_ in tokenizer.spans(text, special)],
        max_total_tokens=context_length(card.config, settings.model.max_model_len),
        max_requests=max_requests,
        max_new_tokens=max_new_tokens,
    )
    progress.say(
        f"{plan.num_requests} requests, {len(plan.prompts)} different ones; {plan.num_clipped} "
        f"clipped to the context, {plan.num_impossible} too long for it"
    )
    eos = card.eos_token_ids
    return lambda reference, dump, show: run_freely(reference, plan.prompts, eos, dump, show)


def _refuse_used(out: pathlib.Path) -> None:
    num_files = len(list(out.glob("*.npy")))
    if num_files or (out / MANIFEST_NAME).exists():
        raise ConfigError(
            f"--out: {out} holds {num_files} files of an earlier run; remove the folder, or name "
            "another"
        )


def _labels(card: ModelCard) -> dict[str, str]:
    return {
        "model": card.name,
        "model_digest": card.digest,
        "dtype": "float32",
        "weights": card.weights_kind,
        "kernels": "torch",
        "source": "transformers",
    }


def _compared_folder(manifest: pathlib.Path | None) -> pathlib.Path:
    """Where the files lie that the baseline is for."""
    if manifest is None:
        return pathlib.Path("file_npy")
    return manifest if manifest.is_dir() else manifest.parent


def _report(dump: LogitsDump, out: pathlib.Path, compared: pathlib.Path, seconds: float) -> None:
    if dump.last_error is not None:
        raise ConfigError(f"the baseline is not complete: {dump.last_error}")
    if dump.num_written == 0:
        raise ConfigError(
            f"no answer reaches a position that is a multiple of {dump.every}; a smaller --every "
            "or longer texts would"
        )
    print(f"{dump.num_written} files in {out} after {seconds:.1f} s; compare them with")
    print(f"  python acc_allclose.py --base_path {out} --new_path {compared}")
