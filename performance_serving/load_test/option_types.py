"""How is one value on the command line spelled?  Each function is an argparse type.

They raise ArgumentTypeError, which says what came and what would be right.
"""

from __future__ import annotations

import argparse
import base64
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = [
    "KINDS_OF_FILE",
    "Root",
    "count_from",
    "header",
    "kinds_of_file",
    "limit_of",
    "port",
    "positive",
    "root_url",
    "share",
]

KINDS_OF_FILE = ("log", "json", "png", "html")


def kinds_of_file(text: str) -> list[str]:
    kinds = [kind for kind in text.split(",") if kind]
    for kind in kinds:
        if kind not in (*KINDS_OF_FILE, "none"):
            allowed = ", ".join(KINDS_OF_FILE)
            raise argparse.ArgumentTypeError(f"{kind!r} came; allowed are {allowed}, or none")
    return kinds


def limit_of(names: Sequence[str]) -> Callable[[str], tuple[str, float]]:
    def parse_limit(text: str) -> tuple[str, float]:
        name, _, number = text.partition(":")
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name!r} came; known are {', '.join(names)}")
        return name, _number(number, f"{name}:", 0.0)

    return parse_limit


def positive(text: str) -> float:
    value = _number(text, "", 0.0)
    if value == 0:
        raise argparse.ArgumentTypeError("0 came; it must be above 0")
    return value


def share(text: str) -> float:
    if (value := _number(text, "", 0.0)) > 1:
        raise argparse.ArgumentTypeError(f"{text} came; it must be 0 to 1")
    return value


def _number(text: str, prefix: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{prefix}{text!r} came; it must be a number") from None
    if not math.isfinite(value) or value < least:
        raise argparse.ArgumentTypeError(f"{prefix}{text} came; it must be at least {least:g}")
    return value


def count_from(least: int) -> Callable[[str], int]:
    def parse_count(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} came; it must be a whole number >= {least}")
        return int(text)

    return parse_count


def port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} came; a port is 1 to 65535")
    return int(text)


class Root(NamedTuple):
    """Of a server, without what the dialects add themselves, and without a password."""

    url: str
    authorization: str | None  # the header that says the user and password of the URL


def root_url(text: str) -> Root:
    """`http://user:password@host` is taken apart, so that the password is in no file of a run."""
    user, at, rest = text.rpartition("@")
    scheme, _, user = user.partition("://")
    url = f"{scheme}://{rest}" if at else text
    if at and ("/" in user or not user):
        raise argparse.ArgumentTypeError(
            "an @ came that ends no user:password; a / in a password is spelled %2F, an @ in a "
            "path %40"
        )
    if not re.fullmatch(r"https?://[^/?#\s]+[^?#\s]*", url) or not _has_host(url):
        raise argparse.ArgumentTypeError(f"{url!r} came; it should look like http://host:port")
    encoded = base64.b64encode(unquote(user).encode()).decode()
    return Root(url.rstrip("/").removesuffix("/v1"), f"Basic {encoded}" if at else None)


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, half an IPv6 address
        return False


def header(text: str) -> tuple[str, str]:
    name, colon, value = (part.strip() for part in text.partition(":"))
    if not colon or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name):
        raise argparse.ArgumentTypeError(f"{text!r} came; it should look like NAME:VALUE")
    return name, value
