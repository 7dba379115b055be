"""Are our logits the baseline's?  Compares two folders of .npy files, pair by pair.

    python acc_allclose.py --base_path file_npy_base --new_path file_npy

A file is called <time>_<key>_<position>.npy and holds the logits behind one token; a manifest.jsonl
beside it says which token ids it stands for.  Files are paired by those ids where both folders say
them, else by key and position (see `keys_match`).  The last line is `213/214 passed`.

Exit code: 0 if every baseline file passed, 1 if one did not or there was nothing to compare, 2 for
wrong arguments.  Nothing is ever unpickled.  One file that needs numpy and rich alone, so that it
can be copied to wherever the files are.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Saved", "keys_match", "keys_of", "main", "may_belong", "pair_up"]

Floats = npt.NDArray[np.float64]


# ---- tolerances --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A logit passes if |new - base| <= atol + rtol * |base|."""

    atol: float
    rtol: float
    origin: str = "documented"


DEFAULT = Tolerance(5e-3, 1e-5, "default")

# What is documented in docs/precision.md, against transformers in float32 with the same weights.
# (dtype, weights, kernels) as the manifest has them, "*" for any; the most particular row counts.
TOLERANCES: dict[tuple[str, str, str], Tolerance] = {
    ("float32", "*", "*"): Tolerance(5e-4, 1e-5),
    ("bfloat16", "*", "*"): Tolerance(2.5, 1e-5),
}


def documented(labels: Labels | None) -> Tolerance:
    """The default if nothing is documented of what made the logits, or it is not known."""
    if labels is not None:
        for weights, kernels in itertools.product((labels.weights, "*"), (labels.kernels, "*")):
            if (found := TOLERANCES.get((labels.dtype, weights, kernels))) is not None:
                return found
    return DEFAULT


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says of the tolerance; None: not given."""

    atol: float | None = None
    rtol: float | None = None

    def tolerance(self, *sides: Labels | None) -> Tolerance:
        """Of one pair: what was asked for, else the looser of what is documented of its sides."""
        known = [documented(side) for side in sides if side is not None] or [DEFAULT]
        found = max(known, key=lambda each: each.atol)
        if self.atol is None and self.rtol is None:
            return found
        atol = found.atol if self.atol is None else self.atol
        return Tolerance(atol, found.rtol if self.rtol is None else self.rtol, "as asked for")


# ---- keys --------------------------------------------------------------------------------------

KEY_LENGTH = 20


def keys_of(ids: Sequence[int]) -> tuple[str, str]:
    """The key of these ids in both spellings: digits of integers, and of floats."""
    first = ids[:KEY_LENGTH]
    whole, floats = "".join(map(str, first)), "".join(f"{i}.0" for i in first)
    return whole[:KEY_LENGTH], floats[:KEY_LENGTH]


def digits_of(key: str) -> str:
    """What a key says of the integers' digits.

    In the float spelling every point is followed by the one 0 that belongs to it, then by the next
    id: "10.07.0" is 10 and 7, never 1 and 07.  So dropping each ".0" from the left leaves the
    digits of the ids.  A key that was cut may end in ".", which is dropped, too, or inside an id,
    whose digits so far are kept: what is left is always a beginning of the integers' digits.
    """
    return key.replace(".0", "").removesuffix(".")


def keys_match(one: str, other: str) -> bool:
    """Can both be the key of the same ids?

    Equal spellings are cut alike, so only equal keys match.  A float key shows fewer digits than an
    integer key of the same length: its digits must begin the integer's, and be all of them if it
    was so short that nothing was cut.
    """
    if ("." in one) == ("." in other):
        return one == other
    floats, whole = (one, other) if "." in one else (other, one)
    if len(floats) < KEY_LENGTH:
        return digits_of(floats) == whole
    return whole.startswith(digits_of(floats))


# ---- what lies in a folder ---------------------------------------------------------------------

MANIFEST = "manifest.jsonl"
_NAME = re.compile(r"(?P<time>\d+(?:\.\d+)?)_(?P<key>[\d.]+)_(?P<position>\d+)\.npy", re.ASCII)


@dataclass(frozen=True, slots=True)
class Labels:
    """How logits were made, as their manifest says."""

    model: str = ""
    model_digest: str = ""
    dtype: str = ""
    weights: str = ""
    kernels: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """One file with logits, and what is known of the tokens in front of them."""

    path: pathlib.Path
    time: float
    position: int
    key: str  # as its name spells it; "" if only the manifest knows
    ids: bytes | None = None  # of the manifest: all ids up to the position, big-endian int32
    keys: tuple[str, ...] = ()  # what its name may say in either spelling
    labels: Labels | None = None

    @property
    def name(self) -> str:
        return printable(self.path.name)


@dataclass
class Folder:
    path: pathlib.Path
    files: list[Saved] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)  # neither name nor manifest says what it is
    missing: list[str] = field(default_factory=list)  # in the manifest, but not in the folder
    notes: list[str] = field(default_factory=list)
    has_manifest: bool = False


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a manifest."""

    ids: npt.NDArray[np.int32]
    labels: Labels
    time: float


def read_folder(path: pathlib.Path) -> Folder:
    """Raises OSError if the folder cannot be listed."""
    folder = Folder(path)
    lines = _read_manifest(folder)
    names = sorted(n for n in os.listdir(path) if n.endswith(".npy") and not n.startswith("."))
    for name in names:
        saved = _saved(path / name, lines.get(name))
        if saved is None:
            folder.nameless.append(name)
        else:
            folder.files.append(saved)
    folder.missing = sorted(lines.keys() - set(names))
    return folder


def _saved(path: pathlib.Path, line: _Line | None) -> Saved | None:
    named = _NAME.fullmatch(path.name)
    if line is None:
        if named is None:
            return None
        key = named["key"]
        return Saved(path, float(named["time"]), int(named["position"]), key, keys=(key,))
    time_s = float(named["time"]) if named else line.time
    key = named["key"] if named else ""
    keys = keys_of(line.ids[:KEY_LENGTH].tolist())
    ids = line.ids.astype(">i4").tobytes()
    return Saved(path, time_s, len(line.ids) - 1, key or keys[1], ids, keys, line.labels)


def _read_manifest(folder: Folder) -> dict[str, _Line]:
    """By file; broken lines become a note, and their files are paired by name."""
    lines: dict[str, _Line] = {}
    broken: list[int] = []
    try:
        with (folder.path / MANIFEST).open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    name, line = _line(json.loads(text))
                    lines[name] = line
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    broken += [number] if text.strip() else []
    except FileNotFoundError:
        return {}
    folder.has_manifest = True
    if broken:
        where = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        folder.notes.append(
            f"{folder.path}/{MANIFEST}: {len(broken)} broken (line {where}); what they described "
            "is paired by its name"
        )
    return lines


def _line(value: Any) -> tuple[str, _Line]:
    """Raises ValueError, TypeError or KeyError for anything that is no line of a manifest."""
    ids = value["token_ids"]
    if not isinstance(ids, list) or {type(i) for i in ids} != {int} or min(ids) < 0:
        raise ValueError("token_ids")
    if value["position"] != len(ids) - 1 or not isinstance(value["file"], str):
        raise ValueError("position")
    array = np.array(ids, np.int32)
    digest = value.get("digest")
    if digest is not None and digest != hashlib.sha256(array.astype("<i4").tobytes()).hexdigest():
        raise ValueError("digest")
    labels = Labels(*(str(value.get(name, "")) for name in Labels.__slots__))
    return value["file"], _Line(array, labels, float(value.get("time", 0)))


# ---- pairing -----------------------------------------------------------------------------------


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
    base, new = sorted(base, key=_by_time), sorted(new, key=_by_time)
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


def _by_time(saved: Saved) -> tuple[float, str]:
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


# ---- reading one file --------------------------------------------------------------------------

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # bytes
_FLOATS = {f"{order}f{size}" for order in "<>=" for size in (2, 4, 8)}
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_UNPICKLE = """\
A pickled baseline is never loaded here: a pickle can run any code.  If you trust it, convert it
where the framework that wrote it (MindSpore, for example) is installed:

    import glob, numpy
    for path in glob.glob({pattern!r}):
        value = numpy.load(path, allow_pickle=True)
        while getattr(value, "dtype", None) == object:
            value = value.item()
        value = value.asnumpy() if hasattr(value, "asnumpy") else value
        numpy.save(path, numpy.asarray(value, dtype="float32"))
"""


class Unreadable(Exception):
    """A file that holds no logits; says why."""

    def __init__(self, why: str, *, is_pickle: bool = False) -> None:
        super().__init__(why)
        self.is_pickle = is_pickle


@dataclass(frozen=True, slots=True)
class Header:
    dtype: np.dtype[Any]
    num_logits: int


def read_logits(path: pathlib.Path) -> tuple[Header, Floats]:
    """The logits in float64, and what they were in the file.  Raises Unreadable.

    What the header promises is believed only if the file is exactly so long.
    """
    try:
        if not path.is_file():
            raise Unreadable("is not a file" if path.exists() else "is not there")
        with path.open("rb") as file:
            header = _read_header(file)
            values = np.fromfile(file, header.dtype, header.num_logits)
    except OSError as exc:
        raise Unreadable(f"cannot be read: {exc.strerror or exc}") from exc
    if len(values) != header.num_logits:
        raise Unreadable("is cut: it became shorter while it was read")
    return header, values.astype(np.float64)


def _read_header(file: BinaryIO) -> Header:
    start = file.read(8)
    if not start:
        raise Unreadable("is empty")
    if start[:1] == b"\x80":
        raise Unreadable("is pickled", is_pickle=True)
    if not start.startswith(_MAGIC):
        raise Unreadable("is no .npy file")
    if len(start) < 8:
        raise Unreadable("is cut inside its header")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _MAX_HEADER:
        raise Unreadable(f"is broken: a header of {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise Unreadable("is cut inside its header")
    dtype, num_logits = _parse_header(text)
    expected = num_logits * dtype.itemsize
    found = os.fstat(file.fileno()).st_size - file.tell()
    if found != expected:
        what = "is cut" if found < expected else "is broken"
        raise Unreadable(f"{what}: {found} bytes of numbers where its header says {expected}")
    return Header(dtype, num_logits)


def _parse_header(text: bytes) -> tuple[np.dtype[Any], int]:
    try:
        value = ast.literal_eval(text.decode("latin1").strip())
        descr, shape = value["descr"], value["shape"]
        if not isinstance(shape, tuple) or any(type(n) is not int for n in shape):
            raise TypeError("shape")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as exc:
        raise Unreadable("is broken: its header makes no sense") from exc
    if descr == "|O":
        raise Unreadable("holds pickled objects", is_pickle=True)
    if descr not in _FLOATS:
        hint = " (bfloat16 must be saved as float32)" if str(descr).endswith("V2") else ""
        raise Unreadable(f"holds {descr!r:.40}, not float16, float32 or float64{hint}")
    if not 1 <= len(shape) <= 3 or any(n != 1 for n in shape[:-1]):
        raise Unreadable(f"has the shape {shape!r:.60}, not (V,), (1, V) or (1, 1, V)")
    if shape[-1] < 1:
        raise Unreadable("holds no numbers")
    return np.dtype(descr), shape[-1]


# ---- comparing one pair ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    pair: Pair
    tolerance: Tolerance
    max_error: float
    mean_error: float
    kl: float  # KL divergence of new from base, in nats
    same_top1: bool
    num_beyond: int  # logits beyond the tolerance
    first_beyond: int | None  # the first of them, an index into the vocabulary
    at_max: tuple[int, float, float]  # index of the largest error, base and new there
    num_logits: int

    @property
    def passed(self) -> bool:
        return self.num_beyond == 0

    @property
    def reason(self) -> str:
        if self.passed:
            return ""
        index, base, new = self.at_max
        return (
            f"{self.num_beyond} of {self.num_logits} logits differ by more than the tolerance, the "
            f"first at index {self.first_beyond}, the most at index {index}: {base:.6g} in the "
            f"baseline, {new:.6g} now"
        )


def compare(pair: Pair, tolerance: Tolerance, dtypes: Counter[str]) -> Comparison:
    """Raises Unreadable if there is nothing to compare; counts what was not float32."""
    sides = []
    for where, saved in (("baseline", pair.base), ("new", pair.new)):
        try:
            header, logits = read_logits(saved.path)
            _check_finite(logits)
        except Unreadable as exc:
            which = "" if saved is pair.base else f"its new file {saved.name} "
            raise Unreadable(f"{which}{exc}", is_pickle=exc.is_pickle) from exc
        if header.dtype.itemsize != 4:
            dtypes[f"{where} files are {header.dtype.name}"] += 1
        sides.append(logits)
    base, new = sides
    if len(base) != len(new):
        raise Unreadable(f"has {len(base)} logits, its new file {pair.new.name} {len(new)}")
    return _difference(pair, tolerance, base, new)


def _difference(pair: Pair, tolerance: Tolerance, base: Floats, new: Floats) -> Comparison:
    error = np.abs(new - base)
    beyond = np.flatnonzero(error > tolerance.atol + tolerance.rtol * np.abs(base))
    worst = int(error.argmax())
    return Comparison(
        pair,
        tolerance,
        max_error=float(error[worst]),
        mean_error=float(error.mean()),
        kl=kl_divergence(base, new),
        same_top1=bool(base.argmax() == new.argmax()),
        num_beyond=len(beyond),
        first_beyond=int(beyond[0]) if len(beyond) else None,
        at_max=(worst, float(base[worst]), float(new[worst])),
        num_logits=len(base),
    )


def _check_finite(logits: Floats) -> None:
    """No infinity of float32 passes, not even one of both sides: there is no error to measure."""
    wrong = np.flatnonzero(~(np.abs(logits) <= _FLOAT32_MAX))
    if len(wrong):
        value = "a NaN" if math.isnan(logits[wrong[0]]) else "an infinity"
        raise Unreadable(f"holds {value} at index {wrong[0]} ({len(wrong)} in all are not finite)")


def kl_divergence(base: Floats, new: Floats) -> float:
    """Of softmax(base) from softmax(new), in nats; never negative."""
    log_base, log_new = _log_softmax(base), _log_softmax(new)
    return max(0.0, float((np.exp(log_base) * (log_base - log_new)).sum()))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    log_softmax: Floats = shifted - np.log(np.exp(shifted).sum())
    return log_softmax


# ---- the whole comparison ----------------------------------------------------------------------


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
    has_pickles: bool = False

    @property
    def num_passed(self) -> int:
        return sum(each.passed for each in self.compared)

    @property
    def passed(self) -> bool:
        return 0 < self.num_files == self.num_passed


def compare_folders(base: Folder, new: Folder, asked: Asked, progress: Bar) -> Result:
    pairing = pair_up(base.files, new.files)
    result = Result(
        ties=pairing.ties,
        alone=[saved.name for saved in pairing.alone] + list(map(printable, new.nameless)),
        notes=[*base.notes, *new.notes, *_notes_on_models(base, new)],
        num_files=len(base.files) + len(base.nameless) + len(base.missing),
    )
    result.failures += _unpaired(base, new, pairing)
    dtypes: Counter[str] = Counter()
    with progress:
        for done, pair in enumerate(sorted(pairing.pairs, key=lambda p: _by_time(p.base))):
            progress.show(done, len(pairing.pairs))
            try:
                tolerance = asked.tolerance(pair.base.labels, pair.new.labels)
                made = compare(pair, tolerance, dtypes)
            except Unreadable as exc:
                result.failures.append(Failure(pair.base.name, str(exc)))
                result.has_pickles |= exc.is_pickle
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
    gone = f"{base.path}/{MANIFEST} names it, but it is not there"
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


# ---- the report --------------------------------------------------------------------------------

_MAX_LISTED = 100


def printable(name: str) -> str:
    """A file name without what would disturb a terminal."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_report(result: Result, base: Folder, worst: int, console: Console) -> None:
    def say(line: str = "") -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for line in [*result.notes, *_tolerance_lines(result.compared)]:
        say(line)
    if result.compared:
        if worst:
            say()
            console.print(_table(result.compared, worst))
        say(_summary(result.compared))
    _say_list(say, "failing requests", _request_lines(result.compared))
    _say_list(say, "ambiguous, paired in the order of their times", _tie_lines(result.ties))
    repeated = sum(tie.same_ids for tie in result.ties)
    if repeated:
        say(f"\n{repeated} prefixes occur more than once in both; paired in the order of time")
    _say_list(say, "new files without a partner", result.alone)
    _say_list(say, "failed", [f"{each.name}: {each.reason}" for each in result.failures])
    if result.has_pickles:
        say("\n" + _UNPICKLE.format(pattern=f"{base.path}/*.npy"))
    if not result.num_files:
        say(f"nothing to compare: no .npy file in {printable(str(base.path))}")
    say()
    say(f"{result.num_passed}/{result.num_files} passed")


def _say_list(say: Any, title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    say(f"\n{title} ({len(lines)}):")
    for line in lines[:_MAX_LISTED]:
        say(f"  {line}")
    if len(lines) > _MAX_LISTED:
        say(f"  ... and {len(lines) - _MAX_LISTED} more (--save writes all of them)")


def _tolerance_lines(compared: Sequence[Comparison]) -> list[str]:
    """Which tolerance was used for how many files, and what they are."""
    used: Counter[tuple[Tolerance, str]] = Counter()
    for each in compared:
        sides = (each.pair.base.labels, each.pair.new.labels)
        of = " against ".join("no manifest" if s is None else _describe(s) for s in sides[::-1])
        used[each.tolerance, "" if sides == (None, None) else f" ({of})"] += 1
    return [
        f"tolerance: atol {tolerance.atol:g}, rtol {tolerance.rtol:g}, {tolerance.origin}, "
        f"for {num} files{of}"
        for (tolerance, of), num in used.items()
    ]


def _describe(labels: Labels) -> str:
    known = (labels.source, labels.dtype, labels.weights, labels.kernels)
    return " ".join(filter(None, known)) or "a manifest without labels"


def _table(compared: Sequence[Comparison], worst: int) -> Table:
    table = Table(title=f"the worst {min(worst, len(compared))} of {len(compared)} files")
    table.add_column("baseline file", overflow="fold")
    for name in ("max error", "mean error", "KL", "top-1", "beyond", "first index", ""):
        table.add_column(name, justify="right", no_wrap=True)
    ranked = sorted(compared, key=lambda each: (each.passed, -each.max_error))
    for each in ranked[:worst]:
        first = "-" if each.first_beyond is None else str(each.first_beyond)
        table.add_row(
            Text(each.pair.base.name),
            f"{each.max_error:.3g}",
            f"{each.mean_error:.3g}",
            f"{each.kl:.3g}",
            "same" if each.same_top1 else "other",
            str(each.num_beyond),
            first,
            "ok" if each.passed else "FAILED",
        )
    return table


def _summary(compared: Sequence[Comparison]) -> str:
    same = sum(each.same_top1 for each in compared)
    count = len(compared)
    return (
        f"{count} pairs compared: max error {max(each.max_error for each in compared):.3g}, "
        f"mean error {sum(each.mean_error for each in compared) / count:.3g}, "
        f"mean KL {sum(each.kl for each in compared) / count:.3g}, "
        f"top-1 the same in {same} of {count}"
    )


def _request_lines(compared: Sequence[Comparison]) -> list[str]:
    return [
        f"{each.key}: first beyond the tolerance at position {each.beyond[0]} "
        f"({len(each.beyond)} of {len(each.positions)} positions, {each.positions[0]} to "
        f"{each.positions[-1]})"
        for each in failing_requests(compared)
    ]


def _tie_lines(ties: Sequence[Tie]) -> list[str]:
    lines = []
    for tie in ties:
        if tie.same_ids:
            continue
        keys = sorted({saved.key for pair in tie.pairs for saved in (pair.base, pair.new)})
        pairs = "; ".join(f"{pair.base.name} with {pair.new.name}" for pair in tie.pairs[:4])
        more = f"; and {len(tie.pairs) - 4} more" if len(tie.pairs) > 4 else ""
        kind = "key" if len(keys) == 1 else "different keys"
        at = tie.pairs[0].base.position
        lines.append(f"{kind} {', '.join(keys[:4])} at position {at}: {pairs}{more}")
    return lines


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


class Bar:
    """Shows itself on stderr once the comparison has taken two seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("compared"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._next = time.monotonic() + 2.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.task_ids:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        if not self._console.is_terminal:
            self._next = now + 5.0
            self._console.print(f"compared {done} of {total}", highlight=False)
            return
        if not self._bar.task_ids:
            self._bar.add_task("compared")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)


# ---- the command -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    base, new = options.base_path, options.new_path
    if (wrong := _wrong(base, new)) is not None:
        print(f"acc_allclose: {wrong}", file=sys.stderr)
        return 2
    try:
        folders = read_folder(base), read_folder(new)
        asked = Asked(options.atol, options.rtol)
        result = compare_folders(*folders, asked, Bar(Console(stderr=True)))
        if options.save is not None:
            options.save.write_text(json.dumps(as_json(result), indent=1) + "\n")
    except OSError as exc:
        print(f"acc_allclose: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    print_report(result, folders[0], options.worst, console)
    return 0 if result.passed else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="acc_allclose.py",
        description="Compare the logits in two folders of .npy files; exit code 0 if all pass.",
        allow_abbrev=False,
    )
    for name, what in (("base", "the baseline"), ("new", "what is checked")):
        flags = f"--{name}_path", f"--{name}-path"
        parser.add_argument(*flags, type=pathlib.Path, required=True, metavar="FOLDER", help=what)
    for name, what in (("atol", "absolute"), ("rtol", "relative")):
        parser.add_argument(
            f"--{name}",
            type=_not_negative,
            help=f"{what} tolerance (default {getattr(DEFAULT, name):g}; with a manifest what is "
            "documented of its dtype, weights and kernels)",
        )
    parser.add_argument(
        "--worst", type=_count, default=10, metavar="N", help="rows of the table (default 10)"
    )
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="write a JSON report")
    return parser.parse_args(argv)


def _wrong(base: pathlib.Path, new: pathlib.Path) -> str | None:
    for flag, path in (("--base_path", base), ("--new_path", new)):
        if not path.is_dir():
            return f"{flag}: {path} is not a folder"
    if base.samefile(new):
        return f"--base_path and --new_path are the same folder, {base}: that proves nothing"
    return None


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
