"""The sampler over the native kernels: a row costs its digest, and a draw what may be drawn.

Same tokens for the same logits as `sampler.Sampler`, but where a softmax's last bit decides.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.agent.logits import adjust, adjusted_rows
from llm_serving.agent.sampler import SampledColumns, check_logits
from llm_serving.agent.scratch import Scratch
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.digest import Digest
from llm_serving.step_arrays import StepInputs

__all__ = ["NativeSampler"]

_GREEDY = np.frombuffer(SamplingParams().record(), np.int32)
_WORD_OF = {name: field[1] // 4 for name, field in (SAMPLING_DTYPE.fields or {}).items()}
# What makes of a greedy row another: not its seed, nor filters, which leave the likeliest.
_ASKED = [_WORD_OF["temperature"], *range(_WORD_OF["repetition_penalty"], _WORD_OF["sample_index"])]


class NativeSampler:
    """Samples steps of at most `max_num_seqs` rows; keeps no state but memory to work in."""

    def __init__(self, kernels: NativeKernels, vocab_size: int, max_num_seqs: int) -> None:
        self._vocab_size, self._max_num_seqs = vocab_size, max_num_seqs
        self._scratch = Scratch()
        self._rows = kernels.module.RowSampler(kernels.kernels, kernels.pool, vocab_size)

    @staticmethod
    def needs_logits(inputs: StepInputs) -> bool:
        """Whether any row asks for more than the likeliest id, or anybody for the logits."""
        asked = inputs.sampling.view(np.int32).reshape(-1, len(_GREEDY))[:, _ASKED]
        return bool(
            len(inputs.bias_rows) or len(inputs.wanted_logits) or (asked != _GREEDY[_ASKED]).any()
        )

    def sample(
        self,
        logits: torch.Tensor | None,
        inputs: StepInputs,
        last_ids: npt.NDArray[np.int32] | None,
        digest: Digest | None = None,
    ) -> SampledColumns:
        """As `Sampler.sample`; with what is known of the logits already.

        With it, a step that does not need logits can do without.
        """
        n = len(inputs.sampling)
        adjusted, is_adjusted = None, None
        if logits is not None:
            check_logits(logits, n, self._vocab_size, self._max_num_seqs)
            adjusted, is_adjusted = self._adjusted(logits, inputs, last_ids)
        width = min(int(inputs.sampling["num_logprobs"].max(initial=0)), self._vocab_size)
        ids, logprobs = np.empty(n, np.int32), np.empty(n, np.float32)
        finite = np.empty(n, np.uint8)
        top_ids, top_logprobs = np.empty((n, width), np.int32), np.empty((n, width), np.float32)
        if n:
            self._rows.sample(
                None if logits is None else logits.numpy(),
                adjusted,
                is_adjusted,
                inputs.sampling.view(np.uint8).reshape(n, SAMPLING_DTYPE.itemsize),
                inputs.positions[inputs.logit_positions] + np.int32(1),
                None if digest is None else digest.columns(),
                None if digest is None else digest.maxima,
                ids,
                logprobs,
                finite,
                top_ids,
                top_logprobs,
            )
        return SampledColumns(ids, logprobs, top_ids, top_logprobs, finite.view(np.bool_))

    def _adjusted(
        self, logits: torch.Tensor, inputs: StepInputs, last_ids: npt.NDArray[np.int32] | None
    ) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.uint8] | None]:
        """The logits after biases and penalties, and which rows have any; None: no row has.

        No other row is written: what is there is anybody's guess.
        """
        rows = adjusted_rows(inputs)
        if not len(rows):
            return None, None
        given, scores = logits.numpy(), self._scratch.like(logits, "adjusted").numpy()
        for row in rows:  # by numpy: torch would set threads of its own spinning beside the pool's
            scores[row] = given[row]
        adjust(torch.from_numpy(scores), inputs, last_ids)
        flags = np.zeros(len(scores), np.uint8)
        flags[rows] = 1
        return scores, flags
