from __future__ import annotations

import itertools
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.server.stop_strings import StopStrings


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What goes out of a whole text, and the stop string that ended it."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end - len(stop)], stop


def live_prefix(text: str, stops: list[str]) -> str:
    """The longest end of a text without a stop string that begins one."""
    starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
    return next((text[i:] for i in range(len(text)) if text[i:] in starts), "")


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    out = [matcher.push(piece) for piece in pieces]
    return "".join([*out, matcher.flush()]), matcher.found


def splits(text: str) -> list[list[str]]:
    """Every way to cut a text into pieces."""
    ways = []
    for cuts in itertools.product([False, True], repeat=max(len(text) - 1, 0)):
        at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
        ways.append([text[a:b] for a, b in itertools.pairwise(at)])
    return ways


@pytest.mark.parametrize(
    ("text", "stops", "out", "found"),
    [
        ("aaab", ["aab"], "a", "aab"),
        ("abababc", ["ababc"], "ab", "ababc"),
        ("hello\n\nyou", ["\n\n"], "hello", "\n\n"),
        ("hello\nyou", ["\n\n"], "hello\nyou", None),
        ("abc", ["b", "abc"], "a", "b"),  # complete first
        ("xabc", ["bc", "abc", "c"], "x", "abc"),  # complete together: the longest
        ("xabc", ["abcd", "bc"], "xa", "bc"),
        ("stop", ["stop"], "", "stop"),
        ("sto", ["stop"], "sto", None),
        ("\U0001f469\u200d\U0001f4bb!", ["\u200d\U0001f4bb"], "\U0001f469", "\u200d\U0001f4bb"),
        ("abc", [], "abc", None),
    ],
)
def test_at_every_split_the_same(text: str, stops: list[str], out: str, found: str | None) -> None:
    assert oracle(text, stops) == (out, found)
    for pieces in splits(text):
        assert run(pieces, stops) == (out, found)


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
)
def test_finds_what_a_search_of_the_whole_text_finds(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == oracle("".join(pieces), stops)


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=3),
)
def test_holds_back_the_live_prefix_and_no_more(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, out = StopStrings(stops), "", ""
    for piece in pieces:
        seen += piece
        out += matcher.push(piece)
        if matcher.found is not None:
            break
        held = live_prefix(seen, stops)
        assert out + held == seen
        assert matcher.is_holding() == (held != "")


def test_nothing_comes_out_after_a_stop_string() -> None:
    matcher = StopStrings(["b"])
    assert matcher.push("abab") == "a"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_what_is_held_back_comes_out_once() -> None:
    matcher = StopStrings(["stop"])
    assert matcher.push("xsto") == "x"
    assert matcher.flush() == "sto"
    assert matcher.flush() == ""
    assert not matcher.is_holding()


def test_long_periodic_stop_strings_are_found() -> None:
    rnd = random.Random(0)
    for _ in range(200):
        stop = "".join(rnd.choice(["a", "ab", "aab"]) for _ in range(rnd.randrange(1, 40)))
        text = stop[: rnd.randrange(len(stop))] + stop + "c"
        cut = rnd.randrange(len(text))
        assert run([text[:cut], text[cut:]], [stop]) == oracle(text, [stop])


def test_a_huge_stop_string_costs_only_what_has_matched() -> None:
    steps = 0

    def count(*_: object) -> object:
        nonlocal steps
        steps += 1
        return count

    matcher = StopStrings(["a" * 1_000_000])
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        matcher.push("aaa")
    finally:
        sys.settrace(None)
    assert steps < 200
    assert matcher.flush() == "aaa"
