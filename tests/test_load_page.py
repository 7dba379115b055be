from __future__ import annotations

import base64
import html.parser
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from load_test import html_report
from load_test.figures import figures_of
from load_test.html_requests import MAX_ROWS
from load_test.picture_style import COLOURS
from load_test.plots import draw
from load_test.results import Run

from tests.load_results import run_of
from tests.load_runs import NASTY, RUNS, eventful, lost, many, well

NUM_PICTURES = 4


class Page(html.parser.HTMLParser):
    """Tags, attributes and texts of a page; complains about tags that do not match."""

    VOID = frozenset(("meta", "input", "br", "img", "link", "hr"))

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if name := dict(attrs).get("data-figure"):
            self.figures.append((name, ""))
        if "data-state" in dict(attrs):
            self.rows.append([])
        elif tag == "td" and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "span" and "data-figure" in self.tags[-1][1]:
            name, text = self.figures[-1]
            self.figures[-1] = (name, text + data)
        if self.rows and self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data

    @property
    def names(self) -> Counter[str]:
        return Counter(tag for tag, _ in self.tags)


def page_of(run: Run, folder: Path, plots: list[Path] | None = None) -> tuple[str, Page]:
    html_report.write(run, plots or [], folder / "page.html")
    text = (folder / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The page of the eventful run."""
    return page_of(eventful(), tmp_path_factory.mktemp("page"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on them: they take most of the time."""
    monkeypatch.setattr(html_report, "pictures", lambda run: {})


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_whole_and_loads_nothing_from_elsewhere(name: str, tmp_path: Path) -> None:
    text, page = page_of(RUNS[name](), tmp_path)
    assert page.names["svg"] == NUM_PICTURES
    assert not page.names.keys() & {"link", "iframe", "img", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for attribute in ("src", "href", "xlink:href", "srcset", "action"):
            target = attributes.get(attribute)
            assert target is None or re.match(r"#|data:image/png;base64,", target), (tag, target)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    policy = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policy
    assert str(policy[0]).startswith("default-src 'none'; img-src data:;")


def test_nothing_from_the_run_becomes_markup(tmp_path: Path) -> None:
    run = eventful()
    run.model = run.started = run.tokens_counted_by = run.url = NASTY
    run.dataset = {"path": NASTY}
    run.requests[0].request_id = run.requests[0].finish_reason = NASTY
    run.requests[1].timing = {NASTY: 1.0}
    assert run.requests[6].error is not None
    run.requests[6].error.kind = NASTY
    text, page = page_of(run, tmp_path)
    assert page.names["script"] == 1
    assert page.names["img"] == 0
    assert "<script>alert" not in text
    assert page.text.count("<script>alert('1')</script>") >= 12


def test_every_figure_on_the_page_is_that_of_the_summary(made: tuple[str, Page]) -> None:
    figures = figures_of(eventful())
    summary = asdict(figures) | {"num_errors": figures.num_errors}
    page = made[1]
    for name, text in page.figures:
        value: Any = summary
        for key in name.split("."):
            value = value[key]
        shares = ("goodput.share", "prefix_hit_rate")
        expected = value * 100 if name in shares else value
        shown = text.replace(",", "")
        rounding = 0.5 * 10 ** -len(shown.partition(".")[2])
        assert float(shown) == pytest.approx(expected, abs=rounding * 1.001), name
        assert float(shown) == pytest.approx(expected, rel=0.005), f"{name} has lost digits"
    latencies = {
        f"{latency}.{statistic}"
        for latency in ("ttft", "tpot", "itl", "e2e", "lag")
        for statistic in ("mean", "p50", "p90", "p99", "max", "count")
    }
    others = {"num_ok", "num_errors", "errors.cut_stream", "errors.reset", "output_tokens_per_s"}
    others |= {"goodput.share", "prefix_hit_rate", "exec_s", "num_clipped", "num_impossible"}
    others |= {"per_token.run_ms", "per_token.server_ms", "per_token.bare_ms"}
    assert latencies | others <= {name for name, _ in page.figures}


def test_the_columns_of_the_latencies_hold_what_their_headings_say(
    made: tuple[str, Page],
) -> None:
    (table,) = re.findall(r"<h2>Latencies</h2>.*?</table>", made[0], flags=re.DOTALL)
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table)
    assert heads == ["milliseconds", "mean", "p50", "p90", "p99", "max", "of"]
    for row in table.split("<tr>")[2:]:
        name = row.partition("data-figure=")[2].partition(".")[0].strip('"')
        columns = re.findall(rf'data-figure="{name}\.(\w+)"', row)
        assert columns == [*heads[1:-1], "count"]


def test_what_could_not_be_measured_is_said_and_no_number(tmp_path: Path) -> None:
    _, page = page_of(lost(), tmp_path)
    shown = {name for name, _ in page.figures}
    assert "ttft.p50" not in shown
    assert "prefix_hit_rate" not in shown
    assert "not told by this server" in page.text
    assert "3 of 3 planned requests ended with an error" in page.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "Ended well"),
        ({"options": {"slo": {"ttft_p99": 50}}}, "Missed an objective"),
        ({"is_interrupted": True, "num_planned": 9}, "Interrupted"),
    ],
)
def test_the_verdict_stands_on_top(change: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    run = run_of(well(0, 0.0, 0.1, 0.02, 3))
    for name, value in change.items():
        setattr(run, name, value)
    text, page = page_of(run, tmp_path)
    assert f"<b>{verdict}:</b>" in text
    (kind,) = [a["class"] for _, a in page.tags if (a.get("class") or "").startswith("verdict")]
    assert kind == ("verdict" if verdict == "Ended well" else "verdict bad")


def test_every_request_has_its_row_with_its_own_times_and_error(made: tuple[str, Page]) -> None:
    page, requests = made[1], eventful().requests
    assert [row[0] for row in page.rows] == [str(r.index) for r in requests]
    assert [row[1].partition(",")[0] for row in page.rows] == [r.state for r in requests]
    assert page.rows[2][2:7] == ["2.000", "1.0", "140.0", "30.0", "320.0"]
    assert page.rows[6][-1] == f"cut_stream: {NASTY}"
    assert page.rows[9][1] == "ok, clipped"


@pytest.mark.usefixtures("no_pictures")
def test_a_very_large_run_shows_the_worst_rows_and_says_so(tmp_path: Path) -> None:
    run = many(MAX_ROWS + 500)
    run.requests[7].end_s = run.requests[7].scheduled_s + 1000
    _, page = page_of(run, tmp_path)
    indices = [int(row[0]) for row in page.rows]
    assert len(indices) == MAX_ROWS
    assert indices == sorted(indices)
    assert {7, len(run.requests) // 2} <= set(indices)
    assert f"{MAX_ROWS:,} of {MAX_ROWS + 500:,}" in page.text


def test_the_pictures_follow_the_scheme_of_the_page(made: tuple[str, Page]) -> None:
    text, _ = made
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == NUM_PICTURES
    for colour, code in COLOURS.items():
        assert not any(code in drawing for drawing in drawings)
        assert text.count(f"--{colour}: ") == 2, "one for each scheme"
    assert "prefers-color-scheme: dark" in text
    assert re.search(r"#[0-9a-f]{6}\b", "".join(drawings)) is None


def test_ids_are_unique_and_every_reference_finds_its_own(made: tuple[str, Page]) -> None:
    text, page = made
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert references
    assert references <= set(ids)


def test_the_pngs_come_along_for_saving(tmp_path: Path) -> None:
    run = run_of(well(0, 0.0, 0.1, 0.02, 3))
    paths = list(draw(run, tmp_path))
    _, page = page_of(run, tmp_path, paths)
    links = {str(a["download"]): str(a["href"]) for tag, a in page.tags if tag == "a"}
    assert list(links) == [path.name for path in paths]
    for path in paths:
        assert base64.b64decode(links[path.name].partition(",")[2]) == path.read_bytes()


def test_the_stages_of_the_server_are_listed_in_its_order(made: tuple[str, Page]) -> None:
    text, page = made
    heads = re.findall(r'<th scope="row">(\w+)</th>', text)
    first = heads.index("queue")
    assert heads[first : first + 3] == ["queue", "prefill", "decode"]
    assert "Where a request spent its time in the server" in page.text
