"""Answers in the encoding that was asked for, and every error in one shape."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from uuid import uuid4

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from kvcensus.backends.errors import BackendError

from ..logs import get_logger
from .bodies import ErrorAnswer, ErrorDetail

JSON = "application/json"
MSGPACK = "application/msgpack"
MSGPACK_TYPES = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})

_JSON_HEADERS = {"Content-Type": JSON}
_MSGPACK_HEADERS = {"Content-Type": MSGPACK}
_encode_json = msgspec.json.Encoder().encode
_encode_msgpack = msgspec.msgpack.Encoder().encode

log = get_logger("http")

_CODES = {
    HTTPStatus.BAD_REQUEST: "malformed",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
}


class RequestRefused(Exception):
    """The request cannot be answered. `field` is the path of what is wrong in it, None when no field is to blame."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.detail = ErrorDetail(code, field and _sayable(field), _sayable(message))


def answer(request: web.Request, body: msgspec.Struct, status: int = HTTPStatus.OK) -> web.Response:
    """A body as msgpack where the request prefers it, as JSON otherwise."""
    accept = request.headers.get("Accept")
    if accept is not None and "msgpack" in accept and prefers_msgpack(accept):
        return web.Response(body=_encode_msgpack(body), status=status, headers=_MSGPACK_HEADERS)
    return web.Response(body=_encode_json(body), status=status, headers=_JSON_HEADERS)


def _sayable(text: str) -> str:
    """Text of a request, in which bytes that are not UTF-8 are lone surrogates, which have no encoding."""
    return text.encode(errors="backslashreplace").decode()


def prefers_msgpack(accept: str) -> bool:
    """Whether an Accept header gives a msgpack type a higher weight than JSON, or the same one and named first."""
    best, chosen = 0.0, ""
    for choice in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in choice.split(";"))
        if media_type in MSGPACK_TYPES or media_type in (JSON, "application/*", "*/*"):
            weight = _weight(parameters)
            if weight > best:
                best, chosen = weight, media_type
    return chosen in MSGPACK_TYPES


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0


@web.middleware
async def errors_as_answers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into the one error shape; what nobody foresaw is logged with an id."""
    try:
        return await handler(request)
    except RequestRefused as refused:
        response = answer(request, ErrorAnswer(refused.detail), refused.status)
        response.headers.update(refused.headers)
        return response
    except web.HTTPException as refused:
        return _refused_by_router(request, refused)
    except ConnectionError:
        log.debug("client_left", path=request.path)
        return web.Response(status=HTTPStatus.BAD_REQUEST)
    except (BackendError, OSError) as error:  # nothing but the index has files here
        log.warning("request_failed", path=request.path, detail=str(error))
        return _error(request, HTTPStatus.SERVICE_UNAVAILABLE, "backend", str(error))
    except Exception:
        request_id = uuid4().hex[:12]
        log.exception("request_broke", request_id=request_id, method=request.method, path=request.path)
        message = f"an internal error; the log has it under request_id {request_id}"
        return _error(request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal", message)


def _refused_by_router(request: web.Request, refused: web.HTTPException) -> web.Response:
    status = HTTPStatus(refused.status)
    message = f"{request.method} {request.path}: {status.phrase.lower()}"
    if isinstance(refused, web.HTTPRequestEntityTooLarge):
        message = "the body is larger than http.max_body_bytes allows"
    response = _error(request, status, _CODES.get(status, status.name.lower()), message)
    if isinstance(refused, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(refused.allowed_methods))
    return response


def _error(request: web.Request, status: HTTPStatus, code: str, message: str) -> web.Response:
    return answer(request, ErrorAnswer(ErrorDetail(code, None, _sayable(message))), status)
