"""`llm-serving serve`: the command line on top of the configuration, then serve."""

from __future__ import annotations

import logging
import pathlib
from typing import Annotated

import typer

from llm_serving.commands.deployment import serve_until_stopped
from llm_serving.commands.options import run_command
from llm_serving.config import load_config
from llm_serving.errors import ConfigError

__all__ = ["main"]


DUMP_DIR = "file_npy"  # of task 2


def main(argv: list[str]) -> int:
    """Exit code 0 after Ctrl-C or SIGTERM, 1 with a sentence if it cannot start or go on."""
    return run_command("serve", serve, argv)


def _option(flag: str, text: str, *more: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(flag, *more, help=text, show_default=False)
    return option


def serve(
    config: Annotated[
        pathlib.Path | None, _option("--config", "a YAML file; flags override what it says", "-c")
    ] = None,
    model: Annotated[
        str | None,
        _option("--model", "a name `pull` knows, a folder, a .gguf file or a hub id", "-m"),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        _option("--served-name", "what the model is called in URLs; may be given several times"),
    ] = None,
    host: Annotated[str | None, _option("--host", "address to listen on [127.0.0.1]")] = None,
    port: Annotated[
        int | None, _option("--port", "port to listen on, 0 for any free one [8835]", "-P")
    ] = None,
    task: Annotated[
        int,
        _option("--task", "1: speed, the normal server; 2: precision, logits into ./file_npy [1]"),
    ] = 1,
    dtype: Annotated[
        str | None, _option("--dtype", "auto, float32, bfloat16 or float16 [auto: the file's]")
    ] = None,
    weights: Annotated[
        str | None,
        _option(
            "--weights",
            "auto, float32, bfloat16, int8 or native (the file's blocks) [auto: the file's]",
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        _option("--kernels", "auto, native or reference [auto: native where they can run]"),
    ] = None,
    max_model_len: Annotated[
        int | None,
        _option("--max-model-len", "tokens of prompt and output together [the model's context]"),
    ] = None,
    max_num_seqs: Annotated[
        int | None, _option("--max-num-seqs", "requests that run side by side [64]")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        _option(
            "--max-num-batched-tokens", "tokens of one step; a longer prompt is chunked [1024]"
        ),
    ] = None,
    max_num_waiting: Annotated[
        int | None, _option("--max-num-waiting", "requests that may wait; more get 429 [1024]")
    ] = None,
    max_step_stretch: Annotated[
        float | None,
        _option(
            "--max-step-stretch", "prompts make decode steps so many times longer, inf: any [2.2]"
        ),
    ] = None,
    burst_tokens: Annotated[
        int | None,
        _option("--burst-tokens", "... but not until a row has so many tokens, 1: always [8]"),
    ] = None,
    block_size: Annotated[
        int | None, _option("--block-size", "tokens of one KV-cache block [16]")
    ] = None,
    num_kv_blocks: Annotated[
        int | None, _option("--num-kv-blocks", "KV-cache blocks [from the memory that is there]")
    ] = None,
    kv_dtype: Annotated[
        str | None, _option("--kv-dtype", "what the KV cache holds: auto or int8 [auto: --dtype]")
    ] = None,
    prefix_caching: Annotated[
        bool | None,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="reuse the KV cache of equal prompt beginnings [on]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str | None, _option("--device", "auto, cpu or cuda [auto]")] = None,
    num_threads: Annotated[
        int | None, _option("--num-threads", "threads of the agent [processors of this machine]")
    ] = None,
    transport: Annotated[
        str | None, _option("--transport", "control frames to the agent: tcp or unix [tcp]")
    ] = None,
    transport_log: Annotated[
        str | None,
        _option("--transport-log", "a file that gets a line for each call to an agent [none]"),
    ] = None,
    transport_log_methods: Annotated[
        str | None,
        _option("--transport-log-methods", "which calls, comma-separated: Execute,Ping [all]"),
    ] = None,
    dump_dir: Annotated[
        str | None, _option("--dump-dir", "a folder for the logits of chosen positions [none]")
    ] = None,
    dump_every: Annotated[
        int | None, _option("--dump-every", "positions that are multiples of it are chosen [100]")
    ] = None,
    request_timeout_s: Annotated[
        float | None, _option("--request-timeout", "seconds a request may wait and run [600]")
    ] = None,
    log_level: Annotated[
        str | None, _option("--log-level", "debug, info, warning or error [info]")
    ] = None,
) -> int:
    """Serve a model over HTTP, in the foreground until Ctrl-C.

    Without a configuration or a model: SmolLM2-135M-Instruct on 127.0.0.1:8835.
    """
    if task not in (1, 2):
        raise ConfigError(f"--task: expected 1 (speed) or 2 (precision), found {task}")
    given = {
        "model.path": model,
        "model.served_names": served_name or None,
        "model.dtype": dtype,
        "model.weights": weights,
        "agent.kernels": kernels,
        "model.max_model_len": max_model_len,
        "server.host": host,
        "server.port": port,
        "server.request_timeout_s": request_timeout_s,
        "scheduler.max_num_seqs": max_num_seqs,
        "scheduler.max_num_batched_tokens": max_num_batched_tokens,
        "scheduler.max_num_waiting": max_num_waiting,
        "scheduler.max_step_stretch": max_step_stretch,
        "scheduler.burst_tokens": burst_tokens,
        "scheduler.prefix_caching": prefix_caching,
        "kv_cache.block_size": block_size,
        "kv_cache.num_blocks": num_kv_blocks,
        "kv_cache.dtype": kv_dtype,
        "agent.device": device,
        "agent.num_threads": num_threads,
        "agent.transport": transport,
        "agent.transport_log": transport_log,
        "agent.transport_log_methods": None
        if transport_log_methods is None
        else transport_log_methods.split(","),
        "precision.dump_dir": dump_dir,
        "precision.every": dump_every,
        "logging.level": log_level,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    settings = load_config(config, overrides)
    if task == 2 and settings.precision.dump_dir is None:
        settings = load_config(config, {**overrides, "precision.dump_dir": DUMP_DIR})
    logging.basicConfig(
        level=settings.logging.level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    return serve_until_stopped(settings)
