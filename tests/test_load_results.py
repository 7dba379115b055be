from __future__ import annotations

import json
import pathlib

import pytest
from load_test.results import (
    BareDecode,
    PrecisionDump,
    ResultFileError,
    Run,
    Sample,
    ServerWork,
    StepWork,
    load,
    save,
)

from tests.load_results import failed, request, run_of

RUN = run_of(
    request(0, 0.0, [0.5, 1.0], timing={"queue": 1.5}, request_id="load-1-0"),
    failed(1, 0.25),
    request(2, 0.5, [], is_impossible=True),
    options={"rate": 4.0, "goodput": {"ttft": 200.0}, "tokenizer": None},
    dataset={"path": "größe.json", "num_entries": 3, "digest": "d"},
    max_total_tokens=1000,
    info={"kernels": {"linear": "reference"}},
    client_cpu_share=0.125,
    samples=[Sample(0.0, 1, 1.0, 0.0), Sample(1.0, 0)],
    work=ServerWork(1.0, 2.0, 4.0, 1.0, 0.0, {"decode": StepWork(2.0, 0.25, 4.0, 4.0)}),
    bare_decode=BareDecode(128, {1: 4.0, 16: 9.5}),
    precision=PrecisionDump("file_npy", 3, 0),
)


@pytest.mark.parametrize("run", [RUN, run_of()])
def test_a_run_comes_back_as_it_was_saved(run: Run, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.json"
    save(run, path, {"num_ok": 1})
    assert load(path) == run
    assert json.loads(path.read_text())["summary"] == {"num_ok": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_every_request_is_a_line_of_its_own(tmp_path: pathlib.Path) -> None:
    save(RUN, path := tmp_path / "run.json")
    lines = [line for line in path.read_text().splitlines() if line.startswith('{"index"')]
    assert [json.loads(line.rstrip(","))["index"] for line in lines] == [0, 1, 2]


def test_times_are_kept_to_the_microsecond(tmp_path: pathlib.Path) -> None:
    save(run_of(request(0, 0.0, [1 / 3])), path := tmp_path / "run.json")
    assert load(path).requests[0].token_s == [0.333333]


def test_exec_time_ends_with_the_last_that_was_seen() -> None:
    unfinished = request(1, 0.5, [])
    unfinished.token_s = [2.0, 4.0]
    assert unfinished.state == "unfinished"
    assert run_of(request(0, 0.0, [1.0], sent_s=0.25), unfinished).exec_s == 3.75


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read .*: No such file"),
        ("", "is not JSON, or cut short"),
        ('{"format": "llm-serving load test, format 1", "requests": [', "is not JSON, or cut sh"),
        ("[]", "is no result of this load test"),
        ('{"format": "other"}', "is no result of this load test"),
        ('{"format": "llm-serving load test, format 1"}', "is damaged: 'requests'"),
        (
            '{"format": "llm-serving load test, format 1", "requests": [{"error": null}]}',
            "is damaged: .*missing",
        ),
    ],
)
def test_a_file_that_is_no_result_is_named_with_what_is_wrong(
    tmp_path: pathlib.Path, content: str | None, sentence: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultFileError, match="run.json" if content else sentence) as caught:
        load(path)
    assert caught.match(sentence)
