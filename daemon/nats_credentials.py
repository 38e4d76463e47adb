"""What proves to a NATS server who we are, read from files: credentials, nkeys, passwords, tokens, TLS.

As in `credentials`, nothing that is read here is logged or part of an error.
"""

from __future__ import annotations

import base64
import binascii
import re
import ssl
from datetime import UTC, datetime

import msgspec

from .credentials import CredentialError, load_tls, read_secret

_JWT = re.compile(rb"-+BEGIN NATS USER JWT-+\s+([A-Za-z0-9_.=-]+)\s+-+END NATS USER JWT-+")
_SEED = re.compile(rb"-+BEGIN USER NKEY SEED-+\s+(SU[A-Z2-7]+)\s+-+END USER NKEY SEED-+")
_BARE_SEED = re.compile(rb"^(S[A-Z2-7]{50,})\s*$", re.MULTILINE)
_LINE_MAX_BYTES = 4096
_SEED_BYTES = 2 + 32 + 2
"""Of kind and secret, the secret, and a checksum."""
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_TIME = rb"(?:\x17\x0d([0-9]{12}Z)|\x18\x0f([0-9]{14}Z))"
_VALIDITY = re.compile(rb"\x30[\x1e-\x22]" + _TIME + _TIME)
"""The two times of a certificate in DER, RFC 5280 4.1.2.5: two digits of the year until 2049, then four."""


class UserCredentials(msgspec.Struct, frozen=True):
    """A user's JWT and the seed of its key. `expires_s` is in seconds since the Unix epoch, 0 for never."""

    jwt: bytes
    seed: bytes
    expires_s: int

    def __repr__(self) -> str:
        return "UserCredentials(…)"

    def sign(self, nonce: str) -> bytes:
        """The signature that a server asks for, in base64."""
        return base64.b64encode(_sign(self.seed, nonce))

    def token(self) -> bytes:
        """The JWT, as nats-py asks for it."""
        return self.jwt


class _Claims(msgspec.Struct):
    exp: int = 0


def read_user_credentials(path: str) -> UserCredentials:
    """A credentials file as `nsc generate creds` writes it. Raises CredentialError."""
    text = read_secret(path)
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        raise CredentialError(path, "is no credentials file of NATS: it has no user JWT, or no user nkey seed")
    _check_seed(path, seed[1])
    return UserCredentials(jwt[1], seed[1], _expiry(jwt[1]))


def read_nkey_seed(path: str) -> str:
    """The seed of a user's nkey, alone on a line, as `nk -gen user` prints it. Raises CredentialError."""
    found = _BARE_SEED.search(read_secret(path))
    if found is None:
        raise CredentialError(path, "has no nkey seed in it: a line that begins with SU")
    _check_seed(path, found[1])
    return found[1].decode()


def read_secret_line(path: str) -> str:
    """A password or a token: the only line of a file. Raises CredentialError."""
    try:
        text = read_secret(path).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise CredentialError(path, "is no text") from error
    if not text:
        raise CredentialError(path, "is empty")
    if "\n" in text or len(text) > _LINE_MAX_BYTES:
        raise CredentialError(path, f"is not one line of at most {_LINE_MAX_BYTES} characters")
    return text


def client_tls(ca: str, certificate: str, key: str) -> ssl.SSLContext:
    """A client's context, TLS 1.2 and later. `ca` "": the authorities of the system. Raises CredentialError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not ca:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        read_secret(ca)
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise CredentialError(ca, f"has no usable PEM certificate in it: {error.reason or error}") from error
    if certificate:
        load_tls(context, certificate, key, "")
    return context


def certificate_expiry(path: str) -> int:
    """When the first certificate of a PEM file ends, in seconds since the Unix epoch; 0 when that cannot be read.

    TLS decides by itself; this is only to say so. Raises CredentialError.
    """
    pem = _PEM.search(read_secret(path))
    try:
        found = _VALIDITY.search(ssl.PEM_cert_to_DER_cert(pem[0].decode())) if pem else None
        if found is None:
            return 0
        text, form = (found[3], "%y%m%d%H%M%SZ") if found[3] else (found[4], "%Y%m%d%H%M%SZ")
        return int(datetime.strptime(text.decode(), form).replace(tzinfo=UTC).timestamp())
    except ValueError:
        return 0


def when(seconds: int) -> str:
    """A time for a sentence."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _expiry(jwt: bytes) -> int:
    """When a JWT ends. The server checks it; this is only to say so."""
    try:
        body = jwt.split(b".")[1]
        return msgspec.json.decode(base64.urlsafe_b64decode(body + b"=" * (-len(body) % 4)), type=_Claims).exp
    except (IndexError, ValueError, msgspec.DecodeError):
        return 0


def _check_seed(path: str, seed: bytes) -> None:
    """An nkey ends with its checksum, which its library does not look at."""
    try:
        raw = base64.b32decode(seed + b"=" * (-len(seed) % 8))
    except ValueError:
        raw = b""
    if len(raw) != _SEED_BYTES or binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise CredentialError(path, "has an nkey seed with a mistake in it")


def _sign(seed: bytes, nonce: str) -> bytes:
    import nkeys  # type: ignore[import-untyped]

    return bytes(nkeys.from_seed(bytearray(seed)).sign(nonce.encode()))
