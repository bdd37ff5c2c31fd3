"""What the server says of itself at /openapi.json: its routes, what they take and which answers they give.

Fields and bounds are `protocol`'s. What depends on the model that is served is filled in here: its name and its tokens.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

ERROR: Mapping[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _error(says: str) -> dict[str, Any]:
    return {"description": says, "content": {"application/json": {"schema": ERROR}}}


REFUSED: dict[int | str, dict[str, Any]] = {401: _error("The API key is missing or wrong.")}
MISSING = REFUSED | {404: _error("The model is not served here.")}
ANSWERED = {
    "description": "The texts, whole or as server-sent events.",
    "content": {
        "application/json": {"schema": {"type": "object", "required": ["id", "object", "choices"]}},
        "text/event-stream": {},
    },
}
COMPLETED: dict[str, Any] = {
    "response_model": None,
    "responses": MISSING
    | {
        200: ANSWERED,
        400: _error("A field is unknown, of the wrong type, impossible or not supported."),
        413: _error("The body is too large."),
        429: _error("More is queued than the server takes."),
        503: _error("The engine has failed."),
    },
}
"""What a route that writes is registered with."""


def describe(app: FastAPI, name: str, vocab: int, guarded: bool) -> None:
    """Have the application describe itself with the model's name and its tokens, and the key if it asks for one."""

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _of_model(found, name, vocab)
            if guarded:
                key = {"key": {"type": "http", "scheme": "bearer"}}
                found["components"]["securitySchemes"] = key
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = description


def _of_model(found: dict[str, Any], name: str, vocab: int) -> None:
    schemas = found["components"]["schemas"]
    for asked in ("CompletionAsked", "ChatAsked"):
        schemas[asked]["properties"]["model"] = {"type": "string", "enum": [name]}
    for kind in schemas["CompletionAsked"]["properties"]["prompt"]["anyOf"]:
        _bounded(kind, vocab)
    found["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"]["enum"] = [name]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for path in found["paths"].values():
        for one in path.values():
            one["responses"].pop("422", None)  # what cannot be is 400 here


def _bounded(schema: dict[str, Any], vocab: int) -> None:
    """Lists have an item or more, and tokens are the model's."""
    if schema.get("type") == "array":
        schema |= {"minItems": 1}
        _bounded(schema["items"], vocab)
    elif schema.get("type") == "integer":
        schema |= {"minimum": 0, "maximum": vocab - 1}
