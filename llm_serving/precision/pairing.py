"""Which new file belongs to which file of the baseline?

By all token ids where both manifests say them; else by position and key, where the float spelling
of a key shows less than the integer spelling (see `naming.keys_match`).  Files that nothing tells
apart are paired in the order of their times if they are equally many on both sides, and reported;
if they are not, they fail by name.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llm_serving.precision.folder import Saved
from llm_serving.precision.naming import digits_of, keys_match

__all__ = ["Pair", "Pairing", "Tie", "by_time", "may_belong", "pair_up"]


@dataclass(frozen=True, slots=True)
class Pair:
    base: Saved
    new: Saved


@dataclass(frozen=True, slots=True)
class Tie:
    """Files that nothing but the order of their times tells apart."""

    pairs: list[Pair]
    same_ids: bool  # by both manifests, so that it does not matter which is which


@dataclass
class Pairing:
    pairs: list[Pair] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    failed: list[tuple[Saved, str]] = field(default_factory=list)  # of the baseline, and why
    alone: list[Saved] = field(default_factory=list)  # new files without a partner


def pair_up(base: Sequence[Saved], new: Sequence[Saved]) -> Pairing:
    """By ids where both sides know them and equally many files; then whatever may belong."""
    pairing = Pairing()
    by_ids: dict[bytes, tuple[list[Saved], list[Saved]]] = defaultdict(lambda: ([], []))
    places: dict[int, tuple[list[Saved], list[Saved]]] = defaultdict(lambda: ([], []))
    for side, files in enumerate((base, new)):
        for saved in files:
            if saved.ids is not None:
                by_ids[saved.ids][side].append(saved)
            else:
                places[saved.position][side].append(saved)
    for ours, theirs in by_ids.values():
        if len(ours) == len(theirs):
            _settle(ours, theirs, pairing, same_ids=True)
        else:
            for side, files in enumerate((ours, theirs)):
                for saved in files:
                    places[saved.position][side].append(saved)
    for ours, theirs in places.values():
        for some, others in _components(ours, theirs):
            _settle(some, others, pairing, same_ids=False)
    return pairing


def _settle(base: list[Saved], new: list[Saved], pairing: Pairing, *, same_ids: bool) -> None:
    """Pair files that may belong together, or fail them by name."""
    base, new = sorted(base, key=by_time), sorted(new, key=by_time)
    if not new:
        pairing.failed += [(saved, "no partner") for saved in base]
        return
    pairs = _exact_first(base, new) or _in_time_order(base, new)
    if not base or pairs is None:
        why = f"{len(base)} in the baseline fit {len(new)} new ones: {_some(new)}"
        pairing.failed += [(saved, f"no certain partner: {why}") for saved in base]
        pairing.alone += new
        return
    pairing.pairs += pairs
    if len(pairs) > 1:
        pairing.ties.append(Tie(pairs, same_ids))


def by_time(saved: Saved) -> tuple[float, str]:
    return saved.time, saved.path.name


def _some(files: Sequence[Saved]) -> str:
    return ", ".join(saved.name for saved in files[:3]) + (", ..." if len(files) > 3 else "")


def _in_time_order(base: Sequence[Saved], new: Sequence[Saved]) -> list[Pair] | None:
    """None if the counts do not agree, or one of the pairs cannot be one."""
    if len(base) != len(new):
        return None
    pairs = [Pair(ours, theirs) for ours, theirs in zip(base, new, strict=True)]
    return pairs if all(may_belong(pair.base, pair.new) for pair in pairs) else None


def _exact_first(base: Sequence[Saved], new: Sequence[Saved]) -> list[Pair] | None:
    """In time order among equally spelled keys, then among what is left."""
    counts = [Counter(saved.key for saved in files) for files in (base, new)]
    equal = sorted(key for key in counts[0] if counts[0][key] == counts[1][key])
    pairs: list[Pair] = []
    for key in equal:
        some = _in_time_order([s for s in base if s.key == key], [s for s in new if s.key == key])
        if some is None:
            return None
        pairs += some
    left = [[saved for saved in files if saved.key not in equal] for files in (base, new)]
    rest = _in_time_order(*left)
    return None if rest is None else pairs + rest


def may_belong(one: Saved, other: Saved) -> bool:
    if one.position != other.position:
        return False
    if one.ids is not None and other.ids is not None:
        return one.ids == other.ids
    if one.ids is None and other.ids is None:
        return keys_match(one.key, other.key)
    return bool(set(one.keys) & set(other.keys))


def _components(base: list[Saved], new: list[Saved]) -> Iterator[tuple[list[Saved], list[Saved]]]:
    """Files of one position, in groups that no possible pair connects."""
    leader = {saved: saved for saved in [*base, *new]}

    def find(saved: Saved) -> Saved:
        while leader[saved] is not saved:
            leader[saved] = saved = leader[leader[saved]]
        return saved

    for some, others in _meetings(base, new):
        for saved in [*some, *others]:
            leader[find(saved)] = find(some[0])
    groups: dict[Saved, tuple[list[Saved], list[Saved]]] = defaultdict(lambda: ([], []))
    for side, files in enumerate((base, new)):
        for saved in files:
            groups[find(saved)][side].append(saved)
    yield from groups.values()


def _meetings(base: list[Saved], new: list[Saved]) -> Iterator[tuple[list[Saved], list[Saved]]]:
    """(baseline files, new files) of which each may belong to each; neither is empty."""
    named = [_by_key(s for s in files if s.ids is None) for files in (base, new)]
    known = [_by_key(s for s in files if s.ids is not None) for files in (base, new)]
    meetings = [(named[0][key], side[key]) for key in named[0] for side in (named[1], known[1])] + [
        (known[0][key], named[1][key]) for key in known[0]
    ]
    of_ids = [_by_ids(files) for files in (base, new)]
    meetings += [(of_ids[0][ids], of_ids[1][ids]) for ids in of_ids[0]]
    for floats, whole in ((0, 1), (1, 0)):
        keys = sorted(key for key in named[whole] if "." not in key)
        for key in [key for key in named[floats] if "." in key]:
            for other in _matching(key, keys):
                sides = {floats: named[floats][key], whole: named[whole][other]}
                meetings.append((sides[0], sides[1]))
    yield from (meeting for meeting in meetings if all(meeting))


def _by_key(files: Iterable[Saved]) -> defaultdict[str, list[Saved]]:
    found: defaultdict[str, list[Saved]] = defaultdict(list)
    for saved in files:
        for key in saved.keys:
            found[key].append(saved)
    return found


def _by_ids(files: Iterable[Saved]) -> defaultdict[bytes, list[Saved]]:
    found: defaultdict[bytes, list[Saved]] = defaultdict(list)
    for saved in files:
        if saved.ids is not None:
            found[saved.ids].append(saved)
    return found


def _matching(floats: str, keys: Sequence[str]) -> list[str]:
    """Of sorted integer keys, those that match a float key."""
    digits = digits_of(floats)
    first, last = bisect.bisect_left(keys, digits), bisect.bisect_right(keys, digits + ":")
    return [key for key in keys[first:last] if keys_match(floats, key)]
