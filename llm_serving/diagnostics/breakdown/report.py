"""The breakdown as text: first the tree, then a table for each kind of step, requests, transport.

What matters most in the end stands last, where a terminal shows it: what does not add up, and what
to look at first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llm_serving.diagnostics.breakdown.bare import Comparison
from llm_serving.diagnostics.breakdown.breakdown import Breakdown
from llm_serving.diagnostics.breakdown.requests import RequestFigures, Transport
from llm_serving.diagnostics.breakdown.steps import KindFigures, Spread
from llm_serving.diagnostics.breakdown.tree import Node
from llm_serving.diagnostics.page import trimmed

__all__ = ["heading", "print_breakdown"]

_PIPED_WIDTH = 100
_MOST_DEVIATION = 0.02  # of the request stages from the wall
_SLOW = "yellow"


def print_breakdown(breakdown: Breakdown, stream: TextIO | None = None) -> None:
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=_PIPED_WIDTH)
    with trimmed(console):
        for part in _parts(breakdown):
            console.print(part)
            console.print()


def _parts(b: Breakdown) -> Iterator[RenderableType]:
    yield Text("\n".join(heading(b)))
    yield _tree(b)
    yield _bare(b.bare)
    for kind in b.kinds:
        yield _kind_table(kind)
    yield _shares(b)
    if b.requests is not None:
        yield _requests(b.requests)
    if b.transport is not None:
        yield _transport(b.transport)
    if b.notes:
        yield _listed("to know", b.notes)
    yield _checks(b)
    yield _listed("what to look at first", b.advice)


def heading(b: Breakdown) -> list[str]:
    """Lines that say what was looked at, and how."""
    seen, info, load = b.observation, b.observation.info, b.observation.load
    lines = [f"llm-serving breakdown{f' of {seen.url}' if seen.url else ''}"]
    if info:
        lines.append(
            f"{info.get('model_id')}, {info.get('model_dtype')} on "
            f"{info.get('model_device_type')}, {info.get('num_threads')} threads"
        )
    if load is not None:
        lines.append(
            f"own load: {len(load.requests)} requests in {_count(load.streams, 'stream')}, "
            f"{load.prompt_tokens} tokens in, {load.new_tokens} out"
        )
    elif seen.seconds:
        lines.append(f"watched for {seen.seconds:g} s, without a load of its own")
    if b.ttft is not None:
        lines.append(f"time to first token at the client: {_spread(b.ttft)} ms")
    return lines


def _tree(b: Breakdown) -> RenderableType:
    steps, basis = _count(len(b.basis.steps), f"{b.basis.kind} step"), b.basis
    rows = "" if basis.rows is None else f" of {_count(basis.rows, 'row')}"
    title = (
        f"milliseconds per {'token' if basis.kind == 'decode' else 'step'}: means of {steps}{rows}"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for guide, depth, node in _lines(b.tree):
        style = "bold" if depth < 2 else "" if node.in_sum else "dim"
        share = f"{100 * node.ms / b.tree.ms:.1f} %"
        share = share if node.in_sum else f"({share})"
        table.add_row(Text(guide + node.name, style), Text(f"{node.ms:.3f}", style), share)
    meaning = "A decode step gives each of its rows one token: ms per step are ms per token."
    return Group(table, Text(meaning, "dim")) if basis.kind == "decode" else table


def _lines(node: Node, before: str = "", depth: int = 0) -> Iterator[tuple[str, int, Node]]:
    if depth == 0:
        yield "", 0, node
    for i, child in enumerate(node.children):
        is_last = i == len(node.children) - 1
        yield before + ("└── " if is_last else "├── "), depth + 1, child
        yield from _lines(child, before + ("    " if is_last else "│   "), depth + 1)


def _bare(bare: Comparison | str) -> RenderableType:
    if isinstance(bare, str):
        return Text(f"bare model loop: not compared: {bare}", _SLOW)
    return Group(
        Text(
            f"bare model loop {bare.bare_ms:.2f} ms, served {bare.served_ms:.2f} ms -> overhead "
            f"{bare.overhead_ms:.2f} ms ({100 * bare.overhead:+.1f} %)",
            "bold",
        ),
        Padding(Text(bare.how, "dim"), (0, 0, 0, 2)),
    )


def _kind_table(kind: KindFigures) -> RenderableType:
    title = (
        f"{_count(kind.count, f'{kind.name} step')}, {kind.rows:.1f} rows and {kind.tokens:.1f} "
        "tokens each; ms per step"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left")
    for name in ("stage", "mean", "p50", "p99", "share", "exposed", "hidden"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    period = kind.period
    for stage in kind.stages:
        share = f"{100 * stage.spread.mean / period.mean:.1f} %" if period.mean else ""
        exposed = hidden = ""
        if stage.exposed_ms is not None and stage.hidden_ms is not None:
            exposed, hidden = f"{stage.exposed_ms:.3f}", f"{stage.hidden_ms:.3f}"
            share = f"({share})"
        if stage.name == "schedule":
            table.add_row("= period", *_numbers(period), "100.0 %", style="bold")
            table.add_section()
        table.add_row(stage.name.replace("_", " "), *_numbers(stage.spread), share, exposed, hidden)
    return table


def _shares(b: Breakdown) -> RenderableType:
    shares = b.shares
    return Text(
        f"the agent's time, {shares.seconds:.2f} s: forward {100 * shares.forward:.1f} %, other "
        f"work {100 * shares.other:.1f} %, waiting for its next step {100 * shares.idle:.1f} %, "
        f"nothing to do {100 * shares.no_work:.1f} %"
    )


def _requests(requests: RequestFigures) -> RenderableType:
    source = "" if requests.is_exact else "; quantiles estimated from histograms"
    title = f"{_count(requests.count, 'request')}, ms per request{source}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left")
    for name in ("stage", "mean", "p50", "p99", "share of the wall"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, spread in requests.stages.items():
        table.add_row(name, *_numbers(spread), f"{100 * requests.share(name):.1f} %")
    table.add_section()
    total = f"{100 * requests.share(*requests.stages):.1f} %"
    table.add_row("sum", f"{requests.sum_ms:.3f}", "", "", total, style="bold")
    table.add_row("wall", f"{requests.wall_ms:.3f}", "", "", "100.0 %", style="bold")
    wall = "the client's wall" if requests.is_exact else "the server's wall (arrival to last token)"
    is_far = abs(requests.deviation) > _MOST_DEVIATION
    sentence = f"the stages differ from {wall} by {100 * requests.deviation:+.2f} %" + (
        f": more than the {100 * _MOST_DEVIATION:.0f} % that may lie outside of them"
        if is_far
        else ""
    )
    return Group(table, Text(sentence, _SLOW if is_far else ""))


def _transport(transport: Transport) -> RenderableType:
    calls = ", ".join(f"{per_step:.2f} {name}" for name, per_step in transport.calls.items())
    parts = [
        f"{_bytes(size)} {direction} in {'frames' if medium == 'frame' else 'shared memory'}"
        for (direction, medium), size in transport.bytes.items()
    ]
    return Text(f"transport per step: calls {calls or 'none'}; {', '.join(parts)}")


def _checks(b: Breakdown) -> RenderableType:
    if b.broken:
        return _listed("what must hold and does not", b.broken, "bold red")
    return Text(
        f"checked on {len(b.steps)} of {b.num_ran} steps: idle + prepare + forward + sample + "
        "result write is each period; periods and pauses add up to the time they span; exposed + "
        "hidden is each stage of the master",
        "dim",
    )


def _listed(title: str, sentences: list[str], style: str = "bold") -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    for i, sentence in enumerate(sentences):
        grid.add_row(f"{i + 1}.", sentence)
    return Group(Text(title, style), grid)


def _numbers(spread: Spread) -> tuple[str, str, str]:
    return f"{spread.mean:.3f}", f"{spread.p50:.3f}", f"{spread.p99:.3f}"


def _spread(spread: Spread) -> str:
    return f"mean {spread.mean:.1f}, p50 {spread.p50:.1f}, p99 {spread.p99:.1f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _bytes(size: float) -> str:
    return f"{size / 1024:.1f} KB" if size >= 1024 else f"{size:.0f} B"
