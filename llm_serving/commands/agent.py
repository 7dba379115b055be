"""`llm-serving agent`: the process that holds the model; the launcher starts one for each rank.

It is of no use by hand: the key of the run comes through a pipe that only a launcher opens.
"""

from __future__ import annotations

import pathlib
import platform
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import msgspec
import typer

from llm_serving.agent.agent_process import AgentSettings, run_agent
from llm_serving.agent.model_runner import ModelRunner
from llm_serving.agent.processors import num_processors
from llm_serving.commands.options import run_command
from llm_serving.commands.unwinding import end_with_parent
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard
from llm_serving.transport.address import parse_address

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """The exit codes of `agent.agent_process`."""
    end_with_parent(signal.SIGKILL)  # a stopped process runs no watchdog
    return run_command("agent", agent, argv)


def agent(
    rank: int = typer.Option(..., min=0, help="which of the agents this is, from 0"),
    key_fd: int = typer.Option(
        ..., min=0, help="inherited descriptor of the pipe that the key comes through"
    ),
    address: str = typer.Option(
        ..., help="where the master listens: host:port, or the path of a Unix socket"
    ),
    epoch: int = typer.Option(1, min=0, help="how often agents have been started, this time too"),
    card: str = typer.Option(..., help="the prepared model: path of its card, or the card as JSON"),
    device: str = typer.Option("auto", help="auto, cpu or cuda"),
    max_model_len: int = typer.Option(..., min=1, help="tokens of prompt and output together"),
    block_size: int = typer.Option(16, min=1, help="tokens in a block of the KV cache"),
    num_blocks: int | None = typer.Option(
        None, min=1, help="blocks of the KV cache; default: from the memory that is there"
    ),
    kv_dtype: str = typer.Option("auto", help="what the KV cache holds: auto or int8"),
    max_num_seqs: int = typer.Option(64, min=1, help="most requests in one step"),
    max_num_batched_tokens: int = typer.Option(2048, min=1, help="most tokens in one step"),
    num_threads: int | None = typer.Option(
        None, min=1, help="threads of the CPU kernels; default: the processors it may use"
    ),
) -> int:
    """Load a model, then run steps for the server that started this process."""
    threads = num_threads or num_processors(pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup"))

    def load(phase: Callable[[str], None]) -> ModelRunner:
        phase("read card")
        runner = ModelRunner.load(
            _read_card(card),
            device=device,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_dtype=kv_dtype,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_threads=threads,
            phase=phase,
        )
        runner.bind_thread()
        return runner

    try:
        settings = AgentSettings(
            rank, epoch, parse_address(address), key_fd, max_model_len, threads, _versions()
        )
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return 2
    return run_agent(settings, load)


def _read_card(card: str) -> ModelCard:
    """Raises ConfigError if it cannot be read or is no card."""
    try:
        data = card.encode() if card.startswith("{") else pathlib.Path(card).read_bytes()
        return msgspec.json.decode(data, type=ModelCard)
    except OSError as exc:
        raise ConfigError(f"--card: cannot read the model's card: {exc}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"--card: {card[:80]!r} is not a model's card: {exc}") from exc


def _versions() -> dict[str, str]:
    """Of what decides how the agent computes."""
    found = {"python": platform.python_version()}
    for package in ("llm-serving", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # ours, when it runs from its source folder
            found[package] = "source"
    return found
