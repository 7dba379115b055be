from __future__ import annotations

import base64
import pathlib

import pytest
from load_test.options import Options, parse

OPEN = ("-X", "2", "-T", "10")


def given(*flags: str) -> Options:
    return parse([*OPEN, *flags])


def test_the_defaults_are_those_of_the_documentation() -> None:
    options = parse(["--task", "1", "-X", "0.625", "-T", "2400"])
    assert options.num_requests == 1500
    assert options.url == "http://127.0.0.1:8835"
    assert (options.model, options.api, options.task) == ("llama2", "tgi", 1)
    assert (options.burstiness, options.warmup, options.concurrency) == (1.0, 1, None)
    assert options.dataset.name == "dataset.json"
    assert options.out_dir == pathlib.Path(".")
    assert options.save == ("log", "json", "png", "html")


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (("-X", "2", "-T", "10", "--max-requests", "5"), 5),
        (("-X", "2", "-T", "10", "--max-requests", "50"), 20),
        (("--concurrency", "4", "-X", "2", "-T", "10"), 20),
        (("--concurrency", "4", "--max-requests", "7"), 7),
        (("--concurrency", "4", "-T", "10"), None),
    ],
)
def test_so_many_requests_are_planned(flags: tuple[str, ...], count: int | None) -> None:
    assert parse(flags).num_requests == count


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ((), "log json png html"),
        (("--save",), "log json png html"),
        (("--plot",), "log json png html"),
        (("--no-plot",), "log json"),
        (("--save", "json"), "json"),
        (("--save", "html,json", "log"), "log json html"),
        (("--save", "json", "--plot"), "json png html"),
        (("--save", "none"), ""),
        (("--save", "none", "--plot"), "png html"),
    ],
)
def test_save_and_plot_say_which_files_are_written(flags: tuple[str, ...], kinds: str) -> None:
    assert " ".join(given(*flags).save) == kinds


def test_limits_are_named_numbers() -> None:
    options = given("--goodput", "ttft:200", "tpot:50", "--slo", "ttft_p99:500", "errors:0")
    assert options.goodput == {"ttft": 200.0, "tpot": 50.0}
    assert options.slo == {"ttft_p99": 500.0, "errors": 0.0}


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:80", "http://h:80"),
        ("http://h:80/", "http://h:80"),
        ("https://h/a/v1/", "https://h/a"),
    ],
)
def test_a_url_is_the_server_s_root_without_what_the_dialect_adds(url: str, root: str) -> None:
    assert given("--url", url).url == root


@pytest.mark.parametrize(
    ("url", "root", "login"),
    [
        ("http://ann:secret@h:80/a/", "http://h:80/a", "ann:secret"),
        ("https://ann:se%2Fcret%40@h", "https://h", "ann:se/cret@"),
        ("http://ann:se@cret@h", "http://h", "ann:se@cret"),
        ("http://ann@[::1]:80", "http://[::1]:80", "ann"),
    ],
)
def test_a_password_in_the_url_is_sent_as_a_header_and_written_nowhere(
    url: str, root: str, login: str
) -> None:
    options = given("--url", url)
    assert options.url == root
    scheme, _, encoded = options.headers["Authorization"].partition(" ")
    assert (scheme, base64.b64decode(encoded).decode()) == ("Basic", login)
    assert "cret" not in str(options)[: str(options).index("headers=")]
    assert "cret" not in (text := str(options.as_json()))
    assert encoded not in text


def test_a_header_that_was_given_counts_more_than_the_url() -> None:
    options = given("--url", "http://ann:secret@h", "--header", "Authorization: Bearer token")
    assert options.headers == {"Authorization": "Bearer token"}


def test_the_values_of_headers_are_not_written_anywhere() -> None:
    options = given("--header", "Authorization: Bearer secret")
    assert options.headers == {"Authorization": "Bearer secret"}
    assert "secret" not in str(options.as_json())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "-X (requests per second) and -T (seconds) are needed, or --concurrency"),
        (("-X", "2"), "-X (requests per second) and -T (seconds) are needed"),
        (("-X", "0.1", "-T", "5"), "-X 0.1 over -T 5 s makes no request"),
        (("-X", "-1", "-T", "5"), "-X/--rate: -1 came; it must be at least 0"),
        (("-X", "0", "-T", "5"), "-X/--rate: 0 came; it must be above 0"),
        (("-X", "nan", "-T", "5"), "-X/--rate: nan came"),
        (("-X", "fast", "-T", "5"), "'fast' came; it must be a number"),
        ((*OPEN, "--task", "3"), "--task: invalid choice: 3"),
        ((*OPEN, "-P", "99999"), "'99999' came; a port is 1 to 65535"),
        ((*OPEN, "--url", "host:80"), "'host:80' came; it should look like http://host:port"),
        ((*OPEN, "--url", "http://h:99999"), "'http://h:99999' came; it should look like http"),
        ((*OPEN, "--url", "http://[::1"), "'http://[::1' came; it should look like http"),
        ((*OPEN, "--url", "http://me:a/secret@h"), "a / in a password is spelled %2F"),
        ((*OPEN, "--url", "http://me:secret@"), "'http://' came; it should look like http"),
        ((*OPEN, "--warmup", "-1"), "'-1' came; it must be a whole number >= 0"),
        ((*OPEN, "--cancel-rate", "1.5"), "1.5 came; it must be 0 to 1"),
        ((*OPEN, "--goodput", "speed:1"), "'speed' came; known are ttft, tpot, e2e"),
        ((*OPEN, "--goodput", "ttft"), "ttft:'' came; it must be a number"),
        ((*OPEN, "--slo", "ttft_p95:1"), "'ttft_p95' came; known are ttft_mean"),
        ((*OPEN, "--slo", "goodput:1"), "--slo goodput needs --goodput"),
        ((*OPEN, "--save", "pdf"), "'pdf' came; allowed are log, json, png, html, or none"),
        ((*OPEN, "--header", "nothing"), "it should look like NAME:VALUE"),
        (("--concurrency", "4"), "--concurrency needs an end: -T (seconds), or --max-requests"),
        (("--concurrency", "4", "-X", "2", "--max-requests", "3"), "-X needs -T"),
        (("--concurrency", "0", "-T", "2"), "'0' came; it must be a whole number >= 1"),
        ((*OPEN, "--concurency", "3"), "unrecognized arguments: --concurency"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    flags: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert "secret" not in error
