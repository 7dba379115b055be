from __future__ import annotations

import os
import pathlib

import pytest

from llm_serving.agent.processors import num_processors

AFFINITY = len(os.sched_getaffinity(0))


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A machine of 8 processors whose process lies two groups deep."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(tmp_path / "proc/self/cgroup", "0::/pod/container\n")
    return tmp_path


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def count(machine: pathlib.Path) -> int:
    return num_processors(machine / "proc", machine / "cgroup")


def test_without_a_limit_it_is_the_affinity(machine: pathlib.Path) -> None:
    assert count(machine) == 8
    write(machine / "cgroup/pod/container/cpu.max", "max 100000\n")
    assert count(machine) == 8


@pytest.mark.parametrize(
    ("quota", "right"),
    [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("1600000 100000", 8)],
)
@pytest.mark.parametrize("group", ["pod", "pod/container"])
def test_the_tightest_quota_above_the_process_counts(
    machine: pathlib.Path, group: str, quota: str, right: int
) -> None:
    write(machine / "cgroup" / group / "cpu.max", quota)
    assert count(machine) == right


def test_the_first_version_of_cgroups_is_understood(machine: pathlib.Path) -> None:
    write(machine / "proc/self/cgroup", "5:memory:/pod\n3:cpu,cpuacct:/pod\n")
    write(machine / "cgroup/cpu/pod/cpu.cfs_quota_us", "300000\n")
    write(machine / "cgroup/cpu/pod/cpu.cfs_period_us", "100000\n")
    assert count(machine) == 3
    write(machine / "cgroup/cpu/pod/cpu.cfs_quota_us", "-1\n")
    assert count(machine) == 8


def test_this_machine_has_at_least_one() -> None:
    here = num_processors(pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup"))
    assert 1 <= here <= AFFINITY
