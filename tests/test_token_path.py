"""Nothing is logged or formatted for a token: the tuning notes lost 7 ms a step to debug logging.

Every function of every file that a step passes through is read as a syntax tree.  Those that are
not on the path, although they stand in these files, are named below.  A raise may format its
sentence.
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

HOUSE = pathlib.Path(__file__).parents[1] / "llm_serving"

FILES = [
    *("master/async_master.py", "master/scheduler.py", "master/block_pool.py"),
    *("master/request.py", "master/int_array.py", "master/step_inputs.py", "master/suspects.py"),
    *("worker/agent_worker.py", "worker/answers.py", "worker/flights.py"),
    *("worker/step_transfer.py", "step_packing.py", "master/step_budget.py", "step_cost.py"),
    *("transport/arena.py", "transport/frames.py", "transport/channel.py"),
    *("transport/blocking.py", "transport/step_counter.py"),
    *("agent/work_agent.py", "agent/model_runner.py", "agent/step_check.py"),
    *("agent/native_sampler.py", "models/packed.py", "agent/sampler.py"),
    *("agent/logits.py", "agent/filters.py", "agent/drawing.py"),
    *("agent/logprobs.py", "agent/philox.py", "agent/scratch.py"),
    *("models/llama.py", "models/layers.py", "models/attention_metadata.py"),
    *("kernels/reference.py", "kernels/reference_attention.py"),
    *("server/output_stream.py", "server/detokenizer.py", "server/decoding.py"),
    *("server/stop_strings.py", "server/llm_server.py"),
    *("metrics/registry.py", "metrics/histogram.py", "metrics/steps.py", "step_trace.py"),
    *("master/step_recorder.py", "master/logits_sink.py", "worker/traffic.py"),
    *("api/tgi.py", "api/tgi_answer.py", "api/streaming.py", "api/exchange.py", "api/sse.py"),
]
OFF_THE_PATH = {
    # a step or an agent is lost
    "master/async_master.py": {"_serve", "_settable", "_stop"},
    "worker/agent_worker.py": {"_check_deadline", "_on_lost", "_supervise"}
    | {"start", "stalled"},  # at the start, and when /readyz is asked
    "worker/answers.py": {"_step_failure", "_unexpected"},
    "step_packing.py": {"_wrong_dtype"},
    "transport/frames.py": {"peer_error"},
    "agent/work_agent.py": {"failed"},
    "agent/model_runner.py": {"_lost_step"},
    "agent/step_check.py": {"_wrong_length", "_out_of_range"},
    # once, when the model is built
    "master/block_pool.py": {"prefix_salt"},
    "models/llama.py": {"__init__"},
    "models/layers.py": {"tensors"},
    # once a scrape, once a request
    "server/llm_server.py": {"_failed"},
    "metrics/registry.py": {"__init__", "_gauge", "_counter"},
    "api/exchange.py": {"_own_headers"},
}


def functions(path: pathlib.Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]


def offences(function: ast.AST) -> list[str]:
    """Logging, printing and string formatting outside of raise statements.

    A concatenation into memory that is there already (`out`) is a copy like any other.
    """
    excused = {
        id(inner) for n in ast.walk(function) if isinstance(n, ast.Raise) for inner in ast.walk(n)
    }
    found = []
    for node in ast.walk(function):
        if id(node) in excused:
            continue
        if isinstance(node, ast.JoinedStr):
            found.append(f"line {node.lineno}: f-string")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            text = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
            found += [f"line {node.lineno}: % formatting"] * text
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(".concatenate") and any(k.arg == "out" for k in node.keywords):
                continue
            if re.search(
                r"(^|\.)(logg(er|ing)\b|print$|format$|repr$|concatenate$|dumps$)", called
            ):
                found.append(f"line {node.lineno}: {called}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_no_function_of_the_path_logs_formats_or_concatenates(file: str) -> None:
    guilty = {function.name for function in functions(HOUSE / file) if offences(function)}
    assert guilty == OFF_THE_PATH.get(file, set())


@pytest.mark.parametrize(
    "line",
    [
        "logger.debug('%d', n)",
        "logging.info(n)",
        "x = f'{n}'",
        "x = 'a%d' % n",
        "x = 'a{}'.format(n)",
        "print(n)",
        "x = np.concatenate([a, b])",
    ],
)
def test_an_offence_is_seen(line: str) -> None:
    assert offences(ast.parse(f"def f(n):\n    {line}"))
    assert not offences(ast.parse("def f(n):\n    raise ValueError(f'{n}')"))
