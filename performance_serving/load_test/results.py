"""What a load test leaves behind: one JSON file that holds the run and every request of it.

    Run ── options, server, clocks
      ├── requests   a RequestRecord each, in the order of the plan, the lost ones too
      ├── samples    a Sample each second: what the server said of itself, what the client saw
      └── work, bare_decode, precision   what the server counted; None: not told by this server

Every `*_s` is in seconds since the run began; `scheduled_s` is when a request was due, so that
`sent_s - scheduled_s` is the client's own lag.  Latencies count from `scheduled_s`.  The file
also has a "summary" for those who read it by eye or jq; `load` takes no notice of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "FORMAT",
    "STATES",
    "BareDecode",
    "PrecisionDump",
    "RequestError",
    "RequestRecord",
    "ResultFileError",
    "Run",
    "Sample",
    "ServerWork",
    "StepWork",
    "load",
    "save",
]

FORMAT = "llm-serving load test, format 1"
STATES = ("ok", "error", "cancelled", "impossible", "unfinished")


class ResultFileError(Exception):
    """A file that should hold a result does not; the message is one sentence for the user."""


@dataclass(slots=True)
class RequestError:
    kind: str  # connect, reset, timeout, http_503, bad_stream, cut_stream, error_event, ...
    sentence: str


@dataclass(slots=True)
class RequestRecord:
    index: int  # place in the plan, from 0
    dataset_index: int  # which entry of the data set
    prompt_digest: str  # tells whether two runs sent the same
    scheduled_s: float
    asked_tokens: int  # max_new_tokens as it was sent
    is_clipped: bool = False  # it asks for less than the data set wants, for the context is full
    is_impossible: bool = False  # the prompt alone fills the context: it was never sent
    cancel_after: int | None = None  # the client was to hang up at this token
    is_cancelled: bool = False  # and did
    sent_s: float | None = None  # None: never sent
    status: int | None = None  # of HTTP
    token_s: list[float] = field(default_factory=list)  # arrival of each event with a token
    end_s: float | None = None  # last byte, or the end that the request found
    prompt_tokens: int | None = None  # as the server counts; None if it does not say
    output_tokens: int = 0  # as the server counts, else the number of events
    finish_reason: str | None = None
    request_id: str | None = None  # x-request-id of the answer
    timing: dict[str, float] | None = None  # the server's stages, in milliseconds
    error: RequestError | None = None

    @property
    def state(self) -> str:
        """One of STATES."""
        if self.is_impossible:
            return "impossible"
        if self.error is not None:
            return "error"
        if self.is_cancelled:
            return "cancelled"
        return "unfinished" if self.end_s is None else "ok"

    @property
    def first_token_s(self) -> float | None:
        return self.token_s[0] if self.token_s else None

    @property
    def last_s(self) -> float | None:
        """The last that was seen of it; None if nothing was."""
        if self.end_s is not None:
            return self.end_s
        return self.token_s[-1] if self.token_s else None

    @property
    def lag_s(self) -> float | None:
        """How late the client itself was."""
        return None if self.sent_s is None else self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """From the scheduled time to the first token."""
        return self.token_s[0] - self.scheduled_s if self.token_s else None

    @property
    def e2e_s(self) -> float | None:
        """From the scheduled time to the last byte."""
        return None if self.end_s is None else self.end_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """(last token - first token) / (tokens - 1): time per token after the first."""
        if self.output_tokens < 2 or len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between the events of this request."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclass(slots=True)
class Sample:
    at_s: float
    in_flight: int  # requests that the client has sent and that have not ended
    running: float | None = None  # as the server says; None: not told
    waiting: float | None = None


@dataclass(slots=True)
class StepWork:
    """The steps of one kind (prefill, decode, mixed) over the run."""

    num_steps: float
    period_s: float  # sum of their periods
    num_rows: float | None = None
    num_tokens: float | None = None


@dataclass(slots=True)
class ServerWork:
    """What the counters in the server's /metrics grew by over the run; None: not told."""

    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    prefix_queries: float | None = None  # tokens
    prefix_hits: float | None = None
    preemptions: float | None = None
    steps: dict[str, StepWork] = field(default_factory=dict)  # by kind


@dataclass(slots=True)
class BareDecode:
    """Milliseconds of the bare model loop's decode step, measured by the server at its start."""

    context: int  # tokens in front of each row
    rows: dict[int, float]  # rows in the step -> milliseconds


@dataclass(slots=True)
class PrecisionDump:
    """The files of logits that the server wrote during the run (task 2)."""

    folder: str  # as the server names it, on its machine
    num_written: int
    num_failed: int
    last_error: str | None = None


@dataclass(slots=True)
class Run:
    task: int
    url: str
    api: str
    model: str
    started: str  # date and time with its zone, ISO 8601
    options: dict[str, Any] = field(default_factory=dict)  # every option, by its long name
    dataset: dict[str, Any] = field(default_factory=dict)  # path, num_entries, digest
    tokens_counted_by: str = ""
    num_planned: int = 0  # requests; fewer records than that only after Ctrl-C or in a timed run
    max_total_tokens: int | None = None  # the server's context
    info: dict[str, Any] | None = None  # the part of the server's /info that says what it is
    client_cpu_share: float | None = None  # of one core, during the run
    is_interrupted: bool = False
    requests: list[RequestRecord] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    work: ServerWork | None = None
    bare_decode: BareDecode | None = None
    precision: PrecisionDump | None = None

    @property
    def exec_s(self) -> float:
        """From the first send to the last byte; 0 if nothing was sent."""
        sent = [r.sent_s for r in self.requests if r.sent_s is not None]
        ends = [r.last_s for r in self.requests if r.last_s is not None]
        return max(ends) - min(sent) if sent and ends else 0.0


def save(run: Run, path: Path, summary: dict[str, Any] | None = None) -> None:
    """One request a line, so that text tools can read it; whole, or not there at all."""
    head: dict[str, Any] = {"format": FORMAT, "exec_s": run.exec_s, "summary": summary or {}}
    head |= asdict(run)
    requests = head.pop("requests")
    lines = ",\n".join(json.dumps(_rounded(r), ensure_ascii=False) for r in requests)
    text = json.dumps(_rounded(head), ensure_ascii=False, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{text[:-2]},\n "requests": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> Run:
    """Raises ResultFileError, which says what is wrong with the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ResultFileError(f"cannot read {path}: {exc.strerror}") from None
    except ValueError as exc:
        raise ResultFileError(f"{path} is not JSON, or cut short: {exc}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ResultFileError(f"{path} is no result of this load test: it lacks {FORMAT!r}")
    try:
        return _run(value)
    except (TypeError, KeyError, ValueError, AttributeError) as exc:
        raise ResultFileError(f"{path} is damaged: {exc}") from None


def _run(value: dict[str, Any]) -> Run:
    fields = {key: value[key] for key in Run.__slots__ if key in value}
    fields["requests"] = [_request(entry) for entry in value["requests"]]
    fields["samples"] = [Sample(**entry) for entry in value["samples"]]
    if work := value.get("work"):
        steps = {kind: StepWork(**entry) for kind, entry in work["steps"].items()}
        fields["work"] = ServerWork(**{**work, "steps": steps})
    if bare := value.get("bare_decode"):
        rows = {int(n): ms for n, ms in bare["rows"].items()}
        fields["bare_decode"] = BareDecode(bare["context"], rows)
    if precision := value.get("precision"):
        fields["precision"] = PrecisionDump(**precision)
    return Run(**fields)


def _request(entry: dict[str, Any]) -> RequestRecord:
    error = RequestError(**entry["error"]) if entry["error"] else None
    return RequestRecord(**{**entry, "error": error})


def _rounded(value: Any) -> Any:
    """Microseconds are enough, and half the file."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return value
