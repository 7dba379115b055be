"""Are pages there before somebody writes to them, as far as was asked and no further?"""

from __future__ import annotations

import mmap
import pathlib
import time

import numpy as np
import pytest

from tests.native_kernels import native_or_skip

native = native_or_skip()

POPULATE_WRITE = 23  # MADV_POPULATE_WRITE
PAGE = mmap.PAGESIZE
STEP = 1 << 20  # bytes of an array that are taken at once
PATIENCE_S = 60.0  # this much only where it never comes


def _is_known() -> bool:
    memory = mmap.mmap(-1, PAGE)
    try:
        memory.madvise(POPULATE_WRITE)
    except OSError:
        return False
    return True


needs_populate = pytest.mark.skipif(not _is_known(), reason="Linux before 5.14")


class Arrays:
    """`count` arrays behind each other in memory of their own, in pages that are never huge."""

    def __init__(self, count: int, size: int) -> None:
        self.memory = mmap.mmap(-1, count * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8).reshape(count, size)

    def are_there(self) -> list[list[int]]:
        """For each array the numbers of its pages that the system has given."""
        start, count, size = self.bytes.ctypes.data, *self.bytes.shape
        pagemap = pathlib.Path("/proc/self/pagemap")
        with pagemap.open("rb") as entries:
            entries.seek(start // PAGE * 8)
            entry = np.frombuffer(entries.read(count * size // PAGE * 8), np.uint64)
        found = (entry >> np.uint64(63)).astype(bool).reshape(count, -1)
        return [np.flatnonzero(row).tolist() for row in found]

    def wait_for(self, num_pages: int) -> list[list[int]]:
        until_s = time.monotonic() + PATIENCE_S
        while True:
            found = self.are_there()
            if sum(map(len, found)) >= num_pages or time.monotonic() > until_s:
                return found
            time.sleep(0.001)


@needs_populate
def test_the_beginnings_of_all_arrays_are_taken_in_whole_steps_and_nothing_else() -> None:
    arrays = Arrays(3, 16 * STEP)
    pages = native.PagesAhead(arrays.bytes)
    assert arrays.are_there() == [[], [], []]
    for asked, steps in ((1, 1), (2 * STEP + 1, 3), (STEP, 3), (5 * STEP, 5)):
        pages.begin_work(asked)
        pages.end_work()
        expected = list(range(steps * STEP // PAGE))
        assert arrays.wait_for(3 * len(expected)) == [expected] * 3
    del pages
    assert arrays.wait_for(0) == [expected] * 3


@needs_populate
def test_nothing_is_taken_while_there_is_work() -> None:
    arrays = Arrays(2, 8 * STEP)
    pages = native.PagesAhead(arrays.bytes)
    for _ in range(3):  # the second and third begin before the thread has waited long enough
        pages.begin_work(8 * STEP)
        time.sleep(0.05)
        assert arrays.are_there() == [[], []]
        pages.end_work()
    assert arrays.wait_for(16 * STEP // PAGE) == [list(range(8 * STEP // PAGE))] * 2


@needs_populate
def test_more_than_there_is_takes_all_of_it() -> None:
    arrays = Arrays(2, 3 * PAGE)
    pages = native.PagesAhead(arrays.bytes)
    pages.begin_work(1 << 60)
    pages.end_work()
    assert arrays.wait_for(6) == [[0, 1, 2]] * 2
    pages.begin_work(1 << 61)
    pages.end_work()


@needs_populate
def test_what_is_in_memory_stays() -> None:
    arrays = Arrays(2, 4 * STEP)
    arrays.bytes[:, : 2 * STEP : 1000] = 7
    expected = arrays.bytes.copy()
    pages = native.PagesAhead(arrays.bytes)
    pages.begin_work(4 * STEP)
    pages.end_work()
    found = arrays.wait_for(2 * 4 * STEP // PAGE)
    assert found == [list(range(4 * STEP // PAGE))] * 2
    assert np.array_equal(arrays.bytes, expected)


@needs_populate
def test_memory_that_is_not_to_be_had_ends_the_thread_and_nothing_else(
    tmp_path: pathlib.Path,
) -> None:
    size = 8 * STEP
    with (tmp_path / "bytes").open("w+b") as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
        file.truncate(0)  # nothing is behind these pages any more
    before = num_threads()
    pages = native.PagesAhead(np.frombuffer(memory, np.uint8).reshape(2, -1))
    assert num_threads() == before + 1
    pages.begin_work(PAGE)
    pages.end_work()
    until_s = time.monotonic() + PATIENCE_S
    while num_threads() > before and time.monotonic() < until_s:
        time.sleep(0.001)
    assert num_threads() == before
    pages.begin_work(2 * STEP)
    pages.end_work()


def num_threads() -> int:
    return len(list(pathlib.Path("/proc/self/task").iterdir()))
