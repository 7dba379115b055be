"""Which command was meant?  The table of commands; nothing else is known here.

Every command is a module with a `main(argv) -> exit code`, and only the one that was asked for is
imported: the front end must never load torch, nor `stop` the front end.
"""

from __future__ import annotations

import gc
import importlib
import sys
from importlib.metadata import version
from types import ModuleType

from llm_serving.errors import ServingError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "serve": "serve a model over HTTP, in the foreground until Ctrl-C",
    "stop": "end a server that was started on this machine",
    "pull": "fetch a model by name, check it and keep it in the cache",
    "prepare": "convert a model into the cache, as `serve` would at its first start",
    "baseline": "write the logits that transformers computes in float32, to compare with",
    "breakdown": "where every millisecond of a running server goes",
    "diagnose": "check and measure what the transport needs, on this machine",
    "transport-report": "what a transport log says, in tables, plots and advice",
    "agent": "one worker process; started by `serve`",
    "verify-determinism": "prove that logits and ids depend on their own request alone",
    "bare-loop": "decode steps of the model with nothing around them; started by `breakdown`",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code.  What a user can mend is one sentence on stderr."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        print(f"llm-serving {version('llm-serving')}")
        return 0
    if name not in COMMANDS:
        print(f"llm-serving: no command {name!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    module = f"llm_serving.commands.{name.replace('-', '_')}"
    command = _load(module) if argv is None else importlib.import_module(module)
    try:
        return int(command.main(rest))
    except ServingError as exc:
        print(f"llm-serving {name}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _load(module: str) -> ModuleType:
    """Import it where this process is ours: what is imported stays, so it is no garbage.

    To look for some again and again is a sixth of the time that torch takes to import, and once it
    is imported 80 ms each time that everything is looked at.
    """
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: llm-serving COMMAND [OPTIONS]", "", *lines, "", "llm-serving COMMAND --help"]
    )
