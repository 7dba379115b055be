"""`/docs`: the OpenAPI document as one page of HTML, for people.

It holds its own style, runs no script and loads nothing, so it reads the same without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from llm_serving.api.endpoint import Endpoint
from llm_serving.api.exchange import Exchange

__all__ = ["DocsPage", "documentation_page"]

HTML = b"text/html; charset=utf-8"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
  color: #1f2328; background: #fff }
h1 small, .kind, .bounds { color: #59636e; font-weight: normal; font-size: 13px }
h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .2em; margin-top: 2em }
code { font: 13px ui-monospace, monospace }
details, section { border: 1px solid #d1d9e0; border-radius: 6px; margin: .5em 0;
  padding: .4em .8em }
summary { cursor: pointer } summary code { font-weight: 600; margin: 0 .6em }
section h3 { margin: .2em 0; font-size: 1em } a { color: #0969da }
.method { display: inline-block; width: 3.4em; font: 600 12px ui-monospace, monospace;
  color: #1a7f37 } .post { color: #0969da }
table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #d1d9e0;
  padding: .3em .8em .3em 0; vertical-align: top } td:first-child { width: 14em }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 }
  details, section, td, h2 { border-color: #30363d } h1 small, .kind, .bounds { color: #9198a1 }
  a, .post { color: #58a6ff } .method { color: #3fb950 } .post { color: #58a6ff } }
"""
_BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
    "minLength": "length >=",
    "maxItems": "items <=",
}

Schema = Mapping[str, Any]


class DocsPage(Endpoint):
    def __init__(self, document: Callable[[], Schema]) -> None:
        self._document = document

    async def answer(self, exchange: Exchange) -> None:
        page = documentation_page(self._document()).encode()
        await exchange.answer(200, page, HTML)


def documentation_page(document: Schema) -> str:
    """All routes, then all objects that they take and answer."""
    title, version = escape(document["info"]["title"]), escape(document["info"]["version"])
    routes = [
        _route(path, method, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [_schema(*item) for item in document["components"]["schemas"].items()]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title} <small>{version}</small></h1>"
        '<p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>'
        f"<h2>Routes</h2>{''.join(routes)}<h2>Objects</h2>{''.join(schemas)}</body></html>\n"
    )


def _route(path: str, method: str, operation: Schema) -> str:
    rows = [_row("body", _kinds(operation["requestBody"]))] if "requestBody" in operation else []
    for status, answer in operation["responses"].items():
        rows.append(_row(status, f"{escape(answer['description'])} {_kinds(answer)}"))
    return (
        f'<details><summary><span class="method {method}">{method.upper()}</span>'
        f"<code>{escape(path)}</code>{escape(operation['summary'])}</summary>"
        f"<table>{''.join(rows)}</table></details>"
    )


def _kinds(holder: Schema) -> str:
    """The objects of a body or an answer, each with its content type."""
    content = holder.get("content", {}).items()
    kinds = (f"{_type(media['schema'])} as {escape(kind)}" for kind, media in content)
    return f'<span class="kind">{"; ".join(kinds)}</span>'


def _schema(name: str, schema: Schema) -> str:
    required = schema.get("required", ())
    rows = (
        _row(field, _field(inner, field in required))
        for field, inner in schema.get("properties", {}).items()
    )
    head = f'<h3 id="{escape(name)}">{escape(name)}</h3>'
    return f"<section>{head}<table>{''.join(rows)}</table></section>"


def _field(schema: Schema, is_required: bool) -> str:
    default = schema.get("default")
    notes = ["required"] if is_required else [] if default is None else [f"default {default!r}"]
    bounds = escape(", ".join([*notes, *_bounds(schema)]))
    kind = f'<span class="kind">{_type(schema)}</span>'
    described = escape(schema.get("description", ""))
    return f'{described} {kind} <span class="bounds">{bounds}</span>'


def _bounds(schema: Schema) -> Iterator[str]:
    yield from (f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema)
    for inner in schema.get("anyOf", ()):
        yield from _bounds(inner)


def _type(schema: Schema) -> str:
    """In words; the name of an object leads to it."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(inner) for inner in schema["anyOf"])
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    return escape(str(schema.get("type", "any")))


def _row(name: str, html: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{html}</td></tr>"
