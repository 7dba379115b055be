"""How far may a logit be from its baseline?  The documented tolerances, and which one counts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from llm_serving.precision.manifest import Labels

__all__ = ["DEFAULT", "TOLERANCES", "Asked", "Tolerance", "documented"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A logit passes if |new - base| <= atol + rtol * |base|."""

    atol: float
    rtol: float
    origin: str = "documented"


DEFAULT = Tolerance(5e-3, 1e-5, "default")

# What is documented in docs/precision.md, against transformers in float32 with the same weights.
# (dtype, weights, kernels) as the manifest has them, "*" for any; the most particular row counts.
TOLERANCES: dict[tuple[str, str, str], Tolerance] = {
    ("float32", "*", "*"): Tolerance(5e-4, 1e-5),
    ("float32", "Q4_1", "native (avx512)"): Tolerance(4.0, 1e-5),
    ("float32", "Q4_1", "native (avx2)"): Tolerance(4.0, 1e-5),
    ("float32", "Q4_1", "native (amx)"): Tolerance(4.0, 1e-5),  # avx512's kernel
    ("float32", "Q4_1, int8 cache", "*"): Tolerance(2.5, 1e-5),
    ("float32", "Q4_1 as float32, int8 cache", "*"): Tolerance(2.0, 1e-5),
    ("bfloat16", "*", "*"): Tolerance(2.5, 1e-5),
    ("bfloat16", "Q4_1 as bfloat16", "*"): Tolerance(0.75, 1e-5),
    ("bfloat16", "Q4_1 as bfloat16, int8 cache", "*"): Tolerance(1.5, 1e-5),
    ("bfloat16", "Q4_1 as int8", "*"): Tolerance(7.0, 1e-5),
    ("bfloat16", "Q4_1 as int8, int8 cache", "*"): Tolerance(7.5, 1e-5),
}


def documented(labels: Labels | None) -> Tolerance:
    """The default if nothing is documented of what made the logits, or it is not known."""
    if labels is not None:
        for weights, kernels in itertools.product((labels.weights, "*"), (labels.kernels, "*")):
            if (found := TOLERANCES.get((labels.dtype, weights, kernels))) is not None:
                return found
    return DEFAULT


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says of the tolerance; None: not given."""

    atol: float | None = None
    rtol: float | None = None

    def tolerance(self, *sides: Labels | None) -> Tolerance:
        """Of one pair: what was asked for, else the looser of what is documented of its sides."""
        known = [documented(side) for side in sides if side is not None] or [DEFAULT]
        found = max(known, key=lambda each: each.atol)
        if self.atol is None and self.rtol is None:
            return found
        atol = found.atol if self.atol is None else self.atol
        return Tolerance(atol, found.rtol if self.rtol is None else self.rtol, "as asked for")
