"""Asking a running daemon over HTTP, with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from .ending import EXIT_CONFIG, EXIT_UNAVAILABLE, Failure

if TYPE_CHECKING:
    import ssl

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_HTTP = "127.0.0.1:9480"
"""`HttpConfig.listen`, which is not imported here because it brings the whole configuration with it."""

_CHUNK_BYTES = 256 << 10

_SECRETS = "kvcensus.asking"
"""Where a command's context keeps the options below, for `Daemon`."""


def _kept(ctx: click.Context, option: click.Parameter, path: str | None) -> None:
    ctx.meta.setdefault(_SECRETS, {})[option.name] = path


_token_option = click.option(
    "--token-file",
    type=click.Path(dir_okay=False),
    envvar="KVCENSUS_TOKEN_FILE",
    show_envvar=True,
    expose_value=False,
    callback=_kept,
    help="File with a bearer token of the daemon in its first line.",
)
_authority_option = click.option(
    "--tls-ca",
    type=click.Path(dir_okay=False),
    envvar="KVCENSUS_TLS_CA",
    show_envvar=True,
    expose_value=False,
    callback=_kept,
    help="PEM file of the authority of an https daemon. Default: those of this machine.",
)
_certificate_option = click.option(
    "--tls-certificate",
    type=click.Path(dir_okay=False),
    envvar="KVCENSUS_TLS_CERTIFICATE",
    show_envvar=True,
    expose_value=False,
    callback=_kept,
    help="PEM file of our own certificate and key, for a daemon with http.tls_client_ca.",
)
_address_option = click.option(
    "--http",
    "address",
    default=DEFAULT_HTTP,
    show_default=True,
    envvar="KVCENSUS__HTTP__LISTEN",
    show_envvar=True,
    metavar="[https://]HOST:PORT",
    help="Where the daemon listens.",
)


def http_option(function: F) -> F:
    """The options that say which daemon, and what to show it."""
    return _address_option(_token_option(_authority_option(_certificate_option(function))))


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

    def __init__(self, address: str, timeout_s: float, token_file: str = "") -> None:
        """`token_file` is used where the command was given none."""
        self._url = address if "//" in address else f"http://{address}"
        try:
            parts = urlsplit(self._url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise click.BadParameter(f"{address!r}: {error}", param_hint="--http") from error
        if parts.scheme not in ("http", "https") or not host or port is None:
            raise click.BadParameter(f"{address!r} is not HOST:PORT", param_hint="--http")
        self._host, self._port, self._timeout_s = host, port, timeout_s
        secrets = click.get_current_context().meta.get(_SECRETS, {})
        self._headers = _authorization(secrets.get("token_file") or token_file)
        self._tls = _tls(secrets.get("tls_ca"), secrets.get("tls_certificate")) if parts.scheme == "https" else None

    def get(self, path: str, also: int | None = None) -> bytes:
        """The body of an answer. `also`: a status of an error with which it is one too."""
        with self._answer("GET", path, None, {}, also) as response:
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
        self, method: str, path: str, body: str | None, headers: dict[str, str], also: int | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls)
            if self._tls is not None
            else http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        )
        try:
            connection.request(method, path, body, {**headers, **self._headers})
            response = connection.getresponse()
            if response.status >= http.client.BAD_REQUEST and response.status != also:
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


def _authorization(token_file: str | None) -> dict[str, str]:
    if not token_file:
        return {}
    try:
        with open(token_file, encoding="ascii") as file:
            token = next((line.strip() for line in file if line.strip() and not line.startswith("#")), "")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{token_file}: {getattr(error, 'strerror', None) or 'is no text'}", EXIT_CONFIG) from error
    if not token:
        raise Failure(f"{token_file}: has no token in it", EXIT_CONFIG)
    return {"Authorization": f"Bearer {token}"}


def _tls(authority: str | None, certificate: str | None) -> ssl.SSLContext:
    import ssl

    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate:
            context.load_cert_chain(certificate)
    except OSError as error:
        named = ", ".join(path for path in (authority, certificate) if path)
        raise Failure(f"{named}: {error.strerror or error}", EXIT_CONFIG) from error
    return context


def _refusal(response: http.client.HTTPResponse) -> str:
    """What the daemon says is wrong, or the status when it does not say it in its own words."""
    try:
        error = json.loads(response.read())["error"]
        return ": ".join(part for part in (error["field"], error["message"]) if part)
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status} {response.reason}"
