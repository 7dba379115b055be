"""Is the cache as large as it should be, laid out as promised, and free until it is used?"""

from __future__ import annotations

import pathlib
import re

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_serving.agent.kv_cache import (
    BYTES_AHEAD,
    BYTES_AT_FIRST,
    KvCache,
    bytes_per_block,
    default_num_blocks,
)
from llm_serving.agent.memory import available_memory, available_on_host
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelConfig

CPU = torch.device("cpu")
GIB = 1 << 30
CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)


@pytest.mark.parametrize(
    ("available", "on_cpu", "num_seqs", "model_len", "expected"),
    [
        (64 * GIB, True, 4, 100, 4 * 7),  # everything that may run at once
        (GIB, True, 1000, 8192, 256),  # a quarter of what is there
        (64 * GIB, True, 10**6, 8192, 4096),  # 4 GiB on a CPU ...
        (64 * GIB, False, 10**6, 8192, 16384),  # ... and a quarter on a GPU
        (100, True, 4, 100, 1),  # never none
        (64 * GIB, True, 1, 1, 1),
    ],
)
def test_blocks_are_as_many_as_may_be_used_and_as_memory_allows(
    available: int, on_cpu: bool, num_seqs: int, model_len: int, expected: int
) -> None:
    found = default_num_blocks(
        1 << 20,
        available_bytes=available,
        on_cpu=on_cpu,
        max_num_seqs=num_seqs,
        max_model_len=model_len,
        block_size=16,
    )
    assert found == expected


@pytest.mark.skipif(
    not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this kernel has no huge pages",
)
def test_a_cache_on_the_cpu_asks_for_huge_pages() -> None:
    cache = KvCache(CONFIG, 4096, 16, torch.float32, CPU)
    start = cache.tensor.data_ptr()
    assert start % (2 << 20) == 0
    found, is_mine = "", False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(place, 16) for place in line.split()[0].split("-"))
            is_mine = begin <= start < end
        elif is_mine and line.startswith("VmFlags:"):
            found = line
    assert " hg" in found


def test_each_layer_sees_its_own_part_of_one_tensor() -> None:
    cache = KvCache(CONFIG, 5, 4, torch.bfloat16, CPU)
    assert cache.tensor.shape == (3, 2, 5, 4, 2, 8)
    assert cache.tensor.numel() * 2 == cache.num_bytes
    assert cache.num_bytes == 5 * bytes_per_block(CONFIG, 4, torch.bfloat16)
    assert cache.num_tokens == 20
    keys, values = cache.layers[2]
    assert keys.shape == values.shape == (20, 2, 8)
    cache.tensor.zero_()
    keys[4 * 3 + 1] = 1
    values[4 * 3 + 1] = 2
    assert (cache.tensor[2, 0, 3, 1] == 1).all()
    assert (cache.tensor[2, 1, 3, 1] == 2).all()
    assert cache.tensor.sum() == 16 + 32


def test_int8_has_room_for_a_scale_of_each_token_and_head() -> None:
    cache = KvCache(CONFIG, 5, 16, torch.int8, CPU)
    assert cache.tensor.shape == (3, 2, 5, 16, 2, 8 + 4)
    assert cache.num_bytes == cache.tensor.numel() == 5 * bytes_per_block(CONFIG, 16, torch.int8)
    odd = KvCache(msgspec.structs.replace(CONFIG, head_dim=6), 5, 16, torch.int8, CPU)
    assert odd.layers[2][1].shape == (80, 2, 8 + 4)  # scales at a multiple of 64 bytes of a tile


def test_memory_is_not_touched_before_it_is_used() -> None:
    num_bytes = 2 * GIB
    num_blocks = num_bytes // bytes_per_block(CONFIG, 16, torch.float32)
    before = resident_bytes()
    cache = KvCache(CONFIG, num_blocks, 16, torch.float32, CPU)
    cache.layers[0][0][1] = 1.0
    assert resident_bytes() - before < num_bytes // 16


class Module:
    """In place of the native one: how much of which arrays was asked for."""

    def PagesAhead(self, arrays: npt.NDArray[np.uint8]) -> Module:
        self.arrays, self.asked, self.works = arrays, list[int](), list[bool]()
        return self

    def begin_work(self, num_bytes: int) -> None:
        self.asked.append(num_bytes)
        self.works.append(True)

    def end_work(self) -> None:
        self.works.append(False)


def test_pages_are_asked_for_before_a_slot_is_written_and_not_long_before() -> None:
    cache = KvCache(CONFIG, 4096, 16, torch.bfloat16, CPU)
    module = Module()
    with cache.writing(0):  # of no effect yet
        pass
    cache.take_pages_ahead(module)
    assert module.arrays.ctypes.data == cache.tensor.data_ptr()
    assert module.arrays.shape == (6, cache.num_bytes // 6)
    at_first, ahead = BYTES_AT_FIRST // 6, BYTES_AHEAD // 6
    assert module.asked == [at_first]
    for slot in (0, 777, 1 << 21):
        with cache.writing(slot):
            assert module.works[-1]
        assert module.asked[-1] == max((slot + 1) * 2 * 8 * 2 + ahead, at_first)
    step = cache.writing(0)
    step.__enter__()
    assert not step.__exit__(ValueError, ValueError("of the step"), None)
    assert module.works == [True, False] * 5


def resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_cache_that_no_memory_can_hold_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache.num_blocks: 1000000000000 blocks .* GiB"):
        KvCache(CONFIG, 10**12, 16, torch.float32, CPU)


class Host:
    """Files as the kernel shows them, with 8 GiB available."""

    def __init__(self, folder: pathlib.Path, cgroup: str) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self.write("proc/self/cgroup", cgroup, folder)
        self.write("proc/meminfo", f"MemFree: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n", folder)

    def write(self, name: str, text: str, folder: pathlib.Path | None = None) -> None:
        path = (folder or self.cgroups) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def available(self) -> int:
        return available_on_host(self.proc, self.cgroups)


def test_without_a_limit_what_the_kernel_says_counts(tmp_path: pathlib.Path) -> None:
    host = Host(tmp_path, "0::/\n")
    assert host.available() == 8 * GIB
    host.write("memory.max", "max\n")
    host.write("memory.current", "5\n")
    assert host.available() == 8 * GIB


def test_a_cgroup_v2_limit_above_the_process_counts(tmp_path: pathlib.Path) -> None:
    host = Host(tmp_path, "0::/pod/inner\n")
    host.write("pod/memory.max", f"{4 * GIB}\n")
    host.write("pod/memory.current", f"{3 * GIB}\n")
    host.write("pod/memory.stat", f"anon 7\ninactive_file {GIB // 2}\n")
    host.write("pod/inner/memory.max", "max\n")
    assert host.available() == GIB + GIB // 2


def test_a_cgroup_v1_limit_counts(tmp_path: pathlib.Path) -> None:
    host = Host(tmp_path, "5:cpu:/x\n4:memory:/pod\n")
    host.write("memory/pod/memory.limit_in_bytes", f"{2 * GIB}\n")
    host.write("memory/pod/memory.usage_in_bytes", f"{GIB}\n")
    assert host.available() == GIB


def test_a_container_that_does_not_see_its_own_path_still_sees_its_limit(
    tmp_path: pathlib.Path,
) -> None:
    host = Host(tmp_path, "0::/a/path/of/the/host\n")
    host.write("memory.max", f"{2 * GIB}\n")
    host.write("memory.current", f"{3 * GIB}\n")
    assert host.available() == 0


def test_this_machine_has_memory() -> None:
    assert available_memory(CPU) > 1 << 20
