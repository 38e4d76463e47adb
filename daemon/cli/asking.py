"""Asking a running daemon over HTTP, with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import click

from .ending import EXIT_UNAVAILABLE, Failure

DEFAULT_HTTP = "127.0.0.1:9480"
"""`HttpConfig.listen`, which is not imported here because it brings the whole configuration with it."""

_CHUNK_BYTES = 256 << 10

http_option = click.option(
    "--http",
    "address",
    default=DEFAULT_HTTP,
    show_default=True,
    envvar="KVCENSUS__HTTP__LISTEN",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Where the daemon listens.",
)
timeout_option = click.option(
    "--timeout-seconds",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Longest wait for the daemon.",
)


class Daemon:
    """A daemon to ask. Every method raises Failure, with what the daemon said of the request."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._url = address if "//" in address else f"http://{address}"
        try:
            parts = urlsplit(self._url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise click.BadParameter(f"{address!r}: {error}", param_hint="--http") from error
        if parts.scheme != "http" or not host or port is None:
            raise click.BadParameter(f"{address!r} is not HOST:PORT", param_hint="--http")
        self._host, self._port, self._timeout_s = host, port, timeout_s

    def get(self, path: str) -> bytes:
        """The JSON of an answer."""
        with self._answer("GET", path, None, {}) as response:
            return response.read()

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The JSON of an answer."""
        headers = {"Content-Type": "application/json"}
        with self._answer("POST", path, json.dumps(body), headers) as response:
            return response.read()

    def chunks(self, path: str, accept: str) -> Iterator[bytes]:
        """The parts of a long answer. Raises Failure too when it ends before its end."""
        with self._answer("GET", path, None, {"Accept": accept}) as response:
            while chunk := response.read(_CHUNK_BYTES):
                yield chunk

    @contextmanager
    def _answer(
        self, method: str, path: str, body: str | None, headers: dict[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            if response.status >= http.client.BAD_REQUEST:
                raise Failure(_refusal(response), 1)
            yield response
        except http.client.IncompleteRead as error:
            raise Failure(f"{self._url}{path}: the answer broke off", EXIT_UNAVAILABLE) from error
        except BrokenPipeError:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Failure(f"{self._url}{path}: {reason}", EXIT_UNAVAILABLE) from error
        finally:
            connection.close()


def _refusal(response: http.client.HTTPResponse) -> str:
    """What the daemon says is wrong, or the status when it does not say it in its own words."""
    try:
        error = json.loads(response.read())["error"]
        return ": ".join(part for part in (error["field"], error["message"]) if part)
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status} {response.reason}"
