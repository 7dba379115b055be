"""What does the user want?  The command line, checked, as one frozen object."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load_test.arrivals import num_requests
from load_test.option_parser import make_parser
from load_test.option_types import KINDS_OF_FILE, Root

__all__ = ["Options", "parse"]

_PICTURES = ("png", "html")


@dataclass(frozen=True, slots=True)
class Options:
    task: int
    rate: float | None
    duration_s: float | None
    url: str  # without a slash at its end, and without a password
    out_dir: Path
    model: str
    dataset: Path
    tokenizer: Path | None
    api: str
    burstiness: float
    concurrency: int | None  # None: open loop
    seed: int
    max_requests: int | None
    cancel_rate: float
    goodput: dict[str, float]  # ttft, tpot, e2e -> milliseconds
    slo: dict[str, float]
    warmup: int
    save: tuple[str, ...]  # of KINDS_OF_FILE
    timeout_s: float
    ignore_eos: bool
    headers: dict[str, str]

    @property
    def num_requests(self) -> int | None:
        """None: as many as a closed loop can send within the duration."""
        count = None
        if self.rate is not None and self.duration_s is not None:
            count = num_requests(self.rate, self.duration_s)
        if self.max_requests is None:
            return count
        return self.max_requests if count is None else min(count, self.max_requests)

    def as_json(self) -> dict[str, Any]:
        """Every option but the values of the headers, which can be secrets."""
        made = asdict(self) | {"headers": sorted(self.headers)}
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in made.items()
        }


def parse(argv: Sequence[str]) -> Options:
    """Ends the program with exit code 2 and a sentence if they make no sense."""
    parser = make_parser()
    given = parser.parse_args(argv)
    if (problem := _problem(given)) is not None:
        parser.error(problem)
    root: Root = given.url or Root(f"http://127.0.0.1:{given.port}", None)
    login = {} if root.authorization is None else {"Authorization": root.authorization}
    return Options(
        task=given.task,
        rate=given.rate,
        duration_s=given.duration,
        url=root.url,
        out_dir=given.out_dir,
        model=given.model,
        dataset=given.dataset,
        tokenizer=given.tokenizer,
        api=given.api,
        burstiness=given.burstiness,
        concurrency=given.concurrency,
        seed=given.seed,
        max_requests=given.max_requests,
        cancel_rate=given.cancel_rate,
        goodput=dict(given.goodput),
        slo=dict(given.slo),
        warmup=given.warmup,
        save=_files(given.save, given.plot),
        timeout_s=given.timeout,
        ignore_eos=given.ignore_eos,
        headers=login | dict(given.header),
    )


def _problem(given: argparse.Namespace) -> str | None:
    """What does not go together; None if all is well."""
    if given.concurrency is None:
        if given.rate is None or given.duration is None:
            return "-X (requests per second) and -T (seconds) are needed, or --concurrency"
    elif given.duration is None and given.max_requests is None:
        return "--concurrency needs an end: -T (seconds), or --max-requests"
    elif given.rate is not None and given.duration is None:
        return "-X needs -T: together they say how many requests there are"
    if given.rate is not None and num_requests(given.rate, given.duration) == 0:
        return f"-X {given.rate:g} over -T {given.duration:g} s makes no request: int(X*T) is 0"
    if "goodput" in dict(given.slo) and not given.goodput:
        return "--slo goodput needs --goodput, which says when a request is good"
    return None


def _files(save: Iterable[Sequence[str]] | None, plot: bool | None) -> tuple[str, ...]:
    named = [kind for kinds in save or [] for kind in kinds]
    wanted = set(named if named else KINDS_OF_FILE) - {"none"}
    if plot is not None:
        wanted = wanted | set(_PICTURES) if plot else wanted - set(_PICTURES)
    return tuple(kind for kind in KINDS_OF_FILE if kind in wanted)
