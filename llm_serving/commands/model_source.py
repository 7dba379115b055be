"""From the configured model to its card, without loading what converts it.

The card is found in the cache in a few system calls.  If there is none, `llm-serving prepare` makes
it in a process of its own, so that neither gguf nor torch is ever in the front end.
"""

from __future__ import annotations

import os
import subprocess

import msgspec

from llm_serving.commands.kernels_choice import packed_weights
from llm_serving.commands.program import program
from llm_serving.commands.start_report import StartReport
from llm_serving.config import ServingConfig
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard, ModelConfig
from llm_serving.prepare.cache import find_prepared
from llm_serving.prepare.packing_choice import misfit_error, why_misfit

__all__ = ["context_length", "prepared_card"]

_UNWIND_S = 10.0


def prepared_card(config: ServingConfig, report: StartReport) -> tuple[ModelCard, str]:
    """(card, why the native kernels do not run: empty if they do).

    Raises ConfigError with the reason of the preparation, which it prints as it goes on.
    """
    model = config.model
    weights, reason = packed_weights(config)
    if reason:
        report.event(f"kernels    reference: {reason}")
    with report.phase("find the prepared model"):
        card = find_prepared(model.path, model.dtype, weights)
    if card is None:
        with report.phase("prepare the model"):
            card = _prepare(config, weights)
    if weights is not None and card.packed is None:
        reason = why_misfit(card.config, weights)
        if config.agent.kernels == "native":  # it had been prepared before that was asked for
            raise ConfigError(f"model.path: {misfit_error(reason, weights)}")
        if config.kv_cache.dtype != "auto":
            raise ConfigError(
                f"kv_cache.dtype: {config.kv_cache.dtype} needs the native kernels, which cannot"
                f" run this model: {reason}"
            )
        report.event(f"kernels    reference: native cannot run this model: {reason}")
    report.model(card, config.kv_cache.dtype)
    return card, reason


def context_length(config: ModelConfig, asked: int | None) -> int:
    """Tokens of prompt and output to serve.  Raises ConfigError if the model has not so many.

    A sliding window changes nothing up to its length, and is not served beyond it.
    """
    window = config.sliding_window
    if asked is None:
        return min(config.max_position_embeddings, window or config.max_position_embeddings)
    if asked > config.longest_context:
        raise ConfigError(
            f"model.max_model_len: {asked} is more than the {config.longest_context} tokens the "
            "model can take"
        )
    if window is not None and asked > window:
        raise ConfigError(
            f"model.max_model_len: {asked} is more than the model's sliding_window of {window}, "
            f"beyond which its attention is not supported; up to {window} it is served exactly"
        )
    return asked


def _prepare(config: ServingConfig, weights: str | None) -> ModelCard:
    model = config.model
    flags = ["--dtype", model.dtype, "--json", "--parent", str(os.getpid())]
    flags += ["--kernels", "reference" if weights is None else config.agent.kernels]
    flags += ["--device", config.agent.device]
    flags += [] if weights is None else ["--weights", weights]
    child = subprocess.Popen([*program(), "prepare", model.path, *flags], stdout=subprocess.PIPE)
    try:
        output, _ = child.communicate()
    except BaseException:  # Ctrl-C, SIGTERM: it removes what it has half made, and its own children
        child.terminate()
        child.wait(_UNWIND_S)
        raise
    try:
        answer = msgspec.json.decode(output)
    except msgspec.DecodeError as exc:
        raise ConfigError(
            f"model.path: preparing {model.path!r} ended with exit code {child.returncode}"
        ) from exc
    if "error" in answer:
        raise ConfigError(f"model.path: {answer['error']}")
    return msgspec.convert(answer, ModelCard)
