"""What llama.cpp makes of a model file, against a reference that is not its own.

llama-perplexity compares a model with log-probabilities that it has saved of another.  Here they
are written by us, from any reference, tokens included: so its figures and ours are of the same
tokens and positions.  In each chunk it scores the second half but for the last position.
"""

from __future__ import annotations

import pathlib
import re
import struct
import subprocess
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ConfigError

__all__ = ["CUT", "BaseFile", "Found", "ask"]

CUT = -16.0  # what the reference has below is left out of the KL divergence

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class BaseFile:
    """A reference's log-probabilities, as llama-perplexity --kl-divergence-base reads them.

    A header; all tokens; for each scored position a scale and a minimum (float32) and then every
    log-probability as a number of such scales above the minimum, in 16 bits, an even number of
    them.  The minimum is at most 16 below the largest.
    """

    def __init__(self, file: IO[bytes], chunks: Ids, vocab_size: int) -> None:
        self._file = file
        file.write(b"_logits_" + struct.pack("<Iii", chunks.shape[1], vocab_size, len(chunks)))
        file.write(chunks.astype("<i4").tobytes())

    def add(self, log_probs: Floats) -> None:
        most = log_probs.max(1, keepdims=True)
        least = np.maximum(log_probs.min(1, keepdims=True), most + np.float32(CUT))
        scale = (most - least) / np.float32(65535)
        values = np.rint((log_probs - least).clip(min=0) / scale).astype("<u2")
        head = np.hstack([scale, least]).astype("<f4").view("<u2")
        padding = np.zeros((len(values), values.shape[1] % 2), "<u2")
        self._file.write(np.hstack([head, values, padding]).tobytes())


@dataclass(frozen=True, slots=True)
class Found:
    perplexity: float
    kl: tuple[float, float]  # mean and its standard error, nats
    same_top1: float  # share of the positions


def ask(program: pathlib.Path, model: str, base: str, chunk: int, num_threads: int) -> Found:
    """Run it on a model file against a base file.  Raises ConfigError if it cannot."""
    words = [str(program), "--model", model, "--kl-divergence", "--kl-divergence-base", base]
    for flag, value in (("ctx-size", chunk), ("batch-size", chunk), ("threads", num_threads)):
        words += [f"--{flag}", str(value)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as exc:
        raise ConfigError(f"cannot run {program}: {exc.strerror}") from exc
    figures = []
    for name in (r"Mean PPL\(Q\)", "Mean +KLD", "Same top p"):
        found = re.search(rf"^{name}\s*: +([\d.]+) ± +([\d.]+)", done.stdout, re.M)
        if found is None:
            said = (done.stderr or done.stdout).strip()[-300:]
            raise ConfigError(f"{program} gave no figures for {model}: {said}")
        figures.append((float(found[1]), float(found[2])))
    (perplexity, _), kl, (percent, _) = figures
    return Found(perplexity, kl, percent / 100)
