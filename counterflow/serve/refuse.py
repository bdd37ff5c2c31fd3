"""What went wrong, in OpenAI's form: message, type, the field and a code that clients act upon."""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from counterflow.errors import RequestError, first_line
from counterflow.serve.answers import failure
from counterflow.serve.protocol import UNBUILT
from counterflow.serve.worker import Busy, EngineFailed

INVALID = "invalid_request_error"
CODES = {404: "unknown_url", 405: "method_not_supported", 413: "body_too_large"}
FIELD_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
}
"""By pydantic's kinds of error; a wrong type is `invalid_type`, all else `invalid_value`."""
SHOWN = 60
"""Characters of a value that an error quotes."""


class ModelMissing(Exception):
    """A model that is not served was meant."""


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), "the table below says so"
    return JSONResponse(failure(str(error), INVALID, error.code, error.param), 400)


async def _malformed(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "the table below says so"
    first, *others = error.errors()
    inside = [one for one in others if field_of(one).startswith(field_of(first))]
    # Where a field may be of several types, the one whose trial came farthest was meant.
    return JSONResponse(failure(*described(max([first, *inside], key=lambda one: len(field_of(one))))), 400)


def field_of(error: Mapping[str, Any]) -> str:
    """Where one of pydantic's errors lies, as messages.0.content; without the names of types that were tried."""
    path = [str(part) for part in error["loc"][1:] if isinstance(part, int) or re.fullmatch(r"\w+", part)]
    while path and path[-1] in ("str", "int", "float", "bool"):
        path.pop()
    return ".".join(path)


def described(error: Mapping[str, Any]) -> tuple[str, str, str | None, str | None]:
    """(message, type, code, field) of one of pydantic's errors."""
    kind, said, field = error["type"], error["msg"], field_of(error)
    if kind == "json_invalid":
        why, at = error["ctx"]["error"], error["loc"][-1]
        return f"The body is not JSON ({why}, at character {at}).", INVALID, None, None
    if not field:
        return f"The body is no request ({said}); send an object.", INVALID, "invalid_type", None
    if kind == "missing":
        return f"'{field}' is missing; it must be given.", INVALID, FIELD_CODES[kind], field
    if kind == "extra_forbidden":
        return f"'{field}' is not known here; leave it out.", INVALID, FIELD_CODES[kind], field
    value = repr(error["input"])
    value = value if len(value) <= SHOWN else value[:SHOWN] + "…"
    if UNBUILT.intersection(field.split(".")):
        return f"{field} is {value}; it is not supported: leave it out.", INVALID, "unsupported_value", field
    code = "invalid_type" if kind.endswith("_type") else FIELD_CODES.get(kind, "invalid_value")
    return f"{field} is {value}; {said[0].lower()}{said[1:]}.", INVALID, code, field


async def _missing(_: Request, error: Exception) -> Response:
    return JSONResponse(failure(str(error), INVALID, "model_not_found", "model"), 404)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "the table below says so"
    where = f"{request.method} {request.url.path}"
    said = {
        400: f"The body cannot be read as JSON ({first_line(error.__cause__ or error)}).",
        404: f"Unknown request URL: {where}. GET /openapi.json lists what is here.",
        405: f"Not allowed: {where}. Another method may be meant.",
    }.get(error.status_code, error.detail)
    return JSONResponse(
        failure(said, INVALID, CODES.get(error.status_code)), error.status_code, error.headers
    )


async def _busy(_: Request, error: Exception) -> Response:
    message = "The queue is full; try again in a moment."
    return JSONResponse(
        failure(message, "rate_limit_error", "rate_limit_exceeded"), 429, {"Retry-After": "1"}
    )


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(failure(f"The engine failed: {error}", "server_error"), 503)


async def _unknown(_: Request, error: Exception) -> Response:
    return JSONResponse(failure("The server made a mistake; its log says more.", "server_error"), 500)


HANDLERS: Mapping[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    RequestError: _refused,
    RequestValidationError: _malformed,
    ModelMissing: _missing,
    HTTPException: _http,
    Busy: _busy,
    EngineFailed: _failed,
    Exception: _unknown,
}
