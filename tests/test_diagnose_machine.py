from __future__ import annotations

import pathlib
import resource
from importlib.metadata import PackageNotFoundError

import pytest

from llm_serving.diagnostics.findings import Finding, exit_code, megabytes
from llm_serving.diagnostics.machine.fitness import (
    check_clock,
    check_load,
    check_memory,
    check_processor,
    check_versions,
)
from llm_serving.diagnostics.machine.limits import check_cgroup_memory, check_cores, check_limits
from llm_serving.diagnostics.places import Places
from llm_serving.diagnostics.thresholds import THRESHOLDS, verdict_of

MB = 1024 * 1024


@pytest.fixture
def places(tmp_path: pathlib.Path) -> Places:
    """A machine that tells nothing about itself yet."""
    shm, proc, cgroups, clocks = (tmp_path / name for name in ("shm", "proc", "cgroups", "clocks"))
    return Places(shm, proc, cgroups, clocks, sockets=tmp_path / "sockets")


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(64, "64 B"), (1024, "1 KB"), (1536, "1.5 KB"), (15 * MB, "15 MB"), (2048 * MB, "2 GB")],
)
def test_bytes_are_said_in_units_of_1024(num_bytes: int, words: str) -> None:
    assert megabytes(num_bytes) == words


def test_a_figure_at_the_threshold_is_not_slow_whichever_side_is_good() -> None:
    assert [verdict_of("ping p50", us) for us in (200, 201)] == ["OK", "slow"]
    assert [verdict_of("shared memory copy", gb) for gb in (2, 1.9)] == ["OK", "slow"]


def test_only_what_is_broken_fails() -> None:
    fine = [Finding("a", "OK", ""), Finding("b", "slow", ""), Finding("c", "skipped", "")]
    assert exit_code(fine) == 0
    assert exit_code([*fine, Finding("d", "broken", "")]) == 1


def test_a_missing_package_is_named_with_where_it_belongs() -> None:
    def find(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return "1.2"

    finding = check_versions(find)
    assert finding.verdict == "broken"
    assert "torch missing" in finding.found
    assert "install torch into" in finding.cure
    assert check_versions(lambda name: "1.2").verdict == "OK"


def test_a_processor_without_vectors_is_slow_and_one_without_bf16_is_told_what_that_means(
    places: Places,
) -> None:
    info = places.proc / "cpuinfo"
    write(info, "model name : Old\nflags : sse2\n")
    assert check_processor(places).verdict == "slow"
    write(info, "model name : New\nflags : avx2 avx512_bf16 avx512_vnni\n\nmodel name : x\n")
    found = check_processor(places)
    assert (found.verdict, found.values["bf16"]) == ("OK", "avx512_bf16")
    write(info, "processor : 0\nFeatures : fp asimd asimddp\n")
    assert "float32, twice the bytes" in check_processor(places).found


@pytest.mark.parametrize("check", [check_processor, check_memory])
def test_what_the_machine_does_not_tell_is_skipped_not_broken(
    check: object, places: Places
) -> None:
    assert callable(check)
    assert check(places).verdict == "skipped"
    assert check_load(places, 2).verdict == "skipped"


def test_little_memory_is_slow_with_the_number(places: Places) -> None:
    meminfo = "MemTotal: 4194304 kB\nMemAvailable: {} kB\n"
    write(places.proc / "meminfo", meminfo.format(2 * 1024 * 1024))
    assert check_memory(places).verdict == "OK"
    write(places.proc / "meminfo", meminfo.format(512 * 1024))
    finding = check_memory(places)
    assert (finding.verdict, finding.found) == ("slow", "512 MB of 4 GB are free")
    assert finding.cure


def test_a_busy_machine_is_said_to_spoil_the_figures(places: Places) -> None:
    write(places.proc / "loadavg", "3.50 1.0 1.0 2/300 4711\n")
    assert check_load(places, 4).verdict == "OK"
    finding = check_load(places, 2)
    assert finding.verdict == "slow"
    assert "busy machine" in finding.cure


@pytest.mark.parametrize(
    ("resolution_s", "call_ns", "verdict"),
    [(1e-9, 50.0, "OK"), (4e-3, 50.0, "slow"), (1e-9, 5000.0, "slow")],
)
def test_a_coarse_or_costly_clock_is_slow(
    places: Places, resolution_s: float, call_ns: float, verdict: str
) -> None:
    write(places.clocks / "current_clocksource", "hpet\n")
    found = check_clock(places, resolution=lambda _: resolution_s, cost_ns=lambda: call_ns)
    assert found.verdict == verdict
    assert "source hpet" in found.found


@pytest.mark.parametrize(
    ("files", "verdict"), [(64, "broken"), (512, "slow"), (4096, "OK"), (-1, "OK")]
)
def test_too_few_open_files_are_found_before_the_first_client_is_refused(
    files: int, verdict: str
) -> None:
    limits = {resource.RLIMIT_NOFILE: files, resource.RLIMIT_NPROC: 4096}
    found = {f.item: f for f in check_limits(lambda kind: (limits.get(kind, 65536), -1))}
    assert found["open files"].verdict == verdict
    assert found["processes"].verdict == found["locked memory"].verdict == "OK"
    assert ("ulimit -n" in found["open files"].cure) == (verdict != "OK")


def test_too_few_processes_are_broken() -> None:
    found = {f.item: f for f in check_limits(lambda kind: (16, 16))}
    assert found["processes"].verdict == "broken"
    assert "a start needs 32" in found["processes"].found


def test_a_single_core_is_slow() -> None:
    assert check_cores(1, 8).verdict == "slow"
    assert check_cores(2, 8).verdict == "OK"


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/box", "box", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/box",
            "memory/box",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_container_that_has_little_left_is_slow_though_the_machine_has_much(
    places: Places, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    write(places.proc / "self/cgroup", f"{line}\n")
    group, (limit, usage, cached) = places.cgroups / folder, names
    write(group / limit, f"{2048 * MB}\n")
    write(group / usage, f"{1800 * MB}\n")
    write(group / "memory.stat", f"anon 5\n{cached} {100 * MB}\n")
    finding = check_cgroup_memory(places)
    assert finding.verdict == "slow"
    assert finding.found == "348 MB of 2 GB are left to this container"
    write(group / limit, "max\n")
    assert check_cgroup_memory(places).verdict == "OK"


def test_the_thresholds_in_the_docs_are_those_of_the_code() -> None:
    page = (pathlib.Path(__file__).parents[1] / "docs/troubleshooting.md").read_text()
    for name, threshold in THRESHOLDS.items():
        assert f"| {name} | {threshold.words} | {threshold.reason} |" in page
