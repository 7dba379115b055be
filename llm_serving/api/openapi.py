"""How the routes are documented: `/openapi.json`, which `/docs` shows.

A route says in its `Operation` what it takes (pydantic models) and what it answers (msgspec
structs); the document is made from these, so it cannot say anything else than the code does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from llm_serving.api.endpoint import Endpoint
from llm_serving.api.errors import ErrorBody

__all__ = ["ApiRoute", "Operation", "openapi_document"]

REFERENCE = "#/components/schemas/{}"

_ERRORS = {
    "400": "The body is not UTF-8, not JSON, or too deep; under /v1 also what is 422 elsewhere",
    "404": "No model is served under this name",
    "413": "The body is too large",
    "422": "A field is unknown, out of range or not supported; the sentence names it",
    "429": "The waiting queue is full; Retry-After says when to come back",
    "500": "A bug, or request_failed: this request would fail again",
    "503": "Not ready; Retry-After says when to come back",
    "504": "The deadline passed before the first token",
}


@dataclass(frozen=True, slots=True)
class Operation:
    summary: str
    answers: dict[str, Any]  # content type -> type of the answer, or of an event of a stream
    takes: tuple[type[BaseModel], ...] = ()  # any one of these
    errors: tuple[str, ...] = ("404", "500")
    error_body: type[msgspec.Struct] = ErrorBody


class ApiRoute(Route):
    def __init__(self, path: str, endpoint: Endpoint, method: str, operation: Operation) -> None:
        super().__init__(path, endpoint, methods=[method], name=operation.summary)
        self.method = method
        self.operation = operation


def openapi_document(routes: Iterable[object], title: str, version: str) -> dict[str, Any]:
    """An OpenAPI 3.1 document of the ApiRoutes among `routes`."""
    documented = [route for route in routes if isinstance(route, ApiRoute)]
    models = {model: None for route in documented for model in route.operation.takes}
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template=REFERENCE.format("{model}")
    )
    answers = [kind for route in documented for kind in route.operation.answers.values()]
    error_bodies = {route.operation.error_body: None for route in documented}
    schemas, components = msgspec.json.schema_components(
        [*answers, *error_bodies], ref_template=REFERENCE.format("{name}")
    )
    schema_of = iter(schemas)
    paths: dict[str, dict[str, Any]] = {}
    for route in documented:
        bodies = [references[model, "validation"] for model in route.operation.takes]
        answer = {kind: {"schema": next(schema_of)} for kind in route.operation.answers}
        described = _operation(route, bodies, answer)
        paths.setdefault(route.path.replace(":path}", "}"), {})[route.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": {**definitions.get("$defs", {}), **components}},
    }


def _operation(
    route: ApiRoute, bodies: list[dict[str, Any]], answers: dict[str, Any]
) -> dict[str, Any]:
    operation = route.operation
    reference = REFERENCE.format(operation.error_body.__name__)
    error = {"application/json": {"schema": {"$ref": reference}}}
    errors = {
        status: {"description": _ERRORS[status], "content": error} for status in operation.errors
    }
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _operation_id(route),
        "responses": {"200": {"description": "As asked", "content": answers}, **errors},
    }
    if bodies:
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        content = {"application/json": {"schema": schema}}
        described["requestBody"] = {"required": True, "content": content}
    if route.param_convertors:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
    return described


def _operation_id(route: ApiRoute) -> str:
    words = [word.strip("{}").partition(":")[0] for word in route.path.split("/") if word]
    return "_".join([route.method.lower(), *words])
