from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import pytest
from load_test.dataset import Entry, read_dataset
from load_test.errors import NotUsable
from load_test.options import parse
from load_test.plan import Plan, Size
from load_test.token_counts import FileTokens, count_sizes

from tests.tiny_tokenizer import tiny_tokenizer_path

ENTRIES = [Entry(f"prompt {i}", "word " * i) for i in range(5)]


class WordTokens:
    """Counts words; a prompt has one token more in front."""

    name = "words"

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def count(self, text: str, *, is_prompt: bool) -> int:
        self.asked.append(text)
        return len(text.split()) + is_prompt


def plan_of(outputs: Sequence[int], prompt: int | None = 10, context: int | None = None) -> Plan:
    entries = [Entry(f"prompt {i}", "") for i in range(len(outputs))]
    return Plan(entries, [Size(prompt, n) for n in outputs], context)


def written(folder: pathlib.Path, value: object) -> pathlib.Path:
    path = folder / "set.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_the_prompt_is_the_instruction_and_a_colon_and_the_input_if_there_is_one(
    tmp_path: pathlib.Path,
) -> None:
    entries = [
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing", "input": "", "output": "la"},
        {"instruction": "Dance", "output": "no"},
        {"instruction": "Rest", "input": None, "output": ""},
    ]
    dataset = read_dataset(written(tmp_path, entries))
    assert [e.prompt for e in dataset.entries] == ["Add:1 and 2", "Sing", "Dance", "Rest"]
    assert [e.output for e in dataset.entries] == ["3", "la", "no", ""]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("[{", "is not JSON"),
        ({"instruction": "a"}, "is a dict; it should be a JSON list"),
        ([], "is an empty list"),
        (["a"], "entry 0 is a str"),
        ([{"instruction": "a", "output": "b"}, {"output": "b"}], "entry 1: 'instruction' is miss"),
        ([{"instruction": "a", "output": 5}], "entry 0: 'output' is a int; it should be a text"),
        ([{"instruction": "", "output": "b"}], "entry 0 has an empty prompt"),
    ],
)
def test_a_wrong_data_set_is_named_with_its_entry(
    tmp_path: pathlib.Path, value: object, sentence: str
) -> None:
    with pytest.raises(NotUsable, match="set.json.*" + sentence):
        read_dataset(written(tmp_path, value))


def test_a_data_set_that_is_not_there_is_one_sentence(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotUsable, match=r"cannot read the data set .*none\.json: No such file"):
        read_dataset(tmp_path / "none.json")


def test_entries_are_taken_in_order_and_from_the_start_again() -> None:
    plan = plan_of([3, 4, 5])
    records = [plan.record(i, 0.0) for i in range(7)]
    assert [r.dataset_index for r in records] == [0, 1, 2, 0, 1, 2, 0]
    assert [r.asked_tokens for r in records] == [3, 4, 5, 3, 4, 5, 3]
    assert [plan.prompt(i) for i in range(4)] == ["prompt 0", "prompt 1", "prompt 2", "prompt 0"]
    assert records[0].prompt_digest == records[3].prompt_digest != records[1].prompt_digest


def test_a_tenth_of_a_request_a_second_sends_the_same_requests_as_four_tenths() -> None:
    slow, fast = (parse(["-X", x, "-T", t]) for x, t in (("0.1", "5000"), ("0.4", "1250")))
    assert slow.num_requests == fast.num_requests == 500
    for cancel_rate in (0.0, 0.3):
        plans = [
            Plan(ENTRIES, [Size(4, 9)] * len(ENTRIES), 12, cancel_rate, options.seed)
            for options in (slow, fast)
        ]
        assert [plans[0].record(i, 0.0) for i in range(500)] == [
            plans[1].record(i, 0.0) for i in range(500)
        ]


def test_a_request_that_does_not_fit_is_clipped_or_impossible_and_says_so() -> None:
    plan = plan_of([5, 6, 7], prompt=10, context=16)
    whole, exact, clipped = (plan.record(i, 0.0) for i in range(3))
    assert [r.asked_tokens for r in (whole, exact, clipped)] == [5, 6, 6]
    assert [r.is_clipped for r in (whole, exact, clipped)] == [False, False, True]
    for context in (10, 9):
        record = plan_of([5], prompt=10, context=context).record(0, 0.0)
        assert record.is_impossible
        assert not record.is_clipped
        assert record.state == "impossible"


def test_nothing_is_clipped_if_nobody_tells_the_context() -> None:
    assert plan_of([5000], prompt=None).record(0, 0.0).asked_tokens == 5000
    assert plan_of([5000], prompt=None, context=16).record(0, 0.0).asked_tokens == 5000


def test_an_empty_output_asks_for_one_token() -> None:
    record = plan_of([0], prompt=10, context=16).record(0, 0.0)
    assert record.asked_tokens == 1
    assert not record.is_clipped


def test_the_share_that_is_cut_off_is_seeded_and_each_at_a_token_of_its_own() -> None:
    plan = Plan(ENTRIES, [Size(4, 20)] * 5, None, cancel_rate=0.25, seed=1)
    cuts = [plan.record(i, 0.0).cancel_after for i in range(4000)]
    chosen = [cut for cut in cuts if cut is not None]
    assert len(chosen) / len(cuts) == pytest.approx(0.25, abs=0.02)
    assert set(chosen) == set(range(1, 20))  # never the last: that would be no cut
    assert cuts == [plan.record(i, 9.0).cancel_after for i in range(4000)]
    assert cuts[::2] != cuts[1::2]
    other = Plan(ENTRIES, [Size(4, 20)] * 5, None, cancel_rate=0.25, seed=2)
    assert cuts != [other.record(i, 0.0).cancel_after for i in range(4000)]


async def test_each_text_is_counted_once_and_progress_is_told() -> None:
    counter, told = WordTokens(), list[tuple[int, int]]()
    entries = [*ENTRIES, ENTRIES[2]]
    sizes = await count_sizes(
        entries, counter, with_prompts=True, on_progress=lambda *counts: told.append(counts)
    )
    assert sizes == [Size(3, i) for i in (0, 1, 2, 3, 4, 2)]
    assert len(counter.asked) == len(set(counter.asked)) == 10
    assert told == [(i, 10) for i in range(1, 11)]


async def test_prompts_are_not_counted_where_there_is_no_context_to_fill() -> None:
    counter = WordTokens()
    sizes = await count_sizes(ENTRIES, counter, with_prompts=False, on_progress=lambda *n: None)
    assert [size.prompt for size in sizes] == [None] * 5
    assert not any("prompt" in text for text in counter.asked)


async def test_a_count_that_fails_ends_all_of_them() -> None:
    class Broken(WordTokens):
        async def count(self, text: str, *, is_prompt: bool) -> int:
            raise NotUsable("scripted")

    with pytest.raises(NotUsable, match="scripted"):
        await count_sizes(ENTRIES, Broken(), with_prompts=True, on_progress=lambda *n: None)


async def test_a_tokenizer_file_adds_its_special_tokens_to_prompts_only(
    tmp_path: pathlib.Path,
) -> None:
    tokens = FileTokens(tiny_tokenizer_path(tmp_path, add_bos=True))
    assert await tokens.count("ab", is_prompt=False) + 1 == await tokens.count("ab", is_prompt=True)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_file_that_is_no_tokenizer_is_one_sentence(
    tmp_path: pathlib.Path, content: str | None
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NotUsable, match=r"tokenizer.*tokenizer\.json"):
        FileTokens(path)
