"""The load test against this project's own front end, in both dialects, over a real socket."""

from __future__ import annotations

import json
import pathlib
from datetime import UTC, datetime

import pytest
from load_test.figures import figures_of
from load_test.options import parse
from load_test.output_files import LogFile
from load_test.procedure import perform
from load_test.results import Run
from load_test.screen import Screen

from tests.front_end import front_end, socket_of

ENTRIES = [
    {"instruction": "the cat", "input": "", "output": "the cat sat on the mat"},
    {"instruction": "the cat sat", "input": "on the mat", "output": "the cat"},
]


async def load_test(tmp_path: pathlib.Path, *flags: str) -> Run:
    dataset = tmp_path / "set.json"
    dataset.write_text(json.dumps(ENTRIES))
    async with front_end(tmp_path) as front, socket_of(front.app) as port:
        options = parse(
            ["-X", "200", "-T", "0.1", "-P", str(port), "--dataset", str(dataset), *flags]
        )
        return await perform(options, datetime.now(UTC), Screen(), LogFile(None))


@pytest.mark.parametrize("api", ["tgi", "openai"])
async def test_our_own_server_is_driven_in_both_dialects(tmp_path: pathlib.Path, api: str) -> None:
    run = await load_test(tmp_path, "--api", api)
    assert [r.state for r in run.requests] == ["ok"] * 20
    for record in run.requests:
        assert record.output_tokens == record.asked_tokens == len(record.token_s)
        assert record.finish_reason == "length"
        assert record.prompt_tokens
        assert record.request_id
        assert record.timing
    figures = figures_of(run)
    assert run.max_total_tokens == 128
    assert run.work is not None
    assert run.work.generation_tokens == figures.output_tokens
    assert run.work.prompt_tokens == figures.prompt_tokens
    assert figures.prefix_hit_rate is not None
    assert figures.per_token.server_ms is not None
    assert {sample.running is not None for sample in run.samples} == {True}
