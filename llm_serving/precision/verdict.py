"""Did the new files pass?  Two folders in; what passed, what failed and why, out."""

from __future__ import annotations

import itertools
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_serving.precision.comparing import Comparison, compare
from llm_serving.precision.folder import Folder
from llm_serving.precision.manifest import MANIFEST_NAME
from llm_serving.precision.naming import printable
from llm_serving.precision.pairing import Pairing, Tie, by_time, pair_up
from llm_serving.precision.reading import Unreadable
from llm_serving.precision.tolerances import Asked

__all__ = ["Failure", "Request", "Result", "as_json", "compare_folders", "failing_requests"]


@dataclass(frozen=True, slots=True)
class Failure:
    name: str
    reason: str


@dataclass
class Result:
    compared: list[Comparison] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)  # what passed is not here
    ties: list[Tie] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)  # new files without a partner
    notes: list[str] = field(default_factory=list)
    num_files: int = 0  # of the baseline
    pickled_in: set[pathlib.Path] = field(default_factory=set)  # folders with pickled files

    @property
    def num_passed(self) -> int:
        return sum(each.passed for each in self.compared)

    @property
    def passed(self) -> bool:
        return 0 < self.num_files == self.num_passed


def compare_folders(
    base: Folder, new: Folder, asked: Asked, on_progress: Callable[[int, int], object]
) -> Result:
    pairing = pair_up(base.files, new.files)
    result = Result(
        ties=pairing.ties,
        alone=[saved.name for saved in pairing.alone] + list(map(printable, new.nameless)),
        notes=[*base.notes, *new.notes, *_notes_on_models(base, new)],
        num_files=len(base.files) + len(base.nameless) + len(base.missing),
    )
    result.failures += _unpaired(base, new, pairing)
    dtypes: Counter[str] = Counter()
    for done, pair in enumerate(sorted(pairing.pairs, key=lambda p: by_time(p.base))):
        on_progress(done, len(pairing.pairs))
        try:
            tolerance = asked.tolerance(pair.base.labels, pair.new.labels)
            made = compare(pair, tolerance, dtypes)
        except Unreadable as exc:
            result.failures.append(Failure(pair.base.name, str(exc)))
            if exc.is_pickle and exc.folder is not None:
                result.pickled_in.add(exc.folder)
        else:
            result.compared.append(made)
            if not made.passed:
                result.failures.append(Failure(pair.base.name, made.reason))
    result.notes += [f"{num} {what}; compared in float64" for what, num in dtypes.items()]
    return result


def _unpaired(base: Folder, new: Folder, pairing: Pairing) -> list[Failure]:
    there = {(key, saved.position) for saved in new.files for key in saved.keys}
    failures = []
    for saved, why in pairing.failed:
        if why == "no partner":
            why = f"no file of its key and position in {new.path}"
            if saved.ids is not None and there & {(key, saved.position) for key in saved.keys}:
                why = (
                    "no file of the same token ids: one with its key and position has others, so "
                    "the texts went apart (llm-serving baseline --from compares equal texts)"
                )
        failures.append(Failure(saved.name, why))
    pattern = "its name is not <time>_<key>_<position>.npy, and no manifest says what it is"
    failures += [Failure(printable(name), pattern) for name in base.nameless]
    gone = f"{base.path}/{MANIFEST_NAME} names it, but it is not there"
    return failures + [Failure(printable(name), gone) for name in base.missing]


def _notes_on_models(base: Folder, new: Folder) -> list[str]:
    found = []
    for folder in (base, new):
        labels = {saved.labels for saved in folder.files if saved.labels is not None}
        found.append({(each.model_digest, each.model) for each in labels if each.model_digest})
    if all(found) and {digest for digest, _ in found[0]} != {digest for digest, _ in found[1]}:
        ours, theirs = (" and ".join(f"{m} ({d[:12]})" for d, m in sorted(each)) for each in found)
        return [f"warning: the baseline is of the model {ours}, the new files are of {theirs}"]
    return []


@dataclass(frozen=True, slots=True)
class Request:
    """Compared files of which each one's tokens begin the next one's."""

    key: str
    positions: list[int]
    beyond: list[int]  # those of them where logits were beyond the tolerance


def failing_requests(compared: Sequence[Comparison]) -> list[Request]:
    """Where the manifest says the ids: which request went wrong, and from which position on."""
    known = []
    for each in compared:
        ids = each.pair.new.ids if each.pair.base.ids is None else each.pair.base.ids
        if ids is not None:
            known.append((ids, each))
    known.sort(key=lambda item: item[0])  # a beginning sorts before what it begins
    requests: list[Request] = []
    chain: list[tuple[bytes, Comparison]] = []
    for item, following in itertools.zip_longest(known, known[1:]):
        while chain and not item[0].startswith(chain[-1][0]):
            chain.pop()
        chain.append(item)
        is_last = following is None or not following[0].startswith(item[0])
        beyond = [each.pair.base.position for _, each in chain if not each.passed]
        if is_last and beyond:
            positions = [each.pair.base.position for _, each in chain]
            requests.append(Request(item[1].pair.base.key, positions, beyond))
    return requests


def as_json(result: Result) -> dict[str, Any]:
    return {
        "passed": result.num_passed,
        "files": result.num_files,
        "compared": [
            {
                "base": each.pair.base.name,
                "new": each.pair.new.name,
                "position": each.pair.base.position,
                "passed": each.passed,
                "atol": each.tolerance.atol,
                "rtol": each.tolerance.rtol,
                "max_error": each.max_error,
                "mean_error": each.mean_error,
                "kl": each.kl,
                "same_top1": each.same_top1,
                "num_beyond": each.num_beyond,
                "first_index": each.first_beyond,
            }
            for each in result.compared
        ],
        "failed": {each.name: each.reason for each in result.failures},
        "ambiguous": [
            {
                "same_ids": tie.same_ids,
                "pairs": [[pair.base.name, pair.new.name] for pair in tie.pairs],
            }
            for tie in result.ties
        ],
        "without_partner": result.alone,
        "failing_requests": [
            {"key": each.key, "positions": each.positions, "beyond": each.beyond}
            for each in failing_requests(result.compared)
        ],
        "notes": result.notes,
    }
