"""Requests as typed values, and what is wrong with those that cannot be."""

from __future__ import annotations

import re
from binascii import unhexlify
from collections.abc import Callable
from http import HTTPStatus
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from kvcensus.backends.model import MAX_HASH_BYTES, ROOT
from kvcensus.translators.hashes import BadHash, hash_bytes

from .answers import JSON, MSGPACK, MSGPACK_TYPES, RequestRefused
from .bodies import ROOT_WORD

T = TypeVar("T")

_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_NAMED = re.compile(r"field `(?P<name>[^`]*)`")
_SIZES = frozenset(range(1, MAX_HASH_BYTES + 1))


class BodyReader(Generic[T]):
    """Reads bodies of one type, in JSON or msgpack."""

    def __init__(self, body: type[T]) -> None:
        self._json: Callable[[bytes], T] = msgspec.json.Decoder(body).decode
        self._msgpack: Callable[[bytes], T] = msgspec.msgpack.Decoder(body).decode

    async def read(self, request: web.Request) -> T:
        """The request's body. Raises RequestRefused; HTTPRequestEntityTooLarge for one that is too long."""
        decode = self._decoder(request)
        raw = await request.read()
        try:
            return decode(raw)
        except msgspec.ValidationError as error:
            raise _invalid(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "malformed", f"the body cannot be decoded: {error}") from None

    def _decoder(self, request: web.Request) -> Callable[[bytes], T]:
        stated = request.headers.get("Content-Type", JSON)
        if stated == JSON:
            return self._json
        media_type = stated.partition(";")[0].strip().lower()
        if media_type in MSGPACK_TYPES:
            return self._msgpack
        if media_type in (JSON, ""):
            return self._json
        raise RequestRefused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            f"Content-Type is {media_type}; send {JSON} or {MSGPACK}",
        )


def read_query(request: web.Request, query: type[T]) -> T:
    """The request's query parameters. Raises RequestRefused, also for a parameter given twice."""
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name in given:
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "invalid", f"`{name}` is given more than once", name)
        given[name] = value
    try:
        return msgspec.convert(given, query, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None


def read_hash(value: str | int, field: str) -> bytes:
    """A block hash. Raises RequestRefused that names `field`."""
    try:
        return _hash(value)
    except BadHash as bad:
        raise RequestRefused(HTTPStatus.BAD_REQUEST, "invalid", str(bad), field) from None


def read_hashes(values: list[str | int], field: str) -> list[bytes]:
    """Block hashes. Raises RequestRefused that names the place in `field`."""
    together = _hashes_in_hex(values)
    if together is not None:
        return together
    hashes: list[bytes] = []
    try:
        for value in values:
            hashes.append(_hash(value))  # noqa: PERF401 - the length so far names the bad one
    except BadHash as bad:
        raise RequestRefused(HTTPStatus.BAD_REQUEST, "invalid", str(bad), f"{field}[{len(hashes)}]") from None
    return hashes


def read_parent(value: str | int, field: str) -> bytes:
    """The hash of a parent block, or `root`."""
    return ROOT if value == ROOT_WORD else read_hash(value, field)


def _hashes_in_hex(values: list[str | int]) -> list[bytes] | None:
    """The common case, several times as fast as one by one. None when it is not that case, or anything is wrong."""
    try:
        hashes = list(map(unhexlify, values))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return hashes if _SIZES.issuperset(map(len, hashes)) else None


def _hash(value: str | int) -> bytes:
    if isinstance(value, int):
        return hash_bytes(value)
    try:
        found = bytes.fromhex(value)
    except ValueError:
        raise BadHash("a block hash is an even number of hex digits") from None
    if 2 * len(found) != len(value):
        raise BadHash("a block hash is hex digits without spaces")
    if not 1 <= len(found) <= MAX_HASH_BYTES:
        raise BadHash(f"a block hash of {len(found)} bytes; 1 to {MAX_HASH_BYTES} are accepted")
    return found


def _invalid(error: msgspec.ValidationError) -> RequestRefused:
    message = str(error)
    where = _WHERE.search(message)
    path = where["path"] if where else ""
    named = _NAMED.search(message)
    if named:
        path = f"{path}.{named['name']}" if path else named["name"]
    return RequestRefused(HTTPStatus.BAD_REQUEST, "invalid", message, path or None)
