"""The bytes of the KV cache: how many blocks there are, and where each layer's keys and values lie.

Layout: [layer, 2, block, offset, head, width], keys before values.  The width is the head's
dimension; in int8, which the native kernels alone write and read, it has room for a float32 scale
of each token and head (csrc/kernels.hpp says where that lies).  The memory is taken but not
touched, so a page (of 2 MiB, where the kernel has such) costs nothing until tokens come near it;
what was never written may hold anything, NaN included.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from typing import Any

import torch

from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelConfig

__all__ = ["KvCache", "bytes_per_block", "default_num_blocks"]

MAX_BYTES_ON_CPU = 4 << 30
SHARE_OF_MEMORY = 4  # a quarter
BYTES_AT_FIRST = 384 << 20  # of pages that are taken before anything comes, where something can
BYTES_AHEAD = 64 << 20  # that are taken beyond what was written to
_HUGE = 2 << 20  # bytes of a huge page
_SCALE_BYTES = 4


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    values = 2 * config.num_key_value_heads * _width(config.head_dim, dtype) * block_size
    return config.num_hidden_layers * values * dtype.itemsize


def _width(head_dim: int, dtype: torch.dtype) -> int:
    """Numbers of a token and head."""
    return head_dim if dtype is not torch.int8 else -(-head_dim // 4) * 4 + _SCALE_BYTES


def default_num_blocks(
    block_bytes: int,
    *,
    available_bytes: int,
    on_cpu: bool,
    max_num_seqs: int,
    max_model_len: int,
    block_size: int,
) -> int:
    """Blocks for everything that may run at once, within a quarter of memory and 4 GiB on a CPU.

    At least one.
    """
    budget = available_bytes // SHARE_OF_MEMORY
    if on_cpu:
        budget = min(budget, MAX_BYTES_ON_CPU)
    wanted = max_num_seqs * -(-max_model_len // block_size)
    return max(1, min(wanted, budget // block_bytes))


class KvCache:
    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises ConfigError if the memory is not to be had."""
        heads, width = config.num_key_value_heads, _width(config.head_dim, dtype)
        shape = (config.num_hidden_layers, 2, num_blocks, block_size, heads, width)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_bytes = num_blocks * bytes_per_block(config, block_size, dtype)
        try:
            if device.type == "cpu":
                self.tensor = _huge_pages(self.num_bytes).view(dtype).view(shape)
            else:
                self.tensor = torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, OSError, OverflowError) as exc:  # RuntimeError: torch's
            raise ConfigError(
                f"kv_cache.num_blocks: {num_blocks} blocks of {block_size} tokens take "
                f"{self.num_bytes / 2**30:.1f} GiB, which is not to be had on {device}"
            ) from exc
        slots = self.tensor.view(config.num_hidden_layers, 2, -1, heads, width)
        self.layers = [(layer[0], layer[1]) for layer in slots.unbind(0)]
        self._pages: Any = None

    @property
    def num_tokens(self) -> int:
        """What the whole pool holds; a request that needs more can never be served."""
        return self.num_blocks * self.block_size

    def take_pages_ahead(self, module: Any) -> None:
        """Let a thread of the native `module` take pages before they are needed, between steps.

        Blocks that never held anything are used in their order, so it is known which come next.
        """
        arrays = self.tensor.view(torch.uint8).view(2 * len(self.layers), -1)
        self._pages = module.PagesAhead(arrays.numpy())
        with self.writing(-1):
            pass

    @contextlib.contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        """A step, which writes keys and values up to this slot."""
        if self._pages is None:
            yield
            return
        count = 2 * len(self.layers)
        each = self.num_bytes // self.num_tokens // count
        ahead = (slot + 1) * each + BYTES_AHEAD // count
        self._pages.begin_work(max(ahead, BYTES_AT_FIRST // count))
        try:
            yield
        finally:
            self._pages.end_work()


def _huge_pages(num_bytes: int) -> torch.Tensor:
    """Bytes at a multiple of 2 MiB, in pages of that size if the kernel gives any.

    One thread reads pages of 4 KiB at two thirds of the rate of these; attention of decode rows,
    which fetches ahead, takes 4 to 10 % longer over them.
    """
    memory = mmap.mmap(-1, num_bytes + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    return found[-found.data_ptr() % _HUGE :][:num_bytes]
