"""Secrets, which stand in files and nowhere else: bearer tokens, TLS keys, CURVE keys.

What is read here is never logged, never part of an answer, and never part of an error.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

_MAX_FILE_BYTES = 1 << 20
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]+=*")
"""`b64token` of RFC 6750: what can stand in an Authorization header."""
_CURVE_KEY = re.compile(r'^\s*(public|secret)-key\s*=\s*"([!-~]{40})"\s*$', re.MULTILINE)
"""A line of a certificate as `zmq.auth` writes it: a key of 32 bytes in Z85."""
_NOT_Z85 = re.compile(r"[^0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]")
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class CredentialError(Exception):
    """A file of secrets cannot be used. The text is `FILE: REASON`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)


class Tokens:
    """Bearer tokens, kept only as digests of equal length."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._digests = [hashlib.sha256(token).digest() for token in tokens]

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, token: bytes) -> bool:
        """Whether it is one of them. Takes the same time whichever it is, and however much of one it has right."""
        digest = hashlib.sha256(token).digest()
        return sum(hmac.compare_digest(digest, one) for one in self._digests) > 0


def read_tokens(path: str) -> Tokens:
    """The tokens of a file, one a line; empty lines and those that begin with `#` do not count.

    Raises CredentialError, also when there is none.
    """
    tokens = []
    for number, line in enumerate(read_secret(path).splitlines(), 1):
        token = line.strip()
        if not token or token.startswith(b"#"):
            continue
        if not _TOKEN.fullmatch(token):
            raise CredentialError(
                path, f"line {number} is no bearer token: letters, digits and -._~+/ with = at the end"
            )
        tokens.append(token)
    if not tokens:
        raise CredentialError(path, "has no token in it")
    return Tokens(tokens)


def server_tls(certificate: str, key: str, client_ca: str) -> ssl.SSLContext:
    """A server's context, TLS 1.2 and later. `client_ca` "": any client is let in. Raises CredentialError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_tls(context, certificate, key, client_ca)
    return context


def load_tls(context: ssl.SSLContext, certificate: str, key: str, client_ca: str) -> None:
    """Read the files of `server_tls`, for the connections to come. Raises CredentialError."""
    if b"-----BEGIN CERTIFICATE-----" not in read_secret(certificate):
        raise CredentialError(certificate, "has no PEM certificate in it")
    if b"PRIVATE KEY-----" not in read_secret(key):
        raise CredentialError(key, "has no PEM private key in it")

    def ask_nobody() -> str:
        raise CredentialError(key, "is encrypted; give a key without a passphrase, in a file that only its owner reads")

    try:
        context.load_cert_chain(certificate, key, ask_nobody)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CredentialError(key, f"is not the key of the certificate in {certificate}") from error
        raise CredentialError(f"{certificate}, {key}", f"cannot be used: {error.reason or error}") from error
    if client_ca:
        read_secret(client_ca)
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise CredentialError(client_ca, f"has no usable PEM certificate in it: {error.reason or error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
        # A session that is resumed is not asked for a certificate again.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0


class CurveKeys(msgspec.Struct, frozen=True):
    """What a CURVE client needs, in Z85: the server's public key, and its own pair."""

    server: bytes
    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return "CurveKeys(…)"


def read_curve_keys(server_key_file: str, secret_key_file: str) -> CurveKeys:
    """The keys in two certificates of `zmq.auth`. Raises CredentialError."""
    server = _curve_keys_of(server_key_file).get("public")
    if server is None:
        raise CredentialError(server_key_file, 'has no line public-key = "…" with a key of 40 characters')
    own = _curve_keys_of(secret_key_file)
    if own.keys() != {"public", "secret"}:
        raise CredentialError(secret_key_file, 'has no lines public-key = "…" and secret-key = "…"; see kvcensus keys')
    return CurveKeys(server, own["public"], own["secret"])


def _curve_keys_of(path: str) -> dict[str, bytes]:
    try:
        text = read_secret(path).decode()
    except UnicodeDecodeError as error:
        raise CredentialError(path, "is no text") from error
    found = dict(_CURVE_KEY.findall(text))
    if any(_NOT_Z85.search(key) for key in found.values()):
        raise CredentialError(path, "has a key that is not Z85")
    return {name: key.encode() for name, key in found.items()}


def open_to_others(path: str) -> bool:
    """Whether anybody but the owner may read or write a file of secrets."""
    try:
        return bool(os.stat(path).st_mode & OTHERS)
    except OSError:
        return False


Version = tuple[tuple[int, int, int] | None, ...]


def versions(paths: Sequence[str]) -> Version:
    """Something that changes when one of the files does, or is replaced. None for a file that is not there."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            seen = os.stat(path)
        except OSError:
            found.append(None)
        else:
            found.append((seen.st_ino, seen.st_size, seen.st_mtime_ns))
    return tuple(found)


def read_secret(path: str | Path) -> bytes:
    """The bytes of a small file. Raises CredentialError."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CredentialError(path, error.strerror or str(error)) from error
    if len(text) > _MAX_FILE_BYTES:
        raise CredentialError(path, f"is larger than {_MAX_FILE_BYTES} bytes")
    return text
