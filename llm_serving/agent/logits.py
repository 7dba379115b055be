"""What changes the logits of a row before anything is drawn: biases and penalties.

In this order, in place: logit bias, repetition penalty (prompt and output), frequency and
presence penalty (output only).  A row that asks for none of them is not touched.  Ids that the
model has no logit for are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.errors import ChannelError
from llm_serving.step_arrays import StepInputs

__all__ = ["adjust", "adjusted_rows"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _History:
    """What was said before, one entry per occurrence."""

    rows: Ints
    ids: Ints
    is_output: npt.NDArray[np.bool_]

    def where(self, keep: npt.NDArray[np.bool_]) -> _History:
        return _History(self.rows[keep], self.ids[keep], self.is_output[keep])


def adjusted_rows(inputs: StepInputs) -> Ints:
    """The samples that ask for a bias or a penalty, in ascending order."""
    asked = _repeats(inputs.sampling) | _counts(inputs.sampling)
    asked[inputs.bias_rows] = True
    return np.flatnonzero(asked)


def adjust(
    logits: torch.Tensor, inputs: StepInputs, last_ids: npt.NDArray[np.int32] | None
) -> Ints:
    """Apply biases and penalties to `logits` [num_samples, vocab], contiguous.

    Returns the `adjusted_rows`; no other row is read or written.
    Raises ChannelError if a penalty needs an id of a previous step that there was not.
    """
    sampling = inputs.sampling
    repeats, counts = _repeats(sampling), _counts(sampling)
    if len(inputs.bias_rows):
        _add_bias(logits, inputs)
    if repeats.any() or counts.any():
        history = _history(inputs, repeats | counts, last_ids)
        history = history.where((history.ids >= 0) & (history.ids < logits.shape[1]))
        _penalise_repetition(logits, history.where(repeats[history.rows]), sampling)
        _penalise_counts(logits, history.where(counts[history.rows] & history.is_output), sampling)
    return adjusted_rows(inputs)


def _repeats(sampling: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    return np.asarray(sampling["repetition_penalty"] != 1)


def _counts(sampling: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    return np.asarray((sampling["presence_penalty"] != 0) | (sampling["frequency_penalty"] != 0))


def _history(
    inputs: StepInputs, wanted: npt.NDArray[np.bool_], last_ids: npt.NDArray[np.int32] | None
) -> _History:
    """The histories of the `wanted` samples, with the id that the previous step has just drawn."""
    starts = inputs.history_starts.astype(np.int64)
    rows = np.repeat(np.arange(len(wanted)), np.diff(starts))
    place = np.arange(len(rows)) - starts[rows]
    is_output = place >= inputs.history_prompt_lens[rows]
    step_rows = np.searchsorted(inputs.query_starts, inputs.logit_positions, side="right") - 1
    sources = inputs.sources[step_rows]
    flying = np.flatnonzero(wanted & (sources >= 0))
    if len(flying) and (last_ids is None or sources[flying].max() >= len(last_ids)):
        raise ChannelError("a penalty needs the ids of the previous step, and there are none")
    flying_ids = last_ids[sources[flying]] if last_ids is not None else flying
    num, total = len(rows), len(rows) + len(flying)
    history = _History(np.empty(total, np.int64), np.empty(total, np.int64), np.ones(total, bool))
    history.rows[:num], history.rows[num:] = rows, flying
    history.ids[:num], history.ids[num:] = inputs.history_ids, flying_ids
    history.is_output[:num] = is_output
    return history


def _add_bias(logits: torch.Tensor, inputs: StepInputs) -> None:
    known = (inputs.bias_ids >= 0) & (inputs.bias_ids < logits.shape[1])
    places = _places(logits, inputs.bias_rows[known], inputs.bias_ids[known])
    places, nth = np.unique(places, return_inverse=True)
    values = _read(logits, places)
    np.add.at(values, nth, inputs.bias_values[known])  # one after another
    _write(logits, places, values)


def _penalise_repetition(
    logits: torch.Tensor, history: _History, sampling: npt.NDArray[np.void]
) -> None:
    """Keskar et al., "CTRL" (2019), as transformers does it: what repeats writes the same value."""
    places = _places(logits, history.rows, history.ids)
    penalty = sampling["repetition_penalty"][history.rows]
    before = _read(logits, places)
    _write(logits, places, np.where(before < 0, before * penalty, before / penalty))


def _penalise_counts(
    logits: torch.Tensor, history: _History, sampling: npt.NDArray[np.void]
) -> None:
    """OpenAI's definition: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    places, counts = np.unique(_places(logits, history.rows, history.ids), return_counts=True)
    rows = places // logits.shape[1]
    minus = counts * sampling["frequency_penalty"][rows] + sampling["presence_penalty"][rows]
    _write(logits, places, _read(logits, places) - minus.astype(np.float32))


def _places(
    logits: torch.Tensor, rows: npt.NDArray[np.integer], ids: npt.NDArray[np.integer]
) -> Ints:
    return rows.astype(np.int64) * logits.shape[1] + ids


def _read(logits: torch.Tensor, places: Ints) -> Floats:
    """A copy.  By numpy where it can: for some thousands torch would wake threads of its own."""
    if logits.device.type == "cpu":
        return logits.view(-1).numpy()[places]
    return logits.take(torch.from_numpy(places).to(logits.device)).cpu().numpy()


def _write(logits: torch.Tensor, places: Ints, values: Floats) -> None:
    """Of places that repeat, all values must be the same."""
    if logits.device.type == "cpu":
        logits.view(-1).numpy()[places] = values
    else:
        on = logits.device
        logits.put_(torch.from_numpy(places).to(on), torch.from_numpy(values).to(on))
