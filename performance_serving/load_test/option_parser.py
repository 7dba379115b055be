"""Which options are there, and what does --help say of them?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from load_test.option_types import (
    count_from,
    header,
    kinds_of_file,
    limit_of,
    port,
    positive,
    root_url,
    share,
)
from load_test.slo import GOODPUT_NAMES, SLO_NAMES

__all__ = ["SHIPPED_DATASET", "OneSentenceParser", "make_parser"]

SHIPPED_DATASET = Path(__file__).resolve().parents[1] / "dataset.json"
_EPILOG = """\
compare two results:  %(prog)s compare before.json after.json

exit code: 0; 1 a request failed, an --slo was missed, or a file could not be written; 2 the server,
the data set or an option cannot be used; 130 interrupted (what was measured is reported and saved)

example:  %(prog)s --task 1 -X 0.625 -T 2400"""


class OneSentenceParser(argparse.ArgumentParser):
    """A user's mistake is one sentence, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows every option\n")


def make_parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="test_serving_performance.py",
        description="Load test of a server that streams tokens: honest latencies at a given rate.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_load(parser.add_argument_group("load"))
    _add_server(parser.add_argument_group("server"))
    _add_requests(parser.add_argument_group("requests"))
    _add_report(parser.add_argument_group("report"))
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--task",
        type=int,
        choices=(1, 2),
        default=1,
        help="1: speed; 2: precision, which needs a server that writes its logits (default 1)",
    )
    add(
        "-X",
        "--rate",
        type=positive,
        metavar="PER_S",
        help="requests per second; int(X*T) requests are sent, whatever the server does",
    )
    add("-T", "--duration", type=positive, metavar="S", help="seconds")
    add(
        "--burstiness",
        type=positive,
        default=1.0,
        metavar="SHAPE",
        help="shape of the gamma distribution of the gaps: 1 (the default) is exponential, "
        "less is burstier, more is smoother",
    )
    add(
        "--concurrency",
        type=count_from(1),
        metavar="N",
        help="closed loop instead: N clients, each sends when its last answer has ended; "
        "int(X*T) requests, or until -T seconds have passed, or --max-requests",
    )
    add("--max-requests", type=count_from(1), metavar="N", help="send the first N only")
    add(
        "--seed", type=count_from(0), default=0, help="of the gaps and of --cancel-rate (default 0)"
    )
    add(
        "--cancel-rate",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of the requests, 0 to 1, that the client cuts off at a random token",
    )
    add(
        "--warmup",
        type=count_from(0),
        default=1,
        metavar="N",
        help="uncounted requests before the first (default 1; 0 sends none)",
    )


def _add_server(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-P", "--port", type=port, default=8835, help="of a server on this machine (default 8835)")
    add(
        "--url",
        type=root_url,
        help="root of any other server, as http://host:port or http://user:password@host:port",
    )
    add("--model", default="llama2", help="the name it serves the model under (default llama2)")
    add(
        "--api",
        choices=("tgi", "openai"),
        default="tgi",
        help="POST /models/MODEL/generate, or POST /v1/completions (default tgi)",
    )
    add(
        "--header",
        type=header,
        action="append",
        default=[],
        metavar="NAME:VALUE",
        help="send this with every request, as Authorization:...; may be repeated",
    )
    add(
        "--timeout",
        type=positive,
        default=1800.0,
        metavar="S",
        help="seconds until a request counts as lost (default 1800)",
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--dataset",
        type=Path,
        default=SHIPPED_DATASET,
        metavar="FILE",
        help='JSON list of {"instruction", "input", "output"} (default: the shipped one)',
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json that counts tokens (default: the server's /tokenize does)",
    )
    add(
        "--ignore-eos",
        action="store_true",
        help="ask for answers of full length, whatever the model wants to say",
    )


def _add_report(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "-O",
        "--out_dir",
        "--out-dir",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="files go to DIR/testLog (default .)",
    )
    add(
        "--save",
        type=kinds_of_file,
        nargs="*",
        metavar="KIND",
        help="what is written: some of log, json, png, html, or none (default: all four)",
    )
    add(
        "--plot",
        action=argparse.BooleanOptionalAction,
        help="write png and html too, or not, whatever --save says",
    )
    add(
        "--goodput",
        type=limit_of(GOODPUT_NAMES),
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help=f"count the requests within these limits; names: {', '.join(GOODPUT_NAMES)}",
    )
    add(
        "--slo",
        type=limit_of(SLO_NAMES),
        nargs="+",
        default=[],
        metavar="NAME:LIMIT",
        help="exit code 1 if one is missed; at most: LATENCY_STATISTIC in ms (ttft, tpot, itl, "
        "e2e, lag; mean, p50, p90, p99, max), errors, error_rate, exec_s; at least: tokens_per_s, "
        "requests_per_s, goodput",
    )
