from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

import acc_allclose
from llm_serving.precision import tolerances
from llm_serving.precision.manifest import ManifestEntry
from llm_serving.precision.manifest_writer import ManifestWriter
from llm_serving.precision.naming import file_name, key_of, keys_of, prefix_digest
from llm_serving.precision.tolerances import Tolerance

VOCAB_SIZE = 40
_NEEDED = ("numpy", "rich", "pygments", "markdown_it", "mdurl")  # rich, and what rich imports
WILD = [1, 7523, 278, 1494, 14880, 322]  # the ids behind the two keys that users know
WHOLE, FLOATS = "17523278149414880322", "1.07523.0278.01494.0"

Logits = npt.NDArray[np.float32]
Run = Callable[..., tuple[int, str]]


def prefix(seed: int, length: int, begin: Sequence[int] = ()) -> npt.NDArray[np.int32]:
    rest = np.random.default_rng(seed).integers(0, 32000, length)
    rest[: len(begin)] = begin
    return rest.astype(np.int32)


def logits_of(seed: int) -> Logits:
    return (np.random.default_rng(seed).standard_normal(VOCAB_SIZE) * 8).astype(np.float32)


def save(folder: pathlib.Path, name: str, logits: object) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / name, np.asarray(logits), allow_pickle=False)
    return folder / name


class Pen:
    """Writes files and their lines of the manifest, one microsecond apart."""

    def __init__(self, folder: pathlib.Path, **labels: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.labels, self.time_s = folder, labels, 1722435014.0

    def write(
        self, ids: npt.NDArray[np.int32], logits: Logits, *, float_key: bool = True
    ) -> pathlib.Path:
        self.time_s += 1e-6
        key = keys_of(ids.tolist())[float_key]
        name = file_name(self.time_s, key, len(ids) - 1)
        if self.labels:
            writer = ManifestWriter(self.folder)
            labels = {"source": "server", **self.labels}
            entry = ManifestEntry(
                name, key, len(ids) - 1, ids, prefix_digest(ids), self.time_s, **labels
            )
            writer.append(entry)
            writer.close()
        return save(self.folder, name, logits)


@pytest.fixture
def base(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "base"


@pytest.fixture
def new(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "new"


@pytest.fixture
def run(base: pathlib.Path, new: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Compare; exit code and what was printed."""

    def compare(*flags: str) -> tuple[int, str]:
        code = acc_allclose.main(["--base_path", str(base), "--new_path", str(new), *flags])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return compare


def last_line(output: str) -> str:
    return output.rstrip("\n").rpartition("\n")[2]


def failures(output: str) -> str:
    return output.partition("\nfailed (")[2]


# ---- the story of the 214 files


def story() -> list[npt.NDArray[np.int32]]:
    """The prefixes of 107 requests at positions 100 and 200; the first is that of the two keys."""
    requests = [prefix(i, 201, WILD if i == 0 else ()) for i in range(107)]
    return [ids[: position + 1] for ids in requests for position in (100, 200)]


@pytest.fixture
def baseline(base: pathlib.Path) -> list[pathlib.Path]:
    """Every second file is named by the digits of integer ids, the others by those of floats."""
    pen = Pen(base)
    made = [pen.write(ids, logits_of(i), float_key=i % 2 == 0) for i, ids in enumerate(story())]
    made[0] = made[0].rename(base / f"1722435014.2383034_{FLOATS}_100.npy")
    made[1] = made[1].rename(base / f"1722435014.2383035_{WHOLE}_200.npy")
    return made


def write_new(new: pathlib.Path, **labels: str) -> list[pathlib.Path]:
    pen, random = Pen(new, **labels), np.random.default_rng(1)
    return [
        pen.write(ids, logits_of(i) + random.uniform(-1e-3, 1e-3, VOCAB_SIZE).astype(np.float32))
        for i, ids in enumerate(story())
    ]


@pytest.mark.parametrize("labels", [{}, {"dtype": "bfloat16"}], ids=["by name", "by manifest"])
def test_a_baseline_in_both_spellings_matches_completely(
    baseline: list[pathlib.Path], new: pathlib.Path, run: Run, labels: dict[str, str]
) -> None:
    assert len(baseline) == 214
    write_new(new, **labels)
    code, output = run()
    assert last_line(output) == "214/214 passed"
    assert code == 0
    assert "ambiguous" not in output
    assert "without a partner" not in output
    assert "top-1 the same in 214 of 214" in output


def test_an_error_in_one_logit_of_one_file_fails_it(
    baseline: list[pathlib.Path], new: pathlib.Path, run: Run
) -> None:
    spoilt = write_new(new)[77]
    logits = np.load(spoilt)
    logits[17] += 0.1
    save(new, spoilt.name, logits)
    code, output = run()
    assert (code, last_line(output)) == (1, "213/214 passed")
    assert "failed (1):" in output
    assert failures(output).count(".npy") == 1
    assert f"{baseline[77].name}: 1 of 40 logits differ" in failures(output)
    assert "the first at index 17" in failures(output)
    first_row = next(line for line in output.splitlines() if "FAILED" in line)
    assert baseline[77].name in first_row


def test_a_swapped_pair_fails_both(
    baseline: list[pathlib.Path], new: pathlib.Path, run: Run
) -> None:
    made = write_new(new)
    made[10].rename(new / "x")
    made[20].rename(made[10])
    (new / "x").rename(made[20])
    code, output = run()
    assert (code, last_line(output)) == (1, "212/214 passed")
    assert "failed (2):" in output
    assert baseline[10].name in failures(output)
    assert baseline[20].name in failures(output)


def test_a_missing_file_fails(baseline: list[pathlib.Path], new: pathlib.Path, run: Run) -> None:
    write_new(new)[33].unlink()
    code, output = run()
    assert (code, last_line(output)) == (1, "213/214 passed")
    assert f"{baseline[33].name}: no file of its key and position in {new}" in failures(output)


# ---- pairing


def test_by_both_manifests_equal_beginnings_are_told_apart(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    """Their keys are the same; by name alone they would be paired in the wrong order."""
    prefixes = [prefix(i, 101, WILD * 2) for i in range(3)]
    old_pen, new_pen = Pen(base, dtype="float32"), Pen(new, dtype="float32")
    for i in (0, 1, 2):
        old_pen.write(prefixes[i], logits_of(i))
    for i in (2, 0, 1):
        new_pen.write(prefixes[i], logits_of(i))
    code, output = run()
    assert (code, last_line(output)) == (0, "3/3 passed")
    assert "ambiguous" not in output
    (base / "manifest.jsonl").unlink()
    code, output = run()
    assert (code, last_line(output)) == (1, "0/3 passed")
    assert "ambiguous, paired in the order of their times (1):" in output


def test_by_one_manifest_a_key_is_derived_for_the_other_side(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    """The float keys of both are equal, the integer keys are not: the ids know both."""
    begin = [1, 7523, 278, 1494]
    one, two = prefix(0, 101, [*begin, 14880, 322]), prefix(0, 101, [*begin, 29900, 322])
    assert keys_of(one.tolist())[1] == keys_of(two.tolist())[1]
    old_pen, new_pen = Pen(base), Pen(new, dtype="float32")
    old_pen.write(one, logits_of(1), float_key=False)
    old_pen.write(two, logits_of(2), float_key=False)
    new_pen.write(two, logits_of(2))
    new_pen.write(one, logits_of(1))
    code, output = run()
    assert (code, last_line(output)) == (0, "2/2 passed")
    assert "ambiguous" not in output


@pytest.mark.parametrize("manifests", [False, True])
def test_equally_many_candidates_are_paired_in_time_order_and_reported(
    base: pathlib.Path, new: pathlib.Path, run: Run, manifests: bool
) -> None:
    labels = {"dtype": "float32"} if manifests else {}
    ids = prefix(0, 101)
    old_pen, new_pen = Pen(base, **labels), Pen(new, **labels)
    made = [(old_pen.write(ids, logits_of(i)), new_pen.write(ids, logits_of(i))) for i in range(3)]
    code, output = run()
    assert (code, last_line(output)) == (0, "3/3 passed")
    if manifests:
        assert "1 prefixes occur more than once in both" in output
    else:
        assert f"{made[2][0].name} with {made[2][1].name}" in output


def test_time_is_a_number_not_a_text(base: pathlib.Path, new: pathlib.Path, run: Run) -> None:
    for folder in (base, new):
        save(folder, "9.5_12_100.npy", logits_of(1))
        save(folder, "10.5_12_100.npy", logits_of(2))
    save(new, "9.5_12_100.npy", logits_of(1))
    (new / "9.5_12_100.npy").rename(new / "100.25_12_100.npy")
    (new / "10.5_12_100.npy").rename(new / "200.25_12_100.npy")
    assert run()[0] == 0


def test_more_candidates_on_one_side_fail_by_name(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    ids = prefix(0, 101)
    old_pen, new_pen = Pen(base), Pen(new)
    ours = [old_pen.write(ids, logits_of(0)) for _ in range(2)]
    theirs = [new_pen.write(ids, logits_of(0)) for _ in range(3)]
    code, output = run()
    assert (code, last_line(output)) == (1, "0/2 passed")
    for path in ours:
        assert f"{path.name}: no certain partner: 2 in the baseline fit 3 new ones" in output
    assert all(path.name in output for path in theirs)


def test_a_prefix_match_of_different_keys_is_reported(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    begin = [1, 7523, 278, 1494]
    one, two = prefix(0, 101, [*begin, 14880, 322]), prefix(0, 101, [*begin, 29900, 322])
    old_pen, new_pen = Pen(base), Pen(new)
    for i, ids in enumerate((one, two)):
        old_pen.write(ids, logits_of(i), float_key=False)
        new_pen.write(ids, logits_of(i))
    code, output = run()
    assert (code, last_line(output)) == (0, "2/2 passed")
    assert f"different keys {FLOATS}, {WHOLE}, 17523278149429900322 at position 100" in output


def test_equal_keys_are_paired_before_prefixes_of_them(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    begin = [1, 7523, 278, 1494]
    one, two = prefix(0, 101, [*begin, 14880, 322]), prefix(0, 101, [*begin, 29900, 322])
    old_pen, new_pen = Pen(base), Pen(new)
    old_pen.write(one, logits_of(1), float_key=False)
    old_pen.write(two, logits_of(2), float_key=False)
    new_pen.write(two, logits_of(2))  # in time order this would be the partner of `one`
    new_pen.write(one, logits_of(1), float_key=False)
    code, output = run()
    assert (code, last_line(output)) == (0, "2/2 passed")


def test_the_order_of_time_decides_where_equal_keys_leave_what_cannot_be(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    """Equal float keys of different texts: paired first, they would leave two integer keys."""
    begin = [1, 7523, 278, 1494]
    one, two = prefix(0, 101, [*begin, 14880, 322]), prefix(0, 101, [*begin, 29900, 322])
    old_pen, new_pen = Pen(base), Pen(new)
    old_pen.write(one, logits_of(1))
    old_pen.write(two, logits_of(2), float_key=False)
    new_pen.write(one, logits_of(1), float_key=False)
    new_pen.write(two, logits_of(2))
    code, output = run()
    assert (code, last_line(output)) == (0, "2/2 passed")


def test_another_text_behind_the_same_key_is_explained(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    Pen(base, dtype="float32").write(prefix(0, 101, WILD * 2), logits_of(0))
    theirs = Pen(new, dtype="float32").write(prefix(1, 101, WILD * 2), logits_of(0))
    code, output = run()
    assert (code, last_line(output)) == (1, "0/1 passed")
    assert "the texts went apart (llm-serving baseline --from" in output
    assert f"new files without a partner (1):\n  {theirs.name}" in output


def test_a_new_file_without_partner_is_listed_and_no_failure(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    for folder in (base, new):
        Pen(folder).write(prefix(0, 101), logits_of(0))
    more = Pen(new).write(prefix(1, 101), logits_of(0))
    save(new, "strange.npy", logits_of(0))
    code, output = run()
    assert (code, last_line(output)) == (0, "1/1 passed")
    assert f"new files without a partner (2):\n  {more.name}\n  strange.npy" in output


def test_a_baseline_file_that_nothing_names_fails(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    for folder in (base, new):
        save(folder, "strange.npy", logits_of(0))
        Pen(folder).write(prefix(0, 101), logits_of(0))
    code, output = run()
    assert (code, last_line(output)) == (1, "1/2 passed")
    assert "strange.npy: its name is not <time>_<key>_<position>.npy" in failures(output)


def test_a_baseline_file_of_which_only_the_manifest_is_left_fails(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    for folder in (base, new):
        pen = Pen(folder, dtype="float32")
        first = pen.write(prefix(0, 101), logits_of(0))
        pen.write(prefix(1, 101), logits_of(0))
    (base / first.name).unlink()
    code, output = run()
    assert (code, last_line(output)) == (1, "1/2 passed")
    assert f"{first.name}: {base}/manifest.jsonl names it, but it is not there" in output


def test_what_a_broken_line_described_is_paired_by_name(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    for folder in (base, new):
        pen = Pen(folder, dtype="float32")
        for i in range(3):
            pen.write(prefix(i, 101), logits_of(i))
    lines = (new / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:100] + b"\n"
    foreign = [b"\n", b"[]\n", b'"x"\n', b'{"file": 1}\n', b"[" * 5000 + b"\n", b"\xff\n"]
    lines += [*foreign, b'{"file": "x", "position": 0, "token_ids": [4294967296]}\n']
    lines += [b'{"file": "x", "position": 0, "token_ids": [1], "digest": "00"}']
    (new / "manifest.jsonl").write_bytes(b"".join(lines))
    code, output = run()
    assert (code, last_line(output)) == (0, "3/3 passed")
    assert "manifest.jsonl: 8 broken (line 2, 5, 6, 7, 8, ...)" in output


# ---- what a file may hold


@pytest.mark.parametrize("shape", [(VOCAB_SIZE,), (1, VOCAB_SIZE), (1, 1, VOCAB_SIZE)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_shapes_and_floats_that_compare(
    base: pathlib.Path, new: pathlib.Path, run: Run, shape: tuple[int, ...], dtype: str
) -> None:
    logits = logits_of(0).astype(np.float16)
    save(base, "1.5_12_100.npy", logits.astype(dtype).reshape(shape))
    save(new, "2.5_12_100.npy", logits.astype(np.float32))
    code, output = run("--atol", "0", "--rtol", "0")
    assert code == 0, output
    stated = f"1 baseline files are {np.dtype(dtype).name}; compared in float64"
    assert (stated in output) == (dtype[1:] != "f4")


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


BODY = logits_of(0).tobytes()
WHOLE_FILE = header(f"({VOCAB_SIZE},)") + BODY


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"hello", "is no .npy file"),
        (WHOLE_FILE[:7], "is cut inside its header"),
        (WHOLE_FILE[:20], "is cut inside its header"),
        (WHOLE_FILE[:-5], "is cut: 155 bytes of numbers where its header says 160"),
        (WHOLE_FILE + b"x", "is broken: 161 bytes of numbers where its header says 160"),
        (header("(10**15,)") + BODY, "its header makes no sense"),
        (header("(1000000000000000,)") + BODY, "is cut: 160 bytes of numbers where"),
        (header("(" * 4000) + BODY, "its header makes no sense"),
        (header("-" * 9000 + "1") + BODY, "its header makes no sense"),
        (header("(-40,)") + BODY, "holds no numbers"),
        (header("(40, 1)") + BODY, "has the shape (40, 1), not (V,), (1, V) or (1, 1, V)"),
        (header("(2, 20)") + BODY, "has the shape (2, 20)"),
        (header("()") + BODY[:4], "has the shape ()"),
        (header("(0,)"), "holds no numbers"),
        (header("(80,)", "<i2") + BODY, "holds '<i2', not float16, float32 or float64"),
        (header("(80,)", "|V2") + BODY, "bfloat16 must be saved as float32"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + BODY, "is broken: a header of 4294967295 bytes"),
    ],
)
@pytest.mark.parametrize("side", ["base", "new"])
def test_a_file_that_holds_no_logits_fails_by_name(
    base: pathlib.Path, new: pathlib.Path, run: Run, content: bytes, why: str, side: str
) -> None:
    for folder in (base, new):
        save(folder, "1.5_12_100.npy", logits_of(0))
        save(folder, "1.5_34_100.npy", logits_of(0))
    spoilt = {"base": base, "new": new}[side] / "1.5_34_100.npy"
    spoilt.write_bytes(content)
    code, output = run()
    assert (code, last_line(output)) == (1, "1/2 passed")
    assert "failed (1):\n  1.5_34_100.npy: " in output
    assert why in failures(output)
    assert ("its new file" in failures(output)) == (side == "new")


@pytest.mark.parametrize("side", ["base", "new"])
@pytest.mark.parametrize("how", ["object array", "plain pickle"])
def test_a_pickled_file_fails_with_the_lines_that_convert_its_folder(
    base: pathlib.Path, new: pathlib.Path, run: Run, how: str, side: str
) -> None:
    for folder in (base, new):
        save(folder, "1.5_12_100.npy", logits_of(0))
    path = {"base": base, "new": new}[side] / "1.5_12_100.npy"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(logits_of(0)))
    else:
        boxed = np.empty((), object)
        boxed[()] = logits_of(0)
        np.save(path, boxed, allow_pickle=True)
    code, output = run()
    assert (code, last_line(output)) == (1, "0/1 passed")
    assert "pickled" in failures(output)
    lines = output.partition("for example) is installed:\n\n")[2].partition("\n\n")[0]
    program = "\n".join(line[4:] for line in lines.splitlines())
    exec(compile(program, "converts", "exec"), {})
    assert run()[0] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sides", ["base", "new", "base new"])
def test_what_is_not_finite_fails_even_if_both_sides_have_it(
    base: pathlib.Path, new: pathlib.Path, run: Run, value: float, sides: str
) -> None:
    for name, folder in (("base", base), ("new", new)):
        logits = logits_of(0)
        if name in sides:
            logits[[7, 9]] = value
        save(folder, "1.5_12_100.npy", logits)
    code, output = run()
    assert (code, last_line(output)) == (1, "0/1 passed")
    what = "a NaN" if np.isnan(value) else "an infinity"
    assert f"holds {what} at index 7 (2 in all are not finite)" in failures(output)


def test_another_vocabulary_fails(base: pathlib.Path, new: pathlib.Path, run: Run) -> None:
    save(base, "1.5_12_100.npy", logits_of(0))
    save(new, "2.5_12_100.npy", logits_of(0)[:-1])
    code, output = run()
    assert code == 1
    assert "1.5_12_100.npy: has 40 logits, its new file 2.5_12_100.npy 39" in output


def test_what_is_no_file_fails(base: pathlib.Path, new: pathlib.Path, run: Run) -> None:
    for folder in (base, new):
        save(folder, "1.5_12_100.npy", logits_of(0))
    (new / "1.5_12_100.npy").unlink()
    os.mkfifo(new / "1.5_12_100.npy")
    code, output = run()
    assert code == 1
    assert "its new file 1.5_12_100.npy is not a file" in output


# ---- figures, tolerances, report


def test_the_figures_are_those_of_a_hand_computed_pair(
    base: pathlib.Path, new: pathlib.Path, run: Run, tmp_path: pathlib.Path
) -> None:
    """softmax is (2/8, 2/8, 4/8) in the baseline and (2/8, 5/8, 1/8) now."""
    save(base, "1.5_12_100.npy", np.log(np.array([1, 1, 2], np.float32)))
    save(new, "2.5_12_100.npy", np.log(np.array([1, 2.5, 0.5], np.float32)))
    code, _ = run("--save", str(tmp_path / "report.json"))
    assert code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    (pair,) = report["compared"]
    assert pair["max_error"] == pytest.approx(np.log(4))
    assert pair["mean_error"] == pytest.approx(np.log(4 * 2.5) / 3)
    assert pair["kl"] == pytest.approx(np.log(2 / 5) / 4 + np.log(4) / 2)
    assert (pair["same_top1"], pair["num_beyond"], pair["first_index"]) == (False, 2, 1)
    assert (pair["base"], pair["new"], pair["position"]) == (
        "1.5_12_100.npy",
        "2.5_12_100.npy",
        100,
    )
    assert (report["passed"], report["files"], list(report["failed"])) == (0, 1, [pair["base"]])


@pytest.mark.parametrize(
    ("flags", "error", "passes"),
    [
        ((), 4.9e-3, True),
        ((), 5.2e-3, False),
        (("--atol", "0.01"), 9.9e-3, True),
        (("--atol", "0.01"), 10.2e-3, False),
        (("--atol", "0", "--rtol", "0.001"), 9.9e-3, True),  # of 10
        (("--atol", "0", "--rtol", "0.001"), 10.2e-3, False),
    ],
)
def test_a_logit_passes_within_atol_and_rtol(
    base: pathlib.Path,
    new: pathlib.Path,
    run: Run,
    flags: tuple[str, ...],
    error: float,
    passes: bool,
) -> None:
    save(base, "1.5_12_100.npy", np.full(4, 10.0))
    save(new, "1.5_12_100.npy", np.array([10, 10, 10 - error, 10]))
    assert run(*flags)[0] == (0 if passes else 1)


def test_with_a_manifest_the_documented_tolerance_counts(
    base: pathlib.Path, new: pathlib.Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {
        ("float32", "*", "*"): Tolerance(0.001, 0),
        ("bfloat16", "*", "*"): Tolerance(0.5, 0),
        ("bfloat16", "Q4_1", "*"): Tolerance(0.2, 0),
    }
    monkeypatch.setattr(tolerances, "TOLERANCES", table)
    ids = prefix(0, 101)
    reference = {"dtype": "float32", "weights": "Q4_1", "kernels": "eager"}
    Pen(base, source="transformers", **reference).write(ids, np.zeros(4, np.float32))
    Pen(new, dtype="bfloat16", weights="Q4_1", kernels="reference").write(
        ids, np.full(4, 0.1, np.float32)
    )
    code, output = run()
    assert code == 0
    assert output.startswith(
        "tolerance: atol 0.2, rtol 0, documented, for 1 files "
        "(server bfloat16 Q4_1 reference against transformers float32 Q4_1 eager)\n"
    )
    code, output = run("--atol", "0.05")
    assert code == 1
    assert output.startswith("tolerance: atol 0.05, rtol 0, as asked for, for 1 files")


def test_of_an_undocumented_dtype_the_default_counts(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    for folder, dtype in ((base, "float32"), (new, "int3")):
        Pen(folder, dtype=dtype).write(prefix(0, 101), logits_of(0))
    assert "tolerance: atol 0.005, rtol 1e-05, default" in run()[1]


def test_the_first_position_of_a_request_that_differs_is_said(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    """Two requests with the same prompt, and one of their own beginning."""
    common = prefix(0, 301)
    branches = [np.concatenate([common[:150], prefix(i, 151)]).astype(np.int32) for i in (1, 2)]
    wanted = [common[:101], branches[0][:201], branches[0], branches[1][:201], prefix(3, 101)]
    for folder in (base, new):
        pen = Pen(folder, dtype="float32")
        for i, ids in enumerate(wanted):
            wrong = folder == new and i in (1, 2)
            pen.write(ids, logits_of(i) + np.float32(wrong))
    code, output = run()
    assert (code, last_line(output)) == (1, "3/5 passed")
    listed = output.partition("failing requests (1):\n")[2].partition("\n\n")[0]
    assert listed == (
        f"  {key_of(common)}: first beyond the tolerance at position 200 "
        "(2 of 3 positions, 100 to 300)"
    )


def test_files_of_another_model_are_warned_of(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    for folder, digest in ((base, "aaaa"), (new, "bbbb")):
        pen = Pen(folder, dtype="float32", model="m", model_digest=digest)
        pen.write(prefix(0, 101), logits_of(0))
    assert (
        "warning: the baseline is of the model m (aaaa), the new files are of m (bbbb)"
        in (run()[1])
    )


def test_the_table_shows_the_worst_and_what_failed_first(
    baseline: list[pathlib.Path], new: pathlib.Path, run: Run
) -> None:
    write_new(new)
    _, output = run("--worst", "3")
    assert "the worst 3 of 214 files" in output
    assert sum(path.name in output for path in baseline) == 3
    assert "the worst" not in run("--worst", "0")[1]


def test_the_table_names_the_files_on_a_narrow_screen_too(
    baseline: list[pathlib.Path],
    base: pathlib.Path,
    new: pathlib.Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_new(new)
    monkeypatch.setattr(acc_allclose, "Console", lambda **_: Console(width=80))
    _, output = run("--worst", "3")
    table = output.partition("the worst 3 of")[2].partition("214 pairs")[0]
    assert max(map(len, table.splitlines())) <= 80
    times = {path.name.partition("_")[0] for path in baseline}
    assert len(times & set(re.findall(r"\d+\.\d{7}", table))) == 3


def test_names_are_printed_without_what_disturbs_a_terminal(
    base: pathlib.Path, new: pathlib.Path, run: Run
) -> None:
    save(new, "1_1_1.npy", logits_of(0))
    base.mkdir()
    for raw in (b"a\x1b[2J[bold].npy", b"\xff.npy"):
        (pathlib.Path(os.fsdecode(bytes(base))) / os.fsdecode(raw)).write_bytes(b"")
    _, output = run()
    assert r"a\x1b[2J[bold].npy: its name" in output
    assert r"\xff.npy: its name" in output


# ---- nothing to compare, wrong arguments


def test_nothing_to_compare_fails(base: pathlib.Path, new: pathlib.Path, run: Run) -> None:
    base.mkdir()
    save(new, "1.5_12_100.npy", logits_of(0))
    (base / ".half.npy").write_bytes(b"")
    code, output = run()
    assert (code, last_line(output)) == (1, "0/0 passed")
    assert "nothing to compare: no .npy file in" in output


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--base_path", "nowhere", "--new_path", "."], "--base_path: nowhere is not a folder"),
        (["--base_path", ".", "--new_path", "nowhere"], "--new_path: nowhere is not a folder"),
        (["--base_path", ".", "--new_path", "."], "the same folder"),
    ],
)
def test_a_wrong_folder_is_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert acc_allclose.main(flags) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--atol", "-1"], "--atol: '-1' came; it must be a number from 0 on"),
        (["--atol", "much"], "--atol: 'much' came; it must be a number from 0 on"),
        (["--rtol", "nan"], "--rtol: 'nan' came; it must be a number from 0 on"),
        (["--worst", "-1"], "--worst: '-1' came; it must be a whole number from 0 on"),
        (["--worst", "1.5"], "--worst: '1.5' came; it must be a whole number from 0 on"),
        ([], "required: --base_path/--base-path, --new_path/--new-path"),
    ],
)
def test_a_wrong_flag_is_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    paths = ["--base_path", ".", "--new_path", "."] if flags else []
    with pytest.raises(SystemExit) as ended:
        acc_allclose.main([*paths, *flags])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("acc_allclose: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_a_report_that_cannot_be_written_is_one_sentence(
    base: pathlib.Path, new: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (base, new):
        save(folder, "1.5_12_100.npy", logits_of(0))
    flags = ["--base_path", str(base), "--new_path", str(new), "--save", "/nowhere/x.json"]
    assert acc_allclose.main(flags) == 2
    assert capsys.readouterr().err == "acc_allclose: /nowhere/x.json: No such file or directory\n"


def test_progress_is_told_when_it_takes_longer(
    base: pathlib.Path,
    new: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in (base, new):
        pen = Pen(folder)
        for i in range(10):
            pen.write(prefix(i, 101), logits_of(i))
    seconds = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    assert acc_allclose.main(["--base_path", str(base), "--new_path", str(new)]) == 0
    assert capsys.readouterr().err == "compared 1 of 10\ncompared 6 of 10\n"


# ---- as a script


def test_it_runs_from_a_checkout_in_which_nothing_is_installed(
    baseline: list[pathlib.Path], new: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Called from another folder, with numpy and rich, and nothing else, to be imported."""
    write_new(new)[3].unlink()
    site = tmp_path / "site"
    site.mkdir()
    for name in _NEEDED:
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        origin = pathlib.Path(found.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        (site / source.name).symlink_to(source)
        for libraries in source.parent.glob(f"{name}.libs"):
            (site / libraries.name).symlink_to(libraries)
    script = pathlib.Path(acc_allclose.__file__).resolve()
    command = [sys.executable, "-S", str(script), "--base_path", "base", "--new_path", str(new)]
    made = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert made.stderr == ""
    assert (made.returncode, last_line(made.stdout)) == (1, "213/214 passed")
    assert f"{baseline[3].name}: no file of its key and position" in made.stdout
