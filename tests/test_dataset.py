from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

DATASET = Path(__file__).parents[1] / "performance_serving" / "dataset.json"

Entry = dict[str, str]


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    value: list[Entry] = json.loads(DATASET.read_text(encoding="utf-8"))
    return value


def test_every_entry_has_an_instruction_an_output_and_perhaps_an_input(
    entries: list[Entry],
) -> None:
    assert len(entries) >= 400
    for entry in entries:
        assert list(entry) == ["instruction", "input", "output"]
        assert all(isinstance(text, str) and text == text.strip() for text in entry.values())
        assert entry["instruction"]
        assert entry["output"]


def test_a_third_or_so_have_an_input(entries: list[Entry]) -> None:
    assert 0.25 < sum(bool(entry["input"]) for entry in entries) / len(entries) < 0.45


def test_no_prompt_and_no_long_answer_comes_twice(entries: list[Entry]) -> None:
    prompts = Counter((entry["instruction"], entry["input"]) for entry in entries)
    answers = Counter(e["output"] for e in entries if len(e["output"]) > 20)
    assert max(prompts.values()) == 1
    assert max(answers.values()) == 1


def test_no_template_is_behind_many_entries(entries: list[Entry]) -> None:
    """Digits out: "What is 3 + 4?" and "What is 5 + 6?" would be one."""
    forms = Counter(
        "".join("0" if letter.isdigit() else letter for letter in entry["instruction"])
        for entry in entries
    )
    assert max(forms.values()) <= 6


def test_lengths_reach_from_a_word_to_a_page(entries: list[Entry]) -> None:
    asked = [len(entry["instruction"].split()) for entry in entries if is_latin(entry)]
    told = [len(entry["output"].split()) for entry in entries if is_latin(entry)]
    assert min(asked) <= 3
    assert max(asked) >= 350
    assert min(told) == 1
    assert max(told) >= 280
    for shortest, longest in ((1, 3), (4, 20), (21, 60), (61, 150), (151, 400)):
        count = sum(shortest <= length <= longest for length in told)
        assert count >= 12, f"only {count} answers of {shortest} to {longest} words"


def test_there_are_many_languages_and_half_is_english(entries: list[Entry]) -> None:
    languages = Counter(language_of(entry) for entry in entries)
    assert 0.4 < languages["English"] / len(entries) < 0.75
    for language, least in {
        "Chinese": 30,
        "Japanese": 15,
        "Cyrillic": 15,
        "German": 20,
        "French": 15,
        "Spanish": 15,
        "Korean": 2,
        "Arabic": 2,
        "Devanagari": 1,
        "Greek": 1,
    }.items():
        assert languages[language] >= least, f"{language}: {languages[language]}"


@pytest.mark.parametrize("length", [20, 50, 100])
def test_any_beginning_of_the_list_is_mixed(entries: list[Entry], length: int) -> None:
    """A short run takes the first entries only."""
    first = entries[:length]
    assert len({language_of(entry) for entry in first}) >= 5
    lengths = [len(entry["output"]) for entry in first]
    assert min(lengths) < 12
    assert max(lengths) > 400
    assert 0.2 < sum(bool(entry["input"]) for entry in first) / length < 0.6


def test_it_is_small_and_holds_no_strange_characters(entries: list[Entry]) -> None:
    assert len(DATASET.read_bytes()) < 1_000_000
    letters = set("".join(text for entry in entries for text in entry.values()))
    assert {c for c in letters if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn")} <= {*"\n\t"}


def is_latin(entry: Entry) -> bool:
    return language_of(entry) in ("English", "German", "French", "Spanish")


def language_of(entry: Entry) -> str:
    """By the letters of the instruction; where they are Latin, by frequent words."""
    text = entry["instruction"]
    scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in text}
    if scripts & {"HIRAGANA", "KATAKANA"}:
        return "Japanese"
    names = {"CJK": "Chinese", "CYRILLIC": "Cyrillic", "HANGUL": "Korean", "ARABIC": "Arabic"}
    names |= {"DEVANAGARI": "Devanagari", "GREEK": "Greek", "THAI": "Thai", "HEBREW": "Hebrew"}
    for script, name in names.items():
        if script in scripts:
            return name
    words = Counter(re.findall(r"\w+", text.lower()))
    hits = {name: sum(words[word] for word in known) for name, known in WORDS.items()}
    best = max(hits, key=lambda name: hits[name])
    return best if hits[best] else "other"


WORDS = {
    name: words.split()
    for name, words in {
        "English": "the a an of to in is write what which how explain give name into with words",
        "German": "der die das den dem des ein eine einen einem was wie nenne den ins und über auf",
        "French": "le la les des une du est que en ce cette quel quels quelle donne explique",
        "Spanish": "el los una al de que la qué cuál es escribe traduce explica da si por lo",
    }.items()
}
