"""Which token comes next, and how likely it was.

    logits ── log-probabilities, alternatives        (of the model, before anything below)
       └── bias, penalties ── temperature ── top_k, top_p, min_p, typical_p ── draw

A row is a function of its own logits, record, history and position: the same row gives the same
bits alone and in any company.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.agent.drawing import choose
from llm_serving.agent.logits import adjust
from llm_serving.agent.logprobs import top_tokens
from llm_serving.agent.scratch import Scratch
from llm_serving.errors import ChannelError
from llm_serving.step_arrays import StepInputs

__all__ = ["SampledColumns", "Sampler", "check_logits"]


@dataclass(frozen=True, slots=True)
class SampledColumns:
    """One entry per sampling row; see StepResult."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]  # [n, max num_logprobs], -1 where a row asked for fewer
    top_logprobs: npt.NDArray[np.float32]  # -inf there
    finite: npt.NDArray[np.bool_]


class Sampler:
    """Samples steps of at most `max_num_seqs` rows; keeps no state but memory to work in."""

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._scratch = Scratch()

    def sample(
        self,
        logits: torch.Tensor,
        inputs: StepInputs,
        last_ids: npt.NDArray[np.int32] | None,
    ) -> SampledColumns:
        """One token for each row of `logits`, [num_samples, vocab] float32, which it may overwrite.

        `last_ids` are those that the previous step drew, or None if there was none.  A row with
        a nan or an infinity among its logits, or none left to draw from after its biases and
        penalties, is not finite: it gets some valid id, and no other row notices.
        Raises ChannelError if the arrays do not fit each other.
        """
        check_logits(logits, len(inputs.sampling), self._vocab_size, self._max_num_seqs)
        with torch.inference_mode():
            return self._sample(logits.contiguous(), inputs, last_ids)

    def _sample(
        self,
        logits: torch.Tensor,
        inputs: StepInputs,
        last_ids: npt.NDArray[np.int32] | None,
    ) -> SampledColumns:
        sampling = inputs.sampling
        finite = (logits.amin(-1).isfinite() & logits.amax(-1).isfinite()).cpu().numpy()
        _blank(logits, finite)
        logprobs = torch.log_softmax(logits, dim=-1, out=self._scratch.like(logits, "logprobs"))
        top_ids, top_logprobs = top_tokens(logits, logprobs, sampling["num_logprobs"])

        finite &= self._adjust(logits, inputs, last_ids)
        positions = inputs.positions[inputs.logit_positions] + 1
        ids = choose(logits, sampling, positions, self._scratch)
        return SampledColumns(
            token_ids=ids.cpu().numpy().astype(np.int32),
            logprobs=logprobs.gather(1, ids[:, None])[:, 0].cpu().numpy(),
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            finite=finite,
        )

    def _adjust(
        self, logits: torch.Tensor, inputs: StepInputs, last_ids: npt.NDArray[np.int32] | None
    ) -> npt.NDArray[np.bool_]:
        """Biases and penalties, and which rows still have something to choose."""
        can_choose = np.ones(len(logits), np.bool_)
        changed = adjust(logits, inputs, last_ids)
        if len(changed):
            best = logits.amax(-1).cpu().numpy()  # -inf: nothing is left; inf, nan: no order
            can_choose = np.isfinite(best)
            _blank(logits, can_choose)
        return can_choose


def _blank(logits: torch.Tensor, keep: npt.NDArray[np.bool_]) -> None:
    """Let the rows that cannot be sampled be sampled after all: every token is as likely."""
    if not keep.all():
        logits[torch.from_numpy(~keep).to(logits.device)] = 0.0


def check_logits(
    logits: torch.Tensor, num_samples: int, vocab_size: int, max_num_seqs: int
) -> None:
    """Raises ChannelError unless they are float32 [num_samples, vocab_size], not too many rows."""
    expected = (num_samples, vocab_size)
    if logits.shape != expected or logits.dtype != torch.float32:
        raise ChannelError(
            f"logits are {logits.dtype} {tuple(logits.shape)}, expected float32 {expected}"
        )
    if num_samples > max_num_seqs:
        raise ChannelError(f"{num_samples} rows to sample, at most {max_num_seqs}")
