from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import pytest
from load_test.dataset import read_dataset as read_for_the_load_test
from load_test.plan import Plan as LoadPlan
from load_test.plan import Size

from llm_serving.baseline.dataset import Entry, Plan, read_dataset
from llm_serving.errors import ConfigError

HOUSE = pathlib.Path(__file__).parents[1]
SHIPPED = HOUSE / "performance_serving" / "dataset.json"


def encode(text: str, special: bool) -> Sequence[int]:
    """A token for each word, and BOS."""
    return [1] * special + [len(word) for word in text.split()]


def write(folder: pathlib.Path, value: object) -> pathlib.Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps(value))
    return path


def plan_of(entries: Sequence[Entry], **settings: int) -> Plan:
    return Plan.of(entries, encode=encode, **{"max_total_tokens": 100, **settings})


def test_a_prompt_is_the_instruction_and_the_input_where_there_is_one(
    tmp_path: pathlib.Path,
) -> None:
    rows = [
        {"instruction": "Sum up", "input": "a b", "output": "c"},
        {"instruction": "Sum up", "input": "", "output": "c"},
        {"instruction": "Sum up", "input": None, "output": "c"},
        {"instruction": "Sum up", "output": ""},
    ]
    assert read_dataset(write(tmp_path, rows)) == [
        Entry("Sum up:a b", "c"),
        Entry("Sum up", "c"),
        Entry("Sum up", "c"),
        Entry("Sum up", ""),
    ]


def test_a_prompt_has_special_tokens_and_an_answer_has_none() -> None:
    (prompt,) = plan_of([Entry("one three", "a bb ccc")]).prompts
    assert prompt.token_ids.tolist() == [1, 3, 5]
    assert prompt.max_new_tokens == 3


def test_an_empty_output_still_asks_for_a_token() -> None:
    assert plan_of([Entry("one", "")]).prompts[0].max_new_tokens == 1


def test_the_data_set_begins_again_where_it_ends() -> None:
    entries = [Entry(f"{'x' * i}", "a") for i in range(1, 4)]
    plan = plan_of(entries, max_requests=5)
    assert [prompt.num_times for prompt in plan.prompts] == [2, 2, 1]
    assert [len(plan_of(entries, max_requests=n).prompts) for n in (1, 3, 9)] == [1, 3, 3]
    assert plan_of(entries, max_requests=2).num_requests == 2


def test_what_does_not_fit_is_clipped_and_counted() -> None:
    entries = [Entry("a b c", "d e f"), Entry("a b c d e", "f"), Entry("a", "b")]
    plan = plan_of(entries, max_total_tokens=6, max_requests=5)
    assert [p.max_new_tokens for p in plan.prompts] == [2, 1]
    assert (plan.num_requests, plan.num_clipped, plan.num_impossible) == (5, 2, 2)


def test_the_number_of_new_tokens_can_be_given() -> None:
    plan = plan_of([Entry("a b", "c d e f"), Entry("a", "b")], max_new_tokens=2)
    assert [prompt.max_new_tokens for prompt in plan.prompts] == [2, 2]


def test_the_rule_is_that_of_the_load_test() -> None:
    """It imports nothing of ours and we nothing of it, so only this holds them together."""
    entries = read_dataset(SHIPPED)
    theirs = read_for_the_load_test(SHIPPED).entries
    assert [(e.prompt, e.output) for e in entries] == [(e.prompt, e.output) for e in theirs]
    sizes = [Size(len(encode(e.prompt, True)), len(encode(e.output, False))) for e in theirs]
    load = LoadPlan(theirs, sizes, max_total_tokens=60)
    num = len(entries) + 10
    records = [load.record(i, 0.0) for i in range(num)]
    plan = plan_of(entries, max_total_tokens=60, max_requests=num)
    assert plan.num_clipped == sum(record.is_clipped for record in records)
    assert plan.num_impossible == sum(record.is_impossible for record in records)
    asked = [record.asked_tokens for record in records[: len(entries)] if record.asked_tokens]
    assert [prompt.max_new_tokens for prompt in plan.prompts] == asked
    possible = sum(prompt.num_times for prompt in plan.prompts)
    assert possible == num - plan.num_impossible


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "is not a JSON list"),
        ("[]", "or it is empty"),
        ("[1]", "entry 0 is a int; the file should be a JSON list of"),
        ('[{"instruction": "a"}]', "entry 0: 'output' is missing"),
        ('[{"instruction": "a", "output": "b"}, {"output": "c"}]', "entry 1: 'instruction' is"),
        ('[{"instruction": "a", "input": 5, "output": "b"}]', "'input' is a int; it should be"),
        ('[{"instruction": "", "input": "", "output": "b"}]', "entry 0 has an empty prompt"),
        (r'[{"instruction": "\ud800", "output": "b"}]', "'instruction' holds half a character"),
    ],
)
def test_what_is_no_data_set_is_named(tmp_path: pathlib.Path, text: str, why: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_dataset(path)
    assert str(path) in str(refused.value)
    assert why in str(refused.value)


def test_a_data_set_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the data set .*: No such file"):
        read_dataset(tmp_path / "nowhere.json")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_dataset(tmp_path / "latin")
