"""Why NATS cannot be used, in one sentence each that names the server, the file or the subject. Pure."""

from __future__ import annotations

import re
import socket
import ssl

from nats import errors

from ..config import NatsServers
from ..credentials import CredentialError
from ..nats_credentials import certificate_expiry, read_user_credentials, when

_VIOLATION = re.compile(r"permissions violation for (?P<what>publish|subscription) to \"(?P<subject>[^\"]+)\"", re.I)
_QUOTED = re.compile(r"nats: '?(?P<text>.*?)'?", re.DOTALL)
_UNKNOWN_AUTHORITY = frozenset({2, 18, 19, 20, 21})
"""X509_V_ERR_…: no issuer's certificate, self-signed, self-signed in the chain, no local issuer, no first signature."""
_EXPIRED, _NOT_YET_VALID = 10, 9
_OTHER_NAME = frozenset({62, 64})


class NatsProblem(Exception):
    """Why a bus cannot be used now, as a sentence for the operator."""


class NoAnswer(NatsProblem):
    """Nobody serves the subject of a request."""


def violation(error: Exception) -> tuple[str, str] | None:
    """("publish" or "subscription", subject) that a server refuses, None if that is not what it says.

    nats-py gives the subject in lower case.
    """
    found = _VIOLATION.search(str(error))
    return (found["what"].lower(), found["subject"]) if found else None


def whoever(servers: NatsServers) -> str:
    """Who we are to the servers, for a sentence."""
    if servers.credentials_file:
        return f"the user of {servers.credentials_file}"
    if servers.nkey_file:
        return f"the nkey in {servers.nkey_file}"
    if servers.user:
        return f"user {servers.user} with the password in {servers.password_file}"
    if servers.token_file:
        return f"the token in {servers.token_file}"
    return "a client without credentials"


def not_permitted(servers: NatsServers, what: str, subject: str) -> str:
    """A subject without permission."""
    verb = "publish to" if what == "publish" else "subscribe to"
    return f"{whoever(servers)} has no permission to {verb} {subject}"


def not_connected(error: BaseException, url: str, servers: NatsServers, offer: dict[str, object]) -> str:
    """Why there is no connection to `url`, or no longer one. `offer` is what the server said of itself, if it did."""
    if isinstance(error, NatsProblem | CredentialError):
        return str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate_refused(error, url, servers)
    if isinstance(error, ssl.SSLError):
        return _handshake_failed(error, url, servers)
    if isinstance(error, errors.UnexpectedEOF | ConnectionResetError | BrokenPipeError):
        return _ended(url, servers, offer)
    if isinstance(error, errors.StaleConnectionError):
        return f"{url} no longer answers pings"
    if isinstance(error, OSError | TimeoutError):
        return _unreachable(error, url, servers)
    return _said(str(error), url, servers) if isinstance(error, errors.Error) else f"{url}: {error!r}"


def _unreachable(error: Exception, url: str, servers: NatsServers) -> str:
    if isinstance(error, socket.gaierror):
        return f"{url}: the name of the host cannot be resolved: {error.strerror}"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {url}"
    if isinstance(error, TimeoutError):
        return f"{url} does not answer within {servers.connect_timeout_ms} ms"
    return f"{url} cannot be reached: {getattr(error, 'strerror', None) or error}"


def _said(text: str, url: str, servers: NatsServers) -> str:
    found = _QUOTED.fullmatch(text)
    words = found["text"] if found else text
    if words.lower() in ("authorization violation", "authorization failed"):
        return f"{url} refuses {whoever(servers)}{_why_refused(servers)}"
    if words.lower().startswith("user authentication expired"):
        return f"{url} ended the connection: {whoever(servers)} has expired{_why_refused(servers)}"
    return f"{url} says: {words}"


def _why_refused(servers: NatsServers) -> str:
    if servers.credentials_file:
        try:
            expires_s = read_user_credentials(servers.credentials_file).expires_s
        except CredentialError:
            return ""
        return f" (the credentials end at {when(expires_s)})" if expires_s else ""
    if servers.nkey_file or servers.user or servers.token_file:
        return ""
    return ": set credentials_file, nkey_file, user and password_file, or token_file"


def _certificate_refused(error: ssl.SSLCertVerificationError, url: str, servers: NatsServers) -> str:
    certificate = f"the certificate of {url}"
    if error.verify_code == _EXPIRED:
        return f"{certificate} has expired"
    if error.verify_code == _NOT_YET_VALID:
        return f"{certificate} is not valid yet: is the clock right?"
    if error.verify_code in _UNKNOWN_AUTHORITY:
        known = servers.tls_ca_file or "that the system trusts; set tls_ca_file"
        return f"{certificate} is signed by none of the authorities {'in ' * bool(servers.tls_ca_file)}{known}"
    if error.verify_code in _OTHER_NAME:
        return f"{certificate} is that of another host: {error.verify_message.rstrip('.')}"
    return f"{certificate} is refused: {error.verify_message}"


def _handshake_failed(error: ssl.SSLError, url: str, servers: NatsServers) -> str:
    reason = (error.reason or str(error)).lower().replace("_", " ")
    if "alert" not in reason:
        return f"{url}: the TLS handshake failed: {reason}"
    reason = reason.partition("alert ")[2]
    return f"{url} refuses {_our_certificate(servers)}: {reason}"


def _ended(url: str, servers: NatsServers, offer: dict[str, object]) -> str:
    if offer.get("tls_verify"):
        return f"{url} ended the connection: it refuses {_our_certificate(servers)}"
    return f"{url} ended the connection"


def _our_certificate(servers: NatsServers) -> str:
    path = servers.tls_certificate_file
    if not path:
        return "a client without a certificate: set tls_certificate_file and tls_key_file"
    try:
        expires_s = certificate_expiry(path)
    except CredentialError:
        expires_s = 0
    return f"the certificate in {path}" + (f" (it ends at {when(expires_s)})" if expires_s else "")
