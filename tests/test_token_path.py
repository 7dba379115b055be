"""Nothing is logged or formatted for a token: the tuning notes lost 7 ms a step to debug logging.

Every function that runs in each step is listed here by hand and read as a syntax tree.  A raise may
format its sentence: it is not the path of a token that arrives.
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

HOUSE = pathlib.Path(__file__).parents[1] / "llm_serving"

PATH = {
    "master/async_master.py": "_fill _take _deliver",
    "master/scheduler.py": "schedule update _fill _continue _grow _publish_blocks _credit",
    "master/block_pool.py": "allocate publish confirm release _take_oldest",
    "master/request.py": "num_schedulable hash_blocks",
    "master/int_array.py": "append extend view",
    "master/step_inputs.py": "build _input_ids _block_tables _histories _array",
    "worker/agent_worker.py": "submit _on_reply _on_executed",
    "worker/flights.py": "add answer take_over land",
    "worker/step_transfer.py": "write_inputs read_result",
    "transport/arena.py": "begin write_all read_all release",
    "transport/frames.py": "encode decode feed next",
    "transport/channel.py": "post _on_readable _deliver _send_some",
    "transport/blocking.py": "send recv",
    "agent/work_agent.py": "_step read write",
    "agent/model_runner.py": "execute _forward _input_ids",
    "agent/sampler.py": "sample",
    "models/llama.py": "embed run_layers logits",
    "server/llm_server.py": "publish _failure",
    "server/output_stream.py": "take wake next _take_token _deliver",
    "server/detokenizer.py": "push",
    "server/stop_strings.py": "push",
    "metrics.py": "observe_step observe",
    "api/sse.py": "encode_event",
    "api/tgi_answer.py": "stream_event",
}


def functions(path: pathlib.Path) -> dict[str, ast.AST]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {n.name: n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)}


def offences(function: ast.AST) -> list[str]:
    """Logging, printing and string formatting outside of raise statements."""
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
            if re.search(
                r"(^|\.)(logg(er|ing)\b|print$|format$|repr$|concatenate$|dumps$)", called
            ):
                found.append(f"line {node.lineno}: {called}")
    return found


@pytest.mark.parametrize("file", PATH)
def test_no_function_of_the_path_logs_formats_or_concatenates(file: str) -> None:
    known = functions(HOUSE / file)
    for name in PATH[file].split():
        assert name in known, f"{file}: no function {name}; the path has moved, follow it here"
        assert offences(known[name]) == [], f"{file}: {name}"


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
